"""The load on a worker's caches: what agents do, at random, and what is asked of every answer.

Rules:
- No call raises, unless its own loader did.
- Every value stands the ledger's look.
- A call takes its deadline at most, the time of loaders and this process's own lateness left out. Who joins a load that
  waits for another process waits along.
- A key of this process's own that nobody changes has one loader at a time.
"""

from __future__ import annotations

import asyncio
import random
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from mcp_hub_cache import Cache, acached
from mcp_hub_cache._exceptions import StoreError
from mcp_hub_cache._frame import peek
from mcp_hub_cache.stores.failover import FailoverStore
from tests.ledger import Ledger, Name, Reading, Value, tag_of
from tests.soak.watch import Faults, Heartbeat

SPACES = (("alpha", ""), ("beta", ""), ("beta", "one"), ("beta", "two"))
QUIET = "quiet"
TAGS = ("red", "green", "blue")
KEYS = 24
DEADLINE = 0.5
SLACK = 0.5  # beyond it, on top of what the heartbeat has measured
WAIT = 2.0  # seconds for another process's load
CUT_OFF = 1.5  # seconds after which a set that nobody waits for has landed
_HISTORY = 40


class Boom(Exception):
    """A loader's own."""


@dataclass(eq=False)
class Place:
    """One cache, with its views."""

    name: str
    cache: Cache
    now: Callable[[], float]
    views: dict[tuple[str, str], Cache] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for space, scope in (*SPACES, (QUIET, "")):
            view = self.cache.with_namespace(space)
            self.views[space, scope] = view.with_scope(scope) if scope else view


@dataclass(eq=False)
class Op:
    """A call under way."""

    kind: str
    place: Place
    names: list[Name]
    stale_ttl: float = 0.0
    pages: int = 1  # of what has pages
    waits: float = 0.0  # for other processes' loaders
    cancelled: bool = False
    start: float = field(default_factory=time.monotonic)
    asked: float = 0.0
    faults: Sequence[str] = ()  # that went on when it began

    def __post_init__(self) -> None:
        self.asked = self.place.now()

    @property
    def allowed(self) -> float:
        return self.pages * DEADLINE + self.waits + SLACK


