"""Time tokenization on one core: this project's tool, datatrove's and Megatron's ways, and the tokenizer alone.

    python tools/benchmark_tokenization.py --input FILE.parquet --tokenizer DIR

Everyone reads the same documents, in a process of its own on one core with one thread, and writes P.bin and P.idx:

tokenizer alone   the encoder that this project's tool takes, on texts that are in memory already, nothing written
this project      tools/preprocess_fineweb_edu.py: parquet, filters, tokens, files and their checksums
datatrove         its ParquetReader and stock MegatronDocumentTokenizer
Megatron          what Megatron-LM's tools/preprocess_data.py does with --append-eod: JSON lines, its Hugging Face
                  tokenizer one document at a time, IndexedDatasetBuilder. The script itself is not in the package

MB are bytes of text. Start-up (imports, loading and checking the tokenizer) is left out of MB/s and listed. CPU seconds
are the process's own, which others on its core do not lengthen; the share is of MB per CPU second. Prints Markdown.
Exit code: 0 done, 1 failed, 2 bad input.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

from megatron_act.errors import UserError, run_cli

ONE_THREAD = {
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
BATCH_DOCUMENTS = 1024
PACKAGES = ("fastokens", "tokenizers", "pyarrow", "datatrove", "megatron-core", "numpy")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parse.add_argument
    add(
        "--input", nargs="+", required=True, metavar="PATH", help="parquet files, folders or globs with a column 'text'"
    )
    add("--tokenizer", required=True, metavar="FILE|DIR", help="a Hugging Face tokenizer.json, or a folder with one")
    add("--eod-token", metavar="TOKEN", help="end of document (default: the tokenizer's own)")
    add("--repeats", type=int, default=3, metavar="N", help="runs of each; the median is printed (default: 3)")
    add("--only", nargs="+", choices=list(CONTENDERS), metavar="NAME", help=f"of {', '.join(CONTENDERS)}")
    add("--debug", action="store_true", help="print the traceback of an error")
    add("--child", nargs=3, help=argparse.SUPPRESS)  # contender, job's file, folder for its output
    return parse


Figures = dict[str, Any]
Job = dict[str, Any]


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> Figures:
        """Both."""
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def alone(job: Job, folder: Path) -> Figures:
    """The encoder on batches of texts in memory."""
    from megatron_act.data.tokenizer import load_encoder, open_tokenizer

    encoder = load_encoder(open_tokenizer(job["tokenizer"], job["eod_token"]))
    texts = _texts(job)
    batches = [texts[start : start + BATCH_DOCUMENTS] for start in range(0, len(texts), BATCH_DOCUMENTS)]
    clock = Clock()
    tokens = sum(len(encoder.encode(batch)[0]) for batch in batches)
    return {**clock.read(), "tokens": tokens + len(texts)}


def ours(job: Job, folder: Path) -> Figures:
    """This project's tool, with the seconds of its stages."""
    from megatron_act.data import preprocess
    from megatron_act.data.stopwatch import Stopwatch
    from megatron_act.data.tokenizer import load_encoder

    plan = preprocess.make_plan(job["inputs"], job["tokenizer"], folder / "P", eod_token=job["eod_token"])
    load_encoder(plan.job.tokenizer)  # kept for the task
    stages, clock = Stopwatch(), Clock()
    preprocess.run(plan, progress=False, clock=stages)
    return {**clock.read(), "stages": dict(stages)}


def datatrove(job: Job, folder: Path) -> Figures:
    """datatrove's reader and tokenizer, as its executor runs them for one task."""
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer
    from loguru import logger

    logger.disable("datatrove")
    writer = MegatronDocumentTokenizer(
        str(folder), "P", tokenizer_name_or_path=job["tokenizer"], eos_token=job["eod_token"]
    )
    assert writer.tokenizer is not None  # loads it
    clock = Clock()
    for number, file in enumerate(map(Path, job["inputs"])):
        reader = ParquetReader(str(file.parent), glob_pattern=file.name)
        writer.run(reader.run(rank=0, world_size=1), rank=number)
    return clock.read()


