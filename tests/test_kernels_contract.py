"""The contract of kernels.api: parameters, derivatives, limits, operators, and what a wrong argument is told."""

import math
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import DEVICE, shifted_params

from megatron_act.kernels import api as kernels
from megatron_act.kernels.ops import activation_op

EXPECTED_PARAMS = {
    "xielu": ("alpha_p", "alpha_n"), "xiprelu": ("alpha_p", "alpha_n"), "xiprelup": ("alpha_p", "alpha_n", "power"),
    "crrelu": ("eps",), "xsilu": ("alpha",), "xgelu": ("alpha",), "xatlu": ("alpha",),
    "relu2": (), "gelu": (), "gelu_tanh": (), "silu": (), "relu": (),
}  # fmt: skip
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf


def test_names_and_parameters():
    """The published ones: their names, order and shapes are in checkpoints. More may come."""
    found = {n: tuple(p.name for p in kernels.get(n).params) for n in kernels.names()}
    assert {n: found[n] for n in EXPECTED_PARAMS} == EXPECTED_PARAMS
    assert all(kernels.get(n).name == n for n in kernels.names())


@pytest.mark.parametrize(
    ("name", "index", "init", "raw"),
    [
        ("xielu", 0, 0.8, 0.203382320811024558), ("xielu", 1, 0.8, -1.050225612814846610),
        ("xiprelup", 1, 0.8, 0.203382320811024558), ("xiprelup", 2, 2.0, 0.541324854612918127),
        ("crrelu", 0, 0.01, 0.01), ("xgelu", 0, 0.0, 0.0),
    ],
)  # fmt: skip
def test_initial_values(name, index, init, raw):
    param = kernels.get(name).params[index]
    assert param.init == init
    assert param.raw_init == pytest.approx(raw, rel=1e-14, abs=0)


def test_raw_and_effective_are_inverse():
    for param in (p for n in kernels.names() for p in kernels.get(n).params):
        for raw in (-30.0, -1.0, 0.0, 0.5, 3.0, 60.0):
            effective = param.effective(raw)
            assert param.constrained(torch.tensor([raw]), torch.float64).item() == pytest.approx(effective, rel=1e-15)
            if raw > -5:  # below, offset + e^raw has lost raw's digits
                assert param.raw(effective) == pytest.approx(raw, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(("index", "value", "bound"), [(1, 0.5, "> 0.5"), (0, 0.0, "> 0"), (0, INF, "finite")])
def test_value_outside_the_range(index, value, bound):
    with pytest.raises(ValueError, match=bound) as error:
        kernels.get("xielu").params[index].raw(value)
    assert kernels.get("xielu").params[index].name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", kernels.names())
def test_reference_gradients_are_derivatives(name):
    x = torch.tensor([-30.0, -7.5, -2.0, -0.9, -0.3, -1e-2, 1e-2, 0.2, 0.8, 3.0, 9.0], dtype=torch.float64)
    params = shifted_params(name, torch.float64, "cpu")
    function = lambda x, *p: kernels.apply(name, x, p)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *params), eps=1e-6, atol=1e-7)
    assert torch.autograd.gradgradcheck(function, (x, *params), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", kernels.names())
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_infinite_nan_and_huge_inputs(name, backend):
    params = [p.detach() for p in shifted_params(name)]
    x = torch.tensor([-INF, INF, math.nan, 0.0], device=DEVICE)
    low, high, nan, zero = kernels.apply(name, x, params, backend=backend).tolist()
    far = kernels.apply(name, torch.tensor([-1e30, 1e30], dtype=torch.float64), [p.double().cpu() for p in params])
    limits = [math.copysign(INF, y) if abs(y) > 1e20 else y for y in far.tolist()]
    assert ([low, high], zero) == (limits, 0.0)
    assert math.isnan(nan)
    huge = torch.tensor([1.0, 1e-45, 1e-38, 1e-30, 50.0, 1e4, 1e19, 1e30, 3e38], device=DEVICE)
    huge = torch.cat([huge, -huge]).requires_grad_()
    y = kernels.apply(name, huge, [p.requires_grad_() for p in params], backend=backend)
    assert not y.isnan().any()
    for g in (torch.ones_like(y), torch.zeros_like(y)):
        gradients = torch.autograd.grad(y, [huge, *params], g, retain_graph=True)
        assert not any(v.isnan().any() for v in gradients)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("name", "low"), [("xsilu", 0.0), ("xgelu", 0.0), ("xatlu", -1 / math.pi)])
