"""Gradients of the scalars of one MoE layer, after Megatron's DDP, against an unsharded fp64 layer of plain torch.

Run under torchrun with 4 ranks. Every layout of ``LAYOUTS``, with shared scalars and with one set per expert, as it is
and with each of ``MUTANTS``. Rank 0 prints one JSON list of cases with every rank's gradients beside the truth.
"""

import json
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from megatron_act import cpu_backend

cpu_backend.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402

from megatron_act import activation, specs  # noqa: E402
from megatron_act.activation import activations_of  # noqa: E402
from megatron_act.kernels import api as kernels  # noqa: E402

NAME = "xielu"
HIDDEN, FFN, SEQUENCE, BATCH, EXPERTS, TOPK = 16, 24, 8, 4, 4, 2
UNUSED = 3  # the expert that no token chooses


@dataclass(frozen=True)
class Layout:
    tp: int
    ep: int
    etp: int
    dispatcher: str


LAYOUTS = (
    Layout(1, 1, 1, "allgather"),
    Layout(1, 2, 1, "allgather"),
    Layout(1, 2, 1, "alltoall"),
    Layout(1, 4, 1, "alltoall"),
    Layout(2, 1, 2, "allgather"),
    Layout(2, 2, 1, "alltoall"),
    Layout(2, 1, 1, "alltoall"),
    Layout(2, 2, 2, "allgather"),
    Layout(2, 4, 1, "alltoall"),
    Layout(1, 2, 2, "allgather"),
)
GROUPED_LAYOUTS = tuple(layout for layout in LAYOUTS if layout.etp == 1 and layout.tp <= layout.ep)
MUTANTS = ("none", "no tensor sum", "other buffer", "also over experts")


def problem() -> dict[str, torch.Tensor]:
    """Weights of the unsharded layer, its input and output gradient in fp64, the same on every rank."""
    rng = torch.Generator().manual_seed(11)
    shapes = {
        "router": (EXPERTS, HIDDEN),
        "w1": (EXPERTS, FFN, HIDDEN),
        "w2": (EXPERTS, HIDDEN, FFN),
        "shared_w1": (FFN, HIDDEN),
        "shared_w2": (HIDDEN, FFN),
        "x": (SEQUENCE, BATCH, HIDDEN),
        "grad": (SEQUENCE, BATCH, HIDDEN),
    }
    made = {name: torch.randn(shape, generator=rng).double() for name, shape in shapes.items()}
    made["x"][..., 0] = 1
    made["router"][UNUSED, 0] = -1000
    return made


def raw_values(expert: int | None) -> list[float]:
    """A scalar set; sets of different experts differ, so that mixing them up shows."""
    return [param.raw_init + 0.1 * (0 if expert is None else expert + 1) for param in kernels.get(NAME).params]


def truth(given: dict[str, torch.Tensor], per_expert: bool) -> dict[str, list[float]]:
    """Gradients of the raw scalars by set: ``shared experts``, then ``layer`` or ``expert 0``..."""
    names = [f"expert {i}" for i in range(EXPERTS)] if per_expert else ["layer"]
    leaves = {
        name: [torch.tensor([value], dtype=torch.float64).requires_grad_() for value in raw_values(number)]
        for name, number in [("shared experts", None), *((n, int(n[7:]) if per_expert else None) for n in names)]
    }
    function, x = kernels.get(NAME), given["x"].reshape(-1, HIDDEN)
    top = (x @ given["router"].T).topk(TOPK, dim=-1)
    weights = torch.zeros(len(x), EXPERTS).double()
    weights.scatter_(
        1, top.indices, F.softmax(top.values, dim=-1, dtype=torch.float32).double()
    )  # as Megatron's router
    output = function.reference(x @ given["shared_w1"].T, *leaves["shared experts"]) @ given["shared_w2"].T
    for i in range(EXPERTS):
        raws = leaves[f"expert {i}" if per_expert else "layer"]
        y = function.reference(x @ given["w1"][i].T, *raws) @ given["w2"][i].T
        output = output + weights[:, i : i + 1] * y
    (output * given["grad"].reshape(-1, HIDDEN)).sum().backward()
    return {name: [float(leaf.grad) for leaf in raws] for name, raws in leaves.items()}


def start(layout: Layout) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


