"""Times the activation kernels: one row per (op, activation, shape, dtype), against torch eager and torch.compile.

On a GPU every run reads buffers that are not in L2 and is timed by CUDA events; a plain copy is timed in the same run.
Without a GPU it times the torch reference (there "ours" is "eager"), which is what a CPU uses, and says so.
"""

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_act.kernels import api as kernels

# rows x columns of fc1's output as one rank sees it
GPU_SHAPES = ["4096x21504", "4096x10752", "20480x9216", "20480x6144", "1x21504", "64x21504"]
CPU_SHAPES = ["1024x384"]
FULL = ("xielu", "crrelu", "relu2", "swiglu")  # every shape; the others take the first
L2_BYTES = 256 << 20  # more than the L2 of any GPU: buffers rotate over this much
CPU_REPEATS, GPU_REPEATS = 20, 50


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the four result files")
    parser.add_argument("--shapes", nargs="+", metavar="RxC", help="rows x columns, e.g. 4096x21504")
    parser.add_argument("--activations", nargs="+", metavar="NAME", help="names of kernels.names(), or swiglu")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32", "float16"], help="default: bfloat16, on a CPU float32"
    )
    parser.add_argument("--debug", action="store_true", help="full traceback on an error")
    return parser.parse_args(argv)


def functions(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], int]:
    """(ours, torch's, raw parameters, width of x in columns)"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "swiglu":
        plain = lambda x: torch.nn.functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]  # noqa: E731
        return (lambda x: kernels.apply("silu", x, gated=True)), plain, [], 2
    activation = kernels.get(name)
    params = [torch.tensor([p.raw_init], device=device, requires_grad=True) for p in activation.params]
    return (lambda x, *p: kernels.apply(name, x, p)), activation.reference, params, 1


def rotating(make: Callable[[], list[Tensor]], size_bytes: int) -> list[list[Tensor]]:
    """Enough copies of the arguments that a round over them leaves nothing in L2."""
    count = max(1, min(32, -(-L2_BYTES // max(1, size_bytes)))) if torch.cuda.is_available() else 1
    return [make() for _ in range(count)]


def timings(run: Callable[[list[Tensor]], Any], arguments: list[list[Tensor]]) -> list[float]:
    """Microseconds of every repetition, after three that are not counted."""
    cuda, times = torch.cuda.is_available(), []
    for i in range(3 + (GPU_REPEATS if cuda else CPU_REPEATS)):
        chosen = arguments[i % len(arguments)]
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(chosen)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        else:
            begin = time.perf_counter()
            run(chosen)
            times.append((time.perf_counter() - begin) * 1e6)
    return sorted(times[3:])


def cases(name: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, dict[str, list[float]]]:
    """Timings by op (forward, backward) and by implementation."""
    ours, plain, params, width = functions(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    implementations = {"ours": ours, "eager": plain, "compiled": torch.compile(plain)}
    rows, cols = shape
    make = lambda: [torch.randn(rows, cols * width, device=device, dtype=dtype, requires_grad=True)]  # noqa: E731
    inputs = rotating(make, rows * cols * width * dtype.itemsize)
    grad = torch.randn(rows, cols, device=device, dtype=dtype)
    found: dict[str, dict[str, list[float]]] = {"forward": {}, "backward": {}}
    for label, function in implementations.items():
        with torch.no_grad():
            found["forward"][label] = timings(lambda a, f=function: f(a[0], *params), inputs)  # type: ignore[misc]
        graphs = [[function(a[0], *params), a[0]] for a in inputs]
        back = lambda a: torch.autograd.grad(a[0], [a[1], *params], grad, retain_graph=True)  # noqa: E731
        found["backward"][label] = timings(back, graphs)
    return found


def copy_bandwidth() -> float:
    """GB/s of a plain copy of 256 MiB: the roof of this run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.zeros(L2_BYTES // 4, device=device)
    target = torch.empty_like(source)
    median = statistics.median(timings(lambda _: target.copy_(source), [[]]))
    return 2 * L2_BYTES / median / 1e3


def table(names: list[str], shapes: list[str], dtype: torch.dtype) -> list[dict[str, Any]]:
    roof, rows = copy_bandwidth(), []
    wanted = [(n, s) for n in names for s in (shapes if n in FULL else shapes[:1])]
    for name, text in tqdm(wanted, desc="benchmark", disable=None):
        r, c = (int(v) for v in text.split("x"))
        gated = name == "swiglu"
        for op, found in cases(name, (r, c), dtype).items():
            per_element = (
                dtype.itemsize * ({"forward": 3, "backward": 5} if gated else {"forward": 2, "backward": 3})[op]
            )
            median = {k: statistics.median(v) for k, v in found.items()}
            speed = per_element * r * c / median["ours"] / 1e3
            times = found["ours"]
            rows.append({
                "op": op, "activation": name, "shape": text, "dtype": str(dtype).removeprefix("torch."),
                "bytes_per_element": per_element, "median_us": median["ours"], "p20_us": times[len(times) // 5],
                "p80_us": times[len(times) * 4 // 5], "gb_per_s": speed, "percent_of_copy": 100 * speed / roof,
                "eager_over_ours": median["eager"] / median["ours"],
                "compiled_over_ours": median["compiled"] / median["ours"],
            })  # fmt: skip
    return rows


def header(argv: list[str]) -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU run ({platform.machine()}), no GPU"
    import triton

    return {
        "machine": machine, "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown", "command": " ".join(["python tools/benchmark_kernels.py", *argv]),
        "date": time.strftime("%Y-%m-%d"), "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def markdown(head: dict[str, str], rows: list[dict[str, Any]]) -> str:
    cell = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)  # noqa: E731
    lines = [f"{k}: {v}  " for k, v in head.items()] + [
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|---" * len(rows[0]) + "|",
    ]
    return "\n".join(lines + ["| " + " | ".join(cell(v) for v in row.values()) + " |" for row in rows]) + "\n"


def roofline(rows: list[dict[str, Any]], head: dict[str, str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.28 * len(rows) + 1.5))
    labels = [f"{r['activation']} {r['op']} {r['shape']}" for r in rows]
    axes.barh(labels, [r["percent_of_copy"] for r in rows])
    axes.axvline(100, color="black", linewidth=1)
    axes.set(xlabel="% of the bandwidth of a copy", title=head["machine"])
    axes.invert_yaxis()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    try:
        run(arguments, argv)
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"benchmark_kernels: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    gpu = torch.cuda.is_available()
    names = arguments.activations or ["swiglu", *kernels.names()]
    shapes = arguments.shapes or (GPU_SHAPES if gpu else CPU_SHAPES)
    for name in names:
        if name != "swiglu":
            kernels.get(name)
    for text in shapes:
        if not (len(text.split("x")) == 2 and all(v.isdigit() and int(v) > 0 for v in text.split("x"))):
            raise ValueError(f"--shapes: expected ROWSxCOLUMNS such as 4096x21504, got {text!r}; write both numbers")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if gpu else "float32"))
    head, rows = header(argv), table(names, shapes, dtype)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "kernels.json").write_text(json.dumps({"header": head, "rows": rows}, indent=1) + "\n")
    (arguments.output / "kernels.md").write_text(markdown(head, rows))
    with (arguments.output / "kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    roofline(rows, head, arguments.output / "kernels.png")
    print(markdown(head, rows))


if __name__ == "__main__":
    sys.exit(main())
