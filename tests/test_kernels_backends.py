"""backend="triton" against the float64 reference: every activation, dtypes, shapes that break each mask, strides, bias.

On a machine without a GPU the kernels run in Triton's interpreter, which truncates to bf16 (a GPU rounds): 1 ulp.
"""

import pytest
import torch
from kernel_cases import DEVICE, absolute_terms, needs_gpu, shifted_params

from megatron_act.kernels import api as kernels
from megatron_act.kernels import ops
from megatron_act.kernels.ops import _View

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
LAYOUTS = {  # name: (shape made, view taken of it, bias?)
    "odd": ((7, 33), lambda x: x, False),
    "scalar": ((), lambda x: x, False),
    "one": ((1,), lambda x: x, False),
    "one_bias": ((1, 1), lambda x: x, True),
    "empty": ((0, 5), lambda x: x, True),
    "blocks": ((5, 1024), lambda x: x, False),
    "blocks_tail": ((3, 2, 5501), lambda x: x, False),  # more than one program of 16 blocks, the last one broken
    "bias_tails": ((19, 1311), lambda x: x, True),  # 19 rows: 16 + 3, 1311 columns: 1024 + 287
    "rows": ((19, 1400), lambda x: x[:, :1311], False),
    "rows_bias": ((2, 3, 128), lambda x: x[:, :, 20:60], True),
    "transposed": ((37, 41), lambda x: x.t(), True),
    "expanded": ((1, 40), lambda x: x.expand(6, 40), False),
    "holes": ((6, 80), lambda x: x[:, ::2], False),
    "permuted": ((3, 5, 7), lambda x: x.permute(1, 0, 2), True),
}


def inputs(layout, dtype, seed=0):
    shape, view, has_bias = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    x = view((torch.randn(shape, generator=generator) * 3.0).to(dtype).to(DEVICE))
    g = torch.randn(x.shape, generator=generator).to(dtype).to(DEVICE)
    bias = torch.randn(x.shape[-1:], generator=generator).to(dtype).to(DEVICE) if has_bias else None
    return x, g, bias


def run(name, x, g, params, bias, backend):
    """[y, dx, dparams..., dbias?]"""
    x = x.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    y = kernels.apply(name, x, params, bias=bias, backend=backend)
    return [y, *torch.autograd.grad(y, [x, *params, *([] if bias is None else [bias])], g)]


def compare(name, layout, dtype):
    x, g, bias = inputs(layout, dtype)
    params = shifted_params(name)
    results = run(name, x, g, params, bias, "triton")
    wide = [p.detach().double().requires_grad_() for p in params]
    exact = run(name, x.double(), g.double(), wide, None if bias is None else bias.double(), "reference")
    assert [r.dtype for r in results] == [dtype] * 2 + [torch.float32] * len(params) + [dtype] * (bias is not None)
    assert results[0].shape == results[1].shape == x.shape
    z = (x.double() if bias is None else x.double() + bias.double()).abs() + 1.0  # rounding of x + bias, of f' near 0
    for got, want, scale in zip(results[:2], exact[:2], (z, g.double().abs() * z), strict=True):
        error, ulp = (got.double() - want).abs(), ULP[dtype] * want.abs() + (6e-8 if dtype is torch.float16 else 0.0)
        assert (error <= 1e-6 * (want.abs() + 0.1 * scale) + ulp).all()
    scales = absolute_terms(name, x, g, params, bias)
    for got, want, scale in zip(results[2:], exact[2:], scales, strict=True):
        rounding = ULP[got.dtype] * want.abs()
        assert ((got.double() - want).abs() <= 1e-6 * scale + rounding).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", kernels.names())
def test_triton_equals_reference_fp32(name, layout):
    compare(name, layout, torch.float32)


@pytest.mark.parametrize("layout", ["odd", "one", "empty", "blocks_tail", "bias_tails", "rows_bias"])
@pytest.mark.parametrize("name", kernels.names())
def test_triton_equals_reference_bf16(name, layout):
    compare(name, layout, torch.bfloat16)


