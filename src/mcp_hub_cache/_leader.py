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

from collections.abc import Awaitable, Iterable
from datetime import timedelta
from time import monotonic
from types import CoroutineType
from typing import Any, NamedTuple

from ._async_cache import MISSING, Loader
from ._changes import Part
from ._classes import ClassSet
from ._codec import FAILURE, DecodeError, decode, is_immutable
from ._current import Decided
from ._direct import Direct
from ._durations import seconds
from ._engine import Engine, Hit, Takes
from ._exceptions import LoadTimeoutError, UncacheableError, ValueTooLargeError
from ._flight import Flight
from ._frame import Frame, Kind, Mark, unpack
from ._leases import OVER, beside, kind_of, rest_of
from ._marks import OWNED
from ._policy import Rules
from ._protocols import Begun, Held, Observer, Outcome
from ._shortcut import Shortcut
from ._tags import ANY_DIGEST, tag_digest
from ._writes import Life, Writes


class Plan(NamedTuple):
    """How to load: what ``Cache`` makes of its options.

    Attributes:
        name: What to call the load in errors.
        label: What to call it in logs, where no key must stand.
        rules: The policy.
        takes: What it takes besides fresh values.
        classes: What may be revived.
        refresh: Load even if there is something fresh.
        owner: 16 bytes that mark the entry as belonging to a function.
        observers: Who hears of it.
        shortcut: Where aliases of what is found may stand.
    """

    name: str
    label: str
    rules: Rules
    takes: Takes
    classes: ClassSet
    refresh: bool
    owner: bytes | None
    observers: tuple[Observer, ...]
    shortcut: Shortcut | None = None


class Trip:
    """What a flight and those who wait for it have to tell each other.

    Attributes:
        spare: The stale hit that may stand in for what the flight yields.
        seen: The token of what was found; the flight is not satisfied with that very entry.
        ahead: There is something fresh: who asks for it need not wait.
        behind: Nobody waits for it: it goes on in the background from the start.
        tags: The entry's, as far as they are known before the load.
        digests: Of these.
        begun: What was found at the beginning; None: not begun yet, or not to be had.
        part: The counter of the key, from before ``begun`` was last known to stand.
        marks: Of the tags, since they were taken.
        look: Set while somebody looks whether ``begun`` still stands.
        over: Its timeout passed.
    """

    __slots__ = (
        "ahead", "begun", "behind", "digests", "look", "marks", "over", "part", "seen", "spare", "tags"
    )  # fmt: skip

    def __init__(
        self,
        tags: Iterable[str] = (),
        *,
        spare: Hit | None = None,
        seen: bytes | None = None,
        ahead: bool = False,
        behind: bool = False,
    ) -> None:
        self.spare = spare
        self.seen = seen
        self.ahead = ahead
        self.behind = behind
        self.tags = tuple(tags)
        self.digests = tuple(map(tag_digest, self.tags))
        self.begun: Begun | None = None
        self.part: Part | None = None
        self.marks: tuple[Mark, ...] = ()
        self.look: Any = None
        self.over = False

    def is_of(self, digests: frozenset[bytes]) -> bool:
        """Whether its entry has one of these tags, as far as that is known."""
        return not digests.isdisjoint(self.digests)


class Landed(NamedTuple):
    """What a flight yields.

    Attributes:
        value: The value.
        codec: Of the payload.
        payload: None: it can't be encoded, so all waiters share the one object.
        classes: What may be revived.
        cost: Seconds the load took.
        doubtful: Something was invalidated meanwhile that may concern it: who came after that loads again.
    """

    value: Any
    codec: int
    payload: bytes | memoryview | None
    classes: ClassSet
    cost: float
    doubtful: bool = False

    def copy(self) -> Any:
        """Return the value, for one more reader."""
        if self.payload is None or is_immutable(self.value):
            return self.value
        return decode(self.codec, self.payload, self.classes)


class NothingToDoError(Exception):
    """The flight came to nothing: what is stale rests, or is refreshed by somebody else."""


