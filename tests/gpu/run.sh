#!/usr/bin/env bash
# GPU evidence: on a machine with an NVIDIA GPU, every GPU test and the benchmark, within 8 minutes, without a network.
#
#   WHEELS=dir bash tests/gpu/run.sh [--only PART]...     PART: kernels, training or benchmark; default: all
#
#   kernels     tests/test_kernels_*.py on the device, those marked gpu included
#   training    the tests marked gpu everywhere else
#   benchmark   tools/benchmark_kernels.py
#
# Uses the python3 (3.11 or newer), torch (2.11 or newer) and Triton (3.5 or newer) that are on PATH. Other packages that
# are missing are taken from the folder WHEELS and put into .gpu/site; the environment of python3 is not touched.
# Merges each part into tests/gpu_results.json (command, commit, machine, versions, date, outcomes or figures; parts that
# did not run keep theirs) and copies the benchmark's picture to tests/gpu_results.png. Logs: .gpu/PART.log.
# Then `python -m megatron_act.benchmark.readme` writes the README's tables.
#
#   COMMIT      the commit, where the files are no git checkout (default there: unknown)
#   WHEELS      folder of wheels. Made on a machine with a network, for Python 3.12 on x86-64, by
#                 pip download --dest wheels --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#                   --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#                   $(python3 tests/gpu/wheels.py --list)
#               or with fewer names: what is missing is said before anything runs. A source package of megatron-core
#               (.tar.gz) is built, if setuptools, pybind11 and a C++ compiler are there.
#
# Exit code: 0 all well, 1 a test or a part failed (the others ran), 2 it could not start (one line says why).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$root"
all=(kernels training benchmark)
total_s=460  # of the 8 minutes; the rest is start-up

fail() {
  echo "tests/gpu/run.sh: $*" >&2
  exit 2
}

parts=()
words="$*"
while (($#)); do
  case "$1" in
    -h | --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --only)
      [[ " ${all[*]} " == *" ${2:-} "* && -n "${2:-}" ]] || fail "--only: expected one of ${all[*]}, got '${2:-}'"
      parts+=("$2")
      shift 2
      ;;
    *) fail "expected --only PART or --help, got '$1'" ;;
  esac
done
((${#parts[@]})) || parts=("${all[@]}")

command -v python3 >/dev/null || fail "expected python3 on PATH, got none: install Python 3.11 or newer with torch"
python3 -c 'import sys, torch, triton; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  fail "expected a python3 with torch, Triton and an NVIDIA GPU, got none: run it on a GPU machine"
python3 tests/gpu/evidence.py check || exit 2
python3 tests/gpu/wheels.py --into .gpu/site "${parts[@]}" || exit 2

export PYTHONPATH="$root:$root/tests/gpu:$root/.gpu/site${PYTHONPATH:+:$PYTHONPATH}"
commit="$(git rev-parse --short=12 HEAD 2>/dev/null || true)" # now: a part that has written is a local change
if [[ -n "$commit" && -n "$(git status --porcelain --untracked-files=no)" ]]; then commit+=" with local changes"; fi
export MEGATRON_ACT_COMMIT="${COMMIT:-$commit}"
unset TRITON_INTERPRET  # the device, not Triton's interpreter

# tests PART TARGET...: pytest, its outcomes one by one (a process that dies loses only what did not run)
tests() {
  local part="$1" code=0
  shift
  GPU_OUTCOMES=".gpu/$part.jsonl" timeout --kill-after 20 "$limit_s" \
    python3 -m pytest -p gpu_outcomes -p no:cacheprovider -q "$@" 2>&1 | tee ".gpu/$part.log" || code=$?
  if ((code == 5)); then code=0; fi # no test was selected
  return "$code"
}

run_kernels() {
  local files=()
  for file in tests/test_kernels_*.py; do
    # no GPU is needed to read machine code, nor to add an activation (that test needs Megatron too)
    [[ "$file" == *compile.py || "$file" == *extension.py ]] || files+=("$file")
  done
  tests kernels "${files[@]}"
}

run_training() {
  local files
  mapfile -t files < <(grep -rlE 'mark\.gpu|needs_gpu' tests --include='test_*.py' | grep -v '^tests/test_kernels_' | sort)
  if ((${#files[@]} == 0)); then
    echo "training: no test is marked gpu" | tee .gpu/training.log
    return 0
  fi
  tests training -m gpu "${files[@]}"
}

run_benchmark() {
  rm -rf .gpu/benchmark
  timeout --kill-after 20 "$limit_s" python3 tools/benchmark_kernels.py --output .gpu/benchmark --debug \
    --minutes "$(python3 -c "print(round(($limit_s - 40) / 60, 2))")" 2>&1 | tee .gpu/benchmark.log || return $?
  cp .gpu/benchmark/kernels.png tests/gpu_results.png
}

# What is left of the time is divided among the parts that are left, in these proportions.
declare -A share=([kernels]=35 [training]=25 [benchmark]=40)
left=0
for part in "${parts[@]}"; do left=$((left + share[$part])); done
code=0
for part in "${parts[@]}"; do
  limit_s=$(((total_s - SECONDS) * share[$part] / left))
  left=$((left - share[$part]))
  rm -f ".gpu/$part.jsonl"
  began=$SECONDS part_code=0
  "run_$part" || part_code=$?
  python3 tests/gpu/evidence.py record "$part" --exit-code "$part_code" --seconds $((SECONDS - began)) \
    --command "bash tests/gpu/run.sh${words:+ $words}" || part_code=1
  if ((part_code)); then
    echo "tests/gpu/run.sh: $part failed (exit code $part_code): .gpu/$part.log" >&2
    code=1
  fi
done
exit "$code"
