"""The leader's side of a load: what the one flight does for all who wait.

Strategy: take the turn (``_turn``), call the loader, store what it yields where the beginning's token still stands.

Rules:
- A load whose lookup failed does not try to begin, and one that could not begin stores nothing. All trips of a load,
  the lookup among them, have one budget (``_budget``): it costs its loader and one deadline at most.
- What the loader has yielded or raised goes to those who waited, whatever storing it raises.
- Nothing of what a loader decides (``current_entry``) outlives its load.
- However it ends, what was planted is given back, or says that there is no value.
"""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine
from datetime import timedelta
from time import monotonic
from types import CoroutineType
from typing import Any

from ._async_cache import MISSING, Loader
from ._codec import FAILURE, DecodeError, decode
from ._current import Decided
from ._durations import seconds
from ._engine import Engine
from ._exceptions import (
    LoadTimeoutError,
    StoreError,
    StoreMisconfiguredError,
    StoreTimeoutError,
    UncacheableError,
    ValueTooLargeError,
)
from ._flight import Flight
from ._frame import Frame, Mark
from ._freshness import Life
from ._marks import OWNED
from ._protocols import Outcome, Write
from ._reads import Reads
from ._tags import ANY_DIGEST, tag_digest
from ._trip import Landed, Plan, Trip
from ._turn import Turn
from ._writes import Writes