def megatron(job: Job, folder: Path) -> Figures:
    """Megatron-LM's preprocess_data.py in one process."""
    from megatron_act.compat import install_typing_override

    install_typing_override()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(job["hf_folder"], metadata_path={"library": "huggingface"})
    clock = Clock()
    builder = IndexedDatasetBuilder(str(folder / "P.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    with open(job["json_lines"], encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer.tokenize(json.loads(line)["text"])
            if ids:
                builder.add_document([*ids, tokenizer.eod], [len(ids) + 1])
    builder.finalize(str(folder / "P.idx"))
    return clock.read()


CONTENDERS: dict[str, Callable[[Job, Path], Figures]] = {
    "alone": alone,
    "ours": ours,
    "datatrove": datatrove,
    "megatron": megatron,
}
NAMES = {
    "alone": "tokenizer alone, in memory",
    "ours": "this project",
    "datatrove": "datatrove, stock",
    "megatron": "Megatron's way, from JSON lines",
}


def _texts(job: Job) -> list[str]:
    import pyarrow.parquet as pq

    return [
        text for file in job["inputs"] for text in pq.read_table(file, columns=["text"])["text"].to_pylist() if text
    ]


def child(args: argparse.Namespace) -> None:
    """In a process of its own: pinned to a core before anything starts a thread; prints the figures as JSON."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    name, file, folder = args.child
    began = Clock()
    figures = CONTENDERS[name](json.loads(Path(file).read_text(encoding="utf-8")), Path(folder))
    figures["start_seconds"] = began.read()["seconds"] - figures["seconds"]
    print(json.dumps(figures))


def prepare(args: argparse.Namespace, folder: Path) -> Job:
    """What everyone reads; for Megatron the texts as JSON lines and the tokenizer in a folder of Hugging Face's."""
    from megatron_act.data.source import expand_inputs
    from megatron_act.data.tokenizer import open_tokenizer

    if args.repeats < 1:
        raise UserError(f"--repeats: expected at least 1, got {args.repeats}; correct it")
    info = open_tokenizer(args.tokenizer, args.eod_token)
    if Path(info.file).name != "tokenizer.json":
        raise UserError(f"expected a tokenizer.json, which all of them read, got {info.file}; name one")
    inputs = [str(file.resolve()) for file in expand_inputs(args.input)]
    hf_folder = folder / "tokenizer"
    hf_folder.mkdir()
    (hf_folder / "tokenizer.json").write_bytes(Path(info.file).read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": info.eod_token}
    (hf_folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    job = {"inputs": inputs, "tokenizer": str(Path(info.file).resolve()), "eod_token": info.eod_token}
    texts = _texts(job)
    json_lines = folder / "texts.jsonl"
    json_lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    size = sum(len(text.encode()) for text in texts)
    described = {"encoder": info.encoder, "documents": len(texts), "text_bytes": size}
    return {**job, "hf_folder": str(hf_folder), "json_lines": str(json_lines), **described}


def measure(name: str, job: Job, folder: Path) -> Figures:
    """One run of one contender: its figures and the bytes of the tokens that it wrote."""
    file = folder / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words = [sys.executable, __file__, "--input", "-", "--tokenizer", "-", "--child", name, str(file), output]
        done = subprocess.run(words, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
        written = b"".join(path.read_bytes() for path in sorted(Path(output).glob("*.bin")))
        return {**json.loads(done.stdout.splitlines()[-1]), "written": written}


def run(args: argparse.Namespace) -> None:
    """Measures everyone in turn and prints the tables."""
    names = args.only or list(CONTENDERS)
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(args, Path(folder))
        runs: dict[str, list[Figures]] = {name: [] for name in names}
        for repeat in range(args.repeats):
            for name in names:
                print(f"run {repeat + 1} of {args.repeats}: {name}", file=sys.stderr)
                runs[name].append(measure(name, job, Path(folder)))
    print("\n".join([*speeds(runs, job), "", *stages(runs.get("ours", []), job), *facts(job)]))


def speeds(runs: dict[str, list[Figures]], job: Job) -> list[str]:
    """A row for everyone: medians over the runs."""
    head = "| | MB/s | MB per CPU second | of the tokenizer alone | start-up, s | tokens as ours |"
    lines = [head, "|---|--:|--:|--:|--:|---|"]
    size, reference = job["text_bytes"] / 1e6, _written(runs, "ours")
    base = _median(runs.get("alone", []), "cpu_seconds")
    for name, figures in runs.items():
        wall, cpu = _median(figures, "seconds"), _median(figures, "cpu_seconds")
        share = f"{base / cpu:.0%}" if base else ""
        same = {True: "equal bytes", False: "others"}[_written(runs, name) == reference] if reference else ""
        cells = [
            NAMES[name],
            f"{size / wall:.1f}",
            f"{size / cpu:.1f}",
            share,
            f"{_median(figures, 'start_seconds'):.1f}",
        ]
        lines.append("| " + " | ".join([*cells, same if name != "alone" else ""]) + " |")
    return lines


def _written(runs: dict[str, list[Figures]], name: str) -> bytes:
    return runs[name][0]["written"] if runs.get(name) else b""


def _median(figures: list[Figures], key: str) -> float:
    return median(item[key] for item in figures) if figures else 0.0


def stages(figures: list[Figures], job: Job) -> list[str]:
    """Where this project's tool spends its time, in its median run."""
    if not figures:
        return []
    middle = sorted(figures, key=lambda item: item["seconds"])[len(figures) // 2]
    total, counted = middle["seconds"], sum(middle["stages"].values())
    rows = [*sorted(middle["stages"].items(), key=lambda item: -item[1]), ("the rest", total - counted)]
    lines = ["| stage of this project's run | ms | share |", "|---|--:|--:|"]
    return [*lines, *(f"| {name} | {1000 * spent:.0f} | {spent / total:.0%} |" for name, spent in rows), ""]


def facts(job: Job) -> list[str]:
    """What was read, where, and with what."""
    from importlib.metadata import version

    from megatron_act.experiment.machine import describe_machine

    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items() if name != "Python")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    size = f"{job['documents']:,} documents, {job['text_bytes'] / 1e6:.1f} MB of text"
    return [
        f"{size}, one core, one thread, encoder {job['encoder']}.",
        f"{machine}, Python {platform.python_version()}; {versions}.",
        f"`{shlex.join(['python', 'tools/benchmark_tokenization.py', *sys.argv[1:]])}`, {time.strftime('%Y-%m-%d')}",
    ]


def main() -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args()
    return run_cli(lambda: child(args) if args.child else run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
