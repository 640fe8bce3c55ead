"""How a data set reaches DALI's worker process, and how that ends: the ``py_callback_pickler`` of the pipeline."""

import io
import multiprocessing
import os
import pickle
import threading
import warnings
from typing import Any

import numpy as np

from megatron_act.compat import install_typing_override


class MappedPickler(pickle.Pickler):
    """Sends a memory-mapped file by its name: pickle would copy it, gigabytes for the index of a large data set."""

    def reducer_override(self, value: Any) -> Any:
        """How to send a value that is a whole mapped file; anything else is sent as usual."""
        if type(value) is np.memmap and value.base is not None and not isinstance(value.base, np.ndarray):
            order = "C" if value.flags.c_contiguous else "F"
            return np.memmap, (value.filename, value.dtype, "r", value.offset, value.shape, order)
        return NotImplemented


def dumps(value: Any) -> bytes:
    """``pickle.dumps`` with `MappedPickler`."""
    buffer = io.BytesIO()
    MappedPickler(buffer).dump(value)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """``pickle.loads`` in a worker, which from then on ends with its parent: a killed one would leave it behind."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    install_typing_override()  # Megatron is imported next
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, which the parent has shown
        return pickle.loads(data)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
