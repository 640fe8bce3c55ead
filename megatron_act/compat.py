"""What Python 3.11 lacks for megatron-core 0.19, supplied before Megatron is imported."""

import typing


def install_typing_override() -> None:
    """Make ``from typing import override`` work on Python 3.11: megatron-core >= 0.17 needs it, 3.12 has it.

    Idempotent; does nothing on Python >= 3.12. Call it before the first ``import megatron.core``.
    """
    if not hasattr(typing, "override"):
        import typing_extensions

        typing.override = typing_extensions.override  # type: ignore[attr-defined]
