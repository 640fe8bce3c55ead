"""What the training tests share: torchrun, the tiny model's flags, and the record of a finished run."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL_FLAGS = """
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 96 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --normalization RMSNorm --position-embedding-type rope --qk-layernorm
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 4 --global-batch-size 8 --lr 1e-2 --min-lr 1e-2 --lr-decay-style constant --weight-decay 0.1
    --init-method-std 0.05 --embedding-init-method-std 1.0 --eval-iters 0 --eval-interval 1000 --log-interval 1
    --ckpt-format torch_dist --distributed-timeout-minutes 2 --num-workers 0
""".split()  # noqa: SIM905
SAVE = ["--save-interval", "100000"]  # a checkpoint at the end; without it the runs of `train` save none
INITIAL = ["--train-iters", "1", "--lr", "0", "--min-lr", "0", *SAVE]  # a checkpoint of the initial weights

# A dense layer and three of experts, which share their layer's scalars and have a shared expert beside them.
MOE = """
    --activation xielu --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64
    --moe-shared-expert-intermediate-size 32 --moe-layer-freq ([0,1,1,1]) --moe-token-dispatcher-type alltoall
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
""".split()  # noqa: SIM905
EP2 = ["--expert-model-parallel-size", "2"]


@dataclass
class Run:
    """What a finished run left: its log, its metrics, its checkpoints."""

    folder: Path
    code: int
    log: str
    records: list[dict] = field(default_factory=list)

    @property
    def steps(self) -> list[dict]:
        return [record for record in self.records if record["event"] == "step"]

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"


def continuing(run: Run, iteration: int, folder: Path) -> list[str]:
    """The flags that load an iteration of ``run``, whichever its last is; ``folder`` becomes one with no other."""
    name = f"iter_{iteration:07d}"
    folder.mkdir(exist_ok=True)
    (folder / name).symlink_to(run.checkpoint / name)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return ["--load", str(folder)]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # gpu/run.sh adds packages
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TRITON_INTERPRET": "0"}


def torchrun(*words: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """Runs a module or script on ``ranks`` local ranks; returns its code and joined output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *words]
    return subprocess.run(
        command,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=500,
        check=False,
    )


Train = Callable[..., Run]
