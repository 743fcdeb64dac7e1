"""Single flight: one load per key in a process, however many ask.

Strategy: the work runs in a task that no caller owns. Callers wait on futures of their own; each may leave at any
time. The last one to leave cancels the work.

Rules:
- A flight is found by its key and removed by its identity: one that was detached or cancelled can't take its
  successor with it.
- A flight that is kept is the exception: it works in the background, for whoever comes next.
- Landing, joining, leaving and detaching are synchronous. Between two awaits the table is consistent.
- Who waits for whom is an edge between two *live* flights, added before waiting. A join that would close a circle is
  an error at once: it could never end. The edge starts at the flight in whose context the caller runs; a task that
  outlives its flight has none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from contextvars import ContextVar
from functools import partial
from types import TracebackType
from typing import Any, Final

from ._exceptions import CacheError, CircularLoadError

_PATIENCE: Final = 5.0  # seconds that a loader may take to end when its cache is closed

PENDING: Final = object()
"""What ``wait`` answers where the flight has not landed in time."""

_current: ContextVar[Flight | None] = ContextVar("mcp_hub_cache_flight", default=None)


class Flight:
    """One load in progress.

    Attributes:
        name: What to call it in errors.
        anew: It will not make do with what there is already.
        begun: Set by the work when it has begun what can't be shared with later comers who want it anew.
        detached: Later comers no longer find it; what it yields goes to its waiters alone, if it has any.
        parent: The live flight in whose context it was started.
        group: What several flights have in common that are detached together.
        landed: It is over.
        aliases: Tables that lead to it by names of their own, as long as it can be joined.
        cargo: What the work and those who wait for it have to tell each other.
        kept: It goes on when nobody waits for it any more.
    """

    __slots__ = (
        "aliases",
        "anew",
        "begun",
        "cargo",
        "detached",
        "error",
        "group",
        "home",
        "kept",
        "key",
        "landed",
        "name",
        "parent",
        "result",
        "task",
        "trace",
        "waiters",
        "waits_for",
    )

    def __init__(
        self,
        key: bytes,
        name: str,
        *,
        anew: bool,
        group: object,
        cargo: Any,
        kept: bool,
        parent: Flight | None,
        home: Flights,
    ) -> None:
        self.key = key
        self.name = name
        self.anew = anew
        self.group = group
        self.cargo = cargo
        self.kept = kept
        self.parent = parent
        self.home = home
        self.begun = False
        self.detached = False
        self.landed = False
        self.aliases: list[tuple[dict[Any, Flight], Hashable]] | None = None
        self.task: asyncio.Task[None] | None = None
        self.waiters: set[asyncio.Future[None]] = set()
        self.waits_for: dict[Flight, int] = {}
        self.result: Any = None
        self.error: BaseException | None = None
        self.trace: TracebackType | None = None

    def alias(self, table: dict[Any, Flight], name: Hashable) -> None:
        """Let *table* lead from *name* to this flight as long as it can be joined."""
        if not (self.landed or self.detached):
            table[name] = self
            self.aliases = [*(self.aliases or ()), (table, name)]

    def drop_aliases(self) -> None:
        """Let no table lead here any more."""
        for table, name in self.aliases or ():
            if table.get(name) is self:
                del table[name]
        self.aliases = None

    def route_to(self, goal: Flight) -> list[Flight] | None:
        """Return the chain of flights by which this one waits for *goal*, both included; None if it does not."""
        routes: list[list[Flight]] = [[self]]
        seen: set[Flight] = {self}
        for route in routes:
            if route[-1] is goal:
                return route
            for other in route[-1].waits_for:
                if other not in seen:
                    seen.add(other)
                    routes.append([*route, other])
        return None


def _caller() -> Flight | None:
    """The flight in whose context we run, if it is still under way."""
    flight = _current.get()
    return None if flight is None or flight.landed else flight


class Flights:
    """The flights of one event loop, by key."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._live: dict[bytes, Flight] = {}
        self._flights: set[Flight] = set()  # the detached ones too
        self._closed = False

    def __len__(self) -> int:
        """How many can be joined."""
        return len(self._live)

    def joinable(self, key: bytes) -> Flight | None:
        """The load of *key* in progress that later comers may share."""
        return self._live.get(key)

    def board(
        self,
        key: bytes,
        name: str,
        work: Callable[[Flight], Awaitable[Any]],
        *,
        anew: bool = False,
        group: object = None,
        cargo: Any = None,
        kept: bool = False,
    ) -> tuple[Flight, bool]:
        """Return the flight to wait for, and whether it was started by this call.

        Args:
            key: What is loaded.
            name: What to call it in errors.
            work: Called with the flight if there is none to join.
            group: Marks the flight for ``detach_all``.
            cargo: See ``Flight``; of a flight that this call starts.
            kept: The same.
            anew: Join only a flight that is anew itself and has not begun yet; detach any other.

        Raises:
            CircularLoadError: The caller runs inside a load of the same key.
            CacheError: All have been ended: the caller had asked before, and nobody would end what begins now.
        """
        if self._closed:
            raise _closed(name)
        flight = self._live.get(key)
        if flight is not None and not (anew and (flight.begun or not flight.anew)):
            return flight, False
        caller = _caller()
        if caller is not None:
            self._refuse_descent(key, caller)
        if flight is not None:
            self.detach(key)
        flight = self._live[key] = Flight(
            key,
            name,
            anew=anew,
            group=group,
            cargo=cargo,
            kept=kept,
            parent=caller,
            home=self,
        )
        flight.task = task = self._loop.create_task(self._fly(flight, work), name="mcp-hub-cache load")
        self._flights.add(flight)
        task.add_done_callback(partial(self._ended, flight))
        return flight, True

    async def wait(self, flight: Flight, within: float | None = None) -> Any:
        """Return what *flight* yields; ``PENDING`` where it has not landed *within* so many seconds.

        A flight that somebody has stopped waiting for in this way is kept.

        Raises:
            CircularLoadError: The caller runs inside a load that the flight waits for.
            BaseException: What the work raised, unchanged, in every waiter.

        Cancellation:
            Only this caller leaves. If it was the last one, the work is cancelled.
        """
        if not flight.landed:  # an eager task factory may have flown it already
            caller = _caller()
            if caller is None:
                await self._landing(flight, within)
            else:
                await self._landing_within(caller, flight, within)
            if not flight.landed:
                return PENDING
        if flight.error is not None:
            # The trace as it was at landing: each waiter that raises the shared error would else lengthen it for all.
            raise flight.error.with_traceback(flight.trace)
        return flight.result

    async def _landing_within(self, caller: Flight, flight: Flight, within: float | None) -> None:
        if flight.task is not None and (route := flight.route_to(caller)) is not None:
            raise _circle([caller, *route])
        caller.waits_for[flight] = caller.waits_for.get(flight, 0) + 1
        try:
            await self._landing(flight, within)
        finally:
            caller.waits_for[flight] -= 1
            if not caller.waits_for[flight]:
                del caller.waits_for[flight]

    async def _landing(self, flight: Flight, within: float | None) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        flight.waiters.add(future)
        timer = None if within is None else self._loop.call_later(within, _wake, future)
        try:
            await future
            if not flight.landed:
                flight.waiters.discard(future)
                flight.kept = True
        except asyncio.CancelledError:
            flight.waiters.discard(future)
            if not (flight.waiters or flight.landed or flight.kept):
                self._drop(flight)
                flight.detached = True  # a loader that swallows this must not have its result stored
                assert flight.task is not None
                flight.task.cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _refuse_descent(self, key: bytes, caller: Flight | None) -> None:
        """Refuse a load inside one of the same key, detached or not: its loader would ask again, without end."""
        chain: list[Flight] = []
        while caller is not None and not caller.landed:
            chain.append(caller)
            if caller.key == key and caller.home is self:
                raise _circle([*reversed(chain), caller])
            caller = caller.parent

    async def _fly(self, flight: Flight, work: Callable[[Flight], Awaitable[Any]]) -> None:
        _current.set(flight)
        try:
            flight.result = await work(flight)
        except BaseException as error:
            self._land(flight, error)
            if not isinstance(error, Exception):
                raise
        else:
            self._land(flight, None)

    def _ended(self, flight: Flight, _: asyncio.Task[None]) -> None:
        self._flights.discard(flight)
        if flight.task is not None and not flight.task.cancelled():
            flight.task.exception()  # the waiters have it; asyncio need not warn of it
        if not flight.landed:
            self._land(flight, asyncio.CancelledError())  # it was cancelled before its first step
        flight.task = None  # a circle, through its context: what was loaded would stay until the collector comes

    def _land(self, flight: Flight, error: BaseException | None) -> None:
        if flight.landed:
            return
        self._drop(flight)
        flight.landed = True
        if error is not None:
            flight.error = error
            flight.trace = error.__traceback__
        waiters, flight.waiters = flight.waiters, set()
        for future in waiters:
            _wake(future)

    def end(self, flight: Flight, error: BaseException) -> None:
        """Let all who wait for *flight* have *error* now, and cancel the work."""
        self._land(flight, error)
        flight.detached = True  # a loader that swallows this must not have its result stored
        assert flight.task is not None
        flight.task.cancel()

    def _drop(self, flight: Flight) -> None:
        if self._live.get(flight.key) is flight:
            del self._live[flight.key]
            flight.drop_aliases()

    def detach(self, key: bytes) -> None:
        """Let later callers start a new load of *key*; the one in progress serves those who wait for it."""
        flight = self._live.get(key)
        if flight is not None:
            self._drop(flight)
            flight.detached = True

    def detach_all(self, prefix: bytes, group: object = None, *, only: Callable[[Flight], bool] | None = None) -> None:
        """Detach every flight whose key begins with *prefix*.

        Args:
            prefix: Of the keys.
            group: Only those of this group.
            only: Only those for which it says so.
        """
        for key, flight in list(self._live.items()):
            if key.startswith(prefix) and group in {None, flight.group} and (only is None or only(flight)):
                self.detach(key)

    def is_of_another(self, key: bytes, group: object) -> bool:
        """Whether a load of *key* is in progress that is not of *group*."""
        flight = self._live.get(key)
        return flight is not None and flight.group != group

    async def aclose(self) -> None:
        """Cancel every load and wait for its end; who waits for one gets a ``CacheError``, as who wants one later.

        A loader that is deaf to that is waited for no longer than some seconds.
        """
        self._closed = True
        me = asyncio.current_task()  # a loader may close the cache that it loads for
        flights = [flight for flight in self._flights if flight.task is not me]
        for flight in flights:
            self._land(flight, _closed(flight.name))
        tasks = [flight.task for flight in flights if flight.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_PATIENCE)


def _closed(name: str) -> CacheError:
    return CacheError(f"the cache was closed while {name} was being loaded.")


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _circle(chain: list[Flight]) -> CircularLoadError:
    names = " -> ".join(flight.name for flight in chain)
    return CircularLoadError(
        f"loads wait for each other and would never end: {names}. A loader must not ask for itself."
    )