class Leader:
    """One load: ``fly`` is the work of its flight.

    Args:
        engine: Whose store to begin at.
        reads: The way to what is there.
        writes: The way to store the result.
        key: What is loaded.
        loader: What loads it.
        plan: How.
        spent: Seconds that looking the entry up has taken; None: the store did not answer.
    """

    __slots__ = (
        "_budget", "_decided", "_engine", "_key", "_loader", "_passes", "_plan", "_reachable", "_reads", "_rest_for",
        "_root", "_session", "_stored", "_turn", "_writes",
    )  # fmt: skip

    def __init__(  # noqa: PLR0917  # its tools, and what it is to do
        self,
        engine: Engine,
        reads: Reads,
        writes: Writes,
        key: bytes,
        loader: Loader[Any],
        plan: Plan,
        *,
        spent: float | None,
    ) -> None:
        self._engine = engine
        self._reads = reads
        self._writes = writes
        self._session = engine.session()
        self._key = key
        self._root = engine.root(key)
        self._loader = loader
        self._plan = plan
        self._reachable = spent is not None
        self._budget = engine.budget(self._session, spent or 0.0)
        self._rest_for = 0.0  # seconds that the lease beside the entry is to say that the next try rests
        self._passes = False  # what it holds is to say that there is no value
        self._stored = False

    async def fly(self, flight: Flight) -> Landed:
        """Do what is to be done, and return what it yields.

        Raises:
            NothingToDoError: See there.
            LoadTimeoutError: Another process's load took too long, and the policy says so.
            BaseException: Whatever the loader raised.
        """
        trip: Trip = flight.cargo
        turn = self._turn = Turn(self._engine, self._reads, self._key, self._plan, trip, self._budget)
        try:
            if self._reachable and not self._budget.is_spent and (found := await self._take()) is not None:
                return found
            flight.begun = True
            value, cost = await self._call(flight, trip)
            return await self._land(flight, trip, value, cost)
        except Exception:
            self._passes = self._plan.rules.fleet
            raise
        finally:
            turn.end(stored=self._stored, rest_for=self._rest_for, passes=self._passes)

    async def _take(self) -> Landed | None:
        try:
            return await self._turn.take()
        except StoreTimeoutError as late:
            self._engine.trouble(late)
            return None

    # Calling

    async def _call(self, flight: Flight, trip: Trip) -> tuple[Any, float]:
        plan, rules = self._plan, self._plan.rules
        self._decided = decided = Decided(
            None if callable(rules.ttl) else rules.ttl, trip.tags, self._read if self._turn.taken is not None else None
        )
        decided.open()
        timer = None if rules.timeout is None else self._session.loop.call_later(rules.timeout, self._time_out, flight)
        started, ok = monotonic(), False
        try:
            value = await self._promise()
            ok = True
        except Exception as error:
            await self._fail(flight, trip, error)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            decided.closed = True
            cost = monotonic() - started
            for observer in plan.observers:
                observer.load(cost, ok)
        return value, cost

    def _promise(self) -> Awaitable[Any]:
        promise = self._loader()
        if type(promise) is not CoroutineType and not isinstance(promise, Awaitable):
            raise TypeError(
                f"the loader of {self._plan.name} returned {type(promise).__name__}, which can't be awaited. Make it "
                "an `async def`; wrap blocking code in asyncio.to_thread."
            )
        return promise

    def _read(self) -> Any:
        """A copy of what is stored now, ``MISSING`` if that can't be had."""
        assert self._turn.taken is not None
        try:
            return decode(self._turn.taken.head.codec, self._turn.taken.payload, self._plan.classes)
        except DecodeError:
            return MISSING

    def _time_out(self, flight: Flight) -> None:
        if not flight.landed:
            self._rest(flight.cargo)  # now: the loader may take its time to end
            plan = self._plan
            self._session.flights.end(
                flight,
                LoadTimeoutError(
                    f"loading {plan.name} took more than {plan.rules.timeout:g} s, which is its timeout. Raise that, "
                    "or give a stale_ttl, for something to stand in."
                ),
            )

    async def _fail(self, flight: Flight, trip: Trip, error: Exception) -> None:
        """Store the failure, if it is an answer; if not, let the next try rest."""
        plan, failures = self._plan, self._plan.rules.failures
        ttl = None if failures is None else failures.ttl_of(error)
        if failures is None or ttl is None:
            self._rest(trip)
            return
        if trip.begun is None or flight.detached or self._decided.skipped:
            return
        try:
            payload = self._writes.bounded(FAILURE, failures.encode(error, plan.classes))
        except (UncacheableError, ValueTooLargeError) as refused:
            self._say_uncacheable(refused)
            return
        await self._try(self._store_failure(trip, payload, ttl))

    async def _store_failure(self, trip: Trip, payload: bytes, ttl: float) -> Outcome | None:
        marks = await self._marks(trip)
        if marks is None:
            return None
        return await self._writes.put(self._session, await self._framed(trip, FAILURE, payload, Life(ttl), 0.0, marks))

    def _rest(self, trip: Trip) -> None:
        """Nobody need wait for what has failed, or try again at once where there is something to serve."""
        throttle = self._plan.rules.throttle
        if trip.seen is not None and throttle and (trip.spare is not None or trip.ahead):
            self._session.rests.note(self._key, trip.seen, throttle)
            self._rest_for = throttle
        self._passes = self._plan.rules.fleet

    # Storing

    async def _land(self, flight: Flight, trip: Trip, value: Any, cost: float) -> Landed:
        plan = self._plan
        life = self._life(value)
        codec, payload = (0, None) if life is None else self._try_encode(value, wanted=True)
        outcome = await self._try(self._store(flight, trip, value, codec, payload, life, cost))
        if not self._stored:
            self._passes = plan.rules.fleet
            if plan.refresh and outcome != "refused" and not flight.detached:  # what there is is older than that
                cause = outcome if isinstance(outcome, StoreError) else None
                await self._try(self._writes.withdraw(self._session, self._key, cause))
        if life is None and len(flight.waiters) > 1:  # only to copy it for the others, who may have come just now
            codec, payload = self._try_encode(value, wanted=False)
        return Landed(value, codec, payload, plan.classes, cost)

    async def _try(self, work: Coroutine[Any, Any, Outcome | None]) -> Outcome | None:
        """Do *work* at the store as far as the budget goes, and note whether it has stored the entry."""
        outcome: Outcome | None
        try:
            outcome = await self._budget.within(work)
        except StoreMisconfiguredError as told:
            outcome = told
        except StoreTimeoutError as late:
            self._engine.trouble(late)
            outcome = late
        self._stored = outcome == "done"
        return outcome

    async def _store(  # noqa: PLR0917  # what an entry is made of
        self, flight: Flight, trip: Trip, value: Any, codec: int, payload: bytes | None, life: Life | None, cost: float
    ) -> Outcome | None:
        """Store *value* where that is wanted and may be."""
        stores = life is not None and payload is not None and trip.begun is not None
        # Who came late must know, be it stored or not.
        if not stores and (self._decided.tags_added is None or self._turn.any is None):
            return None
        marks = await self._marks(trip)
        if marks is None or life is None or payload is None or not stores or flight.detached:
            return None
        taken = self._turn.taken
        if taken is not None and value is self._decided.unchanged:
            return await self._let_live(trip, taken, life, marks)
        return await self._writes.put(self._session, await self._framed(trip, codec, payload, life, cost, marks))

    def _life(self, value: Any) -> Life | None:
        """How long *value* is to live; None: it is not to be stored."""
        rules, decided = self._plan.rules, self._decided
        if decided.skipped or (rules.cache_if is not None and not rules.cache_if(value)):
            return None
        if decided.ttl is not None:
            ttl = decided.ttl
        elif not callable(rules.ttl):
            return Life(rules.ttl, rules.stale_ttl, rules.jitter)
        else:
            given = rules.ttl(value)
            number = given.total_seconds() if isinstance(given, timedelta) else given
            if isinstance(number, int | float) and number <= 0:
                return None
            ttl = seconds(given, "what the function for the ttl returns")
        return Life(ttl, rules.stale_ttl, min(rules.jitter, ttl / 2))

    async def _marks(self, trip: Trip) -> tuple[Mark, ...] | None:
        """The marks of the entry; None: they could not be had, or came too late to be sure of, which the trip says."""
        trip.doubtful = True  # until they are here
        marks = trip.marks if self._decided.tags_added is None else await self._late_marks(trip)
        if marks is None or len(marks) < len(trip.digests):
            return None
        trip.doubtful = False
        return marks

    async def _late_marks(self, trip: Trip) -> tuple[Mark, ...] | None:
        """The marks of the entry, with those of tags that the loader has added; None: too late to be sure of."""
        added = [tag for tag in self._decided.tags if tag not in trip.tags]
        if not added:
            return trip.marks
        if self._turn.any is None:
            return None
        late = self._session.marks
        taken = await late.taken(late.take(self._root, map(tag_digest, added)))
        if taken is None or await late.current(self._root, ANY_DIGEST) != self._turn.any:
            return None
        return (*trip.marks, *(Mark(digest, mark) for digest, mark in taken.items()))

    async def _framed(  # noqa: PLR0917  # what an entry is made of
        self, trip: Trip, codec: int, payload: bytes, life: Life, cost: float, marks: tuple[Mark, ...]
    ) -> Write:
        assert trip.begun is not None
        if self._plan.owner is not None:
            marks = (*marks, Mark(self._plan.owner, OWNED))
        summed = await self._writes.summed(self._key, payload, marks)
        return self._writes.framed(
            self._key, codec, payload, life, fence=trip.begun.fence, cost=cost, marks=marks, summed=summed
        )

    async def _let_live(self, trip: Trip, taken: Frame, life: Life, marks: tuple[Mark, ...]) -> Outcome:
        """Let what is stored live anew: by its head alone, unless it is to have more marks."""
        if set(marks) <= set(taken.marks):
            return await self._writes.patch(self._session, self._writes.patched(self._key, taken, life))
        head = taken.head
        write = await self._framed(trip, head.codec, bytes(taken.payload), life, head.cost, marks)
        return await self._writes.put(self._session, write)

    def _try_encode(self, value: Any, *, wanted: bool) -> tuple[int, bytes | None]:
        try:
            return self._writes.encode(value, self._plan.classes)
        except (UncacheableError, ValueTooLargeError) as error:
            if wanted:
                self._say_uncacheable(error)
            return 0, None

    def _say_uncacheable(self, error: Exception) -> None:
        plan = self._plan
        for observer in plan.observers:
            observer.error("uncacheable")
        self._engine.warn_once(f"{plan.label} {type(error)}", f"the result of {plan.label} is not cached: {error}")
