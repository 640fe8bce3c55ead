"""tools/benchmark_kernels.py on a CPU: the figures it writes, and what bad input is told."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import benchmark_kernels


def test_rows_are_consistent(tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", lambda function: function
    )  # its compiler takes a minute; the timing is tested
    assert (
        benchmark_kernels.main(["--output", str(tmp_path), "--activations", "relu2", "swiglu", "--shapes", "64x96"])
        == 0
    )
    result = json.loads((tmp_path / "kernels.json").read_text())
    sizes = {(r["activation"], r["op"]): r["bytes_per_element"] for r in result["rows"]}
    item = torch.finfo(getattr(torch, result["rows"][0]["dtype"])).bits // 8
    assert sizes == {
        ("relu2", "forward"): 2 * item, ("relu2", "backward"): 3 * item,
        ("swiglu", "forward"): 3 * item, ("swiglu", "backward"): 5 * item,
    }  # fmt: skip
    for row in result["rows"]:
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes_per_element"] * 64 * 96 / row["median_us"] / 1e3)
    with (tmp_path / "kernels.csv").open() as file:
        assert [r["activation"] for r in csv.DictReader(file)] == ["relu2", "relu2", "swiglu", "swiglu"]
    assert (tmp_path / "kernels.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["--activations", "xeilu"], "did you mean 'xielu'"), (["--shapes", "3"], "expected ROWSxCOLUMNS")],
)
def test_bad_input(arguments, part, tmp_path, capsys):
    assert benchmark_kernels.main(["--output", str(tmp_path / "out"), *arguments]) == 2
    message = capsys.readouterr().err
    assert part in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
