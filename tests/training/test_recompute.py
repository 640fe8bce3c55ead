"""``--recompute-activation-function``: the same gradients, bit for bit, the same collectives, half the memory."""

import json
from pathlib import Path

import pytest
from training_support import torchrun

from megatron_act.budget import Shape
from megatron_act.kernels import api as kernels
from megatron_act.memory import activation_bytes

WORKER = str(Path(__file__).parent / "workers" / "recompute.py")

pytestmark = pytest.mark.distributed


def report(ranks: int, *flags: str) -> dict[str, dict]:
    done = torchrun(WORKER, *flags, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))[7:])


@pytest.fixture(scope="module")
def split() -> dict[str, dict]:
    return report(2)


@pytest.fixture(scope="module")
def broken() -> dict[str, dict]:
    return report(1, "--broken")


def test_every_gradient_has_the_same_bits(split: dict[str, dict]) -> None:
    """TP 2, on both backends: every activation; with xielu also sequence parallelism, checkpointing, offloading."""
    cases = split["gradients"]
    assert len(cases) == 2 * (4 + len(kernels.names()) - 1 + 2 + 4)
    assert {case: names for case, names in cases.items() if names} == {}


def test_no_collective_is_added(split: dict[str, dict]) -> None:
    for case, (without, with_recompute) in split["collectives"].items():
        # Megatron's own checkpoint repeats fc2's forward all-reduce in each of two micro-batches
        repeated = 2 if case.startswith("megatron checkpoint") and "sp=False" in case else 0
        assert with_recompute == without + repeated, case


def test_a_wrong_recomputed_value_would_be_seen(broken: dict[str, dict]) -> None:
    assert list(broken["gradients"].values()) == [["linear_fc2.weight"]] * 2


def test_memory_is_half_of_swiglu_at_equal_compute(broken: dict[str, dict]) -> None:
    """Live bytes per token after the forward pass of an MLP in bf16, hidden 16: SwiGLU 48 wide, xIELU 72 wide."""
    kept = broken["kept_bytes"]
    assert kept == {"swiglu": 2 * (16 + 3 * 48), "xielu": 2 * (16 + 2 * 72), "xielu recompute": 2 * (16 + 72)}
    for name, activation, ffn in (("swiglu", "swiglu", 48), ("xielu", "xielu", 72), ("xielu recompute", "xielu", 72)):
        shape = Shape(
            hidden_size=16,
            num_layers=1,
            num_attention_heads=2,
            ffn_hidden_size=ffn,
            activation=activation,
            vocab_size=64,
            seq_length=32,
        )
        planned = activation_bytes(shape, recompute_activation=name.endswith("recompute"))
        assert kept[name] == planned.mlp - 2 * 16  # all but the norm's input, which belongs to the layer
