"""The ways to an activation's result (or its input's gradient) in FP8 that are timed against each other.

ours           one kernel, two with a current scale                    (``kernels/fp8_ops.py``)
TE's quantizer our bf16 kernel, then Transformer Engine's quantizer    (what fc2 does with a bf16 input)
torch          our bf16 kernel, then casts in torch, compiled on a GPU (where Transformer Engine has none)
TE's own       its ``tex.*`` activation, given the quantizer           (for the activations that it has)
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_act import fp8_bytes, te
from megatron_act.benchmark.baselines import compiled
from megatron_act.benchmark.cases import Shape
from megatron_act.benchmark.timing import Work
from megatron_act.kernels import api as kernels
from megatron_act.kernels import fp8, fp8_ops
from megatron_act.kernels.fp8 import Quantized

OURS = "ours"
QUANTIZER, TORCH, OWN = "bf16, then TE's quantizer", "bf16, then torch's casts", "TE's own activation"
UNFUSED = (QUANTIZER, TORCH)  # one of them is what the byte ratio is measured against
GIVEN_SCALE = 8.0  # delayed scaling's: standard normal inputs stay below e4m3's 448
TEX = {"relu2": "srelu", "gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}  # ours: Transformer Engine's
FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BLOCKS = {"blockwise": fp8.BLOCK, "mxfp8": fp8.MX_BLOCK}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        activation: a name of the registry.
        recipe: as ``--fp8-recipe``.
        op: ``forward`` or ``backward``.
        transposed: whether a scale per tensor comes with a transposed copy.
    """

    activation: str
    shape: Shape
    recipe: str
    op: str
    transposed: bool

    @property
    def label(self) -> str:
        """``4096x21504``."""
        return f"{self.shape.rows}x{self.shape.cols}"

    @property
    def name(self) -> str:
        """As notes name it."""
        return f"{self.activation} {self.op} {self.recipe} {self.label}"

    @property
    def kernel(self) -> str:
        """The recipe as the kernels name it."""
        return self.recipe if self.recipe in BLOCKS else "tensor"

    @property
    def columnwise(self) -> bool:
        """Whether the second half is written."""
        return self.transposed or self.recipe in BLOCKS

    @property
    def format(self) -> str:
        """Gradients of delayed scaling are e5m2 (``--fp8-format hybrid``), everything else is e4m3."""
        return "e5m2" if (self.recipe, self.op) == ("delayed", "backward") else "e4m3"

    def bytes_per_element(self, way: str) -> float:
        """What a way of ``fp8_bytes`` must read and write."""
        return float(fp8_bytes.moved(self.recipe, way, self.op, transposed=self.transposed))

    @property
    def byte_ratio(self) -> float:
        """The most that ours can gain over bf16 and a quantizer."""
        return float(fp8_bytes.ratio(self.recipe, self.op, self.transposed))


def ways(case: Case, raw: list[Tensor], device: str) -> dict[str, Work]:
    """Everybody who can do it here, ours first. The scalars are constants: no autograd is timed."""
    found = {OURS: _ours(case, raw, device)}
    if te.problem() or _lacks(case.recipe, device):
        return found | {TORCH: _unfused(case, raw, plain_quantizer(case, device))}
    quantizer = engine_quantizer(case, device)
    found[QUANTIZER] = _unfused(case, raw, quantizer)
    return found | ({OWN: _own(case, quantizer)} if case.activation in TEX else {})


def _lacks(recipe: str, device: str) -> bool:
    """Whether Transformer Engine has no quantizer for this GPU; all others need no GEMM to be timed."""
    return recipe == "mxfp8" and device == "cuda" and torch.cuda.get_device_capability() < te.CAPABILITIES[recipe][0]


def bits(result: Any) -> Tensor:
    """The row-wise FP8 numbers of a way's result, as uint8."""
    while isinstance(result, tuple):
        result = result[0]
    if isinstance(result, Quantized):
        return result.data
    if type(result) is Tensor:
        return result
    return result._rowwise_data if hasattr(result, "_rowwise_data") else result._data


