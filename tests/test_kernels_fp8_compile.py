"""FP8 kernels compiled for sm_89, sm_90 and sm_100 without a GPU: casts, 16-byte accesses, atomics, spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "kernel_fp8_aot.py"), "89", "90", "100"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_casts_round_to_nearest_and_saturate(compiled):
    for row in compiled:
        by_integers = row["kind"] == "amax" or row["capability"] == 89  # there Triton's cast goes through fp16
        assert row["casts"] == ([] if by_integers else ["cvt.rn.satfinite.e4m3x2.f32"]), row
        if row["capability"] == 89:
            continue
        assert row["bf16"] and all(cast.startswith("cvt.rn.") for cast in row["bf16"]), row


def test_loads_and_stores_are_16_bytes(compiled):
    """Of the data, in both orientations; scales are smaller."""
    for row in compiled:
        assert row["loads"] == ["LDG.E.128"], row
        assert row["kind"] == "amax" or "STG.E.128" in row["stores"], row


def test_the_only_atomics_are_maxima(compiled):
    """They give the same bits in any order; a sum would not."""
    for row in compiled:
        assert all(".MAX." in a or ".MIN." in a for a in row["atomics"]), row
        assert bool(row["atomics"]) == (row["recipe"] == "tensor"), row


def test_no_spills(compiled):
    """But in the blockwise backward pass, whose 128 x 128 tile does not fit into registers (README, Limits)."""
    for row in compiled:
        large = row["recipe"] == "blockwise"
        assert row["LOCAL"] == 0 and (row["STACK"] == 0 or large), row
        assert row["REG"] <= (255 if large else 128), row
