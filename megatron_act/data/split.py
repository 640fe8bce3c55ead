"""A fixed division of documents into named parts, decided by each document's own id."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_act.errors import UserError


@dataclass(frozen=True)
class Split:
    """Part names and their shares, which sum to 1.

    A document's part depends on nothing but its id: u = (first 48 bits of sha256(id)) / 2^48 falls in the part whose
    interval of the cumulative shares holds it. So a held-out document stays held out when files are added, reordered
    or filtered differently.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]

    def part_of(self, ids: Sequence[str]) -> np.ndarray:
        """Index of the part of each id: int64 [len(ids)]."""
        bits = [int.from_bytes(hashlib.sha256(item.encode()).digest()[:6], "big") for item in ids]
        bounds = np.cumsum(self.shares)[:-1]  # the last bound is 1 by definition, whatever rounding says
        return np.searchsorted(bounds, np.array(bits, dtype=np.float64) / 2**48, side="right")


def parse_split(items: Sequence[str]) -> Split:
    """`["train:0.95", "valid:0.05"]` as a `Split`.

    Raises:
        UserError: an item is not NAME:SHARE, a name repeats, a share is not in (0, 1], or they do not sum to 1.
    """
    parts = [re.fullmatch(r"([A-Za-z0-9-]+):([0-9.eE+-]+)", item) for item in items]
    try:
        pairs = [(part[1], float(part[2])) for part in parts if part]
    except ValueError:
        pairs = []
    names, shares = [name for name, _ in pairs], [share for _, share in pairs]
    valid = len(pairs) == len(items) > 0 and len(set(names)) == len(names) and all(0 < share <= 1 for share in shares)
    if not valid or not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
        got = " ".join(items)
        raise UserError(f"expected shares that sum to 1, as in train:0.95 valid:0.05, got '{got}'; correct --split")
    return Split(tuple(names), tuple(shares))
