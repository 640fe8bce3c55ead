"""The bodies of ``test_te_bits.py`` on a CPU (``te_cpu``), so that a GPU finds no fault that a CPU can find.

Left out is memory, which is different there (``test_fp8_output.py``).
"""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import test_te_bits
from te_cpu.process import in_engine

SHAPES = {"ragged": (160, 192), "whole": (128, 256)}


def cases() -> Iterator[Any]:
    """(name, arguments) of every case of every test."""
    for name, test in vars(test_te_bits).items():
        if name.startswith("test_") and "memory" not in name:
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            for values in itertools.product(*(mark.args[1] for mark in marks)):
                arguments = dict(zip((mark.args[0] for mark in marks), values, strict=True))
                yield pytest.param(name, arguments, id="-".join([name, *map(str, values)]))


@pytest.mark.parametrize(("name", "arguments"), list(cases()))
@in_engine
def test_on_a_cpu(name: str, arguments: dict[str, Any]) -> None:
    test_te_bits.SHAPES.update(SHAPES)
    test = getattr(test_te_bits, name)
    test(**arguments, **({"say": print} if "say" in inspect.signature(test).parameters else {}))


@in_engine
def test_a_kernel_that_writes_nothing_is_not_compared() -> None:
    """Transformer Engine's MXFP8 before Blackwell: the specification takes its place, for scales in either order."""
    import te_tensors
    from transformer_engine import pytorch

    y = test_te_bits.random(160, 192)
    for swizzled in (False, True):
        quantizer = te_tensors.quantizer_of("mxfp8", swizzled=swizzled)
        want, theirs = te_tensors.written_by_te(quantizer, y)
        assert theirs
        original, pytorch.MXFP8Quantizer.update_quantized = pytorch.MXFP8Quantizer.update_quantized, lambda *_: None
        try:
            got, theirs = te_tensors.written_by_te(quantizer, y)
        finally:
            pytorch.MXFP8Quantizer.update_quantized = original
        assert not theirs
        assert te_tensors.differences(got, want)[0] == 0
