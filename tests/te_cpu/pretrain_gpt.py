"""``python tests/te_cpu/pretrain_gpt.py --cpu --transformer-impl transformer_engine ...``: training with TE's layers.

It is ``python -m megatron_act.pretrain_gpt`` in a process in which ``te_cpu.loader`` is installed. The environment
variable TE_CPU_CAPABILITY (10.0 for MXFP8) chooses the device that is emulated.
"""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from te_cpu import loader  # noqa: E402

major, minor = os.environ.get("TE_CPU_CAPABILITY", "9.0").split(".")
loader.install((int(major), int(minor)))

from megatron_act import pretrain_gpt  # noqa: E402  after it: Megatron looks for TE when it is imported

if __name__ == "__main__":
    sys.exit(pretrain_gpt._entry())
