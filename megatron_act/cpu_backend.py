"""Real Megatron training on a CPU: what ``megatron.training.pretrain`` needs in place of a CUDA device.

For development and tests: unmodified Megatron code runs, with gloo for NCCL, and the results are those of the same
program in fp32. Every patch of a foreign module in this project's CPU path is in this file, with its reason.

``install`` must run before the first import of ``megatron.core``, which binds some of the patched names at import. The
entry module has to do it at import too, because Megatron's checkpoint writer spawns processes that re-import it:
``install_if_requested`` does so when the environment variable ``MEGATRON_ACT_CPU`` is 1.
"""

import contextlib
import functools
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.cuda.random
from torch.overrides import TorchFunctionMode

from megatron_act import cpu_optimizer
from megatron_act.compat import LOCAL_LAYER_FLAGS, install_typing_override, use_built_helpers

ENVIRONMENT_FLAG = "MEGATRON_ACT_CPU"
NOTICE = "megatron-act: CPU backend (gloo, local layers): for development and tests, not for speed"

# What Megatron must be told on a machine without CUDA.
FLAGS = (*LOCAL_LAYER_FLAGS, "--distributed-backend", "gloo", "--use-cpu-initialization")

_CPU = torch.device("cpu")
_installed = False


class _NoStream:
    """Stands for a CUDA stream or event where everything is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def record_event(self) -> "_NoStream":
        return self  # the token dispatcher of experts waits for it

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *_: Any) -> None:
        return None


def _means_cuda(device: Any) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, int):
        return True
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Sends the CUDA devices that Megatron-Core names literally to the CPU."""

    def __torch_function__(self, func: Any, types_: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if _means_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):  # context parallelism's indices; without an accelerator torch refuses
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to:
            args = tuple(_CPU if _means_cuda(a) else a for a in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # the distributed optimizer sorts parameters by this string and knows the CUDA names only
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def _noop(*_: Any, **__: Any) -> None:
    return None


def _patch_device_queries() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1  # at 0 Megatron skips model-parallel set-up; is_available() stays False
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, functools.partial(_noop))  # one object each: Dynamo refuses duplicates
    for name in ("max_memory_allocated", "memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *a, **k: 0)
    cuda.get_device_properties = lambda *a, **k: types.SimpleNamespace(
        major=8, minor=0, multi_processor_count=1, total_memory=1 << 34, name="cpu", gcnArchName=""
    )
    cuda.get_device_capability = lambda *a, **k: (8, 0)


def _patch_random() -> None:
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *a, **k: torch.get_rng_state()
        module.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda._lazy_call = lambda call, **k: call()  # Megatron's tracker queues its state changes here
    cuda.default_generators = (torch.default_generator,)


def _patch_streams_and_types() -> None:
    cuda: Any = torch.cuda
    cuda.Stream = _NoStream
    cuda.Event = _NoStream
    cuda.current_stream = lambda *a, **k: _NoStream()
    cuda.stream = lambda *a: contextlib.nullcontext()
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):  # Float16Module tests isinstance against these
        setattr(cuda, name, getattr(torch, name))


def _keep_in_backward(mode: TorchFunctionMode) -> None:
    """``backward()`` is itself sent to the mode, which is off meanwhile; Megatron's own backward functions need it."""
    run: Any = torch.autograd._engine_run_backward

    def run_with_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_with_mode  # type: ignore[attr-defined]


def _host_splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's ``maybe_move_tensor_to_cpu`` for tensors that are there: it converts CUDA tensors only."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _without_draws(original: Callable[..., Any]) -> Callable[..., Any]:
    """Data loaders draw a seed from the CPU's random state, which here is the device's, that a checkpoint restores."""

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        try:
            return original(*args, **kwargs)
        finally:
            torch.set_rng_state(state)

    return build


def _patch_megatron() -> None:
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import megatron.training.training as training

    use_built_helpers()  # foreign entry points do not
    token_dispatcher.maybe_move_tensor_to_cpu = _host_splits  # all_to_all takes split sizes as a list or array only
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    training.build_train_valid_test_data_iterators = _without_draws(training.build_train_valid_test_data_iterators)
    cpu_optimizer.install()


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Megatron warns at import, once per module, that apex and Transformer Engine are absent: here they must be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def install_devices() -> None:
    """The part of ``install`` that needs no Megatron: CUDA names of torch mean the CPU from here on. Idempotent."""
    _patch_device_queries()
    _patch_random()
    _patch_streams_and_types()
    mode = _CudaMeansCpu()
    mode.__enter__()
    _keep_in_backward(mode)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling Megatron's small fusions costs 10 s of start-up
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it with tensor parallelism


def install() -> None:
    """``install_devices``, then imports Megatron and applies the two patches it needs. Idempotent.

    Raises:
        RuntimeError: Megatron-Core was imported earlier, so that parts of it hold unpatched names.
    """
    global _installed
    if _installed:
        return
    if "megatron.core.tensor_parallel.random" in sys.modules:
        raise RuntimeError(
            "expected the CPU backend before megatron.core is imported, got it after: call install() first"
        )
    _installed = True
    install_typing_override()
    install_devices()
    os.environ[ENVIRONMENT_FLAG] = "1"
    with _quiet_import():
        _patch_megatron()


def install_if_requested() -> None:
    """Installs the backend in a process that another one with the backend started (environment variable set)."""
    if os.environ.get(ENVIRONMENT_FLAG) == "1":
        install()
