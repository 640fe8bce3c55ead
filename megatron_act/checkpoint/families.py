"""Megatron <-> Hugging Face as tables: one family per architecture, with its tensors and what its config fixes.

Both directions read the same tables: the export cuts ``hf`` out of ``megatron``, the import puts it there. Names of
Megatron's layer tensors follow ``decoder.layers.``; the layer norms carry the names of the linear layer behind them,
fused or not. What a Megatron model must be for any family to express it is in ``requirements``.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_act.checkpoint.requirements import check_requirements
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels


@dataclass(frozen=True)
class Rule:
    """``hf`` is ``pick`` of ``megatron``; ``{expert}`` in ``hf``: one tensor for each expert, Megatron stacks them.

    fp32 scalars stay fp32 whatever the weights' dtype. ``other``: Megatron's second name of the same tensor.
    """

    hf: str
    megatron: str
    pick: str = "whole"
    scalar: bool = False
    other: str = ""


@dataclass(frozen=True)
class Family:
    """An architecture of transformers, or of this project's modelling file (``ships_code``).

    ``layer`` rules are relative to ``model.layers.N.`` and ``decoder.layers.``. ``constants`` are fp32 tensors of shape
    () that the family stores per layer although they never change.
    """

    architecture: str
    model_type: str
    activation: str
    qk_norm: bool
    layer: tuple[Rule, ...]
    constants: Mapping[str, float]
    config: Mapping[str, Any]
    ships_code: bool = False


MODEL = (
    Rule("model.embed_tokens.weight", "embedding.word_embeddings.weight", "vocabulary"),
    Rule("model.norm.weight", "decoder.final_layernorm.weight"),
)
UNTIED = Rule("lm_head.weight", "output_layer.weight", "vocabulary")
ATTENTION = (
    Rule("self_attn.q_proj.weight", "self_attention.linear_qkv.weight", "query"),
    Rule("self_attn.k_proj.weight", "self_attention.linear_qkv.weight", "key"),
    Rule("self_attn.v_proj.weight", "self_attention.linear_qkv.weight", "value"),
    Rule("self_attn.o_proj.weight", "self_attention.linear_proj.weight"),
)
QK_NORM = (
    Rule("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
    Rule("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
)
# with experts, Transformer Engine's layers keep this norm under its own name
MLP_NORM = Rule("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", other="pre_mlp_layernorm.weight")
LLAMA_NORMS = (
    Rule("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    MLP_NORM,
)
APERTUS_NORMS = tuple(
    replace(rule, hf=f"{name}_layernorm.weight")
    for name, rule in zip(("attention", "feedforward"), LLAMA_NORMS, strict=True)
)
GATED_MLP = (
    Rule("mlp.gate_proj.weight", "mlp.linear_fc1.weight", "gate"),
    Rule("mlp.up_proj.weight", "mlp.linear_fc1.weight", "up"),
    Rule("mlp.down_proj.weight", "mlp.linear_fc2.weight"),
)
PLAIN_MLP = (
    Rule("mlp.up_proj.weight", "mlp.linear_fc1.weight"),
    Rule("mlp.down_proj.weight", "mlp.linear_fc2.weight"),
)
EXPERTS = (
    Rule("mlp.gate.weight", "mlp.router.weight"),
    Rule("mlp.experts.{expert}.up_proj.weight", "mlp.experts.experts.linear_fc1.weight"),
    Rule("mlp.experts.{expert}.down_proj.weight", "mlp.experts.experts.linear_fc2.weight"),
)


def scalar_rules(activation: str, per_expert: bool = False) -> tuple[Rule, ...]:
    """The trainable scalars of an activation's layers, or of each of their experts."""
    hf, megatron = ("mlp.experts.{expert}.", "mlp.experts.experts.") if per_expert else ("mlp.", "mlp.")
    names = [param.name for param in kernels.get(activation).params]
    return tuple(Rule(f"{hf}act_fn.{name}", f"{megatron}activation_func.{name}", scalar=True) for name in names)


# buffers of transformers' XIELUActivation: left out, from_pretrained leaves uninitialised memory in their place
XIELU_CONSTANTS = {"mlp.act_fn.beta": 0.5, "mlp.act_fn.eps": -1e-6}

