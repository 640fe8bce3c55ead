#!/usr/bin/env bash
# GPU evidence: on a machine with an NVIDIA GPU, every GPU test and the benchmark, within 8 minutes, without a network;
# Transformer Engine (te) in 8 more.
#
#   WHEELS=dir bash tests/gpu/run.sh [--only PART]...     PART: kernels, training, benchmark or te; default: all
#
#   kernels     tests/test_kernels_*.py on the device, those marked gpu included
#   training    the tests marked gpu everywhere else
#   benchmark   tools/benchmark_kernels.py --only kernels
#   te          FP8 and Transformer Engine, four parts that --only knows too:
#     te-values      tests/test_kernels_fp8*.py on the device
#     te-bandwidth   tools/benchmark_kernels.py --only fp8
#     te-bits        the tests marked gpu in files test_te_*.py
#     te-mlp         tools/benchmark_kernels.py --only mlp
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
# te takes 300 MB of wheels (CUDA 13; --list --cuda 12: 730 MB) and the source of Transformer Engine's torch part, which
# pip gets where the same torch with CUDA is installed (a GPU is not needed):
#                 pip download --dest wheels --no-deps --no-build-isolation --no-binary=:all: transformer-engine-torch==2.20.2
# It is built in the background, with CUDA's headers (CUDA_HOME, /usr/local/cuda, nvidia wheels), kept in .gpu/wheels and
# copied to the folder OUT, if set; in WHEELS that wheel is used as it is. `WHEELS=wheels python3 tests/gpu/te_engine.py
# build` makes it on the other machine. A wheel that is too large to be copied at once: tests/gpu/wheels.py --split; its
# parts may come in several calls. A run without --only leaves te out, and says why, where its packages are missing.
#
# Exit code: 0 all well, 1 a test or a part failed (the others ran), 2 it could not start (one line says why).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$root"
te=(te-values te-bandwidth te-bits te-mlp)
all=(kernels training benchmark te)
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
      [[ " ${all[*]} ${te[*]} " == *" ${2:-} "* && -n "${2:-}" ]] ||
        fail "--only: expected one of ${all[*]} ${te[*]}, got '${2:-}'"
      parts+=("$2")
      shift 2
      ;;
    *) fail "expected --only PART or --help, got '$1'" ;;
  esac
done
optional="" # te
if ((${#parts[@]} == 0)); then parts=("${all[@]}") optional=yes; fi
plain=() engine=()
for part in "${parts[@]}"; do
  case "$part" in
    te) engine+=("${te[@]}") ;;
    te-*) engine+=("$part") ;;
    *) plain+=("$part") ;;
  esac
done

