"""Tests in a process of their own, in which Transformer Engine and Megatron run on the CPU (``loader.py``).

    @in_engine
    def test_something(recipe: str) -> None:      # runs in the child; arguments and failures cross by pickle
        import transformer_engine.pytorch as te   # not at the top: the test process must not import it

One child serves all tests of a test process, one after the other; before each one TE's FP8 state, the random state and
the compute capability are new.
"""

import functools
import importlib
import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def in_engine(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test function of a module in the child."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        _child().submit(_run, test.__module__, test.__name__, arguments).result()

    run.body = test  # type: ignore[attr-defined]
    return run


@functools.cache
def _child() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=start)


def start() -> None:
    """The child's first call."""
    from te_cpu import loader

    torch.set_num_threads(1)
    loader.install()
    from megatron_act import cpu_backend

    cpu_backend.install()


def _run(module: str, name: str, arguments: dict[str, Any]) -> None:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from te_cpu import loader

    FP8GlobalStateManager.reset()
    loader.set_capability(loader.HOPPER)
    torch.manual_seed(1)
    try:
        getattr(importlib.import_module(module), name).body(**arguments)
    except Exception:
        raise AssertionError(traceback.format_exc()) from None  # not every exception can be pickled


@functools.cache
def one_rank() -> None:
    """Megatron's parallel state of a single rank, for layers that ask for it; in the child."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
