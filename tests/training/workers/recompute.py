"""Gradients of an ActivationMLP with and without recompute, bit for bit, and the memory that its forward pass keeps.

Run under torchrun. Prints one JSON object from rank 0: ``{"gradients": {case: [names of tensors that differ on any
rank]}, "collectives": {case: [all-reduces without, with]}, "kept_bytes": {...}}``; the latter on one rank only.
``--broken`` spoils the recomputed value on purpose, in the first cases.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
from collections.abc import Callable, Iterable

os.environ["TRITON_INTERPRET"] = "1"  # both backends, on a CPU

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_act import cpu_backend

cpu_backend.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_act import recompute  # noqa: E402
from megatron_act.kernels import api as kernels  # noqa: E402
from megatron_act.mlp import ActivationMLP, ActivationMLPSubmodules  # noqa: E402

HIDDEN, FFN, SEQUENCE, BATCH = 16, 48, 8, 2
WRAPPERS: dict[str, Callable] = {
    "plain": lambda f, x: f(x),
    "megatron checkpoint": lambda f, x: tensor_parallel.checkpoint(f, False, x),
    "torch checkpoint": lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
    "offloading": lambda f, x: _offloaded(f, x),
}


def _offloaded(function: Callable, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu():
        return function(x)


def config_of(dtype: torch.dtype, bias: bool, sequence_parallel: bool, **more) -> TransformerConfig:
    return TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": FFN,
            "num_attention_heads": 2,
            "add_bias_linear": bias,
            "use_cpu_initialization": True,
            "tensor_model_parallel_size": torch.distributed.get_world_size(),
            "sequence_parallel": sequence_parallel,
            "params_dtype": dtype,
            "bf16": dtype == torch.bfloat16,
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            **more,
        }
    )


def build(name: str, backend: str, config: TransformerConfig, again: bool) -> ActivationMLP:
    linear = LocalSpecProvider()
    submodules = ActivationMLPSubmodules(
        linear_fc1=linear.column_parallel_linear(),
        linear_fc2=linear.row_parallel_linear(),
        activation=name,
        activation_backend=backend,
        activation_recompute=again,
    )
    group = parallel_state.get_tensor_model_parallel_group()
    torch.manual_seed(5)
    mlp = ActivationMLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=group)
    if config.add_bias_linear:
        torch.nn.init.normal_(mlp.linear_fc1.bias)
    return mlp


def gradients(mlp: ActivationMLP, wrapper: Callable) -> tuple[dict[str, torch.Tensor], int]:
    """All gradients after two accumulated micro-batches, the outputs and input gradients; the number of all-reduces."""
    rng, found, calls = torch.Generator().manual_seed(11), {}, []
    rows = SEQUENCE // (torch.distributed.get_world_size() if mlp.config.sequence_parallel else 1)
    original = torch.distributed.all_reduce

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    torch.distributed.all_reduce = counted
    for step in range(2):
        x, grad = (torch.randn(rows, BATCH, HIDDEN, generator=rng).to(mlp.config.params_dtype) for _ in range(2))
        x.requires_grad_()
        output = wrapper(lambda x: mlp(x)[0], x)
        torch.autograd.backward(output, grad)  # Tensor.backward would suspend the CPU backend
        found[f"output {step}"], found[f"input gradient {step}"] = output.detach(), x.grad
    torch.distributed.all_reduce = original
    found |= {name: parameter.grad for name, parameter in mlp.named_parameters() if parameter.grad is not None}
    return found, len(calls)


def compare(wrapper: str, *what) -> tuple[list[str], list[int]]:
    """Names whose bits differ on any rank, and the all-reduces without and with recompute."""
    (stock, calls), (ours, ours_calls) = (
        gradients(build(*what, again), WRAPPERS[wrapper if again else "plain"]) for again in (False, True)
    )
    assert list(stock) == list(ours) and "linear_fc2.weight" in stock
    different = [name for name in stock if not torch.equal(stock[name], ours[name])]
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, different)
    return sorted(set(itertools.chain(*everyone))), [calls, ours_calls]


def all_cases() -> dict[str, tuple]:
    """Each activation, and with xielu each wrapper, dtype, bias and sequence parallelism, on both backends."""
    half, single = torch.bfloat16, torch.float32
    kinds = [(wrapper, "xielu", half, True, False) for wrapper in WRAPPERS]
    kinds += [("plain", name, half, True, False) for name in kernels.names() if name != "xielu"]
    kinds += [("plain", "xielu", single, True, False), ("plain", "xielu", half, False, False)]
    if torch.distributed.get_world_size() > 1:
        kinds += [(wrapper, "xielu", half, True, True) for wrapper in WRAPPERS]
    return {
        f"{wrapper}, {name}, {backend}, {dtype}, bias={bias}, sp={sp}": (wrapper, name, backend, dtype, bias, sp)
        for (wrapper, name, dtype, bias, sp), backend in itertools.product(kinds, ("reference", "triton"))
    }


class Allocated(TorchDispatchMode):
    """Remembers, weakly, every storage that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive_bytes(self, *, without: Iterable[torch.Tensor]) -> int:
        gc.collect()
        known = {tensor.untyped_storage()._cdata for tensor in without}
        alive = (size for key, (ref, size) in self.seen.items() if key not in known and not ref.expired())
        return sum(alive)


