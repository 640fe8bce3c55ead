#!/usr/bin/env bash
# Trains a config on this machine, after the preflight; the same command on a cluster has --platform.
#
#   bash launch/pretrain.sh CONFIG.yaml [--gpus-per-node 8] [--dry-run] [--preflight-only] [-- MEGATRON FLAGS]
#   bash launch/pretrain.sh CONFIG.yaml --cluster launch/cluster.yaml --nodes 64 --platform slurm --dry-run
#
#   PYTHON    interpreter with torch and megatron-core (default: the one of launch/setup_env.sh)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-${MEGATRON_ACT_VENV:-$root/.venv}/bin/python}"
if ! command -v "$python" >/dev/null; then
  echo "error: expected a Python interpreter, got none at $python: run launch/setup_env.sh, or set PYTHON" >&2
  exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_act.launch "$@"
