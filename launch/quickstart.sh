#!/usr/bin/env bash
# From nothing to a report: sets up .venv, then tokenizes, trains four arms of equal compute, exports and compares.
#
#   bash launch/quickstart.sh [--quick] [--data PARQUET...] [--output DIR]
#
#   --quick            fewer steps an arm: every stage, minutes less
#   --data PARQUET...  FineWeb-Edu parquet files (default: the packaged sample)
#   --output DIR       default: quickstart
#   --debug            show the traceback of an error
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ " $* " == *" -h "* || " $* " == *" --help "* ]]; then # the lines above: nothing is built for them
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit
fi
bash "$root/launch/setup_env.sh"
exec "${MEGATRON_ACT_VENV:-$root/.venv}/bin/python" -m megatron_act.experiment.quickstart "$@"
