"""How far a phase is and how long it will still take: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


LINE_EVERY_S = 10.0
"""Seconds between two lines of a phase where there is no terminal."""


def duration(seconds: float) -> str:
    """Minutes and seconds: "1:05"."""
    shown: str = tqdm.format_interval(max(0, round(seconds)))
    return shown.removeprefix("0")


def remaining(started: float, done: int, total: int) -> str:
    """What is left of a phase that began at `started` (time.monotonic) and is through `done` of `total` parts."""
    return f"{duration((time.monotonic() - started) / max(done, 1) * (total - done))} left"


def progress(items: Sequence[Item], what: str | None) -> Iterator[Item]:
    """The items, and how far they are; None: silently."""
    if what is None:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=what, leave=False)
    else:
        started = said = time.monotonic()
        for done, item in enumerate(items):
            if done and time.monotonic() - said >= LINE_EVERY_S:
                said = time.monotonic()
                print(f"{what}: {done / len(items):.0%}, {remaining(started, done, len(items))}", flush=True)
            yield item
