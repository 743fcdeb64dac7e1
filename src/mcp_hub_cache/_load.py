"""Loading, as callers see it: look, and where there is nothing fresh, wait for a flight or take what stands in.

Strategy: one flight per key does the work (``_leader``); here is who waits for it, how long, and with what. What stands
in for a load that fails or is slow was read before it, by the caller or by the flight.

Rules:
- The result always goes to those who waited for it, stored or not. The leader gets the loader's own object; the
  others get a copy each, decoded from what was stored.
- Whoever comes after a change (a delete, set, clear, invalidation, here or in another process) does not join a load
  that began before it: the load's own beginning must still stand. Where the key's counter has not moved since, that is
  so; else the store is asked.
- What is stale is served once per call and told as such, never as a hit.
- A refresh in the background is one caller of its flight that never leaves. There is a bound on how many there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final

from ._async_cache import Loader
from ._codec import FAILURE, DecodeError, decode, is_immutable
from ._engine import Engine, Session
from ._exceptions import CacheError, CircularLoadError, LoadTimeoutError, StoreError
from ._flight import PENDING, Flight
from ._frame import TOKEN
from ._freshness import lead
from ._leader import Leader
from ._placeholders import heed
from ._reads import Hit, Reads, tell_read
from ._shortcut import AGAIN
from ._trip import Landed, NothingToDoError, Plan, Trip
from ._writes import Writes

NO_TAGS: Final[Callable[[], Iterable[str]]] = tuple


class Loads:
    """Loads through one engine.

    Args:
        engine: The engine.
        reads: The way to what is there.
        writes: The way to store results.
        max_refreshes: How many refreshes may go on in the background at once.
    """

    def __init__(self, engine: Engine, reads: Reads, writes: Writes, *, max_refreshes: int) -> None:
        self._engine = engine
        self._reads = reads
        self._writes = writes
        self._max_refreshes = max_refreshes

    async def load(
        self,
        key: bytes,
        loader: Loader[Any],
        plan: Plan,
        name: Hashable = None,
        tags: Callable[[], Iterable[str]] = NO_TAGS,
    ) -> Any:
        """Return the fresh value under *key*, or what *loader* yields; see ``Cache.get_or_load``.

        Args:
            key: The store key.
            loader: What loads it.
            plan: How.
            name: What stands for *key* in the plan's shortcut; None: nothing does.
            tags: Called for the entry's tags, those of the plan's policy apart, where it is to be loaded.
        """
        engine = self._engine
        session = engine.session()
        flights, rules = session.flights, plan.rules
        begun = session.loop.time()
        while True:
            spare: Hit | None = None
            reachable = True
            if plan.refresh:
                session.l1.drop(key)  # who comes meanwhile joins, whichever way he comes
            else:
                flight = flights.joinable(key)
                if flight is not None and not flight.cargo.ahead:
                    found = await self.join(flight, plan)
                    if found is not AGAIN:
                        return found
                near = session.l1.peek(key) if rules.stale_ttl else None  # before it is looked at, and dropped
                hit, reachable = await self._reads.look_up(session, key, plan.classes, plan.takes)
                if hit is not None and hit.stale is None:
                    return self._fresh(session, key, hit, loader, plan, name, tags)
                spare = hit
                if not reachable and near is not None:
                    spare = self._reads.untrusted(near, plan.classes)
            if spare is not None and self._stands_in_at_once(session, key, spare, loader, plan, tags):
                return self._stand_in(spare, plan)
            trip = Trip((*rules.tags, *tags()), spare=spare, seen=spare and spare.head.token)
            spent = session.loop.time() - begun if reachable else None
            work = Leader(engine, self._reads, self._writes, key, loader, plan, spent=spent).fly
            flight, leads = flights.board(key, plan.name, work, anew=plan.refresh, group=plan.owner, cargo=trip)
            if not leads:
                found = await self.join(flight, plan, spare)
                if found is AGAIN:
                    continue
                return found
            if spare is None:
                tell_read(None, plan.observers)
            if name is not None and plan.shortcut is not None and not plan.refresh:
                flight.alias(plan.shortcut.flights, name)
            landed = await self._wait(flight, plan, spare)
            if landed is AGAIN:
                continue
            return landed.value if type(landed) is Landed else landed

    # What is there

    def _fresh(  # noqa: PLR0917  # what a call is made of
        self,
        session: Session,
        key: bytes,
        hit: Hit,
        loader: Loader[Any],
        plan: Plan,
        name: Hashable,
        tags: Callable[[], Iterable[str]],
    ) -> Any:
        tell_read(hit, plan.observers)
        if plan.rules.early and not session.rests.has(key, hit.head.token) and self._is_due(session, key, hit, plan):
            self._refresh(session, key, hit, loader, plan, tags)
        if hit.head.codec == FAILURE:
            raise hit.value
        if hit.near is not None and name is not None and plan.shortcut is not None:
            plan.shortcut.add(name, hit.near, plan.classes, share=plan.takes.share)
        return hit.value

    def _is_due(self, session: Session, key: bytes, hit: Hit, plan: Plan) -> bool:
        """Whether it is time to refresh ahead; drawn once for an entry in L1, and for each read of the store."""
        near = hit.near
        if near is not None and near.is_hastened():
            return near.is_due()
        ahead = lead(hit.head.cost, plan.rules.early, self._engine.draw())
        if near is None:
            if hit.head.fresh_until - self._engine.now() <= ahead:
                return True
            near = session.l1.peek(key)
        if near is not None:
            near.hasten(ahead)
        return False

    def _stands_in_at_once(  # noqa: PLR0917  # the same
        self,
        session: Session,
        key: bytes,
        spare: Hit,
        loader: Loader[Any],
        plan: Plan,
        tags: Callable[[], Iterable[str]],
    ) -> bool:
        """Whether nobody need wait for a load; starts one in the background where one is wanted."""
        if session.rests.has(key, spare.head.token):
            return True
        if plan.rules.soft_timeout != 0:
            return False
        self._refresh(session, key, spare, loader, plan, tags)
        return True

    def _refresh(  # noqa: PLR0917  # the same
        self,
        session: Session,
        key: bytes,
        hit: Hit,
        loader: Loader[Any],
        plan: Plan,
        tags: Callable[[], Iterable[str]],
    ) -> None:
        """Load in the background what *hit* is to be replaced by, unless that is done already or too much of it."""
        if session.flights.joinable(key) is not None or session.behind >= self._max_refreshes:
            return
        spare = None if hit.stale is None else hit
        trip = Trip((*plan.rules.tags, *tags()), spare=spare, seen=hit.head.token, ahead=spare is None, behind=True)
        work = Leader(self._engine, self._reads, self._writes, key, loader, plan, spent=0.0).fly
        try:
            flight, _ = session.flights.board(key, plan.name, work, group=plan.owner, cargo=trip, kept=True)
        except CacheError:  # a loader that asks for itself, and is served; or the cache was closed meanwhile
            return
        if flight.task is None:  # an eager task factory has flown it already
            self._refreshed(flight, plan)
            return
        session.behind += 1
        flight.task.add_done_callback(lambda _: self._landed_behind(session, flight, plan))

    def _landed_behind(self, session: Session, flight: Flight, plan: Plan) -> None:
        session.behind -= 1
        if type(flight.error) is not CacheError:  # which says that the cache was closed: nothing has failed
            self._refreshed(flight, plan)

    def _refreshed(self, flight: Flight, plan: Plan) -> None:
        error = flight.error
        if isinstance(error, Exception) and not isinstance(error, NothingToDoError):
            self._engine.warn_once(
                f"refresh {plan.label} {type(error)}",
                f"refreshing {plan.label} in the background failed ({type(error).__name__}): what there is stands in",
            )

    def _stand_in(self, spare: Hit, plan: Plan) -> Any:
        for observer in plan.observers:
            observer.stale()
        return spare.value

    # Waiting

    def is_here(self, flight: Flight) -> bool:
        """Whether *flight* is of the running loop's session."""
        return flight.home is self._engine.session().flights

    async def join(self, flight: Flight, plan: Plan, spare: Hit | None = None) -> Any:
        """Return what a load in progress yields, where it was another's; ``AGAIN``: it is not for this caller.

        Args:
            flight: The load.
            plan: How this caller wants it.
            spare: What this caller has found to stand in.
        """
        session = self._engine.session()
        late = flight.begun
        # Of a load that has not begun, only what may stand in for it is anybody's business.
        if (late or self._spare_of(flight, plan) is not None) and not flight.cargo.surely_stands():
            stands = await self._still_stands(session, flight)
            # Who asks is no waiter yet. The last of them may have left meanwhile, and the load have been cancelled; or
            # it has landed, and what it yields is its waiters' own.
            if not stands or flight.detached or flight.landed:
                return AGAIN
        spare = spare or self._spare_of(flight, plan)
        if spare is None:
            tell_read(None, plan.observers)
        elif plan.rules.soft_timeout == 0 and not flight.landed:
            return self._stand_in(spare, plan)
        try:
            if spare is None and not plan.rules.stale_ttl:
                landed = await flight.home.wait(flight)  # nothing could stand in: a layer less for each of a thousand
            else:
                landed = await self._wait(flight, plan, spare)
        except NothingToDoError:
            return AGAIN
        except Exception:
            if late and flight.cargo.doubtful:
                return AGAIN
            raise
        if type(landed) is not Landed:
            return landed
        if late and flight.cargo.doubtful:
            return AGAIN
        for observer in plan.observers:
            observer.coalesced()
            observer.saved(landed.cost)
        return landed.value if plan.takes.share else landed.copy()

    async def _wait(self, flight: Flight, plan: Plan, spare: Hit | None) -> Any:
        """Return what the flight yields (``Landed``), or what stands in for it; ``AGAIN``: neither."""
        try:
            landed = await flight.home.wait(flight, None if spare is None else plan.rules.soft_timeout)
            if landed is not PENDING:
                if spare is not None:
                    tell_read(None, plan.observers)  # only now it is no stale hit
                return landed
        except NothingToDoError:
            spare = spare or self._spare_of(flight, plan)
            if spare is None:
                return AGAIN
        except CircularLoadError:
            raise
        except Exception as error:
            failures = plan.rules.failures
            spare = spare or self._spare_of(flight, plan)
            # A timeout of the load is none of its answers, whatever ``TimeoutError`` is said to be.
            is_answer = not isinstance(error, LoadTimeoutError) and failures is not None and failures.ttl_of(error)
            if is_answer or plan.refresh or spare is None or flight.cargo.spare is None:
                raise
        assert spare is not None
        return self._stand_in(spare, plan)

    def _spare_of(self, flight: Flight, plan: Plan) -> Hit | None:
        """What the flight has found to stand in, for one more reader; None: nothing that this plan takes."""
        spare: Hit | None = flight.cargo.spare
        if spare is None or spare.stale is None or not plan.rules.stale_ttl or plan.refresh:
            return None
        if self._engine.now() >= spare.head.fresh_until + plan.rules.stale_ttl:
            return None
        if is_immutable(spare.value):
            return spare
        try:
            return spare._replace(value=decode(spare.head.codec, spare.stale.payload, plan.classes))
        except DecodeError:
            return None

    async def _still_stands(self, session: Session, flight: Flight) -> bool:
        """Whether nothing has happened to the key, or to its tags, since the load began; else it is detached."""
        trip: Trip = flight.cargo
        stands = trip.is_unmoved() or await self._look(session, flight)
        if stands and (marks := trip.hangs_on()):
            try:
                stands = (await session.marks.stand(self._engine.root(flight.key), marks)).good
            except StoreError as error:
                self._engine.trouble(error)
        if not stands and session.flights.joinable(flight.key) is flight:
            session.flights.detach(flight.key)
        return stands

    async def _look(self, session: Session, flight: Flight) -> bool:
        """Ask the store whether what the load began with stands: once for all who come in one turn of the loop."""
        trip: Trip = flight.cargo
        if trip.look is None:
            part = self._engine.part(flight.key)
            future = session.lines.read(self._engine.store_get, flight.key, flight.key)
            future.add_done_callback(heed)
            trip.look = part, future
            session.loop.call_soon(_end_look, trip)
        part, future = trip.look
        try:
            data = await asyncio.shield(future)
        except StoreError:
            return True  # then it is as good as any
        if data is None or data[TOKEN] != trip.must_stand:
            return False
        trip.part = part
        return True


def _end_look(trip: Trip) -> None:
    trip.look = None
