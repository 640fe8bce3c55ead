"""Tokenize FineWeb-Edu into Megatron's P.bin and P.idx, with P.manifest.json saying from what and how.

Every kept row becomes one document: its token ids and the end-of-document token, nothing else. Null and empty texts are
dropped and counted; a special token's literal inside a text stays plain text. What is done so far lies in the folder
P.work until all files are whole and get their names; --resume goes on from there after any crash.

    python tools/preprocess_fineweb_edu.py --input data/*.parquet --tokenizer tokenizer/ --output-prefix out/edu \
        --workers 8 --min-int-score 3 --split train:0.99 valid:0.01
    python tools/preprocess_fineweb_edu.py --hub-config sample-10BT --tokenizer tekken.json --output-prefix out/edu \
        --executor slurm --slurm partition=cpu time=04:00:00 --workers 32
    python tools/preprocess_fineweb_edu.py verify out/edu                           # recheck all that its manifest says
    python tools/preprocess_fineweb_edu.py merge out/a out/b --output-prefix out/ab # one after the other

then, in Megatron: --train-data-path out/edu_train --valid-data-path out/edu_valid (no split: --data-path out/edu).
Exit code: 0 done, 1 interrupted or failed, 2 bad input (one line on standard error, no output written).
"""

import argparse
import logging
import shlex
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

from megatron_act.data.filters import Filters
from megatron_act.data.hub import config_url
from megatron_act.data.ranked_bpe import PATTERNS
from megatron_act.data.split import parse_split
from megatron_act.data.stopwatch import Stopwatch
from megatron_act.data.tokenizer import ENCODERS
from megatron_act.errors import FAILED, UserError, run_cli

DATASET = "HuggingFaceFW/fineweb-edu"