@pytest.mark.parametrize("name", kernels.names())
def test_triton_equals_reference_fp16(name):
    compare(name, "rows_bias", torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_rounds_once(dtype):
    """The reference of a 16-bit x is the float64 value rounded to that type, but for rare double roundings."""
    x, g, bias = inputs("bias_tails", dtype)
    for name in kernels.names():
        params = shifted_params(name)
        low = run(name, x, g, params, bias, "reference")[0]
        exact = run(name, x.double(), g.double(), params, bias.double(), "reference")[0]
        assert low.dtype == dtype
        assert (
            (low - exact).abs() <= 1e-6 * (x.double().abs() + exact.abs() + 1.0) + 0.51 * ULP[dtype] * exact.abs()
        ).all()


@pytest.mark.parametrize("param_dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameter_dtype_is_independent(param_dtype):
    x, g, _ = inputs("odd", torch.float32)
    params = [torch.tensor([raw], dtype=param_dtype, device=DEVICE, requires_grad=True) for raw in (0.25, -0.75)]
    wide = [p.detach().double().requires_grad_() for p in params]
    y, dx, *dparams = run("xielu", x, g, params, None, "triton")
    y64, dx64, *dparams64 = run("xielu", x.double(), g.double(), wide, None, "reference")
    assert y.dtype == dx.dtype == torch.float32
    torch.testing.assert_close(y.double(), y64, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx.double(), dx64, rtol=1e-6, atol=1e-6)
    for got, want in zip(dparams, dparams64, strict=True):
        assert got.dtype == param_dtype
        torch.testing.assert_close(got, want.to(param_dtype), rtol=max(1e-6, 2 * torch.finfo(param_dtype).eps), atol=0)


@pytest.mark.parametrize("layout", ["blocks_tail", "bias_tails"])
def test_same_bits_twice(layout):
    for name in ("xielu", "xgelu"):
        x, g, bias = inputs(layout, torch.float32)
        first = run(name, x, g, shifted_params(name), bias, "triton")
        second = run(name, x, g, shifted_params(name), bias, "triton")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_saved_is_written():
    x, g, bias = inputs("bias_tails", torch.float32)
    kept = [t.clone() for t in (x, g, bias)]
    run("xielu", x, g, shifted_params("xielu"), bias, "triton")
    assert all(torch.equal(a, b) for a, b in zip((x, g, bias), kept, strict=True))


@pytest.mark.parametrize("layout", ["rows", "rows_bias", "transposed", "holes"])
def test_row_strided_tensors_are_not_copied(layout):
    x, _, _ = inputs(layout, torch.float32)
    view = _View((x,), False, True, 8)
    in_place = layout.startswith("rows")  # the others have no contiguous rows
    assert (view.tensors[0].data_ptr() == x.data_ptr()) == in_place
    assert view.strides == [x.stride(-2) if in_place else x.shape[-1]]


@pytest.mark.parametrize(
    ("shape", "whole_rows", "rows_each", "programs"),
    [
        ((4096, 21504), False, 16, 5376),
        ((64, 21504), False, 1, 1344),  # generation: as many programs as there are blocks
        ((1, 21504), False, 1, 21),
        ((4096, 1024), False, 2, 2048),
        ((4096, 21504), True, 16, 5376),
    ],
)
def test_programs_fill_a_gpu(shape, whole_rows, rows_each, programs):
    view = _View((torch.empty(shape, device="meta"),), False, whole_rows, 16)
    assert (view.rows_each, view.grid) == (rows_each, (programs,))


def test_a_gradient_without_rows_of_its_own_is_flat_too():
    """``y.sum().backward()`` of one long row: its expanded gradient is copied, then both are cut into blocks.

    In one dimension of the grid: the second one ends at 65535.
    """
    n = 70_000 * 1024
    view = _View((torch.empty(n, device="meta"), torch.empty((), device="meta").expand(n)), False, False, 16)
    assert view.strides == [1024, 1024] and view.grid == (4375,) and view.cols == 1024


@pytest.mark.parametrize("layout", ["blocks_tail", "bias_tails", "rows", "rows_bias", "permuted"])
def test_programs_of_many_rows(layout, monkeypatch):
    """As a large tensor gets them: 16 rows, of which the last program has fewer."""
    monkeypatch.setattr(ops, "PROGRAMS", 1)
    for name in ("xielu", "xatlu"):
        compare(name, layout, torch.float32)


def test_offsets_beyond_2_31():
    """Two rows 2^31 + 3 elements apart, in memory that is never touched between them."""
    far, columns = 2**31 + 3, 40
    store = torch.empty(far + columns, dtype=torch.bfloat16, device=DEVICE)
    x = store.as_strided((2, columns), (far, 1))
    small = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(DEVICE)[:, :columns]
    x.copy_(small)
    ones, params = torch.ones(2, columns, dtype=x.dtype, device=DEVICE), shifted_params("xielu")
    results = [run("xielu", each, ones, params, None, "triton") for each in (x, small)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_more_than_2_31_elements():
    n = 2**31 + 1000
    x = torch.full((n,), -1.0, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2.0
    params = shifted_params("xielu")
    y, dx, dp, dn = run("xielu", x, x.new_ones(()).expand(n), params, None, "triton")
    small = torch.tensor([-1.0, 2.0], dtype=torch.bfloat16, device="cuda")
    y2, dx2, *_ = run("xielu", small, torch.ones_like(small), params, None, "triton")
    assert y[0] == y2[0] and y[2**31] == y2[0] and y[-1] == y2[1] and dx[-1] == dx2[1] and dx[2**31 + 5] == dx2[0]
    want = [4.0 * torch.sigmoid(params[0]), (n - 1) * torch.sigmoid(params[1].double()) / torch.e]
    torch.testing.assert_close(torch.cat([dp, dn]).double(), torch.cat([want[0].double(), want[1]]), rtol=1e-6, atol=0)
