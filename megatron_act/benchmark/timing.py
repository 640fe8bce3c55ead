"""Microseconds of a launch on buffers that no cache holds.

On a GPU the launches over all buffers are captured into one CUDA graph, and its replays are timed by events: what
Python and the driver need to launch is not in the figure, for us and for everybody else alike. What cannot be captured
is timed launch by launch, that cost included, and is marked. On a CPU it is a clock.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

GRAPH, EVENTS, CLOCK = "graph", "events", "clock"  # how a time was taken
MIB = 1 << 20
# What a round over the buffers reads: more than the L2 of any GPU (126 MB on a B200), than the L3 a CPU core sees.
ROTATED_BYTES = {"cuda": 256 * MIB, "cpu": 64 * MIB}
MOST_BUFFERS = {"cuda": 256, "cpu": 32}
LEAST_LAUNCHES = 8  # of a graph: starting it costs microseconds too
WARM_UP = 3  # launches, then rounds, that do not count
ROUNDS = {"cuda": 20, "cpu": 40}
COPIED_BYTES = {"cuda": 512 * MIB, "cpu": 64 * MIB}
Buffer = tuple[Tensor, Tensor]  # x, incoming gradient


@dataclass(frozen=True)
class Work:
    """``prepare`` makes a state from a buffer and is not timed; ``launch`` is, and its results stay alive.

    A result that was freed would lend its memory to the next one, which then is written while it still is in L2.
    """

    prepare: Callable[[Tensor, Tensor], Any]
    launch: Callable[[Any], Any]


@dataclass(frozen=True)
class Timing:
    """Over the rounds."""

    median_us: float
    p20_us: float
    p80_us: float
    method: str


class Sampler(Protocol):
    """One measurement at a time, so that several can take turns."""

    method: str

    def sample(self) -> float:
        """Microseconds of one launch."""
        ...


def buffers_needed(bytes_each: int, device: str) -> int:
    """How many buffers of that size a round goes over."""
    return max(1, min(MOST_BUFFERS[device], -(-ROTATED_BYTES[device] // max(1, bytes_each))))


class Clock:
    """A CPU: one launch a sample, over the buffers in turn. One thread counts its own time, not its neighbours'."""

    method = CLOCK

    def __init__(self, work: Work, buffers: Sequence[Buffer]) -> None:
        self.launch, self.turn = work.launch, 0
        self.now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self.states = [work.prepare(*buffer) for buffer in buffers]
        self.result: Any = None

    def sample(self) -> float:
        """The last result is freed before the clock starts."""
        self.result = None
        state = self.states[self.turn % len(self.states)]
        self.turn += 1
        begin = self.now()
        self.result = self.launch(state)
        return (self.now() - begin) * 1e6


class Replay:
    """A GPU: mean of the launches of one graph, which goes over all states; L2 holds other data when it starts."""

    method = GRAPH

    def __init__(self, work: Work, states: Sequence[Any]) -> None:
        self.graph, self.states = torch.cuda.CUDAGraph(), states
        self.results: list[Any] = [None] * len(states)
        self.launches = max(LEAST_LAUNCHES, len(states))
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.graph(self.graph, stream=_stream()):
            for turn in range(self.launches):
                self.results[turn % len(states)] = work.launch(states[turn % len(states)])

    def sample(self) -> float:
        """Everything is enqueued while the flush still runs: the host is never waited for."""
        with torch.cuda.stream(_stream()):
            _flush()
            self.start.record()
            self.graph.replay()
            self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e3 / self.launches


class Events:
    """A GPU without a graph: one launch a sample, the time that Python needs for it included where that is longer."""

    method = EVENTS

    def __init__(self, work: Work, states: Sequence[Any]) -> None:
        self.launch, self.states, self.turn = work.launch, states, 0
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.result: Any = None

    def sample(self) -> float:
        """Over the states in turn."""
        state = self.states[self.turn % len(self.states)]
        self.turn += 1
        with torch.cuda.stream(_stream()):
            _flush()
            self.start.record()
            self.result = self.launch(state)
            self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e3


def sampler(work: Work, buffers: Sequence[Buffer], device: str, capture: bool = True) -> Sampler:
    """The best way to time ``work`` on ``device``; what fails outside the capture raises as it is.

    capture: False for work that a graph would not repeat, such as the bookkeeping of FP8 scales.
    """
    if device == "cpu":
        return Clock(work, buffers)
    outside = torch.cuda.current_stream()
    torch.cuda.synchronize()  # the buffers were filled there
    with torch.cuda.stream(_stream()):  # autograd runs a backward pass on the stream of its forward pass
        states = [work.prepare(*buffer) for buffer in buffers]
        for turn in range(WARM_UP):
            work.launch(states[turn % len(states)])
    torch.cuda.synchronize()
    if not capture:
        return Events(work, states)
    try:
        return Replay(work, states)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # not allowed while capturing
        torch.cuda.set_stream(outside)  # a failed capture leaves its own
        torch.cuda.synchronize()
        return Events(work, states)


def measure(samplers: Mapping[str, Sampler], device: str) -> dict[str, Timing]:
    """Every sampler once a round, so that a clock or a neighbour that changes meets all of them."""
    for _ in range(WARM_UP):
        for each in samplers.values():
            each.sample()
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(ROUNDS[device]):
        for name, each in samplers.items():
            times[name].append(each.sample())
    return {name: _timing(sorted(found), samplers[name].method) for name, found in times.items()}


def copy_gb_per_s(device: str) -> float:
    """GB/s, read plus written, of ``target.copy_(source)``: the roof of a run."""
    source = torch.ones(COPIED_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    work = Work(lambda x, _: x, target.copy_)
    median_us = measure({"copy": sampler(work, [(source, source)], device)}, device)["copy"].median_us
    return 2 * COPIED_BYTES[device] / median_us / 1e3


def _timing(times: list[float], method: str) -> Timing:
    at = lambda share: times[min(len(times) - 1, int(share * len(times)))]  # noqa: E731
    return Timing(at(0.5), at(0.2), at(0.8), method)


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@functools.cache
def _other_data() -> Tensor:
    return torch.ones(ROTATED_BYTES["cuda"] // 4, device="cuda")


def _flush() -> None:
    """Fills L2 by reading: written data would have to leave it while the clock runs."""
    _other_data().sum()
