"""What a checkpoint or a model folder holds, as a dictionary (``--json``) and as text."""

from pathlib import Path
from typing import Any

from megatron_act.checkpoint.info_checkpoint import describe_checkpoint
from megatron_act.checkpoint.info_model import describe_flags, describe_model
from megatron_act.checkpoint.reader import MegatronCheckpoint


def describe(path: str | Path) -> dict[str, Any]:
    """Reads headers and scalars of a Megatron checkpoint, a Hugging Face folder or a YAML file of Megatron flags.

    Raises:
        UserError: none of the three, or a broken one.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        return describe_flags(path)
    if (path / "config.json").is_file():
        return describe_model(path)
    return describe_checkpoint(MegatronCheckpoint(path))


def text(content: dict[str, Any]) -> str:
    """`describe`'s answer as lines."""
    lines = [content["path"], *(f"{name:<13}{value}" for name, value in _facts(content).items())]
    return "\n".join([*lines, *_tensor_table(content["tensors"]), *_scalar_table(content.get("scalars_by_layer", []))])


def _facts(content: dict[str, Any]) -> dict[str, str]:
    names = {"kind": "kind", "iteration": "iteration", "architecture": "architecture", "activation": "activation"}
    facts = {word: str(content[key]) for key, word in names.items() if key in content}
    for key, word in (("layout", "written at"), ("model", "model")):
        if content.get(key):
            facts[word] = ", ".join(f"{name} {value}" for name, value in content[key].items())
    facts["parameters"] = f"{content['parameters']:,}" + (" (vocabulary padding included)" * ("layout" in content))
    if "exports_as" in content:
        facts["exports as"] = content["exports_as"] or f"nothing: {content['why_not']}"
    facts.update(content.get("opens_in", {}))
    cost = content["conversion"]
    facts["converting"] = (
        f"at most {_gb(cost['peak_memory_bytes'])} of memory, {_gb(cost['peak_memory_bytes_float32'])} with --dtype "
        f"float32 (largest tensor: {cost['largest_tensor']}, {_gb(cost['largest_tensor_bytes'])}), "
        f"{_gb(cost['disk_bytes'])} of disk in the stored dtype"
    )
    return facts


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _tensor_table(tensors: list[dict[str, Any]]) -> list[str]:
    if not tensors:
        return []
    width = max(len(each["name"]) for each in tensors)
    *_, last = tensors[0]  # chunks of a checkpoint, file of a folder
    head = f"{'tensor':<{width}} {'shape':<24} {'dtype':<10} {last}"
    rows = [
        f"{each['name']:<{width}} {'x'.join(map(str, each['shape'])) or 'scalar':<24} {each['dtype']:<10} {each[last]}"
        for each in tensors
    ]
    return ["", head, *rows]


def _scalar_table(layers: list[dict[str, list[float]]]) -> list[str]:
    if not layers:
        return []
    names = list(dict.fromkeys(name for layer in layers for name in layer))
    rows = [
        f"{i:>5}" + "".join(f"{_range(layer.get(name, [])):>20}" for name in names) for i, layer in enumerate(layers)
    ]
    return ["", "layer" + "".join(f"{name:>20}" for name in names) + "   (effective values)", *rows]


def _range(values: list[float]) -> str:
    ends = sorted({min(values), max(values)}) if values else []
    return "..".join(f"{value:.6f}" for value in ends) or "-"
