"""The main job as a person runs it: every stage of ``launch/quickstart.sh --quick``, judged by what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_act.experiment.quickstart import QUICK_STEPS

pytestmark = pytest.mark.timeout(1800)  # of which setting up takes most
ROOT = Path(__file__).parents[1]
ARMS = ["swiglu", "relu2", "xielu", "crrelu"]


def quickstart(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_act.experiment.quickstart", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=1500, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("quickstart")
    done = quickstart("--quick", "--output", "out", cwd=where)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == str(where / "out" / "report.html")
    return where / "out"


def test_every_arm_trained_all_its_steps_at_equal_compute(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ARMS
    matches = json.loads((folder / "compute_match.json").read_text())
    assert {name: match["ffn_hidden_size"] for name, match in matches.items()} == {
        "swiglu": 512, "relu2": 768, "xielu": 768, "crrelu": 768
    }  # fmt: skip
    assert {match["residual_parameters_percent"] for match in matches.values()} == {0.0}
    assert {match["residual_flops_percent"] for match in matches.values()} == {0.0}
    for name in ARMS:
        lines = (folder / "runs" / f"{name}-seed42" / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if record["event"] == "step"]
        assert [step["iteration"] for step in steps] == list(range(1, QUICK_STEPS + 1))
        assert steps[-1]["loss"] < steps[0]["loss"] - 1.0


def test_trainable_scalars_moved(folder: Path) -> None:
    lines = (folder / "runs" / "xielu-seed42" / "metrics.jsonl").read_text().splitlines()
    scalars = [record["scalars"] for record in map(json.loads, lines) if record["event"] == "step"]
    for name in ("alpha_p", "alpha_n"):
        assert len(scalars[-1][name]) == 4
        assert max(abs(last - 0.8) for last in scalars[-1][name]) > 1e-3
        assert len(set(scalars[-1][name])) == 4


def test_exports_open_in_transformers_with_megatrons_logits(folder: Path) -> None:
    arms = json.loads((folder / "export.json").read_text())["arms"]
    assert {name: arm["family"] for name, arm in arms.items()} == {
        "xielu": "ApertusForCausalLM", "swiglu": "Qwen3ForCausalLM"
    }  # fmt: skip
    assert all(0 <= arm["max_logit_difference"] < 1e-4 for arm in arms.values())
    assert all(arm["generated"].startswith("The most important thing about") for arm in arms.values())
    assert all(len(arm["generated"].split()) > 8 for arm in arms.values())


def test_the_page_is_self_contained_and_shows_every_arm(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert [name for name in ARMS if name not in page] == []
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page and "<link" not in page
    figures = {path.name for path in (folder / "figures").glob("*.png")}
    assert {"loss_tokens.png", "loss_flops.png", "scalars.png", "activations.png"} <= figures


def test_data_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a table")
    done = quickstart("--quick", "--data", "notes.txt", "--output", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line][-1].startswith("error: ")
    assert "notes.txt" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
