"""One GPT training step as ``megatron.training.pretrain`` wants it: batch, forward, loss.

Covers token pretraining from indexed datasets under tensor, pipeline, sequence and context parallelism. What
Megatron-LM's ``pretrain_gpt.py`` does besides (SFT, packed documents, distillation, ModelOpt) stays there: it takes
this project's activations through ``--spec megatron_act.specs NAME``.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import is_first_or_last_pipeline_stage

Batch = dict[str, torch.Tensor | None]
SPIKE = 10  # times the largest loss so far, as in Megatron-LM's entry
FIELDS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


@cache
def has_mtp(vp_stage: int | None) -> bool:
    """Whether multi-token prediction layers, which need the batch too, live on this rank."""
    config = core_transformer_config_from_args(get_args())
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def get_batch(data_iterator: Iterator[Batch], vp_stage: int | None = None) -> Batch:
    """The micro-batch of this rank: read on tensor-parallel rank 0, broadcast, cut for context-parallel ranks.

    Returns:
        ``tokens labels loss_mask attention_mask position_ids``, each (micro batch, sequence / cp) or None where this
        pipeline stage has no use for it.
    """
    args = get_args()
    mtp = has_mtp(vp_stage)
    if not (is_first_or_last_pipeline_stage(vp_stage) or mtp):
        return dict.fromkeys(FIELDS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {key: _to_device(sample.get(key)) for key in FIELDS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=get_context_parallel_group())


def _to_device(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.cuda(non_blocking=True)


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the per-token losses over unmasked tokens, with their number; Megatron divides after reducing both.

    Args:
        loss_mask: (micro batch, sequence), 0 or 1.
        output_tensor: per-token cross entropy in nats, same shape.

    Returns:
        The summed loss, the number of tokens (int32), and both as ``{"lm loss": (2,)}`` for the log.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    _judge(loss)
    tokens = mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def _judge(loss: torch.Tensor) -> None:
    """Hands the loss to Megatron's rerun machine: NaN and Inf are fatal, a spike is reported, where flags ask so."""
    args, machine = get_args(), get_rerun_state_machine()
    checks: list[tuple[str, Any, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [("found NaN in local forward loss", torch.isnan, True)]
        checks += [("found Inf in local forward loss", torch.isinf, True)]
    if args.check_for_spiky_loss:
        spike = partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss")
        checks += [("Spiky loss", spike, False)]
    for message, rejects, fatal in checks:
        machine.validate_result(result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=fatal)


def forward_step(data_iterator: Iterator[Batch], model: GPTModel) -> tuple[torch.Tensor, Any]:
    """Runs one micro-batch; returns the stage's output and the function that turns the last one into a loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    mask: Any = batch["loss_mask"]  # None on stages that never compute the loss
    return output, partial(loss_func, mask)
