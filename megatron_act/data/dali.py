"""``--dataloader dali``: NVIDIA DALI (optional) carries Megatron's samples, in its order, ahead of time, to the GPU.

What is read and in which order stays Megatron's own business: its datasets and its batch samplers decide, so a run
continues at any ``consumed_samples`` with the samples that Megatron's loader would give, and DALI keeps no state of its
own. DALI reads ahead, in a process of its own unless ``--num-workers 0``, and copies to the GPU while it computes.
"""

from argparse import Namespace
from typing import Any

import torch

from megatron_act.data import dali_worker
from megatron_act.data.dali_source import Batches

FLAG = "--dataloader dali"
READ_AHEAD = 2  # batches ready at each stage: DALI's default


class DaliLoader:
    """An iterator over batches, as dictionaries of tensors, on the GPU if there is one.

    The pipeline starts with the first batch, so that a loader that is never read costs no process.

    Args:
        batches: what to read.
        micro_batch_size: samples in each.
        workers: 0 reads in this process, any other number in one of DALI's, which reads ahead.
    """

    def __init__(self, batches: Batches, micro_batch_size: int, workers: int) -> None:
        self.batches, self.micro_batch_size, self.workers = batches, micro_batch_size, workers
        self._iterator: Any = None

    def __iter__(self) -> "DaliLoader":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._iterator is None:
            self._iterator = self._start()
        return next(self._iterator)[0]

    def _start(self) -> Any:
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        return DALIGenericIterator([self._pipeline()], list(self.batches.fields), prepare_first_batch=False)

    def _pipeline(self) -> Any:
        from nvidia.dali import Pipeline, fn

        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        spawned = {"py_start_method": "spawn", "py_callback_pickler": dali_worker} if self.workers else {}
        pipeline = Pipeline(self.micro_batch_size, 1, device, prefetch_queue_depth=READ_AHEAD, **spawned)
        with pipeline:
            arrays = fn.external_source(
                source=self.batches, num_outputs=len(self.batches.fields), parallel=self.workers > 0
            )
            pipeline.set_outputs(*(arrays if device is None else [array.gpu() for array in arrays]))
        return pipeline


def conflict(args: Namespace) -> str | None:
    """Why ``--dataloader dali`` cannot be served: one sentence with what to change, or None."""
    if args.dataloader != "dali":
        return None
    problems = (
        (
            not is_installed(),
            "expected the package nvidia-dali-cuda130 (or -cuda120), got none: pip install it or remove the flag",
        ),
        (
            args.dataloader_type == "external",
            "expected --dataloader-type single or cyclic, got external, which DALI takes: remove it",
        ),
        (
            args.full_validation or args.multiple_validation_sets,
            "expected one validation set read in part, got --full-validation or --multiple-validation-sets: remove one",
        ),
    )
    return next((f"{FLAG}: {message}" for present, message in problems if present), None)


def is_installed() -> bool:
    """Whether DALI can be imported."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


def version() -> str:
    """DALI's version."""
    from nvidia.dali import __version__

    return __version__
