"""Look into Megatron's P.bin and P.idx, whoever wrote them: documents as text, tokens, lengths; check the manifest.

    python tools/inspect_dataset.py P [--tokenizer DIR] [--documents 3] [--plot FILE.png] [--verify]

Prints sizes, percentiles of the documents' lengths, the most frequent tokens with their shares, and the beginnings of a
few documents evenly apart. The text comes from --tokenizer, or from the tokenizer that the manifest names where that
file is still the same; without either, ids are shown. Lengths are those of all documents; tokens beyond --tokens are
counted in a sample of blocks spread evenly over the file, and the output says so. Memory stays below a few hundred MB.
Exit code: 0 done, 1 failed or interrupted, 2 bad input or a data set that differs from its manifest (one line).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

from megatron_act.data import inspect_manifest, inspect_report
from megatron_act.data.inspect_index import open_indexed
from megatron_act.data.inspect_statistics import Lengths, TokenCounts, count_tokens, measure_lengths
from megatron_act.errors import UserError, run_cli


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parse.add_argument
    add("prefix", metavar="P", help="the data set, as in Megatron's --data-path")
    add("--tokenizer", metavar="FILE|DIR", help="default: the manifest's")
    add("--documents", type=natural, default=3, metavar="N", help="documents to show (default: 3)")
    add("--chars", type=natural, default=300, metavar="N", help="characters of each (default: 300)")
    add("--top", type=natural, default=20, metavar="N", help="most frequent tokens to list (default: 20)")
    add("--tokens", type=natural, default=200_000_000, metavar="N", help="count at most about N (default: 200 million)")
    add("--plot", type=Path, metavar="FILE.png", help="draw lengths and token frequencies")
    add(
        "--verify",
        action="store_true",
        help="compare everything with the manifest first: files, counts, tokens, sources",
    )
    add("--debug", action="store_true", help="print the traceback of an error")
    return parse


def natural(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text}")
    return value


def run(args: argparse.Namespace) -> None:
    """Inspects and prints."""
    data = open_indexed(args.prefix)
    if args.plot and (args.plot.suffix != ".png" or not args.plot.parent.is_dir()):
        raise UserError(f"--plot: expected FILE.png in a folder that exists, got {args.plot}; name another")
    print(inspect_report.summary(data))
    if args.verify:
        print(inspect_manifest.verify(data.prefix))
    if not data.documents or not len(data.tokens):
        print("nothing to show: it holds no tokens")
        return
    lengths, tokens = measure_lengths(data), count_tokens(data, args.tokens)
    decoder = inspect_manifest.decoder(data.prefix, args.tokenizer, len(tokens.counts))
    print("\n".join(["", *inspect_report.length_lines(lengths), ""]))
    print("\n".join(inspect_report.token_lines(tokens, args.top, decoder)))
    for number in inspect_report.spread(data.documents, args.documents):
        print("\n".join(["", *inspect_report.document_lines(data, number, args.chars, decoder)]))
    if args.plot:
        draw(args.plot, Path(inspect_report.summary(data)).name, lengths, tokens)


def draw(path: Path, title: str, lengths: Lengths, tokens: TokenCounts) -> None:
    """Writes the figure."""
    from megatron_act.data import inspect_plot  # matplotlib: seconds to import

    try:
        inspect_plot.draw(title, lengths, tokens, path)
    except OSError as error:
        raise UserError(f"--plot: expected a writable file, got {path} ({error.strerror}); name another") from error
    print(f"\nfigure: {path}")


def main() -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args()
    return run_cli(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
