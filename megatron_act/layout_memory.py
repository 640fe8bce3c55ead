"""Bytes of model state: weights, gradients and Adam on the fullest GPU of a parallel layout.

Training in bf16 with fp32 gradients and Adam holds per parameter

    weight      2   bf16
    gradient    4   fp32, accumulated and reduced in the same buffer
    optimizer  12   fp32 copy of the weight and two fp32 moments

and per activation scalar, which is fp32 itself and needs no copy, 4 + 4 + 8. The distributed optimizer shares the last
line out over data-parallel ranks. Buckets and their padding (up to a few hundred elements each) are not counted.

Tensor parallelism splits matrices and the biases of linear_qkv and linear_fc1 by T; norms, scalars, the other biases
and learned positions are copies. Of a pipeline the first stage holds the embeddings, the last one the final norm and
the output layer: a copy of the embedding where the two are tied.
"""

from dataclasses import dataclass

from megatron_act.budget import NORMALIZATIONS, Shape, parameters
from megatron_act.errors import UserError

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12  # bytes per bf16 parameter
SCALAR_WEIGHT, SCALAR_OPTIMIZER = 4, 8  # bytes per activation scalar; its gradient is as any


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is spread over GPUs: the sizes of its tensor-, pipeline- and data-parallel groups.

    Raises:
        UserError: a size below 1.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    distributed_optimizer: bool = True

    def __post_init__(self) -> None:
        sizes = {
            "--tensor-model-parallel-size": self.tensor_parallel,
            "--pipeline-model-parallel-size": self.pipeline_parallel,
            "--data-parallel-size": self.data_parallel,
        }
        for flag, size in sizes.items():
            if size < 1:
                raise UserError(f"{flag}: expected an integer of at least 1, got {size}")

    @property
    def gpus(self) -> int:
        """How many GPUs the layout takes."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    def __str__(self) -> str:
        optimizer = "distributed optimizer" if self.distributed_optimizer else "optimizer on every rank"
        return f"TP {self.tensor_parallel}, PP {self.pipeline_parallel}, DP {self.data_parallel}, {optimizer}"


@dataclass(frozen=True)
class RankParameters:
    """Parameters that one GPU holds: ``bf16`` ones, and the activation's fp32 ``scalars``."""

    bf16: int
    scalars: int


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All model state."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(shape: Shape, layout: Layout) -> StateBytes:
    """Weights, gradients and Adam state on the fullest GPU.

    Raises:
        UserError: a size of the layout that does not divide what it splits.
    """
    stages = {0, layout.pipeline_parallel - 1}
    held = max((rank_parameters(shape, layout, stage) for stage in stages), key=lambda rank: rank.bf16)
    sharers = layout.data_parallel if layout.distributed_optimizer else 1
    return StateBytes(
        weights=WEIGHT * held.bf16 + SCALAR_WEIGHT * held.scalars,
        gradients=GRADIENT * (held.bf16 + held.scalars),
        optimizer=-(-(OPTIMIZER * held.bf16 + SCALAR_OPTIMIZER * held.scalars) // sharers),
    )


def rank_parameters(shape: Shape, layout: Layout, stage: int) -> RankParameters:
    """Parameters of one rank of pipeline stage ``stage`` (from 0).

    Raises:
        UserError: a size of the layout that does not divide what it splits.
    """
    _check(shape, layout)
    counts, pipeline = parameters(shape), layout.pipeline_parallel
    final_norm = NORMALIZATIONS[shape.normalization] * shape.hidden_size
    row_biases = 2 * shape.hidden_size * shape.num_layers if shape.bias else 0  # linear_proj, linear_fc2
    split = (counts.attention + counts.mlp + counts.biases - row_biases) // pipeline
    copies = (counts.norms - final_norm + row_biases) // pipeline
    if stage == 0:
        split += counts.word_embeddings
        copies += counts.position_embeddings
    if stage == pipeline - 1:
        split += counts.output_layer if pipeline == 1 else counts.logits_weight
        copies += final_norm
    scalars = counts.activation_scalars // pipeline
    return RankParameters(bf16=split // layout.tensor_parallel + copies, scalars=scalars)


def _check(shape: Shape, layout: Layout) -> None:
    tensor, pipeline = layout.tensor_parallel, layout.pipeline_parallel
    whole_groups = max(shape.groups, tensor) % min(shape.groups, tensor) == 0
    divided = (
        ("--num-layers", shape.num_layers, "--pipeline-model-parallel-size", pipeline),
        ("--ffn-hidden-size", shape.ffn_hidden_size, "--tensor-model-parallel-size", tensor),
        ("--num-attention-heads", shape.num_attention_heads, "--tensor-model-parallel-size", tensor),
        ("--padded-vocab-size", shape.vocab_size, "--tensor-model-parallel-size", tensor),
    )
    for flag, value, divisor_flag, divisor in divided:
        if value % divisor:
            raise UserError(
                f"{flag}: expected a multiple of {divisor_flag} {divisor}, got {value}: change one of the two"
            )
    if not whole_groups:
        raise UserError(
            f"--num-query-groups: expected a multiple or divisor of --tensor-model-parallel-size {tensor}, "
            f"got {shape.groups}: change one of the two"
        )
