"""All-reduce over every group of the layout: exact sums, and the bandwidth that they reach.

Each rank contributes a pattern of small integers plus its own number (modulo the pattern's length), so that the sum is
exact in fp32 and a wrong, missing or doubled contribution shows. Bandwidth is NCCL's bus bandwidth,

    2 (n - 1) / n * bytes / seconds

which does not depend on the group's size n and compares with the link's; a group's figure is its slowest rank's, and of
all groups of a kind (64 tensor-parallel ones, say) the slowest group's. Groups of one kind run at the same time, as
they do in training.
"""

import time
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_act.preflight_finding import Finding, failed

GPU_BYTES, CPU_BYTES = 256 << 20, 4 << 20
ROUNDS = 5
TIMEOUT_MINUTES = 3  # a group that hangs must not hold the nodes
PATTERN = 251  # at most 500 an element and rank: sums of 33,000 ranks stay below 2^24, the integers that fp32 holds


@dataclass(frozen=True)
class Measured:
    """One kind of group: ranks of a group, wrong elements anywhere, GB/s of the slowest."""

    size: int
    wrong: int
    gbps: float


def pattern(elements: int, device: torch.device) -> torch.Tensor:
    """fp32 [elements]: 0, 1, ..., 250, 0, ..."""
    return torch.remainder(torch.arange(elements, device=device), PATTERN).to(torch.float32)


def measure(group: dist.ProcessGroup, device: torch.device) -> Measured:
    """All-reduces over ``group``; every rank of the job calls it at once, each with its own group."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    elements = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4
    base = pattern(elements, device)
    summed = base + rank % PATTERN
    dist.all_reduce(summed, group=group)  # also the first use of the group: it connects
    wrong = int((summed != size * base + sum(other % PATTERN for other in range(size))).sum())
    seconds = _seconds(summed.zero_(), group)
    gbps = 2 * (size - 1) / size * elements * 4 / seconds / 1e9
    worst = torch.tensor([float(wrong), -gbps], dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return Measured(size, int(worst[0]), -float(worst[1]))


def _seconds(tensor: torch.Tensor, group: dist.ProcessGroup) -> float:
    """Mean time of one all-reduce after the first."""
    _wait(tensor)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor, group=group)
    _wait(tensor)
    return max((time.perf_counter() - start) / ROUNDS, 1e-9)


def _wait(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def judge(name: str, measured: Measured, minimum_gbps: float) -> Finding:
    """The finding of one kind of group."""
    label = f"all-reduce, {name}"
    if measured.wrong:
        got = f"{measured.wrong} wrong elements in a group of {measured.size}"
        return failed(label, "exact sums", got, "run nccl-tests on these nodes and leave the faulty one out")
    if measured.gbps < minimum_gbps:
        expected, got = f"at least {minimum_gbps:g} GB/s (--min-bus-gbps)", f"{measured.gbps:.3g}"
        remedy = "NCCL_DEBUG=INFO shows the links in use: InfiniBand, NVLink, or by mistake sockets"
        return failed(label, expected, got, remedy)
    return Finding(label, f"groups of {measured.size}: exact, slowest {measured.gbps:.3g} GB/s")


def checks(args: Namespace, device: torch.device, minimum_gbps: float) -> list[Finding]:
    """Builds Megatron's own process groups and measures each kind that has more than one rank; a collective.

    Args:
        args: Megatron's parsed arguments, whose layout divides the ranks.
        device: this rank's.
        minimum_gbps: 0 takes any bandwidth.
    """
    groups = {name: group for name, group in _groups(args).items() if dist.get_world_size(group) > 1}
    if not groups:
        return [Finding("all-reduce", "one rank: nothing to measure")]
    return [judge(name, measure(group, device), minimum_gbps) for name, group in groups.items()]


def _groups(args: Namespace) -> dict[str, Any]:
    from megatron.core import mpu  # the rest of this file does without Megatron

    mpu.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        distributed_timeout_minutes=TIMEOUT_MINUTES,
    )
    return {
        "all ranks": dist.group.WORLD,
        "tensor parallel": mpu.get_tensor_model_parallel_group(),
        "pipeline parallel": mpu.get_pipeline_model_parallel_group(),
        "context parallel": mpu.get_context_parallel_group(),
        "data parallel": mpu.get_data_parallel_group(with_context_parallel=True),
        "expert parallel": mpu.get_expert_model_parallel_group(),
    }
