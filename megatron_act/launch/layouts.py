"""Layouts to start from, with memory per GPU: ``python -m megatron_act.launch.layouts`` writes the README's table.

Measured nowhere: the memory is `preflight_memory`'s estimate, and the layouts follow three rules. Tensor parallelism
stays inside a node; a pipeline comes only when state does not fit otherwise; the micro batch is what memory leaves.
"""

import sys
from dataclasses import dataclass

from megatron_act import config_files, model_args
from megatron_act.kernels import api as kernels
from megatron_act.layout_memory import Layout
from megatron_act.model_args import Flags
from megatron_act.preflight_memory import GIB, USABLE, GpuBytes, Step, gpu_bytes
from megatron_act.readme_section import main, replaced

BEGIN = "<!-- layouts: written by python -m megatron_act.launch.layouts -->"
END = "<!-- end of layouts -->"
ACTIVATION = "xielu"
GPU_GIB = 79.2  # what CUDA reports of an H100 with 80 GB
GPUS_PER_NODE = 8
HEADER = (
    "model",
    "GPUs",
    "TP x PP x DP",
    "micro, global batch",
    "GiB per GPU: state + activations",
    "flags after `--`",
)


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """A model of ``configs/`` on ``gpus`` GPUs; ``words`` are the flags that the config lacks."""

    model: str
    gpus: int
    tensor: int
    pipeline: int = 1
    micro_batch: int
    global_batch: int
    sequence_parallel: bool = False

    @property
    def flags(self) -> Flags:
        """What the config says."""
        return model_args.read(config_files.named(self.model, ACTIVATION))

    @property
    def data_parallel(self) -> int:
        """Replicas."""
        return self.gpus // (self.tensor * self.pipeline)

    def words(self) -> list[str]:
        """Flags that differ from the config's."""
        wanted: Flags = {
            "--tensor-model-parallel-size": self.tensor,
            "--pipeline-model-parallel-size": self.pipeline,
            "--sequence-parallel": self.sequence_parallel,
            "--micro-batch-size": self.micro_batch,
            "--global-batch-size": self.global_batch,
        }
        default = {"--pipeline-model-parallel-size": 1}
        given = default | self.flags
        return model_args.to_words({flag: value for flag, value in wanted.items() if given.get(flag, False) != value})

    def memory(self) -> GpuBytes:
        """The estimate for the fullest GPU."""
        shape = model_args.shape(self.flags, {ACTIVATION: len(kernels.get(ACTIVATION).params)})
        layout = Layout(tensor_parallel=self.tensor, pipeline_parallel=self.pipeline, data_parallel=self.data_parallel)
        step = Step(
            micro_batch=self.micro_batch,
            micro_batches=self.global_batch // (self.micro_batch * self.data_parallel),
            sequence_parallel=self.sequence_parallel,
        )
        return gpu_bytes(shape, layout, step)

    def fits(self) -> bool:
        """Whether a GPU of 80 GB takes it."""
        return self.memory().total <= USABLE * GPU_GIB * GIB

    def row(self) -> str:
        """Its line of the table."""
        memory = self.memory()
        sizes = f"{self.tensor} x {self.pipeline} x {self.data_parallel}"
        batch = f"{self.micro_batch}, {self.global_batch}"
        total = f"{memory.state / GIB:.1f} + {memory.activations / GIB:.1f}"
        words = f"`{' '.join(self.words())}`" if self.words() else ""
        return f"| {self.model} | {self.gpus} | {sizes} | {batch} | {total} | {words} |"


RECOMMENDED = (
    Recommended(model="paper-1.1b", gpus=8, tensor=1, micro_batch=5, global_batch=440),
    Recommended(model="paper-1.1b", gpus=88, tensor=1, micro_batch=5, global_batch=440),
    Recommended(model="paper-3b", gpus=32, tensor=2, micro_batch=5, global_batch=640, sequence_parallel=True),
    Recommended(model="paper-3b", gpus=256, tensor=2, micro_batch=5, global_batch=640, sequence_parallel=True),
    Recommended(model="apertus-8b", gpus=64, tensor=2, micro_batch=2, global_batch=1024, sequence_parallel=True),
    Recommended(model="apertus-8b", gpus=256, tensor=2, micro_batch=2, global_batch=1024, sequence_parallel=True),
    Recommended(
        model="apertus-70b",
        gpus=512,
        tensor=8,
        pipeline=4,
        micro_batch=2,
        global_batch=2048,
        sequence_parallel=True,
    ),
)


def table() -> str:
    """The table as Markdown."""
    lines = [f"| {' | '.join(HEADER)} |", "|---|--:|---|---|--:|---|"]
    return "\n".join([*lines, *(item.row() for item in RECOMMENDED)])


def rendered(readme: str) -> str:
    """``readme`` with the table.

    Raises:
        UserError: no markers.
    """
    return replaced(readme, BEGIN, END, table())


if __name__ == "__main__":
    sys.exit(main(__doc__, rendered))
