"""What a run tells while it trains: a line a step on the console, and loss, throughput and scalars to files.

Megatron's loop has no hook for extra metrics, so ``install`` wraps its ``training_log`` and its evaluation. The last
rank, which holds the loss, makes a record of each logged step, sends it to the first rank, which prints its line
(``step_line``), and, where flags ask for it, writes it to TensorBoard and wandb (``boards``) and to the file of
``--metrics-jsonl``, one JSON object a line, flushed at once:

* ``{"event": "start", "activation", "args", "parameters", "peak_tflops", "versions", "time"}``
* ``{"event": "step", "iteration", "tokens", "loss", "learning_rate", "grad_norm", "seconds", "step_seconds",
  "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "eta_seconds", "skipped_steps", "nan_steps", "scalars",
  "scalar_gradients", "negative_fraction", "zero_fraction", "peak_memory_bytes", "telemetry_seconds"}``
* ``{"event": "evaluation", "split": "validation" or "test", "iteration", "tokens", "loss"}``

``loss`` is in nats per token of that step, ``seconds`` the wall time since the first step, ``scalars`` the effective
values by name, one per layer in depth order, ``scalar_gradients`` the gradients of the raw ones before clipping
(``scalar_gradients``; absent under FSDP), the two fractions what ``preactivations`` counts by layer. ``step_seconds``
to ``mfu`` are means over the steps since the last record (``throughput`` says what they count), without the run's first
step where that has no record of its own; ``mfu`` is null without a peak to compare with, and a line of the log says
why. ``eta_seconds`` is what the steps to come will take, evaluations and checkpoints left out, null until a step after
the first is known. ``skipped_steps`` were not applied since the last record, as for an overflow in fp16; ``nan_steps``
are those of them whose loss was NaN or infinite. ``peak_memory_bytes`` is the GPU's peak so far (on a CPU the
process's), of the last rank. ``telemetry_seconds`` is what all of this has cost on that rank since the last record. A
resumed run appends: its start line, then the iterations from where it resumed, with ``seconds`` counted anew.

The console's line needs the scalars only: gradients and fractions are collected where something keeps them.
"""

import json
import math
import resource
import time
from argparse import Namespace
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.training import get_timers, is_last_rank, print_rank_0
from megatron.training import training as megatron_loop

from megatron_act import __version__, boards, full_validation, layer_values, replicas
from megatron_act.curve_images import curve_image
from megatron_act.preactivations import Preactivations
from megatron_act.scalar_gradients import gradients
from megatron_act.step_line import evaluation_line, step_line
from megatron_act.throughput import Meter, Peak, Throughput, TimeLeft, peak_of

