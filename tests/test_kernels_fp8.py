"""FP8 results: the specification against arithmetic of its own, the kernels against the specification, bit for bit.

Triton's interpreter has casts of its own, so there the kernels round by integers. On a GPU cvt rounds and these tests
compare its bits; that it rounds to nearest and saturates is read from its PTX too (test_kernels_fp8_compile.py).
"""

import math

import pytest
import torch
from kernel_cases import DEVICE, absolute_terms, shifted_params

from megatron_act.kernels import api as kernels
from megatron_act.kernels import fp8, fp8_ops

INF = math.inf
SHAPES = {"tensor": (70, 150), "blockwise": (150, 270), "mxfp8": (160, 96)}  # tails in both directions
PARTS = ("data", "scale_inv", "columnwise", "columnwise_scale_inv", "amax")


def random(*shape, seed=0, scale=3.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def special(shape):
    """Rows of zeros, one with NaN, one with infinities, one beyond the range, one of subnormal results."""
    x = random(*shape)
    x[3], x[5, 7], x[9, 11], x[9, 12] = 0.0, math.nan, INF, -INF
    x[17], x[20] = x[17] * 1e6, x[20] * 1e-9
    return x


def equal(got, want):
    """Bits, so that NaN equals NaN and -0 differs from 0."""
    bits = lambda t: t if t.dtype == torch.uint8 else t.contiguous().view(torch.int32)  # noqa: E731
    return got.shape == want.shape and torch.equal(bits(got.cpu()), bits(want.cpu()))


def check(got, want, columnwise=True):
    for part in PARTS:
        mine, exact = getattr(got, part), getattr(want, part)
        if exact is None or (part.startswith("columnwise") and not columnwise):
            assert mine is None, part
        else:
            assert equal(mine, exact), part


# The specification.


def test_encode_is_the_nearest_e4m3_number():
    """Against a search among all of them, ties to the even code."""
    codes = torch.arange(0x7F, dtype=torch.uint8)
    numbers = fp8.decode(codes).double()
    assert numbers[:9].tolist() == [k * 2.0**-9 for k in range(9)] and numbers[-1] == 448.0
    between = (numbers[1:] + numbers[:-1]) / 2
    y = torch.cat([numbers, between, between * (1 + 1e-7), between * (1 - 1e-7), random(5000, scale=40).cpu().double()])
    y = torch.cat([y, -y]).float()
    distance = (y.double().abs()[:, None] - numbers).abs()
    best = distance.min(1, keepdim=True).values
    even = torch.where(distance == best, codes.int() % 2, 2).argmin(1)
    assert torch.equal(fp8.encode(y).int(), even.int() | torch.where(y < 0, 0x80, 0).int() | _zero_sign(y))


def _zero_sign(y):
    return torch.where((y == 0) & (torch.copysign(torch.ones_like(y), y) < 0), 0x80, 0).int()


def test_encode_saturates_and_keeps_nan():
    y = torch.tensor([448.0, 464.0, 465.0, 1e9, INF, -INF, -1e30, math.nan, -math.nan])
    assert fp8.encode(y).tolist() == [0x7E] * 5 + [0xFE] * 2 + [0x7F] * 2
    assert fp8.decode(torch.tensor([0x7F, 0xFF], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize("power_of_2", [False, True])
def test_scale_of_a_tensor(power_of_2):
    amax = torch.tensor([0.0, INF, 448.0, 1.0, 3.0, 1e-40, 1000.0])
    largest = 2.0**127 if power_of_2 else torch.finfo(torch.float32).max
    exact = [1.0, 1.0, 1.0, 448.0, 448.0 / 3.0, largest, 0.448]
    floor = [2.0 ** math.floor(math.log2(v)) for v in exact]
    assert fp8.scale_of(amax, power_of_2).tolist() == pytest.approx(floor if power_of_2 else exact, rel=1e-7)
    assert fp8.scale_of(torch.tensor([1e-3]), False, epsilon=0.5).item() == 896.0


def test_e8m0_is_the_next_power_of_two():
    amax = random(1000, scale=50).abs().cpu() + 1e-6
    found = fp8.e8m0_of(amax)
    wanted = [127 + math.ceil(math.log2(float(a) / 448.0)) for a in amax.double()]
    assert found.tolist() == wanted
    assert ((amax * fp8.e8m0_scale(found)) <= 448.0).all() and ((amax * fp8.e8m0_scale(found)) > 223.9).all()
    assert fp8.e8m0_of(torch.tensor([0.0, INF, 448.0])).tolist() == [0, 0xFE, 127]


@pytest.mark.parametrize(
    ("recipe", "shapes"),
    [
        ("tensor", [(70, 150), (1,), (150, 70), None]),
        ("blockwise", [(70, 150), (2, 72), (150, 70), (1, 152)]),
        ("mxfp8", [(96, 160), (128, 8), (96, 160), (4, 256)]),
    ],
)
def test_layouts(recipe, shapes):
    """Transformer Engine's (quantizer shapes of its tensor classes), and zeros where scales are padded."""
    rows, cols = shapes[0]
    y = random(rows, cols).cpu()
    made = fp8.quantize(y, recipe, torch.ones(1))
    empty = fp8_ops.empty(recipe, rows, cols, torch.device("cpu"))
    for found in (made, empty):
        parts = [getattr(found, part) for part in PARTS[:4]]
        assert [None if p is None else tuple(p.shape) for p in parts] == shapes
    if recipe == "mxfp8":
        assert not made.scale_inv[rows:].any() and not made.scale_inv[:, cols // 32 :].any()
        assert not made.columnwise_scale_inv[rows // 32 :].any()
    if recipe == "blockwise":
        assert not made.scale_inv[:, rows:].any() and not made.columnwise_scale_inv[:, cols:].any()


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_what_is_decoded_is_near(recipe):
    """Half a step of 2^-3 and what bf16 rounds off; for small numbers half a step of 2^-9 of the block's scale."""
    y = random(*SHAPES[recipe]).cpu()
    scale = fp8.scale_of(fp8.amax_of(y).reshape(1), False)
    made = fp8.quantize(y, recipe, scale)
    for data, inverse, axis in ((made.data, made.scale_inv, 1), (made.columnwise, made.columnwise_scale_inv, 0)):
        step = made.scale_inv if recipe == "tensor" else _inverse(recipe, inverse, y.shape, axis)
        bits = data if recipe == "mxfp8" or axis else data.T
        error = (fp8.decode(bits) * step - y).abs()
        assert (error <= y.abs() * (2.0**-4 + 2.0**-8) + step * 2.0**-10).all()
        assert error.max() > 0


def _inverse(recipe, stored, shape, axis):
    """Each element's inverse scale."""
    length = fp8.BLOCK if recipe == "blockwise" else fp8.MX_BLOCK
    if recipe == "blockwise":
        table = stored.T if axis else stored
    else:
        table = 1.0 / fp8.e8m0_scale(stored.int())
    table = table.repeat_interleave(length, axis)
    return table[: shape[0], : shape[1]]


# The kernels.


@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "tensor") for name in kernels.names()), ("xielu", "blockwise"), ("xielu", "mxfp8")]
)
def test_forward_equals_the_specification(name, recipe):
    params = [p.detach() for p in shifted_params(name)]
    scale = torch.full((1,), 7.5, device=DEVICE)
    for x in (random(*SHAPES[recipe]), special(SHAPES[recipe]), random(*SHAPES[recipe]).to(torch.bfloat16)):
        got = fp8_ops.forward(name, x, params, recipe, scale=scale, backend="triton")
        y = kernels.apply(name, x.float(), params, backend="triton")
        check(got, fp8.quantize(y, recipe, scale))


@pytest.mark.parametrize("recipe", fp8.RECIPES)
@pytest.mark.parametrize("round_bf16", [False, True])
@pytest.mark.parametrize("columnwise", [False, True])
def test_forward_with_bias_rows_and_options(recipe, round_bf16, columnwise):
    rows, cols = SHAPES[recipe]
    wide, bias, params = random(rows, cols + 40), random(cols, seed=1), [p.detach() for p in shifted_params("xielu")]
    x, scale = wide[:, 8 : 8 + cols], torch.full((1,), 3.0, device=DEVICE)
    options = {"bias": bias, "scale": scale, "columnwise": columnwise, "round_bf16": round_bf16}
    got = fp8_ops.forward("xielu", x, params, recipe, backend="triton", **options)
    y = kernels.apply("xielu", x, params, bias=bias, backend="triton")
    check(got, fp8.quantize(y, recipe, scale, round_bf16), columnwise)
    reference = fp8_ops.forward("xielu", x, params, recipe, backend="reference", **options)
    differing = (reference.data.int() - got.data.int()).abs()
    assert differing.max() <= 1 and (differing > 0).float().mean() < 1e-3  # y itself may differ by an ulp


@pytest.mark.parametrize(
    ("name", "recipe"), [("xielu", "tensor"), ("relu2", "tensor"), ("xiprelup", "tensor"), ("xielu", "blockwise"),
                         ("xielu", "mxfp8")],
)  # fmt: skip
def test_backward_equals_the_specification(name, recipe):
    x, grad, bias = random(*SHAPES[recipe]), random(*SHAPES[recipe], seed=2), random(SHAPES[recipe][1], seed=3)
    params, scale = [p.detach() for p in shifted_params(name)], torch.full((1,), 2.0, device=DEVICE)
    options = {"bias": bias, "scale": scale}
    got, dparams, dbias = fp8_ops.backward(name, grad, x, params, recipe, backend="triton", **options)
    plain = kernels.backward(name, grad, x, params, bias=bias, backend="triton")
    check(got, fp8.quantize(plain.dx, recipe, scale))
    scales = absolute_terms(name, x, grad, params, bias)
    for mine, theirs, size in zip([*dparams, dbias], [*plain.dparams, plain.dbias], scales, strict=True):
        assert ((mine - theirs).abs() <= 1e-6 * size + 1e-6 * theirs.abs()).all()
    reference = fp8_ops.backward(name, grad, x, params, recipe, backend="reference", **options)
    assert torch.allclose(reference[2], dbias, rtol=1e-4, atol=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(reference[1], dparams, strict=True))


def test_backward_reads_an_fp8_gradient():
    x, grad = random(70, 150), fp8.encode(random(70, 150, seed=4, scale=30.0))
    grad[0, :3] = torch.tensor([0x7E, 0xFE, 1], dtype=torch.uint8)
    inverse, params = torch.full((1,), 0.25, device=DEVICE), [p.detach() for p in shifted_params("xielu")]
    scale = torch.ones(1, device=DEVICE)
    got, dparams, _ = fp8_ops.backward(
        "xielu", grad, x, params, "tensor", grad_scale_inv=inverse, scale=scale, backend="triton"
    )
    plain = kernels.backward("xielu", fp8.decode(grad) * inverse, x, params, backend="triton")
    check(got, fp8.quantize(plain.dx, "tensor", scale))
    for mine, theirs in zip(dparams, plain.dparams, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_amax_keeps_the_larger(backend):
    x, params = random(70, 150), [p.detach() for p in shifted_params("xielu")]
    scale = torch.ones(1, device=DEVICE)
    for before in (0.0, 1e6):
        out = fp8_ops.empty("tensor", 70, 150, x.device)
        out.amax.fill_(before)
        fp8_ops.forward("xielu", x, params, "tensor", scale=scale, out=out, backend=backend)
        y = fp8.to_bf16(kernels.apply("xielu", x, params, backend=backend))
        assert out.amax.item() == max(before, y.abs().max().item())


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("power_of_2", [False, True])
def test_current_scale(backend, power_of_2):
    x, bias, params = random(70, 150), random(150, seed=5), [p.detach() for p in shifted_params("crrelu")]
    y = fp8.to_bf16(kernels.apply("crrelu", x, params, bias=bias, backend=backend))
    got = fp8_ops.current_scale("crrelu", x, params, bias=bias, power_of_2=power_of_2, backend=backend)
    assert got.item() == fp8.scale_of(y.abs().max(), power_of_2).item()
    made = fp8_ops.forward("crrelu", x, params, "tensor", bias=bias, scale=got, backend=backend)
    top = int((made.data & 0x7F).max())
    assert top == 0x7E if not power_of_2 else 0x76 <= top <= 0x7E  # 448, or above 224


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"recipe": "nvfp4"}, ["nvfp4", "not built", "mxfp8"]),
        ({"recipe": "fp8"}, ["tensor, blockwise, mxfp8", "'fp8'"]),
        ({"recipe": "tensor"}, ["scale", "None"]),
        ({"recipe": "mxfp8", "x": torch.ones(33, 64)}, ["divisible by 32", "[33, 64]"]),
        ({"recipe": "mxfp8", "backend": "cuda"}, ["auto, triton, reference", "'cuda'"]),
        ({"params": [torch.ones(1)]}, ["expected 2 parameters"]),
    ],
)
def test_refusals(change, parts):
    right = {"x": torch.ones(64, 64), "params": [torch.ones(1)] * 2, "recipe": "blockwise", **change}
    x, params, recipe = (right.pop(key) for key in ("x", "params", "recipe"))
    with pytest.raises(ValueError) as error:
        fp8_ops.forward("xielu", x, params, recipe, **right)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)
