"""Every layer's scalars, and their gradients, of the whole model on the rank that writes them down."""

from typing import Any

import torch
from megatron.core import mpu

from megatron_act.activation import TrainableActivation, activations_of

ByLayer = dict[str, list[float]]
Pairs = dict[str, tuple[float, float | None]]  # label -> effective value, gradient of the raw one


def gather(
    models: list[Any], pipeline_size: int, gradients: dict[int, torch.Tensor] | None = None
) -> tuple[ByLayer, ByLayer]:
    """Effective scalars of the whole model by name, one value per layer that has it in depth order; their gradients.

    In a mixture of experts, shared experts' are named ``shared_experts.NAME``, an expert's own ``expert_3.NAME``.
    Collective over the pipeline that the last rank belongs to; every other rank returns nothing, at no cost (with
    scalars per expert: collective over expert-parallel ranks too). One copy from the device, however many layers.

    Args:
        models: this rank's model chunks.
        pipeline_size: number of pipeline stages.
        gradients: of the raw scalars by ``id`` (`scalar_gradients.gradients`); what is absent is left out.
    """
    group = mpu.get_pipeline_model_parallel_group()
    modules = activations_of(models)
    heard = torch.distributed.get_world_size() - 1 in torch.distributed.get_process_group_ranks(group)
    spread = mpu.get_expert_model_parallel_world_size() > 1 and any(m.role.startswith("expert_") for m in modules)
    here = _by_layer(modules, gradients or {}) if heard or spread else []
    if spread:
        here = _with_other_experts(here)
    if not heard:
        return {}, {}
    stages: list[Any] = [here]
    if pipeline_size > 1:
        stages = [None] * pipeline_size
        torch.distributed.all_gather_object(stages, here, group=group)
    return _by_name([pair for stage in stages for pair in stage])


def _by_name(layers: list[tuple[int, Pairs]]) -> tuple[ByLayer, ByLayer]:
    layers = sorted(layers, key=lambda pair: pair[0])
    names = {name: None for _, pairs in layers for name in pairs}  # in order of appearance
    columns = {name: [pairs[name] for _, pairs in layers if name in pairs] for name in names}
    values = {name: [value for value, _ in column] for name, column in columns.items()}
    known = {name: [grad for _, grad in column if grad is not None] for name, column in columns.items()}
    return values, {name: grads for name, grads in known.items() if len(grads) == len(columns[name])}


def _with_other_experts(here: list[tuple[int, Pairs]]) -> list[tuple[int, Pairs]]:
    """This rank's scalars and those of the experts of its expert-parallel peers; collective over these."""
    peers: list[Any] = [None] * mpu.get_expert_model_parallel_world_size()
    torch.distributed.all_gather_object(peers, here, group=mpu.get_expert_model_parallel_group())
    return list({(layer, *pairs): (layer, pairs) for peer in peers for layer, pairs in peer}.values())


def _by_layer(modules: list[TrainableActivation], gradients: dict[int, torch.Tensor]) -> list[tuple[int, Pairs]]:
    raws = [raw for module in modules for raw in module.raw_scalars()]
    known = [raw for raw in raws if id(raw) in gradients]
    tensors = [raw.detach() for raw in raws] + [gradients[id(raw)] for raw in known]
    numbers = torch.cat(tensors).tolist() if tensors else []
    grads = dict(zip(map(id, known), numbers[len(raws) :], strict=True))
    pairs = iter(zip(numbers, [grads.get(id(raw)) for raw in raws], strict=False))
    return [(module.layer_number, _pairs_of(module, pairs)) for module in modules]


def _pairs_of(module: TrainableActivation, pairs: Any) -> Pairs:
    found: Pairs = {}
    for param in module.activation.params:
        raw, grad = next(pairs)
        found[f"{module.role}.{param.name}" if module.role else param.name] = (param.effective(raw), grad)
    return found
