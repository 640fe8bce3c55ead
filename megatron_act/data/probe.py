"""Text on which encoders that look equal differ, what comes of a special token's literal, and both comparisons."""

import random
from collections.abc import Sequence

import numpy as np

from megatron_act.data.encoders import Encoder

LITERALS = ("<|endoftext|>", "</s>", "<s>", "[INST]", "[/INST]", "<unk>", "<pad>", "[TOOL_CALLS]", "<|im_start|>")
SPACES = "\t\n\v\f\r \x1c\x1d\x1e\x1f\x85\u00a0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
HARD = (
    "",
    " ",
    "\n",
    "   leading, trailing   ",
    "tab\t\ttab\r\n\r\nCRLF \n \n",
    "a" * 20_000,
    " " * 5_000,
    "\n" * 300 + "\t" * 300 + "=" * 300 + "ab" * 300,
    *(f"x{' ' * count}y" for count in range(2, 40)),
    "1234567890" * 50 + " 3.14 1,000 \u0661\u0662\u0663\u0664 \u00bd\u00b2\u2167\u4e09",
    "don't DON'T we'Ll it'S 'tis \u2019s \u02bcs o'clock'd'LL",
    "caf\u00e9 cafe\u0301 \u212b \u00c5 A\u030a \ufb01 \u0130 \u0131 \u1e9e \u01c5 \u017f \u03c2 I\u0307",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05c1\u05b8 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e20\u0e32\u0e29\u0e32",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd 1\u20e3",
    "\x00 \x1b[0m \x7f \u0085 \u2028 \u2029 \ufeff \ufffd \uffff \ud7ff\ue000 \U0010ffff",
    "\u00a0\u2003\u3000\u200b\u202e\u180e mixed spaces \u00a0x \u3000y",
    "x" + "\u0301" * 500,
    "".join(f"{space}a{space}{space}B{space}\n" for space in SPACES),
    "<|endoftext|" + "> <|endoftext |> <<|endoftext|>> &lt;/s&gt; ##\u2581 \u0120\u010a \u00f0\u0178\u2018\u008d",
    "\u2581 \u2581\u2581x \u2581" * 5 + "<0x41> <0x0A>",
)
UNKNOWN = "\U00012345 \U0010fffd"  # characters that a vocabulary without bytes lacks
PLANES = (
    (0x20, 0x7E),
    (0x0, 0x1F),
    (0x7F, 0x24F),
    (0x250, 0x5FF),
    (0x300, 0x36F),
    (0x600, 0xDFF),
    (0xE00, 0x1FFF),
    (0x2000, 0x2BFF),
    (0x2C00, 0x9FFF),
    (0xA000, 0xD7FF),
    (0xE000, 0xFFFF),
    (0x10000, 0x1FFFF),
    (0x20000, 0x10FFFF),
)


def adversarial_texts(literals: Sequence[str] = LITERALS, count: int = 200, seed: int = 20260101) -> list[str]:
    """Hard strings, special tokens' literals alone and in running text, and `count` random Unicode strings.

    Equal arguments give equal texts. Every plane of Unicode occurs, surrogates excepted.
    """
    rng = random.Random(seed)

    def scrap() -> str:
        low, high = rng.choice(PLANES)
        letters = "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12)))
        others = [rng.choice(SPACES) * rng.randint(1, 3), " ", rng.choice(literals), str(rng.randint(0, 10**9))]
        return rng.choice([letters, letters, letters.upper(), *others])

    running = [f"before{item}after {item} {item}{item}" for item in literals]
    return [*HARD, *literals, *running, *("".join(scrap() for _ in range(rng.randint(1, 60))) for _ in range(count))]


def differences(one: Encoder, other: Encoder, texts: list[str]) -> list[str]:
    """The texts that the two encode differently."""
    rows = [np.split(ids, offsets[1:-1]) for ids, offsets in (one.encode(texts), other.encode(texts))]
    return [text for text, ours, theirs in zip(texts, *rows, strict=True) if not np.array_equal(ours, theirs)]


def leaks(encoder: Encoder, specials: dict[str, int], eod_id: int) -> list[tuple[str, int]]:
    """Special tokens' ids that come out of text, where their literals should stay text.

    Args:
        specials: literal to id.
        eod_id: may come out of no text; another special id may where it is what unknown characters give.

    Returns:
        (text, id) for each of the literals, alone and in running text, that gives one.
    """
    texts = [UNKNOWN, *(form for token in specials for form in (token, f"a {token} b{token}c"))]
    ids, offsets = encoder.encode(texts)
    unknown, *rows = (set(row.tolist()) for row in np.split(ids, offsets[1:-1]))
    wrong = {eod_id, *specials.values()} - (unknown - {eod_id})
    return [(text, min(wrong & row)) for text, row in zip(texts, [unknown, *rows], strict=True) if wrong & row]
