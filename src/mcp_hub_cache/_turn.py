"""The turn to load: had at once, or after whoever began before, where a fleet shares loads.

Strategy: the marks of the tags are taken and a placeholder is planted, which is the re-check as well: somebody may have
stored the entry since it was looked up. Where an entry stands already, a lease beside it is asked for first.

Rules:
- Whatever happens to the key from then on (delete, set, clear, eviction, another load's write) changes the token, in
  this process or any other, and this load's write is refused. This is Facebook's memcache lease (NSDI 2013), with a
  random token.
- An entry keeps its token while it is loaded anew. Who may do so is decided by a lease beside it (``_leases``); where
  that says that the next try rests, or what was to go on in the background is done by another already, there is nothing
  to do.
- The lease is had before the entry is looked at: who looks first may have the lease when another has just ended, and
  take what that one has replaced for what there is.
"""

from __future__ import annotations

from collections.abc import Coroutine
from time import monotonic
from typing import Any, NamedTuple

from ._budget import Budget, Unbounded
from ._codec import FAILURE
from ._engine import Engine
from ._exceptions import LoadTimeoutError, StoreError
from ._frame import TOKEN, Frame, Kind, Mark, is_live, peek
from ._freshness import is_fresh
from ._leases import OVER, beside, head_of
from ._placeholders import Over
from ._protocols import Begun, Held
from ._reads import Reads
from ._tags import ANY_DIGEST
from ._tokens import new_token
from ._trip import Landed, NothingToDoError, Plan, Trip


class _LostError(Exception):
    """There is nobody to wait for whose end could be heard of."""


class _Rival(NamedTuple):
    """Somebody else's placeholder."""

    key: bytes
    token: bytes


