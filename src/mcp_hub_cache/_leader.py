"""The leader's side of a load: what the one flight does for all who wait.

Strategy: begin at the store (or wait for whoever began before, where a fleet shares loads), call the loader, store what
it yields where the beginning's token still stands.

Rules:
- A placeholder is planted before the loader is called. Whatever happens to the key meanwhile (delete, set, clear,
  eviction, another load's write) changes the token, in this process or any other, and the write is refused. This is
  Facebook's memcache lease (NSDI 2013), with a random token.
- A load whose lookup failed does not try to begin, and one that could not begin stores nothing: one deadline, not
  three.
- An entry keeps its token while it is loaded anew. Who may do so is decided by a lease beside it (``_leases``); where
  that says that the next try rests, or what was to go on in the background is done by another already, there is nothing
  to do.
- Nothing of what a loader decides (``current_entry``) outlives its load.
"""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import timedelta
from time import monotonic
from types import CoroutineType
from typing import Any, NamedTuple

from ._async_cache import MISSING, Loader
from ._codec import FAILURE, DecodeError, decode
from ._current import Decided
from ._durations import seconds
from ._engine import Engine
from ._exceptions import LoadTimeoutError, UncacheableError, ValueTooLargeError
from ._flight import Flight
from ._frame import Frame, Kind, Mark, unpack
from ._freshness import Life, is_fresh
from ._leases import OVER, beside, head_of
from ._marks import OWNED
from ._placeholders import Over
from ._protocols import Begun, Held, Outcome, Write
from ._reads import Reads
from ._tags import ANY_DIGEST, tag_digest
from ._tokens import new_token
from ._trip import Landed, NothingToDoError, Plan, Trip
from ._writes import Writes


class _Rival(NamedTuple):
    """Somebody else's placeholder."""

    key: bytes
    token: bytes


