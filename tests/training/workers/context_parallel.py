"""The entry point with an attention that serves context parallelism on a CPU."""

import sys
from pathlib import Path

from megatron_act import cpu_backend

cpu_backend.install()

from megatron.core.models.backends import LocalSpecProvider  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

from context_attention import GatheringAttention  # noqa: E402

from megatron_act import pretrain_gpt  # noqa: E402

if __name__ == "__main__":
    LocalSpecProvider.core_attention = lambda self: GatheringAttention
    pretrain_gpt.main(sys.argv[1:])
