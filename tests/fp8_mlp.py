"""An MLP of Transformer Engine's layers with FP8 options, and steps of training with it.

On a GPU, or in te_cpu's child process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from te_cpu import cases
from te_cpu.process import one_rank
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, WIDTH, TOKENS, BATCH = 64, 192, 80, 2  # 160 rows: more than a block of 128, not a multiple of one
BF16 = torch.bfloat16
RECIPES = {
    "delayed": "DelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


def recipe_of(name: str, form: str = "E4M3", **options: Any) -> Any:
    """Transformer Engine's; the stand-in for a GPU becomes one that has it."""
    if DEVICE == "cpu":
        return cases.recipe_of(name, form, **options)
    from transformer_engine.common import recipe

    return getattr(recipe, RECIPES[name])(fp8_format=getattr(recipe.Format, form), **options)


def config(**options: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    one_rank()
    usual = {"num_layers": 1, "hidden_size": HIDDEN, "ffn_hidden_size": WIDTH, "num_attention_heads": 4}
    usual |= {"normalization": "RMSNorm", "bf16": True, "params_dtype": BF16, "add_bias_linear": False}
    usual |= {"fp8": "hybrid", "fp8_recipe": "tensorwise" if options.pop("current", False) else "delayed"}
    return TransformerConfig(**{**usual, **options})


def mlp(fp8: Any, name: str = "xielu", fused: bool = False, backend: str = "auto", **options: Any) -> Any:
    """An ActivationMLP; equal weights, whatever ``fp8`` is."""
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

    from megatron_act.mlp import ActivationMLP, ActivationMLPSubmodules

    settings = config(**options)
    torch.manual_seed(3)
    linears = {"linear_fc1": TELayerNormColumnParallelLinear, "linear_fc2": TERowParallelLinear}
    submodules = ActivationMLPSubmodules(**linears, activation=name, activation_backend=backend, activation_fp8=fp8)
    kind: Any = ActivationMLP
    if fused:
        from megatron_act.te_op import ActivationFusedMLP as kind
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    module = kind(settings, submodules, ffn_hidden_size=WIDTH, tp_group=group)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1:
                parameter.normal_(std=0.3)
    return module


def batches(count: int, size: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """(input, output gradient) of micro-batches; sizes differ, so that delayed scales move."""
    generator = torch.Generator().manual_seed(5)
    shape = (TOKENS, BATCH, HIDDEN)
    return [
        (
            (size * 2.0 ** (i % 3) * torch.randn(shape, generator=generator)).to(DEVICE, BF16),
            (2.0 ** (i % 6) * torch.randn(shape, generator=generator)).to(DEVICE, BF16),
        )
        for i in range(count)
    ]


@contextmanager
def context(recipe: Any) -> Iterator[None]:
    import transformer_engine.pytorch as te

    with te.autocast(enabled=recipe is not None, recipe=recipe):
        yield


def train(module: Any, recipe: Any, steps: int = 3, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Steps of two micro-batches each: outputs, gradients of inputs and parameters, scales and histories, by name."""
    found: dict[str, Tensor] = {}
    pairs = batches(2 * steps)
    for step in range(steps):
        module.zero_grad()
        for part in range(2):
            x, grad = pairs[2 * step + part]
            x = x.clone().requires_grad_()
            with context(recipe):
                y, bias = (run or module)(x)
                y = y if bias is None else y + bias
            y.backward(grad)
            found[f"y {step}.{part}"], found[f"dx {step}.{part}"] = y.detach(), x.grad
        for name, parameter in module.named_parameters():
            found[f"d{name} {step}"] = parameter.grad.clone()
    for label, layer in (("fc1", module.linear_fc1), ("fc2", module.linear_fc2)):
        for way in ("scaling_fwd", "scaling_bwd"):
            state = layer.fp8_meta.get(way)
            if state is not None and hasattr(state, "amax_history"):
                found[f"{label} {way} scale"] = state.scale.clone()
                found[f"{label} {way} history"] = state.amax_history.clone()
    return found


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert got.keys() == want.keys()
    wrong = {
        name: (got[name].float() - want[name].float()).abs().max().item()
        for name in want
        if not torch.equal(got[name], want[name])
    }
    assert not wrong, wrong


def near(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = 1e-3, state: float = 1e-6) -> str:
    """Within ``bound`` of each tensor's norm, scales and histories within ``state``; returns how near, for a log."""
    assert got.keys() == want.keys()
    errors = {name: distance(got[name], want[name]) for name in want}
    allowed = {name: state if name.endswith(("scale", "history")) else bound for name in want}
    wrong = {name: error for name, error in errors.items() if not error <= allowed[name]}
    assert not wrong, wrong
    equal = sum(torch.equal(got[name], want[name]) for name in want)
    worst = max(errors, key=lambda name: errors[name])
    return f"{equal} of {len(want)} tensors are equal, the farthest is {worst}: {errors[worst]:.1e}"


def distance(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over that of ``want``."""
    off, size = (got.double() - want.double()).norm(), want.double().norm()
    return 0.0 if off == 0 else (off / size).item()


CALLS = ("no_grad", "eval", "bf16", "fp8 first", "fp8", "recipe", "fp8 back")


def calls(module: Any, recipe: Any, other: Any) -> tuple[list[str], dict[str, Tensor]]:
    """(what fc2 is given, outputs) by calls of seven kinds after a step: only "fp8" may be in FP8."""
    train(module, recipe, steps=1)
    x, outputs = batches(1)[0][0], {}
    with watched(module) as seen:
        for case in CALLS:
            module.train(case != "eval")
            used = {"bf16": None, "recipe": other}.get(case, recipe)
            with torch.set_grad_enabled(case != "no_grad"), context(used):
                outputs[case] = module(x.clone().requires_grad_())[0].detach()
    return seen["fc2"], outputs


def kept_bytes(module: torch.nn.Module, recipe: Any) -> int:
    """Of all distinct storages that one forward pass saves, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        parts = [getattr(tensor, name, None) for name in ("_data", "_transpose")]
        for part in [tensor] if parts[0] is None else [part for part in parts if part is not None]:
            storage = part.untyped_storage()
            if storage.data_ptr() not in parameters:
                found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context(recipe):
        module(batches(1)[0][0].clone().requires_grad_())
    return sum(found.values())


def counted() -> dict[str, int]:
    """How often our kernels are asked for a quantized result and gradient from here on, in this process."""
    from megatron_act import te_buffers

    made = {"forward": 0, "backward": 0}
    for name in made:
        original = getattr(getattr(te_buffers, name), "original", getattr(te_buffers, name))

        def call(*args: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            made[name] += 1
            return original(*args)

        call.original = original  # type: ignore[attr-defined]
        setattr(te_buffers, name, call)
    return made


@contextmanager
def watched(module: Any) -> Iterator[dict[str, list[str]]]:
    """What fc2 is given and what gradient fc1 gets: class names, by call."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule as Base

    seen: dict[str, list[str]] = {"fc2": [], "fc1": []}
    handle = module.linear_fc2.register_forward_pre_hook(lambda _, args: seen["fc2"].append(type(args[0]).__name__))
    original = Base.grad_output_preprocess

    def preprocess(ctx: Any, grad: Any, row_parallel: bool, quantizer: Any) -> Any:
        if not row_parallel:
            seen["fc1"].append(type(grad).__name__)
        return original(ctx, grad, row_parallel, quantizer)

    Base.grad_output_preprocess = staticmethod(preprocess)
    try:
        yield seen
    finally:
        handle.remove()
        Base.grad_output_preprocess = staticmethod(original)
