"""Configuration of a decoder with an activation of megatron-act; needs transformers and nothing else.

A Qwen3 configuration (RMSNorm before each block, rotary embeddings, grouped queries, a head size of its own) with the
keys below. ``hidden_act`` of the base class is not used.
"""

from typing import Any

from transformers import Qwen3Config


class MegatronActConfig(Qwen3Config):
    """What ``modeling_megatron_act`` builds.

    Args:
        activation: a name of ``modeling_megatron_act.FORMULAS``.
        qk_norm: RMSNorm over each query and key head.
        num_experts: routed experts per layer; 0: a dense MLP.
        num_experts_per_tok: experts that a token goes to.
        moe_intermediate_size: ffn width of an expert.
        norm_topk_prob: the chosen experts' probabilities sum to 1 (softmax over the chosen logits).
        routed_scaling_factor: their common factor.
        activation_per_expert: scalars for each expert, not one set per layer.
    """

    model_type = "megatron_act"
    base_model_tp_plan = {}  # noqa: RUF012  # one device: a split ffn dimension would need the scalars' gradients summed

    def __init__(
        self,
        activation: str = "xielu",
        qk_norm: bool = False,
        num_experts: int = 0,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int = 0,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        activation_per_expert: bool = False,
        **kwargs: Any,
    ) -> None:
        self.activation = activation
        self.qk_norm = qk_norm
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.activation_per_expert = activation_per_expert
        super().__init__(**kwargs)
