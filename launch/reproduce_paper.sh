#!/usr/bin/env bash
# The xIELU paper's runs (arXiv 2411.13010): 1.1B and 3B parameters, SwiGLU, ReLU^2 and xIELU, 126 B tokens each.
#
#   bash launch/reproduce_paper.sh --dry-run     # every command, GPU-hours and disk; nothing runs
#   bash launch/reproduce_paper.sh --train P_train --valid P_valid --tokenizer DIR --output DIR [-- MEGATRON FLAGS]
#
#   PYTHON    interpreter with torch, Transformer Engine and megatron-core (default: the one of launch/setup_env.sh)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-${MEGATRON_ACT_VENV:-$root/.venv}/bin/python}"
if ! command -v "$python" >/dev/null; then
  echo "error: expected a Python interpreter, got none at $python: run launch/setup_env.sh, or set PYTHON" >&2
  exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_act.reproduce_paper "$@"
