"""One drawn case on this rank: five steps of training through Megatron's schedules and optimizer.

Follows ``megatron.training``'s ``train`` and ``train_step`` in what they do to models, configuration and optimizer;
without its global arguments, data sets and logs.
"""

import datetime
import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import drawn_cases as drawn
import torch
from drawn_cases import Case
from drawn_model import Hook, Training, build_models, build_optimizer
from drawn_mutants import broken
from drawn_shards import shards_of, spread
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=5)


def run(case: Case, rank: int, folder: Path) -> dict[str, Any]:
    """Runs ``case`` in a world of its own; leaves this rank's shards in ``folder``.

    Returns:
        ``losses`` and ``grad_norms`` of the steps; the former on ranks of the last pipeline stage, else empty.
    """
    store = torch.distributed.FileStore(str(folder / "store"), case.world)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=case.world, timeout=COLLECTIVE_TIMEOUT
    )
    try:
        start_parallel_state(case)
        with broken(case.mutant) as hooks:
            return train(case, [spread, *hooks], folder / f"shards_{rank}.pt")
    finally:
        gc.collect()  # models in reference cycles would keep their groups, each with three threads
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def start_parallel_state(case: Case) -> None:
    parallel_state.initialize_model_parallel(
        case.tp,
        case.pp,
        case.vpp if case.vpp > 1 else None,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
        create_gloo_process_groups=False,
    )
    seed = case.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def train(case: Case, hooks: list[Hook], output: Path) -> dict[str, Any]:
    """Five steps; the shards are taken in the first, before the optimizer touches its gradients."""
    models = build_models(case, hooks)
    update = build_optimizer(case, models)
    prepare(case, models, update)
    losses, grad_norms = [], []
    for step in range(drawn.STEPS):
        losses += train_step(case, step, models, update, partial(save, models, update, output))
        grad_norms.append(finish_step(case, step, models, update))
    release(models)
    return {"losses": losses, "grad_norms": grad_norms}


def save(models: list[Any], update: Training, output: Path) -> None:
    torch.save([vars(shard) for shard in shards_of(models, update.optimizer)], output)


def prepare(case: Case, models: list[Any], update: Training) -> None:
    """The training loop's settings in the model's configuration."""
    config = get_model_config(models[0])
    config.grad_scale_func = update.optimizer.scale_loss
    single = lambda functions: functions if len(models) > 1 else functions[0]  # noqa: E731
    if case.overlap_grad_reduce:
        config.no_sync_func = single([model.no_sync for model in models])
        if case.vpp > 1:  # --align-grad-reduce
            config.grad_sync_func = single([model.start_grad_sync for model in models])
    if case.overlap_param_gather:
        for model in models:  # until the first update there is nothing to gather
            model.disable_forward_pre_hook(param_sync=False)


def release(models: list[Any]) -> None:
    """Lets go of what keeps a case's process groups, whose threads never sleep for long, alive after it.

    These are cycles through autograd nodes, which Python's collector cannot see, and a cache of Megatron's.
    """
    config = get_model_config(models[0])
    config.grad_scale_func = config.no_sync_func = config.grad_sync_func = None
    for model in models:
        model.grad_accs.clear()
        for module in model.modules():
            dispatcher = getattr(module, "token_dispatcher", None)
            for key, value in list(vars(dispatcher).items() if dispatcher else ()):
                if torch.is_tensor(value):
                    setattr(dispatcher, key, None)
    RotaryEmbedding.forward.cache_clear()  # by model: its key holds the module


def train_step(
    case: Case, step: int, models: list[Any], update: Training, at_first_gradients: Callable[[], None]
) -> list[float]:
    """Forward and backward passes of a global batch; on the last stage its loss, over all data-parallel ranks."""
    for model in models:
        model.zero_grad_buffer()
    update.optimizer.zero_grad()
    reduced = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[micro_batches(case, step) for _ in models],
        model=models,
        num_microbatches=case.micro_batches,
        seq_length=drawn.SEQUENCE,
        micro_batch_size=case.micro_batch_size,
        forward_only=False,
    )
    if step == 0:
        at_first_gradients()
    if not reduced:
        return []
    total = torch.stack([each["lm loss"] for each in reduced]).sum(0)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return [float(total[0] / total[1])]


def finish_step(case: Case, step: int, models: list[Any], update: Training) -> float:
    """The optimizer's step; the norm of all gradients before clipping."""
    successful, grad_norm, _ = update.optimizer.step()
    if not successful:
        raise RuntimeError(f"expected an update in step {step}, got none")
    update.scheduler.step(increment=case.batch_size)
    if step == 0 and case.overlap_param_gather:
        for model in models:
            model.enable_forward_pre_hook()
    return float(grad_norm)


def micro_batches(case: Case, step: int) -> Iterator[dict[str, torch.Tensor]]:
    """This data- and context-parallel rank's micro-batches of a step."""
    tokens, labels, mask = drawn.batch(case, step)
    size, rank = case.micro_batch_size, parallel_state.get_data_parallel_rank()
    positions = torch.arange(drawn.SEQUENCE).expand(case.batch_size, -1)
    for number in range(case.micro_batches):
        first = (number * case.dp + rank) * size
        whole = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
        rows = {key: value[first : first + size].contiguous() for key, value in whole.items()}
        group = parallel_state.get_context_parallel_group()
        yield get_batch_on_this_cp_rank(rows, is_hybrid_cp=False, cp_group=group)


def forward_step(data: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    rows = next(data)
    output = model(rows["tokens"], rows["position_ids"], None, labels=rows["labels"], loss_mask=rows["loss_mask"])
    return output, partial(loss, rows["loss_mask"])


def loss(mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss, the number of tokens and both for the log, as pretraining's loss function returns them."""
    total, tokens = (output * mask).sum(), mask.sum().int()
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}
