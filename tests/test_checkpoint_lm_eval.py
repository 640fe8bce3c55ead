"""lm-evaluation-harness reads an exported folder, offline, and its figure is the one that the logits give."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_scale import SMALL, random_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_act.checkpoint.export import export
from megatron_act.data.bpe import train_bpe

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="no lm-eval is installed")

TASKS = Path(__file__).parent / "data" / "lm_eval"
TEXTS = ["A whole number is even if two divides it.", "Rain falls on high ground first, and runs to the sea."]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    train_bpe(TEXTS * 20, 300, tmp_path / "tokenizer")
    load = random_checkpoint(tmp_path, SMALL | {"--padded-vocab-size": 384})
    return export(load, tmp_path / "hf", tokenizer=tmp_path / "tokenizer", dtype="float32", progress=False).output


@torch.no_grad()
def bits_per_byte(folder: Path) -> float:
    """-log2 of the texts' probability, each after the end-of-document token, over their bytes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, bits = AutoTokenizer.from_pretrained(folder), 0.0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        logs = model(ids).logits[0, :-1].double().log_softmax(-1)
        bits -= float(logs.gather(1, ids[0, 1:, None]).sum()) / math.log(2)
    return bits / sum(len(text.encode()) for text in TEXTS)


def test_bits_per_byte_offline(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    command = ["run", "--model", "hf", "--model_args", f"pretrained={exported},dtype=float32", "--tasks", "local_text"]
    command += ["--include_path", str(TASKS), "--device", "cpu", "--batch_size", "1", "--output_path", "results"]
    ours = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-m", "lm_eval", *command]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | ours, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    got = json.loads(results.read_text())["results"]["local_text"]["bits_per_byte,none"]
    wanted = bits_per_byte(exported)
    assert wanted > 1
    assert math.isclose(got, wanted, rel_tol=1e-5)
