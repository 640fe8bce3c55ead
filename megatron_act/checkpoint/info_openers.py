"""Which programs open an exported model, from its ``config.json`` alone; each answer is ``yes...`` or ``no: why``.

Sources: transformers' ``activations.py`` and ``models/*/modeling_*.py``, vLLM's ``model_executor/models/{apertus,arcee,
llama,qwen2}.py``, whose MLPs raise for any other activation than their own.
"""

from collections.abc import Mapping
from typing import Any

# architecture: the only hidden_act that vLLM accepts in it
STOCK = {
    "ApertusForCausalLM": "xielu",
    "ArceeForCausalLM": "relu2",
    "LlamaForCausalLM": "silu",
    "Qwen3ForCausalLM": "silu",
}
KEEPS_SCALARS = "ApertusForCausalLM"  # passes the model's dtype to its activation; the others' is always bfloat16


def openers(config: Mapping[str, Any]) -> dict[str, str]:
    """Answers by program, ``transformers`` and ``vllm``, for the content of a ``config.json``."""
    architecture = (config.get("architectures") or ["none"])[0]
    activation = config.get("hidden_act", "")
    if architecture not in STOCK:
        return {
            "transformers": _own(config),
            "vllm": f"no: it has no {architecture} (its Transformers backend was not tried)",
        }
    return {"transformers": _transformers(architecture, activation), "vllm": _vllm(architecture, activation)}


def _own(config: Mapping[str, Any]) -> str:
    if "auto_map" in config:
        return "yes, with trust_remote_code=True: the modelling file is in the folder"
    return f"unknown: model_type {config.get('model_type')!r} is not one that this project writes"


def _transformers(architecture: str, activation: str) -> str:
    if activation != "xielu":
        return "yes"
    if architecture == KEEPS_SCALARS:
        return "yes; scalars take the dtype that the model is loaded in: dtype=torch.float32 keeps them exact"
    return f"yes, but {architecture} rounds xielu's scalars to bfloat16 in any dtype: logits move by up to 3e-3"


def _vllm(architecture: str, activation: str) -> str:
    only = STOCK[architecture]
    if activation != only:
        return f"no: its {architecture} raises unless hidden_act is {only}, this one is {activation}"
    return "yes; it computes xielu in bfloat16" if activation == "xielu" else "yes"
