"""Model state per GPU: against what Megatron allocates for a step, and against the ranks that it builds.

Its own estimate is in test_budget.py.
"""

import dataclasses
from pathlib import Path

import pytest
from build_support import build

from megatron_act import model_args
from megatron_act.budget import Shape
from megatron_act.errors import UserError
from megatron_act.layout_memory import Layout, RankParameters, rank_parameters, state_bytes

ROOT = Path(__file__).resolve().parents[1]
SCALARS = {"xielu": 2, "crrelu": 1, "relu2": 0, "gelu": 0}
PADDING = 2 * 512  # elements: of the buckets of bf16 and of fp32 parameters, with the distributed optimizer
TINY = "tiny-xielu.yaml"
STATES = {
    "one GPU": Layout(distributed_optimizer=False),
    "TP 2": Layout(tensor_parallel=2, data_parallel=2, distributed_optimizer=False),
    "PP 2": Layout(pipeline_parallel=2, data_parallel=2, distributed_optimizer=False),
    "DP 8, distributed": Layout(data_parallel=8),
    "TP 2, DP 4, distributed": Layout(tensor_parallel=2, data_parallel=4),
    "TP 2, PP 2, DP 2, distributed": Layout(tensor_parallel=2, pipeline_parallel=2, data_parallel=2),
}
RANKS = [  # file, tensor parallel, pipeline parallel, stage
    ("paper-1.1b-xielu.yaml", 2, 1, 0),  # tied
    ("paper-1.1b-xielu.yaml", 4, 2, 0),
    ("paper-1.1b-xielu.yaml", 4, 2, 1),
    ("apertus-8b-xielu.yaml", 16, 4, 2),  # more ranks than key/value heads; neither end of the pipeline
    ("apertus-70b-crrelu.yaml", 4, 8, 0),
    ("apertus-70b-crrelu.yaml", 4, 8, 7),
    ("llama-3-8b-swiglu.yaml", 8, 1, 0),
]
SWIGLU = Shape(
    hidden_size=64, num_layers=2, num_attention_heads=4, ffn_hidden_size=96, activation="swiglu", vocab_size=256
)


def shape_of(file: str) -> Shape:
    return model_args.shape(model_args.read(ROOT / "configs" / file), SCALARS)


@pytest.fixture(scope="module")
def built():
    """The states of STATES and the ranks of RANKS, from one process."""
    jobs = [
        {
            **dataclasses.asdict(layout),
            "config": str(ROOT / "configs" / TINY),
            "stage": layout.pipeline_parallel - 1,
            "state": True,
        }
        for layout in STATES.values()
    ]
    names = ("tensor_parallel", "pipeline_parallel", "stage")
    for file, *sizes in RANKS:
        jobs.append({"config": str(ROOT / "configs" / file), **dict(zip(names, sizes, strict=True))})
    return dict(zip([*STATES, *RANKS], build(jobs), strict=True))


@pytest.mark.parametrize("name", STATES)
def test_state_equals_what_megatron_allocates(built, name):
    """bf16 model, DDP's fp32 gradient buffers, Adam after a step; with the distributed optimizer up to its padding."""
    layout, allocated = STATES[name], built[name]
    found = dataclasses.asdict(state_bytes(shape_of(TINY), layout))
    padding = PADDING if layout.distributed_optimizer else 0
    assert found["weights"] == allocated["weights"]
    assert found["gradients"] <= allocated["gradients"] <= found["gradients"] + 4 * padding
    assert found["optimizer"] <= allocated["optimizer"] <= found["optimizer"] + 12 * padding / layout.data_parallel


@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_ranks_hold_what_megatron_builds(built, rank):
    file, tensor, pipeline, stage = rank
    layout = Layout(tensor_parallel=tensor, pipeline_parallel=pipeline)
    held = rank_parameters(shape_of(file), layout, stage)
    assert (held.bf16 + held.scalars, held.scalars) == (built[rank]["parameters"], built[rank]["scalars"])


def test_ranks_add_up_to_the_model():
    """Every matrix once; T copies of norms and scalars, and a second embedding where it is tied over a pipeline."""
    shape, layout = shape_of("paper-1.1b-xielu.yaml"), Layout(tensor_parallel=4, pipeline_parallel=2)
    ranks = [rank_parameters(shape, layout, stage) for stage in range(2)]
    norms, scalars, embedding = (2 * 24 + 1) * 1536, 48, 147456 * 1536
    assert 4 * sum(rank.bf16 + rank.scalars for rank in ranks) == 1_132_537_392 + 3 * (norms + scalars) + embedding


def test_biases_and_learned_positions():
    """fc1's bias and qkv's are split, those of proj and fc2 and the positions are not."""
    shape = dataclasses.replace(
        SWIGLU, activation="gelu", bias=True, normalization="LayerNorm", learned_positions=40, tied_embeddings=False
    )
    split = 2 * (4 * 64 * 64 + 2 * 64 * 96 + 3 * 64 + 96) + 2 * 256 * 64
    copies = 2 * (4 * 64 + 2 * 64) + 2 * 64 + 40 * 64
    assert rank_parameters(shape, Layout(tensor_parallel=2), 0) == RankParameters(bf16=split // 2 + copies, scalars=0)


def test_papers_models_by_hand():
    """18 bytes a parameter on one GPU, 6 + 12 / DP with the distributed optimizer; scalars 16 and 8 + 8 / DP."""
    swiglu, xielu = (shape_of(f"paper-1.1b-{name}.yaml") for name in ("swiglu", "xielu"))
    assert state_bytes(swiglu, Layout()).total == 18 * 1_132_537_344
    assert state_bytes(xielu, Layout()).total == 18 * 1_132_537_344 + 16 * 48
    assert state_bytes(swiglu, Layout(data_parallel=12)).total == 7 * 1_132_537_344
    assert state_bytes(swiglu, Layout(data_parallel=12, distributed_optimizer=False)).total == 18 * 1_132_537_344


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_parallel": 0}, "--tensor-model-parallel-size: expected an integer of at least 1, got 0"),
        ({"pipeline_parallel": 0}, "--pipeline-model-parallel-size: expected an integer of at least 1, got 0"),
        ({"data_parallel": -1}, "--data-parallel-size: expected an integer of at least 1, got -1"),
        ({"pipeline_parallel": 3}, "--num-layers: expected a multiple of --pipeline-model-parallel-size 3, got 32"),
        ({"tensor_parallel": 5}, "--ffn-hidden-size: expected a multiple of --tensor-model-parallel-size 5, got 21504"),
        ({"tensor_parallel": 64}, "--num-attention-heads: expected a multiple of --tensor-model-parallel-size 64"),
        ({"tensor_parallel": 12}, "--num-attention-heads: expected a multiple of --tensor-model-parallel-size 12"),
    ],
)
def test_impossible_layouts_are_refused(sizes, message):
    with pytest.raises(UserError) as error:
        state_bytes(shape_of("apertus-8b-xielu.yaml"), Layout(**sizes))
    assert str(error.value).startswith(message)


def test_groups_that_ranks_cannot_share_are_refused():
    shape = dataclasses.replace(SWIGLU, num_attention_heads=12, hidden_size=96, num_query_groups=3)
    with pytest.raises(UserError, match=r"--num-query-groups: expected a multiple or divisor of .* 4, got 3"):
        state_bytes(shape, Layout(tensor_parallel=4))
