"""What a test says of trouble, whichever of the stand-ins makes it: a fault that lasts until it is ended; a clock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from types import TracebackType
from typing import Self

Seconds = float | tuple[float, float]
"""So many seconds, or a random number of them between the two."""


class FakeClock:
    """A clock for ``clock=``: call it for the time, ``advance`` it by hand.

    Args:
        start: Seconds since the epoch.
    """

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self.time = start

    def __call__(self) -> float:
        """Return the time."""
        return self.time

    def advance(self, by: float) -> None:
        """Move on by so many seconds; negative: the clock is set back."""
        self.time += by


class Fault:
    """A fault in force: until ``end()``, to the end of a ``with`` block, or until it has struck so many times.

    Attributes:
        count: How often it has struck.
        hit: Set when it has struck.
        over: Set when it was ended. What has struck its number of times strikes no more, and is not over.
        on_end: Called when it ends.
    """

    def __init__(self, rng: random.Random, *, times: int | None, probability: float) -> None:
        if times is not None and times < 1:
            raise ValueError(f"times must be 1 or more, or None for no end, not {times!r}")
        if not 0 < probability <= 1:
            raise ValueError(f"probability must be more than 0 and at most 1, not {probability!r}")
        self.count = 0
        self.hit = asyncio.Event()
        self.over = asyncio.Event()
        self.on_end: Callable[[], None] | None = None
        self._rng = rng
        self._times = times
        self._probability = probability

    def __enter__(self) -> Self:
        """Nothing: it is in force already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it."""
        self.end()

    def end(self) -> None:
        """Strike no more. What it held back goes on."""
        if not self.over.is_set():
            self.over.set()
            if self.on_end is not None:
                self.on_end()

    def strikes(self) -> bool:
        """Whether it strikes now; counted."""
        if self.over.is_set() or self.count == self._times:
            return False
        if self._probability < 1 and self._rng.random() >= self._probability:
            return False
        self.count += 1
        self.hit.set()
        return True


async def wait(rng: random.Random, seconds: Seconds) -> None:
    """Let the time pass."""
    await asyncio.sleep(rng.uniform(*seconds) if isinstance(seconds, tuple) else seconds)


def checked(seconds: Seconds) -> Seconds:
    """Return *seconds*.

    Raises:
        ValueError: They are negative, or the range ends before it begins.
    """
    low, high = seconds if isinstance(seconds, tuple) else (seconds, seconds)
    if not 0 <= low <= high:
        raise ValueError(f"seconds must be 0 or more, or a pair (from, to), not {seconds!r}")
    return seconds
