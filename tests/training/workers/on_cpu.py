"""Runs another script as ``__main__`` on the CPU backend: for entry points that know nothing of this project."""

import runpy
import sys

from megatron_act import cpu_backend

cpu_backend.install()

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
