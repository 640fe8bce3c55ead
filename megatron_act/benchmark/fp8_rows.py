"""FP8 rows: activation and quantization for each recipe, the ways to do it side by side (``fp8_ways``)."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from megatron_act import fp8_bytes
from megatron_act.benchmark.cases import DECODE_ROWS, GATED, Shape, known
from megatron_act.benchmark.fp8_ways import OURS, OWN, UNFUSED, Case, bits, ways
from megatron_act.benchmark.table import SEED, Row, Table, explained, noting
from megatron_act.benchmark.timing import Buffer, Sampler, Timing, buffers_needed, measure, sampler
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels
from megatron_act.kernels import fp8
from megatron_act.kernels.fp8_launch import CAPABILITY

ACTIVATIONS = ("xielu", "relu2")  # the second is one that Transformer Engine has
SMALL = Shape(256, 384, 256)  # for a CPU, where only the code is tried
MOST_DIFFERING = 0.1  # share of FP8 numbers: who rounds to bf16 first rounds 3 % of them to the neighbour
WAY_OF = {OURS: fp8_bytes.OURS, OWN: fp8_bytes.ENGINE, **dict.fromkeys(UNFUSED, fp8_bytes.UNFUSED)}


def select(activations: Sequence[str] | None, shapes: Sequence[Shape], device: str) -> list[Case]:
    """Every recipe and direction; every shape for the first activation, the first shape for the others.

    A current scale is timed forward only, since backward it moves what it saves.

    Raises:
        UserError: an unknown or gated activation, shapes of generation or without whole blocks, a GPU without FP8.
    """
    names = [known(name) for name in activations or ACTIVATIONS]
    if gated := [name for name in names if name in GATED]:
        raise UserError(f"--activations: expected no gate for FP8 rows, got {', '.join(gated)}; leave them out")
    if not (chosen := [shape for shape in shapes if not shape.decode]):
        raise UserError(f"--shapes: for FP8 expected more than {DECODE_ROWS} tokens, got fewer; add a larger shape")
    if bad := [f"{s.rows}x{s.cols}" for s in chosen if s.rows % fp8.BLOCK or s.cols % fp8.BLOCK]:
        raise UserError(f"--shapes: for FP8 expected multiples of {fp8.BLOCK}, got {', '.join(bad)}; round them")
    transposed = fp8_bytes.transposes(_capability()) if device == "cuda" else True
    pairs = [(r, op) for r in fp8_bytes.SCALE for op in fp8_bytes.OPS if (r, op) != ("tensorwise", "backward")]
    shaped = [(name, shape) for name in names for shape in (chosen if name == names[0] else chosen[:1])]
    return [Case(name, shape, recipe, op, transposed) for name, shape in shaped for recipe, op in pairs]


def _capability() -> tuple[int, int]:
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        raise UserError(f"FP8 rows: expected compute capability 8.9 or newer, got {found[0]}.{found[1]}; use --only")
    return found


def run(
    cases: list[Case], device: str, gb_per_s: float,
    progress: Callable[[list[Case]], Iterable[Case]] = iter, deadline: float = float("inf"),
) -> Table:  # fmt: skip
    """Times every case; from ``deadline`` (``time.monotonic``) on it starts no further one."""
    table = Table()
    for case in progress(cases):
        if time.monotonic() > deadline:
            table.left_out.append(case.name)
            continue
        try:
            table.rows.append(_row(case, _timings(case, device, table.notes), gb_per_s))
        except Exception as error:  # the other cases are worth having: the caller's exit code tells
            table.failed.append(f"{case.name}: {explained(error)}")
    return table


def _inputs(case: Case, device: str) -> tuple[list[Buffer], list[Tensor]]:
    generator = torch.Generator(device).manual_seed(SEED)
    size = (case.shape.rows, case.shape.cols)
    like: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "generator": generator}
    count = buffers_needed(2 * size[0] * size[1], device)
    buffers = [(torch.randn(size, **like), torch.randn(size, **like)) for _ in range(count)]
    return buffers, [torch.tensor([p.raw_init], device=device) for p in kernels.get(case.activation).params]


def _timings(case: Case, device: str, notes: list[str]) -> dict[str, Timing]:
    buffers, raw = _inputs(case, device)
    samplers: dict[str, Sampler] = {}
    mine: Tensor | None = None
    for name, work in ways(case, raw, device).items():
        with noting(name == OURS, f"{name}, {case.name}", notes):
            found = _numbers(work.launch(work.prepare(*buffers[0])))
            mine = found if mine is None else mine
            differing = (found != mine).float().mean().item()
            if differing > MOST_DIFFERING:
                notes.append(f"{name}, {case.name}: left out, {differing:.0%} of its FP8 numbers differ")
            else:
                samplers[name] = sampler(work, buffers, device)
    return measure(samplers, device)


def _numbers(result: Any) -> Tensor:
    """FP8 bits; a negative zero, which some write for a gradient times 0, is 0."""
    found = bits(result)
    return torch.where(found == 0x80, 0, found)


def _row(case: Case, timings: dict[str, Timing], gb_per_s: float) -> Row:
    ours, moved = timings[OURS], case.bytes_per_element(fp8_bytes.OURS)
    speed = moved * case.shape.rows * case.shape.cols / ours.median_us / 1e3
    others = {
        name: {
            **asdict(timing),
            "bytes_per_element": case.bytes_per_element(WAY_OF[name]),
            "over_ours": timing.median_us / ours.median_us,
        }
        for name, timing in timings.items()
        if name != OURS
    }
    gains = [other["over_ours"] for name, other in others.items() if name in UNFUSED]
    return {
        "op": case.op, "activation": case.activation, "recipe": case.recipe, "shape": case.label,
        "bytes_per_element": moved, **asdict(ours), "gb_per_s": speed, "percent_of_copy": 100 * speed / gb_per_s,
        "byte_ratio": case.byte_ratio,
        "percent_of_byte_ratio": 100 * gains[0] / case.byte_ratio if gains else None, "others": others,
    }  # fmt: skip
