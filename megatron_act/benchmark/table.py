"""The run: for each case one set of inputs, the function by us and by everybody else, a row for each operation."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from megatron_act.benchmark.baselines import Function, compiled, eager
from megatron_act.benchmark.cases import Case
from megatron_act.benchmark.timing import Buffer, Sampler, Timing, Work, buffers_needed, measure, sampler
from megatron_act.kernels import api as kernels

OURS, EAGER, COMPILED, PLAIN = "ours", "torch eager", "torch.compile", "torch.relu"
TOLERANCE = 3e-2  # of values: two roundings to bf16, and approximations that a library calls good enough
SEED = 1234
Libraries = dict[str, dict[str, Function]]  # function by library and activation
Row = dict[str, Any]


@dataclass
class Table:
    """The rows of a run, and what a reader must know about cells that are empty."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # cases that were not reached in time
    failed: list[str] = field(default_factory=list)  # cases of ours that raised, and how


@dataclass(frozen=True)
class Inputs:
    """What a case's functions are given."""

    buffers: list[Buffer]
    raw: list[Tensor]


def run(
    cases: list[Case], libraries: Libraries, device: str, gb_per_s: float,
    progress: Callable[[list[Case]], Iterable[Case]] = iter, deadline: float = float("inf"),
) -> Table:  # fmt: skip
    """Times every case; from ``deadline`` (``time.monotonic``) on it starts no further one."""
    table = Table()
    # The graph of a backward pass is kept for the next launch, which donated buffers would forbid.
    with functorch_config.patch(donated_buffer=False):
        for case in progress(cases):
            if time.monotonic() > deadline:
                table.left_out.append(case.name)
                continue
            table.rows += _case_rows(case, libraries, device, gb_per_s, table.notes)
    return table


def make_inputs(case: Case, device: str) -> Inputs:
    """Standard normal x and incoming gradient; raw parameters at their initial values."""
    generator = torch.Generator(device).manual_seed(SEED)
    width = case.cols * (2 if case.gated else 1)
    like: dict[str, Any] = {"device": device, "dtype": case.dtype, "generator": generator}
    rows, count = case.shape.rows, buffers_needed(case.shape.rows * width * case.dtype.itemsize, device)
    buffers = [
        (torch.randn(rows, width, requires_grad=True, **like), torch.randn(rows, case.cols, **like))
        for _ in range(count)
    ]
    params = kernels.get(case.base).params
    return Inputs(buffers, [torch.tensor([p.raw_init], device=device, requires_grad=True) for p in params])


def functions(case: Case, libraries: Libraries, inputs: Inputs) -> dict[str, Function]:
    """Ours first, then torch's, then those of the libraries that have this activation."""
    plain = eager(case.base, case.gated, inputs.buffers[0][0], inputs.raw)
    found: dict[str, Function] = {
        OURS: lambda x, *raw: kernels.apply(case.base, x, raw, gated=case.gated),
        EAGER: plain,
        COMPILED: compiled(plain),
    }
    return found | {name: had[case.activation] for name, had in libraries.items() if case.activation in had}


def work(op: str, function: Function, raw: list[Tensor]) -> Work:
    """``op`` by a differentiable function; ``backward+value`` computes forward again, as recomputing does."""
    if op == "forward":
        return Work(lambda x, grad: x, torch.no_grad()(lambda x: function(x, *raw)))
    if op == "backward":
        return Work(
            lambda x, grad: (function(x, *raw), x, grad),
            lambda state: torch.autograd.grad(state[0], [state[1], *raw], state[2], retain_graph=True),
        )

    def again(state: Buffer) -> Any:
        y = function(state[0], *raw)
        return y, torch.autograd.grad(y, [state[0], *raw], state[1])

    return Work(lambda x, grad: (x, grad), again)


def _own_work(op: str, case: Case, function: Function, raw: list[Tensor]) -> Work:
    if op != "backward+value":
        return work(op, function, raw)
    options: dict[str, Any] = {"gated": case.gated, "value": True}
    return Work(lambda x, grad: (x, grad), lambda s: kernels.backward(case.base, s[1], s[0], raw, **options))


def _case_rows(case: Case, libraries: Libraries, device: str, gb_per_s: float, notes: list[str]) -> Iterator[Row]:
    inputs = make_inputs(case, device)
    everybody = functions(case, libraries, inputs)
    for name in _strangers(case, everybody, inputs, notes):
        del everybody[name]
    for op in case.ops:
        samplers: dict[str, Sampler] = {}
        for name, function in everybody.items():
            own = name == OURS
            job = _own_work(op, case, function, inputs.raw) if own else work(op, function, inputs.raw)
            with noting(own, f"{name}, {case.activation} {op} {case.label}", notes):
                samplers[name] = sampler(job, inputs.buffers, device)
        if case.shape.decode:
            samplers[PLAIN] = sampler(work(op, torch.relu, []), inputs.buffers, device)
        yield _row(case, op, measure(samplers, device), gb_per_s)


def _strangers(case: Case, everybody: dict[str, Function], inputs: Inputs, notes: list[str]) -> list[str]:
    """Who does not run, or computes something else: no time of theirs would mean anything."""
    x, found = inputs.buffers[0][0], []
    with torch.no_grad():
        ours = everybody[OURS](x, *inputs.raw).float()
        for name, function in everybody.items():
            equal = name == OURS
            with noting(equal, f"{name}, {case.name}", notes):
                equal = equal or _agree(function(x, *inputs.raw).float(), ours, name, case, notes)
            found += [] if equal else [name]
    return found


def _agree(theirs: Tensor, ours: Tensor, name: str, case: Case, notes: list[str]) -> bool:
    error = ((theirs - ours).abs() / (1.0 + ours.abs())).max().item()
    if not error <= TOLERANCE:
        notes.append(f"{name}, {case.name}: left out, its values differ by {error:.1e}")
    return error <= TOLERANCE


@contextmanager
def noting(own: bool, what: str, notes: list[str]) -> Iterator[None]:
    """A competitor's error becomes a note; ours is raised."""
    try:
        yield
    except Exception as error:
        if own:
            raise
        notes.append(f"{what}: {explained(error)}")


def explained(error: Exception) -> str:
    """Type and beginning of the message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def others_of(rows: Iterable[Row]) -> list[str]:
    """Everybody who is compared with, in the order of the columns."""
    names = dict.fromkeys(name for row in rows for name in row["others"])
    return sorted(names, key=lambda name: name == PLAIN)  # another function, last


def _row(case: Case, op: str, timings: dict[str, Timing], gb_per_s: float) -> Row:
    ours = timings[OURS]
    speed = case.bytes_moved(op) / ours.median_us / 1e3
    others = {
        name: {**asdict(timing), "over_ours": timing.median_us / ours.median_us}
        for name, timing in timings.items()
        if name != OURS
    }
    return {
        "op": op, "activation": case.activation, "shape": case.label, "dtype": str(case.dtype).removeprefix("torch."),
        "bytes_per_element": case.bytes_per_element(op), **asdict(ours), "gb_per_s": speed,
        "percent_of_copy": 100 * speed / gb_per_s, "others": others,
    }  # fmt: skip
