"""Whether every dimension of a model divides by what the layout splits it into: all of them are looked at."""

from argparse import Namespace
from collections.abc import Iterator

from megatron_act.preflight_finding import Finding, failed

FP8_ALIGNMENT = 16  # Transformer Engine's FP8 GEMMs
_UNEVEN = ("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_UNEVEN_SWITCHES = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def checks(args: Namespace, world_size: int) -> list[Finding]:
    """One finding a division.

    Args:
        args: Megatron's parsed arguments, not necessarily validated.
        world_size: ranks.
    """
    rows = [*_ranks(args, world_size), *_heads(args), *_matrices(args), *_layers(args), *_sequence(args)]
    return [_division(*row) for row in [*rows, *_batch(args, world_size), *_experts(args, world_size)]]


Row = tuple[str, int, str, int]  # what is divided, its size, by what, by how many


def _division(name: str, size: int, by: str, divisor: int) -> Finding:
    label = f"{name} by {by}"
    if divisor < 1 or size % divisor:
        return failed(label, f"a multiple of {divisor}", str(size), f"change {name} or {by}")
    return Finding(label, f"{size} = {divisor} x {size // divisor}")


def data_parallel(args: Namespace, world_size: int) -> int:
    """Data-parallel ranks, 0 where the layout needs more ranks than there are."""
    return world_size // _model_ranks(args)


def _model_ranks(args: Namespace) -> int:
    return int(args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size)


def _ranks(args: Namespace, world_size: int) -> Iterator[Row]:
    yield "ranks (nodes x GPUs)", world_size, "tensor x pipeline x context parallel", _model_ranks(args)


def _heads(args: Namespace) -> Iterator[Row]:
    heads, tensor = args.num_attention_heads, args.tensor_model_parallel_size
    yield "--num-attention-heads", heads, "tensor parallel", tensor
    if args.group_query_attention:
        yield "--num-attention-heads", heads, "--num-query-groups", args.num_query_groups
        larger, smaller = max(args.num_query_groups, tensor), min(args.num_query_groups, tensor)
        yield "query groups or tensor parallel", larger, "the smaller of the two", smaller
    if args.kv_channels is None:
        yield "--hidden-size", args.hidden_size, "--num-attention-heads", heads


def ffn_hidden_size(args: Namespace) -> int:
    """The MLP's width, with Megatron's default: 4 h, for SwiGLU 8/3 h rounded down to a multiple of 64."""
    if args.ffn_hidden_size is not None:
        return int(args.ffn_hidden_size)
    return int(args.hidden_size * 4 * 2 / 3) // 64 * 64 if args.swiglu else 4 * args.hidden_size


def _matrices(args: Namespace) -> Iterator[Row]:
    tensor = args.tensor_model_parallel_size
    yield "--ffn-hidden-size", ffn_hidden_size(args), "tensor parallel", tensor
    if args.padded_vocab_size:
        yield "--padded-vocab-size", args.padded_vocab_size, "tensor parallel", tensor
    if args.fp8:
        yield "--ffn-hidden-size", ffn_hidden_size(args), "16 (FP8) x tensor parallel", FP8_ALIGNMENT * tensor
        yield "--hidden-size", args.hidden_size, "16 (FP8)", FP8_ALIGNMENT


def _layers(args: Namespace) -> Iterator[Row]:
    if any(getattr(args, name) is not None for name in _UNEVEN) or any(
        getattr(args, name) for name in _UNEVEN_SWITCHES
    ):
        return  # uneven stages are Megatron's own to check
    stages = args.pipeline_model_parallel_size
    yield "--num-layers", args.num_layers, "pipeline parallel", stages
    if args.num_layers_per_virtual_pipeline_stage:
        chunk = args.num_layers_per_virtual_pipeline_stage
        yield "layers of a pipeline stage", args.num_layers // stages, "--num-layers-per-virtual-pipeline-stage", chunk
    if args.num_virtual_stages_per_pipeline_rank:
        virtual = args.num_virtual_stages_per_pipeline_rank
        yield "layers of a pipeline stage", args.num_layers // stages, "--num-virtual-stages-per-pipeline-rank", virtual


def _sequence(args: Namespace) -> Iterator[Row]:
    context, tensor = args.context_parallel_size, args.tensor_model_parallel_size
    if context > 1:
        yield "--seq-length", args.seq_length, "2 x context parallel", 2 * context
    if args.sequence_parallel:
        yield "--seq-length of a context rank", args.seq_length // context, "tensor parallel (sequence)", tensor


def _batch(args: Namespace, world_size: int) -> Iterator[Row]:
    replicas = data_parallel(args, world_size)
    if args.global_batch_size is not None and replicas:
        yield (
            "--global-batch-size",
            args.global_batch_size,
            "micro batch x data parallel",
            args.micro_batch_size * replicas,
        )


def _experts(args: Namespace, world_size: int) -> Iterator[Row]:
    if not args.num_experts:
        return
    expert, tensor = (
        args.expert_model_parallel_size,
        args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
    )
    yield "--num-experts", args.num_experts, "expert parallel", expert
    ranks = expert * tensor * args.pipeline_model_parallel_size
    yield "ranks (nodes x GPUs)", world_size, "expert x expert tensor x pipeline parallel", ranks
    width = args.moe_ffn_hidden_size or ffn_hidden_size(args)
    yield "--moe-ffn-hidden-size", width, "expert tensor parallel", tensor
