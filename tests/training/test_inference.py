"""Generation by Megatron-Core's engine, and the plain forward pass, against the training forward pass."""

from typing import Any

import pytest
from device_support import needs_gpu, run_tasks

CASES: dict[str, dict[str, Any]] = {
    "xielu": {},
    "crrelu, biases, learned positions": {
        "activation": "crrelu",
        "learned_positions": True,
        "config": {"add_bias_linear": True},
    },
    "experts": {"experts": True},
    "experts with scalars of their own": {"experts": True, "per_expert": True},
}
TOLERANCE = 3e-5  # of logits of size 1, fp32: attention to a cache adds in another order


@pytest.fixture(scope="module", params=["cpu", needs_gpu("cuda")])
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run_tasks(request.param, {"generation": {"cases": CASES}, "refusals": {}})


@pytest.mark.parametrize("case", CASES)
def test_the_plain_forward_pass_is_the_training_pass(report: dict[str, Any], case: str) -> None:
    assert report["generation"][case]["plain"] <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_engine_gets_the_training_pass_logits_at_every_position(report: dict[str, Any], case: str) -> None:
    """Two prompts of 7 and 4 tokens: a first pass over 4 positions, then one position at a time."""
    result = report["generation"][case]
    assert result["positions"] == 12
    assert result["engine"] <= TOLERANCE
    assert result["other scalar"] > 0.03  # the control: one scalar moved by 0.05


@pytest.mark.parametrize("case", CASES)
def test_the_engine_chooses_the_training_pass_tokens(report: dict[str, Any], case: str) -> None:
    result = report["generation"][case]
    assert result["generated"] == result["wanted"]
    assert [len(tokens) for tokens in result["generated"]] == [6, 6]


SAID = {
    "stock MLP": "RuntimeError: relu2 lives in ActivationMLP, yet a stock Megatron module called",
    "fused experts": "ValueError: No mcore_fused_moe ActivationType mapping",
    "fused experts, stock": "ValueError: SQUARED_RELU",
    "inference experts": "ValueError: --activation: expected SequentialMLP or plain TEGroupedMLP experts, got Infer",
    "inference layers": "ValueError: --activation xielu: expected a plain MLP, got inference-optimized layers",
    "graphs": "ValueError: --cuda-graph-impl local: a captured MLP skips the check of its scalars' gradients",
    "graphs of attention": "nothing",
}


@pytest.mark.parametrize("case", SAID)
def test_what_would_compute_or_check_nothing_of_ours_is_refused(report: dict[str, Any], case: str) -> None:
    """Stock modules also for relu2, which Megatron's fused experts know: they would leave our kernel out in silence."""
    assert report["refusals"][case].startswith(SAID[case])