def test_unexpanded_gates_at_infinity(name, low, backend):
    x = torch.tensor([-INF, INF], device=DEVICE)
    y = kernels.apply(name, x, [torch.zeros(1, device=DEVICE)], backend=backend)
    assert y.tolist() == [pytest.approx(low, rel=1e-6), INF]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_slope_at_zero_is_that_of_the_negative_branch(backend):
    wanted = {"xielu": 0.5, "xiprelu": 0.5, "xiprelup": 0.5, "crrelu": 0.12, "relu2": 0.0, "relu": 0.0, "gelu": 0.5}
    for name, slope in wanted.items():
        x = torch.zeros(1, device=DEVICE, requires_grad=True)
        (dx,) = torch.autograd.grad(kernels.apply(name, x, shifted_params(name), backend=backend), x)
        assert dx.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", ["xielu", "crrelu", "relu2", "xiprelup"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(name, with_bias):
    x = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    bias = torch.randn(40, device=DEVICE, requires_grad=True) if with_bias else None
    torch.library.opcheck(activation_op, (x, shifted_params(name), bias, None, name, False))


def tensors(**changes):
    """Arguments of a right call of xielu, with some replaced."""
    right = {"name": "xielu", "x": torch.ones(2, 3), "params": [torch.ones(1), torch.ones(1)], "bias": None}
    arguments = {**right, "backend": "auto", **changes}
    name, x, params = (arguments.pop(k) for k in ("name", "x", "params"))
    return kernels.apply(name, x, params, **arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "parts"),
    [
        ({"name": "xeilu"}, ValueError, ["'xeilu'", "did you mean 'xielu'", "crrelu"]),
        ({"name": "ReLU2"}, ValueError, ["did you mean 'relu2'"]),
        ({"params": []}, ValueError, ["expected 2 parameters (alpha_p, alpha_n)", "got 0", "shape (1,)"]),
        ({"params": torch.ones(2)}, ValueError, ["expected 2 parameters", "got one tensor"]),
        ({"name": "relu2"}, ValueError, ["expected 0 parameters (none)", "got 2"]),
        ({"params": [torch.ones(1), torch.ones(2)]}, ValueError, ["alpha_n", "(1,)", "got (2,)"]),
        ({"params": [torch.ones(()), torch.ones(1)]}, ValueError, ["alpha_p", "(1,)", "got ()"]),
        ({"params": [0.8, torch.ones(1)]}, TypeError, ["alpha_p", "expected a tensor", "float"]),
        ({"params": [torch.ones(1, dtype=torch.int64), torch.ones(1)]}, TypeError, ["alpha_p", "int64", "cast"]),
        ({"x": torch.ones(2, dtype=torch.int32)}, TypeError, ["x", "int32", "cast"]),
        ({"x": torch.ones(2, dtype=torch.complex64)}, TypeError, ["x", "complex64", "cast"]),
        ({"x": torch.ones(2, dtype=torch.bool)}, TypeError, ["x", "bool"]),
        ({"x": torch.ones(2).to(torch.float8_e4m3fn)}, TypeError, ["x", "float8_e4m3fn"]),
        ({"x": [1.0]}, TypeError, ["x", "expected a tensor", "list"]),
        ({"params": [torch.ones(1, device="meta"), torch.ones(1)]}, ValueError, ["alpha_p", "device cpu", "got meta"]),
        ({"bias": torch.ones(2)}, ValueError, ["bias", "(3,)", "got (2,)"]),
        ({"bias": torch.ones(2, 3)}, ValueError, ["bias", "(3,)", "got (2, 3)"]),
        ({"bias": torch.ones(3, dtype=torch.int8)}, TypeError, ["bias", "int8"]),
        ({"backend": "cuda"}, ValueError, ["auto, triton, reference", "'cuda'"]),
        ({"x": torch.ones(2, 3, dtype=torch.float64), "backend": "triton"}, TypeError, ["float64", "'reference'"]),
    ],
)  # fmt: skip
def test_wrong_argument(changes, kind, parts):
    with pytest.raises(kind) as error:
        tensors(**changes)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


def test_triton_on_cpu_needs_the_interpreter():
    program = (
        "import torch; from megatron_act.kernels import api\n"
        "try: api.apply('relu', torch.ones(2), backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "expects a CUDA tensor, got device cpu" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout


def test_auto_takes_the_reference_on_cpu():
    x = torch.randn(100)
    raw = [torch.tensor([p.raw_init]) for p in kernels.get("xielu").params]
    assert torch.equal(kernels.apply("xielu", x, raw), kernels.apply("xielu", x, raw, backend="reference"))
