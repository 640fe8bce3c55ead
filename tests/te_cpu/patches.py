"""Every function of Transformer Engine's Python that is replaced on a CPU, with its reason."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _pretence() -> Iterator[None]:
    """Tensors and torch say that they are CUDA's; only around functions that ask in order to refuse."""
    available, is_cuda = torch.cuda.is_available, torch.Tensor.is_cuda
    torch.cuda.is_available = lambda: True
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.cuda.is_available = available
        torch.Tensor.is_cuda = is_cuda  # type: ignore[misc]


def _pretending(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _pretence():
            return function(*args, **kwargs)

    return run


def _everywhere(name: str, replacement: Any) -> None:
    """Replaces a function in every module of Transformer Engine that has imported it."""
    for module in [module for key, module in sys.modules.items() if key.startswith("transformer_engine.pytorch")]:
        if name in vars(module):
            setattr(module, name, replacement)


def apply() -> None:
    """Replaces them; ``transformer_engine.pytorch`` is imported."""
    from transformer_engine.pytorch.attention import DotProductAttention
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    torch.cuda.is_current_stream_capturing = lambda: False  # a CPU build raises
    # refuse a CPU, and tensors on one
    TransformerEngineBaseModule.__init__ = _pretending(TransformerEngineBaseModule.__init__)
    TransformerEngineBaseModule.prepare_forward = _pretending(TransformerEngineBaseModule.prepare_forward)
    DotProductAttention.forward = _pretending(DotProductAttention.forward)
    _everywhere("canonicalize_device", lambda device: torch.device("cpu"))  # cuda:0, and torch.device(0) raises
    # the device's random state, which is the CPU's here (cpu_backend); a CPU generator has no graph-safe state
    _everywhere("_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
    _everywhere("_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