class GroupedLinear(torch.nn.Module):
    """What TEGroupedMLP needs of Transformer Engine's grouped GEMM, by plain torch: one weight per local expert."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(experts, outputs, inputs))
        self.weight.allreduce = config.expert_model_parallel_size == config.tensor_model_parallel_size == 1

    def forward(self, x: torch.Tensor, tokens: list[int]) -> tuple[torch.Tensor, None]:
        return torch.cat([part @ w.T for part, w in zip(x.split(tokens), self.weight, strict=True)]), None


def build(layout: Layout, per_expert: bool, grouped: bool) -> Any:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=2 * FFN,  # of dense layers; there are none
        moe_ffn_hidden_size=FFN,
        moe_shared_expert_intermediate_size=FFN,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type=layout.dispatcher,
        add_bias_linear=False,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.tp > 1,
    )
    stock = ModuleSpec(module=TransformerLayer, submodules=get_gpt_layer_local_submodules(num_experts=EXPERTS))
    if grouped:
        linears = GroupedMLPSubmodules(GroupedLinear, GroupedLinear)
        stock.submodules.mlp.keywords["submodules"].experts = partial(TEGroupedMLP, submodules=linears)
    spec = specs.with_activation(stock, NAME, config, per_expert=per_expert)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = spec.submodules.mlp(config=config, pg_collection=groups, is_mtp_layer=False)
    layer.set_layer_number(1)
    return layer.double()


def shard(weight: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    return weight.chunk(size, dim)[rank]


@torch.no_grad()
def fill(layer: Any, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Copies the problem's weights into the layer; returns its scalar sets by name."""
    tp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    etp = parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()
    layer.router.weight.copy_(given["router"])
    layer.shared_experts.linear_fc1.weight.copy_(shard(given["shared_w1"], 0, *tp))
    layer.shared_experts.linear_fc2.weight.copy_(shard(given["shared_w2"], 1, *tp))
    sets = {"shared experts": layer.shared_experts.activation_func}
    if isinstance(layer.experts, TEGroupedMLP):
        layer.experts.linear_fc1.weight.copy_(given["w1"][layer.local_expert_indices])
        layer.experts.linear_fc2.weight.copy_(given["w2"][layer.local_expert_indices])
        return fill_scalars({**sets, "layer": layer.activation_func})
    for number, expert in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
        expert.linear_fc1.weight.copy_(shard(given["w1"][number], 0, *etp))
        expert.linear_fc2.weight.copy_(shard(given["w2"][number], 1, *etp))
        own = expert.activation_func is not getattr(layer, "activation_func", None)
        sets[f"expert {number}" if own else "layer"] = expert.activation_func
    return fill_scalars(sets)


def fill_scalars(sets: dict[str, Any]) -> dict[str, Any]:
    for name, module in sets.items():
        values = raw_values(int(name[7:]) if name.startswith("expert") else None)
        for raw, value in zip(module.raw_scalars(), values, strict=True):
            raw.fill_(value)
    return sets


def gradients(
    layout: Layout, per_expert: bool, mutant: str, given: dict[str, torch.Tensor], grouped: bool = False
) -> dict[str, list[float]]:
    """This rank's reduced gradients, in the truth's units (Megatron divides by the data-parallel size)."""
    layer = build(layout, per_expert, grouped)
    sets = fill(layer, given)
    mutate(layer, mutant)
    options = DistributedDataParallelConfig(overlap_grad_reduce=True)  # asserts that every parameter has a gradient
    model = DistributedDataParallel(layer.config, options, layer)
    model.zero_grad_buffer()
    dp = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    tp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    x, grad = (shard(shard(given[key], 1, *dp), 0, *tp) for key in ("x", "grad"))
    output, _ = model(x.clone().requires_grad_())
    torch.autograd.backward((output * grad).sum())  # Tensor.backward would switch the CPU backend off inside
    model.finish_grad_sync()
    return {name: [float(raw.main_grad) * dp[1] for raw in module.raw_scalars()] for name, module in sets.items()}


def mutate(layer: Any, mutant: str) -> None:
    kept = activation.__dict__.setdefault("_kept_sum", activation.sum_gradients_over_group)
    activation.sum_gradients_over_group = kept
    if mutant == "no tensor sum":
        activation.sum_gradients_over_group = lambda scalars, group: tuple(scalars)
    for module in activations_of(layer.experts) + [m for m in [getattr(layer, "activation_func", None)] if m]:
        if mutant == "also over experts":
            module.tp_group = parallel_state.get_expert_tensor_and_model_parallel_group()
        if mutant == "other buffer":
            for raw in module.raw_scalars():
                raw.allreduce = not getattr(raw, "allreduce", True)


def main() -> None:
    torch.distributed.init_process_group("gloo")
    given, cases = problem(), []
    for layout in LAYOUTS:
        start(layout)
        todo = [(per_expert, mutant, False) for per_expert, mutant in product((False, True), MUTANTS)]
        if layout in GROUPED_LAYOUTS:
            todo.append((False, "none", True))
        for per_expert, mutant, grouped in todo:
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, gradients(layout, per_expert, mutant, given, grouped))
            kind = {"per_expert": per_expert, "mutant": mutant, "grouped": grouped}
            cases.append({**vars(layout), **kind, "ranks": everyone, "truth": truth(given, per_expert)})
    if torch.distributed.get_rank() == 0:
        print("REPORT " + json.dumps(cases), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
