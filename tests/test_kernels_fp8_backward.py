"""FP8 in the backward kernel, gradients read and written and pre-activations kept, against the specification."""

import pytest
import torch
from kernel_cases import DEVICE, absolute_terms
from kernel_fp8_cases import FP8, SHAPES, buffers, check, equal, quantized_gradient, random, raw, special

from megatron_act.kernels import api as kernels
from megatron_act.kernels import fp8, fp8_ops

BOTH = pytest.mark.parametrize("backend", ["triton", "reference"])


def sums_agree(name, z, grad, dparams, dbias, plain):
    """The parameters' gradients and dbias within 1e-6 of the sum of absolute terms."""
    got, want = list(dparams), list(plain.dparams)
    zero = None
    if dbias is not None:
        zero = torch.zeros_like(dbias)
        got, want = [*got, dbias], [*want, plain.dx.double().sum(0)]
    for mine, theirs, size in zip(got, want, absolute_terms(name, z, grad, raw(name), zero), strict=True):
        assert ((mine - theirs).abs() <= 1e-6 * size.to(mine.device) + 1e-6 * theirs.abs()).all()


@pytest.mark.parametrize(
    ("name", "recipe", "format"),
    [
        *(("xielu", recipe, format) for recipe in FP8 for format in fp8.FORMATS),
        ("relu2", "tensor", "e5m2"), ("xiprelup", "tensor", "e4m3"), ("xiprelup", "blockwise", "e5m2"),
    ],
)  # fmt: skip
def test_dx_equals_the_specification(name, recipe, format):
    shape = SHAPES[recipe]
    x, grad, bias = random(*shape), random(*shape, seed=2), random(shape[1], seed=3)
    scale = torch.full((1,), 2.0, device=DEVICE)
    got, reference = (
        fp8_ops.backward(
            name, grad, x, raw(name), buffers(recipe, shape, format=format), bias=bias, scale=scale, backend=b
        )
        for b in ("triton", "reference")
    )
    plain = kernels.backward(name, grad, x + bias, raw(name), backend="triton")
    check(got[0], fp8.quantize(plain.dx, recipe, scale, format=format))
    sums_agree(name, x + bias, grad, got[1], got[2], plain)
    sums_agree(name, x + bias, grad, reference[1], reference[2], plain)
    assert (reference[0].data.int() - got[0].data.int()).abs().max() <= 1


@pytest.mark.parametrize("format", fp8.FORMATS)
@pytest.mark.parametrize(("recipe", "swizzled"), [(r, False) for r in FP8] + [("mxfp8", True)])
@BOTH
def test_fp8_gradients_are_read(recipe, swizzled, format, backend):
    """Of every recipe and format, into dx of another one."""
    shape = SHAPES[recipe]
    x, grad = random(*shape), quantized_gradient(recipe, shape, format, swizzled)
    g = grad.values()
    got, dparams, dbias = fp8_ops.backward(
        "xielu", grad, x, raw("xielu"), buffers("blockwise", shape, format="e5m2"), backend=backend
    )
    plain = kernels.backward("xielu", g, x, raw("xielu"), backend=backend)
    check(got, fp8.quantize(plain.dx, "blockwise", format="e5m2"))
    assert dbias is None and g.isfinite().all()
    sums_agree("xielu", x, g, dparams, None, plain)