def kept_bytes(mlp: MLP, tokens: int) -> float:
    """Bytes per token that live between the forward and the backward pass, its input with them, its output not."""
    x = torch.randn(tokens, 1, mlp.config.hidden_size).to(mlp.config.params_dtype).requires_grad_()
    with Allocated() as allocated:
        inner = x * 1  # stands for the norm's output, which lives only if fc1 saves it
        output = mlp(inner)[0]
        del inner
    alive = allocated.alive_bytes(without=[output, *mlp.parameters()])
    stacked = sum(raw.nbytes for raw in mlp.parameters() if raw.numel() == 1)  # the scalars, once a layer
    return (alive - stacked) / tokens


def memory(tokens: int = 32) -> dict[str, float]:
    """Kept bytes per token of equal-compute MLPs in bf16: SwiGLU of width FFN, the others of 1.5 FFN."""
    linear = LocalSpecProvider()
    plain = MLPSubmodules(linear_fc1=linear.column_parallel_linear(), linear_fc2=linear.row_parallel_linear())
    group = parallel_state.get_tensor_model_parallel_group()
    gated = config_of(
        torch.bfloat16,
        False,
        False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=True,
    )
    found = {"swiglu": kept_bytes(MLP(gated, plain, ffn_hidden_size=FFN, tp_group=group), tokens)}
    wide = dataclasses.replace(config_of(torch.bfloat16, False, False), ffn_hidden_size=FFN * 3 // 2)
    for again in (False, True):
        key = "xielu recompute" if again else "xielu"
        found[key] = kept_bytes(build("xielu", "triton", wide, again), tokens)
    return found


def spoil() -> None:
    original = recompute._Recipe.cook
    recompute._Recipe.cook = lambda self: original(self) * 1.01


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--broken", action="store_true")
    broken = parser.parse_args().broken
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=torch.distributed.get_world_size())
    model_parallel_cuda_manual_seed(1)
    cases = all_cases()
    if broken:
        spoil()
        cases = dict(itertools.islice(cases.items(), 2))
    results = {}
    for key, (wrapper, name, backend, *shape) in cases.items():
        results[key] = compare(wrapper, name, backend, config_of(*shape))
    report = {
        "gradients": {key: names for key, (names, _) in results.items()},
        "collectives": {key: calls for key, (_, calls) in results.items()},
        "kept_bytes": memory() if torch.distributed.get_world_size() == 1 else {},
    }
    if torch.distributed.get_rank() == 0:
        print("REPORT " + json.dumps(report), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
