"""Builds the models of config files with Megatron's own GPTModel, for test_configs.py and test_layout_memory.py.

Runs in a process of its own, because Megatron's parallel state and the CPU backend are global:

    echo '[{"config": "configs/tiny-xielu.yaml"}]' | python tests/built_configs.py

Standard input: a JSON list of jobs. ``tensor_parallel``, ``pipeline_parallel``, ``data_parallel`` (default 1) and
``stage`` (default 0) choose one rank of a layout. Standard output: a JSON list with each rank's parameters and the
activation scalars among them; with ``"flops": S`` the FLOPs per token of a forward pass over S tokens; with ``"state":
true`` the bytes of its weights, gradients and Adam, after a step in bf16, with or without ``distributed_optimizer``.

Models are on the meta device unless they make a step. No rank waits for another: the process group is torch's fake
one, which only says how many there are.
"""

import argparse
import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_act import cpu_backend

cpu_backend.install()

import torch  # noqa: E402  the backend comes first
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args  # noqa: E402
from megatron.training.arguments import add_megatron_arguments, validate_args  # noqa: E402
from megatron.training.models.gpt import GPTModelBuilder  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from megatron_act import arguments, model_args, norms, specs  # noqa: E402

PARALLEL = ("tensor_parallel", "pipeline_parallel", "data_parallel")


def main() -> None:
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):  # Megatron prints all arguments
        results = [result(job) for job in json.load(sys.stdin)]
    print(json.dumps(results))


def result(job: dict[str, Any]) -> dict[str, float]:
    tensor, pipeline, data = (job.get(name, 1) for name in PARALLEL)
    with joined(tensor, pipeline, data, job.get("stage", 0)):
        args = megatron_args(job, tensor, pipeline, data)
        if job.get("state"):
            return state(build(args), job.get("distributed_optimizer", False))
        with torch.device("meta"):
            model = build(args).to("meta")
            counted = {"flops": forward_flops(model, job["flops"])} if "flops" in job else {}
        return {**parameters(model), **counted}


@contextlib.contextmanager
def joined(tensor: int, pipeline: int, data: int, stage: int) -> Iterator[None]:
    """This process as the first rank of a pipeline stage."""
    world = tensor * pipeline * data
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=stage * tensor * data, world_size=world)
    parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def megatron_args(job: dict[str, Any], tensor: int, pipeline: int, data: int) -> argparse.Namespace:
    """What Megatron makes of the file, with the job's layout and what a CPU needs in place of the file's own."""
    parser = megatron_parser()
    given = [
        *cpu_backend.FLAGS,
        *("--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)),
        *("--micro-batch-size", "1", "--global-batch-size", str(data), "--bf16"),
    ]
    flags = model_args.read(job["config"])
    flags.pop("--sequence-parallel", None)  # refused at tensor parallel 1
    args = parser.parse_args([*arguments.config_to_argv(flags, parser, given), *given])
    args.rank, args.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return validate_args(args)


@functools.cache
def megatron_parser() -> argparse.ArgumentParser:
    return arguments.add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def build(args: argparse.Namespace) -> GPTModel:
    config = gpt_config_from_args(args)
    config.transformer.perform_initialization = False  # no test looks at values
    config.transformer_layer_spec = specs.layer_spec(args.activation) if args.activation else norms.stock_spec
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def parameters(model: GPTModel) -> dict[str, int]:
    held = dict(model.named_parameters())
    scalars = sum(p.numel() for name, p in held.items() if ".activation_func." in name)
    return {"parameters": sum(p.numel() for p in held.values()), "scalars": scalars}


def forward_flops(model: GPTModel, seq_length: int) -> float:
    """FLOPs per token of a forward pass over one sequence."""
    tokens = torch.zeros(1, seq_length, dtype=torch.long)
    mask = torch.ones(1, 1, seq_length, seq_length, dtype=torch.bool)
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.to("meta")  # no buffer: it stayed on the CPU
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens, mask)
    return counter.get_total_flops() / seq_length


def state(model: GPTModel, distributed: bool) -> dict[str, int]:
    """Bytes of weights, gradients and Adam's tensors after one step, as Megatron allocated them."""
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    ddp = DistributedDataParallel(model.config, ddp_config, Float16Module(model.config, model))
    config = OptimizerConfig(lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=distributed)
    optimizer = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)
    for param in ddp.parameters():
        param.main_grad.fill_(1e-3)
    optimizer.step()
    adam = [each.optimizer for each in optimizer.chained_optimizers]
    mains = [p for each in adam for group in each.param_groups for p in group["params"]]
    moments = [each.state[p][name] for each in adam for p in each.state for name in ("exp_avg", "exp_avg_sq")]
    weights = {p.untyped_storage().data_ptr() for p in ddp.parameters()}  # an fp32 weight is its own main copy
    copies = [p for p in mains if p.untyped_storage().data_ptr() not in weights]
    return {
        "weights": sum(p.nbytes for p in ddp.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in ddp.buffers),
        "optimizer": sum(tensor.nbytes for tensor in copies + moments),
    }


if __name__ == "__main__":
    main()
