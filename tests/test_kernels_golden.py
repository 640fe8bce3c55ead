"""Every activation against 60-digit values: the torch reference in float64 and float32, the kernels' functions."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, approximate_instructions, golden_ids, golden_params, golden_x, relative, values

from megatron_act.kernels import api as kernels
from megatron_act.kernels.template import load_params

ISSUE_BOUND = 1e-6  # of |v| + 0.1 |x|
POWER_BOUND = 5e-6  # xiprelup beyond |x| = 100


@triton.jit
def elementwise_kernel(
    X, Y, DX, DP, P, n, FWD: tl.constexpr, BWD: tl.constexpr, SOFT: tl.constexpr
):  # fmt: skip
    """The activation's own functions, one row of DP per parameter, without the template's sums."""
    i = tl.arange(0, 64)
    x = tl.load(X + i, mask=i < n, other=0.0)
    p = load_params(P, SOFT)
    dx, dp = BWD(x, x * 0.0 + 1.0, p)
    tl.store(Y + i, FWD(x, p), mask=i < n)
    tl.store(DX + i, dx, mask=i < n)
    for j in tl.static_range(len(P)):
        tl.store(DP + j * n + i, dp[j], mask=i < n)


def reference_values(case, dtype):
    """[y, dy/dx, dy/draw...] of the reference, elementwise: one row per x, so that a row's gradient is its own."""
    params, activation = golden_params(case, dtype), kernels.get(case["activation"])
    x = golden_x(dtype).requires_grad_()
    raw = [p.expand(len(x)).clone().requires_grad_() for p in params]
    rows = [activation.reference(x[i : i + 1], *(r[i : i + 1] for r in raw)) for i in range(len(x))]
    y = torch.cat(rows)
    return [y.detach(), *torch.autograd.grad(y.sum(), [x, *raw])]


def triton_values(case):
    """The same from the Triton functions; the constraint's derivative in float64 as in ops.py."""
    activation = kernels.get(case["activation"])
    x = golden_x(torch.float32).to(DEVICE)
    params = tuple(p.to(DEVICE) for p in golden_params(case, torch.float32))
    y, dx, dp = torch.empty_like(x), torch.empty_like(x), x.new_empty(max(1, len(params)), len(x))
    elementwise_kernel[(1,)](
        x, y, dx, dp, params, len(x), FWD=activation.fwd, BWD=activation.bwd,
        SOFT=tuple(p.constrain == "softplus" for p in activation.params),
    )  # fmt: skip
    soft = [p.constrain == "softplus" for p in activation.params]
    chain = [torch.sigmoid(p.double()) if s else 1.0 for p, s in zip(params, soft, strict=True)]
    return [y, dx, *(row.double() * c for row, c in zip(dp, chain, strict=False))]


def wanted(case):
    return [values(case["y"]), values(case["dy_dx"]), *(values(v) for v in case["dy_dparam"].values())]


@pytest.mark.parametrize("case", golden_ids(float32_only=False))
def test_reference_float64(case):
    x = golden_x(torch.float64).abs()
    for got, want in zip(reference_values(case, torch.float64), wanted(case), strict=True):
        error = relative(got, want, want.abs() + 1e-2 * x)  # 1e-2 |x|: the functions have zeros
        assert error.max() <= 2e-14
        tails = (x >= 5) & (want != 0) & (want.abs() > 1e-300)
        assert relative(got, want, want.abs())[tails].max() <= 2e-12, "a tail cancels"


@pytest.mark.parametrize("case", golden_ids(float32_only=True))
def test_reference_float32(case):
    check_float32(case, reference_values(case, torch.float32), {"dx": 2})


@pytest.mark.parametrize("case", golden_ids(float32_only=True))
def test_triton_float32(case):
    check_float32(case, triton_values(case), {"dx": 1})


@pytest.mark.parametrize("case", golden_ids(float32_only=True))
def test_triton_float32_with_approximate_instructions(case, monkeypatch):
    """1.1: every instruction is off by the most that is documented, at once."""
    approximate_instructions(monkeypatch)
    check_float32(case, triton_values(case), {"y": 2, "dx": 2}, share=1.1)


def check_float32(case, results, power_ulps, share=1.0):
    """power_ulps: allowed error of the power where xiprelup's is near 1/2 and cancels against beta.

    No fp32 formula has less than one in the slope: it is half an ulp of the power, and of its exponent.
    """
    x = golden_x(torch.float64).abs()
    terms = {"y": x, "dx": torch.ones_like(x)}  # what the power near 1/2 is multiplied by, but for 1/2
    for label, got, want in zip(["y", "dx", *case["dy_dparam"]], results, wanted(case), strict=True):
        allowed = ISSUE_BOUND * (want.abs() + 0.1 * x)
        if case["activation"] == "xiprelup":
            allowed[x > 100] *= POWER_BOUND / ISSUE_BOUND
            allowed += power_ulps.get(label, 0) * 2.0**-24 * terms.get(label, 0.0)
        excess = (got.double().cpu() - want).abs() / allowed.clamp(min=1e-300)
        assert (excess <= share).all(), f"{label}: {excess.max():.2f} of the bound at x = {x[excess.argmax()]:g}"
