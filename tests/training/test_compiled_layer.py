"""torch.compile and CUDA graphs around the activation, its MLP and a whole layer: equal values and gradients."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from device_support import needs_gpu, run_tasks

from megatron_act import graphs

ONE_RANK: dict[str, dict[str, Any]] = {
    "activation": {"part": "activation", "whole": True},
    "activation while gradients are checked": {"part": "activation", "whole": True, "probe": True},
    "MLP": {"part": "mlp", "whole": True},
    "MLP with biases": {"part": "mlp", "whole": True, "bias": True},
    "MLP that recomputes": {"part": "mlp", "recompute": True},
}
# Megatron's own linear layers reduce their gradients asynchronously at TP 2, which ends a graph.
TWO_RANKS: dict[str, dict[str, Any]] = {
    "activation": {"part": "activation", "whole": True},
    "activation while gradients are checked": {"part": "activation", "whole": True, "probe": True},
    "MLP": {"part": "mlp"},
    "layer": {"part": "layer"},
}
TENSORS = {"activation": 4, "MLP": 6, "layer": 12}  # output, input gradient, gradients of all parameters
TOLERANCE = {"aot_eager": 1e-6, "inductor": 1e-4}  # of the largest value of each tensor, fp32
COMPILING = {"TORCHDYNAMO_DISABLE": "0"}


@pytest.fixture(scope="module", params=[("cpu", "aot_eager"), needs_gpu(("cuda", "inductor"))])
def one_rank(request: pytest.FixtureRequest) -> dict[str, Any]:
    device, backend = request.param
    wanted = {"compiled": {"backend": backend, "cases": ONE_RANK}, "graphs": {}}
    return {"tolerance": TOLERANCE[backend], **run_tasks(device, wanted, **COMPILING)}


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Any]:
    wanted = {"compiled": {"backend": "aot_eager", "cases": TWO_RANKS}}
    return run_tasks("cpu", wanted, ranks=2, **COMPILING)["compiled"]


@pytest.mark.parametrize("case", ONE_RANK)
def test_compiled_parts_compute_the_same(one_rank: dict[str, Any], case: str) -> None:
    """In one graph where there is no recomputation, which would not compile otherwise."""
    result = one_rank["compiled"][case]
    assert result["difference"] <= one_rank["tolerance"]
    assert result["graphs"] == 1
    assert result["tensors"] == TENSORS[case.split()[0]] + ("biases" in case)


@pytest.mark.distributed
@pytest.mark.parametrize("case", TWO_RANKS)
def test_compiled_parts_compute_the_same_on_two_ranks(two_ranks: dict[str, Any], case: str) -> None:
    """The scalars' sum over the ranks is in the compiled backward pass."""
    assert two_ranks[case]["difference"] <= TOLERANCE["aot_eager"]
    assert two_ranks[case]["tensors"] == TENSORS[case.split()[0]]


def test_the_first_steps_check_sees_compiled_gradients(one_rank: dict[str, Any]) -> None:
    ordinary, compiled = one_rank["compiled"]["activation while gradients are checked"]["probes"]
    assert compiled == pytest.approx(ordinary, rel=one_rank["tolerance"])
    assert min(map(abs, ordinary)) > 1e-3


def test_recomputation_keeps_its_memory_when_compiled(one_rank: dict[str, Any]) -> None:
    kept, compiled = one_rank["compiled"]["MLP that recomputes"]["bytes"]
    assert compiled == kept
    assert one_rank["compiled"]["MLP"]["bytes"][0] - kept == 8 * 2 * 96 * 4  # tokens, ffn, bytes of an fp32


def test_captured_mlp_computes_the_same(one_rank: dict[str, Any]) -> None:
    """A replay on new data: the whole pass in one graph, and through ``make_graphed_callables``; on a CPU no graphs."""
    assert one_rank["graphs"] == pytest.approx({"graph": 0, "callables": 0}, abs=1e-5)


def arguments(**given: Any) -> Namespace:
    none = {"cuda_graph_impl": "none", "cuda_graph_modules": [], "cuda_graph_scope_deprecated": None}
    return Namespace(**{**none, "enable_cuda_graph": False, "external_cuda_graph": False, **given})


ATTENTION = SimpleNamespace(name="attn")  # an entry of Megatron's enumeration
MLP = SimpleNamespace(name="mlp")
CAPTURES = {
    "--cuda-graph-impl local": arguments(cuda_graph_impl="local"),
    "--cuda-graph-impl transformer_engine": arguments(
        cuda_graph_impl="transformer_engine", cuda_graph_modules=[ATTENTION, MLP]
    ),
    "--cuda-graph-impl full_iteration": arguments(cuda_graph_impl="full_iteration"),
    "--enable-cuda-graph": arguments(enable_cuda_graph=True, cuda_graph_scope_deprecated=[MLP]),
    "--external-cuda-graph": arguments(external_cuda_graph=True),
    "--cuda-graph-modules full_iteration": arguments(cuda_graph_modules=["full_iteration"]),
}
LEAVES_OUT = (
    arguments(),
    arguments(cuda_graph_modules=["full"]),
    arguments(cuda_graph_impl="local", cuda_graph_modules=[ATTENTION]),
    arguments(enable_cuda_graph=True, cuda_graph_scope_deprecated=[ATTENTION]),
    Namespace(),  # a configuration of a Megatron without these fields
)


@pytest.mark.parametrize("flag", CAPTURES)
def test_graphs_that_capture_the_mlp_are_refused(flag: str) -> None:
    why = graphs.conflict(CAPTURES[flag])
    assert why and why.startswith(f"{flag}: ") and "--cuda-graph-modules attn" in why


@pytest.mark.parametrize("settings", LEAVES_OUT)
def test_graphs_that_leave_the_mlp_out_are_not_refused(settings: Namespace) -> None:
    assert graphs.conflict(settings) is None
