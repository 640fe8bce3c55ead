"""Seconds by stage of the work: reading, encoding, writing and the rest."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Stopwatch(Counter[str]):
    """A counter of seconds."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's time to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self[name] += time.perf_counter() - started  # type: ignore[assignment]

    def stages(self, items: Iterator[Item], name: str) -> Iterator[Item]:
        """The items, the time that each takes to come added to a stage."""
        while True:
            with self.stage(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
