"""Loading: what happens where there is nothing fresh.

Strategy: everything between a miss and its value happens in one flight per key (``_flight``): begin at the store,
call the loader, store what it yields where the beginning's token still stands.

Rules:
- A placeholder is planted before the loader is called. Whatever happens to the key meanwhile (delete, set, clear,
  eviction, another load's write) changes the token, in this process or any other, and the write is refused. This is
  Facebook's memcache lease (NSDI 2013), with a random token.
- A load whose lookup failed does not try to begin, and one that could not begin stores nothing: one deadline, not
  three.
- The result always goes to those who waited for it, stored or not. The leader gets the loader's own object; the
  others get a copy each, decoded from what was stored.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from time import monotonic
from types import CoroutineType
from typing import Any, NamedTuple

from ._async_cache import Loader
from ._classes import ClassSet
from ._codec import decode, is_immutable
from ._engine import Engine, Session, tell_read
from ._exceptions import UncacheableError, ValueTooLargeError
from ._flight import Flight
from ._frame import unpack
from ._protocols import Observer, Outcome
from ._shortcut import Shortcut
from ._writes import Writes


class Plan(NamedTuple):
    """How to load: what ``Cache`` makes of its options.

    Attributes:
        name: What to call the load in errors.
        label: What to call it in logs, where no key must stand.
        ttl: Seconds the result stays fresh.
        classes: What may be revived.
        cache_if: Whether a result is to be stored; None: always.
        refresh: Load even if there is something fresh.
        share: The caller takes an object that others have, too.
        owner: 16 bytes that mark the entry as belonging to a function.
        observers: Who hears of it.
        shortcut: Where aliases of what is found may stand.
    """

    name: str
    label: str
    ttl: float
    classes: ClassSet
    cache_if: Callable[[Any], bool] | None
    refresh: bool
    share: bool
    owner: bytes | None
    observers: tuple[Observer, ...]
    shortcut: Shortcut | None = None


class _Landed(NamedTuple):
    """What a flight yields. ``payload`` None: it can't be encoded, so all waiters share the one object."""

    value: Any
    codec: int
    payload: bytes | memoryview | None
    classes: ClassSet
    cost: float

    def copy(self) -> Any:
        if self.payload is None or is_immutable(self.value):
            return self.value
        return decode(self.codec, self.payload, self.classes)


class Loads:
    """Loads through one engine."""

    def __init__(self, engine: Engine, writes: Writes) -> None:
        self._engine = engine
        self._writes = writes

    async def load(self, key: bytes, loader: Loader[Any], plan: Plan, name: Hashable = None) -> Any:
        """Return the fresh value under *key*, or what *loader* yields; see ``Cache.get_or_load``.

        *name* is what stands for *key* in the plan's shortcut, None: nothing does.
        """
        session = self._engine.session()
        reachable = True
        if plan.refresh:
            session.l1.drop(key)  # who comes meanwhile joins, whichever way he comes
        else:
            if (flight := session.flights.joinable(key)) is not None:
                return await self.join(flight, plan)
            hit, reachable = await self._engine.look_up(session, key, plan.classes, share=plan.share)
            tell_read(hit, plan.observers)
            if hit is not None:
                if hit.near is not None and name is not None and plan.shortcut is not None:
                    plan.shortcut.add(name, hit.near, plan.classes, share=plan.share)
                return hit.value
        work = partial(self._fly, session, key, loader, plan, reachable)
        flight, leads = session.flights.board(key, plan.name, work, anew=plan.refresh, group=plan.owner)
        if not leads:
            return await self.join(flight, plan, told=True)
        if name is not None and plan.shortcut is not None:
            flight.alias(plan.shortcut.flights, name)
        landed: _Landed = await session.flights.wait(flight)
        return landed.value

    def is_here(self, flight: Flight) -> bool:
        """Whether *flight* is of the running loop's session."""
        return flight.home is self._engine.session().flights

    async def join(self, flight: Flight, plan: Plan, *, told: bool = False) -> Any:
        """Return what a load in progress yields, where it was another's. *told*: the miss was counted."""
        if not told:
            tell_read(None, plan.observers)
        landed: _Landed = await flight.home.wait(flight)
        for observer in plan.observers:
            observer.coalesced()
            observer.saved(landed.cost)
        return landed.value if plan.share else landed.copy()

    async def _fly(  # noqa: PLR0917  # a partial makes it, in one place
        self, session: Session, key: bytes, loader: Loader[Any], plan: Plan, reachable: bool, flight: Flight
    ) -> _Landed:
        begun = await session.placeholders.begin(key) if reachable else None
        if begun is not None and begun.frame is not None and not plan.refresh:
            # Somebody stored it between our lookup and our beginning.
            hit = self._engine.accept(session, key, begun.frame, plan.classes, None)
            if hit is not None:
                stored_payload = unpack(begun.frame, key).payload
                return _Landed(hit.value, hit.head.codec, stored_payload, plan.classes, hit.head.cost)
        flight.begun = True
        held = session.placeholders.hold(key, begun) if begun is not None else None
        outcome: Outcome | None = None
        try:
            value, cost = await self._call(loader, plan)
            wanted = plan.cache_if is None or plan.cache_if(value)
            codec, payload = 0, None
            if wanted or len(flight.waiters) > 1:  # or else only to copy it for the others
                codec, payload = self._try_encode(value, plan, wanted=wanted)
            if wanted and payload is not None and begun is not None and not flight.detached:
                write = self._writes.framed(
                    key, codec, payload, plan.ttl, fence=begun.fence, cost=cost, owner=plan.owner
                )
                outcome = await self._writes.put(session, write)
            if plan.refresh and outcome not in {"done", "refused"} and not flight.detached:
                await self._writes.withdraw(session, key)
            return _Landed(value, codec, payload, plan.classes, cost)
        finally:
            if held is not None:
                session.placeholders.end(held, stored=outcome == "done")

    async def _call(self, loader: Loader[Any], plan: Plan) -> tuple[Any, float]:
        started, ok = monotonic(), False
        try:
            promise = loader()
            if type(promise) is not CoroutineType and not isinstance(promise, Awaitable):
                raise TypeError(
                    f"the loader of {plan.name} returned {type(promise).__name__}, which can't be awaited. Make it an "
                    "`async def`; wrap blocking code in asyncio.to_thread."
                )
            value = await promise
            ok = True
        finally:
            cost = monotonic() - started
            for observer in plan.observers:
                observer.load(cost, ok)
        return value, cost

    def _try_encode(self, value: Any, plan: Plan, *, wanted: bool) -> tuple[int, bytes | None]:
        try:
            return self._writes.encode(value, plan.classes)
        except (UncacheableError, ValueTooLargeError) as error:
            if not wanted:
                return 0, None
            for observer in plan.observers:
                observer.error("uncacheable")
            self._engine.warn_once(f"{plan.label} {type(error)}", f"the result of {plan.label} is not cached: {error}")
            return 0, None
