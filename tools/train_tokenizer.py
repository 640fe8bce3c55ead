"""Train a small byte-level BPE on parquet or JSON lines, for runs where a model's large vocabulary would dominate.

    python tools/train_tokenizer.py --input data/*.parquet --vocab-size 4096 --output tokenizer/

writes a folder that tools/preprocess_fineweb_edu.py --tokenizer, transformers' AutoTokenizer.from_pretrained and
Megatron's --tokenizer-type HuggingFaceTokenizer --tokenizer-model load. The same input gives the same bytes.
Exit code: 0 done, 1 interrupted or failed, 2 bad input (one line on standard error, no output written).
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

from tqdm import tqdm

from megatron_act.data.bpe import train_bpe
from megatron_act.data.source import iter_texts
from megatron_act.data.tokenizer import DEFAULT_EOD
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
        help="parquet or JSON-lines files (.jsonl, .jsonl.gz, .jsonl.zst), folders (all such files below), globs, or "
        "hf://datasets/OWNER/NAME[@REVISION]/FOLDER",
    )
    add("--vocab-size", type=int, default=4096, metavar="N", help="tokens, 256 bytes and EOD included (default: 4096)")
    add("--output", required=True, metavar="DIR", help="folder to write")
    add("--eod-token", default=DEFAULT_EOD, metavar="TOKEN", help=f"end of document, id 0 (default: {DEFAULT_EOD})")
    add("--max-documents", type=int, metavar="N", help="learn from the first N documents (default: all)")
    add("--text-column", default="text", metavar="NAME", help="column of the text (default: text)")
    add("--overwrite", action="store_true", help="replace an existing folder")
    add("--debug", action="store_true", help="print the traceback of an error")
    return parse


def run(args: argparse.Namespace) -> None:
    """Train, then say what was written."""
    texts = islice(iter_texts(args.input, args.text_column), args.max_documents)
    bar = tqdm(texts, desc="reading", unit="doc", disable=None)
    size = train_bpe(bar, args.vocab_size, args.output, eod_token=args.eod_token, overwrite=args.overwrite)
    print(f"{args.output}: {size:,} tokens, end of document {args.eod_token} is id 0")


def main() -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args()
    return run_cli(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
