"""Gradients of one ActivationMLP's scalars on each tensor-parallel rank against the unsharded formula.

Run under torchrun. Rank 0 prints one JSON object: for each dtype and scalar, every rank's gradient, the fp64 truth and
the sum of the truth's absolute terms. ``--without-reduction`` breaks the sum on purpose.
"""

import argparse
import json

import torch

from megatron_act import cpu_backend

cpu_backend.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_act import activation  # noqa: E402
from megatron_act.kernels import api as kernels  # noqa: E402
from megatron_act.mlp import ActivationMLP, ActivationMLPSubmodules  # noqa: E402

HIDDEN, FFN, SEQUENCE, BATCH = 16, 48, 12, 4


def full_problem() -> dict[str, torch.Tensor]:
    """Weights, biases, input and output gradient of the unsharded MLP in fp64, the same on every rank."""
    rng = torch.Generator().manual_seed(7)
    shapes = {"w1": (FFN, HIDDEN), "b1": (FFN,), "w2": (HIDDEN, FFN), "x": (SEQUENCE, BATCH, HIDDEN)}
    shapes["grad"] = shapes["x"]
    # exactly representable in fp32, so that both precisions solve the same problem
    return {name: torch.randn(shape, generator=rng).double() for name, shape in shapes.items()}


def sharded_gradients(name: str, dtype: torch.dtype, problem: dict[str, torch.Tensor]) -> dict[str, float]:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=2,
        add_bias_linear=True,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        params_dtype=dtype,
        gradient_accumulation_fusion=False,
    )
    backend = LocalSpecProvider()
    submodules = ActivationMLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear(), activation=name
    )
    group = parallel_state.get_tensor_model_parallel_group()
    mlp = ActivationMLP(config, submodules, ffn_hidden_size=FFN, tp_group=group).to(dtype)
    shard = slice(group.rank() * FFN // group.size(), (group.rank() + 1) * FFN // group.size())
    with torch.no_grad():
        mlp.linear_fc1.weight.copy_(problem["w1"][shard])
        mlp.linear_fc1.bias.copy_(problem["b1"][shard])
        mlp.linear_fc2.weight.copy_(problem["w2"][:, shard])
    output, _ = mlp(problem["x"].to(dtype))
    output.backward(problem["grad"].to(dtype))
    return {key: float(param.grad) for key, param in mlp.activation_func.named_parameters()}


def truth(name: str, problem: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Per scalar: dL/d(raw) in fp64 and the sum of the absolute values of its terms."""
    function = kernels.get(name)
    pre = problem["x"] @ problem["w1"].T + problem["b1"]
    grad = problem["grad"] @ problem["w2"]
    result = {}
    for index, param in enumerate(function.params):
        raws = [torch.tensor([float(torch.tensor(p.raw_init, dtype=torch.float32))]).double() for p in function.params]
        raws[index].requires_grad_()
        total = (function.reference(pre, *raws) * grad).sum()
        (derivative,) = torch.autograd.grad(total, raws[index])
        each = torch.func.jvp(
            lambda r, i=index, q=raws: _substitute(function, pre, q, i, r),
            (raws[index].detach(),),
            (torch.ones(1).double(),),
        )[1]
        result[param.name] = (float(derivative), float((each * grad).abs().sum()))
    return result


def _substitute(function, pre, raws, index, value):
    raws = [value if i == index else raw.detach() for i, raw in enumerate(raws)]
    effective = [p.constrained(raw, torch.float64) for p, raw in zip(function.params, raws, strict=True)]
    return function.torch_fwd(pre, *effective)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--without-reduction", action="store_true")
    if parser.parse_args().without_reduction:
        activation.sum_gradients_over_group = lambda scalars, group: tuple(scalars)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=torch.distributed.get_world_size())
    model_parallel_cuda_manual_seed(1)
    problem = full_problem()
    report = {}
    for name in (name for name in kernels.names() if kernels.get(name).params):
        report[name] = {key: {"truth": value, "terms": terms} for key, (value, terms) in truth(name, problem).items()}
        for label, dtype in (("float32", torch.float32), ("float64", torch.float64)):
            mine = sharded_gradients(name, dtype, problem)
            everyone = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, mine)
            for key in mine:
                report[name][key][label] = [rank[key] for rank in everyone]
    if torch.distributed.get_rank() == 0:
        print("REPORT " + json.dumps(report), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
