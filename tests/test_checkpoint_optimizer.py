"""Which optimizer states a run refuses to load, by both runs' arguments."""

from argparse import Namespace

import pytest

from megatron_act.checkpoint.optimizer import MODEL_SPACE, SHARDING, conflict, format_of

PLAIN = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "use_distributed_optimizer": False,
    "optimizer": "adam",
    "num_experts": 4,
    "bf16": True,
    "fp16": False,
}
TP2 = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
ETP1 = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
EP2 = {"expert_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
FP32 = {"bf16": False}
MUON = {"optimizer": "muon", "use_layer_wise_distributed_optimizer": True}  # Megatron's form of SHARDED for it
DENSE = {"num_experts": None}
BUCKETS, BY_PARAMETER = "dp_reshardable", "fully_reshardable"


def args(*changes: dict) -> Namespace:
    merged = dict(PLAIN)
    for change in changes:
        merged.update(change)
    return Namespace(**merged)


@pytest.mark.parametrize(
    ("form", "saved", "wanted"),
    [
        (None, args(), args(TP2)),
        (None, args(EP2), args()),
        (None, args(), args(ETP1)),
        (None, args(EP2, TP2), args(SHARDED)),
        (BY_PARAMETER, args(SHARDED), args(EP2, TP2)),
        (BY_PARAMETER, args(SHARDED, EP2), args(SHARDED)),
        (BY_PARAMETER, args(SHARDED), args(SHARDED, FP32)),  # Megatron's own: the state is fp32
        (BUCKETS, args(SHARDED, EP2, TP2), args(SHARDED, EP2, TP2)),
        (MODEL_SPACE, args(SHARDED), args(SHARDED, TP2)),
        (BUCKETS, args(MUON), args(MUON)),
        (BY_PARAMETER, args(MUON), args(MUON)),
        (BUCKETS, args(SHARDED, DENSE, TP2), args(SHARDED, DENSE, ETP1)),  # no experts, nothing differs
    ],
)
def test_state_that_can_be_loaded_is_not_refused(form: str | None, saved: Namespace, wanted: Namespace) -> None:
    assert conflict(saved, form, wanted) is None


@pytest.mark.parametrize(
    ("form", "saved", "wanted", "words"),
    [
        (BUCKETS, args(SHARDED), args(), ["dp_reshardable", "--dist-ckpt-optim-fully-reshardable"]),
        (BUCKETS, args(SHARDED, TP2), args(SHARDED), ["--tensor-model-parallel-size 2", "--no-load-optim"]),
        (BUCKETS, args(SHARDED), args(SHARDED, EP2), ["--dist-ckpt-optim-fully-reshardable"]),
        (BUCKETS, args(SHARDED), args(SHARDED, FP32), ["--bf16", "--dist-ckpt-optim-fully-reshardable"]),
        (MODEL_SPACE, args(SHARDED), args(), ["--dist-ckpt-optim-fully-reshardable"]),
        ("unnamed", args(SHARDED), args(), ["--dist-ckpt-optim-fully-reshardable"]),
        (None, args(FP32), args(SHARDED), ["of a bf16 run, got fp32", "--no-load-optim"]),
        (None, args(EP2), args(FP32), ["of a fp32 run, got bf16"]),
        (None, args(EP2), args({"optimizer": "muon"}), ["--optimizer", "muon", "--no-load-optim"]),
    ],
)
def test_state_that_cannot_be_loaded_is_refused_with_what_to_do(
    form: str | None, saved: Namespace, wanted: Namespace, words: list[str]
) -> None:
    why = conflict(saved, form, wanted)
    assert why is not None and "\n" not in why
    assert [word for word in words if word not in why] == []


def test_the_format_is_read_from_the_metadata_and_old_checkpoints_have_none() -> None:
    assert format_of(args(), {}) is None
    assert format_of(args(SHARDED), {SHARDING: BUCKETS}) == BUCKETS
    assert format_of(args(SHARDED), None) == "unnamed"
