"""How a primary is: which parts of it serve, and why others do not. Decided, and logged once per change; no I/O.

Rules:
- A primary is as many parts as it has lanes, each with a breaker of its own: one dead node of a cluster takes its own
  keys with it, and no others. While one part is away, the first failure of another is enough.
- A primary that refuses us (credentials, TLS) is *misconfigured*: nothing stands in for it.
- A permission that is missing costs the calls that need it, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Final

from .._exceptions import (
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreMisconfiguredError,
    StorePermissionError,
    StoreReadOnlyError,
)
from .._protocols import StoreState
from ._failover_breaker import Breaker
from ._failover_standby import Standby

_log = logging.getLogger("mcp_hub_cache")

_DATA: Final = frozenset({"get", "head", "begin", "write", "patch", "delete"})
_ANSWERS: Final = (StoreBusyError, StoreFullError, StoreReadOnlyError, StorePermissionError)
_KINDS: Final = {"file": "file-based", "memory": "in-memory"}


class Part:
    """What serves the keys of one lane.

    Attributes:
        problem: Why it is away; None: it is not.
    """

    __slots__ = ("breaker", "lane", "problem")

    def __init__(self, lane: Hashable, breaker: Breaker) -> None:
        self.lane = lane
        self.breaker = breaker
        self.problem: StoreError | None = None


class Health:
    """How a primary is.

    Args:
        name: The primary's, in logs.
        standby: What serves instead; None: nothing does.
        breaker: Makes a breaker, which decides when to leave a part of the primary alone.
        clock: Seconds since the epoch, for ``StoreState.since``.

    Attributes:
        away: The parts that are, by lane.
        on_state: Called with the old and the new state.
    """

    def __init__(
        self, name: str, standby: Standby | None, breaker: Callable[[], Breaker], clock: Callable[[], float]
    ) -> None:
        self.away: dict[Hashable, Part] = {}
        self.on_state: Callable[[str, str], None] | None = None
        self._name = name.capitalize()
        self._standby = standby
        self._make_breaker = breaker
        self._clock = clock
        self._parts: dict[Hashable, Part] = {}
        self._denied: dict[str, StoreError] = {}  # what permissions are missing for
        self._since: float | None = None

    # How it is

    def part(self, lane: Hashable) -> Part:
        """Return the part for *lane*; one that is new has the credit of the others."""
        part = self._parts.get(lane)
        if part is None:
            part = self._parts[lane] = Part(lane, self._make_breaker())
            part.breaker.contacted = any(other.breaker.contacted for other in self._parts.values())
        return part

    @property
    def all_away(self) -> bool:
        """Whether no part of the primary that was ever asked for anything serves."""
        return bool(self.away) and len(self.away) == len(self._parts)

    def a_lane(self) -> Hashable:
        """Return the lane of some part that serves."""
        return next((part.lane for part in self._parts.values() if part.problem is None), None)

    def stand_in(self, lane: Hashable) -> Standby | None:
        """Return what may serve in place of the primary's part for *lane*."""
        part = self.away.get(lane)
        return None if part is not None and part.problem is not None and refuses(part.problem) else self._standby

    def problem(self, lane: Hashable) -> StoreError:
        """Return why that part is away, to be raised: a copy, since raising writes to an exception."""
        problem = self.away[lane].problem
        assert problem is not None
        copy = type(problem).__new__(type(problem), *problem.args)
        copy.cure = problem.cure
        return copy

    def state(self) -> StoreState:
        """See ``Monitored.state``. The worst that is known of any part."""
        problems = [part.problem for part in self.away.values() if part.problem is not None]
        problem = next((one for one in problems if refuses(one)), problems[0] if problems else None)
        if problem is None:
            problem = next((error for name, error in self._denied.items() if name in _DATA), None)
            if problem is None:
                return StoreState("healthy", self._since)
            return StoreState("misconfigured", self._since, str(problem))
        if refuses(problem):
            return StoreState("misconfigured", self._since, str(problem))
        return StoreState("unhealthy" if self._standby is None else "degraded", self._since, str(problem))

    def facts(self) -> dict[str, str | int | float]:
        """What ``info`` tells of the failover."""
        states = [part.breaker.state for part in self._parts.values()]
        facts: dict[str, str | int | float] = {
            "breaker": next((state for state in ("open", "half-open") if state in states), "closed")
        }
        if len(self.away) not in {0, len(self._parts)}:
            facts["parts_away"] = len(self.away)
        return facts

    def _announce(self, old: StoreState) -> None:
        new = self.state().state
        if new != old.state:
            self._since = self._clock()
            if self.on_state is not None:
                self.on_state(old.state, new)

    # What is heard of it

    def answered(self, name: str, lane: Hashable) -> None:
        """A call by that *name* brought an answer from the part for *lane*."""
        part = self._parts.get(lane)
        (part or self.part(lane)).breaker.answered()
        if self._denied and name in self._denied:
            old = self.state()
            del self._denied[name]
            self._announce(old)

    def failed(self, name: str, error: StoreError, lane: Hashable) -> bool:
        """A call by that *name* to the part for *lane* failed. True: that is now away, or is another matter."""
        part = self.part(lane)
        old, first = self.state(), not part.breaker.contacted
        if error.outage:
            if part.breaker.failed(credit=not self.away):
                self.go_away(part, error, old, first=first)
                return True
        elif refuses(error):
            part.breaker.trip()
            self.go_away(part, error, old, first=first)
            return True
        elif isinstance(error, _ANSWERS):
            part.breaker.answered()
            if isinstance(error, StorePermissionError):
                self._denied[name] = error
                if old.state == "healthy" and name in _DATA:
                    _log.error("%s refuses to serve the cache: %s", self._name, error)
                self._announce(old)
        return False

    def go_away(self, part: Part, error: StoreError, old: StoreState, *, first: bool = False) -> None:
        """*part* is away for *error*; *old* is what it was before."""
        is_news = str(error) not in {str(other.problem) for other in self.away.values()}
        part.problem = error
        self.away[part.lane] = part
        if is_news:
            self._say_away(part, error, first=first)
        self._announce(old)

    def _say_away(self, part: Part, error: StoreError, *, first: bool) -> None:
        text = str(error)
        if first:
            _log.error("Failed to initialize %s cache backend: %s", self._name, text)
        elif refuses(error):
            _log.error("%s refuses to serve the cache: %s", self._name, text)
        else:
            # Stores tend to say so themselves.
            _log.error("%s connection failed: %s", self._name, text.removeprefix(f"{self._name} connection failed: "))
        if (standby := self.stand_in(part.lane)) is not None:
            kind = standby.store.name
            _log.info("Falling back to %s cache", _KINDS.get(kind, kind))
        else:
            _log.info("No cache to fall back to: calls go through uncached")

    def still_away(self, part: Part, error: StoreError) -> bool:
        """A probe of *part* failed. True: for another kind of reason than before."""
        problem = part.problem
        assert problem is not None
        if refuses(problem) == refuses(error):
            part.problem = error
            return False
        self.go_away(part, error, self.state())
        return True

    def is_back(self, part: Part, replayed: int) -> None:
        """*part* serves again, after so many deletes were made up for."""
        old = self.state()
        part.problem = None
        del self.away[part.lane]
        part.breaker.close()
        if self.away:
            _log.info("A part of %s is back; %d are still away", self._name, len(self.away))
        else:
            _log.info("%s is back: it serves the cache again (%d deletes made up for)", self._name, replayed)
        self._announce(old)


def refuses(error: StoreError) -> bool:
    """Whether a person must change something before the store serves anything at all."""
    return isinstance(error, StoreMisconfiguredError) and not isinstance(error, StorePermissionError)
