"""Tokenize FineWeb-Edu parquet into Megatron's P.bin and P.idx, with P.manifest.json saying from what and how.

Every kept row becomes one document: its token ids and the end-of-document token, nothing else. Null and empty texts are
dropped and counted; a special token's literal inside a text stays plain text. Files are written aside, in a folder
P.partial-*, and renamed when whole (only a kill -9 leaves that folder behind; it can be deleted).

    python tools/preprocess_fineweb_edu.py --input data/*.parquet --tokenizer tokenizer/ --output-prefix out/edu \
        --workers 8 --min-int-score 3 --split train:0.99 valid:0.01

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
from megatron_act.data.preprocess import preprocess
from megatron_act.data.split import parse_split
from megatron_act.data.tokenizer import ENCODERS
from megatron_act.errors import run_cli


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parse.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="parquet files, folders (all *.parquet below) or globs",
    )
    add("--tokenizer", required=True, metavar="FILE|DIR", help="a Hugging Face tokenizer.json, or a folder with one")
    add("--output-prefix", required=True, metavar="P", help="folder and start of the name of what is written")
    add("--workers", type=positive, default=1, metavar="N", help="processes; same output for any N (default: 1)")
    add("--split", nargs="+", metavar="NAME:SHARE", help="write P_NAME.bin/.idx per part, by sha256 of the column 'id'")
    add("--min-score", type=float, metavar="S", help="keep rows whose 'score' is at least S")
    add("--min-int-score", type=int, metavar="S", help="keep rows whose 'int_score' is at least S")
    add("--min-language-score", type=float, metavar="S", help="keep rows whose 'language_score' is at least S")
    add("--min-chars", type=positive, metavar="N", help="keep texts of at least N characters")
    add("--text-column", default="text", metavar="NAME", help="column of the text (default: text)")
    add(
        "--eod-token",
        metavar="TOKEN",
        help="end of document (default: eos_token of the tokenizer's config, else <|endoftext|>)",
    )
    add(
        "--encoder",
        choices=ENCODERS,
        default="auto",
        help="auto: fastokens if it agrees with tokenizers (default: auto)",
    )
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--debug", action="store_true", help="print the traceback of an error")
    return parse


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def run(args: argparse.Namespace) -> None:
    """Preprocess, then say what was written."""
    started = time.perf_counter()
    manifest = preprocess(
        args.input,
        args.tokenizer,
        args.output_prefix,
        split=parse_split(args.split) if args.split else None,
        filters=Filters(args.min_score, args.min_int_score, args.min_language_score, args.min_chars),
        workers=args.workers,
        text_column=args.text_column,
        eod_token=args.eod_token,
        encoder=args.encoder,
        overwrite=args.overwrite,
        command=shlex.join(["python", *sys.argv]),
    )
    print(summary(manifest, args.output_prefix, time.perf_counter() - started))


def summary(manifest: dict, prefix: str, seconds: float) -> str:
    """One line per output, one for what was dropped, one for where the record is."""
    folder = Path(prefix).parent
    kind, documents = manifest["dtype"], manifest["documents"]
    lines = [
        f"{folder / item['bin']['file']}: {item['documents']:,} documents, {item['tokens']:,} tokens ({kind})"
        for item in manifest["outputs"]
    ]
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in documents["dropped"].items()) or "none"
    encoder = manifest["tokenizer"]["encoder"]
    lines.append(f"read {documents['read']:,} rows in {seconds:.1f} s with {encoder}; dropped: {dropped}")
    return "\n".join([*lines, f"manifest: {prefix}.manifest.json"])


def main() -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's notice cleans up like Ctrl-C
    return run_cli(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
