"""Messages that a run logs once, by its first rank."""

import functools

from megatron.training import print_rank_0


@functools.cache
def log_once(message: str) -> None:
    """``> megatron-act: message``, the first time that this message comes."""
    print_rank_0(f"> megatron-act: {message}")
