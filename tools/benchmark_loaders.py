"""Time Megatron's data loader and NVIDIA DALI (`--dataloader dali`) on the same samples of one data set.

    python tools/benchmark_loaders.py --data P

P.bin and P.idx are read as GPT samples (tokens, labels, loss mask, position ids). All loaders are started on the first
sample and compared value by value before they are timed. Megatron's --num-workers 0 reads in the training
process, more than 0 in as many others; DALI reads in one process at most. On a GPU the time includes the copies to it.
Prints a Markdown table. Exit code: 0 done, 1 the loaders differ or something failed, 2 bad input.
"""

import argparse
import logging
import shlex
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

from megatron_act.compat import install_typing_override
from megatron_act.errors import UserError, run_cli


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parse.add_argument
    add("--data", required=True, metavar="P", help="an indexed data set, P.bin and P.idx")
    add("--seq-length", type=int, default=4096, metavar="N", help="tokens of a sample (default: 4096)")
    add("--micro-batch-size", type=int, default=8, metavar="N", help="samples of a batch (default: 8)")
    add("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="--num-workers to try (default: 0 1 2)")
    add("--batches", type=int, default=300, metavar="N", help="batches of one timing (default: 300)")
    add("--repeats", type=int, default=7, metavar="N", help="timings of each (default: 7)")
    add("--debug", action="store_true", help="print the traceback of an error")
    return parse


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured.

    Raises:
        UserError: no such data set, a number below its least, or no DALI.
    """
    from megatron_act.data.dali import is_installed

    for path in (args.data + ".bin", args.data + ".idx"):
        if not Path(path).is_file():
            raise UserError(f"--data: expected {path}, got no such file; run preprocess_fineweb_edu.py")
    least = {"seq_length": 1, "micro_batch_size": 1, "workers": 0, "batches": 1, "repeats": 1}
    for name, bound in least.items():
        value = min(args.workers) if name == "workers" else getattr(args, name)
        if value < bound:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {bound}, got {value}; correct it")
    if not is_installed():
        raise UserError("expected the package nvidia-dali-cuda130 (or -cuda120), got none; pip install it")


def run(args: argparse.Namespace) -> None:
    """Compares, measures, prints."""
    check(args)
    install_typing_override()
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's own, of optional packages, once per module
        from megatron_act.data import dali_benchmark as benchmark

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    load = benchmark.Load(args.seq_length, args.micro_batch_size, args.batches, args.repeats)
    with tempfile.TemporaryDirectory() as cache:
        dataset = benchmark.open_dataset(args.data, load, Path(cache))
        benchmark.compare(benchmark.contenders(dataset, load, args.workers))
        rows = benchmark.measure(benchmark.contenders(dataset, load, args.workers), load)
    print("\n".join([benchmark.table(rows), "", f"{benchmark.COMPARED} batches of each were found equal.", *facts()]))


def facts() -> list[str]:
    """Where and with what it was measured."""
    from importlib.metadata import version

    import torch

    from megatron_act.data.dali import version as dali_version
    from megatron_act.experiment.machine import describe_machine

    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
    versions = f"torch {torch.__version__}, megatron-core {version('megatron-core')}, DALI {dali_version()}"
    command = shlex.join(["python", "tools/benchmark_loaders.py", *sys.argv[1:]])
    return [machine, versions, f"{command}, {time.strftime('%Y-%m-%d')}"]


def main() -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args()
    return run_cli(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
