"""Proof without a GPU that the kernels are fast: compiled for sm_80, sm_90 and sm_100, and the machine code read back.

Budget. An H100 SXM issues 132 SMs x 4 schedulers x 32 lanes x 1.755 GHz = 29.65e12 thread-instructions a second. At
3 TB/s an element that moves b bytes comes by every b / 3e12 s, so 9.88 b instructions fit in: 39.5 for a bf16 forward
(2 in, 2 out), 59.3 for a backward (x, g in, dx out). The steady loop may take 70 % of that, 27.7 and 41.5, to leave
issue slots for what a memory-bound kernel stalls on. Exponentials, reciprocals, roots and conversions have their own
unit, 16 lanes an SM: 1.24 b an element, of which 70 % likewise.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_act.kernels import api as kernels

pytestmark = pytest.mark.timeout(1800)  # of which setting up takes most

HERE = Path(__file__).parent
CAPABILITIES = (80, 90, 100)
ISSUE_PER_BYTE = 132 * 4 * 32 * 1.755e9 / 3e12
SPECIAL_PER_BYTE = 132 * 16 * 1.755e9 / 3e12
SHARE = 0.7
# Above it, for the same bytes: a bias is read, added and summed; weights need the forward value and a sum over the row.
FORM_SHARE = {"bias": 0.8, "weights": 1.02}
REGISTERS = 64
MOST_REGISTERS = {"bias": 72, "value": 68, "bias weights value": 72}  # xiprelup, with three scalars; all at once
MOST_REGISTERS_GATED = {"bias": 96, "bias weights value": 128}  # the sums of two biases are 16


@pytest.fixture(scope="module")
def compiled():
    """All figures of kernel_aot.py, by capability; one process each, without the interpreter."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "kernel_aot.py")]
        processes = {
            c: subprocess.Popen([*command, str(c)], env=environment, stdout=subprocess.PIPE, text=True)
            for c in CAPABILITIES
        }
        outputs = {c: p.communicate()[0] for c, p in processes.items()}
    assert all(p.returncode == 0 for p in processes.values())
    return {c: json.loads(text) for c, text in outputs.items()}


def test_second_stage(compiled):
    for capability in CAPABILITIES:
        found = compiled[capability]["sum"]
        assert found["atomics"] == [] and found["STACK"] == found["LOCAL"] == 0 and found["REG"] <= REGISTERS, found


def label(row):
    return f"{row['name']} {row['kind']} {row['dtype']} gated={row['gated']} {row['extras']} sm_{row['capability']}"


def rows(compiled, **wanted):
    found = [r for c in CAPABILITIES for r in compiled[c]["kernels"] if all(r[k] == v for k, v in wanted.items())]
    assert found
    return found


def test_everything_was_compiled(compiled):
    for capability in CAPABILITIES:
        plain = rows(compiled, capability=capability, dtype="bf16", gated=False, extras="")
        assert {(r["name"], r["kind"]) for r in plain} == {(n, k) for n in kernels.names() for k in ("fwd", "bwd")}


def test_loads_and_stores_are_16_bytes(compiled):
    for row in rows(compiled):
        scalar = "weights" in row["extras"]  # one weight a row, one sum
        assert row["data_loads"] == ["LDG.E"] * scalar + ["LDG.E.128"], label(row)
        assert row["data_stores"] == ["STG.E"] * (scalar and row["kind"] == "bwd") + ["STG.E.128"], label(row)


def test_no_spills_no_atomics(compiled):
    for row in rows(compiled):
        assert (row["STACK"], row["LOCAL"], row["local"], row["atomics"]) == (0, 0, [], []), label(row)


def test_no_shared_memory_in_the_loop(compiled):
    """Cutting a block into quarters moves nothing between threads; only a row's weight needs a sum over all of them."""
    for row in rows(compiled):
        assert row["shared"] == [] or (row["kind"] == "bwd" and "weights" in row["extras"]), label(row)


def test_registers(compiled):
    for row in rows(compiled):
        most = MOST_REGISTERS_GATED if row["gated"] else MOST_REGISTERS
        assert row["REG"] <= most.get(row["extras"], REGISTERS), (label(row), row["REG"])


def data_bytes(row):
    """Bytes that an element moves."""
    tensors = 2 if row["kind"] == "fwd" else 3
    tensors += row["gated"] * (1 if row["kind"] == "fwd" else 2) + ("value" in row["extras"])
    return 2 * tensors


def share(row):
    """Of what the GPU can issue."""
    return max([SHARE, *(limit for form, limit in FORM_SHARE.items() if form in row["extras"])])


def test_instruction_budget(compiled):
    for row in rows(compiled, capability=90, dtype="bf16"):
        budget = share(row) * ISSUE_PER_BYTE * data_bytes(row)
        assert 1.5 < row["per_element"] <= budget, f"{label(row)}: {row['per_element']:.1f} of {budget:.1f}"


def test_budget_of_special_functions(compiled):
    for row in rows(compiled, capability=90, dtype="bf16"):
        budget = SHARE * SPECIAL_PER_BYTE * data_bytes(row)
        assert row["xu_per_element"] <= budget, f"{label(row)}: {row['xu_per_element']:.1f} of {budget:.1f}"


def test_bf16_rounds_to_nearest(compiled):
    for row in rows(compiled, dtype="bf16"):
        stores = [r for r in row["rounding"] if not r.startswith("cvt.f32")]  # to fp32 nothing is rounded
        # a product of two bf16 numbers is exact in fp32, so relu2 may be one bf16 multiplication; relu rounds nothing
        assert stores or row["name"] == "relu", (label(row), row["rounding"])
        nearest = [
            r for r in stores if ".rn." in r or r.startswith("mul.bf16")
        ]  # PTX: mul rounds to nearest by default
        assert nearest == stores, (label(row), row["rounding"])
