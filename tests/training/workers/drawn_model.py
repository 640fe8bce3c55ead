"""A drawn case's model and optimizer, built as ``megatron.training`` builds them from the same options."""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import drawn_cases as drawn
import torch
from context_attention import GatheringAttention
from drawn_cases import Case
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import training
from megatron.training.models.gpt import GPTModelConfig

from megatron_act import finalize, mtp, specs

Hook = Callable[[list[Any]], list[Any]]


def transformer_config(case: Case) -> TransformerConfig:
    """What the command line's flags would become."""
    return TransformerConfig(
        num_layers=case.layers,
        hidden_size=drawn.HIDDEN,
        ffn_hidden_size=drawn.FFN,
        num_attention_heads=drawn.HEADS,
        num_query_groups=case.groups,
        kv_channels=drawn.CHANNELS,
        normalization="LayerNorm" if case.layer_norm else "RMSNorm",
        qk_layernorm=case.qk_norm,
        add_bias_linear=case.bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.2,
        mtp_num_layers=1 if case.mtp else None,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        deallocate_pipeline_outputs=True,
        transformer_impl="local",
        calculate_per_token_loss=case.per_token_loss,
        **_parallel(case),
        **_experts(case),
        **_recompute(case),
    )


def _parallel(case: Case) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": case.tp,
        "sequence_parallel": case.sp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vpp if case.vpp > 1 else None,
        "pipeline_dtype": torch.float32,
        "overlap_p2p_comm": case.vpp > 1,
        "batch_p2p_comm": case.vpp == 1,
        "context_parallel_size": case.cp,
        "expert_model_parallel_size": case.ep,
        "expert_tensor_parallel_size": case.etp,
    }


def _experts(case: Case) -> dict[str, Any]:
    if case.experts == "none":
        return {}
    return {
        "num_moe_experts": drawn.EXPERTS,
        "moe_router_topk": drawn.TOP_K,
        "moe_router_load_balancing_type": "none",
        "moe_ffn_hidden_size": drawn.EXPERT_FFN,
        "moe_shared_expert_intermediate_size": drawn.SHARED_FFN if case.shared_expert else None,
        "moe_layer_freq": [0] + [1] * (case.layers - 1) if case.dense_first else 1,
        "moe_token_dispatcher_type": case.dispatcher,
    }


def _recompute(case: Case) -> dict[str, Any]:
    granularity, _, method = case.recompute.partition(" ")
    if granularity == "none":
        return {}
    if granularity == "full":
        return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": [case.recompute]}


@contextlib.contextmanager
def attention_for(case: Case) -> Iterator[None]:
    """Megatron's local attention serves one context-parallel rank; several get the tests' own."""
    kept = LocalSpecProvider.core_attention
    if case.cp > 1:
        LocalSpecProvider.core_attention = lambda self: GatheringAttention
    try:
        yield
    finally:
        LocalSpecProvider.core_attention = kept


def build_models(case: Case, hooks: list[Hook]) -> list[Any]:
    """This rank's model chunks in Megatron's DDP.

    Args:
        case: the configuration.
        hooks: run on the chunks before they are wrapped.
    """
    install = [finalize.install] if case.reduction == "finalize" else []  # else the specs' own: in the backward pass
    config = GPTModelConfig(
        transformer=transformer_config(case),
        transformer_layer_spec=specs.layer_spec(
            case.activation, recompute=case.recompute_activation, per_expert=case.experts == "per expert"
        ),
        vocab_size=drawn.VOCABULARY,
        seq_length=drawn.SEQUENCE,
        position_embedding_type="rope",
        rotary_base=drawn.ROPE_BASE,
        share_embeddings_and_output_weights=case.tied,
        pre_wrap_hooks=hooks,
        post_wrap_hooks=[mtp.number_layers, *install],
    )
    config.finalize()
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=case.overlap_grad_reduce,
        overlap_param_gather=case.overlap_param_gather,
        use_distributed_optimizer=case.distributed_optimizer,
        bucket_size=2000 if case.overlap_grad_reduce else None,  # several buckets
    )
    builder = config.get_builder_cls()(config)
    with attention_for(case):
        return builder.build_distributed_models(
            ProcessGroupCollection.use_mpu_process_groups(), ddp, data_parallel_random_init=False
        )


@dataclass(frozen=True)
class Training:
    """What updates the models."""

    optimizer: Any
    scheduler: OptimizerParamScheduler


def build_optimizer(case: Case, models: list[Any]) -> Training:
    """AdamW with the parameter groups that ``megatron.training`` and this project give it, at a constant rate."""
    options = Namespace(
        lr=drawn.LEARNING_RATE,
        min_lr=drawn.LEARNING_RATE,
        weight_decay=drawn.WEIGHT_DECAY,
        adam_eps=drawn.EPSILON,
        adam_beta1=drawn.BETAS[0],
        adam_beta2=drawn.BETAS[1],
        clip_grad=drawn.CLIP if case.clip else 0.0,
        use_distributed_optimizer=case.distributed_optimizer,
        overlap_param_gather=case.overlap_param_gather,
    )
    config, overrides = training.get_megatron_optimizer_config(options)
    optimizer = get_megatron_optimizer(config, models, config_overrides=overrides, use_gloo_process_groups=False)
    rate = {"init_lr": 0.0, "max_lr": config.lr, "min_lr": config.lr, "lr_warmup_steps": 0, "lr_decay_steps": 100}
    decay = {"start_wd": config.weight_decay, "end_wd": config.weight_decay, "wd_incr_steps": 100}
    styles = {"lr_decay_style": "constant", "wd_incr_style": "constant"}
    return Training(optimizer, OptimizerParamScheduler(optimizer, **rate, **decay, **styles))
