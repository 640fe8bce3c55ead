"""On a GPU with the real Transformer Engine: our kernels write the bytes that its own quantizers and kernels write.

Buffers first, without Megatron: the kernels' FP8 result and gradient against the quantizer applied to ``kernels.apply``
and ``kernels.backward``, which round to bf16 as a bf16 activation does. Then Megatron's MLP of Transformer Engine's
layers (``fp8_mlp.py``), with FP8 from us against FP8 from its casts; on a CPU, where torch stands in for Transformer
Engine's kernels, ``test_fp8_output.py`` has the same bit for bit, and ``test_te_bits_cpu.py`` runs what is here.

Two kernels of ours may differ in the last bit of fp32 where a compiler fuses differently. Next to a tie that moves a
bit of bf16, and with it a byte: ALLOWED and ``near`` leave room for it. All else is exact.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from fp8_mlp import (
    BATCH,
    BF16,
    DEVICE,
    TOKENS,
    WIDTH,
    batches,
    calls,
    context,
    counted,
    distance,
    kept_bytes,
    mlp,
    near,
    recipe_of,
    train,
    watched,
)
from kernel_cases import shifted_params
from te_tensors import differences, quantizer_of, specified, written_by_te
from torch import Tensor

from megatron_act import te, te_buffers
from megatron_act.fp8_options import Fp8Options
from megatron_act.kernels import api as kernels
from megatron_act.kernels import fp8
from megatron_act.te_buffers import Operand

# capability and CUDA; a stand-in on a CPU has every recipe
HERE = (torch.cuda.get_device_capability(), torch.version.cuda) if DEVICE == "cuda" else ((10, 0), None)
SERVED = tuple(name for name in te.CAPABILITIES if te.fp8_problem(name, *HERE) is None) or tuple(te.CAPABILITIES)
ALL = (*SERVED, *({"mxfp8"} - set(SERVED)))  # our MXFP8 kernel runs where no GEMM takes what it writes
SHAPES = {"ragged": (1440, 2240), "whole": (1024, 2048)}  # with and without a rest of blocks of 128
ALLOWED = 1e-5  # of the bytes
PLAIN, OUTPUT, BOTH = Fp8Options(), Fp8Options(output=True), Fp8Options(output=True, grad=True)
SEEN = {
    "delayed": "Float8Tensor",
    "tensorwise": "Float8Tensor",
    "blockwise": "Float8BlockwiseQTensor",
    "mxfp8": "MXFP8Tensor",
}
Say = Callable[[str], None]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" or HERE[0] < (8, 9), reason="no GPU with FP8"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine is installed"
    ),
]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Prints a figure into the log of a passing test."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", end=" ")

    return line


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    assert te.problem() is None and te.version_problem() is None
    te.parts().FP8GlobalStateManager.reset()
    torch.manual_seed(1)
    yield


def random(*shape: int, seed: int = 0, size: float = 3.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(DEVICE, BF16)


def operand(x: Tensor, name: str = "xielu") -> Operand:
    return Operand(name, x, [raw.detach() for raw in shifted_params(name)], None, "auto")


def check(say: Say, label: str, got: Any, quantizer: Any, exact: Tensor, allowed: float = ALLOWED) -> None:
    """``got`` is the quantizer's tensor of the bf16 tensor ``exact``, byte for byte, but for ``allowed`` of them."""
    want, theirs = written_by_te(quantizer, exact)
    count, total = differences(got, want)
    say(f"{label}: {count} of {total} bytes differ" + ("" if theirs else " (specification: no kernel for this GPU)"))
    assert theirs or "mxfp8" not in SERVED
    assert got.shape == exact.shape and got.dtype == exact.dtype
    assert count <= allowed * total


