"""Decisions about time, as pure functions: how long an entry lives, how fresh it is now.

Rules:
- Expiry is absolute, on the store's clock. Nothing lives longer than it was given at its writing; only ``touch`` and a
  loader's "not modified" extend it.
- A head that comes from the future (by more than ``SKEW``) was written under a clock that has since been set back. It
  is expired: a miss is cheaper than an entry that lives for a year.
- Both must allow it: how long an entry may stand in was decided at its writing, and whoever asks may want less.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from ._frame import Head

SKEW: Final = 5.0
"""Seconds that two hosts' idea of the store's clock may differ by."""


class Span(NamedTuple):
    """When an entry stops being fresh, and when it may be dropped. Absolute, in the store's time."""

    fresh_until: float
    keep_until: float

    def keep(self, now: float) -> float | None:
        """What to tell the store: seconds to keep it from *now*, None for ever."""
        return None if self.keep_until == math.inf else self.keep_until - now


def span(now: float, ttl: float, stale_ttl: float = 0.0, jitter: float = 0.0, draw: float = 0.0) -> Span:
    """Return the span of an entry written at *now*.

    Args:
        now: The store's time.
        ttl: Seconds it stays fresh.
        stale_ttl: Further seconds it may stand in.
        jitter: Seconds of *ttl* that chance may take away, so that what was written together does not expire together.
        draw: That chance, 0 to 1.
    """
    fresh_until = now + ttl - jitter * draw if jitter else now + ttl
    return Span(fresh_until, fresh_until + stale_ttl)


class Life(NamedTuple):
    """How long an entry is to live: seconds fresh, further seconds kept to stand in, and what chance may take away."""

    ttl: float
    stale_ttl: float = 0.0
    jitter: float = 0.0


class Freshness(Enum):
    """What may be done with an entry at a moment."""

    FRESH = "fresh"
    EARLY = "early"  # fresh, and time to load anew in the background
    STALE = "stale"  # may stand in where a load fails or is slow
    EXPIRED = "expired"


def is_fresh(head: Head, now: float) -> bool:
    """Whether ``freshness`` says so: what every read asks."""
    return head.created - SKEW <= now < head.fresh_until and now < head.keep_until


def freshness(
    head: Head, now: float, *, stale_ttl: float = math.inf, early: float = 0.0, draw: float = 1.0
) -> Freshness:
    """Say how fresh the entry with *head* is.

    Args:
        head: The entry's.
        now: The store's time.
        stale_ttl: Seconds past its freshness for which whoever asks would take it, at most as long as it is kept.
        early: See ``lead``.
        draw: See ``lead``.
    """
    if is_fresh(head, now):
        ahead = lead(head.cost, early, draw) if early else 0.0
        return Freshness.EARLY if ahead and now >= head.fresh_until - ahead else Freshness.FRESH
    return Freshness.STALE if stands_in(head, now, stale_ttl) else Freshness.EXPIRED


def stands_in(head: Head, now: float, stale_ttl: float = math.inf) -> bool:
    """Whether an entry that is not fresh may stand in for one that is."""
    return head.created - SKEW <= now < head.keep_until and now < head.fresh_until + stale_ttl


def lead(cost: float, early: float, draw: float) -> float:
    """Return how many seconds before the end of its freshness an entry is refreshed.

    XFetch (Vattani, Chierichetti, Lowenstein: "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015): refresh
    when ``-beta * delta * ln(draw) >= remaining``.

    Args:
        cost: Delta, the seconds that loading it took.
        early: Beta. 1 is the paper's best; more refreshes earlier.
        draw: A random number, more than 0, at most 1.
    """
    return -early * cost * math.log(draw)
