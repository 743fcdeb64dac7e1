"""How a primary is: which parts of it serve, and why others do not. Decided, and logged once per change; no I/O.

Rules:
- A part that has failed once is *suspected*: nothing more is asked of it until a probe has answered, so that one
  deadline is all that an outage costs a caller. Nobody is told of a suspicion; it becomes an outage with the failures
  in a row that open the breaker, or goes.
- A primary is as many parts as it has lanes, each with a breaker of its own: one dead node of a cluster takes its own
  keys with it, and no others. While one part is away, the first failure of another is enough.
- A primary that refuses us (credentials, TLS) is *misconfigured*: nothing stands in for it.
- A permission that is missing costs the calls that need it, and nothing else. Where entries take it, that is
  *misconfigured* too.
- What a call met that was no outage (that, or full, busy, read-only, …) lasts until the same call of the same part
  brings an answer, or nobody has met it for a while. It is said once while it lasts.
"""

from __future__ import annotations

import logging
import math
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
from .._protocols import State, StoreState
from ._failover_breaker import Breaker
from ._failover_standby import Standby

_log = logging.getLogger("mcp_hub_cache")

_DATA: Final = frozenset({"get", "head", "begin", "write", "patch", "delete"})
_ANSWERS: Final = (StoreBusyError, StoreFullError, StoreReadOnlyError)
_RECENT: Final = 60.0  # seconds for which what nobody meets again still lasts
_KINDS: Final = {"file": "file-based", "memory": "in-memory"}


class Part:
    """What serves the keys of one lane.

    Attributes:
        problem: Why it is away, or suspected to be; None: it is not.
    """

    __slots__ = ("breaker", "lane", "problem")

    def __init__(self, lane: Hashable, breaker: Breaker) -> None:
        self.lane = lane
        self.breaker = breaker
        self.problem: StoreError | None = None

    @property
    def is_suspected(self) -> bool:
        """Whether it has failed, but not often enough to be away."""
        return self.problem is not None and self.breaker.state == "closed"


