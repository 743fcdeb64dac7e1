"""Decisions about time, as pure functions: what a duration means, how long an entry lives, how fresh it is now.

Rules:
- Durations are seconds as float once they are in; ``FOREVER`` is infinity.
- Expiry is absolute, on the store's clock. Nothing lives longer than it was given at its writing; only ``touch``
  extends it.
- A head that comes from the future (by more than ``SKEW``) was written under a clock that has since been set back. It
  is expired: a miss is cheaper than an entry that lives for a year.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from ._frame import Head

FOREVER: Final = math.inf
"""As a ttl: never expires."""

SKEW: Final = 5.0
"""Seconds that two hosts' idea of the store's clock may differ by."""

MAX_SECONDS: Final = 100 * 365 * 86_400.0
"""The longest finite duration, a hundred years: what Redis can take in milliseconds, and then some."""

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)\s*", re.ASCII)
_TAKES: Final = 'seconds as a number, text with units such as "90s", "10m", "1h30m", a timedelta, or FOREVER'


def seconds(value: object, what: str = "ttl") -> float:
    """Return *value* as seconds: more than 0, possibly ``FOREVER``.

    Args:
        value: A number of seconds, text with units (ms, s, m, h, d, w; "1h30m"), or a ``timedelta``.
        what: The option's name, for the error.

    Raises:
        ValueError: It is 0 or less, not a number, a bool, longer than a hundred years but finite, or text that is no
            duration.
        TypeError: It is of another type altogether.
    """
    match value:
        case bool():
            raise ValueError(f"{what} must be {_TAKES}, not the bool {value!r}")
        case int() | float():
            result = _from_number(value)
        case str():
            result = _from_text(value, what)
        case timedelta():
            result = value.total_seconds()
        case _:
            raise TypeError(f"{what} must be {_TAKES}, not {type(value).__name__}")
    if not result > 0:  # also catches NaN
        raise ValueError(f"{what} must be more than 0 seconds, not {value!r}; for no expiry pass FOREVER")
    if MAX_SECONDS < result < math.inf:
        raise ValueError(f"{what} must be at most a hundred years, not {value!r}; for no expiry pass FOREVER")
    return result


def _from_number(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return MAX_SECONDS * 2


def _from_text(text: str, what: str) -> float:
    total, at, stripped = 0.0, 0, text.strip()
    while at < len(stripped):
        part = _PART.match(stripped, at)
        if part is None:
            break
        total += float(part[1]) * _UNITS[part[2]]
        at = part.end()
    if not stripped or at < len(stripped):
        raise ValueError(f"{what} must be {_TAKES}, not the text {text[:40]!r}")
    return min(total, MAX_SECONDS * 2)  # digits without end are no way to say FOREVER


class Span(NamedTuple):
    """When an entry stops being fresh, and when it may be dropped. Absolute, in the store's time."""

    fresh_until: float
    keep_until: float

    def keep(self, now: float) -> float | None:
        """What to tell the store: seconds to keep it from *now*, None for ever."""
        return None if self.keep_until == math.inf else self.keep_until - now


def span(now: float, ttl: float, stale_ttl: float = 0.0) -> Span:
    """Return the span of an entry written at *now* that stays fresh for *ttl* and stands in for *stale_ttl* more."""
    fresh_until = now + ttl
    return Span(fresh_until, fresh_until + stale_ttl)


class Freshness(Enum):
    """What may be done with an entry at a moment."""

    FRESH = "fresh"
    STALE = "stale"  # may stand in where a load fails or is slow
    EXPIRED = "expired"


def is_fresh(head: Head, now: float) -> bool:
    """Whether ``freshness`` says so: what every read asks."""
    return head.created - SKEW <= now < head.fresh_until and now < head.keep_until


def freshness(head: Head, now: float) -> Freshness:
    """Say how fresh the entry with *head* is at *now*, in the store's time."""
    if is_fresh(head, now):
        return Freshness.FRESH
    return Freshness.STALE if head.created - SKEW <= now < head.keep_until else Freshness.EXPIRED
