"""A decoder whose MLPs have an activation of megatron-act; needs torch and transformers and nothing else.

Attention, norms, rotary embeddings, cache and generation are transformers' Qwen3; this file replaces the MLPs, and the
norms of queries and keys where the model has none. Each activation's scalars are raw fp32 parameters of shape (1,) per
layer, or per expert. They stay fp32 when the model is loaded in bf16 or fp16; the formulas are computed in fp32.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM, Qwen3Model, Qwen3PreTrainedModel

from .configuration_megatron_act import MegatronActConfig

Gate = Callable[[Tensor], Tensor]
BETA = 0.5  # slope at 0 of the xIELU family


def softplus(raw: Tensor) -> Tensor:
    """log(1 + e^raw)."""
    return F.softplus(raw, threshold=40.0)


def xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    """x > 0: a_p x^2 + x/2; x <= 0: a_n (e^x - 1 - x) + x/2; a_p = softplus(alpha_p), a_n = 1/2 + softplus(alpha_n)."""
    low, high, a_n = x.clamp(max=0.0), torch.relu(x), BETA + softplus(alpha_n)
    return (softplus(alpha_p) * high + BETA) * high + a_n * torch.expm1(low) + (BETA - a_n) * low


def xiprelu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    """a x^2 + x/2; a = softplus(alpha_p) for x > 0, softplus(alpha_n) for x <= 0."""
    low, high = x.clamp(max=0.0), torch.relu(x)
    return (softplus(alpha_p) * high + BETA) * high + (softplus(alpha_n) * low + BETA) * low


def xiprelup(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, power: Tensor) -> Tensor:
    """a |x|^q + x/2; a as in xiprelu, q = 1 + softplus(power)."""
    y = torch.where(x > 0, softplus(alpha_p), softplus(alpha_n)) * x.abs().pow(1.0 + softplus(power)) + BETA * x
    return torch.where(x.isinf(), x.abs(), y)


def crrelu(x: Tensor, eps: Tensor) -> Tensor:
    """max(0, x) + eps x e^(-x^2/2)."""
    c = x.clamp(-40.0, 40.0)
    return torch.relu(x) + eps * c * torch.exp(-0.5 * c * c)


def logistic(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return torch.sigmoid(x)


def gaussian(x: Tensor) -> Tensor:
    """The standard normal distribution at x, without cancellation for x << 0."""
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def arctangent(x: Tensor) -> Tensor:
    """arctan(x)/pi + 1/2, without cancellation for x << 0."""
    return torch.atan2(torch.ones_like(x), -x) * (1.0 / math.pi)


def tanh_gate(x: Tensor) -> Tensor:
    """(1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    return torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))


def gated(gate: Gate) -> Callable[..., Tensor]:
    """x gate(x)."""
    return lambda x: x.clamp(min=-1e30) * gate(x)


def expanded(gate: Gate) -> Callable[..., Tensor]:
    """x (gate(x) (1 + 2 alpha) - alpha); x is cut only where the second factor's limit is 0."""

    def formula(x: Tensor, alpha: Tensor) -> Tensor:
        low, high = torch.where(alpha == 0, 1e30, math.inf), torch.where(alpha == -1, 1e30, math.inf)
        x = x.clamp(-low, high)
        return x * ((1.0 + 2.0 * alpha) * gate(x) - alpha)

    return formula


# name: formula, its scalars with their raw initial values
RAW = {value: math.log(math.expm1(value)) for value in (0.3, 0.8, 1.0)}  # softplus(RAW[value]) = value
FORMULAS: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "xielu": (xielu, {"alpha_p": RAW[0.8], "alpha_n": RAW[0.3]}),
    "xiprelu": (xiprelu, {"alpha_p": RAW[0.8], "alpha_n": RAW[0.8]}),
    "xiprelup": (xiprelup, {"alpha_p": RAW[0.8], "alpha_n": RAW[0.8], "power": RAW[1.0]}),
    "crrelu": (crrelu, {"eps": 0.01}),
    "xsilu": (expanded(logistic), {"alpha": 0.0}),
    "xgelu": (expanded(gaussian), {"alpha": 0.0}),
    "xatlu": (expanded(arctangent), {"alpha": 0.0}),
    "gelu": (gated(gaussian), {}),
    "gelu_tanh": (gated(tanh_gate), {}),
    "silu": (gated(logistic), {}),
    "relu": (torch.relu, {}),
    "relu2": (lambda x: torch.relu(x).square(), {}),
}


class TrainableActivation(nn.Module):
    """y = f(x; raw scalars), computed in fp32, in x's dtype."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.formula, self.initial = FORMULAS[name]
        for scalar, raw in self.initial.items():
            self.register_parameter(scalar, nn.Parameter(torch.tensor([raw], dtype=torch.float32)))

    def forward(self, x: Tensor) -> Tensor:
        scalars = [getattr(self, name) for name in self.initial]
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.formula(x.to(wide), *(scalar.to(wide) for scalar in scalars)).to(x.dtype)


class MLP(nn.Module):
    """down(f(up(x))); ``act_fn`` None: whoever owns this MLP passes the activation."""

    def __init__(self, hidden: int, width: int, act_fn: nn.Module | None = None) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        if act_fn is not None:
            self.act_fn = act_fn

    def forward(self, x: Tensor, act_fn: nn.Module | None = None) -> Tensor:
        return self.down_proj((act_fn or self.act_fn)(self.up_proj(x)))


class Experts(nn.Module):
    """Sum over a token's chosen experts of probability times expert(x); one activation, or one per expert."""

    def __init__(self, config: MegatronActConfig) -> None:
        super().__init__()
        self.top_k, self.norm, self.factor = (
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        own = config.activation_per_expert
        self.act_fn = None if own else TrainableActivation(config.activation)
        self.experts = nn.ModuleList(
            MLP(
                config.hidden_size,
                config.moe_intermediate_size,
                TrainableActivation(config.activation) if own else None,
            )
            for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = self.gate(tokens).float().softmax(-1)
        chosen, index = probabilities.topk(self.top_k, dim=-1)
        if self.norm:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        chosen = (chosen * self.factor).to(x.dtype)
        result = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            row, place = (index == number).nonzero(as_tuple=True)
            result.index_add_(0, row, chosen[row, place, None] * expert(tokens[row], self.act_fn))
        return result.reshape(x.shape)


class Scalars(Qwen3PreTrainedModel):
    """What all models of `MegatronActConfig` share: how scalars begin, and that they stay fp32."""

    config_class = MegatronActConfig
    _keep_in_fp32_modules_strict = ["act_fn"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TrainableActivation):
            for name, raw in module.initial.items():
                nn.init.constant_(getattr(module, name), raw)


class MegatronActModel(Scalars, Qwen3Model):
    """The decoder without its language-model head."""

    def __init__(self, config: MegatronActConfig) -> None:
        super().__init__(config)
        layers: Any = self.layers
        for layer in layers:
            if config.num_experts:
                layer.mlp = Experts(config)
            else:
                activation = TrainableActivation(config.activation)
                layer.mlp = MLP(config.hidden_size, config.intermediate_size, activation)
            if not config.qk_norm:
                layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
        self.post_init()


class MegatronActForCausalLM(Scalars, Qwen3ForCausalLM):
    """A causal language model of `MegatronActConfig`."""

    def __init__(self, config: MegatronActConfig) -> None:
        super().__init__(config)
        self.model = MegatronActModel(config)
        self.post_init()
