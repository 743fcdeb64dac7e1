"""When to leave a store alone, and when to look at it again: decisions only, no I/O.

A circuit breaker (Nygard, *Release It!*, 2007) over round trips, with jittered exponential backoff between probes
(equal jitter: Brooker, "Exponential Backoff and Jitter", 2015).

    closed ── failures in a row, or one at the very first contact ──▶ open ── a probe starts ──▶ half-open
       ▲                                                               ▲                            │
       └───────────────────── close() ─────────────────────────────────┼────────────────────────────┤
                                                                       └──── probe_failed() ────────┘

Rules:
- Only the holder's probe goes through while it is not closed; there is no share of ordinary calls that tries its luck.
- A store that never answered has no credit: its first failure opens. Nor has a part of it while another part is away.
- An answer that arrives late, after it opened, changes nothing: only a probe closes it.
- The wall clock may jump. A probe never waits longer than the interval that was drawn for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

BreakerState = Literal["closed", "open", "half-open"]


class Backoff:
    """Waits that double up to a bound, each shortened at random by up to half.

    Args:
        first: Seconds of the first wait, before jitter; more than 0.
        most: Seconds that no wait exceeds.
        rng: Returns floats from [0, 1).
    """

    __slots__ = ("_first", "_most", "_rng", "_tries")

    def __init__(self, first: float, most: float, rng: Callable[[], float]) -> None:
        self._first = first
        self._most = most
        self._rng = rng
        self._tries = 0

    def next(self) -> float:
        """Return how long to wait before the next try."""
        step = min(self._most, self._first * 2.0 ** min(self._tries, 64))
        self._tries += 1
        return step * (0.5 + 0.5 * self._rng())

    def reset(self) -> None:
        """Begin with the first wait again."""
        self._tries = 0


class Breaker:
    """Counts round trips and says whether to make more of them.

    Args:
        failures: How many in a row open it; at least 1.
        probe_after: Seconds from opening to the first probe.
        probe_max: Seconds between probes at most.
        clock: Seconds; any clock that mostly moves forward.
        rng: Returns floats from [0, 1).

    Attributes:
        state: closed, open or half-open.
        failed_in_a_row: Failures since the last answer, while closed.
        contacted: Whether there ever was an answer.
    """

    __slots__ = ("_backoff", "_clock", "_due", "_interval", "_limit", "contacted", "failed_in_a_row", "state")

    def __init__(
        self,
        *,
        failures: int,
        probe_after: float,
        probe_max: float,
        clock: Callable[[], float],
        rng: Callable[[], float],
    ) -> None:
        if failures < 1:
            raise ValueError(f"failures must be at least 1, not {failures!r}")
        if not 0 < probe_after <= probe_max:
            raise ValueError(
                f"probe_after must be more than 0 and at most probe_max, not {probe_after!r} and {probe_max!r}"
            )
        self.state: BreakerState = "closed"
        self.failed_in_a_row = 0
        self.contacted = False
        self._limit = failures
        self._clock = clock
        self._backoff = Backoff(probe_after, probe_max, rng)
        self._interval = 0.0
        self._due = 0.0

    def answered(self) -> None:
        """Count a round trip that brought an answer, be it a refusal."""
        if self.state == "closed":
            self.failed_in_a_row = 0
            self.contacted = True

    def failed(self, *, credit: bool = True) -> bool:
        """Count one that brought none, or took too long; True: it opened. *credit* False: the first does."""
        if self.state != "closed":
            return False
        self.failed_in_a_row += 1
        if credit and self.contacted and self.failed_in_a_row < self._limit:
            return False
        self.trip()
        return True

    def trip(self) -> None:
        """Open at once."""
        self.state = "open"
        self._backoff.reset()
        self._draw()

    def until_probe(self) -> float:
        """Return the seconds until the next probe is due."""
        return min(max(self._due - self._clock(), 0.0), self._interval)

    def probe(self) -> None:
        """A probe starts."""
        if self.state == "open":
            self.state = "half-open"

    def probe_failed(self) -> None:
        """It found the store as it was; the next one comes later."""
        self.state = "open"
        self._draw()

    def close(self) -> None:
        """Let calls through again."""
        self.state = "closed"
        self.failed_in_a_row = 0
        self.contacted = True

    def _draw(self) -> None:
        self._interval = self._backoff.next()
        self._due = self._clock() + self._interval
