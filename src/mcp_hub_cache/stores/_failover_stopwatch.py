"""How long round trips take, less the time for which this process itself was busy.

Strategy: while anything is under way, a timer goes off again and again. What it is late by, the loop was held up for by
somebody's long step; that time is taken out of the clock that round trips are measured by. Nothing runs while nothing
is under way.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final

_BEAT: Final = 0.05  # seconds


class Stopwatch:
    """The clock of one event loop's round trips."""

    __slots__ = ("_due", "_late", "_loop", "_running", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._running = 0
        self._late = 0.0  # seconds that the loop was held up for, in all
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> float:
        """Begin a round trip; returns what ``stop`` wants."""
        self._running += 1
        if self._timer is None:
            self._arm()
        return self._now()

    def stop(self, started: float) -> float:
        """End it; returns the seconds that it took."""
        self._running -= 1
        return self._now() - started

    def _now(self) -> float:
        now = self._loop.time()
        # Answers are taken in before timers that are overdue.
        return min(now, self._due) - self._late

    def _arm(self) -> None:
        self._due = self._loop.time() + _BEAT
        self._timer = self._loop.call_at(self._due, self._beat)

    def _beat(self) -> None:
        self._timer = None
        self._late += max(self._loop.time() - self._due, 0.0)
        if self._running:
            self._arm()
        else:
            self._due = math.inf

    def close(self) -> None:
        """Let the timer go."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
