"""The specification of the FP8 results against arithmetic of its own: numbers, scales, layouts."""

import math

import pytest
import torch
from kernel_fp8_cases import FP8, PARTS, SHAPES, random

from megatron_act.kernels import fp8, fp8_ops

INF = math.inf
FORMATS = tuple(fp8.FORMATS)
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("format", FORMATS)
def test_decode_is_that_of_torch(format):
    """All 256 codes, infinities and NaN among them."""
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(
        fp8.decode(codes, format), codes.view(TORCH[format]).float(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("format", FORMATS)
def test_encode_is_the_nearest_number(format):
    """Against a search among all of them, ties to the even code."""
    kind = fp8.FORMATS[format]
    codes = torch.arange(kind.top + 1, dtype=torch.uint8)
    numbers = fp8.decode(codes, format).double()
    smallest = 2.0 ** (1 - kind.bias - kind.mantissa)
    assert numbers[:5].tolist() == [k * smallest for k in range(5)] and numbers[-1] == kind.max
    between = (numbers[1:] + numbers[:-1]) / 2
    more = random(5000, scale=40).cpu().double()
    y = torch.cat([numbers, between, between * (1 + 1e-7), between * (1 - 1e-7), more, more * smallest])
    y = torch.cat([y, -y]).float()
    distance = (y.double().abs()[:, None] - numbers).abs()
    best = distance.min(1, keepdim=True).values
    even = torch.where(distance == best, codes.int() % 2, 2).argmin(1)
    assert torch.equal(fp8.encode(y, format).int(), even.int() | torch.where(y.signbit(), 0x80, 0).int())


@pytest.mark.parametrize("format", FORMATS)
def test_encode_saturates_and_keeps_nan(format):
    kind = fp8.FORMATS[format]
    y = torch.tensor([kind.max, kind.max * 1.04, kind.max * 1.2, 1e9, INF, -INF, -1e30, math.nan, -math.nan])
    assert fp8.encode(y, format).tolist() == [kind.top] * 5 + [kind.top | 0x80] * 2 + [0x7F] * 2


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("power_of_2", [False, True])
def test_scale_of_a_tensor(power_of_2, format):
    top = fp8.FORMATS[format].max
    amax = torch.tensor([0.0, INF, top, 1.0, 3.0, 1e-40, 1000.0])
    largest = 2.0**127 if power_of_2 else torch.finfo(torch.float32).max
    exact = [1.0, 1.0, 1.0, top, top / 3.0, largest, top / 1000.0]
    floor = [2.0 ** math.floor(math.log2(v)) for v in exact]
    found = fp8.scale_of(amax, power_of_2, format=format)
    assert found.tolist() == pytest.approx(floor if power_of_2 else exact, rel=1e-7)
    assert fp8.scale_of(torch.tensor([1e-3]), False, 0.5, format).item() == top * 2


@pytest.mark.parametrize("format", FORMATS)
def test_e8m0_is_the_next_power_of_two(format):
    top = fp8.FORMATS[format].max
    amax = random(1000, scale=50).abs().cpu() + 1e-6
    found = fp8.e8m0_of(amax, format)
    assert found.tolist() == [127 + math.ceil(math.log2(float(a) / top)) for a in amax.double()]
    scaled = amax * fp8.e8m0_scale(found)
    assert (scaled <= top).all() and (scaled > 0.4999 * top).all()
    assert fp8.e8m0_of(torch.tensor([0.0, INF, top, 1e-40]), format).tolist() == [0, 0xFE, 127, 0]


def test_e8m0_values_are_exact():
    """Every code: 2^(code - 127), and the inverse by which values are multiplied; 0xFF is NaN."""
    codes = torch.arange(255)
    powers = torch.tensor([2.0 ** (k - 127) for k in range(255)], dtype=torch.float64)
    assert torch.equal(fp8.e8m0_value(codes).double(), powers)
    assert torch.equal(fp8.e8m0_scale(codes).double(), 1.0 / powers)
    assert fp8.e8m0_value(torch.tensor([0xFF])).isnan().all()


@pytest.mark.parametrize(
    ("recipe", "shapes"),
    [
        ("plain", [(70, 150), None, None, None]),
        ("tensor", [(70, 150), (1,), (150, 70), None]),
        ("blockwise", [(70, 150), (2, 72), (150, 70), (1, 152)]),
        ("mxfp8", [(96, 160), (128, 8), (96, 160), (4, 256)]),
    ],
)
def test_layouts(recipe, shapes):
    """Transformer Engine's (quantizer shapes of its tensor classes), and zeros where scales are padded."""
    rows, cols = shapes[0]
    empty = fp8_ops.empty(recipe, rows, cols, "cpu")
    assert [None if p is None else tuple(p.shape) for p in (getattr(empty, part) for part in PARTS[:4])] == shapes
    if recipe == "plain":
        return
    made = fp8.quantize(random(rows, cols).cpu(), recipe, torch.ones(1))
    assert [None if p is None else tuple(p.shape) for p in (getattr(made, part) for part in PARTS[:4])] == shapes
    if recipe == "mxfp8":
        assert not made.scale_inv[rows:].any() and not made.scale_inv[:, cols // 32 :].any()
        assert not made.columnwise_scale_inv[rows // 32 :].any() and not made.columnwise_scale_inv[:, cols:].any()
    if recipe == "blockwise":
        assert not made.scale_inv[:, rows:].any() and not made.columnwise_scale_inv[:, cols:].any()


def test_swizzled_scales_lie_where_cublas_reads_them():
    """By its formula, element by element: byte (r % 32) 16 + (r // 32) 4 + c of a 128 x 4 tile, tiles row-major."""
    rows, cols = 256, 12
    scales = torch.randint(0, 256, (rows, cols), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    flat = fp8.swizzle(scales).flatten()
    for r in range(rows):
        for c in range(cols):
            tile = (r // 128) * (cols // 4) + c // 4
            assert flat[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] == scales[r, c]
    assert torch.equal(fp8.unswizzle(fp8.swizzle(scales)), scales)


def test_swizzled_column_scales_are_those_of_the_transposed_matrix():
    y = random(160, 96).cpu()
    plain, swizzled, turned = (
        fp8.quantize(m, "mxfp8", swizzled=s) for m, s in ((y, False), (y, True), (y.T.contiguous(), True))
    )
    assert swizzled.columnwise_scale_inv.shape == plain.columnwise_scale_inv.shape
    assert torch.equal(swizzled.columnwise_scale_inv.flatten(), turned.scale_inv.flatten())
    assert torch.equal(swizzled.data, plain.data) and torch.equal(swizzled.columnwise, plain.columnwise)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("recipe", FP8)
def test_what_is_decoded_is_near(recipe, format):
    """Half a step of the format and what bf16 rounds off; for small numbers half a step of the block's smallest."""
    kind = fp8.FORMATS[format]
    y = random(*SHAPES[recipe]).cpu()
    scale = fp8.scale_of(fp8.amax_of(y), False, format=format)
    made = fp8.quantize(y, recipe, scale, format=format)
    turned = fp8.quantize(y.T.contiguous(), recipe, scale, format=format)
    for q, exact in ((made, y), (turned, y.T)):
        ones = fp8.Quantized(
            torch.full_like(q.data, (kind.bias << kind.mantissa)), q.scale_inv, recipe=recipe, format=format
        )
        step = ones.values() * 2.0 ** (1 - kind.bias - kind.mantissa)
        error = (q.values() - exact).abs()
        assert (error <= exact.abs() * (2.0 ** -(kind.mantissa + 1) + 2.0**-8) + step / 2).all()
        assert error.max() > 0
    if recipe != "mxfp8":  # the column-wise half is the row-wise one of the transposed matrix
        assert torch.equal(made.columnwise, turned.data)
    else:
        assert torch.equal(made.columnwise, turned.data.T)


def test_swizzled_values_are_the_same():
    y = random(160, 96).cpu()
    assert torch.equal(fp8.quantize(y, "mxfp8").values(), fp8.quantize(y, "mxfp8", swizzled=True).values())


def test_kept_is_near_and_small():
    """Any width: the last block is short. Nothing is rounded to bf16 first."""
    z = random(70, 150).cpu()
    kept = fp8.keep(z)
    assert kept.data.shape == (70, 150) and kept.scales.shape == (70, 5)
    blocks = torch.nn.functional.pad(z, (0, 10)).unflatten(1, (5, 32)).abs().amax(2)
    smallest = (blocks / 448.0 * 2.0).repeat_interleave(32, 1)[:, :150] * 2.0**-9
    error = (kept.values() - z).abs()
    assert (error <= z.abs() * 2.0**-4 + smallest / 2).all() and error.max() > 0
    wide = fp8_ops.empty_kept(128, 4096, "cpu")
    assert (wide.data.nbytes + wide.scales.nbytes) / wide.data.numel() == 1.03125
    twice = torch.full((1, 32), 1.0 + 2.0**-4 + 2.0**-12)  # bf16 would round it to the tie 1 + 2^-4, and that to 1
    twice[0, 0] = 448.0
    assert fp8.keep(twice).values()[0, 1] == 1.125