IMAGES_PER_RUN = 20

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
        self.path = Path(args.metrics_jsonl) if args.metrics_jsonl else None
        self.keeps = bool(self.path or boards.wanted(args))
        self.models: list[Any] = []
        self.started: float | None = None
        self.peak: Peak | None = None
        self.meter: Meter | None = None
        self.left = TimeLeft()
        self.preactivations: Preactivations | None = None
        self.spent = 0.0  # seconds since the last record
        self.skipped = self.nan = 0  # steps since then

    def remember(self, models: list[Any]) -> list[Any]:
        """A post-wrap hook: keeps the model chunks and writes the start line."""
        self.models = models
        self.started = self.meter = None  # after a restart in this process Megatron's timers start anew
        self.left = TimeLeft()
        if self.keeps:
            self.preactivations = Preactivations(models, self.args.num_layers)
        self._watch_step(1)
        self.peak = peak_of(self.args, torch.cuda.get_device_name() if torch.cuda.is_available() else None)
        print_rank_0(f"> megatron-act: {self.peak}")
        if self.path:
            self._write_start(_count_parameters(models))
        return models

    def _write_start(self, parameters: int) -> None:
        if self.path and is_last_rank():
            assert self.peak is not None
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sizes = {"parameters": parameters, "peak_tflops": self.peak.tflops}
            self._write({"event": "start", **self._describe(), **sizes})

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

    def _watch_step(self, iteration: int) -> None:
        if self.preactivations and iteration % self.args.log_interval == 0:
            self.preactivations.watch()

    def step(self, iteration: int, losses: dict[str, Any], rate: float | None, skipped: int, grad_norm: Any) -> None:
        """Records one training step, every ``--log-interval`` steps; every rank must call it, after Megatron's log."""
        began = time.perf_counter()
        pace = self._pace(iteration)
        self.started = self.started or began
        self.skipped += skipped
        self.nan += bool(skipped and "lm loss" in losses and not math.isfinite(losses["lm loss"]))
        if pace is not None and iteration % self.args.log_interval == 0:
            norm = None if grad_norm is None else float(grad_norm)
            layers = self._layers(norm)
            figures = {"learning_rate": rate, "grad_norm": norm, "seconds": round(began - self.started, 3)}
            record = self._record(iteration, losses, {**figures, **asdict(pace)}, layers) if is_last_rank() else {}
            if record:
                self._keep(record, pace, layers, began)
            if line := _on_first_rank(record):
                print(step_line(line, self.args.train_iters, self.args.world_size), flush=True)
            self.skipped = self.nan = 0
        self._watch_step(iteration + 1)
        self.spent += time.perf_counter() - began

    def _record(
        self, iteration: int, losses: dict[str, Any], figures: dict[str, Any], layers: dict[str, Any]
    ) -> dict[str, Any]:
        loss, remaining = losses.get("lm loss"), self.args.train_iters - iteration
        return {
            "event": "step",
            "iteration": iteration,
            "tokens": self.args.consumed_train_samples * self.args.seq_length,
            "loss": None if loss is None else float(loss),
            **figures,
            "eta_seconds": self.left.seconds(remaining) if remaining else None,
            "skipped_steps": self.skipped,
            "nan_steps": self.nan,
            **layers,
        }

    def _keep(self, record: dict[str, Any], pace: Throughput, layers: dict[str, Any], began: float) -> None:
        """Writes a record wherever flags say, with what it has cost so far."""
        if boards.present():
            self._board(record, pace, layers)
        record |= {"peak_memory_bytes": _peak_memory(), "telemetry_seconds": self._cost(began)}
        self._write(record)

    def _cost(self, began: float) -> float:
        """Seconds spent here since the last record; what follows in this step counts towards the next one."""
        now = time.perf_counter()
        cost = self.spent + now - began + (self.preactivations.take_seconds() if self.preactivations else 0.0)
        self.spent = began - now  # `step` adds the time since `began`
        return round(cost, 6)

    def _layers(self, norm: float | None) -> dict[str, Any]:
        """What each layer tells; collective."""
        replicas.refresh_values(self.models)
        size = self.args.pipeline_model_parallel_size
        grads = gradients(self.models, self.args.clip_grad, norm) if self.keeps else None
        scalars, scalar_gradients = layer_values.gather(self.models, size, grads)
        if self.preactivations is None:
            return {"scalars": scalars}
        return {"scalars": scalars, "scalar_gradients": scalar_gradients, **self.preactivations.take()}

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
        steps, pace = self.meter.steps, self.meter.lap(get_timers()("interval-time").active_time())
        if not first:
            self.left.add(steps, pace.step_seconds)
        return pace

    def evaluation(self, losses: dict[str, Any], iteration: int, split: str) -> None:
        """Records a validation or test loss; every rank must call it, only the last one needs to have a loss."""
        record: dict[str, Any] = {}
        if "lm loss" in losses and is_last_rank():
            loss, tokens = float(losses["lm loss"]), self.args.consumed_train_samples * self.args.seq_length
            record = {"event": "evaluation", "split": split, "iteration": iteration, "tokens": tokens, "loss": loss}
            boards.write({}, {f"lm loss {split}": loss}, iteration)
            self._write(record)
        if record := _on_first_rank(record):
            print(evaluation_line(record), flush=True)

    def _board(self, record: dict[str, Any], pace: Throughput, layers: dict[str, Any]) -> None:
        iteration = record["iteration"]
        speed = {f"throughput/{name}": value for name, value in asdict(pace).items() if value is not None}
        names = {"lm loss": "loss", "learning-rate": "learning_rate", "grad-norm": "grad_norm"}
        megatrons = {tag: record[name] for tag, name in names.items()}
        boards.write({**dict(tagged(layers)), **speed}, megatrons, iteration)
        if layers["scalars"] and iteration % self._image_interval() == 0:
            boards.picture("activation/curves", curve_image(self.args.activation, layers["scalars"]), iteration)

    def _image_interval(self) -> int:
        logs = self.args.train_iters // self.args.log_interval
        return max(1, logs // IMAGES_PER_RUN) * self.args.log_interval

    def _write(self, record: dict[str, Any]) -> None:
        if self.path:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                reason = f"{self.path}: --metrics-jsonl cannot be written ({error.strerror})"
                raise RuntimeError(f"{reason}: make room and start again from the last checkpoint") from error


def _on_first_rank(record: dict[str, Any]) -> dict[str, Any]:
    """The last rank's record on the first rank, nothing on the others; collective."""
    box = [record]
    last = torch.distributed.get_world_size() - 1
    if last:
        torch.distributed.broadcast_object_list(box, src=last)
    return box[0] if torch.distributed.get_rank() == 0 else {}


def tagged(layers: dict[str, Any]) -> list[tuple[str, float]]:
    """TensorBoard's tags and values: ``activation/alpha_p/layer_3``, ``activation_gradient/...`` and its norm, ..."""
    found = [(f"activation/{name}/layer_{n}", v) for name, n, v in _numbered(layers["scalars"])]
    grads = layers["scalar_gradients"]
    found += [(f"activation_gradient/{name}/layer_{n}", v) for name, n, v in _numbered(grads)]
    found += [(f"activation_gradient/{name}/norm", math.hypot(*values)) for name, values in grads.items()]
    fractions: dict[str, list[float]] = {
        name: layers[name] for name in ("negative_fraction", "zero_fraction") if name in layers
    }
    return found + [(f"preactivation/{name}/layer_{n}", v) for name, n, v in _numbered(fractions)]


def _numbered(values: dict[str, list[float]]) -> list[tuple[str, int, float]]:
    return [(name, n, value) for name, layers in values.items() for n, value in enumerate(layers, start=1)]


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


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
    """Connects a Telemetry to Megatron's loop.

    With ``--full-validation`` of files it fixes the held-out windows too (``full_validation``).
    """
    full_validation.install(args)
    telemetry = Telemetry(args)
    model_config.post_wrap_hooks.append(telemetry.remember)
    _wrap_training_log(telemetry)
    _wrap_evaluation(telemetry)


def _wrap_training_log(telemetry: Telemetry) -> None:
    original = megatron_loop.training_log

    def training_log(loss_dict: Any, total: Any, learning_rate: Any, iteration: int, *rest: Any, **kwargs: Any) -> Any:
        report_memory = original(loss_dict, total, learning_rate, iteration, *rest, **kwargs)
        skipped, grad_norm = rest[2:4]  # loss_scale, report_memory_flag, skipped_iter, grad_norm, ...
        telemetry.step(iteration, loss_dict, learning_rate, skipped, grad_norm)  # after Megatron has read its timer
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
