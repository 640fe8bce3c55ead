"""What a conversion takes: memory from the largest tensor, disk from all of them.

The bound is three times the largest tensor and what Python with torch and transformers takes: once read, a tensor lies
beside the stored piece that it is put together from, then beside the part that is cut out of it and that part in the
output's dtype; an import fills Megatron's tensor in the output's dtype beside one that is read. The largest tensor
counts in the wider of the stored and the output's dtype. One tensor is what Megatron holds at once: gate and up are
one, query, key and value too; of a stacked tensor it is one layer, of stacked experts one of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_act.budget import Shape, parameters

PROCESS_BYTES = 450 * 10**6  # Python 3.11, torch 2.13 and transformers 5.24 imported: 380 MB; rounded up
COPIES = 3

FLOAT32 = 4  # bytes; the widest dtype of an output


class Piece(NamedTuple):
    """A tensor of Megatron's that is held at once, and the bytes of one stored element."""

    name: str
    elements: int
    itemsize: int

    @property
    def size_bytes(self) -> int:
        return self.elements * self.itemsize


def cost(pieces: Sequence[Piece], total: int) -> dict[str, int | str]:
    """The largest tensor, the peaks of a conversion's resident memory, and the bytes that the disk must take.

    ``peak_memory_bytes`` is of one that keeps the stored dtype, ``peak_memory_bytes_float32`` of ``--dtype float32``.

    Args:
        pieces: every tensor that is read at once.
        total: bytes of the whole model.
    """
    largest = max(pieces, key=lambda piece: piece.size_bytes)
    widest = max(piece.elements for piece in pieces) * FLOAT32
    return {
        "largest_tensor": largest.name,
        "largest_tensor_bytes": largest.size_bytes,
        "peak_memory_bytes": PROCESS_BYTES + COPIES * largest.size_bytes,
        "peak_memory_bytes_float32": PROCESS_BYTES + COPIES * widest,
        "disk_bytes": total,
    }


def cost_of_shape(shape: Shape, itemsize: int) -> dict[str, int | str]:
    """`cost` of a dense model that is not there yet, weights of ``itemsize`` bytes."""
    fc1 = shape.ffn_hidden_size * (2 if shape.gated else 1)  # the gate is one tensor with it in Megatron
    pieces = [("embedding", shape.vocab_size), ("mlp.linear_fc1", fc1)]
    sized = [Piece(name, rows * shape.hidden_size, itemsize) for name, rows in pieces]
    return cost(sized, parameters(shape).total * itemsize)
