"""Durations: what people may write, and the seconds they mean.

Rules:
- Durations are seconds as float once they are in; ``FOREVER`` is infinity.
- A wrong one is an error that says what it was given and what it takes, at the earliest moment.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import Final

FOREVER: Final = math.inf
"""As a ttl: never expires."""

MAX_SECONDS: Final = 100 * 365 * 86_400.0
"""The longest finite duration, a hundred years: what Redis can take in milliseconds, and then some."""

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)\s*", re.ASCII)
_TAKES: Final = 'seconds as a number, text with units such as "90s", "10m", "1h30m", a timedelta, or FOREVER'


def seconds(value: object, what: str = "ttl", *, zero: bool = False, endless: bool = True) -> float:
    """Return *value* as seconds: more than 0, possibly ``FOREVER``.

    Args:
        value: A number of seconds, text with units (ms, s, m, h, d, w; "1h30m"), or a ``timedelta``.
        what: The option's name, for the error.
        zero: 0 will do, too.
        endless: ``FOREVER`` will do.

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
    forever = "; for no expiry pass FOREVER" if endless else ""
    if not (result >= 0 if zero else result > 0):  # also catches NaN
        raise ValueError(f"{what} must be {'0 or more' if zero else 'more than 0'} seconds, not {value!r}{forever}")
    if result > MAX_SECONDS and not (endless and result == math.inf):
        raise ValueError(f"{what} must be at most a hundred years, not {value!r}{forever}")
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
