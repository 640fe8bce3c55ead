"""Memory of training a dense GPT, from its shape alone: activations per token, model state per GPU."""

from dataclasses import dataclass

from megatron_act.budget import Shape, parameters
from megatron_act.errors import UserError

BF16_BYTES = 2
RESIDENT_BYTES = 2 + 4  # per parameter on every data-parallel rank: bf16 weight, fp32 gradient
OPTIMIZER_BYTES = 4 + 4 + 4  # per parameter, shared out by the distributed optimizer: fp32 weight and two Adam moments


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that one layer keeps per token for its backward pass, over all tensor-parallel ranks together."""

    attention: int
    mlp: int

    @property
    def total(self) -> int:
        """Bytes per token and layer."""
        return self.attention + self.mlp


def activation_bytes(
    shape: Shape, *, recompute_activation: bool = False, element_bytes: int = BF16_BYTES
) -> ActivationBytes:
    """What the matmuls, norms and activation of one layer save for the backward pass, per token.

    Counted: inputs of both norms and of linear_qkv, linear_proj, linear_fc1 and linear_fc2; queries, keys and values
    (before and after their norm with ``qk_layernorm``); the pre-activation. Not counted: dropout masks (no dropout),
    the attention square (a flash kernel keeps none) and per-row statistics. With h, q, k, F as in `budget`:

        attention   2h + (q + 2k) [+ (q + k)] + q         elements
        MLP         2h + a F + F                          a = 2 with a gate (gate and up), 1 without

    Args:
        recompute_activation: drop the last F, the activation's output, and compute it again in the backward pass
            (``--recompute-activation-function``).
        element_bytes: 2 for bf16.
    """
    normed = shape.query_size + shape.groups * shape.head_dim if shape.qk_layernorm else 0
    attention = 2 * shape.hidden_size + shape.qkv_size + normed + shape.query_size
    kept = shape.mlp_matrices - 1 + (0 if recompute_activation else 1)
    mlp = 2 * shape.hidden_size + kept * shape.ffn_hidden_size
    return ActivationBytes(attention=element_bytes * attention, mlp=element_bytes * mlp)


def state_bytes_per_gpu(
    shape: Shape, *, tensor_parallel: int = 1, pipeline_parallel: int = 1, data_parallel: int = 1
) -> int:
    """Weights, gradients and Adam state on the fullest GPU of a layout, with bf16 and the distributed optimizer.

    18 bytes per parameter on one GPU, 6 + 12 / data_parallel with more. Matrices and biases are split over tensor
    parallel ranks (the biases of row-parallel layers, which are not, are neglected), norms and scalars are copies.
    With a pipeline the first stage holds the word embedding and the last one the output layer, tied or not.

    Raises:
        UserError: a parallel size below 1, or layers that the pipeline cannot share equally.
    """
    _check_layout(shape, tensor_parallel, pipeline_parallel, data_parallel)
    counts = parameters(shape)
    copies = counts.norms + counts.activation_scalars
    split = counts.attention + counts.mlp + counts.biases
    ends = counts.word_embeddings + counts.position_embeddings
    if pipeline_parallel == 1:
        ends += counts.output_layer
    per_gpu = (split / pipeline_parallel + ends) / tensor_parallel + copies / pipeline_parallel
    return round(per_gpu * (RESIDENT_BYTES + OPTIMIZER_BYTES / data_parallel))


def _check_layout(shape: Shape, tensor_parallel: int, pipeline_parallel: int, data_parallel: int) -> None:
    sizes = {"tensor-model": tensor_parallel, "pipeline-model": pipeline_parallel, "data": data_parallel}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"--{name}-parallel-size: expected an integer of at least 1, got {size}")
    if shape.num_layers % pipeline_parallel:
        raise UserError(
            f"--num-layers: expected a multiple of --pipeline-model-parallel-size {pipeline_parallel}, "
            f"got {shape.num_layers}: change one of the two"
        )
