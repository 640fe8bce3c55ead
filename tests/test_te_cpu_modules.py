"""Transformer Engine's modules on the stand-in (``te_cpu``): state over passes, experts, norms, fused operations."""

from typing import Any

import pytest
import torch
from te_cpu.cases import INPUTS, OUTPUTS, RECIPES, assert_equal, data, input_quantizer, linear, passes, recipe_of
from te_cpu.process import in_engine
from torch import Tensor

BF16 = {"params_dtype": torch.bfloat16}


def copy_of(module: Any) -> Any:
    """Another layer with its weights."""
    other = linear(**BF16)
    other.load_state_dict({"weight": module.weight.detach().clone()}, strict=False)
    return other


def state_of(module: Any) -> list[Tensor]:
    """Histories and scales of delayed scaling."""
    states = [module.fp8_meta[key] for key in ("scaling_fwd", "scaling_bwd")]
    return [tensor.clone() for state in states for tensor in (state.amax_history, state.scale)]


@pytest.mark.parametrize("name", RECIPES)
@in_engine
def test_a_quantized_input_gives_the_same_bits(name: str) -> None:
    """One made by a copy of the layer's own quantizer, as autograd sees it: y, dx, dw and, delayed, the bookkeeping."""
    import transformer_engine.pytorch as te

    recipe = recipe_of(name, "HYBRID", **({"amax_history_len": 4} if name == "delayed" else {}))
    plain = linear(**BF16)
    given = copy_of(plain)
    x, grad = data(2, 80, dtype=torch.bfloat16)
    assert_equal(passes(given, recipe, x, grad), passes(plain, recipe, x, grad))
    quantizer = input_quantizer(given)
    for step in range(3):
        x = (x.detach() * (step + 2)).requires_grad_()
        want = passes(plain, recipe, x, grad)
        given.zero_grad()
        x.grad = None
        with te.autocast(recipe=recipe):
            y = given(quantizer(x))
        y.backward(grad)
        assert_equal([y.detach(), x.grad, given.weight.grad], want, f"step {step}")
        if name == "delayed":
            assert_equal(state_of(given), state_of(plain), f"step {step}")


@in_engine
def test_halves_that_are_not_there_are_not_read() -> None:
    """Unwritten buffers, missing and invalid transposed copies, a missing half that cannot be made again."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    module = linear(**BF16)
    x, grad = data(dtype=torch.bfloat16)
    passes(module, recipe_of("tensorwise"), x, grad)
    quantizer = input_quantizer(module)
    with pytest.raises(RuntimeError, match="never written"):
        passes(module, recipe_of("tensorwise"), quantizer.make_empty(x.shape, dtype=torch.bfloat16), grad)
    weight, dy = quantizer(module.weight.detach()), quantizer(grad)
    weight._transpose_invalid = True
    with pytest.raises(RuntimeError, match="a valid transposed copy"):
        general_gemm(weight, dy, out_dtype=torch.bfloat16, layout="NN")
    general_gemm(weight, quantizer(x.detach()), out_dtype=torch.bfloat16)  # its row-wise half is good
    weight._data = None
    with pytest.raises(RuntimeError, match="row-wise data"):
        general_gemm(weight, quantizer(x.detach()), out_dtype=torch.bfloat16)
    passes(other := linear(**BF16), recipe_of("blockwise"), x, grad)
    block = input_quantizer(other)
    block.set_usage(columnwise=False)
    rows_only = block(x.detach())
    with pytest.raises(AssertionError, match="Cannot update to rowwise and columnwise"):
        rows_only.update_usage(columnwise_usage=True)
    with pytest.raises(RuntimeError, match="column-wise data"):
        general_gemm(rows_only, block(grad), out_dtype=torch.bfloat16, layout="NT")


@in_engine
def test_what_cublas_refuses_is_refused() -> None:
    from te_cpu import loader
    from transformer_engine.pytorch import DType, Float8CurrentScalingQuantizer
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    module, recipe = linear(**BF16), recipe_of("tensorwise")
    x, grad = data(24, dtype=torch.bfloat16)  # TE itself asks for multiples of 8
    with pytest.raises(RuntimeError, match="multiple of 16, got 24"):
        passes(module, recipe, x, grad)
    with loader.capability(loader.BLACKWELL):  # any layout, no transposed copies: no such limit
        passes(other := linear(**BF16), recipe, x, grad)
        assert input_quantizer(other)(x.detach())._transpose is None
    x, grad = data(dtype=torch.bfloat16)
    quantizer = Float8CurrentScalingQuantizer(DType.kFloat8E5M2, device="cpu")
    with pytest.raises(RuntimeError, match="e5m2 twice"):
        general_gemm(quantizer(module.weight.detach()), quantizer(x.detach()), out_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="two operands of one kind"):
        general_gemm(quantizer(module.weight.detach()), x.detach(), out_dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["delayed", "blockwise"])
@in_engine
def test_gradients_are_added_to_main_grad(name: str) -> None:
    """``fuse_wgrad_accumulation`` over microbatches; the first one overwrites where it is said to be the first."""
    module, plain, recipe = linear(**BF16, fuse_wgrad_accumulation=True), linear(**BF16), recipe_of(name)
    plain.load_state_dict({"weight": module.weight.detach()}, strict=False)
    module.weight.main_grad = torch.ones(OUTPUTS, INPUTS)
    total = torch.ones(OUTPUTS, INPUTS)
    for first in (None, None, True, False):
        x, grad = data(dtype=torch.bfloat16)
        passes(module, recipe, x, grad, is_first_microbatch=first)
        dw = passes(plain, recipe, x, grad)[2].float()
        total = dw if first else total + dw
        torch.testing.assert_close(module.weight.main_grad, total, rtol=2**-7, atol=2**-7 * dw.abs().max().item())


@in_engine
def test_weights_are_quantized_at_the_first_microbatch() -> None:
    module, recipe = linear(**BF16), recipe_of("tensorwise")
    x, grad = data(dtype=torch.bfloat16)
    first = passes(module, recipe, x, grad, is_first_microbatch=True)[0]
    with torch.no_grad():
        module.weight.mul_(2)
    assert_equal(passes(module, recipe, x, grad, is_first_microbatch=False)[:1], [first])
    assert_equal(passes(module, recipe, x, grad, is_first_microbatch=True)[:1], [2 * first])


@in_engine
def test_recomputation_sees_the_scales_of_the_first_pass() -> None:
    """Delayed scaling under TE's checkpoint: gradients, histories and scales of 4 steps have the same bits."""
    import transformer_engine.pytorch as te

    recipe = recipe_of("delayed", "HYBRID", amax_history_len=3)
    plain = linear(**BF16)
    module = copy_of(plain)
    for step in range(4):
        x, grad = data(dtype=torch.bfloat16)
        x = (x.detach() * 2.0**step).requires_grad_()
        want = passes(plain, recipe, x, grad)
        module.zero_grad()
        x.grad = None
        with te.autocast(recipe=recipe):
            y = te.checkpoint(module, x)
        y.backward(grad)
        assert_equal([y.detach(), x.grad, module.weight.grad], want, f"step {step}")
        assert_equal(state_of(module), state_of(plain), f"step {step}")


