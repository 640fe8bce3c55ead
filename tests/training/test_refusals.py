"""Bad input to the entry point: exit code 2, one line that names what to change, nothing written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_support import MODEL_FLAGS, ROOT, SAVE, Train, environment

WORKER = Path(__file__).parent / "workers" / "refusals.py"
XIELU = ["--cpu", *MODEL_FLAGS, "--activation", "xielu", "--train-iters", "1", "--mock-data"]
MOE = [*XIELU, "--num-experts", "4", "--moe-token-dispatcher-type", "allgather"]
NO_MICRO_BATCH = [word for word in XIELU if word != "--micro-batch-size"]
NO_MICRO_BATCH.pop(XIELU.index("--micro-batch-size"))  # its value
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "127"]

EARLY = {
    "unknown activation": ([*XIELU, "--activation", "xelu"], ["xelu", "xielu"]),
    "gated MLP": ([*XIELU, "--swiglu"], ["--swiglu", "1.5x", "compute_match"]),
    "ffn not divisible by tp": ([*XIELU, "--ffn-hidden-size", "97", "--tensor-model-parallel-size", "2"], ["97", "2"]),
    "unknown flag": ([*XIELU, "--num-layer", "4"], ["--num-layer", "did you mean --num-layers"]),
    "missing value": ([*XIELU, "--num-layers"], ["--num-layers", "expected one argument"]),
    "init not a number": ([*XIELU, "--activation-init", "alpha_p=big"], ["alpha_p=big", "alpha_p=0.8"]),
    "init of another scalar": ([*XIELU, "--activation-init", "eps=0.1"], ["eps", "alpha_p, alpha_n"]),
    "init out of range": ([*XIELU, "--activation-init", "alpha_n=0.4"], ["alpha_n", "> 0.5", "0.4"]),
    "two choices of layers": ([*XIELU, "--spec", "megatron_act.specs", "crrelu"], ["--spec", "remove one"]),
    "scalars per expert without experts": ([*XIELU, "--activation-per-expert"], ["--num-experts N", "remove the flag"]),
    "scalars per expert in grouped GEMMs": (
        [*MOE, "--activation-per-expert", "--moe-grouped-gemm"],
        ["--moe-grouped-gemm", "remove one"],
    ),
    "expert ffn not divisible": (
        [*MOE, "--moe-ffn-hidden-size", "97", "--expert-tensor-parallel-size", "2"],
        ["--moe-ffn-hidden-size", "97", "2"],
    ),
    "unequal shares on gloo": (
        [*MOE, "--tensor-model-parallel-size", "2", "--moe-token-dispatcher-type", "alltoall"],
        ["gloo", "allgather"],
    ),
    "op fuser": (
        [*XIELU, "--use-transformer-engine-op-fuser"],
        ["--use-transformer-engine-op-fuser", "--transformer-impl transformer_engine", "local"],
    ),
    "FP8 in local layers": (
        [*XIELU, "--bf16", "--fp8-format", "hybrid"],
        ["--fp8-format", "--transformer-impl transformer_engine", "local"],
    ),
    "FP8 without Transformer Engine": (
        [*XIELU, "--bf16", "--fp8-format", "hybrid", "--transformer-impl", "transformer_engine"],
        ["--fp8-format", "expected Transformer Engine, got none", "pip install"],
    ),
    "FP8 output without FP8": ([*XIELU, "--activation-fp8-output"], ["--activation-fp8-output", "--fp8-format"]),
    "FP8 flag without activation": (
        ["--cpu", *MODEL_FLAGS, "--train-iters", "1", "--mock-data", "--activation-fp8-input-store"],
        ["--activation-fp8-input-store", "--activation NAME"],
    ),
    "FP8 store and recompute": (
        [*XIELU, "--activation-fp8-input-store", "--recompute-activation-function"],
        ["--recompute-activation-function", "--activation-fp8-input-store"],
    ),
    "FP8 store of experts": (
        [*MOE, "--activation-fp8-input-store"],
        ["--activation-fp8-input-store", "--num-experts"],
    ),
    "graphs of whole layers": ([*XIELU, "--cuda-graph-impl", "local"], ["--cuda-graph-impl local", "attn"]),
    "graphs of the MLP": (
        [*XIELU, "--cuda-graph-impl", "transformer_engine", "--cuda-graph-modules", "attn", "mlp"],
        ["--cuda-graph-impl transformer_engine", "attn"],
    ),
    "graph of the whole step": ([*XIELU, "--cuda-graph-impl", "full_iteration"], ["--cuda-graph-impl full_iteration"]),
    "graphs by an old flag": ([*XIELU, "--enable-cuda-graph"], ["--enable-cuda-graph", "attn"]),
    "inference layers": (
        [*XIELU, "--transformer-impl", "inference_optimized"],
        ["--transformer-impl inference_optimized", "transformer_engine or local"],
    ),
    "peak of no use": ([*XIELU, "--peak-tflops", "0"], ["--peak-tflops", "above 0"]),
    "Transformer Engine that is not there": (
        [*XIELU, "--transformer-impl", "transformer_engine"],
        ["--transformer-impl transformer_engine", "expected Transformer Engine, got none", "--transformer-impl local"],
    ),
    "fp4": ([*XIELU, "--fp4-format", "e2m1"], ["--fp4-format", "NVFP4", "not built"]),
    "no micro batch": (NO_MICRO_BATCH, ["micro_batch_size"]),
    "no device": ([word for word in XIELU if word != "--cpu"], ["CUDA device", "--cpu"]),
    "sft": ([*XIELU, "--sft"], ["--sft", "pretrain_gpt.py"]),
}


def entry(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_act.pretrain_gpt", *words]
    return subprocess.run(
        command, env=environment(), cwd=folder, text=True, capture_output=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def refused() -> dict[str, dict]:
    words = json.dumps([command for command, _ in EARLY.values()])
    done = subprocess.run(
        [sys.executable, str(WORKER), words], env=environment(), text=True, capture_output=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))
    return dict(zip(EARLY, json.loads(report[7:]), strict=True))


@pytest.mark.parametrize("case", list(EARLY))
def test_flags_that_cannot_work_are_refused_in_one_line(refused: dict[str, dict], case: str) -> None:
    result = refused[case]
    assert result["code"] == 2
    assert result["error"].startswith("error: ") and result["error"].count("\n") == 1
    assert [word for word in EARLY[case][1] if word not in result["error"]] == []


CONFIGS = {
    "no such file": (None, ["config.yaml", "No such file"]),
    "not yaml": ("MODEL_ARGS: {", ["config.yaml", "YAML"]),
    "no MODEL_ARGS": ("--num-layers: 4", ["MODEL_ARGS"]),
    "unknown key": ("MODEL_ARGS:\n  --num-layer: 4\n", ["--num-layer", "did you mean --num-layers"]),
    "no value": ("MODEL_ARGS:\n  --save:\n", ["--save", "got none"]),
    "switch with a value": ("MODEL_ARGS:\n  --bf16: 3\n", ["--bf16", "true or false", "3"]),
}


@pytest.mark.parametrize("case", list(CONFIGS))
def test_config_files_that_cannot_work_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, words = CONFIGS[case]
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    done = entry(["--config", "config.yaml", *XIELU], tmp_path)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and [word for word in words if word not in lines[0]] == []
    assert "Traceback" not in done.stderr


def test_help_is_complete_without_cpu_flag_or_gpu(tmp_path: Path) -> None:
    done = entry(["--help"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    words = ["--activation-init", "--metrics-jsonl", "--tensor-model-parallel-size", "xiprelup"]
    assert [word for word in words if word not in done.stdout] == []


def refused_line(words: list[str], folder: Path) -> str:
    """The error line of a command that must fail without leaving anything in ``folder``."""
    before = sorted(folder.iterdir())
    done = entry(["--cpu", *MODEL_FLAGS, "--activation", "xielu", "--train-iters", "1", *words], folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert sorted(folder.iterdir()) == before
    return next(line for line in done.stderr.splitlines() if line.startswith("error: "))


def test_missing_data_is_refused(data_flags: list[str], tmp_path: Path) -> None:
    line = refused_line([*data_flags, "--data-path", str(tmp_path / "none")], tmp_path)
    assert "none.bin" in line and "preprocess_fineweb_edu.py" in line


def test_a_vocabulary_smaller_than_the_data_is_refused(data_flags: list[str], tmp_path: Path) -> None:
    line = refused_line([*data_flags, *NULL], tmp_path)
    assert "vocabulary mismatch" in line and "127" in line and "511" in line


def test_missing_tokenizer_is_refused(data_flags: list[str], tmp_path: Path) -> None:
    line = refused_line([*data_flags, "--tokenizer-model", str(tmp_path / "nowhere")], tmp_path)
    assert "--tokenizer-model" in line and "nowhere" in line


@pytest.mark.distributed
def test_a_checkpoint_without_the_scalars_or_of_another_schedule_is_refused(
    forked_train: Train, data_flags: list[str], tmp_path: Path
) -> None:
    swiglu = forked_train("--swiglu", "--train-iters", "1", *SAVE)
    assert swiglu.code == 0, swiglu.log[-2000:]
    line = refused_line([*data_flags, "--load", str(swiglu.checkpoint)], tmp_path)
    assert "xielu" in line and "swiglu" in line and "alpha_p" in line
    longer = forked_train("--swiglu", "--train-iters", "2", "--load", str(swiglu.checkpoint))  # another schedule
    expected = "--load: expected the checkpoint's total number of samples (8), got 16: give the schedule's flags as"
    assert longer.code == 2 and expected in longer.log and "Traceback" not in longer.log
