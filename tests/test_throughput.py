"""Tokens, FLOPs and MFU by hand; which GPUs have a known peak, and when MFU would mean nothing."""

import dataclasses
from argparse import Namespace

import pytest

from megatron_act.throughput import Meter, Throughput, TimeLeft, conflict, peak_of

BF16 = {"bf16": True, "fp16": False, "fp8": None, "fp4": None, "peak_tflops": None}
H100 = "NVIDIA H100 80GB HBM3"


def args(**changes: object) -> Namespace:
    return Namespace(**{**BF16, **changes})


def test_a_lap_by_hand():
    """Two steps of 8 sequences of 1000 tokens at 5e12 FLOPs each, in 4 s on 2 GPUs of 20 TFLOP/s."""
    meter = Meter(tokens_per_sample=1000, flops_per_sample=5e12, gpus=2, peak_tflops=20.0)
    meter.add(8)
    meter.add(8)
    assert meter.lap(4.0) == Throughput(2.0, 2000.0, 10.0, 0.5)


def test_laps_do_not_share_steps_or_seconds():
    """A batch that grows between laps, as with --rampup-batch-size."""
    meter = Meter(1000, 5e12, 1, None)
    meter.add(2)
    assert meter.lap(10.0) == Throughput(10.0, 200.0, 1.0, None)
    meter.add(8)
    meter.add(16)
    assert meter.lap(14.0) == Throughput(2.0, 6000.0, 30.0, None)


def test_mfu_of_a_published_model_by_hand():
    """6 FLOPs per parameter and token: 1e9 parameters, 50,000 tokens/s on an H100 are 300 of its 989.4 TFLOP/s."""
    meter = Meter(4096, 6 * 1e9 * 4096, 1, peak_of(args(), H100).tflops)
    meter.add(100)
    pace = meter.lap(100 * 4096 / 50_000)
    expected = {"tokens_per_second_per_gpu": 50_000, "tflops_per_gpu": 300, "mfu": 300 / 989.4}
    found = dataclasses.asdict(pace)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_time_left_by_hand():
    """Ten steps of 2 s and thirty of 4 s: 3.5 s a step, forgotten when fifty laps of 1 s have followed."""
    left = TimeLeft()
    assert left.seconds(100) is None
    left.add(10, 2.0)
    left.add(30, 4.0)
    assert left.seconds(100) == 350.0
    for _ in range(TimeLeft.RECENT):
        left.add(10, 1.0)
    assert left.seconds(100) == 100.0


KNOWN = {
    "NVIDIA A100-SXM4-80GB": 312,
    "A100-SXM4-40GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    H100: 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989.4,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
}
UNKNOWN = (
    "NVIDIA H100 NVL",
    "NVIDIA H200 NVL",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA A10",
)


@pytest.mark.parametrize("name", KNOWN)
def test_known_peaks(name):
    peak = peak_of(args(), name)
    assert peak.tflops == KNOWN[name]
    assert str(peak) == f"MFU of {KNOWN[name]:g} TFLOP/s per GPU ({name}, dense bf16)"


@pytest.mark.parametrize("name", UNKNOWN)
def test_another_gpu_or_a_slice_of_one_has_no_peak_but_a_given_one(name):
    assert peak_of(args(), name).tflops is None
    assert str(peak_of(args(), name)) == f"no MFU: unknown GPU {name} (--peak-tflops sets its peak)"
    assert peak_of(args(peak_tflops=70.5), name).tflops == 70.5


@pytest.mark.parametrize(
    ("changes", "gpu", "why"),
    [
        ({}, None, "no GPU"),
        ({"bf16": False}, H100, "fp32"),
        ({"fp8": "hybrid"}, H100, "FP8"),
        ({"fp4": "e2m1"}, H100, "FP8 or FP4"),
    ],
)
def test_runs_without_mfu_say_why(changes, gpu, why):
    peak = peak_of(args(**changes), gpu)
    assert peak.tflops is None and str(peak).startswith("no MFU: ") and why in str(peak)


def test_fp16_has_the_peak_of_bf16():
    assert peak_of(args(bf16=False, fp16=True), H100).tflops == 989.4


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"peak_tflops": 0.0}, "above 0, got 0"),
        ({"peak_tflops": float("nan")}, "above 0, got nan"),
        ({"peak_tflops": 900.0, "fp8": "hybrid"}, "got FP8 or FP4"),
    ],
)
def test_a_given_peak_that_cannot_be_used_is_refused(changes, part):
    assert part in conflict(args(**changes))


def test_a_peak_that_can_be_used_is_not_refused():
    assert conflict(args()) is None
    assert conflict(args(peak_tflops=900.0)) is None