@in_engine
def test_recomputation_draws_the_same_numbers() -> None:
    """Dropout inside TE's checkpoint: the second pass zeroes what the first did."""
    import transformer_engine.pytorch as te

    x = torch.randn(64, 64, requires_grad=True)
    y = te.checkpoint(torch.nn.Dropout(0.5), x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 2.0)) and 0.3 < (y == 0).float().mean() < 0.7


@pytest.mark.parametrize("name", [None, *RECIPES])
@in_engine
def test_grouped_layers_are_linear_layers(name: str | None) -> None:
    """Three experts, one without tokens, padded for FP8: outputs and gradients of a layer each, bit for bit."""
    import transformer_engine.pytorch as te

    recipe, rows = recipe_of(name) if name else None, [40, 0, 25]
    options = {"bias": True, "params_dtype": torch.bfloat16}
    grouped = te.GroupedLinear(3, INPUTS, OUTPUTS, **options)
    singles = [te.Linear(INPUTS, OUTPUTS, **options) for _ in rows]
    for number, single in enumerate(singles):
        torch.nn.init.normal_(single.bias)
        for kind in ("weight", "bias"):
            getattr(grouped, f"{kind}{number}").data.copy_(getattr(single, kind).data)
    x, grad = data(sum(rows), dtype=torch.bfloat16)
    padding, unpadding = te.Fp8Padding(3, align_size=32), te.Fp8Unpadding(3, align_size=32)

    def experts(x: Tensor) -> Tensor:
        padded, sections = padding(x, rows)
        return unpadding(grouped(padded, sections), rows)

    def layers(x: Tensor) -> Tensor:
        parts = [torch.nn.functional.pad(part, (0, 0, 0, -part.shape[0] % 32)) for part in x.split(rows)]
        return torch.cat([layer(part)[:n] for layer, part, n in zip(singles, parts, rows, strict=True) if n])

    results = []
    for function in (experts, layers):
        x = x.detach().requires_grad_()
        with te.autocast(enabled=recipe is not None, recipe=recipe):
            y = function(x)
        y.backward(grad)
        results.append([y.detach(), x.grad])
    assert_equal(*results)
    for number, single in enumerate(singles):
        for kind in ("weight", "bias"):
            want, got = getattr(single, kind).grad, getattr(grouped, f"{kind}{number}").grad
            assert torch.equal(got, torch.zeros_like(got) if want is None else want), (kind, number)


def norm_of(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, centered: bool) -> Tensor:
    gamma = weight + 1 if centered else weight
    if name == "RMSNorm":
        return torch.nn.functional.rms_norm(x, x.shape[-1:], gamma, 1e-5)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], gamma, bias, 1e-5)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
