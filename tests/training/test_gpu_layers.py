"""The layers that a GPU run uses: Triton kernels in bf16, Transformer Engine, grouped experts, offloading, NCCL.

Marked gpu. What has a form without CUDA runs on a CPU too, where Triton's interpreter and a grouped linear layer of
plain torch stand in: it proves the tests, which the GPU then answers.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from device_support import NO_ENGINE, NO_GPU, needs_gpu, run_tasks
from training_support import MODEL_FLAGS, torchrun

from megatron_act.compat import LOCAL_LAYER_FLAGS

BF16, EXPERTS = {"dtype": "bfloat16"}, {"experts": True}
REFERENCE, TRITON = {"backend": "reference"}, {"backend": "triton"}
FP32_BOUND = {"logits": 3e-5, "scalars": 3e-5, "weights": 3e-5}  # of the largest value of each tensor
BF16_BOUND = {"logits": 4e-2, "scalars": 4e-2, "weights": 6e-2}
OTHER_ATTENTION = {"logits": 6e-2, "scalars": 6e-2, "weights": 1e-1}  # bf16, rounded at other places
PAIRS: dict[str, tuple[dict[str, float], list[dict[str, Any]]]] = {
    "Triton": (FP32_BOUND, [REFERENCE, TRITON]),
    "Triton in bf16": (BF16_BOUND, [{**BF16, **REFERENCE}, {**BF16, **TRITON}]),
    "Triton in experts": (FP32_BOUND, [{**EXPERTS, **REFERENCE}, {**EXPERTS, **TRITON}]),
    "grouped experts": (FP32_BOUND, [EXPERTS, {**EXPERTS, "grouped": True}]),
    "grouped experts in bf16": (BF16_BOUND, [{**BF16, **EXPERTS}, {**BF16, **EXPERTS, "grouped": True}]),
}
# Not local against Transformer Engine's experts: other roundings send a token with a near tie to another expert.
ENGINE_PAIRS: dict[str, tuple[dict[str, float], list[dict[str, Any]]]] = {
    "Transformer Engine": (OTHER_ATTENTION, [BF16, {**BF16, "engine": True}]),
    "its grouped experts": (
        BF16_BOUND,
        [{**BF16, **EXPERTS, "engine": True}, {**BF16, **EXPERTS, "engine": True, "grouped": True}],
    ),
}
CONTROL = [{**BF16, **REFERENCE}, {**BF16, **REFERENCE, "shift": 0.5}]  # scalars moved by 0.5


def differences(device: str, pairs: dict[str, Any]) -> dict[str, dict[str, float]]:
    wanted = {"pairs": {name: pair for name, (_, pair) in pairs.items()} | {"control": CONTROL}}
    env = {"TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    return run_tasks(device, {"variants": wanted}, **env)["variants"]


def assert_equal(found: dict[str, float], bounds: dict[str, float]) -> None:
    assert {name: error for name, error in found.items() if not error <= bounds[name]} == {}


@pytest.fixture(scope="module", params=["cpu", needs_gpu("cuda")])
def variants(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    return differences(request.param, PAIRS)


@pytest.mark.parametrize("case", PAIRS)
def test_two_ways_to_compute_a_model_agree(variants: dict[str, dict[str, float]], case: str) -> None:
    assert_equal(variants[case], PAIRS[case][0])


def test_other_scalars_would_be_seen(variants: dict[str, dict[str, float]]) -> None:
    assert all(variants["control"][name] > 2 * bound for name, bound in BF16_BOUND.items())


@pytest.fixture(scope="module")
def engine_variants() -> dict[str, dict[str, float]]:
    return differences("cuda", ENGINE_PAIRS)


@pytest.mark.gpu
@NO_GPU
@NO_ENGINE
@pytest.mark.parametrize("case", ENGINE_PAIRS)
def test_transformer_engine_computes_the_same_model(engine_variants: dict[str, dict[str, float]], case: str) -> None:
    assert_equal(engine_variants[case], ENGINE_PAIRS[case][0])


MOCK = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "511", "--bf16", "--train-iters", "3"]
MOE = """
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall
""".split()  # noqa: SIM905
ENGINE = ["--transformer-impl", "transformer_engine"]  # after LOCAL_LAYER_FLAGS: the last one counts
LOSS_BOUND, SCALAR_BOUND = 5e-3, 2e-3  # on a CPU bf16 and fp32 differ by 4e-4 and 1e-4
OFFLOADING = {
    "layers": ([], ["--cpu-offloading-num-layers", "2"]),
    "expert activations": (
        MOE,
        ["--fine-grained-activation-offloading", "--offload-modules", "moe_act", "--min-offloaded-tensor-size", "1024"],
    ),
}


def trained(device: str, folder: Path, *flags: str) -> tuple[list[dict[str, Any]], str]:
    """Records and log of three steps of the entry point in bf16."""
    metrics = folder / f"metrics{len(list(folder.iterdir()))}.jsonl"
    layers = ["--cpu"] if device == "cpu" else list(LOCAL_LAYER_FLAGS)
    words = [*layers, *MODEL_FLAGS, *MOCK, "--activation", "xielu", "--metrics-jsonl", str(metrics), *flags]
    done = torchrun("-m", "megatron_act.pretrain_gpt", *words, ranks=1)
    assert done.returncode == 0, done.stdout[-3000:]
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record for record in records if record["event"] == "step"], done.stdout


def assert_equal_training(ours: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    """Within what Adam makes of bf16 roundings: a gradient near 0 may change its sign, and its step with it."""
    assert len(ours) == 3 and all(math.isfinite(step["loss"]) for step in ours)
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in reference], abs=LOSS_BOUND)
    assert reference[0]["loss"] - reference[-1]["loss"] > 20 * LOSS_BOUND
    for name, values in reference[-1]["scalars"].items():
        assert ours[-1]["scalars"][name] == pytest.approx(values, abs=SCALAR_BOUND)
        assert max(abs(value - 0.8) for value in values) > 3 * SCALAR_BOUND


@pytest.mark.parametrize("device", ["cpu", needs_gpu("cuda")])
def test_training_with_the_kernels_is_training_with_the_reference(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: NCCL, Triton kernels, bf16, and a throughput that the GPU can have."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling Megatron's small fusions takes longer than the steps
    steps, log = trained(device, tmp_path)
    reference, _ = trained(device, tmp_path, "--activation-backend", "reference")
    assert_equal_training(steps, reference)
    assert "> megatron-act: xielu in 4 layers of this rank" in log
    assert log.count("> megatron-act: no MFU: ") + log.count("> megatron-act: MFU of ") == 1
    assert all(step["mfu"] is None or 0 < step["mfu"] < 1 for step in steps)
    assert all(step["tokens_per_second_per_gpu"] == pytest.approx(8 * 64 / step["step_seconds"]) for step in steps)


@pytest.mark.gpu
@NO_GPU
@NO_ENGINE
@pytest.mark.parametrize("case", OFFLOADING)
def test_offloading_activations_changes_no_training(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "1")  # what Megatron asks for with fine-grained offloading
    model, offloading = OFFLOADING[case]
    reference, _ = trained("cuda", tmp_path, *ENGINE, *model)
    steps, _ = trained("cuda", tmp_path, *ENGINE, *model, *offloading)
    assert_equal_training(steps, reference)
