"""What a run tells while it trains: loss, throughput and every layer's scalars, to TensorBoard and to a JSONL file.

Megatron's loop has no hook for extra metrics, so ``install`` wraps its ``training_log`` and its evaluation. One JSON
object a line, written by the last rank (which holds the loss), flushed at once:

* ``{"event": "start", "activation", "args", "parameters", "peak_tflops", "versions", "time"}``
* ``{"event": "step", "iteration", "tokens", "loss", "learning_rate", "grad_norm", "seconds", "step_seconds",
  "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "scalars"}``
* ``{"event": "evaluation", "split": "validation" or "test", "iteration", "tokens", "loss"}``

``loss`` is in nats per token of that step, ``seconds`` the wall time since the first step, ``scalars`` the effective
values by name, one per layer in depth order. ``step_seconds`` to ``mfu`` are means over the steps since the last record
(``throughput`` says what they count), without the run's first step where that has no record of its own; ``mfu`` is null
without a peak to compare with, and a line of the log says why. A resumed run appends: its start line, then the
iterations from where it resumed, with ``seconds`` counted anew.
"""

import json
import time
from argparse import Namespace
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.training import get_tensorboard_writer, get_timers, is_last_rank, print_rank_0
from megatron.training import training as megatron_loop

from megatron_act import __version__, replicas
from megatron_act.activation import TrainableActivation, activations_of
from megatron_act.throughput import Meter, Peak, Throughput, peak_of

RECORDED_FLAGS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length", "padded_vocab_size"),
    *(
        "swiglu",
        "squared_relu",
        "qk_layernorm",
        "normalization",
        "global_batch_size",
        "micro_batch_size",
        "train_iters",
    ),
    *("lr", "min_lr", "lr_decay_style", "weight_decay", "seed", "bf16", "tensor_model_parallel_size"),
    *("pipeline_model_parallel_size", "world_size"),
)


class Telemetry:
    """Collects one run's figures; ``install`` connects it to Megatron's loop."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.models: list[Any] = []
        self.started: float | None = None
        self.peak: Peak | None = None
        self.meter: Meter | None = None
        self.path = Path(args.metrics_jsonl) if args.metrics_jsonl else None

    def remember(self, models: list[Any]) -> list[Any]:
        """A post-wrap hook: keeps the model chunks and writes the start line."""
        self.models = models
        self.started = self.meter = None  # after a restart in this process Megatron's timers start anew
        self.peak = peak_of(self.args, torch.cuda.get_device_name() if torch.cuda.is_available() else None)
        print_rank_0(f"> megatron-act: {self.peak}")
        parameters = _count_parameters(models)
        if self.path and is_last_rank():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sizes = {"parameters": parameters, "peak_tflops": self.peak.tflops}
            self._write({"event": "start", **self._describe(), **sizes})
        return models

    def _describe(self) -> dict[str, Any]:
        args = self.args
        return {
            "activation": args.activation,
            "args": {name: getattr(args, name, None) for name in RECORDED_FLAGS},
            "versions": {
                "megatron_act": __version__,
                "megatron_core": version("megatron-core"),
                "torch": torch.__version__,
            },
            "time": time.time(),
        }

    def step(self, iteration: int, loss_dict: dict[str, Any], learning_rate: float | None, grad_norm: Any) -> None:
        """Records one training step, every ``--log-interval`` steps; every rank must call it, after Megatron's log."""
        pace = self._pace(iteration)
        self.started = self.started or time.perf_counter()
        if pace is None or iteration % self.args.log_interval:
            return
        replicas.refresh_values(self.models)
        scalars = gather_scalars(self.models, self.args.pipeline_model_parallel_size)
        if not is_last_rank():
            return
        self._tensorboard(scalars, pace, iteration)
        loss = loss_dict.get("lm loss")
        self._write(
            {
                "event": "step",
                "iteration": iteration,
                "tokens": self.args.consumed_train_samples * self.args.seq_length,
                "loss": None if loss is None else float(loss),
                "learning_rate": learning_rate,
                "grad_norm": None if grad_norm is None else float(grad_norm),
                "seconds": round(time.perf_counter() - self.started, 3),
                **asdict(pace),
                "scalars": scalars,
            }
        )

    def _pace(self, iteration: int) -> Throughput | None:
        """Throughput since the last lap, where Megatron has just read its timer: logged steps and the first one."""
        first = self.meter is None
        if self.meter is None:
            assert self.peak is not None
            flops = megatron_loop.num_floating_point_operations(self.args, batch_size=1)
            self.meter = Meter(self.args.seq_length, flops, self.args.world_size, self.peak.tflops)
        self.meter.add(get_current_running_global_batch_size())
        if iteration % self.args.log_interval and not first:
            return None
        return self.meter.lap(get_timers()("interval-time").active_time())

    def evaluation(self, losses: dict[str, Any], iteration: int, split: str) -> None:
        """Records a validation or test loss; only the last rank has one."""
        if "lm loss" in losses and is_last_rank():
            place = {"split": split, "iteration": iteration}
            tokens = self.args.consumed_train_samples * self.args.seq_length
            self._write({"event": "evaluation", **place, "tokens": tokens, "loss": float(losses["lm loss"])})

    def _tensorboard(self, scalars: dict[str, list[float]], pace: Throughput, iteration: int) -> None:
        writer = get_tensorboard_writer()
        if not writer:
            return
        for name, by_layer in scalars.items():
            for layer, value in enumerate(by_layer, start=1):
                writer.add_scalar(f"activation/{name}/layer_{layer}", value, iteration)
        for name, value in asdict(pace).items():
            if value is not None:
                writer.add_scalar(f"throughput/{name}", value, iteration)

    def _write(self, record: dict[str, Any]) -> None:
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def gather_scalars(models: list[Any], pipeline_size: int) -> dict[str, list[float]]:
    """Effective scalars of the whole model by name, one value per layer that has it in depth order.

    In a mixture of experts, shared experts' are named ``shared_experts.NAME``, an expert's own ``expert_3.NAME``.
    Collective over the pipeline that the last rank belongs to; every other rank returns nothing, at no cost (with
    scalars per expert: collective over expert-parallel ranks too). One copy from the device, however many layers.

    Args:
        models: this rank's model chunks.
        pipeline_size: number of pipeline stages.
    """
    group = mpu.get_pipeline_model_parallel_group()
    modules = activations_of(models)
    heard = torch.distributed.get_world_size() - 1 in torch.distributed.get_process_group_ranks(group)
    spread = mpu.get_expert_model_parallel_world_size() > 1 and any(m.role.startswith("expert_") for m in modules)
    here = _effective_by_layer(modules) if heard or spread else []
    if spread:
        here = _with_other_experts(here)
    if not heard:
        return {}
    stages: list[Any] = [here]
    if pipeline_size > 1:
        stages = [None] * pipeline_size
        torch.distributed.all_gather_object(stages, here, group=group)
    layers = sorted((pair for stage in stages for pair in stage), key=lambda pair: pair[0])
    names = {name: None for _, values in layers for name in values}  # in order of appearance
    return {name: [values[name] for _, values in layers if name in values] for name in names}


