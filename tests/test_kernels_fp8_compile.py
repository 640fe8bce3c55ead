"""FP8 kernels compiled for sm_80, sm_89, sm_90 and sm_100 without a GPU: casts, 16-byte accesses, atomics, spills.

Budget: that of test_kernels_compile.py, 9.88 thread-instructions a byte at 3 TB/s on an H100; here the whole program is
counted, its prologue too. Above 1 it is the instructions, not the memory, that bound a kernel: one pass still moves
half of what an activation and its quantization move in two. Operands count as bf16: FP8 ones save no instructions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_kernels_compile import ISSUE_PER_BYTE

from megatron_act.kernels import api as kernels

HERE = Path(__file__).parent
CAPABILITIES = ("80", "89", "90", "100")
SHARE = {"plain": 0.8, "tensor": 1.1, "blockwise": 1.35, "mxfp8": 1.35}
REGISTERS, MOST_REGISTERS = 128, 192  # of 256 threads two programs fit an SM up to 128; a bias' sums take 32 more
SCALARS = {"LDG.E", "LDG.E.U8", "LDG.E.U16"}  # parameters and scales; E8M0; two of a bias


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "kernel_fp8_aot.py")]
    running = [
        subprocess.Popen([*command, c], env=environment, stdout=subprocess.PIPE, text=True) for c in CAPABILITIES
    ]
    outputs = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    return [row for output in outputs for row in json.loads(output)]


def fp8_results(compiled):
    return [row for row in compiled if row["recipe"] != "plain" and row["kind"] != "amax"]


def test_everything_was_compiled(compiled):
    found = {(r["name"], r["kind"], r["recipe"]) for r in compiled if r["capability"] == 90}
    assert found >= {
        (name, kind, recipe)
        for name in kernels.names() for kind in ("forward", "backward") for recipe in ("tensor", "blockwise")
    }  # fmt: skip
    assert {(r["name"], r["kind"]) for r in compiled if r["capability"] == 100} >= {
        (n, "backward") for n in kernels.names()
    }


def test_casts_round_to_nearest_and_saturate(compiled):
    """One PTX cast from fp32, in the format that was asked for; on sm_80, which has none, FP8 is made by integers."""
    for row in compiled:
        formats = {row["format"]} if row["recipe"] != "plain" and row["kind"] != "amax" else set()
        if row["kept"] and row["kind"] == "forward":
            formats.add("e4m3")
        casts = [f"cvt.rn.satfinite.{format}x2.f32" for format in sorted(formats)]
        assert row["fp8_casts"] == (casts if row["capability"] >= 89 else []), row
        assert all(cast == "cvt.rn.bf16x2.f32" for cast in row["bf16_casts"]), row
        assert bool(row["bf16_casts"]) != (row["exact"] and row["recipe"] != "plain"), row


def test_fp8_operands_are_read_by_the_device(compiled):
    """Kept pre-activations are e4m3, the gradients here e5m2; on sm_80 both are read by integers."""
    for row in compiled:
        formats = {"e4m3"} if row["kept"] and row["kind"] == "backward" else set()
        if row["gradient"] and row["recipe"] != "plain":
            formats.add("e5m2")
        reads = [f"cvt.rn.f16x2.{format}x2" for format in sorted(formats)]
        assert row["fp8_reads"] == (reads if row["capability"] >= 89 else []), row


def test_loads_and_stores_are_16_bytes(compiled):
    """All data, in both orientations: what the 16-byte stores move is what an element takes. Scales are smaller."""
    for row in compiled:
        assert "LDG.E.128" in row["loads"] and set(row["loads"]) <= SCALARS | {"LDG.E.128"}, row
        if row["kind"] == "amax":
            assert row["stores"] == [], row
            continue
        assert set(row["stores"]) <= {"STG.E", "STG.E.U8", "STG.E.128"}, row
        assert row["stored_bytes"] == 2 + (row["kept"] and row["kind"] == "forward"), row
        assert row["single_bytes"] <= 0.16, row


def test_the_transposed_half_goes_through_shared_memory_as_bf16(compiled):
    """ldmatrix.trans turns 8 elements of a thread at once; only what is not rounded to bf16 crosses byte by byte."""
    for row in fp8_results(compiled):
        if row["recipe"] == "mxfp8":
            continue
        assert row["turns"] == (0 if row["exact"] else 1 / 8), row
        # one in eight are the bytes of kept scales
        assert row["shared_bytes"] <= (1 if row["exact"] else 0.125 if row["kept"] else 0), row


def test_the_only_atomics_are_maxima(compiled):
    """They give the same bits in any order; a sum would not."""
    for row in compiled:
        assert all(".MAX." in a or ".MIN." in a for a in row["atomics"]), row
        assert bool(row["atomics"]) == (row["recipe"] == "tensor"), row


def test_no_spills(compiled):
    for row in compiled:
        assert (row["LOCAL"], row["STACK"], row["local"]) == (0, 0, []), row
        assert row["REG"] <= (MOST_REGISTERS if row["bias"] else REGISTERS + 8 * (row["capability"] == 100)), row


def test_instruction_budget(compiled):
    for row in compiled:
        if row["capability"] == 90:
            read, written = (4, 2) if row["kind"] == "backward" else (2, 2)
            written = 0 if row["kind"] == "amax" else written + (row["kept"] and row["kind"] == "forward")
            share = row["per_element"] / (ISSUE_PER_BYTE * (read + written))
            assert 0.3 < share <= (1.4 if row["kind"] == "amax" else SHARE[row["recipe"]]), (share, row)
