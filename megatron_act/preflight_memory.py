"""Bytes on the fullest GPU while it trains: model state, kept activations, logits.

    state        `layout_memory`: weights, gradients, Adam; the last shared by data- and context-parallel ranks
    activations  tokens of a micro batch on this rank x bytes per token and layer x layers x micro batches in flight
    logits       8 bytes each on the last stage: bf16 values, fp32 softmax, bf16 gradient

`memory.activation_bytes` counts over all tensor-parallel ranks. With sequence parallelism each holds its share;
without, the inputs of norms, linear_qkv and linear_fc1 (4 h elements) are on every one. A pipeline's first stage holds
min(stages, micro batches) of them, with v virtual stages (1 + (p - 1) / (p v)) p; the last stage holds one.
Full recomputation keeps a layer's input and one whole layer. The GPU also holds CUDA's context, NCCL's buffers and what
the allocator cannot use: a tenth is left for those (`USABLE`).
"""

from argparse import Namespace
from dataclasses import dataclass

from megatron_act.budget import Shape
from megatron_act.layout_memory import Layout, state_bytes
from megatron_act.memory import BF16_BYTES, activation_bytes
from megatron_act.preflight_finding import Finding, failed

USABLE = 0.9
LOGIT_BYTES = 8
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a GPU sees at once, beside the layout.

    Attributes:
        micro_batch: sequences.
        micro_batches: of a step, on each data-parallel rank.
        virtual: virtual pipeline stages of a rank; 1: none.
        recompute_activation: ``--recompute-activation-function``.
        fp8_input: ``--activation-fp8-input-store``.
        recompute_full: ``--recompute-granularity full``, every layer.
    """

    micro_batch: int
    micro_batches: int
    context_parallel: int = 1
    sequence_parallel: bool = False
    virtual: int = 1
    recompute_activation: bool = False
    fp8_input: bool = False
    recompute_full: bool = False


@dataclass(frozen=True)
class GpuBytes:
    """Bytes on the fullest GPU."""

    state: int
    activations: int

    @property
    def total(self) -> int:
        """Both."""
        return self.state + self.activations

    def __str__(self) -> str:
        state, activations = self.state / GIB, self.activations / GIB
        return f"{self.total / GIB:.1f} GiB: {state:.1f} state, {activations:.1f} activations"


def gpu_bytes(shape: Shape, layout: Layout, step: Step) -> GpuBytes:
    """The estimate for a dense GPT in bf16.

    Args:
        layout: ``data_parallel`` counts context-parallel ranks too, which share Adam's state.

    Raises:
        UserError: a size of the layout that does not divide what it splits.
    """
    tokens = shape.seq_length * step.micro_batch // step.context_parallel
    layer = tokens * layer_bytes(shape, layout.tensor_parallel, step)
    layers, stages = shape.num_layers // layout.pipeline_parallel, layout.pipeline_parallel
    whole = 0
    if step.recompute_full:
        kept = BF16_BYTES * shape.hidden_size // (layout.tensor_parallel if step.sequence_parallel else 1)
        layer, whole = tokens * kept, layer
    in_flight = min(stages, step.micro_batches)
    held = layer * layers * in_flight
    if step.virtual > 1:
        held += layer * layers * (stages - 1) // step.virtual
    logits = LOGIT_BYTES * tokens * shape.vocab_size // layout.tensor_parallel
    last = layer * layers + logits
    return GpuBytes(state_bytes(shape, layout).total, max(held, last) + whole)


def layer_bytes(shape: Shape, tensor_parallel: int, step: Step) -> int:
    """Bytes per token that one layer keeps on one tensor-parallel rank."""
    kept = activation_bytes(shape, recompute_activation=step.recompute_activation, fp8_input=step.fp8_input).total
    whole = 4 * shape.hidden_size * BF16_BYTES
    if step.sequence_parallel:
        return kept // tensor_parallel
    return whole + (kept - whole) // tensor_parallel


def shape_of(args: Namespace, vocab_size: int, scalars: int) -> Shape:
    """The shape of Megatron's validated arguments.

    Raises:
        UserError: a size that cannot be built.
    """
    gated = args.swiglu
    return Shape(
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        ffn_hidden_size=args.ffn_hidden_size,
        activation="swiglu" if gated else args.activation or "gelu",
        activation_scalars=scalars,
        vocab_size=vocab_size,
        seq_length=args.seq_length,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        qk_layernorm=bool(args.qk_layernorm),
        normalization=args.normalization,
        bias=bool(args.add_bias_linear),
        qkv_bias=bool(args.add_qkv_bias),
        learned_positions=args.max_position_embeddings if args.position_embedding_type == "learned_absolute" else 0,
    )


def checked(text: str, wanted: int, there: int) -> Finding:
    """An estimate of ``wanted`` bytes against the ``there`` of a device."""
    usable = int(USABLE * there)
    if wanted <= usable:
        return Finding("memory", f"{text}; the device has {there / GIB:.0f} GiB")
    remedy = (
        "raise --tensor-model-parallel-size or --pipeline-model-parallel-size, lower --micro-batch-size, or add "
        "--recompute-activation-function or --use-distributed-optimizer"
    )
    return failed("memory", f"at most {usable / GIB:.1f} GiB, {USABLE:.0%} of the device", text, remedy)


def estimate(args: Namespace, shape: Shape, data_parallel: int) -> GpuBytes:
    """`gpu_bytes` of Megatron's validated arguments."""
    layout = Layout(
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        data_parallel=data_parallel * args.context_parallel_size,
        distributed_optimizer=bool(args.use_distributed_optimizer),
    )
    step = Step(
        micro_batch=args.micro_batch_size,
        micro_batches=max(1, args.global_batch_size // (args.micro_batch_size * data_parallel)),
        context_parallel=args.context_parallel_size,
        sequence_parallel=bool(args.sequence_parallel),
        virtual=args.virtual_pipeline_model_parallel_size or 1,
        recompute_activation=bool(args.recompute_activation_function),
        fp8_input=bool(args.activation_fp8_input_store),
        recompute_full=args.recompute_granularity == "full",
    )
    return gpu_bytes(shape, layout, step)