@BOTH
def test_every_gradient_code_is_decoded(backend):
    """All 256 of each format, infinities and NaN too: the slope of x = 1 under relu is 1."""
    for format in fp8.FORMATS:
        codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(2, 128)
        half = torch.full((1,), 0.5, device=DEVICE)
        grad = fp8.Quantized(codes, half, recipe="tensor", format=format)
        out = fp8_ops.empty("plain", 2, 128, DEVICE, dtype=torch.float32)
        got = fp8_ops.backward("relu", grad, torch.ones(2, 128, device=DEVICE), [], out, backend=backend)[0].data
        torch.testing.assert_close(got, fp8.decode(codes, format) * 0.5, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("recipe", FP8)
def test_the_amax_of_dx(recipe):
    """Delayed scaling of gradients: the larger of what was there and max |dx|."""
    x, grad = random(*SHAPES[recipe]), random(*SHAPES[recipe], seed=2)
    out, scale = buffers("tensor", SHAPES[recipe]), torch.ones(1, device=DEVICE)
    fp8_ops.backward("xielu", grad, x, raw("xielu"), out, scale=scale, backend="triton")
    dx = fp8.to_bf16(kernels.backward("xielu", grad, x, raw("xielu"), backend="triton").dx)
    assert out.amax.item() == dx.abs().max().item()


# Kept pre-activations.


@pytest.mark.parametrize("recipe", fp8.RECIPES)
@BOTH
def test_forward_keeps_the_preactivation(recipe, backend):
    """x + bias as the specification has it, beside a result that is the same as without; all bytes are written."""
    shape = SHAPES[recipe]
    bias, scale = random(shape[1], seed=1), torch.ones(1, device=DEVICE)
    for x in (special(shape), random(*shape).to(torch.bfloat16)):
        kept = fp8_ops.empty_kept(*shape, DEVICE)
        kept.data.fill_(99)
        kept.scales.fill_(99)
        options = {"bias": bias, "scale": scale, "backend": backend}
        got = fp8_ops.forward("xielu", x, raw("xielu"), buffers(recipe, shape), kept=kept, **options)
        without = fp8_ops.forward("xielu", x, raw("xielu"), buffers(recipe, shape), **options)
        want = fp8.keep(x.float() + bias)
        assert equal(kept.data, want.data) and equal(kept.scales, want.scales)
        assert torch.equal(got.data.view(torch.uint8), without.data.view(torch.uint8))


@pytest.mark.parametrize("recipe", fp8.RECIPES)
@BOTH
def test_backward_from_what_was_kept(recipe, backend):
    """Equals the backward pass of an x that holds the kept values; the bias is in them, so it only asks for dbias."""
    shape = SHAPES[recipe]
    grad, bias, scale = random(*shape, seed=2), random(shape[1], seed=3), torch.ones(1, device=DEVICE)
    kept = fp8.keep(random(*shape) + bias)
    z, out = kept.values(), buffers(recipe, shape, dtype=torch.float32)
    got, dparams, dbias = fp8_ops.backward(
        "xielu", grad, kept, raw("xielu"), out, bias=bias, scale=scale, backend=backend
    )
    plain = kernels.backward("xielu", grad, z, raw("xielu"), backend=backend)
    if recipe == "plain":
        assert torch.equal(got.data, plain.dx)
    else:
        check(got, fp8.quantize(plain.dx, recipe, scale))
    sums_agree("xielu", z, grad, dparams, dbias, plain)
    assert fp8_ops.backward("xielu", grad, kept, raw("xielu"), out, scale=scale, backend=backend)[2] is None


def test_a_kept_preactivation_costs_a_sixteenth_of_the_gradient():
    """bf16 in, bf16 out, e4m3 between: dx and the parameters' gradients stay near those of the exact x."""
    x, grad = random(64, 256).bfloat16(), random(64, 256, seed=2).bfloat16()
    kept, y = fp8_ops.empty_kept(64, 256, DEVICE), fp8_ops.empty("plain", 64, 256, DEVICE)
    fp8_ops.forward("xielu", x, raw("xielu"), y, kept=kept, backend="triton")
    dx, dparams, _ = fp8_ops.backward(
        "xielu", grad, kept, raw("xielu"), fp8_ops.empty("plain", 64, 256, DEVICE), backend="triton"
    )
    exact = kernels.backward("xielu", grad, x, raw("xielu"), backend="triton")
    error = (dx.data.float() - exact.dx.float()).norm() / exact.dx.float().norm()
    assert 1e-3 < error < 0.04  # one rounding to 3 bits of mantissa, 2^-4 at most, an rms of 0.026 where it is uniform
    terms = absolute_terms("xielu", x, grad, raw("xielu"), None)
    assert all((a - b).abs() <= 2e-3 * t for a, b, t in zip(dparams, exact.dparams, terms, strict=True))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"kept": fp8.Kept(fp8_ops.empty_kept(64, 64, "cpu").data, torch.zeros(64, 3).byte())}, ["kept.scales", "128"]),
        ({"grad": fp8.Quantized(torch.zeros(64, 64, dtype=torch.uint8), recipe="tensor")}, ["grad.scale_inv", "None"]),
        ({"bias": torch.zeros(63)}, ["bias", "(64,)", "(63,)"]),
    ],
)  # fmt: skip
def test_calls_that_are_refused(change, parts):
    given = {"kept": fp8_ops.empty_kept(64, 64, "cpu"), "grad": torch.ones(64, 64), **change}
    kept, grad = given.pop("kept"), given.pop("grad")
    with pytest.raises(ValueError) as error:
        fp8_ops.backward("relu", grad, kept, [], fp8_ops.empty("plain", 64, 64, "cpu"), **given)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), str(error.value)
