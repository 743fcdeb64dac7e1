"""Clocks that nobody sets back; the one of the system goes on while the machine sleeps, where it can."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

steady: Final[Callable[[], float]] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
"""Seconds, from some moment on."""


class Passing:
    """The time that passes by *clock*, wherever that is set back to."""

    __slots__ = ("_back", "_clock", "_last")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._back = 0.0
        self._last = clock()

    def __call__(self) -> float:
        """Return seconds that never go back."""
        now = self._clock()
        if now < self._last:
            self._back += self._last - now
        self._last = now
        return now + self._back
