"""What a run of Megatron with given flags would save beside its tensors; a program of its own.

    python -m megatron_act.checkpoint.megatron_args OUTPUT FLAG...

Megatron's parser and checks read the flags, so that an imported checkpoint carries the arguments that Megatron
compares, restores (``--use-checkpoint-args``) and builds models from, and flags that Megatron refuses are found at
once. On a CPU, in one process, without a model.
"""

import sys

from megatron_act import cpu_backend

VERSION = 3.0  # of Megatron's checkpoint content: queries, keys and values are interleaved by group
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}  # layers stacked under one name
# what the parser wants to see and no weight depends on
RUN = ("--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "1", "--lr", "1e-4")


def main(output: str, words: list[str]) -> None:
    """Writes the common state of flags to a file, as ``torch.save`` does."""
    cpu_backend.install()
    import torch
    from megatron.training.arguments import parse_and_validate_args

    from megatron_act import arguments

    sys.argv = [sys.argv[0], *cpu_backend.FLAGS, *RUN, *words]
    args = parse_and_validate_args(arguments.add_arguments)
    counters = {"iteration": 0, "num_floating_point_operations_so_far": 0}
    common = {"args": args, "checkpoint_version": VERSION, **counters, "content_metadata": CONTENT}
    torch.save([common], output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
