"""Which programs open an exported model, from its ``config.json`` alone; each answer is ``yes...`` or ``no: why``.

Sources: transformers' ``activations.py`` and ``models/*/modeling_*.py``; vLLM 0.32's ``model_executor/models``
(``apertus.py`` raises for other activations than xielu; Arcee, and models that bring their code, go through
``transformers/``), run on a CPU by ``tests/checkpoint_vllm.py``. Where it took a model, logits were transformers'.
"""

from collections.abc import Mapping
from typing import Any

STOCK = ("ApertusForCausalLM", "ArceeForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM")
KEEPS_SCALARS = "ApertusForCausalLM"  # passes the model's dtype to its activation; the others' is always bfloat16


def openers(config: Mapping[str, Any]) -> dict[str, str]:
    """Answers by program, ``transformers`` and ``vllm``, for the content of a ``config.json``."""
    architecture = (config.get("architectures") or ["none"])[0]
    activation = config.get("hidden_act", "")
    if architecture not in STOCK:
        return {"transformers": _own(config), "vllm": _own_in_vllm(config, architecture)}
    return {"transformers": _transformers(architecture, activation), "vllm": _vllm(architecture, activation)}


def _own(config: Mapping[str, Any]) -> str:
    if "auto_map" in config:
        return "yes, with trust_remote_code=True: the modelling file is in the folder"
    return f"unknown: model_type {config.get('model_type')!r} is not one that this project writes"


def _own_in_vllm(config: Mapping[str, Any], architecture: str) -> str:
    if "AutoModel" not in config.get("auto_map", {}):
        return f"no: it has no {architecture}, and the folder no modelling file for its Transformers backend"
    if config.get("num_experts"):
        return "no: its Transformers backend replaces experts by its own, which have a gate and no scalars"
    return "yes, with trust_remote_code=True: its Transformers backend runs the modelling file, scalars in float32"


def _transformers(architecture: str, activation: str) -> str:
    if activation != "xielu":
        return "yes"
    if architecture == KEEPS_SCALARS:
        return "yes; scalars take the dtype that the model is loaded in: dtype=torch.float32 keeps them exact"
    return f"yes, but {architecture} rounds xielu's scalars to bfloat16 in any dtype: logits move by up to 3e-3"


def _vllm(architecture: str, activation: str) -> str:
    if architecture == "ApertusForCausalLM" and activation != "xielu":
        return f"no: its {architecture} raises unless hidden_act is xielu, this one is {activation}"
    if activation != "xielu":
        return "yes"
    return "yes, but it rounds xielu's scalars to bfloat16: log-probabilities move by up to 4e-3"
