"""Two stores as one: a primary, and a standby that serves while the primary can't be reached.

Strategy: every call is routed by the breaker of its keys' lane as that is at the moment (``_failover_health``,
``_failover_breaker``). A round trip to the primary that fails for an outage is answered by the standby at once, so that
nobody above sees it; a few in a row that fail or take too long, or one at the very first contact, open the breaker, and
then that part of the primary is asked no more. A task in the background finds out when it is there again
(``_failover_keeper``), replays what it has missed (``_failover_replay``; noted in ``_failover_journal``, written down
by ``_failover_pages``), drops the standby's leftovers, and closes the breaker. What is done around each call to the
primary is in ``_failover_primary``; how far the standby is believed, in ``_failover_standby``. Here is only who is
asked.

Rules:
- Only an outage (unreachable, timeout, slow) counts against the primary. Busy, full, read-only and exhausted are passed
  on as they are.
- A primary that refuses us (credentials, TLS) is *misconfigured*: nothing falls back silently, every call gets that
  error at once until a probe finds it put right. A permission that is missing costs the calls that need it alone.
- Every set, delete and clear that failed, is in doubt, or was made while the primary was away is in the journal, and
  the breaker may close with notes left: the journal stands between the primary and its readers.
- A fence is good in the store that issued it, while that one serves. What a load could not write is written nowhere
  else.
- No stamp survives a switch, a failed round trip or a new note: each begins a new epoch, and stamps of different epochs
  differ.

- Nothing of the primary is believed before it is known what other processes, by now ended, had still to tell it.
- A server that takes the place of another may lack the last changes: the deletes of the last minute are made again,
  and where something older stands than what was set, it goes, too (``_failover_replay``).

What remains: what was sent before a timeout may still be on its way, and be executed after the delete that was to undo
it. The primary gives up its connection with the timeout, and answers a ping before anything is replayed, which leaves
only bytes that the network held up for that long.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from operator import attrgetter
from typing import Any, Final

from .._changes import Slot
from .._exceptions import StoreError
from .._frame import retimed
from .._protocols import Begun, Coherent, Held, Leases, Outcome, Patch, Replaceable, Retimed, Store, StoreState, Write
from . import next_store_id
from ._failover_breaker import Backoff, Breaker
from ._failover_health import Health
from ._failover_journal import Journal, Recent
from ._failover_keeper import Keeper
from ._failover_pages import Pages
from ._failover_primary import Frames, Primary, fitted
from ._failover_relay import relay
from ._failover_routes import Routes
from ._failover_standby import Standby
from ._failover_stopwatch import Stopwatch

_KEY: Final[Callable[[Any], bytes]] = attrgetter("key")


class FailoverStore:
    """A primary store with a standby for outages.

    Args:
        primary: The store to use; its clock and name are this one's.
        standby: Serves while the primary can't be reached; None: calls then fail at once with the primary's last error.
        prefix: What every key starts with. Cleared as a whole in the primary when the journal overflows, and in the
            standby when the primary is back.
        standby_ttl: Seconds that anything stays in the standby at most; more than 0, ``math.inf``: no bound of its own.
        failures: Round trips in a row, to one part, that fail or are slow and open its breaker; at least 1. At the
            first contact, and while another part is away, one is enough.
        slow_after: Seconds from which on a round trip of no more than 64 KiB is slow; more than 0, ``math.inf``: none
            is. Time for which this process held up its own event loop does not count.
        probe_after: Seconds to the first probe, shortened at random by up to half; doubled with each probe that fails.
        probe_max: Seconds between probes at most.
        max_journal: Deletes remembered one by one, for a primary that is away; beyond, the prefix is cleared.
        recent: Seconds for which confirmed changes are remembered, for a server that takes the primary's place.
        journal: Tells this primary from others whose caches share the standby; such as its address.
        clock: Seconds since the epoch.
        rng: Returns floats from [0, 1); for the jitter.
        on_state: Called on the event loop with the old and the new state (see ``StoreState``).

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        primary: Store,
        standby: Store | None,
        *,
        prefix: bytes = b"mcp_hub:",
        standby_ttl: float = 60.0,
        failures: int = 3,
        slow_after: float = 0.25,
        probe_after: float = 0.5,
        probe_max: float = 15.0,
        max_journal: int = 10_000,
        recent: float = 60.0,
        journal: str = "",
        clock: Callable[[], float] = time.time,
        rng: Callable[[], float] = random.random,
        on_state: Callable[[str, str], None] | None = None,
    ) -> None:
        self.id = next_store_id()
        self.name = primary.name
        # The primary's, whoever serves: lanes say what may share a batch, and nothing about order.
        self.lane: Callable[[bytes], Hashable] = primary.lane
        if not slow_after > 0:
            raise ValueError(f"slow_after must be more than 0 seconds, not {slow_after!r}")
        self.retimed: Retimed = retimed  # see ``Retiming``
        self._standby = None if standby is None else Standby(standby, standby_ttl, lambda: self.retimed)
        self._journal = Journal(prefix, max_journal)

        def breaker() -> Breaker:
            return Breaker(failures=failures, probe_after=probe_after, probe_max=probe_max, clock=clock, rng=rng)

        breaker()  # so that wrong numbers are told now
        self._health = Health(primary.name, self._standby, breaker, clock)
        self._health.on_state = on_state
        self._keeper = Keeper(
            primary,
            self._standby,
            health=self._health,
            prefix=prefix,
            backoff=Backoff(probe_after, probe_max, rng),
            journal=self._journal,
            pages=None if standby is None else Pages(standby, self._journal, prefix=prefix, name=journal),
            recent=Recent(recent, max_journal, clock),
            slow_after=slow_after,
        )
        self._keeper.on_epoch = self.distrust
        if isinstance(primary, Replaceable):
            primary.on_replaced = self._keeper.replaced
        self._primary = Primary(primary, self._keeper, self._journal)
        self._routes = Routes(self._primary, self._health, self._keeper)
        self._store = primary
        self._answers_with_futures = not (
            inspect.iscoroutinefunction(primary.get_many) or inspect.iscoroutinefunction(primary.write_many)
        )
        self._has_leases = isinstance(primary, Leases)
        # Looked at once: isinstance with a protocol is slow, and stamps are taken on every hit.
        self._primary_feed = _coherent(primary)
        self._standby_feed = _coherent(standby)

    @property
    def on_state(self) -> Callable[[str, str], None] | None:
        """Called with the old and the new state."""
        return self._health.on_state

    @on_state.setter
    def on_state(self, heard: Callable[[str, str], None] | None) -> None:
        self._health.on_state = heard

    def state(self) -> StoreState:
        """See ``Monitored.state``."""
        return self._health.state()

    @property
    def serving(self) -> str:
        """See ``Monitored.serving``: the standby only where no part of the primary serves."""
        return self._routes.serving().name

    def now(self) -> float:
        """The serving store's clock; see ``Store.now``."""
        return self._routes.serving().now() if self._health.away else self._store.now()

    # Reading

    def get_many(self, keys: Sequence[bytes], /) -> Awaitable[Frames]:
        """See ``Store.get_many``."""
        # What most calls are: asked within the caller's step, and answered without a task.
        if self._answers_with_futures and self._is_calm():
            stopwatch = self._keeper.stopwatch
            asked = self._store.get_many(keys)
            return relay(asked, partial(self._got, keys, stopwatch, stopwatch.start()))
        return self._routes.each(keys, bytes, self._get)

    def _got(
        self, keys: Sequence[bytes], stopwatch: Stopwatch, started: float, asked: asyncio.Future[Frames]
    ) -> Frames | Coroutine[Any, Any, Frames]:
        seconds = stopwatch.stop(started)
        lane = self.lane(keys[0]) if keys else None
        if not asked.cancelled() and asked.exception() is None:
            self._primary.heard("get", lane, seconds, asked.result())
            if not len(self._journal):
                return asked.result()
        return self._get(keys, lane, asked)

    async def _get(self, keys: Sequence[bytes], lane: Hashable, asked: Awaitable[Frames] | None = None) -> Frames:
        return await self._routes.either(
            lambda primary: primary.get_many(keys) if asked is None else primary.read("get", asked, keys),
            lambda standby: standby.get_many(keys),
            lane,
        )

    def _is_calm(self) -> bool:
        return self._keeper.is_ready and not self._health.away and not len(self._journal)

    async def head_many(self, keys: Sequence[bytes], /) -> Frames:
        """See ``Store.head_many``."""
        return await self._routes.each(
            keys,
            bytes,
            lambda part, lane: self._routes.either(
                lambda primary: primary.head_many(part), lambda standby: standby.head_many(part), lane
            ),
        )

    async def scan(self, prefix: bytes, /) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        """See ``Store.scan``. Where the primary fails half-way, the standby's pages follow."""
        if not self._keeper.is_ready:
            await self._keeper.get_ready()
        if None not in self._health.away:
            try:
                async with aclosing(self._primary.scan(prefix)) as pages:
                    async for page in pages:
                        yield page
            except StoreError as error:
                standby = self._routes.instead(error, None)
            else:
                return
        else:
            standby = self._routes.away(None)
        async with aclosing(standby.scan(prefix)) as pages:
            async for page in pages:
                yield page

    # Beginning and writing

    async def begin_many(self, keys: Sequence[bytes], /, *, hold: float) -> list[Begun]:
        """See ``Store.begin_many``. The fence is of the store that answered, and good while it serves."""
        return await self._routes.each(
            keys,
            bytes,
            lambda part, lane: self._routes.either(
                lambda primary: primary.begin_many(part, hold=hold),
                lambda standby: standby.begin_many(part, hold=hold),
                lane,
            ),
        )

    def write_many(self, writes: Sequence[Write], /) -> Awaitable[list[Outcome]]:
        """See ``Store.write_many``. What the primary can't be told is written to the standby, unless it has a fence."""
        if self._answers_with_futures and self._is_calm():
            sent = fitted(writes, self.id, self._store)
            if all([write.fence is None or write.fence.store == self._store.id for write in sent]):  # noqa: C419
                stopwatch = self._keeper.stopwatch
                asked = self._store.write_many(sent)
                return relay(
                    asked,
                    partial(self._wrote, sent, self.lane(sent[0].key) if sent else None, stopwatch, stopwatch.start()),
                )
        return self._routes.each(writes, _KEY, self._write)

    def _wrote(
        self,
        writes: Sequence[Write],
        lane: Hashable,
        stopwatch: Stopwatch,
        started: float,
        asked: asyncio.Future[list[Outcome]],
    ) -> list[Outcome] | Coroutine[Any, Any, list[Outcome]]:
        seconds = stopwatch.stop(started)
        try:
            answers: list[Outcome] | StoreError = asked.result()
        except StoreError as error:
            answers = error
        except BaseException:
            self._primary.note(writes)
            raise
        if not writes:
            return []
        outcomes = self._primary.changed("write", writes, answers, seconds, lane)
        if not isinstance(answers, StoreError) and answers.count("done") == len(writes):
            return answers
        return self._elsewhere(writes, outcomes, lane)

    async def _write(self, writes: Sequence[Write], lane: Hashable) -> list[Outcome]:
        if not self._keeper.is_ready:
            await self._keeper.get_ready()
        if lane in self._health.away:
            self._keeper.note(write.key for write in writes if write.is_change)
            standby = self._routes.away(lane)
            try:
                return await standby.write_many(fitted(writes, self.id, standby.store))
            finally:
                await self._keeper.save()
        outcomes = await self._primary.change("write", self._store.write_many, fitted(writes, self.id, self._store))
        return await self._elsewhere(writes, outcomes, lane)

    async def _elsewhere(self, writes: Sequence[Write], outcomes: list[Outcome], lane: Hashable) -> list[Outcome]:
        away = [
            at
            for at, outcome in enumerate(outcomes)
            if isinstance(outcome, StoreError) and outcome.outage and writes[at].fence is None
        ]
        if away and (instead := self._health.stand_in(lane)) is not None:
            try:
                again = await instead.write_many([writes[at] for at in away])
            except StoreError:
                return outcomes
            finally:
                await self._keeper.save()
            for at, outcome in zip(away, again, strict=True):
                outcomes[at] = outcome
        return outcomes

    async def patch_many(self, patches: Sequence[Patch], /) -> list[Outcome]:
        """See ``Store.patch_many``."""
        return await self._routes.each(patches, _KEY, self._patch)

    async def _patch(self, patches: Sequence[Patch], lane: Hashable) -> list[Outcome]:
        if lane in self._health.away:
            standby = self._routes.away(lane)
            return await standby.patch_many(fitted(patches, self.id, standby.store))
        return await self._primary.change("patch", self._store.patch_many, fitted(patches, self.id, self._store))

    async def delete_many(self, keys: Sequence[bytes], /) -> Frames:
        """See ``Store.delete_many``. What fails is made up for before anything under these keys is read again."""
        return await self._routes.each(keys, bytes, self._delete)

    async def _delete(self, keys: Sequence[bytes], lane: Hashable) -> Frames:
        if lane in self._health.away:
            self._keeper.note(keys)
        try:
            return await self._routes.either(
                lambda primary: primary.delete_many(keys), lambda standby: standby.delete_many(keys), lane
            )
        finally:
            await self._keeper.save()

    async def clear(self, prefix: bytes, /) -> int:
        """See ``Store.clear``. Made up for like a delete."""
        if None in self._health.away:
            self._keeper.note_prefix(prefix)
        try:
            return await self._routes.either(
                lambda primary: primary.clear(prefix), lambda standby: standby.clear(prefix)
            )
        finally:
            await self._keeper.save()

    # The stores themselves

    async def ping(self, lane: Hashable = None, /) -> None:
        """Ask the primary, whoever serves. An answer while the breaker is open has it probed at once."""
        await self._primary.ping(lane)
        if self._health.away:
            self._keeper.wake()

    async def info(self) -> Mapping[str, str | int | float]:
        """The primary's facts, or the standby's while it serves; and how the breaker and the journal are."""
        facts = await self._routes.either(lambda primary: primary.info(), lambda standby: standby.store.info())
        return {**facts, **self._health.facts(), "journal": len(self._journal)}

    async def aclose(self) -> None:
        """End the background task and close both stores. What is journalled stays, for the next loop."""
        async with AsyncExitStack() as closing:  # the last first
            if self._standby is not None:
                closing.push_async_callback(self._standby.store.aclose)
            closing.push_async_callback(self._keeper.aclose)  # what was under way has failed just now, and is noted
            closing.push_async_callback(self._primary.store.aclose)
            await self._keeper.aclose()

    # Coherent

    def stamp(self, key: bytes, /) -> int | None:
        """See ``Coherent.stamp``."""
        slot = self.slot(key)
        return None if slot is None else slot.stamp()

    def slot(self, key: bytes, /) -> Slot | None:
        """See ``Coherent.slot``: that of the store that serves now."""
        feed = self._feed(key)
        return None if feed is None else feed.slot(key)

    def distrust(self) -> None:
        """See ``Coherent.distrust``."""
        for feed in (self._primary_feed, self._standby_feed):
            if feed is not None:
                feed.distrust()

    def _feed(self, key: bytes) -> Coherent | None:
        if not self._health.away or (lane := self.lane(key)) not in self._health.away:
            return self._primary_feed
        return None if self._health.stand_in(lane) is None else self._standby_feed

    async def changed(self, key: bytes, stamp: int, /) -> None:
        """See ``Coherent.changed``. Every new epoch wakes."""
        feed = self._feed(key)
        if feed is None or feed.stamp(key) != stamp:
            return
        waits = [self._keeper.epoch_end(), asyncio.ensure_future(feed.changed(key, stamp))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    # Leases and Used

    async def used_many(self, keys: Sequence[bytes], /) -> None:
        """See ``Used.used_many``: in the store that serves."""

        async def used(part: Sequence[bytes], lane: Hashable) -> list[None]:
            await self._routes.either(
                lambda primary: primary.used_many(part), lambda standby: standby.used_many(part), lane
            )
            return [None] * len(part)

        await self._routes.each(keys, bytes, used)

    async def renew_many(self, held: Sequence[Held], /, *, hold: float) -> list[bool]:
        """See ``Leases.renew_many``. A lease of a store that can't be asked now counts as lost."""

        async def renew(part: Sequence[Held], lane: Hashable) -> list[bool]:
            renewed = [False] * len(part)
            part = fitted(part, self.id, self._routes.side(lane))
            for store, places in self._issuers(part, lane):
                try:
                    answers = await store.renew_many([part[at] for at in places], hold=hold)
                except StoreError:
                    continue
                for at, answer in zip(places, answers, strict=True):
                    renewed[at] = answer
            return renewed

        return await self._routes.each(held, _KEY, renew)

    async def release_many(self, held: Sequence[Held], /) -> None:
        """See ``Leases.release_many``. What the primary can't be told now is noted: others would wait for it."""

        async def release(part: Sequence[Held], lane: Hashable) -> list[None]:
            part = fitted(part, self.id, self._routes.side(lane))
            left = [one.key for one in part if self._has_leases and one.fence.store == self._store.id]
            for store, places in self._issuers(part, lane):
                try:
                    await store.release_many([part[at] for at in places])
                except StoreError:
                    continue
                if store is self._primary:
                    left = []
            if left:
                self._keeper.note(left)
            return [None] * len(part)

        await self._routes.each(held, _KEY, release)

    def _issuers(self, held: Sequence[Held], lane: Hashable) -> list[tuple[Primary | Standby, list[int]]]:
        """The stores that can be asked now, each with the places in *held* that are its own."""
        asked = [self._primary if lane not in self._health.away else None, self._health.stand_in(lane)]
        able = [side for side in asked if side is not None and isinstance(side.store, Leases)]
        own = [(side, [at for at, one in enumerate(held) if one.fence.store == side.store.id]) for side in able]
        return [(side, places) for side, places in own if places]


def _coherent(store: object) -> Coherent | None:
    return store if isinstance(store, Coherent) else None