class Health:
    """How a primary is.

    Args:
        name: The primary's, in logs.
        standby: What serves instead; None: nothing does.
        breaker: Makes a breaker, which decides when to leave a part of the primary alone.
        clock: Seconds since the epoch, for ``StoreState.since``.

    Attributes:
        away: The parts that are, by lane, and those that are suspected to be.
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
        self._announced: State = "healthy"
        self._met: dict[
            tuple[Hashable, str], tuple[StoreError, float]
        ] = {}  # by part and call: what it had last, and when
        self._said: dict[str, float] = {}  # kinds of that, and when they were last met
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
        """Return why that part is away, to be raised."""
        problem = self.away[lane].problem
        assert problem is not None
        return problem.again()

    def state(self) -> StoreState:
        """See ``Monitored.state``. The worst that is known of any part."""
        problems = [part.problem for part in self.away.values() if part.problem and not part.is_suspected]
        problem = next((one for one in problems if refuses(one)), problems[0] if problems else None)
        if problem is None:
            lasting = self._lasting()
            denied = next((error for name, error in lasting if _is_denied(name, error)), None)
            if denied is not None:
                return StoreState("misconfigured", self._since, str(denied))
            others = (str(error) for _, error in lasting if not isinstance(error, StorePermissionError))
            return StoreState("healthy", self._since, next(others, None))
        if refuses(problem):
            return StoreState("misconfigured", self._since, str(problem))
        return StoreState("unhealthy" if self._standby is None else "degraded", self._since, str(problem))

    def _lasting(self) -> list[tuple[str, StoreError]]:
        after = self._clock() - _RECENT
        return [(name, error) for (_, name), (error, at) in self._met.items() if at > after]

    def facts(self) -> dict[str, str | int | float]:
        """What ``info`` tells of the failover."""
        states = [part.breaker.state for part in self._parts.values()]
        facts: dict[str, str | int | float] = {
            "breaker": next((state for state in ("open", "half-open") if state in states), "closed")
        }
        away = sum(not part.is_suspected for part in self.away.values())
        if away not in {0, len(self._parts)}:
            facts["parts_away"] = away
        return facts

    def _announce(self) -> None:
        old, new = self._announced, self.state().state
        if new != old:
            self._announced, self._since = new, self._clock()
            if self.on_state is not None:
                self.on_state(old, new)

    # What is heard of it

    def answered(self, name: str, lane: Hashable) -> None:
        """A call by that *name* brought an answer from the part for *lane*."""
        part = self._parts.get(lane)
        (part or self.part(lane)).breaker.answered()
        if self._met:
            self._met.pop((lane, name), None)
            self._announce()

    def failed(self, name: str, error: StoreError, lane: Hashable, *, late: bool = False) -> bool:
        """A call by that *name* to the part for *lane* failed. True: somebody else is to be asked now.

        *late*: it brought an answer. Probes may be quick where calls are slow, so that is no suspicion.
        """
        part = self.part(lane)
        first = not part.breaker.contacted
        if error.outage:
            others = any(other is not part and not other.is_suspected for other in self.away.values())
            if part.breaker.failed(credit=not others):
                self.go_away(part, error, first=first)
            elif late:
                return False
            else:
                part.problem = error
                self.away[lane] = part
            return True
        if refuses(error):
            part.breaker.trip()
            self.go_away(part, error, first=first)
            return True
        if isinstance(error, _ANSWERS):
            part.breaker.answered()
        self._meet(name, error, lane)
        return False

    def _meet(self, name: str, error: StoreError, lane: Hashable) -> None:
        now = self._clock()
        if not isinstance(error, StorePermissionError):
            self._say(logging.WARNING, "%s does not do what the cache asks: %s", error, now)
        elif _is_denied(name, error):
            self._say(logging.ERROR, "%s refuses to serve the cache: %s", error, now)
        self._met[lane, name] = error, now
        self._announce()

    def _say(self, level: int, text: str, error: StoreError, now: float) -> None:
        if now - self._said.get(error.kind, -math.inf) >= _RECENT:
            _log.log(level, text, self._name, error)
        self._said[error.kind] = now

    def go_away(self, part: Part, error: StoreError, *, first: bool = False) -> None:
        """*part* is away for *error*."""
        is_news = str(error) not in {str(other.problem) for other in self.away.values() if other is not part}
        part.problem = error
        self.away[part.lane] = part
        if is_news:
            self._say_away(part, error, first=first)
        self._announce()

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
        """A probe of *part* failed. True: that makes a difference to who is asked."""
        if part.is_suspected:
            if error.outage or refuses(error):
                return self.failed("ping", error, part.lane)
            self.is_back(part, 0)  # busy, or the like: it is there
            return True
        part.breaker.probe_failed()
        problem = part.problem
        assert problem is not None
        if refuses(problem) == refuses(error):
            part.problem = error
            return False
        self.go_away(part, error)
        return True

    def is_back(self, part: Part, replayed: int) -> None:
        """*part* serves again, after so many deletes were made up for."""
        if part.is_suspected:  # that it answers probes takes back no failure: answers do
            part.problem = None
            del self.away[part.lane]
            return
        part.problem = None
        del self.away[part.lane]
        part.breaker.close()
        if self.away:
            _log.info("A part of %s is back; %d are still away", self._name, len(self.away))
        else:
            _log.info("%s is back: it serves the cache again (%d deletes made up for)", self._name, replayed)
        self._announce()


def refuses(error: StoreError) -> bool:
    """Whether a person must change something before the store serves anything at all."""
    return isinstance(error, StoreMisconfiguredError) and not isinstance(error, StorePermissionError)


def _is_denied(name: str, error: StoreError) -> bool:
    """Whether *error* of a call by that *name* means that entries can't be served or stored."""
    return name in _DATA and isinstance(error, StorePermissionError)
