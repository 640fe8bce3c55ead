"""The activations of this folder by name: every module here that defines ``ACTIVATIONS`` takes part by itself."""

import difflib
import importlib
import pkgutil
from pathlib import Path

from megatron_act.kernels.spec import Activation

HERE = Path(__file__).parent
INFRASTRUCTURE = {
    *("api", "checks", "device_math", "gates", "ops", "registry", "spec", "template"),
    *("fp8", "fp8_buffers", "fp8_device", "fp8_launch", "fp8_ops", "operands", "quantized", "stores"),
}


def _discover() -> dict[str, Activation]:
    modules = sorted(m.name for m in pkgutil.iter_modules([str(HERE)]) if m.name not in INFRASTRUCTURE)
    found = [
        a for m in modules for a in getattr(importlib.import_module(f"megatron_act.kernels.{m}"), "ACTIVATIONS", ())
    ]
    found.sort(key=lambda a: (not a.params, a.name))  # trainable ones first
    if len({a.name for a in found}) != len(found):
        raise ValueError(f"expected distinct activation names, got {[a.name for a in found]}; rename one")
    return {a.name: a for a in found}


KNOWN = _discover()  # at import: torch.compile traces through get and would trace a lazy discovery too


def names() -> tuple[str, ...]:
    """Every known activation, trainable ones first, each group in alphabetical order."""
    return tuple(KNOWN)


def _likeness(name: str, other: str) -> float:
    """Equal parts in order plus equal letters in any order: xeilu is nearer to xielu than to xsilu."""
    matcher = difflib.SequenceMatcher
    return matcher(None, name, other).ratio() + matcher(None, sorted(name), sorted(other)).ratio()


def get(name: str) -> Activation:
    """The activation called ``name``; ValueError naming the nearest known one otherwise."""
    if name not in KNOWN:
        near = max(KNOWN, key=lambda candidate: _likeness(str(name).lower(), candidate))
        raise ValueError(f"unknown activation {name!r}: did you mean {near!r}? known: {', '.join(KNOWN)}")
    return KNOWN[name]
