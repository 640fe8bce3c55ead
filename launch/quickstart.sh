#!/usr/bin/env bash
# From nothing to a report: sets up .venv, then tokenizes, trains four arms of equal compute, exports and compares.
#
#   bash launch/quickstart.sh [--quick] [--data PARQUET...] [--output DIR]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/setup_env.sh"
exec "${MEGATRON_ACT_VENV:-$root/.venv}/bin/python" -m megatron_act.experiment.quickstart "$@"