class Turn:
    """The turn of one load.

    Args:
        engine: Whose store to begin at.
        reads: The way to what is there.
        key: What is to be loaded.
        plan: How.
        trip: What is known so far; told what is found.
        budget: What asking may cost; waiting for another process costs nothing of it.

    Attributes:
        held: The placeholders planted.
        taken: What is stored now, for the loader to look at.
        any: The mark of any invalidation; None: it could not be had, nor any other.
    """

    __slots__ = (
        "_budget",
        "_engine",
        "_key",
        "_plan",
        "_reads",
        "_root",
        "_session",
        "_shares",
        "_trip",
        "_useless",
        "any",
        "held",
        "taken",
    )

    def __init__(  # noqa: PLR0917  # its tools, and what it is for
        self, engine: Engine, reads: Reads, key: bytes, plan: Plan, trip: Trip, budget: Budget | Unbounded
    ) -> None:
        self._budget = budget
        self._engine = engine
        self._reads = reads
        self._session = engine.session()
        self._key = key
        self._root = engine.root(key)
        self._plan = plan
        self._trip = trip
        self._shares = False
        self._useless = False
        self.held: dict[bytes, Held] = {}
        self.taken: Frame | None = None
        self.any: bytes | None = None

    async def take(self) -> Landed | None:
        """Wait for the turn; what was found instead, if somebody else has loaded it.

        Raises:
            NothingToDoError: See there.
            LoadTimeoutError: Another process's load took too long, and the policy says so.
            StoreTimeoutError: The budget is used up.
        """
        marks, trip = self._session.marks, self._trip
        self.any, taking = marks.any(self._root), None
        if self.any is None or trip.digests:
            taking = marks.take(self._root, (ANY_DIGEST, *trip.digests))
        found = await self._ask()
        if type(found) is _Rival and self._plan.rules.fleet and not self._plan.refresh:
            try:
                found = await self._queue(found)
            except _LostError:
                return None
            if trip.digests:  # what was invalidated while another loaded need not be held against this load
                taking = marks.take(self._root, (ANY_DIGEST, *trip.digests))
        if type(found) is Landed:
            return found
        if taking is not None:
            taken = await self._budget.within(marks.taken(taking))
            if taken is not None:
                self.any = taken[ANY_DIGEST]
                trip.marks = tuple([Mark(digest, taken[digest]) for digest in trip.digests])
        return None

    def end(self, *, stored: bool, rest_for: float, passes: bool) -> None:
        """Give back what was planted.

        Args:
            stored: The result is stored in place of it.
            rest_for: Seconds that nobody need try again to load what stands; 0: none.
            passes: Say that there is no value, and that none is coming.
        """
        for at, held in self.held.items():
            over = None
            if rest_for and at is not self._key and self._trip.seen is not None:
                over = Over(rest_for, self._trip.seen, rests=True)
            elif passes:
                over = Over(OVER, new_token(), rests=False)
            # What is shared is left to the others, who may still have it for their fence; it ends by time.
            left = at is self._key and (stored or self._shares)
            self._session.placeholders.end(held, stored=left, over=over)

    async def _queue(self, rival: _Rival) -> Landed | None:
        """Wait until it is this process's turn to load; what was found by then.

        Raises:
            _LostError: The store can't be asked any more, which has cost its deadline.
        """
        rules = self._plan.rules
        deadline = monotonic() + rules.wait_timeout
        while True:
            try:
                if not await self._session.rivals.over(rival.key, rival.token, deadline):
                    break
            except StoreError as error:
                self._engine.trouble(error)
                raise _LostError from None
            found = await self._ask()
            if not isinstance(found, _Rival):
                return found
            rival = found
        self._give_up()
        found = await self._ask(alone=True)
        return None if isinstance(found, _Rival) else found

    def _give_up(self) -> None:
        """Do what the policy says where another's load takes too long; return to load all the same."""
        rules = self._plan.rules
        if rules.on_wait_timeout == "stale" and self._trip.spare is not None:
            raise NothingToDoError
        if rules.on_wait_timeout == "error":
            self._trip.spare = None
            raise LoadTimeoutError(
                f"another process has been loading {self._plan.name} for more than {rules.wait_timeout:g} s, which is "
                'its wait_timeout. Raise that, or let on_wait_timeout be "load".'
            )

    def _ask(self, *, alone: bool = False) -> Coroutine[Any, Any, Landed | _Rival | None]:
        return self._budget.within(self._begin(alone=alone))

    async def _begin(self, *, alone: bool) -> Landed | _Rival | None:
        """Begin at the store; what stands in the way of loading, if something does. *alone*: with no lease."""
        plan = self._plan
        alone = alone or plan.refresh
        while True:
            leased = self._trip.spare is not None or self._trip.ahead or (self._useless and plan.rules.fleet)
            if leased and not alone:
                alone = True
                rival = await self._ask_beside()
                if rival is not None and plan.rules.fleet:
                    return rival
            begun = await self._plant()
            if begun is None:
                return None
            if begun.frame is None or begun.frame[TOKEN] != self._trip.seen:
                self._trip.spare = None  # it is not there any more
            if self._key in self.held:
                return None
            if begun.frame is not None and (found := await self._look(begun.frame)) is not None:
                return found
            head = head_of(begun)
            kind = None if head is None else head.kind
            if kind == Kind.PLACEHOLDER:
                return self._rival(self._key, begun)
            if kind == Kind.OVER:
                # Nobody queues for it: whoever loads now does so under one fence, and the first to store wins.
                self.held[self._key] = self._session.placeholders.share(self._key, begun)
                self._shares = True
                return None
            # An entry stands there that is of no use: a fleet is to load it once, all the same.
            self._useless = True
            if alone or not (plan.rules.fleet or self._trip.spare is not None):
                return None

    async def _plant(self) -> Begun | None:
        """Plant the placeholder, where nothing stands yet."""
        session, key = self._session, self._key
        # What this process plants moves the counter itself. Where nothing can come in between, that is no change;
        # elsewhere whoever joins first has to look.
        if session.is_direct:
            self._trip.begun = await session.placeholders.begin(key)
            self._trip.part = self._engine.part(key)
        else:
            part = self._engine.part(key)
            begun = await session.placeholders.begin(key)
            if begun is not None and begun.frame is not None and self._is_over(begun.frame):
                # A server drops what has expired by its own clock, up to a millisecond later: what is loaded would be
                # refused then, and who comes later would take that for a change.
                part = self._engine.part(key)
                begun = await session.placeholders.begin_over(key, begun)
            self._trip.begun = begun
            self._trip.part = part
        if self._trip.begun is not None and (held := session.placeholders.hold(key, self._trip.begun)) is not None:
            self.held[key] = held
        return self._trip.begun

    def _is_over(self, data: bytes) -> bool:
        head = peek(data)
        return head is not None and head.kind == Kind.ENTRY and not is_live(head, self._engine.now())

    async def _look(self, data: bytes) -> Landed | None:
        """Look at what stands there already: it may be what is wanted, or something to stand in."""
        plan = self._plan
        hit = await self._reads.accept(self._session, self._key, data, plan.classes, None, plan.takes)
        if hit is None:
            return None
        frame = self._engine.form.unpack(data, self._key)
        if hit.stale is not None:
            self._trip.spare, self._trip.seen = hit, hit.head.token
        elif not plan.refresh and (not self._trip.ahead or hit.head.token != self._trip.seen):
            # Somebody stored it between our lookup and our beginning.
            if hit.head.codec == FAILURE:
                raise hit.value
            return Landed(hit.value, hit.head.codec, frame.payload, plan.classes, hit.head.cost)
        self.taken = frame
        return None

    async def _ask_beside(self) -> _Rival | None:
        """Take the lease on loading anew what stands; who has it, if it is another."""
        session, at = self._session, beside(self._root, self._key)
        begun = await session.placeholders.begin(at)
        head = None if begun is None else head_of(begun)
        if begun is not None and head is not None and head.kind == Kind.OVER:
            now = self._engine.now()
            if not head.fresh_until:  # a load has just ended without a value: there is no line to stand in
                self.held[at] = session.placeholders.share(at, begun)  # to say there that the next try rests, if so
                return None
            if (
                is_fresh(head, now)
                and head.token == self._trip.seen
                and (self._trip.spare is not None or self._trip.ahead)
            ):
                session.rests.note(self._key, head.token, head.fresh_until - now)
                raise NothingToDoError
            begun = await session.placeholders.begin_over(at, begun)  # it is over, or speaks of another entry
        if begun is None:
            return None
        held = session.placeholders.hold(at, begun)
        if held is not None:
            self.held[at] = held
            return None
        return self._rival(at, begun)

    def _rival(self, key: bytes, begun: Begun) -> _Rival | None:
        """Who loads, if it is somebody else who has not ended yet."""
        if self._trip.behind:
            raise NothingToDoError
        head = head_of(begun)
        return _Rival(key, begun.fence.token) if head is not None and head.kind == Kind.PLACEHOLDER else None
