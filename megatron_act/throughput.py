"""How fast a run trains: tokens and model FLOPs per second and GPU, and their share of the GPU's peak (MFU).

    tokens per second and GPU = tokens / (seconds * GPUs)
    TFLOP/s per GPU           = model FLOPs / (seconds * GPUs * 10^12)
    MFU                       = TFLOP/s per GPU / peak dense TFLOP/s of one GPU

Model FLOPs are Megatron's own count (``megatron.training.training.num_floating_point_operations``, behind
``--log-throughput``): what the model's mathematics needs, whatever a run does besides. A multiply-add is 2, a backward
pass twice the forward, a causal attention square counts by half, the logits count, tied or not; embedding look-ups,
norms, activations and the router of experts do not count, nor does recomputation. Published figures that count the
full attention square (as PaLM's MFU) or the recomputation are higher.

Seconds are those of Megatron's ``interval-time``, which stands still during evaluations and checkpoints.
"""

import re
from argparse import Namespace
from collections import deque
from dataclasses import dataclass

FLAG = "--peak-tflops"

# Dense BF16 TFLOP/s by the name that CUDA reports. Source: NVIDIA's data sheets, whose figures with sparsity are twice
# these. Whole names: a MIG slice ("... MIG 1g.10gb") or another card ("H200 NVL") must not take a GPU's peak.
PEAKS = (
    (r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe", 312.0),
    (r"H100 80GB HBM3", 989.4),  # SXM
    (r"H100 PCIe", 756.0),
    (r"H200", 989.4),  # SXM
    (r"B200", 2250.0),
    (r"GB200", 2500.0),
)


@dataclass(frozen=True)
class Peak:
    """What MFU is measured against.

    Attributes:
        tflops: dense TFLOP/s of one GPU, or None where MFU would mean nothing.
        why: where the figure is from, or why there is none.
    """

    tflops: float | None
    why: str

    def __str__(self) -> str:
        return f"no MFU: {self.why}" if self.tflops is None else f"MFU of {self.tflops:g} TFLOP/s per GPU ({self.why})"


@dataclass(frozen=True)
class Throughput:
    """Mean over the steps between two laps.

    Attributes:
        step_seconds: time of one step, without evaluations and checkpoints.
        mfu: 0 to 1, or None without a peak.
    """

    step_seconds: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    mfu: float | None


class Meter:
    """Adds up what was trained and divides it by the time that it took.

    Args:
        tokens_per_sample: the sequence length.
        flops_per_sample: model FLOPs of one sequence, forward and backward.
        gpus: number of ranks.
        peak_tflops: dense TFLOP/s of one GPU; None: no MFU.
    """

    def __init__(self, tokens_per_sample: int, flops_per_sample: float, gpus: int, peak_tflops: float | None) -> None:
        self.tokens_per_sample = tokens_per_sample
        self.flops_per_sample = flops_per_sample
        self.gpus = gpus
        self.peak_tflops = peak_tflops
        self.seconds = 0.0  # at the last lap
        self.steps = self.samples = 0  # since then

    def add(self, samples: int) -> None:
        """Counts one step of the global batch size ``samples``."""
        self.steps += 1
        self.samples += samples

    def lap(self, seconds: float) -> Throughput:
        """The throughput since the last lap; counting starts anew.

        Args:
            seconds: time spent on training since the run started.
        """
        elapsed, self.seconds = seconds - self.seconds, seconds
        gpu_seconds = elapsed * self.gpus
        tflops = self.samples * self.flops_per_sample / gpu_seconds / 1e12
        done = Throughput(
            step_seconds=elapsed / self.steps,
            tokens_per_second_per_gpu=self.samples * self.tokens_per_sample / gpu_seconds,
            tflops_per_gpu=tflops,
            mfu=None if self.peak_tflops is None else tflops / self.peak_tflops,
        )
        self.steps = self.samples = 0
        return done


class TimeLeft:
    """Time that the steps to come will take at the mean pace of the last ``RECENT`` laps.

    The laps are those of a `Meter`; its first one, a run's first step, which compiles and connects, must not be added.
    """

    RECENT = 50

    def __init__(self) -> None:
        self.laps: deque[tuple[int, float]] = deque(maxlen=self.RECENT)

    def add(self, steps: int, step_seconds: float) -> None:
        """Adds a lap of ``steps`` steps that took ``step_seconds`` each."""
        self.laps.append((steps, steps * step_seconds))

    def seconds(self, steps: int) -> float | None:
        """Seconds that ``steps`` more steps will take, None while no pace is known."""
        done = sum(steps for steps, _ in self.laps)
        return steps * sum(seconds for _, seconds in self.laps) / done if done else None


def peak_of(args: Namespace, gpu: str | None) -> Peak:
    """The peak of a run's GPUs in the run's precision.

    Args:
        args: Megatron's parsed arguments with ``peak_tflops``.
        gpu: the name of this rank's GPU as CUDA reports it; None without one.
    """
    if args.fp8 or args.fp4:
        return Peak(None, "an FP8 or FP4 run mixes matmuls of several peaks")
    if args.peak_tflops is not None:
        return Peak(args.peak_tflops, FLAG)
    if gpu is None:
        return Peak(None, f"no GPU ({FLAG} sets a peak)")
    if not (args.bf16 or args.fp16):
        return Peak(None, f"an fp32 run, the known peaks are those of bf16 ({FLAG} sets another)")
    known = [tflops for pattern, tflops in PEAKS if re.fullmatch(f"(NVIDIA )?({pattern})", gpu)]
    return Peak(known[0], f"{gpu}, dense bf16") if known else Peak(None, f"unknown GPU {gpu} ({FLAG} sets its peak)")


def conflict(args: Namespace) -> str | None:
    """Why ``--peak-tflops`` cannot be served: one sentence with what to change, or None."""
    if args.peak_tflops is None:
        return None
    problems = (
        (not args.peak_tflops > 0, f"expected dense TFLOP/s of one GPU above 0, got {args.peak_tflops:g}: correct it"),
        (args.fp8 or args.fp4, "expected bf16, fp16 or fp32, got FP8 or FP4, which mixes matmuls of several peaks"),
    )
    return next((f"{FLAG}: {message}" for present, message in problems if present), None)
