"""The README's layouts: written by their command, divisible, and within a GPU; the estimate by hand."""

import argparse
from pathlib import Path

import pytest

from megatron_act import preflight_memory
from megatron_act.budget import Shape, parameters
from megatron_act.launch import layouts
from megatron_act.launch.layouts import RECOMMENDED, Recommended
from megatron_act.layout_memory import Layout
from megatron_act.preflight_memory import GIB, Step, checked, gpu_bytes

ROOT = Path(__file__).parents[1]
H, L, F, V, S, HEADS = 64, 8, 192, 1024, 32, 4
SHAPE = Shape(
    hidden_size=H,
    num_layers=L,
    num_attention_heads=HEADS,
    ffn_hidden_size=F,
    activation="xielu",
    activation_scalars=2,
    vocab_size=V,
    seq_length=S,
)
LAYER = 2 * (2 * H + 4 * H) + 2 * (
    2 * H + 2 * F
)  # bf16: norm input and qkv input, q k v and context; norm, fc1; F twice


def test_the_readme_has_the_table() -> None:
    text = (ROOT / "README.md").read_text()
    assert layouts.rendered(text) == text, "run: python -m megatron_act.launch.layouts"
    assert layouts.rendered(text.replace(layouts.table(), "old")) == text


@pytest.mark.parametrize("item", RECOMMENDED, ids=lambda item: f"{item.model}-{item.gpus}")
def test_a_recommended_layout_divides_and_fits(item: Recommended) -> None:
    """With the flags that the table gives, on top of the config: the preflight's own checks."""
    from megatron_act.compat import install_typing_override

    install_typing_override()
    from megatron.training.arguments import add_megatron_arguments

    from megatron_act import arguments, preflight_layout

    parser = arguments.add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    given = item.words()
    args = parser.parse_args([*arguments.config_to_argv(item.flags, parser, given), *given])
    findings = preflight_layout.checks(args, item.gpus)
    assert [finding.line for finding in findings if finding.problem] == []
    assert args.tensor_model_parallel_size == item.tensor <= layouts.GPUS_PER_NODE
    assert (args.pipeline_model_parallel_size, args.micro_batch_size) == (item.pipeline, item.micro_batch)
    assert (args.global_batch_size, args.sequence_parallel) == (item.global_batch, item.sequence_parallel)
    assert item.fits()


def step(**values: object) -> Step:
    return Step(**{"micro_batch": 2, "micro_batches": 16, **values})  # type: ignore[arg-type]


def activations(layout: Layout, **values: object) -> int:
    return gpu_bytes(SHAPE, layout, step(**values)).activations


def test_one_gpu_by_hand() -> None:
    tokens, total = 2 * S, parameters(SHAPE).total - 2 * L
    found = gpu_bytes(SHAPE, Layout(), step())
    assert found.activations == tokens * (L * LAYER + 8 * V)
    assert found.state == 18 * total + 16 * 2 * L
    assert found.total == found.state + found.activations


def test_tensor_parallel_by_hand() -> None:
    """Without sequence parallelism 4 h elements a layer stay whole; with it all are shared."""
    tokens, whole = 2 * S, 2 * 4 * H
    two = Layout(tensor_parallel=2)
    assert activations(two) == tokens * (L * (whole + (LAYER - whole) // 2) + 8 * V // 2)
    assert activations(two, sequence_parallel=True) == tokens * (L * LAYER // 2 + 8 * V // 2)


def test_pipelines_by_hand() -> None:
    """The first stage holds as many micro batches as there are stages or in a step; the last one has its logits."""
    tokens, four = 2 * S, Layout(pipeline_parallel=4)
    assert activations(four) == tokens * LAYER * (L // 4) * 4
    assert activations(four, virtual=2) == tokens * LAYER * (L // 4) * 4 + tokens * LAYER * (L // 4) * 3 // 2
    assert activations(four, micro_batches=1) == tokens * (LAYER * (L // 4) + 8 * V)


def test_what_saves_activations() -> None:
    tokens = 2 * S
    assert activations(Layout(), context_parallel=2) == activations(Layout()) // 2
    assert activations(Layout()) - activations(Layout(), recompute_activation=True) == tokens * L * 2 * F
    assert activations(Layout(), recompute_full=True) == tokens * (L * 2 * H + LAYER + 8 * V)


def test_the_estimate_against_a_device() -> None:
    assert checked("8.9 GiB", int(8.9 * GIB), 10 * GIB).problem == ""
    found = checked("9.1 GiB", int(9.1 * GIB), 10 * GIB)
    assert found.problem.startswith("expected at most 9.0 GiB, 90% of the device, got 9.1 GiB: raise --tensor-model")
    assert preflight_memory.USABLE == 0.9