class _Rival(NamedTuple):
    """Somebody else's placeholder."""

    key: bytes
    token: bytes


class Leader:
    """One load: ``fly`` is the work of its flight.

    Args:
        engine: Whose store to begin at.
        writes: The way to store the result.
        key: What is loaded.
        loader: What loads it.
        plan: How.
        reachable: Whether the store answered when the entry was looked up.
    """

    __slots__ = (
        "_any", "_decided", "_engine", "_held", "_key", "_loader", "_passes", "_plan", "_reachable", "_rest_for",
        "_root", "_session", "_stored", "_taken", "_writes",
    )  # fmt: skip

    def __init__(
        self, engine: Engine, writes: Writes, key: bytes, loader: Loader[Any], plan: Plan, *, reachable: bool
    ) -> None:
        self._engine = engine
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
            if self._reachable and (found := await self._begin(trip)) is not None:
                return found
            flight.begun = True
            value, cost = await self._call(flight, trip)
            return await self._land(flight, trip, value, cost)
        except Exception:
            self._passes = self._plan.rules.fleet
            raise
        finally:
            for at, held in self._held.items():
                own = at is self._key
                rest = 0.0 if own else self._rest_for
                over = OVER if self._passes and not rest else rest
                self._session.placeholders.end(held, stored=self._stored and own, over=over, rest=rest)

    # Beginning

    async def _begin(self, trip: Trip) -> Landed | None:
        """Take the marks and the turn; what was found instead, if somebody else has loaded it."""
        marks, digests = self._session.marks, (ANY_DIGEST, *trip.digests)
        taking = marks.take(self._root, digests)
        found, waited = await self._take_turn(trip)
        if found is not None:
            return found
        if waited:  # what was invalidated while another loaded must not be held against this load
            taking = marks.take(self._root, digests)
        taken = await marks.taken(taking)
        if taken is not None:
            self._any = taken[ANY_DIGEST]
            trip.marks = tuple([Mark(digest, taken[digest]) for digest in trip.digests])
        return None

    async def _take_turn(self, trip: Trip) -> tuple[Landed | None, bool]:
        """Wait until it is this process's turn to load; also say whether that took any waiting."""
        rules, deadline = self._plan.rules, 0.0
        while True:
            found = await self._ask(trip)
            if not isinstance(found, _Rival):
                return found, bool(deadline)
            if not rules.fleet or self._plan.refresh:
                return None, False
            deadline = deadline or monotonic() + rules.wait_timeout
            if not await self._session.rivals.over(found.key, found.token, deadline):
                self._give_up(trip)
                return None, True

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

    async def _ask(self, trip: Trip) -> Landed | _Rival | None:
        """Begin at the store; what stands in the way of loading, if something does."""
        session, key, plan = self._session, self._key, self._plan
        part = self._engine.part(key)
        begun = trip.begun = await session.placeholders.begin(key)
        # What this process plants moves the counter itself. Where nothing can come in between, that is no change;
        # elsewhere whoever joins first has to look.
        trip.part = self._engine.part(key) if isinstance(session.lines, Direct) else part
        if begun is None:
            return None
        held = session.placeholders.hold(key, begun)
        if held is not None:
            self._held[key] = held
            return None
        if begun.frame is not None and (found := await self._look(trip, begun.frame)) is not None:
            return found
        kind = kind_of(begun)
        if kind == Kind.PLACEHOLDER:
            return self._rival(trip, key, begun)
        wants_lease = plan.rules.fleet or trip.spare is not None or trip.ahead
        if plan.refresh or self._held or kind == Kind.OVER or not wants_lease:
            return None
        return await self._ask_beside(trip)

    async def _look(self, trip: Trip, data: bytes) -> Landed | None:
        """Look at what stands there already: it may be what is wanted, or something to stand in."""
        plan = self._plan
        hit = await self._engine.judge(self._session, self._key, data, plan.classes, plan.takes)
        if hit is None:
            return None
        frame = unpack(data, self._key)
        if hit.stale is not None:
            trip.spare = hit
        elif not plan.refresh and hit.head.token != trip.seen:
            # Somebody stored it between our lookup and our beginning.
            if hit.head.codec == FAILURE:
                raise hit.value
            return Landed(hit.value, hit.head.codec, frame.payload, plan.classes, hit.head.cost)
        self._taken = frame
        return None

    async def _ask_beside(self, trip: Trip) -> Landed | _Rival | None:
        """Take the lease on loading anew what stands; who has it, if it is another."""
        session, at = self._session, beside(self._root, self._key)
        begun = await session.placeholders.begin(at)
        if begun is None:
            return None
        held = session.placeholders.hold(at, begun)
        if held is not None:
            self._held[at] = held
            # Who had the lease before may have stored something between our look and our turn: look again.
            return await self._ask(trip)
        rest = rest_of(begun, self._engine.store.now())
        if rest and (trip.spare is not None or trip.ahead):
            session.rests.note(self._key, rest)
            raise NothingToDoError
        return self._rival(trip, at, begun)

    @staticmethod
    def _rival(trip: Trip, key: bytes, begun: Begun) -> _Rival | None:
        """Who loads, if it is somebody else who has not ended yet."""
        if trip.behind:
            raise NothingToDoError
        return _Rival(key, begun.fence.token) if kind_of(begun) == Kind.PLACEHOLDER else None

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
            if trip.over:
                self._rest(trip)
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
            flight.cargo.over = True
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
        marks = await self._marks(trip)
        if marks is not None:
            await self._put(trip, FAILURE, payload, Life(ttl), 0.0, marks)

    def _rest(self, trip: Trip) -> None:
        """Nobody need wait for what has failed, or try again at once where something stale stands in."""
        throttle = self._plan.rules.throttle
        if trip.spare is not None and throttle:
            self._session.rests.note(self._key, throttle)
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
            marks = await self._marks(trip)
            doubtful = marks is None
            if marks is not None and not flight.detached:
                outcome = await self._store(trip, value, codec, payload, life, cost, marks)
        if outcome != "done":
            self._passes = plan.rules.fleet
        if plan.refresh and outcome not in {"done", "refused"} and not flight.detached:
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
            ttl = seconds(given)
        return Life(ttl, rules.stale_ttl, min(rules.jitter, ttl / 2))

    async def _marks(self, trip: Trip) -> tuple[Mark, ...] | None:
        """The marks of the entry; None: they can't be had, or came too late to be sure of."""
        marks = trip.marks
        if len(marks) < len(trip.digests):
            return None
        added = self._decided.tags.difference(trip.tags)
        if added:
            if self._any is None:
                return None
            late = self._session.marks
            taken = await late.taken(late.take(self._root, map(tag_digest, added)))
            if taken is None or await late.current(self._root, ANY_DIGEST) != self._any:
                return None
            marks = (*marks, *(Mark(digest, mark) for digest, mark in taken.items()))
        return marks if self._plan.owner is None else (*marks, Mark(self._plan.owner, OWNED))

    async def _store(  # noqa: PLR0917  # what an entry is made of
        self, trip: Trip, value: Any, codec: int, payload: bytes, life: Life, cost: float, marks: tuple[Mark, ...]
    ) -> Outcome:
        taken = self._taken
        if taken is not None and value is self._decided.unchanged:
            if set(marks) <= set(taken.marks):
                outcome = await self._writes.patch(self._session, self._writes.patched(self._key, taken, life))
                self._stored = outcome == "done"
                return outcome
            codec, payload, cost = taken.head.codec, bytes(taken.payload), taken.head.cost
        return await self._put(trip, codec, payload, life, cost, marks)

    async def _put(  # noqa: PLR0917  # the same
        self, trip: Trip, codec: int, payload: bytes, life: Life, cost: float, marks: tuple[Mark, ...]
    ) -> Outcome:
        assert trip.begun is not None
        write = self._writes.framed(self._key, codec, payload, life, fence=trip.begun.fence, cost=cost, marks=marks)
        outcome = await self._writes.put(self._session, write)
        self._stored = outcome == "done"
        return outcome

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
