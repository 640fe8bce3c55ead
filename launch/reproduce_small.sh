#!/usr/bin/env bash
# The papers' comparison of activations, small: ends in 2 hours on one H100, in 1 hour on 2 CPU cores, and goes on where
# it was interrupted. Sets up .venv first.
#
#   bash launch/reproduce_small.sh [--data PARQUET...] [--corpus NAME] [--output DIR] [--minutes N | --steps N]
#                                  [--seeds N] [--jobs N] [--dry-run]
#
#   --data PARQUET...  FineWeb-Edu parquet files (default: the packaged sample)
#   --corpus NAME      the data's name in the report (default: its files' names)
#   --output DIR       default: reproduce_small
#   --minutes N        time for all runs (default: 60 on CPUs, 120 on GPUs)
#   --steps N          steps of each run, instead of a trial and the minutes
#   --seeds N          the first N seeds (default: all)
#   --jobs N           runs at a time (default: one for each GPU or core)
#   --dry-run          say what would be done, train nothing
#   --debug            show the traceback of an error
#
# A run is one process with one thread a core: `taskset -c 1 nice bash launch/reproduce_small.sh` keeps to one core.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ " $* " == *" -h "* || " $* " == *" --help "* ]]; then # the lines above: nothing is built for them
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit
fi
bash "$root/launch/setup_env.sh"
exec "${MEGATRON_ACT_VENV:-$root/.venv}/bin/python" -m megatron_act.experiment.small "$@"