@in_engine
def test_norms(name: str, centered: bool) -> None:
    """te.RMSNorm, te.LayerNorm and LayerNormLinear against torch, output and every gradient."""
    import transformer_engine.pytorch as te

    norm = getattr(te, name)(INPUTS, eps=1e-5, zero_centered_gamma=centered)
    fused = te.LayerNormLinear(
        INPUTS, OUTPUTS, bias=False, normalization=name, zero_centered_gamma=centered, params_dtype=torch.float32
    )
    x, grad = data(3, 16)
    for module, dy in ((norm, x.detach().cos()), (fused, grad)):
        for param in module.parameters():
            torch.nn.init.normal_(param)
        got = passes(module, None, x, dy)
        copies = {key: param.detach().clone().requires_grad_() for key, param in module.named_parameters()}
        x_2 = x.detach().clone().requires_grad_()
        prefix = "layer_norm_" if module is fused else ""
        y = norm_of(name, x_2, copies[f"{prefix}weight"], copies.get(f"{prefix}bias"), centered)
        y = torch.nn.functional.linear(y, copies["weight"]) if module is fused else y
        y.backward(dy)
        want = [y.detach(), x_2.grad, *(param.grad for param in copies.values())]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("name", RECIPES)
@in_engine
def test_a_norm_quantizes_for_its_linear_layer(name: str) -> None:
    """LayerNormLinear in FP8 is the norm and a linear layer, bit for bit in fp32."""
    import transformer_engine.pytorch as te

    recipe = recipe_of(name)
    fused = te.LayerNormLinear(INPUTS, OUTPUTS, bias=False, normalization="RMSNorm", params_dtype=torch.float32)
    norm, module = te.RMSNorm(INPUTS, eps=fused.eps), linear()
    module.load_state_dict({"weight": fused.weight.detach()}, strict=False)
    x, grad = data()
    for _ in range(2):
        got = passes(fused, recipe, x, grad)
        want = passes(torch.nn.Sequential(norm, module), recipe, x, grad)
    assert_equal(got, want)


ACTIVATIONS = {
    "GELU": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "ReLU": torch.relu,
    "SReLU": lambda x: torch.relu(x).square(),
    "SiLU": torch.nn.functional.silu,
    "SwiGLU": lambda x: torch.nn.functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "GEGLU": lambda x: torch.nn.functional.gelu(x.chunk(2, -1)[0], approximate="tanh") * x.chunk(2, -1)[1],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@in_engine
def test_activations(name: str) -> None:
    """The op fuser's against torch: output and gradient."""
    from transformer_engine.pytorch import ops

    x, _ = data(dtype=torch.float32)
    want = ACTIVATIONS[name](x)
    grad = torch.randn_like(want)
    (dx,) = torch.autograd.grad(want, x, grad)
    for a, b in zip(passes(ops.Sequential(getattr(ops, name)()), None, x, grad), (want, dx), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
@in_engine
def test_a_bf16_activation_is_rounded_before_it_is_scaled_but_delayed(name: str) -> None:
    """The bytes of a quantized activation: delayed scaling takes the fp32 value, the others one rounded to bf16."""
    import transformer_engine_torch as tex

    module = linear(**BF16)
    x, grad = data(dtype=torch.bfloat16)
    passes(module, recipe_of(name), x, grad)
    quantizer = input_quantizer(module)
    y = torch.nn.functional.gelu(x.detach().float(), approximate="tanh")
    of_fp32, of_bf16 = quantizer(y), quantizer(y.bfloat16())
    got, exact, rounded = (bytes_of(tensor) for tensor in (tex.gelu(x.detach(), quantizer), of_fp32, of_bf16))
    assert not torch.equal(exact, rounded)
    assert torch.equal(got, exact if name == "delayed" else rounded)


def bytes_of(tensor: Any) -> Tensor:
    return tensor._data if hasattr(tensor, "_data") else tensor._rowwise_data


@pytest.mark.parametrize("name", RECIPES)
@in_engine
def test_fused_operations_are_a_chain_of_modules(name: str) -> None:
    """Linear, SReLU, Linear: its input is quantized by the neighbour's quantizer, which in fp32 changes nothing.

    The gradient of the activation is a tensor of the first layer's gradient quantizer, the modules quantize it in turn.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import ops

    recipe = recipe_of(name, "HYBRID")
    layers = te.Linear(INPUTS, 256, bias=False), te.Linear(256, OUTPUTS, bias=False)
    fused = ops.Sequential(ops.Linear(INPUTS, 256, bias=False), ops.SReLU(), ops.Linear(256, OUTPUTS, bias=False))
    for param, layer in zip(fused.parameters(), layers, strict=True):
        param.data.copy_(layer.weight.data)
    chain = torch.nn.Sequential(layers[0], ops.SReLU(), layers[1])
    x, grad = data()
    for _ in range(3):
        got, want = passes(fused, recipe, x, grad), passes(chain, recipe, x, grad)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
