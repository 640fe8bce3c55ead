"""The files of configs/: what the compute match makes of each baseline, built by Megatron, with the papers' figures."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from build_support import build

from megatron_act import config_files, model_args
from megatron_act.budget import flops, parameters
from megatron_act.config_files import ACTIVATIONS
from megatron_act.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCALARS = {"xielu": 2, "crrelu": 1, "relu2": 0, "gelu": 0}
SEQUENCE = 128  # tokens of the forward pass whose FLOPs torch counts
# Parameters without scalars, MLP widths with a gate and without, layers.
PUBLISHED = {
    "paper-1.1b": (1_132_537_344, 6144, 9216, 24),  # arXiv 2411.13010
    "paper-3b": (3_020_048_384, 8192, 12288, 36),
    "apertus-8b": (8_053_338_112, 14336, 21504, 32),  # arXiv 2509.14233: widths; the count is transformers' model's
    "apertus-70b": (70_599_864_320, 28672, 43008, 80),
    "llama-3-8b": (8_030_261_248, 14336, 21504, 32),  # arXiv 2407.21783
    "350m": (359_845_888, 2816, 4224, 24),  # derived: tests/test_budget.py compares the formula with built models
    "125m": (123_588_864, 2048, 3072, 12),
    "tiny": (2_098_560, 512, 768, 4),
}
# arXiv 2411.13010 and its authors' configs: the hyper-parameters of both sizes, then those in which they differ.
PAPER = {
    "--num-attention-heads": 16, "--padded-vocab-size": 147456, "--seq-length": 4096, "--micro-batch-size": 5,
    "--adam-beta1": 0.9, "--adam-beta2": 0.95, "--adam-eps": 1e-8, "--weight-decay": 0.1, "--clip-grad": 1.0,
    "--init-method-std": 0.025, "--normalization": "RMSNorm", "--norm-epsilon": 1e-6, "--rotary-base": 500000,
    "--seed": 42, "--lr-decay-style": "WSD", "--lr-wsd-decay-style": "minus_sqrt", "--min-lr": 0.0,
    "--lr-warmup-iters": 2000, "--hidden-dropout": 0.0, "--attention-dropout": 0.0, "--disable-bias-linear": True,
    "--position-embedding-type": "rope", "--bf16": True, "--accumulate-allreduce-grads-in-fp32": True,
}  # fmt: skip
PAPER_SIZES = {
    "paper-1.1b": {
        "--hidden-size": 1536, "--num-layers": 24, "--global-batch-size": 440, "--train-iters": 70000,
        "--lr-decay-iters": 70000, "--lr-wsd-decay-iters": 70000 - 55500, "--lr": 8e-4,
        "--tensor-model-parallel-size": 1, "--untie-embeddings-and-output-weights": None,
    },
    "paper-3b": {
        "--hidden-size": 2048, "--num-layers": 36, "--global-batch-size": 640, "--train-iters": 48000,
        "--lr-decay-iters": 48000, "--lr-wsd-decay-iters": 48000 - 38000, "--lr": 7e-4,
        "--tensor-model-parallel-size": 2, "--untie-embeddings-and-output-weights": True,
    },
}  # fmt: skip
PARSE_ALL = """
import argparse, json, sys
from megatron_act.compat import install_typing_override
install_typing_override()
from megatron.training.arguments import add_megatron_arguments
from megatron_act import arguments, model_args
parser = arguments.add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
for path in sys.argv[1:]:
    flags = model_args.read(path)
    parsed = vars(parser.parse_args(arguments.config_to_argv(flags, parser, [])))
    actions = parser._option_string_actions
    switches = {flag for flag in flags if actions[flag].nargs == 0}
    print(json.dumps({flag: actions[flag].const if flag in switches else flags[flag] for flag in flags}))
    print(json.dumps({flag: parsed[actions[flag].dest] for flag in flags}))
"""
MODELS = [(name, activation) for name in PUBLISHED for activation in ACTIVATIONS]
COUNTED = [*(model for model in MODELS if model[0] == "tiny"), ("paper-1.1b", "swiglu"), ("paper-1.1b", "xielu")]


def path_of(name, activation):
    return ROOT / "configs" / f"{name}-{activation}.yaml"


def shape_of(name, activation):
    return model_args.shape(model_args.read(path_of(name, activation)), SCALARS)


@pytest.fixture(scope="module")
def built():
    """Every config's whole model as Megatron-Core builds it, on the meta device."""
    jobs = [{"config": str(path_of(*model)), **({"flops": SEQUENCE} if model in COUNTED else {})} for model in MODELS]
    return dict(zip(MODELS, build(jobs), strict=True))


def test_models_are_those_of_the_folder():
    assert config_files.names() == sorted(PUBLISHED)
    ours = {path_of(*model) for model in MODELS}
    assert {path for path in CONFIGS if not path.name.startswith("fp8_")} == ours


