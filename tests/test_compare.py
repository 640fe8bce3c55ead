"""tools/compare.py end to end: two arms, killed on the way, resumed, repeated two at a time (quickstart: torchrun)."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = {
    "name": "end-to-end",
    "base": {
        "--num-layers": 2,
        "--hidden-size": 32,
        "--num-attention-heads": 2,
        "--seq-length": 32,
        "--max-position-embeddings": 32,
        "--micro-batch-size": 2,
        "--global-batch-size": 2,
        "--train-iters": 12,
        "--lr": 0.01,
        "--lr-warmup-iters": 2,
        "--mock-data": True,
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": 128,
        "--position-embedding-type": "rope",
        "--disable-bias-linear": True,
        "--normalization": "RMSNorm",
        "--qk-layernorm": True,
        "--untie-embeddings-and-output-weights": True,
        "--hidden-dropout": 0.0,
        "--attention-dropout": 0.0,
        "--eval-iters": 1,
    },
    "baseline": {"activation": "swiglu", "ffn_hidden_size": 64},
    "arms": ["swiglu", "xielu"],
    "layout": {"ranks": 1},
}
# sitecustomize.py of a run that stops itself as it begins to write its first step: it does not race with the test.
HELD = """
import os, signal, sys
opened = []
def hold(event, args):
    if event == "open" and str(args[0]).endswith("xielu-seed1234/metrics.jsonl") and "a" in (args[1] or ""):
        opened.append(args[0])
        if len(opened) == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
sys.addaudithook(hold)
"""
LIMIT_S = 400
pytestmark = pytest.mark.distributed


def compare(folder: Path, *words: str, packages: Path | None = None) -> subprocess.Popen[str]:
    """Starts the tool as a person would, from the repository's root; ``packages`` come first on its path."""
    tool = [sys.executable, "tools/compare.py", str(folder / "e.yaml"), "--output", str(folder / "out"), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [packages and str(packages), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(tool, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Living processes whose command line names the folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(folder) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def await_stopped(folder: Path, tool: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and tool.poll() is None:
        if any(process.info["status"] == psutil.STATUS_STOPPED for process in processes_of(folder)):
            return
        time.sleep(0.05)
    tool.kill()
    pytest.fail(f"expected a stopped run, got none: {tool.communicate()}")


def test_killed_resumed_and_repeated(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    runs = tmp_path / "out" / "runs"

    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "sitecustomize.py").write_text(HELD)
    tool = compare(tmp_path, packages=tmp_path / "held")
    await_stopped(tmp_path, tool)
    (record,) = (runs / "xielu-seed1234" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(record)["event"] == "start"
    second = compare(tmp_path)  # a second one on the same folder must not interfere
    _, errors = second.communicate(timeout=LIMIT_S)
    assert second.returncode == 2 and "another run is writing there" in errors
    tool.send_signal(signal.SIGINT)
    _, errors = tool.communicate(timeout=LIMIT_S)
    assert tool.returncode == 1 and errors.endswith("error: interrupted\n")
    assert processes_of(tmp_path) == []
    first = (runs / "swiglu-seed1234" / "metrics.jsonl").read_bytes()
    assert (runs / "swiglu-seed1234" / "run.json").is_file()
    assert not (runs / "swiglu-seed1234" / "cache").exists()
    assert not (runs / "xielu-seed1234" / "run.json").exists()

    task = compare(tmp_path, "--only", "xielu-seed1234")  # as a task of a job array
    output, errors = task.communicate(timeout=LIMIT_S)
    assert (task.returncode, output) == (0, ""), errors
    assert "xielu (seed 1234, 12 steps): 100% (12/12)" in errors
    assert not (tmp_path / "out" / "report.html").exists()

    tool = compare(tmp_path)
    output, errors = tool.communicate(timeout=LIMIT_S)
    assert tool.returncode == 0, errors
    assert errors == "2 of 2 runs finished already, kept\n"
    assert (runs / "swiglu-seed1234" / "metrics.jsonl").read_bytes() == first
    lines = output.splitlines()
    assert "tensor parallel 1" in lines[0]
    assert lines[1].startswith("arm     MLP width  parameters without embeddings  FLOPs/token  difference to swiglu")
    assert lines[3].split()[:2] == ["xielu", "96"] and lines[3].endswith("none")
    assert lines[-1] == str(tmp_path / "out" / "report.html")
    assert lines[-2] == "1 seed: no interval, no winner claimed"

    found = json.loads((tmp_path / "out" / "results.json").read_text())
    for run in found["runs"]:
        curve = run["curve"]
        assert curve["iterations"] == list(range(1, 13)) and curve["tokens"][-1] == 12 * 2 * 32 == run["tokens"]
        assert curve["losses"][0] == pytest.approx(math.log(128), abs=0.1)  # before learning
        assert run["final_train_loss"] < curve["losses"][0] - 0.3
        assert run["parameters"] == run["parameters_built"] and run["finished"]
        assert run["validation_loss"] is not None
    alpha_p = found["runs"][1]["scalars_final"]["alpha_p"]
    assert alpha_p[0] != alpha_p[1] and max(abs(value - 0.8) for value in alpha_p) > 1e-3

    tool = compare(tmp_path, "--force", "--jobs", "2")
    _, errors = tool.communicate(timeout=LIMIT_S)
    assert tool.returncode == 0 and "kept" not in errors
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    for old, new in zip(found["runs"], again["runs"], strict=True):
        assert old["curve"]["losses"] == new["curve"]["losses"]  # the same seed: the same weights and data, bit for bit
        assert old["train_seconds"] != new["train_seconds"]


def test_a_run_that_names_bad_input_ends_with_code_2(tmp_path: Path) -> None:
    arm = {"name": "odd", "activation": "xielu", "flags": {"--no-such-flag": 1}}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({**EXPERIMENT, "arms": [arm]}))
    tool = compare(tmp_path)
    _, errors = tool.communicate(timeout=LIMIT_S)
    assert tool.returncode == 2
    log = tmp_path / "out" / "runs" / "odd-seed1234" / "log.txt"
    assert errors.startswith("error: odd (seed 1234, 12 steps): unrecognized arguments: --no-such-flag")
    assert errors.endswith(f"(log: {log})\n") and errors.count("\n") == 1
    assert not (tmp_path / "out" / "report.html").exists()
