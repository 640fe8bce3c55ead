#!/usr/bin/env bash
# Sets up the environment and runs every check: style, types, tests (two files at a time). Extra words go to pytest;
# -n 0 runs one test after the other.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash launch/setup_env.sh
python="${MEGATRON_ACT_VENV:-$root/.venv}/bin/python"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
export OMP_NUM_THREADS=1 # each of two processes has a core
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