def parser() -> argparse.ArgumentParser:
    """The command line without a subcommand."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_input(parse.add_argument_group("input"))
    _add_filters(parse.add_argument_group("filters"))
    _add_tokenizer(parse.add_argument_group("tokenizer"))
    _add_output(parse.add_argument_group("output"))
    _add_execution(parse.add_argument_group("execution; the output does not depend on it"))
    return parse


def _add_input(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="parquet or JSON-lines files (.jsonl, .jsonl.gz, .jsonl.zst), folders (all such files below), globs, or "
        "hf://datasets/OWNER/NAME[@REVISION]/FOLDER",
    )
    add("--hub-dataset", default=DATASET, metavar="NAME", help=f"data set on the Hugging Face hub (default: {DATASET})")
    add("--hub-config", metavar="NAME", help="its configuration: sample-10BT, CC-MAIN-2024-10, default (all) ...")
    add("--revision", metavar="REV", help="its branch, tag or commit (default: main, as it is now)")
    add("--download-dir", metavar="DIR", help="keep its files here (default: each is removed when it is encoded)")
    add("--text-column", default="text", metavar="NAME", help="column of the text (default: text)")


def _add_filters(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--min-score", type=float, metavar="S", help="keep rows whose 'score' is at least S")
    add("--min-int-score", type=int, metavar="S", help="keep rows whose 'int_score' is at least S")
    add("--min-language-score", type=float, metavar="S", help="keep rows whose 'language_score' is at least S")
    add("--min-chars", type=positive, metavar="N", help="keep texts of at least N characters")
    add("--dump", nargs="+", default=[], metavar="DUMP", help="keep rows of these dumps, as in CC-MAIN-2024-10")
    add("--drop-invalid-text", action="store_true", help="drop texts that are not UTF-8 (default: refuse them)")


def _add_tokenizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tokenizer",
        required=True,
        metavar="FILE|DIR",
        help="tokenizer.json, tekken.json, SentencePiece .model or tiktoken ranks, or a folder with one of them",
    )
    add(
        "--pattern",
        metavar="NAME|REGEX",
        help=f"how a rank file's text is cut into words: {', '.join(PATTERNS)} or a regular expression",
    )
    add(
        "--eod-token",
        metavar="TOKEN",
        help="end of document (default: the format's; of a tokenizer.json eos_token of the config, else <|endoftext|>)",
    )
    add("--eod-id", type=int, metavar="ID", help="its id, for a rank file (default: the pattern's)")
    add(
        "--encoder",
        choices=ENCODERS,
        default="auto",
        help="auto: fastokens if it gives the same ids as the format's own library on hard strings (default: auto)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output-prefix", required=True, metavar="P", help="folder and start of the name of what is written")
    add("--split", nargs="+", metavar="NAME:SHARE", help="write P_NAME.bin/.idx per part, by sha256 of the column 'id'")
    add("--shards", type=positive, metavar="N", help="write N pairs P_00000.bin/.idx ... in place of one")
    add("--overwrite", action="store_true", help="replace an existing output, forget an unfinished run")


def _add_execution(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--workers", type=positive, default=1, metavar="N", help="tasks done at a time (default: 1)")
    add("--tasks", type=positive, metavar="N", help="tasks to cut the work into (default: by bytes and workers)")
    add("--executor", choices=("local", "slurm", "ray"), default="local", help="datatrove's (default: local)")
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="sbatch's options; partition and time are needed")
    add("--resume", action="store_true", help="do what an unfinished run of this command has left undone")
    add("--timings", action="store_true", help="print the seconds of each stage")
    add("--debug", action="store_true", help="print the traceback of an error")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def run(args: argparse.Namespace) -> None:
    """Preprocess, then say what was written."""
    from megatron_act.data import preprocess  # datatrove takes a moment to import

    started, clock = time.perf_counter(), Stopwatch()
    executor = preprocess.Executor(args.executor, args.workers, _pairs(args.slurm))
    with clock.stage("start"):
        plan = _plan(args)
    if args.executor == "slurm":
        job = preprocess.submit(plan, executor, resume=args.resume)
        print(f"sent to Slurm: {args.output_prefix} is there when job {job} has ended")
        print(f"scripts and logs: {args.output_prefix}.slurm")
        return
    manifest = preprocess.run(plan, executor, resume=args.resume, clock=clock)
    print(summary(manifest, args.output_prefix, time.perf_counter() - started))
    if args.timings:
        print(timings(clock))


def _plan(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from megatron_act.data import preprocess

    inputs = [*args.input, *([config_url(args.hub_dataset, args.hub_config, args.revision)] if args.hub_config else [])]
    if not inputs:
        raise UserError("expected --input PATH or --hub-config NAME, got neither; name what to read")
    if args.revision and not args.hub_config:
        raise UserError(
            "expected --hub-config with --revision, got none; in --input write hf://datasets/NAME@REVISION/..."
        )
    bounds = (args.min_score, args.min_int_score, args.min_language_score, args.min_chars)
    return preprocess.make_plan(
        inputs,
        args.tokenizer,
        args.output_prefix,
        split=parse_split(args.split) if args.split else None,
        filters=Filters(*bounds, tuple(args.dump), args.drop_invalid_text),
        workers=args.workers,
        tasks=args.tasks,
        shards=args.shards,
        text_column=args.text_column,
        eod_token=args.eod_token,
        eod_id=args.eod_id,
        pattern=args.pattern,
        encoder=args.encoder,
        downloads=args.download_dir,
        overwrite=args.overwrite,
        resume=args.resume,
        command=shlex.join(["python", *sys.argv]),
    )


def _pairs(items: list[str]) -> dict[str, str]:
    pairs = [item.partition("=") for item in items]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise UserError(f"expected --slurm KEY=VALUE ..., got {wrong[0]}; write it like partition=cpu")
    return {key: value for key, _, value in pairs}


def summary(manifest: dict, prefix: str, seconds: float) -> str:
    """One line per output, one for what was dropped, one for where the record is."""
    folder = Path(prefix).parent
    kind, documents = manifest["dtype"], manifest["documents"]
    lines = [
        f"{folder / item['bin']['file']}: {item['documents']:,} documents, {item['tokens']:,} tokens ({kind})"
        for item in manifest["outputs"]
    ]
    if "read" in documents:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in documents["dropped"].items()) or "none"
        encoder = manifest["tokenizer"]["encoder"]
        lines.append(f"read {documents['read']:,} rows in {seconds:.1f} s with {encoder}; dropped: {dropped}")
    return "\n".join([*lines, f"manifest: {prefix}.manifest.json"])


def timings(clock: Stopwatch) -> str:
    """A line per stage: seconds of all workers together, longest first."""
    return "\n".join(f"{seconds:9.3f} s  {stage}" for stage, seconds in clock.most_common())


def subcommand(name: str) -> argparse.ArgumentParser:
    """The command line of `verify` or `merge`."""
    parse = argparse.ArgumentParser(prog=f"preprocess_fineweb_edu.py {name}")
    parse.add_argument("--debug", action="store_true", help="print the traceback of an error")
    if name == "verify":
        parse.description = "Recheck everything that P.manifest.json says. Exit code 1: something differs."
        parse.add_argument("prefix", metavar="P", help="the --output-prefix of a run or a merge")
        return parse
    parse.description = "Join data sets of Megatron's, in the order given, as its own builder's add_index does."
    parse.add_argument("prefixes", nargs="+", metavar="PREFIX", help="a path without .bin, or its .idx file")
    parse.add_argument("--output-prefix", required=True, metavar="P", help="what is written")
    parse.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parse


def run_verify(args: argparse.Namespace) -> int | None:
    """Print what differs, or that nothing does."""
    from megatron_act.data.verify import verify

    findings = verify(args.prefix)
    for problem in findings.problems:
        print(problem)
    missing = f"; not here, not checked: {', '.join(findings.unchecked)}" if findings.unchecked else ""
    if findings.problems:
        print(f"{args.prefix}: {len(findings.problems)} differences from its manifest{missing}")
        return FAILED
    print(f"{args.prefix}: as its manifest says ({findings.compared} comparisons{missing})")
    return None


def run_merge(args: argparse.Namespace) -> None:
    """Merge, then say what was written."""
    from megatron_act.data.merge import merge

    started, command = time.perf_counter(), shlex.join(["python", *sys.argv])
    prefixes = [item.removesuffix(".idx") for item in args.prefixes]
    manifest = merge(prefixes, args.output_prefix, overwrite=args.overwrite, command=command)
    print(summary(manifest, args.output_prefix, time.perf_counter() - started))


COMMANDS = {"verify": run_verify, "merge": run_merge}


def main() -> int:
    """Entry point; returns the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in COMMANDS else None
    args = subcommand(name).parse_args(sys.argv[2:]) if name else parser().parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's notice cleans up like Ctrl-C
    body = COMMANDS[name] if name else run
    return run_cli(lambda: body(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