def check_forward(say: Say, label: str, op: Operand, make: Callable[[], Any]) -> Any:
    ours, theirs = make(), make()
    got = te_buffers.forward(ours, op)
    check(say, label, got, theirs, kernels.apply(op.name, op.x, op.raw))
    if hasattr(ours, "amax"):
        assert torch.equal(ours.amax, theirs.amax)
    return got


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", [*ALL, "mxfp8 swizzled"])
def test_the_result_is_the_quantizers_of_a_bf16_result(recipe: str, shape: str, say: Say) -> None:
    name, swizzled = recipe.split()[0], recipe.endswith("swizzled")
    op = operand(random(*SHAPES[shape]))
    check_forward(say, f"{recipe}, {shape}", op, lambda: quantizer_of(name, swizzled=swizzled))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", fp8.FORMATS)
@pytest.mark.parametrize("recipe", [name for name in ALL if name != "tensorwise"])
def test_the_gradient_is_the_quantizers_of_a_bf16_gradient(recipe: str, format: str, shape: str, say: Say) -> None:
    op, grad = operand(random(*SHAPES[shape])), random(*SHAPES[shape], seed=1)
    ours, theirs = quantizer_of(recipe, format), quantizer_of(recipe, format)
    got, dparams, _ = te_buffers.backward(ours, grad, op, None)
    exact = kernels.backward(op.name, grad, op.x, op.raw, value=False)
    check(say, f"{recipe}, {format}, {shape}", got, theirs, exact.dx)
    if recipe == "delayed":
        assert torch.equal(ours.amax, theirs.amax)
    assert max(distance(a, b) for a, b in zip(dparams, exact.dparams, strict=True)) < 1e-3


@pytest.mark.parametrize("options", [{"force_pow_2_scales": True}, {"amax_epsilon": 1e4}])
def test_current_scales_follow_the_quantizers_options(options: dict[str, Any], say: Say) -> None:
    got = check_forward(
        say, f"tensorwise, {options}", operand(random(TOKENS, WIDTH)), lambda: quantizer_of("tensorwise", **options)
    )
    plain = te_buffers.forward(quantizer_of("tensorwise"), operand(random(TOKENS, WIDTH)))
    assert not torch.equal(got._scale_inv, plain._scale_inv)


def special() -> Tensor:
    """Rows of zeros, with a NaN, of NaN, with infinities, beyond the range, and of subnormal results."""
    x = random(160, 192)
    x[3], x[5, 7], x[7], x[9, 11], x[9, 12] = 0.0, torch.nan, torch.nan, torch.inf, -torch.inf
    x[17], x[20] = x[17] * 1e6, x[20] * 1e-9
    return x


INPUTS = {
    "special": special,
    "zeros": lambda: torch.zeros(160, 192, dtype=BF16, device=DEVICE),
    "rows apart": lambda: random(160, 256)[:, 32:224],
    "transposed": lambda: random(192, 160).T,
    "three dimensions": lambda: random(80, 2, 192),
    "eight rows": lambda: random(8, 192),
}


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("recipe", ALL)
def test_edges(recipe: str, case: str, say: Say) -> None:
    """Saturation, NaN, an amax of 0 or infinity, strides, few rows: equal to the last byte."""
    x = INPUTS[case]()
    if why := te_buffers.misfit(quantizer_of(recipe), x):
        assert (recipe, case) == ("mxfp8", "eight rows") and "divisible by 32" in why
        return
    got = check_forward(say, f"{recipe}, {case}", operand(x), lambda: quantizer_of(recipe))
    data = (got._rowwise_data if hasattr(got, "_rowwise_data") else got._data) & 0x7F
    if case == "special":
        assert (data == 0x7F).sum() == 1 + 192 and (data == 0x7E).any()  # NaN; the largest number
    if case == "zeros":
        assert not data.any()


@pytest.mark.parametrize("format", fp8.FORMATS)
@pytest.mark.parametrize("recipe", [name for name in ALL if name != "tensorwise"])
def test_every_bf16_number_is_cast_as_transformer_engine_casts_it(recipe: str, format: str, say: Say) -> None:
    """All 2^16 as gradients that pass through relu: by our kernel, by the quantizer and by integers (``fp8.encode``).

    Blocks of a row have one exponent, subnormals and infinities among them; blocks of a column have all.
    """
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16).view(256, 256).to(DEVICE)
    op = operand(torch.ones_like(grad), "relu")
    for scale in (1.0, 0.7) if recipe == "delayed" else (1.0,):
        ours, theirs = (quantizer_of(recipe, format, scale=scale) for _ in range(2))
        got, _, _ = te_buffers.backward(ours, grad, op, None)
        check(say, f"{recipe}, {format}, all of bf16", got, theirs, grad, allowed=0.0)
        assert differences(got, specified(theirs, grad))[0] == 0