class Load:
    """Plays agents.

    Args:
        process: This process's name, of no other before or after it.
        places: The caches.
        late: See ``Ledger``.
        rng: What decides.
        heartbeat: Knows how late this process was.
        faults: Knows what goes on.
        violation: Called with what was wrong.
    """

    def __init__(
        self,
        process: str,
        places: list[Place],
        *,
        late: float,
        rng: random.Random,
        heartbeat: Heartbeat,
        faults: Faults,
        violation: Callable[..., None],
        pause: float = 0.006,
    ) -> None:
        self.process = process
        self.places = places
        self.ledger = Ledger(process, late=late, slack=DEADLINE + SLACK)
        self.counts: Counter[str] = Counter()
        self.worst: dict[str, tuple[float, str]] = {}
        self.going = asyncio.Event()
        self.going.set()
        self.resting = 0
        self._rng = rng
        self._heartbeat = heartbeat
        self._faults = faults
        self._violation = violation
        self._pause = pause
        self._numbers = count(1)
        self._history: defaultdict[Name, deque[str]] = defaultdict(lambda: deque(maxlen=_HISTORY))
        self._loading: defaultdict[Name, list[float]] = defaultdict(list)
        self._loaded: defaultdict[Name, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=50))
        self._waiting: dict[Name, float] = {}  # until when a load may wait for another process's
        self._functions = {(place.name, at): self._function(place, *SPACES[at]) for place in places for at in (0, 2)}
        self._suspects: set[asyncio.Task[None]] = set()
        self._ops: list[tuple[Callable[[Place], Awaitable[None]], float]] = [
            (self.get, 30), (self.get_many, 6), (self.set, 10), (self.set_many, 2), (self.add, 2), (self.delete, 6),
            (self.load, 25), (self.call, 10), (self.quiet, 8), (self.invalidate, 1), (self.clear, 0.2), (self.ask, 2),
            (self.list, 0.2), (self.look, 0.3),
        ]  # fmt: skip

    # Playing

    async def play(self) -> None:
        """One agent, until cancelled; rests between two calls while ``going`` is cleared."""
        ops, weights = zip(*self._ops, strict=True)
        while True:
            if not self.going.is_set():
                self.resting += 1
                await self.going.wait()
                self.resting -= 1
            (op,) = self._rng.choices(ops, weights)
            work = op(self._rng.choice(self.places))
            if self._rng.random() < 0.03:
                await self._cut_off(work)
            else:
                await work
            await asyncio.sleep(self._rng.expovariate(1 / self._pause))

    async def _cut_off(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait([task], timeout=self._rng.choice([0, 0, 0.001, 0.005, 0.1]))
        finally:  # its agent is cancelled: it would meet the closing of its cache
            task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    def state(self) -> str:
        """Of the first cache's store, where it knows one."""
        store = self.places[0].cache.store
        return store.state().state if isinstance(store, FailoverStore) else ""

    async def settle(self) -> None:
        """Return when everything under suspicion has been looked at."""
        if self._suspects:
            await asyncio.wait(self._suspects)

    def _name(self, place: Place) -> tuple[Cache, Name]:
        space, scope = self._rng.choice(SPACES)
        return place.views[space, scope], Name(place.name, space, scope, f"k{self._rng.randrange(KEYS)}")

    async def _ask(self, op: Op, work: Awaitable[Any]) -> Any:
        """Await *work*, and see how it went and how long that took."""
        outcome = "ok"
        try:
            return await work
        except asyncio.CancelledError:
            op.cancelled, outcome = True, "cancelled"
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                self._wrong(op, op.names[0] if op.names else None, f"cancelled by nobody: {traceback.format_exc()}")
            raise
        except Boom:
            outcome = "raised"
            return None
        except Exception as error:
            outcome = type(error).__name__
            self._wrong(op, op.names[0] if op.names else None, f"raised {error!r}")
            return None
        finally:
            self._ended(op, outcome)

    def _ended(self, op: Op, outcome: str) -> None:
        end = time.monotonic()
        self.counts[f"{op.place.name} {op.kind} {outcome}"] += 1
        for name in op.names:
            self._history[name].append(
                f"{op.start:.4f}-{end:.4f} {op.kind} {outcome} {self.state()} "
                f"during {','.join(self._faults.names()) or 'peace'}"
            )
        if outcome == "cancelled":
            return
        took = end - op.start
        faults, kind = ",".join(self._faults.names()), f"{op.place.name} {op.kind}"
        if took <= op.allowed:
            if took > self.worst.get(kind, (0.0, ""))[0]:
                took -= self._loaders_time(op.names, op.start, end) + self._heartbeat.late(op.start, end)
                self.worst[kind] = max(self.worst.get(kind, (0.0, "")), (took, faults))
            return
        task = asyncio.ensure_future(self._suspect(op, end, faults))
        self._suspects.add(task)
        task.add_done_callback(self._suspects.discard)

    async def _suspect(self, op: Op, end: float, faults: str) -> None:
        await self._heartbeat.judged()
        late = self._heartbeat.late(op.start, end)
        took = end - op.start - late - self._loaders_time(op.names, op.start, end)
        kind = f"{op.place.name} {op.kind}"
        if took > self.worst.get(kind, (0.0, ""))[0]:
            self.worst[kind] = took, faults
        if took > op.allowed:
            self._wrong(
                op, op.names[0] if op.names else None,
                f"took {took:.3f} s, loaders and {late:.3f} s of lateness left out, during {faults or 'peace'}",
            )  # fmt: skip

    def _loaders_time(self, names: list[Name], start: float, end: float) -> float:
        spans = [span for name in names for span in self._loaded[name]]
        spans += [(since, end) for name in names for since in self._loading[name]]
        return sum(max(0.0, min(to, end) - max(since, start)) for since, to in spans)

    def _wrong(self, op: Op, name: Name | None, reason: str, value: Any = None) -> None:
        self._violation(
            f"{op.kind} on {op.place.name}: {reason}",
            name=name and list(name),
            value=value,
            history=[] if name is None else list(self._history[name]),
        )

    def _take(self, op: Op, name: Name, value: Any) -> None:
        """Look at what was answered for *name*."""
        if value is None:
            self.counts[f"{op.place.name} {op.kind} miss"] += 1
            return
        self.counts[f"{op.place.name} {op.kind} value"] += 1
        self._history[name].append(
            f"  gave {value.get('number')} of {value.get('by')}" if isinstance(value, dict) else ""
        )
        reading = Reading(op.start, min(op.asked, op.place.now()), op.stale_ttl)
        if reason := self.ledger.wrong(name, value, reading):
            task = asyncio.ensure_future(self._found(op, name, reason, value))
            self._suspects.add(task)
            task.add_done_callback(self._suspects.discard)

    async def _found(self, op: Op, name: Name, reason: str, value: Any) -> None:
        """Say where the value stands, as far as that can still be told."""
        view = op.place.views[name.space, name.scope]
        store: Any = view.store
        stores = {"store": store}
        if isinstance(store, FailoverStore):
            stores = {"primary": store._store, "standby": store._standby.store}
            reason += f"; {store.state().state}, {len(store._journal)} deletes to be made up for"
        for side, each in stores.items():
            try:
                (data,) = await each.get_many([view._key(name.key)])
            except StoreError as error:
                reason += f"; {side}: {error}"
                continue
            head = None if data is None else peek(data)
            reason += f"; {side}: {head and (head.kind, head.created, head.fresh_until)}"
        self._wrong(op, name, reason, value)

    # Values

    def _value(self, name: Name, ttl: float, how: str, *, tags: tuple[str, ...], place: Place, at: float) -> Value:
        size = self._rng.choice([0, 0, 200, 200, 2000, 20_000 if self._rng.random() < 0.1 else 0])
        return Value(
            name, self.process, next(self._numbers), at, place.now(), ttl, how, tags, size
        )  # fmt: skip

    def _tags(self) -> tuple[str, ...]:
        return tuple(sorted(self._rng.sample(TAGS, self._rng.choice([0, 0, 0, 1, 2]))))

    def _loader(self, name: Name, place: Place, ttl: float, tags: tuple[str, ...]) -> Callable[[], Awaitable[Any]]:
        async def loader() -> Any:
            start = time.monotonic()
            running = self._loading[name]
            if name.space == QUIET and running and (place.name == "memory" or not self._faults.within(3.0)):
                self._violation(
                    f"{len(running) + 1} loaders at once", name=list(name), history=list(self._history[name])
                )
            running.append(start)
            try:
                await asyncio.sleep(
                    self._rng.choice([0, 0, 0.001, 0.005, 0.02, 0.4 if self._rng.random() < 0.2 else 0])
                )
                if self._rng.random() < 0.03:
                    raise Boom
                return self._value(name, ttl, "load", tags=tags, place=place, at=start).plain()
            finally:
                running.remove(start)
                self._loaded[name].append((start, time.monotonic()))

        return loader

    # Reading

    async def get(self, place: Place) -> None:
        view, name = self._name(place)
        op = Op("get", place, [name])
        self._take(op, name, await self._ask(op, view.get(name.key)))

    async def get_many(self, place: Place) -> None:
        view, name = self._name(place)
        names = [name._replace(key=f"k{at}") for at in self._rng.sample(range(KEYS), 6)]
        op = Op("get_many", place, names)
        found = await self._ask(op, view.get_many([name.key for name in names])) or {}
        for name in names:
            self._take(op, name, found.get(name.key))

    async def ask(self, place: Place) -> None:
        view, name = self._name(place)
        op = Op("ttl", place, [name])
        await self._ask(op, view.ttl(name.key))

    async def list(self, place: Place) -> None:
        view, _ = self._name(place)

        async def listed() -> None:
            async for _ in view.keys():
                pass

        op = Op("keys", place, [], pages=KEYS)
        await self._ask(op, listed())

    async def look(self, place: Place) -> None:
        await self._ask(Op("health_check", place, []), place.cache.health_check())
        await self._ask(Op("status", place, [], pages=4), place.cache.status())

    # Changing

    async def set(self, place: Place) -> None:
        await self._set(place, 1)

    async def set_many(self, place: Place) -> None:
        await self._set(place, 4)

    async def _set(self, place: Place, several: int) -> None:
        view, name = self._name(place)
        names = [name._replace(key=f"k{at}") for at in self._rng.sample(range(KEYS), several)]
        ttl, tags = self._rng.choice([0.3, 2.0, 5.0, 30.0]), self._tags()
        op = Op("set" if several == 1 else "set_many", place, names)
        values = [self._value(name, ttl, "set", tags=tags, place=place, at=op.start) for name in names]
        for value in values:
            self.ledger.set_begins(value.number)
        plain = {name.key: value.plain() for name, value in zip(names, values, strict=True)}
        if several == 1:
            work = view.set(names[0].key, plain[names[0].key], ttl=ttl, tags=tags)
        else:
            work = view.set_many(plain, ttl=ttl, tags=tags)
        try:
            await self._ask(op, work)
        finally:
            end = time.monotonic()
            for name, value in zip(names, values, strict=True):
                self.ledger.set_ended(value.number, end + (CUT_OFF if op.cancelled else 0.0))
                if not op.cancelled:
                    self.ledger.changed(name, op.start, end)

    async def add(self, place: Place) -> None:
        view, name = self._name(place)
        op = Op("add", place, [name])
        ttl, tags = self._rng.choice([0.3, 2.0, 5.0]), self._tags()
        value = self._value(name, ttl, "set", tags=tags, place=place, at=op.start)
        self.ledger.set_begins(value.number)
        added = False
        try:
            added = await self._ask(op, view.add(name.key, value.plain(), ttl=ttl, tags=tags))
        finally:
            end = time.monotonic()
            self.ledger.set_ended(value.number, end + (CUT_OFF if op.cancelled else 0.0))
            # What is added while a standby serves may be followed by what the server had before.
            if added and place.name != "redis":
                self.ledger.changed(name, op.start, end)

    async def delete(self, place: Place) -> None:
        view, name = self._name(place)
        await self._change(Op("delete", place, [name]), view.delete(name.key), [name])

    async def invalidate(self, place: Place) -> None:
        view, name = self._name(place)
        tag = self._rng.choice(TAGS)
        op = Op("invalidate", place, [])
        await self._change(op, view.invalidate(tag), [tag_of(place.name, name.space, tag)])

    async def clear(self, place: Place) -> None:
        view, name = self._name(place)
        cleared: tuple[str, ...] = (place.name, name.space, name.scope) if name.scope else (place.name, name.space)
        await self._change(Op("clear", place, [], pages=KEYS), view.clear(), [cleared])

    async def _change(self, op: Op, work: Awaitable[Any], names: list[Any]) -> None:
        op.faults = self._faults.names()
        answer = await self._ask(op, work)
        if op.kind == "invalidate" and answer is False:
            self.counts[f"{op.place.name} invalidate not noted"] += 1
            return
        if op.kind == "clear" and "garbled" in (*op.faults, *self._faults.names()):
            return  # a page of keys has no checksum: it may have been told to delete another
        for name in names:
            self.ledger.changed(name, op.start, time.monotonic())

    # Loading

    async def load(self, place: Place) -> None:
        view, name = self._name(place)
        ttl, tags = self._rng.choice([0.2, 1.0, 5.0, 20.0]), self._tags()
        how: dict[str, Any] = {"ttl": ttl, "tags": tags}
        if self._rng.random() < 0.4:
            how |= {"stale_ttl": 10.0, "throttle": 0.5, "soft_timeout": self._rng.choice([0, 0.01, None])}
        if self._rng.random() < 0.1:
            how |= {"refresh": True}
        if self._rng.random() < 0.1 and place.name != "memory":
            how |= {"coalesce": "fleet", "wait_timeout": WAIT}
        if self._rng.random() < 0.2:
            how |= {"early": 1.0}
        kind = "get_or_load" if "coalesce" not in how else "get_or_load:fleet"
        now = time.monotonic()
        if "coalesce" in how:
            self._waiting[name] = now + DEADLINE + WAIT
        waits = max(self._waiting.get(name, now) - now, 0.0)
        op = Op(kind, place, [name], stale_ttl=how.get("stale_ttl", 0.0), waits=waits)
        work = view.get_or_load(name.key, self._loader(name, place, ttl, tags), **how)
        self._take(op, name, await self._ask(op, work))

    async def quiet(self, place: Place) -> None:
        name = Name(place.name, QUIET, "", f"{self.process}.{self._rng.randrange(4)}")
        op = Op("quiet", place, [name])
        work = place.views[QUIET, ""].get_or_load(name.key, self._loader(name, place, 0.1, ()), ttl=0.1)
        self._take(op, name, await self._ask(op, work))

    def _function(self, place: Place, space: str, scope: str) -> Any:
        ttl = 3.0

        def name(number: int) -> Name:
            return Name(place.name, space, scope, f"f{number}")

        async def function(number: int) -> dict[str, Any]:
            value: dict[str, Any] = await self._loader(name(number), place, ttl, ("of a function",))()
            return value

        function.__qualname__ = f"function_{place.name}_{space}_{scope}"
        cached = acached(
            cache=place.views[space, scope], ttl=ttl, key=f"f:{space}:{scope}:{{number}}", tags=["of a function"]
        )(function)
        return cached, name

    async def call(self, place: Place) -> None:
        function, named = self._functions[place.name, self._rng.choice([0, 2])]
        number = self._rng.randrange(KEYS)
        name = named(number)
        if self._rng.random() < 0.1:
            await self._change(Op("f.invalidate", place, [name]), function.invalidate(number), [name])
        else:
            op = Op("acached", place, [name])
            self._take(op, name, await self._ask(op, function(number)))
