"""What the kernel tests share: the golden file, raw parameters off their initial values, and the accuracy measure."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from megatron_act.kernels import api as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # cpu: Triton's interpreter (conftest.py)
GOLDEN = Path(__file__).parent / "data" / "activations.json"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@functools.cache
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


def golden_x(dtype: torch.dtype) -> Tensor:
    return torch.tensor([float.fromhex(x) for x in golden()["x_hex"]], dtype=dtype)


def golden_params(case: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    return [torch.tensor([float.fromhex(p)], dtype=dtype) for p in case["params_hex"].values()]


def golden_ids(*, float32_only: bool) -> list[Any]:
    """All cases; with ``float32_only`` those whose raw parameters are exactly float32."""
    cases = golden()["cases"]
    chosen = [
        c for c in cases if not float32_only or golden_params(c, torch.float32) == golden_params(c, torch.float64)
    ]
    return [pytest.param(c, id=f"{c['activation']}-{c['setting']}") for c in chosen]


def values(strings: list[str]) -> Tensor:
    return torch.tensor([float(s) for s in strings], dtype=torch.float64)


def shifted_params(name: str, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> list[Tensor]:
    """Raw parameters that differ from the initial ones and from each other."""
    raws = [p.raw_init + 0.11 * (j + 1) for j, p in enumerate(kernels.get(name).params)]
    return [torch.tensor([raw], dtype=dtype, device=device, requires_grad=True) for raw in raws]


def relative(got: Tensor, want: Tensor, scale: Tensor) -> Tensor:
    """|got - want| / scale in float64; 0 where both agree, infinite where they do not and scale is 0."""
    error = (got.double().cpu() - want).abs()
    return torch.where(error == 0, 0.0, error / scale)


def absolute_terms(name: str, x: Tensor, g: Tensor, params: list[Tensor], bias: Tensor | None) -> list[Tensor]:
    """Sum of |terms| of every parameter gradient and of dbias, by the reference: the scale of a sum's error."""
    z = x.double() if bias is None else x.double() + bias.double()
    spec = kernels.get(name)
    raw = [p.detach().double() for p in params]
    effective = [s.constrained(r, torch.float64) for s, r in zip(spec.params, raw, strict=True)]
    dx, terms = spec.torch_bwd(z, g.double(), *effective)
    chain = [torch.sigmoid(r) if s.constrain == "softplus" else 1.0 for s, r in zip(spec.params, raw, strict=True)]
    sums = [(t * c).abs().sum().reshape(1) for t, c in zip(terms, chain, strict=True)]
    return [*sums, *([] if bias is None else [dx.abs().reshape(-1, x.shape[-1]).sum(0)])]


def _off_by(error: Any) -> Any:
    """A numpy function whose result is off by ``error(result)`` upwards or downwards, at random."""
    random = np.random.default_rng(0)

    def wrap(function: Any) -> Any:
        def approximate(*arguments: Any) -> Any:
            with np.errstate(all="ignore"):  # branches not taken
                exact = function(*arguments).astype(np.float32)
            sign = random.choice([-1.0, 1.0], np.shape(exact))
            off = np.where(np.isfinite(exact), error(np.where(np.isfinite(exact), exact, 1.0)), 0.0)
            return (exact + sign * off).astype(np.float32)

        return approximate

    return wrap


def approximate_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the interpreter the largest errors of the PTX manual: ex2 and div.full 2 ulp, rcp 1 ulp, rsqrt 2^-22.9."""
    builder = interpreter.InterpreterBuilder
    one_ulp, two_ulp = (_off_by(lambda y, n=n: n * np.spacing(np.abs(y))) for n in (1.0, 2.0))
    power, general, reciprocal = two_ulp(np.exp2), two_ulp(np.divide), one_ulp(np.divide)

    def quotient(a: Any, b: Any) -> Any:
        return (reciprocal if (a == 1.0).all() else general)(a, b)

    root = _off_by(lambda y: np.abs(y) * 2.0**-22.9)(lambda x: 1.0 / np.sqrt(x))
    monkeypatch.setattr(builder, "create_exp2", lambda self, arg: self.unary_op(arg, power))
    monkeypatch.setattr(builder, "create_rsqrt", lambda self, arg: self.unary_op(arg, root))
    monkeypatch.setattr(builder, "create_fdiv", lambda self, a, b: self.binary_op(a, b, quotient))