def weight_gradient(recipe: str, columnwise: bool) -> Tensor:
    """Of a linear layer that is given our tensor, with or without its column-wise half."""
    from transformer_engine import pytorch

    from megatron_act import fp8_output

    torch.manual_seed(1)
    layer = pytorch.Linear(WIDTH, 64, bias=False, params_dtype=BF16)
    x, grad = random(TOKENS * BATCH, WIDTH), random(TOKENS * BATCH, 64, seed=1)
    with context(recipe_of(recipe)):
        layer(x)
    quantizer = layer.quantizers["scaling_fwd"][te.parts().FP8FwdTensorIdx.GEMM1_INPUT]
    with context(recipe_of(recipe)):
        y = layer(te_buffers.forward(fp8_output.configured(quantizer, columnwise), operand(x)))
    y.backward(grad)
    return layer.weight.grad


@pytest.mark.parametrize("recipe", SERVED)
def test_only_block_scales_need_the_column_wise_half(recipe: str) -> None:
    """Of one scale per tensor the backward pass makes it by itself: the same bits. So we always write both."""
    want = weight_gradient(recipe, columnwise=True)
    if recipe in ("delayed", "tensorwise"):
        assert torch.equal(weight_gradient(recipe, columnwise=False), want) and want.any()
    else:
        with pytest.raises((AssertionError, RuntimeError), match=r"column-?wise"):
            weight_gradient(recipe, columnwise=False)


def options_of(recipe: str) -> tuple[Fp8Options, dict[str, Any]]:
    """(everything that goes with a recipe, the configuration's options)"""
    return OUTPUT if recipe == "tensorwise" else BOTH, {"current": recipe == "tensorwise"}


@pytest.mark.parametrize("form", ["E4M3", "HYBRID"])
@pytest.mark.parametrize("recipe", SERVED)
def test_training_is_that_of_a_bf16_activation(recipe: str, form: str, say: Say) -> None:
    """Outputs, all gradients, scales and histories, over three steps of two micro-batches."""
    used, (fp8_options, options) = recipe_of(recipe, form), options_of(recipe)
    want = train(mlp(PLAIN, **options), used)
    module = mlp(fp8_options, **options)
    with watched(module) as seen:
        got = train(module, used)
    assert seen["fc2"] == ["Tensor"] + 5 * [SEEN[recipe]]  # the first call: fc2 has no quantizer yet
    assert seen["fc1"] == 6 * [SEEN[recipe] if fp8_options.grad else "Tensor"]
    say(f"{recipe}, {form}: {near(got, want)}")


@pytest.mark.parametrize("history", [{"amax_history_len": 1, "amax_compute_algo": "most_recent"}, {}])
def test_delayed_scales_and_histories_over_twenty_steps(history: dict[str, Any], say: Say) -> None:
    """As Megatron keeps them by default and as Transformer Engine does; after one step the scale has left 1."""
    used = recipe_of("delayed", "HYBRID", **history)
    assert train(mlp(BOTH), used, steps=1)["fc2 scaling_fwd scale"][0] != 1.0
    got, want = (train(mlp(fp8_options), used, steps=20) for fp8_options in (BOTH, PLAIN))
    say(f"delayed, 20 steps: {near(got, want)}")
    if not history:
        assert (got["fc2 scaling_fwd history"][-39:, 0] > 0).all()


@pytest.mark.parametrize("recipe", SERVED)
def test_recomputed_activations_keep_scales_and_histories(recipe: str, say: Say) -> None:
    """Checkpointing of the whole MLP by Transformer Engine's function: the result is bf16 in both passes."""
    from transformer_engine import pytorch

    used, (fp8_options, options) = recipe_of(recipe, "HYBRID"), options_of(recipe)
    want = train(mlp(PLAIN, **options), used)
    module = mlp(fp8_options, **options)
    with watched(module) as seen:
        got = train(module, used, run=lambda x: pytorch.checkpoint(module, x))
    assert SEEN[recipe] not in seen["fc2"]
    say(f"{recipe}, recomputed: {near(got, want)}")


