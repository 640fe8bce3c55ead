"""What a published run takes: its command, its GPU-hours, its disk, from the config file and the machines at hand.

    GPU-hours  = FLOPs per token (forward + backward) * tokens / (MFU * peak FLOP/s of a GPU * 3600)
    disk       = 4 bytes * tokens, once for all runs  +  14 bytes * parameters * checkpoints, for each run

FLOPs are Megatron's: half of the attention square, logits, no recomputation. A checkpoint holds the bf16 weights, their
fp32 copies and Adam's two moments. Tokens are int32, since the papers' vocabulary does not fit 16 bits; the disk is for
data that is not repeated.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from megatron_act import config_files, model_args
from megatron_act.budget import Shape, flops, parameters
from megatron_act.errors import UserError
from megatron_act.layout_memory import Layout, state_bytes
from megatron_act.model_args import Flags, integer

MODULE = "megatron_act.pretrain_gpt"
PAPER_GPUS = {"paper-1.1b": 88, "paper-3b": 256}
PAPER_ACTIVATIONS = ("swiglu", "relu2", "xielu")
# The authors' first code computed log(0.8) - 1 and log(0.3) - 1 for the inverse softplus. Which of the two initial
# values the published curves had is not known.
EARLY_XIELU = {"alpha_p": 0.257973, "alpha_n": 0.604688}
TOKEN_BYTES = 4
CHECKPOINT_BYTES = 2 + 4 + 4 + 4  # per parameter


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The GPUs of a run; ``rendezvous`` is HOST:PORT of the first node, needed with several."""

    nodes: int
    gpus_per_node: int
    rendezvous: str | None = None

    def __post_init__(self) -> None:
        for flag, size in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if size < 1:
                raise UserError(f"{flag}: expected an integer of at least 1, got {size}")

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node

    def launcher(self) -> list[str]:
        """The words before ``-m``, the same on every node."""
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(self.nodes)]
        words += ["--nproc-per-node", str(self.gpus_per_node)]
        if self.nodes == 1:
            return [*words, "--standalone"]
        return [*words, "--rdzv-backend", "c10d", "--rdzv-endpoint", self.rendezvous or "HOST:PORT"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Data, tokenizer and what goes to every run."""

    train: Sequence[str]
    valid: Sequence[str]
    tokenizer: str
    output: Path
    save_interval: int
    extra: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model with one activation on given machines.

    Raises:
        UserError: a config without a schedule, or a batch that the GPUs cannot share.
    """

    model: str
    activation: str
    machines: Machines
    seed: int | None = None
    micro_batch: int | None = None
    init: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for flag in ("--train-iters", "--global-batch-size", "--micro-batch-size"):
            if flag not in self.flags:
                raise UserError(f"{self.model}: expected {flag} in {self.config}, got none: choose another --model")
        self._check_batch()

    @functools.cached_property
    def flags(self) -> Flags:
        """What the config says."""
        return model_args.read(self.config)

    @property
    def config(self) -> Path:
        """The file in ``configs/``."""
        return config_files.named(self.model, self.activation)

    @property
    def name(self) -> str:
        """Names the run's folder."""
        seed = self.flags.get("--seed") if self.seed is None else self.seed
        return f"{self.model}-{self.activation}{'-early' if self.init else ''}-seed{seed}"

    @property
    def shape(self) -> Shape:
        """The model without its scalars, which weigh nothing here."""
        return model_args.shape(self.flags, {})

    @property
    def layout(self) -> Layout:
        """Data parallelism over all GPUs that tensor parallelism leaves."""
        tensor = integer(self.flags, "--tensor-model-parallel-size", 1)
        if self.machines.gpus % tensor:
            raise UserError(
                f"{self.model}: expected a multiple of {tensor} GPUs (tensor parallel), got {self.machines.gpus}"
            )
        return Layout(tensor_parallel=tensor, data_parallel=self.machines.gpus // tensor)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return integer(self.flags, "--train-iters", 0)

    @property
    def batch(self) -> int:
        """Sequences a step."""
        return integer(self.flags, "--global-batch-size", 0)

    @property
    def micro(self) -> int:
        """Sequences that a GPU sees at once."""
        return self.micro_batch or integer(self.flags, "--micro-batch-size", 0)

    @property
    def schedule(self) -> str:
        """Learning rate, warm-up and decay, for people."""
        decay = f"{self.flags.get('--lr-decay-style', 'linear')} decay"
        if last := self.flags.get("--lr-wsd-decay-iters"):
            decay += f" over the last {last:,}"
        warm_up = self.flags.get("--lr-warmup-iters", 0)
        return f"learning rate {self.flags['--lr']:g}, warm-up {warm_up:,} steps, {decay}"

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.steps * self.batch * self.shape.seq_length

    @property
    def flops(self) -> int:
        """Model FLOPs of the whole run."""
        return self.tokens * flops(self.shape).training()

    def gpu_hours(self, mfu: float, peak_tflops: float) -> float:
        """The estimate, for a share ``mfu`` of a GPU's dense ``peak_tflops``."""
        return self.flops / (mfu * peak_tflops * 1e12) / 3600

    def checkpoints(self, save_interval: int) -> int:
        """How many are written; Megatron keeps all."""
        return -(-self.steps // save_interval)

    def checkpoint_bytes(self) -> int:
        """Bytes of one of them."""
        return CHECKPOINT_BYTES * parameters(self.shape).total

    def state_bytes(self) -> int:
        """Weights, gradients and Adam on a GPU."""
        return state_bytes(self.shape, self.layout).total

    def folder(self, output: Path) -> Path:
        """Where the run writes."""
        return output / self.name

    def command(self, inputs: Inputs) -> list[str]:
        """Every node's command; given again it goes on from the last checkpoint."""
        folder = self.folder(inputs.output)
        checkpoint = str(folder / "checkpoint")
        words = ["--config", str(self.config), "--micro-batch-size", str(self.micro)]
        words += ["--tokenizer-model", inputs.tokenizer]
        words += ["--train-data-path", *inputs.train, "--valid-data-path", *inputs.valid]
        words += ["--seed", str(self.seed)] if self.seed is not None else []
        words += ["--activation-init", *(f"{name}={value}" for name, value in self.init.items())] if self.init else []
        words += ["--save", checkpoint, "--load", checkpoint, "--save-interval", str(inputs.save_interval)]
        words += ["--eval-interval", "1000", "--eval-iters", "10", "--log-interval", "10"]
        words += ["--metrics-jsonl", str(folder / "metrics.jsonl"), "--tensorboard-dir", str(folder / "tensorboard")]
        if not find_spec("fused_weight_gradient_mlp_cuda"):  # apex's; the output layer is Megatron's own
            words.append("--no-gradient-accumulation-fusion")
        return [*self.machines.launcher(), "-m", MODULE, *words, *inputs.extra]

    def _check_batch(self) -> None:
        if self.micro < 1 or self.batch % self.micro:
            raise UserError(f"--micro-batch-size: expected a divisor of the batch of {self.batch}, got {self.micro}")
        micros, tensor = self.batch // self.micro, self.layout.tensor_parallel
        if micros % self.layout.data_parallel:
            sizes = ", ".join(str(size * tensor) for size in range(1, micros + 1) if micros % size == 0)
            raise UserError(
                f"{self.model}: expected {sizes} GPUs for {micros} micro-batches of {self.micro} sequences, "
                f"got {self.machines.gpus}: change --nodes, --gpus-per-node or --micro-batch-size"
            )
