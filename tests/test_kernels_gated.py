"""Gated and weighted forms, and the backward entry that recomputes the value, against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, absolute_terms, shifted_params

from megatron_act.kernels import api as kernels
from megatron_act.kernels.ops import _View, activation_backward_op, activation_op

SHAPES = {"rows": (19, 2 * 655), "columns": (3, 2, 2 * 1100), "one": (1, 2), "empty": (0, 6), "vector": (10,)}


def inputs(shape, dtype, *, bias, weights, seed=3):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *size, of=dtype: torch.randn(size, generator=generator).to(of).to(DEVICE)  # noqa: E731
    x, grad = make(*shape) * 2, make(*shape[:-1], shape[-1] // 2)
    return x, grad, make(shape[-1]) if bias else None, make(*shape[:-1], of=torch.float32) if weights else None


def both(name, x, grad, params, bias, weights, gated):
    """Gradients of the Triton kernels and of the float64 reference."""
    got = kernels.backward(name, grad, x, params, bias=bias, weights=weights, gated=gated, backend="triton")
    wide = lambda t: None if t is None else t.detach().double()  # noqa: E731
    exact = kernels.backward(
        name, wide(grad), wide(x), [wide(p) for p in params], bias=wide(bias), weights=wide(weights), gated=gated
    )
    return flat(got), flat(exact), parameter_scales(name, x, grad, params, bias, weights, gated)


def parameter_scales(name, x, grad, params, bias, weights, gated):
    """The sum of absolute terms of every parameter gradient: the scale of its error."""
    z = x.double() if bias is None else x.double() + bias.double()
    g = grad.double() if weights is None else grad.double() * weights.double().reshape(*x.shape[:-1], 1)
    if gated:
        z, up = z.chunk(2, -1)
        g = g * up
    return {f"dparam{j}": s for j, s in enumerate(absolute_terms(name, z, g, params, None))}


def flat(gradients):
    dx, dparams, dbias, dweights, y = gradients
    return {"dx": dx, **{f"dparam{j}": d for j, d in enumerate(dparams)}, "dbias": dbias, "dweights": dweights, "y": y}


def check(got, exact, scales):
    for label, value in got.items():
        if value is None:
            assert exact[label] is None
            continue
        size = exact[label].abs().max() if exact[label].numel() else 0.0  # sums cancel: scale of the largest
        bound = (1e-5 if value.dtype == torch.float32 else 2 * torch.finfo(value.dtype).eps) * (size + 1e-3)
        bound = 1e-6 * scales[label] + 1e-30 if label in scales else bound
        assert value.shape == exact[label].shape
        assert value.numel() == 0 or (value.double() - exact[label]).abs().max() <= bound, label


@pytest.mark.parametrize("name", kernels.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_equals_reference(name, dtype):
    for shape in SHAPES.values():
        x, grad, bias, weights = inputs(shape, dtype, bias=True, weights=True)
        check(*both(name, x, grad, shifted_params(name), bias, weights, True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_every_combination(bias, weights, gated):
    x, grad, bias, weights = inputs(SHAPES["rows"], torch.float32, bias=bias, weights=weights)
    grad = grad if gated else torch.cat([grad, grad.flip(0)], -1)
    params = shifted_params("xielu")
    got, exact, scales = both("xielu", x, grad, params, bias, weights, gated)
    check(got, exact, scales)
    leaves = [t.detach().requires_grad_() for t in (x, bias, weights) if t is not None]
    rest = iter(leaves[1:])
    again = [next(rest) if t is not None else None for t in (bias, weights)]
    y = kernels.apply("xielu", leaves[0], params, bias=again[0], weights=again[1], gated=gated, backend="triton")
    found = torch.autograd.grad(y, [leaves[0], *params, *leaves[1:]], grad)
    assert torch.equal(y, got.pop("y")), "recomputed value"
    assert all(torch.equal(a, b) for a, b in zip(found, [t for t in got.values() if t is not None], strict=True))


def test_swiglu_and_geglu_are_torchs():
    x = torch.randn(6, 130, device=DEVICE)
    gate, up = x.chunk(2, -1)
    for name, function in (("silu", F.silu), ("gelu", F.gelu), ("relu", F.relu)):
        for backend in ("reference", "triton"):
            y = kernels.apply(name, x, gated=True, backend=backend)
            torch.testing.assert_close(y, function(gate) * up, rtol=1e-6, atol=1e-6)


def test_row_strided_input_is_not_copied():
    wide = torch.randn(5, 400, device=DEVICE)
    x, grad = wide[:, 40:168], torch.randn(5, 64, device=DEVICE)
    assert _View((x, grad), True, False, 8).tensors[0].data_ptr() == x.data_ptr()
    check(*both("silu", x, grad, [], None, None, True))


def test_a_scalar_with_a_weight_stays_a_scalar():
    x, weight = torch.tensor(2.0, device=DEVICE), torch.tensor([0.5], device=DEVICE)
    for backend in ("reference", "triton"):
        y = kernels.apply("relu", x, weights=weight, backend=backend)
        assert y.shape == () and y.item() == 1.0


def test_weights_keep_their_shape():
    x, weights = torch.randn(4, 3, 8, device=DEVICE), torch.rand(4, 3, 1, device=DEVICE, requires_grad=True)
    (found,) = torch.autograd.grad(kernels.apply("relu2", x, weights=weights, backend="triton").sum(), weights)
    torch.testing.assert_close(found, F.relu(x).square().sum(-1, keepdim=True))


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck_with_everything(gated):
    x = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    bias, weights = torch.randn(40, device=DEVICE, requires_grad=True), torch.rand(5, device=DEVICE, requires_grad=True)
    torch.library.opcheck(activation_op, (x, shifted_params("xielu"), bias, weights, "xielu", gated))
    grad = torch.randn(5, 20 if gated else 40, device=DEVICE)
    params = [p.detach() for p in shifted_params("xielu")]
    arguments = (grad, x.detach(), params, bias.detach(), weights.detach(), "xielu", gated, True)
    torch.library.opcheck(activation_backward_op, arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        ({"x": torch.ones(2, 3), "gated": True}, ValueError, ["even last dimension", "(2, 3)"]),
        ({"x": torch.ones(()), "gated": True}, ValueError, ["even last dimension", "()"]),
        ({"x": torch.ones(2, 4), "weights": torch.ones(4)}, ValueError, ["weights", "(2,) or (2, 1)", "got (4,)"]),
        ({"x": torch.ones(2, 4), "weights": torch.ones(2, dtype=torch.int32)}, TypeError, ["weights", "int32"]),
    ],
)
def test_wrong_gated_argument(arguments, kind, parts):
    with pytest.raises(kind) as error:
        kernels.apply("silu", **arguments)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_wrong_gradient():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"grad: expected shape \(2, 2\), got \(2, 4\)"):
        kernels.backward("silu", x, x, gated=True)
    with pytest.raises(TypeError, match=r"grad: expected torch.float32 \(that of x\), got torch.float64"):
        kernels.backward("silu", x.double(), x)