def test_calls_that_get_bf16(say: Say) -> None:
    """As for a bf16 activation: no gradients, evaluation, no FP8, first calls; other layers and routed experts."""
    from transformer_engine import pytorch

    from megatron_act import fp8_output

    module, used = mlp(OUTPUT), recipe_of("delayed")
    seen, got = calls(module, used, recipe_of("tensorwise"))
    assert seen == [*4 * ["Tensor"], "Float8Tensor", "Tensor", "Tensor"]
    say(f"other calls: {near(got, calls(mlp(PLAIN), used, recipe_of('tensorwise'))[1])}")
    x, fc2 = random(TOKENS * BATCH, WIDTH), module.linear_fc2
    with context(used):
        assert fp8_output.quantizer_of(fc2, x, None) is not None
        assert fp8_output.quantizer_of(fc2, x[:0], None) is None
        assert fp8_output.quantizer_of(fc2, x, torch.ones(len(x), device=DEVICE)) is None
        grouped = pytorch.GroupedLinear(1, WIDTH, 64, bias=False, params_dtype=BF16)
        assert fp8_output.quantizer_of(grouped, x, None) is None
        fc2.te_quant_params = object()  # Megatron's override by module
        assert fp8_output.quantizer_of(fc2, x, None) is None


@pytest.mark.parametrize("recipe", SERVED)
def test_the_op_fuser_hands_over_fp8_by_itself(recipe: str, say: Say) -> None:
    """As if our operation's results were bf16; as the MLP of modules, but for delayed scaling (``te_op``'s test)."""
    from megatron_act import te_op

    used, (_, options) = recipe_of(recipe, "HYBRID"), options_of(recipe)
    made = counted()
    got = train(mlp(PLAIN, fused=True, **options), used)
    assert made == {"forward": 6, "backward": 0 if recipe == "tensorwise" else 6}
    with mock.patch.object(te_op, "_served", lambda *_, **__: None):
        bf16 = train(mlp(PLAIN, fused=True, **options), used)
    say(f"{recipe}, op fuser: {near(got, bf16)}")
    if recipe != "delayed":
        want = train(mlp(PLAIN, **options), used)
        say(f"{recipe}, op fuser and modules: {near(got, {name: want[name] for name in got}, bound=2e-2)}")


def allocated_bytes(module: torch.nn.Module, recipe: Any) -> int:
    """What is held on the device between the forward and the backward pass, beyond what was."""
    x = batches(1)[0][0].clone().requires_grad_()
    before = torch.cuda.memory_allocated()
    with context(recipe):
        results = module(x)
    assert results[0].requires_grad
    return torch.cuda.memory_allocated() - before


@pytest.mark.parametrize("measure", [kept_bytes, allocated_bytes])
def test_memory_that_is_kept_for_the_backward_pass(measure: Callable[..., int], say: Say) -> None:
    """Bytes per element: x and fc2's input, of which fc2 keeps both halves where it does not own them (3 and 4)."""
    cases = {"plain": PLAIN, "output": OUTPUT, "stored": Fp8Options(output=True, store=True)}
    held, used = {}, recipe_of("delayed", "HYBRID")
    for label, fp8_options in cases.items():
        module = mlp(fp8_options, backend="triton")
        train(module, used, steps=1)
        held[label] = measure(module, used) / (TOKENS * BATCH * WIDTH)
    say(f"{measure.__name__} per element: " + ", ".join(f"{label} {size:.3f}" for label, size in held.items()))
    halves = 1 if te.parts().is_non_tn_fp8_gemm_supported() else 2
    assert held["output"] - held["plain"] == pytest.approx(halves - 1, abs=0.15)
    assert held["stored"] - held["output"] == pytest.approx(33 / 32 - 2, abs=0.15)
