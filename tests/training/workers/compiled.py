"""Tasks: parts of a layer under torch.compile and inside CUDA graphs against the same parts run as they are."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from small_gpt import Variant, causal_mask, settings, spread_scalars

from megatron_act import specs
from megatron_act.activation import activations_of
from megatron_act.parallel import GradientProbe

LENGTH, BATCH = 8, 2
Gradients = list[torch.Tensor]


class FirstOutput(torch.nn.Module):
    """A part of a layer with what follows from its input alone: no mask to give, no bias to take."""

    def __init__(self, part: Any, **arguments: Any) -> None:
        super().__init__()
        self.part, self.arguments = part, arguments

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.part(x, **self.arguments)
        return result[0] if isinstance(result, tuple) else result


def build(device: str, part: str, recompute: bool = False, bias: bool = False) -> FirstOutput:
    """A layer, its MLP or its activation, the same weights at every call."""
    torch.manual_seed(5)
    size = parallel_state.get_tensor_model_parallel_world_size()
    fields = {"add_bias_linear": bias, "bias_dropout_fusion": False, "tensor_model_parallel_size": size}
    config = settings(Variant(config={**fields, "gradient_accumulation_fusion": False}), device)
    stock = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    spec = specs.with_activation(stock, "xielu", config, recompute=recompute)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = build_module(spec, config=config, layer_number=1, pg_collection=groups).to(device)
    spread_scalars(layer)
    if part == "layer":
        return FirstOutput(layer, attention_mask=causal_mask(LENGTH, device))
    return FirstOutput(layer.mlp if part == "mlp" else layer.mlp.activation_func)


def data(device: str, model: FirstOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """An input and an output gradient, other ones at every call."""
    inside = model.part in activations_of(model)  # the activation alone sees this rank's slice of the ffn dimension
    width = 96 // parallel_state.get_tensor_model_parallel_world_size() if inside else 64
    x, grad = torch.randn(2, LENGTH, BATCH, width).to(device)
    return x.requires_grad_(), grad


def run(function: Callable[[torch.Tensor], torch.Tensor], model: Any, x: torch.Tensor, grad: torch.Tensor) -> Gradients:
    """Output and gradients of input and parameters; those that have none are left out."""
    model.zero_grad()
    x.grad = None
    y = function(x)
    torch.autograd.backward(y, grad)
    return [y.detach(), x.grad, *(param.grad for param in model.parameters() if param.grad is not None)]


def difference(got: Gradients, want: Gradients) -> float:
    """Largest difference of any tensor, relative to the largest value in it."""
    pairs = zip(got, want, strict=True)
    return float(max((a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in pairs))


def compare(device: str, backend: str, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Compiles each case's part; ``whole``: in one graph, or fail."""
    return {name: compile_and_run(device, backend, **case) for name, case in cases.items()}


def compile_and_run(
    device: str, backend: str, part: str, whole: bool = False, probe: bool = False, **options: Any
) -> dict[str, Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(device, part, **options)
    x, grad = data(device, model)
    totals = [_set_probes(model, probe)]
    want, kept = bytes_kept(model, model, x, grad)
    totals.append(_set_probes(model, probe))
    with quiet_linear():
        got, kept_compiled = bytes_kept(torch.compile(model, backend=backend, fullgraph=whole), model, x, grad)
    return {
        "difference": difference(got, want),
        "scalars": len(activations_of(model)[0].raw_scalars()),
        "tensors": len(got),
        "bytes": [kept, kept_compiled],
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "probes": [[float(total[0]) for total in each] for each in totals],
    }


def bytes_kept(function: Any, model: Any, x: torch.Tensor, grad: torch.Tensor) -> tuple[Gradients, int]:
    """``run``, with the bytes that autograd kept between the passes, parameters and the input left out."""
    storages: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = [tensor.clone() for tensor in run(function, model, x, grad)]
    return results, sum(size for address, size in storages.items() if address not in known)


def _set_probes(model: Any, on: bool) -> list[torch.Tensor]:
    """Gives each activation a new probe; returns what the new ones will add up."""
    modules = activations_of(model) if on else []
    for module in modules:
        module.probe = GradientProbe(module.raw_scalars())
    return [total for module in modules for total in module.probe.totals]


def quiet_linear() -> Any:
    """Megatron's row-parallel linear layer warns that it was given no group, and a warning ends a graph."""
    name = "megatron.core.tensor_parallel.layers.get_tensor_model_parallel_group_if_none"
    group = parallel_state.get_tensor_model_parallel_group()
    return mock.patch(name, lambda tp_group, **_: tp_group or group)


def captured(device: str) -> dict[str, float]:
    """The MLP's whole pass in one CUDA graph, and through ``make_graphed_callables``; on the CPU without graphs."""
    return {"graph": difference(*replayed(device)), "callables": difference(*graphed(device))}


def replayed(device: str) -> tuple[Gradients, Gradients]:
    """Results of a replay on new data, and of the ordinary pass."""
    model = build(device, "mlp")
    x, grad = data(device, model)
    results: list[Gradients] = []
    replay = record(lambda: results.append(run(model, model, x, grad)), device)
    new_x, new_grad = data(device, model)
    with torch.no_grad():
        x.copy_(new_x)
        grad.copy_(new_grad)
    replay()
    got = [tensor.clone() for tensor in results[-1]]
    return got, run(model, model, new_x, new_grad)


def record(step: Callable[[], None], device: str) -> Callable[[], Any]:
    """Captures ``step``; returns what replays it."""
    if device == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # Triton compiles, cuBLAS makes its workspaces
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def graphed(device: str) -> tuple[Gradients, Gradients]:
    """Two passes through the graphed MLP, each on its own data: results of the second, and of the ordinary pass."""
    model, plain = build(device, "mlp"), build(device, "mlp")
    x, _ = data(device, model)
    function = model if device == "cpu" else torch.cuda.make_graphed_callables(model, (x,))
    for _ in range(2):
        new_x, new_grad = data(device, model)
        got = [tensor.clone() for tensor in run(function, model, new_x, new_grad)]
    return got, run(plain, plain, new_x, new_grad)
