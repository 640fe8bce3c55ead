"""CUDA graphs: which of Megatron's captures leave an MLP with a trainable activation outside.

A captured step replays the launches of one step. The comparison of the scalars' gradients in the first steps
(``finalize``) and their hooks are Python, which a replay does not run: a gradient that a graph lost would be lost in
silence. So a capture that takes the MLP in is refused, until runs on GPUs have shown its gradients right. Megatron's
graphs of attention alone (``--cuda-graph-modules attn``) leave the MLP to ordinary code, comparison included.
"""

from typing import Any

OUTSIDE = {"attn"}  # modules of Megatron's list whose capture does not reach into an MLP or an MoE layer
WHOLE_STEP = "full_iteration"  # an old value of --cuda-graph-modules that sets --cuda-graph-impl


def conflict(settings: Any) -> str | None:
    """Why a trainable activation cannot go with a configuration's CUDA graphs: one sentence, or None.

    Args:
        settings: Megatron's parsed arguments, before or after its validation, or a TransformerConfig.
    """
    given = getattr(settings, "cuda_graph_modules", None) or getattr(settings, "cuda_graph_scope_deprecated", None)
    listed = [given] if isinstance(given, str) else given or []
    modules = {module if isinstance(module, str) else module.name for module in listed}
    flag = _flag(settings, modules)
    if flag is None or (modules and modules <= OUTSIDE):
        return None
    return (
        f"{flag}: a captured MLP skips the check of its scalars' gradients, and no GPU run has shown them right yet: "
        "remove it, or capture attention only (--cuda-graph-modules attn)"
    )


def _flag(settings: Any, modules: set[str]) -> str | None:
    """The flag that asks for graphs, if any."""
    implementation = getattr(settings, "cuda_graph_impl", None) or "none"
    if implementation != "none":
        return f"--cuda-graph-impl {implementation}"
    if getattr(settings, "enable_cuda_graph", False):
        return "--enable-cuda-graph"
    if getattr(settings, "external_cuda_graph", False):
        return "--external-cuda-graph"
    return f"--cuda-graph-modules {WHOLE_STEP}" if WHOLE_STEP in modules else None
