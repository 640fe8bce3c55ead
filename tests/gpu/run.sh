#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and no network: every gpu-marked kernel test and the benchmark, in about 8 minutes.
#   WHEELS=dir bash tests/gpu/run.sh [--only kernels|benchmark]
# Uses the python3, torch and triton that are there; what else is missing comes from the wheels in $WHEELS.
# Writes tests/gpu_results.json (command, commit, GPU, versions, date, figures).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$root"
only=all
if [[ "${1:-}" == --only ]]; then only="${2:-}"; fi
case "$only" in
    all | kernels | benchmark) ;;
    *) echo "tests/gpu/run.sh: --only: expected kernels or benchmark, got '$only'" >&2; exit 2 ;;
esac
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "tests/gpu/run.sh: expected python3 with torch and a GPU, got none; run it on a GPU machine" >&2
    exit 2
fi
python3 -m venv --system-site-packages .gpu/venv
python=.gpu/venv/bin/python
for package in pytest pytest-timeout tqdm matplotlib; do
    if ! "$python" -c "import ${package//-/_}" 2>/dev/null; then
        "$python" -m pip install --quiet --no-index --find-links "${WHEELS:?set it to a folder with a wheel of $package}" "$package"
    fi
done
unset TRITON_INTERPRET
if [[ "$only" != benchmark ]]; then
    "$python" -m pytest tests/test_kernels_*.py --ignore=tests/test_kernels_compile.py
fi
if [[ "$only" != kernels ]]; then
    PYTHONPATH="$root" "$python" tools/benchmark_kernels.py --output .gpu/benchmark
    cp .gpu/benchmark/kernels.json tests/gpu_results.json
fi