APERTUS = Family(
    "ApertusForCausalLM",
    "apertus",
    "xielu",
    qk_norm=True,
    layer=(*APERTUS_NORMS, *ATTENTION, *QK_NORM, *PLAIN_MLP, *scalar_rules("xielu")),
    constants=XIELU_CONSTANTS,
    config={"hidden_act": "xielu"},
)
QWEN3 = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    "swiglu",
    qk_norm=True,
    layer=(*LLAMA_NORMS, *ATTENTION, *QK_NORM, *GATED_MLP),
    constants={},
    config={"hidden_act": "silu", "use_sliding_window": False},
)
LLAMA = Family(
    "LlamaForCausalLM",
    "llama",
    "swiglu",
    qk_norm=False,
    layer=(*LLAMA_NORMS, *ATTENTION, *GATED_MLP),
    constants={},
    config={"hidden_act": "silu", "mlp_bias": False},
)
ARCEE = Family(
    "ArceeForCausalLM",
    "arcee",
    "relu2",
    qk_norm=False,
    layer=(*LLAMA_NORMS, *ATTENTION, *PLAIN_MLP),
    constants={},
    config={"hidden_act": "relu2", "mlp_bias": False},
)
# Only on request: transformers creates and reloads the scalars of this one in bf16, whatever dtype is asked for.
ARCEE_XIELU = replace(
    ARCEE,
    activation="xielu",
    layer=(*ARCEE.layer, *scalar_rules("xielu")),
    constants=XIELU_CONSTANTS,
    config={"hidden_act": "xielu", "mlp_bias": False},
)
ARCEE_NOTE = (
    "transformers creates and reloads Arcee's xielu scalars in bf16 even with dtype=float32 (relative error up to 2e-3)"
    ": logits differ from Megatron's; --family megatron_act keeps them in fp32"
)
PUBLIC = (APERTUS, QWEN3, LLAMA, ARCEE)
OWN = "megatron_act"
NAMES = (*sorted(family.model_type for family in PUBLIC), OWN)


def own(activation: str, qk_norm: bool, experts: bool = False, per_expert: bool = False) -> Family:
    """The family of this project's modelling file: any activation of the registry, with QK-norm and experts or not."""
    mlp = EXPERTS if experts else PLAIN_MLP
    return Family(
        "MegatronActForCausalLM",
        OWN,
        activation,
        qk_norm,
        layer=(*LLAMA_NORMS, *ATTENTION, *(QK_NORM if qk_norm else ()), *mlp, *scalar_rules(activation, per_expert)),
        constants={},
        config={"activation": activation, "qk_norm": qk_norm},
        ships_code=True,
    )


def expanded(family: Family, experts: int | None) -> Iterator[tuple[Rule, str, tuple[int, ...]]]:
    """A layer's rules with their Hugging Face names, one for each expert, and the row of it in Megatron's tensor."""
    for rule in family.layer:
        if "{expert}" in rule.hf:
            yield from ((rule, rule.hf.format(expert=expert), (expert,)) for expert in range(experts or 0))
        else:
            yield rule, rule.hf, ()


def choose(args: Namespace, activation: str, name: str | None = None) -> Family:
    """The family of a model.

    Args:
        args: Megatron's saved arguments.
        activation: what ``scalars.trained_activation`` says.
        name: one of ``NAMES``; default: the one that transformers has, else this project's modelling file.

    Raises:
        UserError: no family can represent the model, or not the named one; the message names what would work.
    """
    qk_norm, experts = bool(getattr(args, "qk_layernorm", False)), bool(getattr(args, "num_experts", None))
    known = [*PUBLIC, *([ARCEE_XIELU] if name == ARCEE.model_type else [])]
    fits = [f for f in known if (f.activation, f.qk_norm) == (activation, qk_norm) and not experts]
    if activation in kernels.names():
        fits.append(own(activation, qk_norm, experts, bool(getattr(args, "activation_per_expert", False))))
    fits = [family for family in fits if name in (None, family.model_type)]
    if not fits:
        raise UserError(_nothing(activation, qk_norm, experts, name))
    check_requirements(args, fits[0].architecture)
    return fits[0]


def _nothing(activation: str, qk_norm: bool, experts: bool, name: str | None) -> str:
    trained = f"{activation} {'with' if qk_norm else 'without'} --qk-layernorm" + " and --num-experts" * experts
    if name:
        return f"--family {name}: expected a model that it can express, got {trained}: leave the flag out"
    known = "; ".join(f"{family.architecture} ({_recipe(family)})" for family in PUBLIC)
    return (
        f"export: expected a model that transformers or the modelling file has, got {trained}: they have {known}; "
        f"MegatronActForCausalLM (every --activation, with experts too)"
    )


def _recipe(family: Family) -> str:
    return f"{family.activation} {'with' if family.qk_norm else 'without'} --qk-layernorm"
