"""The stand-in for Transformer Engine's compiled extension (``te_cpu``): te.Linear by hand, for every recipe.

Each test runs TE's own Python in a child process. They prove the stand-in, on which the tests of our FP8 code rely.
"""

import itertools
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from te_cpu import by_hand
from te_cpu.cases import INPUTS, OUTPUTS, RECIPES, assert_equal, data, input_quantizer, linear, passes, recipe_of
from te_cpu.process import in_engine, one_rank
from torch import Tensor

from megatron_act.kernels import fp8

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@in_engine
def test_without_fp8_a_linear_layer_is_torchs(dtype: torch.dtype) -> None:
    module = linear(bias=True, params_dtype=dtype)
    x, grad = data(dtype=dtype)
    got = passes(module, None, x, grad)
    weight, bias = (param.detach().clone().requires_grad_() for param in module.parameters())
    x_2 = x.detach().clone().requires_grad_()
    y = torch.nn.functional.linear(x_2, weight, bias)
    y.backward(grad)
    for a, b in zip(got, [y, x_2.grad, weight.grad, bias.grad], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "form"), [*itertools.product(RECIPES, ["E4M3", "HYBRID"])])
@in_engine
def test_fp8_products_are_those_of_quantized_operands(name: str, form: str) -> None:
    """y, dx and dw of fp32 tensors, to fp32's accuracy; plain products differ by 100 times more."""
    module, recipe = linear(), recipe_of(name, form)
    x, grad = data()
    for _ in range(2):  # delayed: the second pass has the first's scales
        got = passes(module, recipe, x, grad)
    weight = module.weight.detach()
    want = by_hand.linear(x.detach(), weight, grad, name, "e5m2" if form == "HYBRID" else "e4m3")
    plain = (x.detach() @ weight.T, grad @ weight, grad.T @ x.detach())
    for a, b, other in zip(got, want, plain, strict=True):
        size = b.abs().max()
        assert (a - b).abs().max() < 1e-5 * size < 1e-2 * (a - other).abs().max()


