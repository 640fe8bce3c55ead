"""Tiny models of every exported family, as Megatron's own training writes them at TP=2, PP=2 and EP=2."""

import os
import subprocess
from pathlib import Path

import checkpoint_support  # noqa: F401  # finds forked_runs
from forked_runs import ForkedRuns

ROOT = Path(__file__).parents[1]
LAYERS, STEPS, VOCAB_SIZE = 4, 10, 127  # the vocabulary is padded to 256 at TP=2, to 128 at PP=2
COMMON = f"""
    --cpu --num-layers {LAYERS} --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --normalization RMSNorm --norm-epsilon 1e-4 --position-embedding-type rope --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 4 --lr 3e-2
    --lr-decay-style constant --init-method-std 0.2 --eval-iters 0 --eval-interval 1000 --mock-data --num-workers 0
    --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --ckpt-format torch_dist --train-iters {STEPS}
    --distributed-timeout-minutes 2"""
TP2, PP2, EP2 = (f"--{kind}-parallel-size 2" for kind in ("tensor-model", "pipeline-model", "expert-model"))
UNTIED = "--untie-embeddings-and-output-weights"
GROUPS = "--group-query-attention --num-query-groups 2"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --ffn-hidden-size 96 --moe-ffn-hidden-size 48"
XIELU = (
    f"--activation xielu --qk-layernorm --ffn-hidden-size 160 --kv-channels 24 --rotary-base 500000 {GROUPS} {UNTIED}"
)
ARMS = {
    "apertus": f"{XIELU} {TP2}",
    "qwen3": f"--swiglu --qk-layernorm --ffn-hidden-size 96 {GROUPS} {TP2}",  # tied embeddings
    "llama": "--swiglu --ffn-hidden-size 96 --use-rope-scaling --rope-scaling-factor 32 --rotary-base 20000 "
    f"{UNTIED} {PP2}",
    "arcee": f"--activation relu2 --ffn-hidden-size 96 --kv-channels 24 {GROUPS} {UNTIED} {PP2}",
    "crrelu": f"--activation crrelu --qk-layernorm --ffn-hidden-size 96 --kv-channels 24 {GROUPS} {TP2}",
    "experts": f"--activation xielu {EXPERTS} {UNTIED} {EP2} --moe-token-dispatcher-type alltoall",
    "own-scalars": f"--activation xielu {EXPERTS} --qk-layernorm {EP2} --moe-router-pre-softmax "
    "--moe-router-topk-scaling-factor 1.5 --activation-per-expert --moe-token-dispatcher-type alltoall",
}
KINDS = {"crrelu": "megatron_act", "experts": "megatron_act", "own-scalars": "megatron_act"}


def train(forked: ForkedRuns, save: Path, flags: str, load: Path | None = None) -> Path:
    """Runs Megatron on 2 ranks and returns the save folder; with ``load`` at the last step it only saves again."""
    where = f"--save {save} --save-interval {STEPS if load is None else 10 * STEPS}"
    words = f"{COMMON} {flags} {where} {f'--load {load}' if load else ''}".split()
    log = save.with_suffix(".log")
    assert forked.run(words, 2, log) == [0, 0], log.read_text()[-3000:]
    return save


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    ours = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | ours, capture_output=True, text=True, timeout=300, check=False
    )
