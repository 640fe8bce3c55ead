#!/usr/bin/env bash
# Sets up the environment and runs every check: style, types, tests. Extra words go to pytest.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash launch/setup_env.sh
python="${MEGATRON_ACT_VENV:-$root/.venv}/bin/python"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest "$@"