def _with_other_experts(here: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """This rank's scalars and those of the experts of its expert-parallel peers; collective over these."""
    peers: list[Any] = [None] * mpu.get_expert_model_parallel_world_size()
    torch.distributed.all_gather_object(peers, here, group=mpu.get_expert_model_parallel_group())
    return list({(layer, *values): (layer, values) for peer in peers for layer, values in peer}.values())


def _effective_by_layer(modules: list[TrainableActivation]) -> list[tuple[int, dict[str, float]]]:
    raws = [raw.detach() for module in modules for raw in module.raw_scalars()]
    values = iter(torch.cat(raws).tolist() if raws else [])
    return [
        (
            module.layer_number,
            {_label(module, param.name): param.effective(next(values)) for param in module.activation.params},
        )
        for module in modules
    ]


def _label(module: TrainableActivation, name: str) -> str:
    return f"{module.role}.{name}" if module.role else name


def _count_parameters(models: list[Any]) -> int:
    """Parameters of the whole model, tied embeddings once; collective over the model-parallel ranks."""
    counts = torch.zeros(2, dtype=torch.int64, device=torch.cuda.current_device())  # dense, experts of several ranks
    for param in (param for model in models for param in model.parameters()):
        expert = not getattr(param, "allreduce", True)
        rank = mpu.get_expert_tensor_parallel_rank() if expert else mpu.get_tensor_model_parallel_rank()
        sharded = getattr(param, "tensor_model_parallel", False)
        if getattr(param, "shared", False) or (not sharded and rank != 0):
            continue
        counts[int(expert)] += param.numel()
    torch.distributed.all_reduce(counts[:1], group=mpu.get_model_parallel_group())
    torch.distributed.all_reduce(counts[1:], group=mpu.get_expert_tensor_model_pipeline_parallel_group())
    return int(counts.sum())


def install(args: Namespace, model_config: Any) -> None:
    """Connects a Telemetry to Megatron's loop where ``--metrics-jsonl`` or ``--tensorboard-dir`` asks for it."""
    if not (args.metrics_jsonl or args.tensorboard_dir):
        return
    telemetry = Telemetry(args)
    model_config.post_wrap_hooks.append(telemetry.remember)
    _wrap_training_log(telemetry)
    _wrap_evaluation(telemetry)


def _wrap_training_log(telemetry: Telemetry) -> None:
    original = megatron_loop.training_log

    def training_log(loss_dict: Any, total: Any, learning_rate: Any, iteration: int, *rest: Any, **kwargs: Any) -> Any:
        report_memory = original(loss_dict, total, learning_rate, iteration, *rest, **kwargs)
        grad_norm = rest[3]  # loss_scale, report_memory_flag, skipped_iter, grad_norm, ...
        telemetry.step(iteration, loss_dict, learning_rate, grad_norm)  # after Megatron has read its timer
        return report_memory

    megatron_loop.training_log = training_log


def _wrap_evaluation(telemetry: Telemetry) -> None:
    """``evaluate`` returns the losses, its caller ``evaluate_and_print_results`` knows the iteration and the split."""
    evaluate, evaluate_and_print = megatron_loop.evaluate, megatron_loop.evaluate_and_print_results
    losses: list[dict[str, Any]] = []

    def keep_result(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        losses.append(result[0] or {})
        return result

    def record(prefix: str, step: Any, data: Any, model: Any, iteration: int, *rest: Any, **kwargs: Any) -> None:
        evaluate_and_print(prefix, step, data, model, iteration, *rest, **kwargs)
        while losses:
            telemetry.evaluation(losses.pop(0), iteration, "test" if "test set" in prefix else "validation")

    megatron_loop.evaluate, megatron_loop.evaluate_and_print_results = keep_result, record