class Leader:
    """One load: ``fly`` is the work of its flight.

    Args:
        engine: Whose store to begin at.
        reads: The way to what is there.
        writes: The way to store the result.
        key: What is loaded.
        loader: What loads it.
        plan: How.
        reachable: Whether the store answered when the entry was looked up.
    """

    __slots__ = (
        "_any", "_decided", "_engine", "_held", "_key", "_loader", "_passes", "_plan", "_reachable", "_reads",
        "_rest_for", "_root", "_session", "_stored", "_taken", "_writes",
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
        reachable: bool,
    ) -> None:
        self._engine = engine
        self._reads = reads
        self._writes = writes
        self._session = engine.session()
        self._key = key
        self._root = engine.root(key)
        self._loader = loader
        self._plan = plan
        self._reachable = reachable
        self._held: dict[bytes, Held] = {}
        self._rest_for = 0.0  # seconds that the lease beside the entry is to say that the next try rests
        self._passes = False  # what it holds is to say that there is no value
        self._any: bytes | None = None  # the mark of any invalidation
        self._taken: Frame | None = None  # what is stored now, for the loader to look at
        self._stored = False

    async def fly(self, flight: Flight) -> Landed:
        """Do what is to be done, and return what it yields.

        Raises:
            NothingToDoError: See there.
            LoadTimeoutError: Another process's load took too long, and the policy says so.
            BaseException: Whatever the loader raised.
        """
        trip: Trip = flight.cargo
        try:
            if self._reachable:
                marks, taking = self._session.marks, None
                self._any = marks.any(self._root)
                if self._any is None or trip.digests:
                    taking = marks.take(self._root, (ANY_DIGEST, *trip.digests))
                found = await self._ask(trip)
                if type(found) is _Rival:
                    found = await self._queue(trip, found)
                    if trip.digests:  # what was invalidated while another loaded need not be held against this load
                        taking = marks.take(self._root, (ANY_DIGEST, *trip.digests))
                if type(found) is Landed:
                    return found
                if taking is not None:
                    self._keep_marks(trip, await marks.taken(taking))
            flight.begun = True
            value, cost = await self._call(flight, trip)
            return await self._land(flight, trip, value, cost)
        except Exception:
            self._passes = self._plan.rules.fleet
            raise
        finally:
            for at, held in self._held.items():
                self._session.placeholders.end(held, stored=self._stored and at is self._key, over=self._left(trip, at))

    def _left(self, trip: Trip, at: bytes) -> Over | None:
        """What to leave in place of the placeholder at *at*, if nothing is stored there."""
        if self._rest_for and at is not self._key and trip.seen is not None:
            return Over(self._rest_for, trip.seen, rests=True)
        return Over(OVER, new_token(), rests=False) if self._passes else None

    # Beginning

    def _keep_marks(self, trip: Trip, taken: dict[bytes, bytes] | None) -> None:
        if taken is not None:
            self._any = taken[ANY_DIGEST]
            trip.marks = tuple([Mark(digest, taken[digest]) for digest in trip.digests])

    async def _queue(self, trip: Trip, rival: _Rival) -> Landed | None:
        """Wait until it is this process's turn to load, where a fleet shares loads; what was found by then."""
        rules = self._plan.rules
        if not rules.fleet or self._plan.refresh:
            return None
        deadline = monotonic() + rules.wait_timeout
        while await self._session.rivals.over(rival.key, rival.token, deadline):
            found = await self._ask(trip)
            if not isinstance(found, _Rival):
                return found
            rival = found
        self._give_up(trip)
        found = await self._ask(trip, alone=True)
        return None if isinstance(found, _Rival) else found

    def _give_up(self, trip: Trip) -> None:
        """Do what the policy says where another's load takes too long; return to load all the same."""
        rules = self._plan.rules
        if rules.on_wait_timeout == "stale" and trip.spare is not None:
            raise NothingToDoError
        if rules.on_wait_timeout == "error":
            trip.spare = None
            raise LoadTimeoutError(
                f"another process has been loading {self._plan.name} for more than {rules.wait_timeout:g} s, which is "
                'its wait_timeout. Raise that, or let on_wait_timeout be "load".'
            )

    async def _ask(self, trip: Trip, *, alone: bool = False) -> Landed | _Rival | None:
        """Begin at the store; what stands in the way of loading, if something does. *alone*: with no lease."""
        plan = self._plan
        alone = alone or plan.refresh
        while True:
            leased = trip.spare is not None or trip.ahead or trip.shared
            if leased and not alone:
                # Before the entry is looked at: who looks first may have the lease when another has just ended, and
                # take what that one has replaced for what there is.
                alone = True
                rival = await self._ask_beside(trip)
                if rival is not None and plan.rules.fleet:
                    return rival
            begun = await self._plant(trip)
            if begun is None or self._key in self._held:
                return None
            if begun.frame is not None and (found := await self._look(trip, begun.frame)) is not None:
                return found
            head = head_of(begun)
            kind = None if head is None else head.kind
            if kind == Kind.PLACEHOLDER:
                return self._rival(trip, self._key, begun)
            # An entry of no use stands there.
            trip.shared = plan.rules.fleet
            if alone or kind == Kind.OVER or not (trip.shared or trip.spare is not None):
                return None

    async def _plant(self, trip: Trip) -> Begun | None:
        """Plant the placeholder, where nothing stands yet."""
        session, key = self._session, self._key
        # What this process plants moves the counter itself. Where nothing can come in between, that is no change;
        # elsewhere whoever joins first has to look.
        if session.is_direct:
            trip.begun = await session.placeholders.begin(key)
            trip.part = self._engine.part(key)
        else:
            part = self._engine.part(key)
            trip.begun = await session.placeholders.begin(key)
            trip.part = part
        if trip.begun is not None and (held := session.placeholders.hold(key, trip.begun)) is not None:
            self._held[key] = held
        return trip.begun

    async def _look(self, trip: Trip, data: bytes) -> Landed | None:
        """Look at what stands there already: it may be what is wanted, or something to stand in."""
        plan = self._plan
        hit = await self._reads.accept(self._session, self._key, data, plan.classes, None, plan.takes)
        if hit is None:
            return None
        frame = unpack(data, self._key)
        if hit.stale is not None:
            trip.spare, trip.seen = hit, hit.head.token
        elif not plan.refresh and (not trip.ahead or hit.head.token != trip.seen):
            # Somebody stored it between our lookup and our beginning.
            if hit.head.codec == FAILURE:
                raise hit.value
            return Landed(hit.value, hit.head.codec, frame.payload, plan.classes, hit.head.cost)
        self._taken = frame
        return None

    async def _ask_beside(self, trip: Trip) -> _Rival | None:
        """Take the lease on loading anew what stands; who has it, if it is another."""
        session, at = self._session, beside(self._root, self._key)
        begun = await session.placeholders.begin(at)
        head = None if begun is None else head_of(begun)
        if begun is not None and head is not None and head.kind == Kind.OVER:
            now = self._engine.store.now()
            if not head.fresh_until:  # a load has just ended without a value: there is no line to stand in
                return self._rival(trip, at, begun)
            if is_fresh(head, now) and head.token == trip.seen and (trip.spare is not None or trip.ahead):
                session.rests.note(self._key, head.token, head.fresh_until - now)
                raise NothingToDoError
            begun = await session.placeholders.begin_over(at, begun)  # it is over, or speaks of another entry
        if begun is None:
            return None
        held = session.placeholders.hold(at, begun)
        if held is not None:
            self._held[at] = held
            return None
        return self._rival(trip, at, begun)

    @staticmethod
    def _rival(trip: Trip, key: bytes, begun: Begun) -> _Rival | None:
        """Who loads, if it is somebody else who has not ended yet."""
        if trip.behind:
            raise NothingToDoError
        head = head_of(begun)
        return _Rival(key, begun.fence.token) if head is not None and head.kind == Kind.PLACEHOLDER else None

    # Calling

    async def _call(self, flight: Flight, trip: Trip) -> tuple[Any, float]:
        plan, rules = self._plan, self._plan.rules
        self._decided = decided = Decided(
            None if callable(rules.ttl) else rules.ttl, trip.tags, self._read if self._taken is not None else None
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
        assert self._taken is not None
        try:
            return decode(self._taken.head.codec, self._taken.payload, self._plan.classes)
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
            payload = failures.encode(error, plan.classes)
        except UncacheableError as refused:
            self._say_uncacheable(refused)
            return
        marks = trip.marks if self._decided.tags_added is None else await self._late_marks(trip)
        if marks is not None and len(marks) >= len(trip.digests):
            outcome = await self._writes.put(self._session, self._framed(trip, FAILURE, payload, Life(ttl), 0.0, marks))
            self._stored = outcome == "done"

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
        codec, payload = 0, None
        if life is not None or len(flight.waiters) > 1:  # or else only to copy it for the others
            codec, payload = self._try_encode(value, wanted=life is not None)
        doubtful, outcome = False, None
        if life is not None and payload is not None and trip.begun is not None:
            marks = trip.marks if self._decided.tags_added is None else await self._late_marks(trip)
            if marks is None or len(marks) < len(trip.digests):
                doubtful = True  # they could not be had, or came too late to be sure of
            elif not flight.detached:
                taken = self._taken
                if taken is not None and value is self._decided.unchanged:
                    outcome = await self._let_live(trip, taken, life, marks)
                else:
                    outcome = await self._writes.put(
                        self._session, self._framed(trip, codec, payload, life, cost, marks)
                    )
                self._stored = outcome == "done"
        if not self._stored:
            self._passes = plan.rules.fleet
            if plan.refresh and outcome != "refused" and not flight.detached:
                await self._writes.withdraw(self._session, self._key)
        return Landed(value, codec, payload, plan.classes, cost, doubtful)

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

    async def _late_marks(self, trip: Trip) -> tuple[Mark, ...] | None:
        """The marks of the entry, with those of tags that the loader has added; None: too late to be sure of."""
        added = [tag for tag in self._decided.tags if tag not in trip.tags]
        if not added:
            return trip.marks
        if self._any is None:
            return None
        late = self._session.marks
        taken = await late.taken(late.take(self._root, map(tag_digest, added)))
        if taken is None or await late.current(self._root, ANY_DIGEST) != self._any:
            return None
        return (*trip.marks, *(Mark(digest, mark) for digest, mark in taken.items()))

    def _framed(  # noqa: PLR0917  # what an entry is made of
        self, trip: Trip, codec: int, payload: bytes, life: Life, cost: float, marks: tuple[Mark, ...]
    ) -> Write:
        assert trip.begun is not None
        if self._plan.owner is not None:
            marks = (*marks, Mark(self._plan.owner, OWNED))
        return self._writes.framed(self._key, codec, payload, life, fence=trip.begun.fence, cost=cost, marks=marks)

    async def _let_live(self, trip: Trip, taken: Frame, life: Life, marks: tuple[Mark, ...]) -> Outcome:
        """Let what is stored live anew: by its head alone, unless it is to have more marks."""
        if set(marks) <= set(taken.marks):
            return await self._writes.patch(self._session, self._writes.patched(self._key, taken, life))
        head = taken.head
        write = self._framed(trip, head.codec, bytes(taken.payload), life, head.cost, marks)
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
