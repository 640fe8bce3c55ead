"""What tools/inspect_dataset.py prints, as lines of text."""

import numpy as np

from megatron_act.data.inspect_index import Indexed
from megatron_act.data.inspect_statistics import Lengths, TokenCounts
from megatron_act.data.inspect_text import Decoder, quoted

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
TOKENS_OF_A_CHARACTER = 2  # read of a document for each character shown: no tokenizer makes more of ordinary text


def summary(data: Indexed) -> str:
    """Sizes and type, in one line."""
    size = (data.tokens.nbytes + data.lengths.nbytes + data.starts.nbytes + data.marks.nbytes) / 1e6
    return (
        f"{data.prefix}: {data.documents:,} documents, {len(data.tokens):,} tokens, {data.tokens.dtype}, {size:,.1f} MB"
    )


def length_lines(lengths: Lengths) -> list[str]:
    """Mean and percentiles of the documents' lengths."""
    names = ["percentile", *(f"{percent}" for percent in PERCENTILES[:-1]), "max"]
    values = ["tokens", *(f"{lengths.percentile(percent):,}" for percent in PERCENTILES)]
    widths = [max(len(name), len(value)) for name, value in zip(names, values, strict=True)]
    head = f"document lengths (all documents, EOD included): mean {lengths.mean:,.1f} tokens"
    return [head, *("  ".join(map(str.rjust, row, widths)) for row in (names, values))]


def token_lines(tokens: TokenCounts, top: int, decoder: Decoder) -> list[str]:
    """The most frequent tokens with their shares."""
    used = int((tokens.counts > 0).sum())
    extent = "all" if tokens.seen == tokens.total else f"a sample of {tokens.seen:,}, evenly spread, of"
    head = f"token counts ({extent} {tokens.total:,} tokens): {used:,} different ids, the largest "
    lines = [f"{head}{len(tokens.counts) - 1:,}"]
    lines.append(f"{'rank':>6}{'id':>9}{'count':>15}{'share':>9}{'sum':>9}  text")
    covered = 0.0
    for rank, token in enumerate(tokens.top(top), 1):
        share = tokens.counts[token] / tokens.seen
        covered += share
        text = quoted(decoder.piece(int(token)), 40)
        lines.append(f"{rank:>6}{token:>9}{tokens.counts[token]:>15,}{share:>9.2%}{covered:>9.2%}  {text}")
    return lines


def document_lines(data: Indexed, number: int, chars: int, decoder: Decoder) -> list[str]:
    """The beginning of a document, and its last token."""
    ids, length = data.document(number, TOKENS_OF_A_CHARACTER * chars)
    lines = [f"document {number:,} of {data.documents:,}, {length:,} tokens"]
    return [*lines, "  " + quoted(decoder.text([int(token) for token in ids]), chars)]


def spread(documents: int, wanted: int) -> list[int]:
    """The numbers of `wanted` documents, evenly apart, from the first to the last."""
    return sorted({int(place) for place in np.linspace(0, documents - 1, min(wanted, documents))})
