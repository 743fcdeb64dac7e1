"""What a cache is to do, in plain words: a dict of entries with their times. ``test_model`` compares.

Two processes share it. What a process alone knows are the entries whose refresh rests after a refresh that was asked
for has failed, and its own loads in progress. A load is stored where it finds what it saw when it began, be it nothing
(for which it leaves a place), and where nobody in its own process has changed the key since.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mcp_hub_cache import MISSING

PROCESSES = (0, 1)
HOLD = 10.0  # seconds for which what a load begins on stays
OVER = 5.0  # seconds for which it is said that a load ended without a value


class Listed(Exception):
    """An answer, where the policy says so."""


class Unlisted(Exception):
    """Never an answer."""


class Order(NamedTuple):
    """How to load."""

    ttl: float = 60.0
    stale_ttl: float = 0.0
    throttle: float = 30.0
    at_once: bool = False
    errors_ttl: float | None = None
    tags: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()
    refresh: bool = False
    fleet: bool = False
    outcome: Literal["value", "skip", "worthless", "listed", "unlisted", "not modified"] = "value"

    def times(self, unit: float) -> Order:
        """The same with all durations so many times as long."""
        errors_ttl = None if self.errors_ttl is None else self.errors_ttl * unit
        return self._replace(
            ttl=self.ttl * unit,
            stale_ttl=self.stale_ttl * unit,
            throttle=self.throttle * unit,
            errors_ttl=errors_ttl,
        )

    def options(self) -> dict[str, Any]:
        """The same for ``get_or_load``."""
        options: dict[str, Any] = {
            "ttl": self.ttl if self.outcome != "worthless" else lambda _: 0,
            "stale_ttl": self.stale_ttl,
            "tags": sorted(self.tags),
            "coalesce": "fleet" if self.fleet else "process",
            "refresh": self.refresh,
        }
        if self.stale_ttl:
            options |= {"throttle": self.throttle, "soft_timeout": 0 if self.at_once else None}
        if self.errors_ttl is not None:
            options["cache_errors"] = {Listed: self.errors_ttl}
        return options


@dataclass(eq=False)
class Entry:
    """What was stored under a key."""

    value: Any
    fresh_until: float
    keep_until: float
    tags: frozenset[str] = frozenset()
    failure: bool = False
    invalid: bool = False
    rests_until: float = -math.inf  # everywhere
    rests_here: dict[int, float] = field(default_factory=dict)

    def rests(self, process: int, now: float) -> bool:
        return now < max(self.rests_until, self.rests_here.get(process, -math.inf))


@dataclass(eq=False)
class Flight:
    """A load in progress."""

    process: int
    value: Any
    order: Order
    saw: Entry | Place | None = None
    tags: frozenset[str] = frozenset()  # of its entry, and of what may stand in for that meanwhile
    detached: bool = False  # its own process has changed the key, or invalidated one of these
    invalid: bool = False  # one of its tags was invalidated
    doubtful: bool = False  # one of those may have been that it adds


@dataclass(eq=False)
class Place:
    """What a load leaves where there is nothing; without an owner: that a load has just ended without a value.

    The latter is shared by all who load while it is there.
    """

    owner: Flight | None
    until: float = math.inf


class Answer(NamedTuple):
    """What a call gives."""

    value: Any = None
    raises: type[Exception] | None = None
    calls: bool = False  # the loader is called


class Model:
    """The plain cache."""

    def __init__(self) -> None:
        self.now = 0.0
        self.frames: dict[str, Entry | Place] = {}
        self.flights: dict[str, list[Flight]] = {}

    # Reading

    def frame(self, key: str) -> Entry | Place | None:
        """What stands there, be it of use or not."""
        frame = self.frames.get(key)
        if frame is not None and self.now >= (frame.keep_until if isinstance(frame, Entry) else frame.until):
            del self.frames[key]
            return None
        return frame

    def usable(self, key: str) -> Entry | None:
        """The entry that is there, be it stale."""
        frame = self.frame(key)
        return frame if isinstance(frame, Entry) and not frame.invalid else None

    def spare(self, key: str, order: Order) -> Entry | None:
        """The stale value that may stand in."""
        entry = self.usable(key)
        if entry is None or entry.failure or not entry.fresh_until <= self.now < entry.fresh_until + order.stale_ttl:
            return None
        return entry

    def fresh(self, key: str) -> Entry | None:
        """The fresh value, which alone anybody speaks of."""
        entry = self.usable(key)
        return None if entry is None or entry.failure or self.now >= entry.fresh_until else entry

    def get(self, key: str) -> Any:
        entry = self.fresh(key)
        return MISSING if entry is None else entry.value

    def ttl(self, key: str) -> float | None:
        entry = self.fresh(key)
        return None if entry is None else entry.fresh_until - self.now

    # Changing

    def put(
        self, key: str, value: Any, ttl: float, stale_ttl: float, tags: frozenset[str], *, failure: bool = False
    ) -> None:
        until = self.now + ttl
        self.frames[key] = Entry(value, until, until + stale_ttl, tags, failure)

    def detach(self, process: int, key: str) -> None:
        """Let no load of *key* that began before in *process* be stored."""
        for flight in self.flights.get(key, ()):
            flight.detached |= flight.process == process

    def set(  # noqa: PLR0917  # what is set
        self, process: int, key: str, value: Any, ttl: float, stale_ttl: float, tags: frozenset[str]
    ) -> None:
        self.detach(process, key)
        self.put(key, value, ttl, stale_ttl, tags)

    def add(self, process: int, key: str, value: Any, ttl: float, tags: frozenset[str]) -> bool:
        if self.fresh(key) is not None:
            return False
        self.set(process, key, value, ttl, 0.0, tags)
        return True

    def touch(self, key: str, ttl: float) -> bool:
        entry = self.fresh(key)
        if entry is None:
            return False
        stale_ttl = entry.keep_until - entry.fresh_until if entry.fresh_until < math.inf else 0.0
        entry.fresh_until = self.now + ttl
        entry.keep_until = entry.fresh_until + stale_ttl
        return True

    def delete(self, process: int, key: str) -> bool | None:
        """None: it may say either, of what was invalidated."""
        self.detach(process, key)
        frame, fresh = self.frames.pop(key, None), False
        if isinstance(frame, Entry) and not frame.failure:
            fresh = self.now < frame.fresh_until
            if fresh and frame.invalid:
                return None
        return fresh

    def clear(self, process: int, prefix: str) -> None:
        for key in {*self.frames, *self.flights}:
            if key.startswith(prefix):
                self.detach(process, key)
                self.frames.pop(key, None)

    def invalidate(self, process: int, tag: str) -> None:
        for frame in self.frames.values():
            if isinstance(frame, Entry):
                frame.invalid |= tag in frame.tags
        for flights in self.flights.values():
            for flight in flights:
                flight.invalid |= tag in flight.order.tags
                flight.detached |= tag in flight.tags and flight.process == process
                flight.doubtful |= bool(flight.order.added - flight.order.tags)

    # Loads that take their time

    def may_join(self, process: int, key: str) -> bool:
        """Whether a call would wait for a load in progress."""
        return any(
            flight.process == process and not (flight.detached or flight.invalid) and (flight.saw is self.frame(key))
            for flight in self.flights.get(key, ())
        )

    def begin(self, key: str) -> Entry | Place | None:
        """What a load finds."""
        frame = self.frame(key)
        if isinstance(frame, Place) and frame.owner is None:
            frame.until = max(frame.until, self.now + HOLD)
        return frame

    def start(self, process: int, key: str, order: Order, value: Any) -> Flight:
        spare = self.spare(key, order)
        flight = Flight(process, value, order, tags=order.tags if spare is None else order.tags | spare.tags)
        self.detach(process, key)  # what is there already is none to join
        frame = self.begin(key)
        if frame is None:
            frame = self.frames[key] = Place(flight)
        elif isinstance(frame, Place) and frame.owner is not None and frame.owner.process == process:
            frame.owner = flight
        flight.saw = frame
        self.flights.setdefault(key, []).append(flight)
        return flight

    def land(self, key: str, flight: Flight) -> None:
        self.flights[key].remove(flight)
        if not self.flights[key]:
            del self.flights[key]
        frame = self.frame(key)
        if not (flight.detached or flight.doubtful) and frame is flight.saw:
            self.store(key, flight.order, flight.value)
            if flight.invalid:
                entry = self.frames[key]
                assert isinstance(entry, Entry)
                entry.invalid = True
        elif isinstance(frame, Place) and frame.owner is flight:
            del self.frames[key]

    # Loading

    def load(self, process: int, key: str, order: Order, value: Any) -> Answer:
        """Load in one go; *value* is what the loader gives if it is called and has one."""
        entry = self.usable(key)
        if entry is not None and self.now < entry.fresh_until and not order.refresh:
            if not entry.failure:
                return Answer(entry.value)
            if order.errors_ttl is not None:
                return Answer(raises=Listed)
        spare = self.spare(key, order)
        if spare is None or order.refresh:
            return self._call(process, key, order, value, spare)
        if spare.rests(process, self.now):
            return Answer(spare.value)
        stale = spare.value
        answer = self._call(process, key, order, value, spare)
        return Answer(stale, calls=True) if order.at_once else answer

    def _call(self, process: int, key: str, order: Order, value: Any, spare: Entry | None) -> Answer:
        entry = self.fresh(key) if order.refresh and spare is None else spare
        self.detach(process, key)
        stood = self.begin(key)
        if isinstance(stood, Place) and stood.owner is not None and stood.owner.process == process:
            del self.frames[key]  # it is taken over, and given back where nothing takes its place
            stood = None
        match order.outcome:
            case "value":
                self.store(key, order, value)
                return Answer(value, calls=True)
            case "skip" | "worthless":
                if order.refresh:  # what it was to replace is not good any more
                    self.frames.pop(key, None)
                if order.fleet and stood is None:
                    self.frames[key] = Place(None, self.now + OVER)
                return Answer(value, calls=True)
            case "not modified" if entry is not None:
                if order.tags | order.added <= entry.tags:
                    entry.fresh_until = self.now + order.ttl
                    entry.keep_until = entry.fresh_until + order.stale_ttl
                else:
                    self.store(key, order, entry.value)
                return Answer(entry.value, calls=True)
            case "listed" if order.errors_ttl is not None:
                self.put(key, None, order.errors_ttl, 0.0, order.tags | order.added, failure=True)
                return Answer(raises=Listed, calls=True)
        if spare is not None and order.throttle:
            until = self.now + order.throttle
            spare.rests_here[process] = until
            if not order.refresh:
                spare.rests_until = until
        if spare is not None and not order.refresh:
            return Answer(spare.value, calls=True)
        if order.fleet and stood is None:
            self.frames[key] = Place(None, self.now + OVER)
        raised: dict[str, type[Exception]] = {"listed": Listed, "unlisted": Unlisted, "not modified": LookupError}
        return Answer(raises=raised[order.outcome], calls=True)

    def store(self, key: str, order: Order, value: Any) -> None:
        self.put(key, value, order.ttl, order.stale_ttl, order.tags | order.added)