def _ours(case: Case, raw: list[Tensor], device: str) -> Work:
    given = torch.full((1,), GIVEN_SCALE, device=device)
    current = case.recipe == "tensorwise"

    def prepare(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Quantized]:
        options: dict[str, Any] = {"format": case.format, "columnwise": case.columnwise}
        out = fp8_ops.empty(case.kernel, case.shape.rows, case.shape.cols, x.device, **options)
        return x, grad, replace(out, amax=None) if current else out

    def launch(state: tuple[Tensor, Tensor, Quantized]) -> Any:
        x, grad, out = state
        if case.op == "backward":
            return fp8_ops.backward(case.activation, grad, x, raw, out, scale=given)
        scale = fp8_ops.current_scale(case.activation, x, raw) if current else given
        return fp8_ops.forward(case.activation, x, raw, out, scale=scale)

    return Work(prepare, torch.no_grad()(launch))


def _unfused(case: Case, raw: list[Tensor], quantize: Callable[[Tensor], Any]) -> Work:
    def launch(state: tuple[Tensor, Tensor]) -> Any:
        x, grad = state
        if case.op == "forward":
            wide = kernels.apply(case.activation, x, raw)
        else:
            wide = kernels.backward(case.activation, grad, x, raw).dx
        return quantize(wide), wide

    return Work(lambda x, grad: (x, grad), torch.no_grad()(launch))


def _own(case: Case, quantizer: Any) -> Work:
    extension, name = importlib.import_module("transformer_engine_torch"), TEX[case.activation]
    forward, backward = getattr(extension, name), getattr(extension, f"d{name}")

    def launch(state: tuple[Tensor, Tensor]) -> Any:
        x, grad = state
        return forward(x, quantizer) if case.op == "forward" else backward(grad, x, quantizer)

    return Work(lambda x, grad: (x, grad), torch.no_grad()(launch))


def engine_quantizer(case: Case, device: str) -> Any:
    """Transformer Engine's quantizer as its linear layers have it, for both halves."""
    found = importlib.import_module("transformer_engine.pytorch.tensor")
    dtype = getattr(te.parts().DType, f"kFloat8{case.format.upper()}")
    if case.recipe == "delayed":
        scale, amax = torch.full((1,), GIVEN_SCALE, device=device), torch.zeros(1, device=device)
        return found.Float8Quantizer(scale, amax, dtype, rowwise=True, columnwise=case.columnwise)
    if case.recipe == "tensorwise":
        device_ = torch.device(device)
        return found.Float8CurrentScalingQuantizer(dtype, device_, rowwise=True, columnwise=case.columnwise)
    if case.recipe == "blockwise":
        return found.Float8BlockQuantizer(dtype, rowwise=True, columnwise=True, block_scaling_dim=1)
    return found.MXFP8Quantizer(dtype, rowwise=True, columnwise=True)


def plain_quantizer(case: Case, device: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Casts in torch: numbers, scale, and the same of the transposed tensor."""
    dtype = FLOATS[case.format]
    largest = torch.finfo(dtype).max

    def cast(values: Tensor, scale: Tensor | float) -> Tensor:
        return (values * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)

    def by_tensor(y: Tensor) -> tuple[Tensor, ...]:
        amax = y.abs().amax().float()
        code = cast(y.float(), largest / amax if case.recipe == "tensorwise" else GIVEN_SCALE)
        return (code, amax, code.t().contiguous()) if case.columnwise else (code, amax)

    def by_block(y: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for wide in (y.float(), y.float().t()):
            blocks = wide.unflatten(1, (-1, BLOCKS[case.recipe]))
            amax = blocks.abs().amax(2, keepdim=True).clamp(min=2.0**-100)
            scale = torch.exp2(torch.floor(torch.log2(largest / amax)))
            found += [cast(blocks, scale).flatten(1), 1.0 / scale.squeeze(2)]
        return tuple(found)

    function: Any = by_block if case.recipe in BLOCKS else by_tensor
    quantizer: Any = compiled(function) if device == "cuda" else function
    return quantizer
