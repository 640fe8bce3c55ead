"""Ports for servers that start later, in other processes."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_ports(count: int = 1) -> Iterator[int]:
    """Yields the first of ``count`` ports in a row that nobody gets by chance while the context lasts.

    A port that is only probed may go to any listener or connection before its server takes it. These stay bound, which
    keeps the kernel from handing them out, and bind from taking them; a server that sets SO_REUSEADDR, as torch's store
    does, still can.
    """
    with contextlib.ExitStack() as holders:
        yield _hold(count, holders)


def _hold(count: int, holders: contextlib.ExitStack) -> int:
    while True:
        with contextlib.ExitStack() as row:
            first = _bound(0, row)
            try:
                for port in range(first + 1, first + count):
                    _bound(port, row)
            except (OSError, OverflowError):  # taken, or beyond the last port
                continue
            holders.push(row.pop_all())
            return first


def _bound(port: int, row: contextlib.ExitStack) -> int:
    holder = row.enter_context(socket.socket())
    holder.bind(("", port))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only now: it must not share a taken port
    return holder.getsockname()[1]
