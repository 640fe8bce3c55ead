"""A loss that is NaN or Inf: the run stops before the optimizer step and names the batch, down to its documents.

Guards what ``--check-for-nan-in-loss-and-grad``, Megatron's default, asks for. Megatron alone would run the step again
and, if it sees the same, save and end with exit code 16, to be started on another GPU; ``--rerun-mode`` on the command
line asks for that, and the batch is then named only.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches

Step = Callable[..., tuple[torch.Tensor, Any]]
DOCUMENTS_SHOWN = 8
REMEDY = "look at these documents and at the learning rate; --iterations-to-skip {} leaves the batch out"


class NanGuard:
    """Looks at every micro-batch's loss while training.

    Args:
        args: Megatron's validated arguments.
        words: the command line's words.
    """

    def __init__(self, args: Namespace, words: list[str]) -> None:
        self.args = args
        self.stops = not any(word.split("=")[0] == "--rerun-mode" for word in words)
        self.datasets: Any = None
        self.seen = (-1, 0)  # iteration, micro-batches of it whose loss is known

    def provider(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's dataset provider, with the training data remembered: they know their documents."""

        @wraps(original)  # Megatron looks at its arguments
        def provide(*args: Any, **kwargs: Any) -> Any:
            self.datasets = original(*args, **kwargs)
            return self.datasets

        provide.is_distributed = True  # type: ignore[attr-defined]  # Megatron then calls it on every rank
        return provide

    def forward_step(self, original: Step) -> Step:
        """A forward step whose loss function refuses what is not finite."""
        if not self.args.check_for_nan_in_loss_and_grad:
            return original

        def step(data_iterator: Any, model: Any, *rest: Any) -> tuple[torch.Tensor, Any]:
            output, loss = original(data_iterator, model, *rest)
            return output, partial(self.loss, loss) if torch.is_grad_enabled() else loss  # evaluations know no batch

        return step

    def loss(self, original: Callable[..., Any], output: torch.Tensor) -> Any:
        """The loss function; ``output`` are the per-token losses, (micro batch, sequence / cp).

        Raises:
            RuntimeError: a sum of them that is not finite.
        """
        iteration, known = self.seen
        micro_batch = known if iteration == self.args.curr_iteration else 0
        self.seen = (self.args.curr_iteration, micro_batch + 1)
        total = output.detach().float().sum()
        if not torch.isfinite(total):
            message = self.describe(output.detach(), micro_batch % get_num_microbatches(), float(total))
            if self.stops:
                raise RuntimeError(message)
            print(f"> megatron-act: {message}", file=sys.stderr, flush=True)
        return original(output)

    def describe(self, output: torch.Tensor, micro_batch: int, total: float) -> str:
        """Where a loss comes from: iteration, rank, samples and their documents."""
        args, iteration = self.args, self.args.curr_iteration + 1
        rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        first = args.consumed_train_samples + (micro_batch * ranks + rank) * args.micro_batch_size
        wrong = (~torch.isfinite(output.flatten(1))).any(dim=1).nonzero().flatten().tolist()
        samples = [first + row for row in wrong or range(args.micro_batch_size)]
        where = (
            f"rank {args.rank} (data-parallel rank {rank} of {ranks}), micro-batch {micro_batch + 1} of "
            f"{get_num_microbatches()}, {args.consumed_train_samples} samples consumed before"
        )
        found = "; ".join(self.documents(sample) for sample in samples) if self._in_order else "drawn at random"
        return (
            f"iteration {iteration}: expected a finite loss, got {total} on {where}: {found}: stopped before the "
            f"optimizer step, nothing saved: {REMEDY.format(iteration)}"
        )

    @property
    def _in_order(self) -> bool:
        return getattr(self.args, "sample_order", self.args.dataloader_type) == "single"  # DALI's loader is "external"

    def documents(self, sample: int) -> str:
        """A sample and its documents, where this rank has the data."""
        data = self.datasets[0] if self.datasets else None
        batches = getattr(data, "batches", None)  # a DALI loader's
        data = data if batches is None else batches.dataset
        found = documents_of(data, sample) if hasattr(data, "__getitem__") else None
        if found is None:
            return f"sample {sample}"
        path, numbers = found
        shown = " ".join(str(number) for number in numbers[:DOCUMENTS_SHOWN])
        more = f" and {len(numbers) - DOCUMENTS_SHOWN} more" if len(numbers) > DOCUMENTS_SHOWN else ""
        return f"sample {sample} = documents {shown}{more} of {path}"


def documents_of(dataset: Any, sample: int) -> tuple[str, list[int]] | None:
    """The path prefix and the numbers of the documents of one sample of a (blended) Megatron GPT dataset.

    Args:
        dataset: ``GPTDataset`` or ``BlendedDataset``; None is returned for others.
        sample: its index, before shuffling.
    """
    dataset[sample]  # loads the indexes
    if hasattr(dataset, "dataset_index"):
        return documents_of(dataset.datasets[dataset.dataset_index[sample]], dataset.dataset_sample_index[sample])
    if not getattr(dataset, "dataset_path", None):
        return None
    shuffled = dataset.shuffle_index[sample]
    first, last = dataset.sample_index[shuffled][0], dataset.sample_index[shuffled + 1][0]
    return dataset.dataset_path, [int(number) for number in dataset.document_index[first : last + 1]]
