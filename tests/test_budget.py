"""Counts of parameters, FLOPs and bytes, against models that Megatron-Core builds and the papers' published figures."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_act.budget import Shape, flops, padded_vocab_size, parameters
from megatron_act.errors import UserError
from megatron_act.layout_memory import Layout, state_bytes
from megatron_act.memory import activation_bytes

ROOT = Path(__file__).resolve().parents[1]
SMALL = Shape(
    hidden_size=64,
    num_layers=2,
    num_attention_heads=4,
    ffn_hidden_size=96,
    activation="swiglu",
    vocab_size=256,
    seq_length=32,
)
SHAPES = {
    "swiglu": SMALL,
    "geglu, untied": dataclasses.replace(SMALL, activation="geglu", tied_embeddings=False),
    "gelu, GQA": dataclasses.replace(SMALL, activation="gelu", num_query_groups=2),
    "relu2, MQA, QK-norm": dataclasses.replace(SMALL, activation="relu2", num_query_groups=1, qk_layernorm=True),
    "xielu, QK-norm": dataclasses.replace(SMALL, activation="xielu", activation_scalars=2, qk_layernorm=True),
    "crrelu, wide heads": dataclasses.replace(SMALL, activation="crrelu", activation_scalars=1, kv_channels=24),
    "swiglu, qkv bias": dataclasses.replace(SMALL, qkv_bias=True, num_query_groups=2),
    "swiglu, LayerNorm, biases": dataclasses.replace(
        SMALL, normalization="LayerNorm", bias=True, qk_layernorm=True, learned_positions=40
    ),
    "gelu, biases, untied": dataclasses.replace(
        SMALL, activation="gelu", bias=True, tied_embeddings=False, num_layers=3
    ),
}
# dense first layer, then top-2 of 4 experts of width 64 with a shared expert of width 32
EXPERTS = {"count": 4, "topk": 2, "width": 64, "shared_width": 32, "pattern": (0, 1)}
MIXTURES = {
    "geglu experts, untied": SHAPES["geglu, untied"],
    "xielu experts, GQA": dataclasses.replace(SHAPES["xielu, QK-norm"], num_query_groups=2),
}
PAPER = {"num_attention_heads": 16, "vocab_size": 147456}
PAPER_1B = {"hidden_size": 1536, "num_layers": 24, "tied_embeddings": True, **PAPER}
PAPER_3B = {"hidden_size": 2048, "num_layers": 36, "tied_embeddings": False, **PAPER}


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, float]]:
    """What Megatron-Core built and torch counted for SHAPES and MIXTURES, measured in a process of its own."""
    dense = [dataclasses.asdict(shape) for shape in SHAPES.values()]
    mixtures = [dataclasses.asdict(shape) | {"experts": EXPERTS} for shape in MIXTURES.values()]
    shapes = json.dumps(dense + mixtures)
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "built_gpt.py")]
    result = subprocess.run(command, input=shapes, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return dict(zip([*SHAPES, *MIXTURES], json.loads(result.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_equal_a_built_model(built, name):
    assert parameters(SHAPES[name]).total == built[name]["parameters"]


@pytest.mark.parametrize("name", SHAPES)
def test_full_attention_flops_equal_torch_counter(built, name):
    cost = flops(SHAPES[name])
    assert cost.forward(causal=False) == built[name]["forward"]
    assert cost.training(causal=False) == built[name]["training"]


@pytest.mark.parametrize("name", SHAPES)
def test_causal_flops_equal_what_megatron_logs(built, name):
    assert flops(SHAPES[name]).training() == built[name]["megatron_training"]


@pytest.mark.parametrize("name", MIXTURES)
def test_megatron_counts_the_chosen_experts_and_the_shared_one(built, name):
    """Three matrices an expert with a gate, two without; torch sees the router too, which Megatron leaves out."""
    shape = MIXTURES[name]
    mlp = 2 * shape.mlp_matrices * shape.hidden_size  # FLOPs per token and feature of the MLP's width, forward
    experts = mlp * (EXPERTS["topk"] * EXPERTS["width"] + EXPERTS["shared_width"] - shape.ffn_hidden_size)
    router = 2 * shape.hidden_size * EXPERTS["count"]
    assert built[name]["megatron_training"] == 3 * (flops(shape).forward() + experts)
    assert built[name]["forward"] == flops(shape).forward(causal=False) + experts + router
    assert built[name]["training"] == 3 * built[name]["forward"]


@pytest.mark.parametrize("name", ["swiglu", "geglu, untied", "gelu, GQA"])
def test_state_bytes_equal_megatrons_estimate(built, name):
    """It knows no biases, QK-norm or scalars, and spreads the final norm over the pipeline: the last stage holds it."""
    layout = Layout(tensor_parallel=2, pipeline_parallel=2, data_parallel=4)
    apart = SMALL.hidden_size // 2 * (6 + 12 // 4)
    assert state_bytes(SHAPES[name], layout).total == built[name]["megatron_state_bytes_tp2_pp2_dp4"] + apart


@pytest.mark.parametrize(
    ("sizes", "gated_width", "published", "scalars"),
    [(PAPER_1B, 6144, 1_132_537_344, 48), (PAPER_3B, 8192, 3_020_048_384, 72)],
)
def test_published_parameter_counts(sizes, gated_width, published, scalars):
    swiglu = parameters(Shape(activation="swiglu", ffn_hidden_size=gated_width, **sizes))
    xielu = parameters(Shape(activation="xielu", activation_scalars=2, ffn_hidden_size=gated_width * 3 // 2, **sizes))
    assert swiglu.total == published
    assert xielu.total == published + scalars
    assert xielu.matmul == swiglu.matmul


def test_without_embeddings_leaves_out_exactly_the_vocabulary():
    untied = dataclasses.replace(SMALL, tied_embeddings=False, learned_positions=40)
    counts = parameters(untied)
    assert counts.total - counts.without_embeddings == (256 + 256 + 40) * 64
    assert parameters(dataclasses.replace(untied, vocab_size=0, learned_positions=0)).total == counts.without_embeddings


def test_activation_bytes_equal_what_autograd_saves():
    """linear, exact GELU, linear: autograd keeps the input, the pre-activation and the output of the activation."""
    shape = dataclasses.replace(SMALL, activation="gelu")
    fc1, fc2 = (torch.nn.Linear(*sizes, bias=False) for sizes in ((64, 96), (96, 64)))
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    x = torch.randn(7, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fc2(torch.nn.functional.gelu(fc1(x)))
    weights = {fc1.weight.data_ptr(), fc2.weight.data_ptr()}
    per_token = sum(size for pointer, size in saved.items() if pointer not in weights) / 7
    norm_input = 4 * 64  # saved by the norm before the MLP, which is not part of this network
    assert activation_bytes(shape, element_bytes=4).mlp == per_token + norm_input


def test_activation_bytes_by_hand():
    xielu = dataclasses.replace(SMALL, activation="xielu", ffn_hidden_size=144, num_query_groups=2, qk_layernorm=True)
    # bf16: two norms and two matmul inputs of h; q + k + v; q and k again before their norm; attention output
    attention = 2 * (2 * 64 + (64 + 32 + 32) + (64 + 32) + 64)
    assert activation_bytes(xielu).attention == attention
    assert activation_bytes(xielu).mlp == 2 * (2 * 64 + 2 * 144)
    assert activation_bytes(xielu, recompute_activation=True).total == attention + 2 * (2 * 64 + 144)
    # FP8: 144 features are two blocks with an fp32 scale each
    assert activation_bytes(xielu, fp8_input=True).total == attention + 2 * (2 * 64 + 144) + 144 + 2 * 4
    matched = activation_bytes(SMALL).mlp
    assert matched == 2 * (2 * 64 + 3 * 96) == activation_bytes(xielu).mlp


def test_fp8_pre_activation_takes_what_the_fp8_table_says():
    from megatron_act.fp8_bytes import STORED

    shape = dataclasses.replace(SMALL, activation="relu2", ffn_hidden_size=9216)
    saved = activation_bytes(shape).mlp - activation_bytes(shape, fp8_input=True).mlp
    assert saved == (2 - STORED) * 9216


@pytest.mark.parametrize(
    ("vocab", "divisible_by", "tensor_parallel", "padded"),
    [(50257, 128, 1, 50304), (50257, 128, 8, 51200), (147456, 128, 2, 147456), (0, 128, 2, 0), (5, 1, 1, 5)],
)
def test_padded_vocab_size(vocab, divisible_by, tensor_parallel, padded):
    assert padded_vocab_size(vocab, divisible_by, tensor_parallel) == padded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "--hidden-size: expected an integer of at least 1, got 0"),
        ({"num_layers": "2"}, "--num-layers: expected an integer of at least 1, got '2'"),
        ({"num_attention_heads": 5}, "--hidden-size: expected a multiple of --num-attention-heads 5, got 64"),
        ({"num_query_groups": 3}, "--num-attention-heads: expected a multiple of --num-query-groups 3, got 4"),
        ({"normalization": "L2Norm"}, "--normalization: expected one of RMSNorm, LayerNorm, got 'L2Norm'"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(UserError) as error:
        dataclasses.replace(SMALL, **change)
    assert str(error.value).startswith(message)


def test_counting_loads_neither_torch_nor_megatron():
    modules = "match, match_table, layout_memory, model_args, hf_args, config_files"
    code = f"import sys; from megatron_act import {modules}; "
    code += "print(sorted({'torch', 'triton', 'megatron'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
