"""A GPT in plain torch and fp64, written from the formulas: what every parallel layout must compute.

No module of Megatron's and none of this project's but the registry's formulas, of which it takes the forward value
alone: every derivative here is automatic. What the weights show is not configured: biases, gates, norms of queries and
keys, experts, shared experts, scalars per layer or per expert, prediction layers, tied embeddings are there if their
names are.

    x = x + attention(norm1(x));  x = x + mlp(norm2(x))                       (batch, sequence, hidden)
    mlp(x) = down(f(up(x))),  gated: down(f(gate(x)) up(x))
    experts(x) = sum over the k largest logits of softmax(those logits)_e mlp_e(x), plus shared(x)

Names of the weights: ``embedding output final_norm.weight layers.0.norm1.weight layers.0.attention.{q,k,v,o}.weight
layers.0.attention.{q,k}_norm.weight layers.0.norm2.weight layers.0.mlp.{up,gate,down}.weight
layers.0.mlp.scalars.alpha_p``, with experts ``layers.0.mlp.{router.weight, experts.0.up.weight, shared.up.weight,
scalars.alpha_p or experts.0.scalars.alpha_p}``; prediction layers ``mtp.0.{token_norm, hidden_norm, project, layer.*,
final_norm}``; biases beside their weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_act.kernels import api as kernels

Loss = tuple[Tensor, Tensor]  # what training minimises, and the language model's part of it that a log shows


@dataclass(frozen=True)
class Shape:
    """What the weights alone do not tell."""

    activation: str
    heads: int
    groups: int  # of keys and values; heads / groups queries share one
    top_k: int = 2  # experts per token
    layer_norm: bool = False  # False: RMSNorm
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    prediction_scale: float = 0.1  # of the mean loss of the prediction layers


class Weights:
    """A view of the weights below a prefix: ``Weights(all)["layers.0"]["up.weight"]``."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self.tensors, self.prefix = tensors, prefix

    def below(self, name: str) -> "Weights":
        return Weights(self.tensors, f"{self.prefix}{name}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(self.prefix + name)

    def count(self, name: str) -> int:
        """How many numbered entries ``name.0``, ``name.1``, ... there are."""
        start = f"{self.prefix}{name}."
        return len({key[len(start) :].split(".")[0] for key in self.tensors if key.startswith(start)})


@dataclass
class Record:
    """What forward and backward pass leave for a comparison with fp32.

    Attributes:
        margin: smallest gap between the last chosen expert's logit and the first rejected one's. Below the rounding
            of fp32, another precision may choose other experts.
        nearest: smallest |x| of a pre-activation. Below the rounding of fp32, another precision may be on the other
            side of a bend.
        terms: by a scalar's name the sum of the absolute values of the terms dL/dy df/d(raw) that its gradient is the
            sum of. They may cancel; what fp32 rounds off is proportional to them, not to what is left of them.
    """

    margin: float = math.inf
    nearest: float = math.inf
    terms: dict[str, float] = field(default_factory=dict)

    def add_terms(self, name: str, each: Tensor) -> None:
        self.terms[name] = self.terms.get(name, 0.0) + float(each.abs().sum())


class GPT:
    """The model of ``weights``, any float dtype; the functions below are its parts.

    Args:
        shape: what the weights do not tell.
        weights: tensors by the names above.
    """

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor]) -> None:
        self.shape, self.weights, self.record = shape, Weights(weights), Record()

    def hidden(self, tokens: Tensor) -> Tensor:
        """(batch, sequence) token ids to hidden states after the final norm."""
        x = self.weights["embedding"][tokens]
        for number in range(self.weights.count("layers")):
            x = layer(self.weights.below(f"layers.{number}"), x, self.shape, self.record)
        return norm(self.weights.below("final_norm"), x, self.shape)

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states to logits over the vocabulary; without a weight of its own, by the embedding."""
        output = self.weights.get("output")
        return hidden @ (self.weights["embedding"] if output is None else output).T

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, sequence) token ids to (batch, sequence, vocabulary)."""
        return self.project(self.hidden(tokens))

    def loss(self, tokens: Tensor, labels: Tensor, mask: Tensor) -> Loss:
        """Mean cross entropy in nats over the unmasked tokens of the whole batch.

        Args:
            tokens: (batch, sequence) ids.
            labels: (batch, sequence) ids of the next tokens.
            mask: (batch, sequence), 1 where a token counts; prediction layers are defined here for all ones only.

        Returns:
            The loss with that of the prediction layers, and without it.
        """
        hidden = self.hidden(tokens)
        each = cross_entropy(self.project(hidden), labels)
        mean = (each * mask).sum() / mask.sum()
        total, count = mean, self.weights.count("mtp")
        for number in range(count):
            hidden = self.predict_further(self.weights.below(f"mtp.{number}"), hidden, tokens, number + 1)
            shifted = cross_entropy(self.project(hidden), labels.roll(-number - 1, 1))
            total = total + self.shape.prediction_scale / count * shifted[:, : -number - 1].mean()
        return total, mean

    def predict_further(self, w: Weights, hidden: Tensor, tokens: Tensor, depth: int) -> Tensor:
        """A prediction layer: at each position it is shown the token ``depth`` positions on (id 0 past the end)."""
        ahead = F.pad(tokens[:, depth:], (0, depth))
        seen = norm(w.below("token_norm"), self.weights["embedding"][ahead], self.shape)
        known = norm(w.below("hidden_norm"), hidden, self.shape)
        x = linear(w, "project", torch.cat([seen, known], dim=-1))
        return norm(w.below("final_norm"), layer(w.below("layer"), x, self.shape, self.record), self.shape)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., vocabulary) logits and (...) labels to (...) nats."""
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, labels[..., None])[..., 0]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """x A^T, plus the bias if there is one."""
    y = x @ w[f"{name}.weight"].T
    bias = w.get(f"{name}.bias")
    return y if bias is None else y + bias


def norm(w: Weights, x: Tensor, shape: Shape) -> Tensor:
    """RMSNorm or LayerNorm over the last dimension."""
    if shape.layer_norm:
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + shape.norm_eps) * w["weight"]
    bias = w.get("bias")
    return x if bias is None else x + bias


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of (batch, sequence, heads, c): channels i and i + c/2 turn by position / base^(2 i / c)."""
    length, half = x.shape[1], x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = (torch.arange(length, dtype=x.dtype)[:, None] * frequency)[:, None, :]
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(w: Weights, x: Tensor, shape: Shape) -> Tensor:
    """Causal attention; queries of one group share its keys and values."""
    q, k, v = (linear(w, name, x).unflatten(-1, (-1, w["q.weight"].shape[0] // shape.heads)) for name in "qkv")
    if w.get("q_norm.weight") is not None:
        q, k = norm(w.below("q_norm"), q, shape), norm(w.below("k_norm"), k, shape)
    q, k = rotate(q, shape.rope_base), rotate(k, shape.rope_base)
    k, v = (each.repeat_interleave(shape.heads // shape.groups, dim=2) for each in (k, v))
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(q.shape[-1])
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return linear(w, "o", torch.einsum("bhqk,bkhc->bqhc", weights, v).flatten(2))


class Elementwise(torch.autograd.Function):
    """An activation's forward formula; its derivatives by forward-mode automatic differentiation of that formula."""

    @staticmethod
    def forward(ctx: Any, name: str, names: list[str], record: Record, x: Tensor, *raws: Tensor) -> Tensor:
        ctx.name, ctx.names, ctx.record = name, names, record
        ctx.save_for_backward(x, *raws)
        return formula(name, x, *raws)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope, *others = derivatives(ctx.name, *ctx.saved_tensors)
        terms = [grad * other for other in others]
        for name, each in zip(ctx.names, terms, strict=True):
            ctx.record.add_terms(name, each)
        return None, None, None, grad * slope, *(each.sum().view(1) for each in terms)


def formula(name: str, x: Tensor, *raws: Tensor) -> Tensor:
    """The registry's f(x) for raw scalars, without its derivatives."""
    function = kernels.get(name)
    return function.torch_fwd(x, *(p.constrained(raw, x.dtype) for p, raw in zip(function.params, raws, strict=True)))


def derivatives(name: str, *inputs: Tensor) -> list[Tensor]:
    """Of f at every element of x, with respect to x and to each raw scalar."""
    found = []
    for chosen in range(len(inputs)):
        tangents = tuple(torch.full_like(each, float(i == chosen)) for i, each in enumerate(inputs))
        found.append(torch.func.jvp(partial(formula, name), inputs, tangents)[1])
    return found


def activate(w: Weights, x: Tensor, shape: Shape, record: Record) -> Tensor:
    """f(x) with the scalars of ``w``."""
    names = [f"scalars.{param.name}" for param in kernels.get(shape.activation).params]
    if x.numel():
        record.nearest = min(record.nearest, float(x.detach().abs().min()))
    return Elementwise.apply(
        shape.activation, [w.prefix + name for name in names], record, x, *(w[name] for name in names)
    )


def mlp(w: Weights, scalars: Weights, x: Tensor, shape: Shape, record: Record) -> Tensor:
    """down(f(up(x))), or down(f(gate(x)) up(x)) where there is a gate."""
    up = linear(w, "up", x)
    if w.get("gate.weight") is None:
        return linear(w, "down", activate(scalars, up, shape, record))
    return linear(w, "down", activate(scalars, linear(w, "gate", x), shape, record) * up)


def experts(w: Weights, x: Tensor, shape: Shape, record: Record) -> Tensor:
    """The router's choice of experts for each token, weighted by a softmax over the chosen logits; a shared expert."""
    tokens = x.flatten(0, 1)
    sorted_logits, order = linear(w, "router", tokens).sort(dim=-1, descending=True)
    chosen = sorted_logits[:, : shape.top_k]
    if sorted_logits.shape[1] > shape.top_k:
        record.margin = min(record.margin, float((chosen[:, -1] - sorted_logits[:, shape.top_k]).detach().min()))
    weights = chosen.softmax(-1)
    total = torch.zeros_like(tokens)
    for number in range(w.count("experts")):
        row, place = (order[:, : shape.top_k] == number).nonzero(as_tuple=True)
        expert = w.below(f"experts.{number}")
        own = expert if expert.count("scalars") else w
        part = mlp(expert, own, tokens[row], shape, record)
        total = total.index_add(0, row, weights[row, place, None] * part)
    total = total.view_as(x)
    shared = w.below("shared")
    return total if shared.get("up.weight") is None else total + mlp(shared, shared, x, shape, record)


def layer(w: Weights, x: Tensor, shape: Shape, record: Record) -> Tensor:
    """One transformer layer, the norms before its parts."""
    x = x + attention(w.below("attention"), norm(w.below("norm1"), x, shape), shape)
    inner, inside = norm(w.below("norm2"), x, shape), w.below("mlp")
    if inside.get("router.weight") is not None:
        return x + experts(inside, inner, shape, record)
    return x + mlp(inside, inside, inner, shape, record)
