#!/usr/bin/env bash
# Makes .venv in the repository with everything the project needs. Idempotent: a finished environment is left alone.
#
#   PYTHON             interpreter to build it with, 3.11 or newer (default: the environment's own, else python3)
#   TORCH_INDEX_URL    package index for torch, e.g. one that serves CPU builds
#   MEGATRON_ACT_VENV  folder of the environment (default .venv in the repository)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${MEGATRON_ACT_VENV:-$root/.venv}"
python="${PYTHON:-python3}"
if [[ -z "${PYTHON:-}" ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python="$venv/bin/python"
fi
megatron="megatron-core==0.19.2"
engine="transformer_engine==2.20.2"
stamp="$venv/.megatron-act-ready"

fail() {
  echo "error: $*" >&2
  exit 2
}

command -v "$python" >/dev/null || fail "expected a Python interpreter, got none named '$python': set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "expected Python 3.11 or newer, got $("$python" --version 2>&1): set PYTHON"
command -v c++ >/dev/null || fail "expected a C++ compiler (c++), got none: megatron-core builds a small extension"

# A finished environment for the same requirements and interpreter is left alone; another interpreter needs a new one.
want="$(cat "$root/setup.py" "$root/launch/setup_env.sh" | cksum) $("$python" --version 2>&1)"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$want" ]]; then
  exit 0
fi

echo "setting up $venv (once; a few minutes)"
if [[ "$python" != "$venv/bin/python" ]]; then
  "$python" -m venv --clear "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)

# torch first, so that nothing else chooses its build. Without an NVIDIA driver a CPU build is enough; it brings no
# Triton, so the one that belongs to this torch is named: the tests ran with this pair.
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  echo "  torch"
  if [[ -n "${TORCH_INDEX_URL:-}" ]]; then
    "${pip[@]}" install torch --index-url "$TORCH_INDEX_URL"  # the user's choice; Triton follows below
  elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    "${pip[@]}" install torch
  else
    "${pip[@]}" install torch==2.13.0 triton==3.7.1
  fi
fi

# megatron-core compiles an extension against pybind11; its metadata asks for Python 3.12, though it runs on 3.11.
echo "  megatron-core"
if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
  "${pip[@]}" install numpy packaging
  "${pip[@]}" install --no-deps --no-binary megatron-core --ignore-requires-python "$megatron"
else
  "${pip[@]}" install "$megatron"
fi

echo "  megatron-act and its requirements"
"${pip[@]}" install --editable "$root[dev]"

# Transformer Engine's Python without its CUDA part (1.2 MB), which tests/te_cpu runs on a CPU. It gets a folder of its own:
# in site-packages `import transformer_engine` would raise a RuntimeError, which Megatron's ImportError guards let through.
if [[ ! -d "$venv/te_python/${engine/==/-}.dist-info" ]]; then
  echo "  Transformer Engine's Python, for tests"
  rm -rf "$venv/te_python"
  "${pip[@]}" install --no-deps --target "$venv/te_python" "$engine"
fi
printf '%s' "$want" >"$stamp"
echo "ready: $venv"
