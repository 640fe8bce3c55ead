"""Time the activations: ours, plain torch, torch.compile, and other libraries where they are installed.

    python tools/benchmark_kernels.py --output DIR

DIR gets kernels.json, kernels.csv, kernels.md and kernels.png (a roofline): one row per operation, activation and
shape with bytes per element, microseconds (median, 20th to 80th percentile), GB/s, % of the bandwidth of a
copy measured in the same run, and the time of everybody else over ours. The header names machine, versions, commit,
command, and which libraries were not installed (Liger, Transformer Engine, the xIELU CUDA extension).

On a GPU these are device times: launches over more memory than L2 holds, captured into a CUDA graph and replayed.
Without --shapes: ranks of Apertus 8B and of the xIELU paper's models, and one and 64 tokens of generation; a gated MLP
of equal compute is 2/3 as wide. All shapes for xielu, crrelu, relu2 and swiglu, the first for the others: every one
more costs two or three runs of torch.compile.

On a CPU it times the torch reference, which is what a CPU runs, at the quickstart's shape with the threads of one of
its ranks. In both cases the MLP's matmuls are timed too: the activation's share of forward and backward.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/x.py` from a checkout

from megatron_act.errors import UserError, run_cli

DTYPES = ("bfloat16", "float32", "float16")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the result; made if absent")
    parse.add_argument(
        "--shapes", nargs="+", metavar="RxC",
        help="tokens x columns of the result, e.g. 4096x21504; up to 64 tokens: forward only, next to torch.relu",
    )  # fmt: skip
    parse.add_argument("--activations", nargs="+", metavar="NAME", help="xielu, crrelu, ..., swiglu; default: all")
    parse.add_argument("--dtype", choices=DTYPES, help="of the tensors (default: bfloat16, on a CPU float32)")
    parse.add_argument(
        "--minutes", type=float, metavar="N", help="start nothing more after N minutes; what is left out is named"
    )
    parse.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parse


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Measures, writes, prints the page and, last, the paths."""
    import torch  # seconds to import: not for --help

    from megatron_act.benchmark import report
    from megatron_act.benchmark.cases import select

    began = time.monotonic()
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes: expected more than 0, got {args.minutes:g}; give a time or leave it out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = _rank_threads(device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    cases = select(args.activations, _shapes(args.shapes, device), dtype)
    report.check_folder(args.output)
    torch.set_num_threads(threads)
    deadline = began + 60 * args.minutes if args.minutes else float("inf")
    figures = measured(cases, device, deadline)
    result = {"header": _header(argv, threads, figures.pop("compared"), figures.pop("gb_per_s")), **figures}
    paths = report.write(result, args.output)
    print(report.page(result), *paths, sep="\n")
    return 0


def measured(cases: list[Any], device: str, deadline: float) -> dict[str, Any]:
    """Rows, the MLP's shares, notes; what was compared with and the copy's GB/s, for the header."""
    from megatron_act.benchmark import competitors, mlp, table
    from megatron_act.benchmark.timing import copy_gb_per_s

    found = competitors.find() if device == "cuda" else competitors.Found({}, [], [])
    gb_per_s = copy_gb_per_s(device)
    done = table.run(cases, found.functions, device, gb_per_s, _progress, deadline)
    if not done.rows:
        raise UserError("--minutes: expected time for one case at least, got less; give more")
    left_out = [f"not reached in time: {', '.join(done.left_out)}"] if done.left_out else []
    return {
        "rows": done.rows,
        "mlp": mlp.shares(cases, done.rows, device),
        "notes": [*done.notes, *(f"not loadable: {name}" for name in found.broken), *left_out],
        "compared": {"with": list(found.functions), "absent": found.absent if device == "cuda" else None},
        "gb_per_s": gb_per_s,
    }


def _header(argv: list[str], threads: int, compared: dict[str, Any], gb_per_s: float) -> dict[str, str]:
    from megatron_act.benchmark.header import header

    names = ", ".join(["torch eager", "torch.compile", *compared["with"]])
    absent = "other libraries, for GPUs only" if compared["absent"] is None else ", ".join(compared["absent"])
    return {
        **header(argv, threads),
        "copy": f"{gb_per_s:,.1f} GB/s, read plus written",
        "compared with": names,
        "not compared with" if compared["absent"] is None else "not installed": absent or "none",
    }


def _rank_threads(device: str) -> int:
    from megatron_act.experiment.layout import detect

    return detect().threads_per_rank if device == "cpu" else 1


def _shapes(texts: list[str] | None, device: str) -> list[Any]:
    from megatron_act.benchmark.cases import GPU_SHAPES, parse_shape, quickstart_shape
    from megatron_act.experiment.layout import detect

    if texts:
        return [parse_shape(text) for text in texts]
    return list(GPU_SHAPES) if device == "cuda" else [quickstart_shape(detect().tensor_parallel)]


def _progress(cases: list[Any]) -> Iterable[Any]:
    """A bar on a terminal, otherwise a line per case; both on standard error."""
    from tqdm import tqdm

    return tqdm(cases, desc="benchmark", unit="case") if sys.stderr.isatty() else _lines(cases)


def _lines(cases: list[Any]) -> Iterator[Any]:
    began = time.monotonic()
    for number, case in enumerate(cases, 1):
        print(f"benchmark: {time.monotonic() - began:.0f} s, {number}/{len(cases)} {case.activation} {case.label}",
              file=sys.stderr, flush=True)  # fmt: skip
        yield case


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    return run_cli(lambda: run(args, argv), args.debug)


if __name__ == "__main__":
    sys.exit(main())