command -v python3 >/dev/null || fail "expected python3 on PATH, got none: install Python 3.11 or newer with torch"
python3 -c 'import sys, torch, triton; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  fail "expected a python3 with torch, Triton and an NVIDIA GPU, got none: run it on a GPU machine"
python3 tests/gpu/evidence.py check || exit 2
if ((${#plain[@]})); then python3 tests/gpu/wheels.py --into .gpu/site "${plain[@]}" || exit 2; fi
if ((${#engine[@]})) && ! python3 tests/gpu/te_engine.py prepare "${engine[@]}"; then
  [[ -n "$optional" ]] || exit 2
  echo "tests/gpu/run.sh: te is left out, the other parts run" >&2
  engine=()
fi

export PYTHONPATH="$root:$root/tests/gpu:$root/.gpu/site${PYTHONPATH:+:$PYTHONPATH}"
commit="$(git rev-parse --short=12 HEAD 2>/dev/null || true)" # now: a part that has written is a local change
if [[ -n "$commit" && -n "$(git status --porcelain --untracked-files=no)" ]]; then commit+=" with local changes"; fi
export MEGATRON_ACT_COMMIT="${COMMIT:-$commit}"
unset TRITON_INTERPRET  # the device, not Triton's interpreter
export NVTE_FRAMEWORK=pytorch # for Transformer Engine, which looks for JAX too
if ((${#engine[@]})); then # a build takes a minute or more: what needs no Transformer Engine does not wait for it
  mkdir -p .gpu
  setsid nice -n 10 python3 tests/gpu/te_engine.py build &>.gpu/te-build.log &
  builder=$!
  trap '[[ -z "$(jobs -rp)" ]] || kill -- "-$builder" 2>/dev/null || kill "$builder"' EXIT
fi

left_s() { echo $((until_s > SECONDS ? until_s - SECONDS : 1)); } # of the part

# tests PART TARGET...: pytest, its outcomes one by one (a process that dies loses only what did not run)
tests() {
  local part="$1" code=0
  shift
  GPU_OUTCOMES=".gpu/$part.jsonl" timeout --kill-after 20 "$(left_s)" \
    python3 -m pytest -p gpu_outcomes -p no:cacheprovider -q "$@" 2>&1 | tee ".gpu/$part.log" || code=$?
  if ((code == 5)); then code=0; fi # no test was selected
  return "$code"
}

# benchmark PART KIND: figures in .gpu/PART
benchmark() {
  timeout --kill-after 20 "$(left_s)" python3 tools/benchmark_kernels.py --only "$2" --output ".gpu/$1" --debug \
    --minutes "$(python3 -c "print(round(max($(left_s) - 40, 6) / 60, 2))")" 2>&1 | tee ".gpu/$1.log"
}

# kernel_tests PART FILE...: those that need a GPU. None does to read machine code, nor to add an activation (that test
# needs Megatron too).
kernel_tests() {
  local part="$1" file files=()
  shift
  for file in "$@"; do
    [[ "$file" == *compile.py || "$file" == *extension.py ]] || files+=("$file")
  done
  tests "$part" "${files[@]}"
}

run_kernels() { kernel_tests kernels tests/test_kernels_*.py; }

# marked NAMES: test files of these names that have tests marked gpu
marked() { grep -rlE 'mark\.gpu|needs_gpu' tests --include="$1" | sort; }

run_training() {
  local files
  mapfile -t files < <(marked 'test_*.py' | grep -vE '^tests/test_kernels_|/test_te_[^/]*$')
  if ((${#files[@]} == 0)); then
    echo "training: no test is marked gpu" | tee .gpu/training.log
    return 0
  fi
  tests training -m gpu "${files[@]}"
}

run_benchmark() {
  benchmark benchmark kernels || return $?
  cp .gpu/benchmark/kernels.png tests/gpu_results.png
}

# engine PART S: Transformer Engine is there, once its torch part is built, for which it waits S seconds
engine() {
  local wait_until=$((SECONDS + $2))
  while [[ -n "$(jobs -rp)" ]]; do
    if ((SECONDS >= wait_until)); then
      echo "te: expected its torch part to be built in $2 s, got none yet: .gpu/te-build.log" | tee ".gpu/$1.log"
      return 124
    fi
    sleep 1
  done
  python3 tests/gpu/te_engine.py install 2>&1 | tee ".gpu/$1.log"
}

run_te_values() { kernel_tests te-values tests/test_kernels_fp8*.py; }

run_te_bandwidth() {
  engine te-bandwidth "$(($(left_s) / 2))" || echo "te-bandwidth: without Transformer Engine: torch's casts instead"
  benchmark te-bandwidth fp8
}

run_te_bits() {
  local files
  engine te-bits "$(left_s)" || return $?
  mapfile -t files < <(marked 'test_te_*.py')
  if ((${#files[@]} == 0)); then
    echo "te-bits: expected files test_te_*.py with tests marked gpu, got none" | tee .gpu/te-bits.log
    return 1
  fi
  tests te-bits -m gpu "${files[@]}"
}

run_te_mlp() {
  engine te-mlp "$(left_s)" || return $?
  benchmark te-mlp mlp
}

# run_parts PART...: what is left of the time is divided among the parts that are left, in these proportions.
declare -A share=([kernels]=35 [training]=25 [benchmark]=40 [te-values]=20 [te-bandwidth]=20 [te-bits]=30 [te-mlp]=30)
code=0
run_parts() {
  local part left=0 began part_code until_s
  for part in "$@"; do left=$((left + share[$part])); done
  for part in "$@"; do
    until_s=$((SECONDS + (total_s - SECONDS) * share[$part] / left))
    left=$((left - share[$part]))
    rm -rf ".gpu/$part.jsonl" ".gpu/$part.log" ".gpu/$part"
    began=$SECONDS part_code=0
    "run_${part//-/_}" || part_code=$?
    python3 tests/gpu/evidence.py record "$part" --exit-code "$part_code" --seconds $((SECONDS - began)) \
      --command "bash tests/gpu/run.sh${words:+ $words}" || part_code=1
    if ((part_code)); then
      echo "tests/gpu/run.sh: $part failed (exit code $part_code): .gpu/$part.log" >&2
      code=1
    fi
  done
}

run_parts "${plain[@]}"
if ((${#plain[@]})); then total_s=$((SECONDS + total_s)); fi
run_parts "${engine[@]}"
exit "$code"
