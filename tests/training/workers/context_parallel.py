"""The entry point with an attention that serves context parallelism on a CPU: ``prepare`` of a forked run."""

from context_attention import GatheringAttention
from megatron.core.models.backends import LocalSpecProvider


def prepare():
    """Before the entry point starts."""
    LocalSpecProvider.core_attention = lambda self: GatheringAttention