@pytest.mark.parametrize(("name", "activation"), MODELS)
def test_megatron_builds_the_published_model(built, name, activation):
    count, gated, plain, layers = PUBLISHED[name]
    scalars = layers * SCALARS.get(activation, 0)
    model = built[name, activation]
    assert (model["parameters"], model["scalars"]) == (count + scalars, scalars)
    assert parameters(shape_of(name, activation)).total == count + scalars
    assert shape_of(name, activation).ffn_hidden_size == (gated if activation == "swiglu" else plain)


@pytest.mark.parametrize(("name", "activation"), COUNTED)
def test_torch_counts_equal_flops_in_a_model(built, name, activation):
    flags = {**model_args.read(path_of(name, activation)), "--seq-length": SEQUENCE}
    counted = flops(model_args.shape(flags, SCALARS)).forward(causal=False)
    assert counted == built[name, activation]["flops"] == built[name, "swiglu"]["flops"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_are_what_the_compute_match_writes(name, tmp_path, monkeypatch):
    """Byte for byte, from the baseline's file; edit that one, then write the others again with this command."""
    output = str(tmp_path / f"{name}-{{activation}}.yaml")
    words = ["tools/compute_match.py", "--model", name, "--activation", *ACTIVATIONS, "--output", output]
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", words)
    assert runpy.run_path(str(ROOT / words[0]))["main"]() == 0
    for activation in ACTIVATIONS:
        assert (tmp_path / f"{name}-{activation}.yaml").read_text() == path_of(name, activation).read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_a_model_differ_in_the_mlp_only(name):
    gated = shape_of(name, "swiglu")
    others = [model_args.with_mlp(model_args.read(path_of(name, each)), "relu2", 0) for each in ACTIVATIONS]
    assert all(flags == others[0] for flags in others)
    for activation in ACTIVATIONS:
        shape = shape_of(name, activation)
        assert shape.activation == activation
        assert parameters(shape).matmul == parameters(gated).matmul
        assert flops(shape) == flops(gated)


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_papers_hyper_parameters(name):
    for activation in ACTIVATIONS:
        flags = model_args.read(path_of(name, activation))
        wanted = {**PAPER, **PAPER_SIZES[name]}
        assert {flag: flags.get(flag) for flag in wanted} == wanted
        tokens = flags["--train-iters"] * flags["--global-batch-size"] * flags["--seq-length"]
        assert tokens == {"paper-1.1b": 126_156_800_000, "paper-3b": 125_829_120_000}[name]


def test_every_config_is_understood_by_megatron():
    """Each key is a flag of Megatron or ours, and Megatron's parser reads the value that the file means.

    Of a model's files two: the others differ in the activation's name.
    """
    files = [path for path in CONFIGS if path.name.startswith("fp8_") or path.stem.endswith(("-swiglu", "-xielu"))]
    command = [sys.executable, "-W", "ignore", "-c", PARSE_ALL, *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2 * len(files) >= 32
    for wanted, parsed in zip(lines[::2], lines[1::2], strict=True):
        assert json.loads(parsed) == json.loads(wanted)


def test_named_models():
    assert config_files.named("tiny") == path_of("tiny", "swiglu")
    assert config_files.named("paper-3b", "xielu") == path_of("paper-3b", "xielu")
    with pytest.raises(UserError, match=r"--model: expected one of 125m, .*, got 'paper-1b'; did you mean paper-1"):
        config_files.named("paper-1b")
    with pytest.raises(UserError, match=r"tiny-xiprelu.yaml: expected a config, got none: write it with tools"):
        config_files.named("tiny", "xiprelu")


def test_written_flags_read_back(tmp_path):
    flags = {"--hidden-size": 64, "--lr": 1e-06, "--swiglu": True, "--lr-decay-style": "WSD", "--list": [1, 2]}
    file = tmp_path / "a.yaml"
    config_files.write(file, flags, "first\nsecond")
    assert model_args.read(file) == flags
    assert file.read_text().startswith("# first\n# second\nMODEL_ARGS:\n")
    assert config_files.header_of(file.read_text()) == "first\nsecond"


def test_written_flags_keep_the_comments_and_the_writing_of_their_source(tmp_path):
    like = "# header\nMODEL_ARGS:\n  # one\n  --lr: 1.0e-5  # peak\n  --list: [1,\n    2]\n  # two\n  --seed: 7\n"
    file = tmp_path / "a.yaml"
    config_files.write(file, {"--lr": 1e-5, "--list": [1, 2], "--seed": 8, "--new": 1}, "mine", like)
    assert model_args.read(file) == {"--lr": 1e-5, "--list": [1, 2], "--seed": 8, "--new": 1}
    lines = ["# mine", "MODEL_ARGS:", "  # one", "  --lr: 1.0e-5  # peak", "  --list:", "  - 1", "  - 2"]
    assert file.read_text().splitlines() == [*lines, "  # two", "  --seed: 8", "  --new: 1"]
