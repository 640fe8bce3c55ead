"""Time the activations: ours, plain torch, torch.compile, and other libraries where they are installed.

    python tools/benchmark_kernels.py --output DIR [--only kernels fp8 mlp]

Three parts, each with files of its own in DIR; without --only all of them.

kernels: kernels.json, kernels.csv, kernels.md and kernels.png (a roofline): one row per operation, activation and
shape with bytes per element, microseconds (median, 20th to 80th percentile), GB/s, % of the bandwidth of a
copy measured in the same run, and the time of everybody else over ours. The header names machine, versions, commit,
command, and which libraries were not installed (Liger, Transformer Engine, the xIELU CUDA extension). The MLP's matmuls
are timed too: the activation's share of forward and backward.

fp8: fp8.json and fp8.md: the same for results in FP8, by recipe (delayed, tensorwise, blockwise, mxfp8) and direction:
ours in one kernel, our bf16 kernel and Transformer Engine's quantizer after it (torch's casts where it has none),
Transformer Engine's own fused activation; and what the bytes would allow. All shapes for xielu and the first for relu2,
or for the first and the others of --activations, which must have no gate; tensors are bf16.

mlp: mlp.json and mlp.md: fc1, activation, fc2 under each FP8 recipe that the GPU runs, forward and backward: xIELU in
Megatron's layers with its result in FP8 and in bf16, Transformer Engine's ReLU squared and SwiGLU, Megatron's SwiGLU.
Needs Transformer Engine and Megatron-Core.

On a GPU these are device times: launches over more memory than L2 holds, captured into a CUDA graph and replayed; an
MLP is launched as training does. Without --shapes: ranks of Apertus 8B and of the xIELU paper's models, and one and 64
tokens of generation; a gated MLP of equal compute is 2/3 as wide. All shapes for xielu, crrelu, relu2 and swiglu, the
first for the others: every one more costs two or three runs of torch.compile.

On a CPU it times the torch reference, which is what a CPU runs, at the quickstart's shape with the threads of one of
its ranks; fp8 takes a small shape there, to try the code.
"""

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/x.py` from a checkout

from megatron_act.errors import UserError, run_cli

DTYPES = ("bfloat16", "float32", "float16")
PARTS = ("kernels", "fp8", "mlp")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the result; made if absent")
    parse.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"{', '.join(PARTS)}; default: all that can run"
    )
    parse.add_argument(
        "--shapes", nargs="+", metavar="RxC",
        help="tokens x columns of the result, e.g. 4096x21504; up to 64 tokens: forward only, next to torch.relu",
    )  # fmt: skip
    parse.add_argument("--activations", nargs="+", metavar="NAME", help="xielu, crrelu, ..., swiglu; default: all")
    parse.add_argument("--dtype", choices=DTYPES, help="of the part kernels (default: bfloat16, on a CPU float32)")
    parse.add_argument(
        "--minutes", type=float, metavar="N", help="start nothing more after N minutes; what is left out is named"
    )
    parse.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parse


@dataclass(frozen=True)
class Run:
    """What the parts share.

    Attributes:
        device: ``cuda`` or ``cpu``.
        deadline: of ``time.monotonic``: nothing more is started after it.
        threads: of torch.
    """

    args: argparse.Namespace
    argv: list[str]
    device: str
    deadline: float
    threads: int

    def header(self, facts: Mapping[str, str]) -> dict[str, str]:
        """Machine, versions, command, and what a part adds."""
        from megatron_act.benchmark.header import header

        return {**header(self.argv, self.threads), **facts}


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Measures, writes, prints each part's page and the paths; 1 where something of ours failed in FP8."""
    import torch  # seconds to import: not for --help

    from megatron_act.benchmark import report

    began = time.monotonic()
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes: expected more than 0, got {args.minutes:g}; give a time or leave it out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = _rank_threads(device)
    report.check_folder(args.output)
    torch.set_num_threads(threads)
    what = Run(args, argv, device, began + 60 * args.minutes if args.minutes else float("inf"), threads)
    return max(_part(name, what) for name in args.only or PARTS)


def _part(name: str, what: Run) -> int:
    """Exit code of one part; one that cannot run ends the run only where it was asked for (kernels: always)."""
    try:
        return {"kernels": _kernels, "fp8": _fp8, "mlp": _mlp}[name](what)
    except UserError as error:
        if what.args.only or name == "kernels":
            raise
        print(f"benchmark: left out: {error}", file=sys.stderr)
        return 0


def _kernels(what: Run) -> int:
    import torch

    from megatron_act.benchmark import report
    from megatron_act.benchmark.cases import select

    dtype = getattr(torch, what.args.dtype or ("bfloat16" if what.device == "cuda" else "float32"))
    cases = select(what.args.activations, _shapes(what.args.shapes, what.device), dtype)
    figures = measured(cases, what.device, what.deadline)
    facts = _compared(figures.pop("compared"), figures.pop("gb_per_s"))
    result = {"header": what.header(facts), **figures}
    _show(report.page(result), report.write(result, what.args.output))
    return 0


def measured(cases: list[Any], device: str, deadline: float) -> dict[str, Any]:
    """Rows, the MLP's shares, notes; what was compared with and the copy's GB/s, for the header."""
    from megatron_act.benchmark import competitors, mlp, table
    from megatron_act.benchmark.timing import copy_gb_per_s

    found = competitors.find() if device == "cuda" else competitors.Found({}, [], [])
    gb_per_s = copy_gb_per_s(device)
    done = table.run(cases, found.functions, device, gb_per_s, _progress, deadline)
    return {
        "rows": _some(done).rows,
        "mlp": mlp.shares(cases, done.rows, device),
        "notes": [*done.notes, *(f"not loadable: {name}" for name in found.broken), *_missing(done)],
        "compared": {"with": list(found.functions), "absent": found.absent if device == "cuda" else None},
        "gb_per_s": gb_per_s,
    }


def _compared(compared: dict[str, Any], gb_per_s: float) -> dict[str, str]:
    absent = "other libraries, for GPUs only" if compared["absent"] is None else ", ".join(compared["absent"])
    return {
        "copy": _copy_text(gb_per_s),
        "compared with": ", ".join(["torch eager", "torch.compile", *compared["with"]]),
        "not compared with" if compared["absent"] is None else "not installed": absent or "none",
    }


def _fp8(what: Run) -> int:
    from megatron_act.benchmark import fp8_report, fp8_rows
    from megatron_act.benchmark.timing import copy_gb_per_s

    shapes = _shapes(what.args.shapes, what.device) if what.args.shapes or what.device == "cuda" else [fp8_rows.SMALL]
    cases = fp8_rows.select(what.args.activations, shapes, what.device)
    gb_per_s = copy_gb_per_s(what.device)
    done = fp8_rows.run(cases, what.device, gb_per_s, _progress, what.deadline)
    facts = {"copy": _copy_text(gb_per_s), "Transformer Engine": _engine()}
    return _finish("fp8", done, what.header(facts), fp8_report.rows_page, what.args.output)


def _mlp(what: Run) -> int:
    from megatron_act.benchmark import fp8_mlp, fp8_report

    cases = fp8_mlp.select(_shapes(what.args.shapes, what.device), what.device)
    done = fp8_mlp.run(cases, what.device, _progress, what.deadline)
    header = what.header({"Transformer Engine": _engine()})
    return _finish("mlp", done, header, fp8_report.mlp_page, what.args.output)


def _finish(
    stem: str, done: Any, header: dict[str, str], page: Callable[[dict[str, Any]], str], folder: Path
) -> int:  # fmt: skip
    from megatron_act.benchmark import report

    failed = [f"failed: {what}" for what in done.failed]
    result = {"header": header, "rows": _some(done).rows, "notes": [*failed, *done.notes, *_missing(done)]}
    _show(page(result), report.save(stem, result, page(result), folder))
    return 1 if failed else 0


def _some(done: Any) -> Any:
    """``done``, or UserError where it has no row."""
    if not done.rows:
        why = f"got {done.failed[0]}" if done.failed else "got no time for it: give more --minutes"
        raise UserError(f"expected one measurement at least, {why}")
    return done


def _missing(done: Any) -> list[str]:
    return [f"not reached in time: {', '.join(done.left_out)}"] if done.left_out else []


def _engine() -> str:
    from megatron_act import te

    return te.problem() or importlib.metadata.version("transformer_engine")


def _copy_text(gb_per_s: float) -> str:
    return f"{gb_per_s:,.1f} GB/s, read plus written"


def _show(page: str, paths: list[Path]) -> None:
    print(page, *paths, sep="\n", flush=True)


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
        print(f"benchmark: {time.monotonic() - began:.0f} s, {number}/{len(cases)} {case.name}",
              file=sys.stderr, flush=True)  # fmt: skip
        yield case


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    return run_cli(lambda: run(args, argv), args.debug)


if __name__ == "__main__":
    sys.exit(main())
