#!/usr/bin/env bash
# The papers' comparison of activations, small: ends in 2 hours on one H100, in 1 hour on 2 CPU cores, and goes on where
# it was interrupted. Sets up .venv first.
#
#   bash launch/reproduce_small.sh [--data PARQUET...] [--corpus NAME] [--output DIR] [--minutes N | --steps N]
#                                  [--seeds N] [--jobs N] [--dry-run]
#
# A run is one process with one thread a core: `taskset -c 1 nice bash launch/reproduce_small.sh` keeps to one core.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/setup_env.sh"
exec "${MEGATRON_ACT_VENV:-$root/.venv}/bin/python" -m megatron_act.experiment.small "$@"