@pytest.mark.parametrize("name", RECIPES)
@in_engine
def test_bf16_and_the_gradient_of_a_bias(name: str) -> None:
    module, recipe = linear(bias=True, params_dtype=torch.bfloat16), recipe_of(name, "HYBRID")
    torch.nn.init.normal_(module.bias)
    x, grad = data(5, 32, dtype=torch.bfloat16)
    for _ in range(2):
        y, dx, dw, dbias = passes(module, recipe, x, grad)
    rows = [tensor.detach().float().flatten(0, -2) for tensor in (x, module.weight, grad)]
    want = by_hand.linear(*rows, name, "e5m2")
    want = (want[0] + module.bias.detach().float(), *want[1:], rows[2].sum(0))
    for a, b in zip((y, dx, dw, dbias), want, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b.reshape(a.shape), rtol=2**-8, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize(
    ("algorithm", "length", "margin"), [("most_recent", 1, 0), ("most_recent", 3, 1), ("max", 3, 0), ("max", 1, 2)]
)
@in_engine
def test_delayed_scaling_is_the_recurrence(algorithm: str, length: int, margin: int) -> None:
    """History and scale of the input over 11 steps, one without values and one with an infinity among them."""
    options = {"amax_compute_algo": algorithm, "amax_history_len": length, "margin": margin}
    module, recipe = linear(), recipe_of("delayed", **options)
    history, scale = [0.0] * length, 1.0
    for size in (1.0, 30.0, 1.0, 1.0, 0.0, 0.5, math.inf, 2.0, 1e-3, 4.0, 1e-3):
        x = torch.randn(32, INPUTS) * (size if math.isfinite(size) else 1.0)
        x[3, 5] = torch.inf if math.isinf(size) else x[3, 5]
        passes(module, recipe, x.requires_grad_(), torch.randn(32, OUTPUTS))
        latest = x.abs().max().item()
        if latest:
            history = [*history[1:], latest]
            amax = latest if algorithm == "most_recent" else max(history)
            history[0] = 0.0
            scale = 448.0 / 2**margin / amax if math.isfinite(amax) else scale
        state = module.fp8_meta["scaling_fwd"]
        assert state.amax_history[:, 0].tolist() == history, size
        assert state.scale[0].item() == pytest.approx(scale, rel=1e-6), size


@pytest.mark.parametrize("algorithm", ["most_recent", "max"])
@in_engine
def test_delayed_scaling_is_that_of_tes_own_python(algorithm: str) -> None:
    """``NVTE_UNFUSED_FP8_UPDATE=1`` runs it; they part only where nothing was seen."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import quantization

    recipe = recipe_of("delayed", amax_compute_algo=algorithm, margin=1)
    histories, scales = list(torch.rand(2, 5, 3) + 0.1), [torch.ones(3), torch.full((3,), 2.0)]
    for _ in range(7):
        amaxes = torch.rand(6) * 10
        theirs = [(history.clone(), scale.clone()) for history, scale in zip(histories, scales, strict=True)]
        dtype = quantization.get_fp8_te_dtype(recipe, True)
        tex.fused_amax_and_scale_update_after_reduction(amaxes, histories, scales, algorithm, dtype, 1.0)
        for amax, (history, scale), ours in zip(
            amaxes.split(3), theirs, zip(histories, scales, strict=True), strict=True
        ):
            history[0] = amax
            quantization._amax_and_scale_update(history, scale, 448.0, recipe)
            assert_equal(list(ours), [history, scale])


LAYOUTS = {  # of 2 x 80 tokens and 192 features: facts of TE's quantizers, by the attribute that holds each buffer
    "delayed": {"_data": (2, 80, 192), "_transpose": (192, 2, 80), "_scale_inv": (1,)},
    "tensorwise": {"_data": (2, 80, 192), "_transpose": (192, 2, 80), "_scale_inv": (1,)},
    "blockwise": {
        "_rowwise_data": (2, 80, 192),
        "_rowwise_scale_inv": (2, 160),
        "_columnwise_data": (192, 2, 80),
        "_columnwise_scale_inv": (2, 192),
    },
    "mxfp8": {
        "_rowwise_data": (2, 80, 192),
        "_rowwise_scale_inv": (256, 8),
        "_columnwise_data": (2, 80, 192),
        "_columnwise_scale_inv": (8, 256),
    },
}


def used_quantizer(name: str, x: Tensor, grad: Tensor) -> Any:
    """The input quantizer of a layer that has had a pass."""
    module = linear(params_dtype=torch.bfloat16)
    passes(module, recipe_of(name), x, grad)
    return input_quantizer(module)


@pytest.mark.parametrize("name", RECIPES)
@in_engine
def test_layouts(name: str) -> None:
    """Shapes; buffers that nobody wrote; both halves of a filled tensor against the specification of our kernels."""
    x, grad = data(2, 80, dtype=torch.bfloat16)
    quantizer = used_quantizer(name, x, grad)
    empty = quantizer.make_empty(x.shape, dtype=torch.bfloat16)
    buffers = {attribute: getattr(empty, attribute) for attribute, _ in empty._INNER_TENSORS}
    assert {attribute: tuple(tensor.shape) for attribute, tensor in buffers.items()} == LAYOUTS[name]
    for attribute, tensor in buffers.items():
        byte = 0xFF if attribute.endswith("scale_inv") else 0x7F
        assert (tensor == byte).all() if tensor.dtype == torch.uint8 else tensor.isnan().all(), attribute

    filled, y = quantizer(x.detach()), x.detach().float().flatten(0, 1)
    scale = {"delayed": getattr(quantizer, "scale", None), "tensorwise": fp8.scale_of(fp8.amax_of(y), False)}.get(name)
    want = fp8.quantize(y, name if scale is None else "tensor", scale)
    parts = [want.data, want.columnwise, want.scale_inv, want.columnwise_scale_inv][: 3 if scale is not None else 4]
    order = [0, 1, 2] if scale is not None else [0, 2, 1, 3]
    got = [getattr(filled, attribute) for attribute in LAYOUTS[name]]
    assert_equal([got[i].reshape(part.shape) for i, part in zip(order, parts, strict=True)], parts)
    before = [tensor.clone() for tensor in got]
    quantizer.update_quantized(-x.detach(), filled, noop_flag=torch.ones(1))
    assert_equal([getattr(filled, attribute) for attribute in LAYOUTS[name]], before, "with a flag to do nothing")
    quantizer.update_quantized(-x.detach(), filled, noop_flag=torch.zeros(1))
    assert not torch.equal(getattr(filled, next(iter(LAYOUTS[name]))), before[0])


@in_engine
def test_current_scales_fill_the_format_and_agree_in_a_group() -> None:
    """1 / s of e5m2 is amax / 57344; with a reduction, amax is that of the group, here made three times as large."""
    from transformer_engine.pytorch import DType, Float8CurrentScalingQuantizer

    one_rank()
    y = torch.randn(32, 64)
    quantizer = Float8CurrentScalingQuantizer(DType.kFloat8E5M2, device="cpu")
    torch.testing.assert_close(quantizer(y)._scale_inv, (y.abs().max() / 57344.0).reshape(1))
    quantizer.with_amax_reduction, quantizer.amax_reduction_group = True, None
    with mock.patch("torch.distributed.all_reduce", lambda amax, op, group: amax.mul_(3)):
        torch.testing.assert_close(quantizer.quantize_impl(y)._scale_inv, (3 * y.abs().max() / 57344.0).reshape(1))


@in_engine
def test_swizzled_scales_lie_where_cublas_looks() -> None:
    """Entry (i, j) of a tile of 128 x 4 is byte 16 (i mod 32) + 4 (i div 32) + j; column-wise scales are transposed."""
    x, grad = data(dtype=torch.bfloat16)
    quantizer = used_quantizer("mxfp8", x, grad)
    plain = quantizer(x.detach())
    quantizer.optimize_for_gemm = True
    swizzled = quantizer(x.detach())
    sides = (
        (plain._rowwise_scale_inv, swizzled._rowwise_scale_inv.flatten()),
        (
            plain._columnwise_scale_inv.T,
            swizzled._columnwise_scale_inv.flatten(),
        ),
    )
    for scales, stored in sides:
        for i, j in itertools.product(range(scales.shape[0]), range(scales.shape[1])):
            tile = (i // 128) * (scales.shape[1] // 4) + j // 4
            assert stored[512 * tile + 16 * (i % 32) + 4 * (i % 128 // 32) + j % 4] == scales[i, j], (i, j)


@pytest.mark.parametrize("decoupled", [True, False])
@in_engine
def test_the_optimizer_is_adam(decoupled: bool) -> None:
    """FusedAdam against torch, in fp32 and in bf16 with fp32 masters; the norm and the scaling that clip gradients."""
    from transformer_engine.pytorch import optimizers

    options = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    start = torch.randn(2, 40)
    ours, theirs, low = (start.clone().requires_grad_() for _ in range(3))
    low = start.bfloat16().requires_grad_()
    expected = kind([theirs], **options)
    fused = optimizers.FusedAdam([ours], adam_w_mode=decoupled, **options)
    masters = optimizers.FusedAdam([low], adam_w_mode=decoupled, master_weights=True, **options)
    for _ in range(4):
        grad = torch.randn(2, 40).bfloat16().float()
        ours.grad, theirs.grad, low.grad = grad, grad.clone(), grad.bfloat16()
        for optimizer in (expected, fused, masters):
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(low.float(), theirs, rtol=2**-7, atol=2**-7)

    flag, tensors = torch.zeros(1, dtype=torch.int), [torch.randn(3, 4), torch.randn(5)]
    norm, norms = optimizers.multi_tensor_applier(optimizers.multi_tensor_l2norm, flag, [tensors], True)
    whole = torch.cat([tensor.flatten() for tensor in tensors]).norm()
    torch.testing.assert_close([norm, norms], [whole.reshape(1), torch.stack([t.norm() for t in tensors])])
    halves = [torch.empty_like(tensor) for tensor in tensors]
    optimizers.multi_tensor_applier(optimizers.multi_tensor_scale, flag, [tensors, halves], 0.5)
    assert_equal(halves, [tensor * 0.5 for tensor in tensors])
    assert not flag.any()
    tensors[1][2] = torch.nan
    optimizers.multi_tensor_applier(optimizers.multi_tensor_scale_tensor, flag, [tensors, halves], torch.tensor(2.0))
    assert flag.all() and torch.equal(halves[0], tensors[0] * 2.0)


def test_the_release_is_the_one_that_is_installed() -> None:
    from te_cpu import loader

    assert f'engine="transformer_engine=={loader.VERSION}"' in (ROOT / "launch" / "setup_env.sh").read_text()
    assert (loader.FOLDER / f"transformer_engine-{loader.VERSION}.dist-info").is_dir()
