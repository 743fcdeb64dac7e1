"""What a process may read while things fail: its own changes, held against the values that it is given.

A value says itself what it is: under which key, from when, by whom, how long it is fresh. So one look at it tells
whether it may be what a call answers.

Rules:
- Calls are judged by the changes that ended before they began: what goes on at the same time may be seen or not.
- A loaded value is as old as the call of its loader. A change fences every load that began before it, in whichever
  process; so a value from before this process's last change of its key, of one of its tags, or of its namespace is
  wrong, however the stores were doing.
- A set may land as late as its call ends, and one that was cut off or came from another process a moment later.
- A change that the cache says has not been noted (``invalidate`` returns False) counts for nothing.
- Times are those of one clock that all processes share and nobody sets; ends of freshness are on the store's clock.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

_KEPT = 256  # changes of a name; older ones than the last few can't be the last that ended


class Name(NamedTuple):
    """Where a value stands."""

    cache: str
    space: str
    scope: str
    key: str

    def above(self, tags: Iterable[str] = ()) -> list[Hashable]:
        """Everything whose change changes this one."""
        spaces: list[Hashable] = [(self.cache, self.space), (self.cache, self.space, self.scope)]
        return [self, *spaces, *(tag_of(self.cache, self.space, tag) for tag in tags)]


def tag_of(cache: str, space: str, tag: str) -> Hashable:
    return cache, space, "tag", tag


class Reading(NamedTuple):
    """A call that answers with a value: when it began, and on the store's clock."""

    asked: float
    now: float
    stale_ttl: float = 0.0


@dataclass(frozen=True)
class Value:
    """What is cached, before it is a dict."""

    name: Name
    by: str
    number: int
    at: float
    made: float
    ttl: float
    how: str = "load"
    tags: tuple[str, ...] = ()
    size: int = 0

    def plain(self) -> dict[str, Any]:
        body = {
            "name": list(self.name),
            "by": self.by,
            "number": self.number,
            "at": self.at,
            "made": self.made,
            "ttl": self.ttl,
            "how": self.how,
            "tags": list(self.tags),
            "pad": f"{self.number:08x}" * (self.size // 8),
        }
        return body | {"sum": _sum(body)}


def _sum(body: dict[str, Any]) -> int:
    return zlib.crc32(repr([body[name] for name in sorted(body) if name != "sum"]).encode())


class Ledger:
    """The changes of one process.

    Args:
        process: Its name.
        late: How much later than its call a set may land that was cut off, or that was another process's.
        slack: How much longer than its ttl a value may be seen: what its way to the store and back may take.
    """

    def __init__(self, process: str, *, late: float, slack: float) -> None:
        self.process = process
        self._late = late
        self._slack = slack
        self._changes: defaultdict[Hashable, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._sets: dict[int, float] = {}

    def changed(self, name: Hashable, start: float, end: float) -> None:
        """A delete, set, invalidation or clear of *name* went on from *start* to *end*."""
        self._changes[name].append((start, end))

    def set_begins(self, number: int) -> None:
        self._sets[number] = math.inf

    def set_ended(self, number: int, end: float) -> None:
        """The set of value *number* can't land after *end* any more."""
        self._sets[number] = end
        if len(self._sets) > 100_000:
            for old in list(self._sets)[:50_000]:
                del self._sets[old]

    def floor(self, names: Iterable[Hashable], before: float) -> float:
        """Return when the last change began of those that ended *before*."""
        ended = (start for name in names for start, end in self._changes.get(name, ()) if end < before)
        return max(ended, default=-math.inf)

    def wrong(self, name: Name, value: Any, reading: Reading) -> str | None:
        """Say what is wrong with *value* as an answer for *name*; None: nothing is."""
        if not isinstance(value, dict) or value.get("sum") != _sum(value):
            return "damaged, or nobody's value"
        if tuple(value["name"]) != name:
            return f"the value of {tuple(value['name'])}"
        floor = self.floor(name.above(value["tags"]), reading.asked)
        if self._may_land(value) < floor:
            return f"{floor - value['at']:.3f} s older than this process's last change"
        age = reading.now - value["made"]
        over = age - value["ttl"] - reading.stale_ttl
        if over > self._slack:
            return f"{over:.3f} s past its ttl of {value['ttl']:g} s"
        return None

    def _may_land(self, value: dict[str, Any]) -> float:
        at: float = value["at"]
        if value["how"] == "load":
            return at
        if value["by"] == self.process:
            return self._sets.get(value["number"], at)
        return at + self._late
