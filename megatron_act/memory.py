"""Bytes of activations: what one layer keeps for its backward pass."""

from dataclasses import dataclass

from megatron_act.budget import Shape

BF16_BYTES = 2
FP8_BLOCK = 128  # elements that share one fp32 scale (--activation-fp8-input-store)


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
    shape: Shape, *, recompute_activation: bool = False, fp8_input: bool = False, element_bytes: int = BF16_BYTES
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
        fp8_input: keep the pre-activation in FP8, 1 + 4/128 bytes an element (``--activation-fp8-input-store``).
        element_bytes: 2 for bf16.
    """
    normed = shape.query_size + shape.groups * shape.head_dim if shape.qk_layernorm else 0
    attention = 2 * shape.hidden_size + shape.qkv_size + normed + shape.query_size
    before = (shape.mlp_matrices - 1) * shape.ffn_hidden_size  # features of linear_fc1's output
    after = 0 if recompute_activation else shape.ffn_hidden_size
    stored = before + 4 * -(-before // FP8_BLOCK) if fp8_input else element_bytes * before
    mlp = stored + element_bytes * (2 * shape.hidden_size + after)
    return ActivationBytes(attention=element_bytes * attention, mlp=mlp)
