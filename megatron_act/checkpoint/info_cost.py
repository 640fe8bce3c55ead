"""What a conversion takes: memory from the largest tensor, disk from all of them.

The bound is three times the largest tensor and what Python with torch and transformers takes: once read, a tensor lies
beside the stored piece that it is put together from, then beside the part that is cut out of it and that part in the
output's dtype. One tensor is what is read at once: of a stacked tensor one layer, of stacked experts one of them.
"""

from collections.abc import Iterable

from megatron_act.budget import Shape, parameters

PROCESS_BYTES = 450 * 10**6  # Python 3.11, torch 2.13 and transformers 5.24 imported: 380 MB; rounded up
COPIES = 3

Piece = tuple[str, int]  # name, bytes


def cost(pieces: Iterable[Piece], total: int) -> dict[str, int | str]:
    """The largest tensor, the peak of a conversion's resident memory, and the bytes that the disk must take.

    Args:
        pieces: every tensor that is read at once.
        total: bytes of the whole model.
    """
    name, size = max(pieces, key=lambda piece: piece[1])
    peak = PROCESS_BYTES + COPIES * size
    return {"largest_tensor": name, "largest_tensor_bytes": size, "peak_memory_bytes": peak, "disk_bytes": total}


def cost_of_shape(shape: Shape, itemsize: int) -> dict[str, int | str]:
    """`cost` of a dense model that is not there yet, weights of ``itemsize`` bytes."""
    fc1 = shape.ffn_hidden_size * (2 if shape.gated else 1)  # the gate is one tensor with it in Megatron
    pieces = [("embedding", shape.vocab_size), ("mlp.linear_fc1", fc1)]
    sized = [(name, rows * shape.hidden_size * itemsize) for name, rows in pieces]
    return cost(sized, parameters(shape).total * itemsize)
