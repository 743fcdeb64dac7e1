"""Keeps an eye on a primary: what it has still to be told, and when it is back.

Strategy: calls report how they ended; what follows from that is decided in ``_failover_health``. All state is
synchronous and bound to no loop. One task per loop runs while there is something to do, and only then: it probes what
is away, and has what is left in the journal replayed (``_failover_replay``) for what is there.

Rules:
- A probe pings, reads what neighbours have left in the journal, replays what concerns that part, has the standby's
  leftovers dropped if no other part is away, and closes the breaker, in this order.
- A primary that answers pings but takes no deletes now (read-only, busy) is back all the same: the journal covers what
  it missed. The whole of it is cleared, where that is noted, when all of it is there.
- Whatever a store raises in a probe, the probe has failed and the next one comes.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping

from .._exceptions import StoreError, StorePermissionError, StoreTimeoutError, StoreUnreachableError
from .._lifetime import PerLoop
from .._protocols import Store
from ._failover_breaker import Backoff
from ._failover_health import Health, Part, refuses
from ._failover_journal import Journal, Recent
from ._failover_pages import Pages
from ._failover_replay import Replay
from ._failover_standby import Standby
from ._failover_stopwatch import Stopwatch

_log = logging.getLogger("mcp_hub_cache")


class _Session:
    """What belongs to one event loop."""

    __slots__ = ("hurry", "lock", "reading", "stopwatch", "task", "waiters", "wake")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.task: asyncio.Task[None] | None = None
        self.reading: asyncio.Task[None] | None = None
        self.wake = asyncio.Event()
        self.hurry = False  # look at all that are away, due or not
        self.lock = asyncio.Lock()
        self.waiters: set[asyncio.Future[None]] = set()
        self.stopwatch = Stopwatch(loop)


class Keeper:
    """The health of a primary, and its way back.

    Args:
        primary: The store to watch.
        standby: What serves instead; None: nothing does.
        health: Told what is heard of the primary.
        prefix: What every key starts with.
        backoff: Of replays to what is there.
        journal: What the primary has still to be told.
        pages: The same, written down; None: nowhere.
        recent: What it has confirmed lately.
        slow_after: Seconds from which on a small round trip is as good as failed.

    Attributes:
        is_ready: Whether it is known what other processes had still to tell.
        on_epoch: Called with every switch, failed round trip and new note.
    """

    def __init__(
        self,
        primary: Store,
        standby: Standby | None,
        *,
        health: Health,
        prefix: bytes,
        backoff: Backoff,
        journal: Journal,
        pages: Pages | None,
        recent: Recent,
        slow_after: float,
    ) -> None:
        self.on_epoch: Callable[[], None] | None = None
        self.health = health
        self.is_ready = pages is None
        self.slow_after = slow_after
        self._primary = primary
        self._standby = standby
        self._prefix = prefix
        self._backoff = backoff
        self._journal = journal
        self._pages = pages
        self._replay = Replay(primary, journal, recent)
        self._sessions = PerLoop(
            _Session,
            owner=f"the failover of the {primary.name} store",
            close=_end_session,
            at_loop_end=False,
        )

    # Epochs

    def _begin_epoch(self) -> None:
        if self.on_epoch is not None:
            self.on_epoch()
        if (session := self._sessions.peek()) is not None:
            for future in list(session.waiters):
                if not future.done():
                    future.set_result(None)

    def epoch_end(self) -> asyncio.Future[None]:
        """Return a future that is done with this epoch; to be cancelled by who no longer waits."""
        waiters = self._sessions.get().waiters
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters.add(future)
        future.add_done_callback(waiters.discard)
        return future

    # What calls report

    @property
    def stopwatch(self) -> Stopwatch:
        """What the running loop's round trips are measured with."""
        return self._sessions.get().stopwatch

    def was_slow(self, name: str, lane: Hashable, seconds: float) -> None:
        """A call by that *name* brought an answer, but took so long. As good as failed: its caller has waited."""
        self.failed(name, self._slowness(seconds), lane, late=True)

    def _slowness(self, seconds: float) -> StoreError:
        return StoreTimeoutError(
            f"{self._primary.name.capitalize()} takes {seconds:.2f} s to answer, more than {self.slow_after:g} s.",
            cure="Check what keeps the server or the network busy, or raise CACHE_SLOW_AFTER.",
        )

    def failed(self, name: str, error: StoreError, lane: Hashable, *, late: bool = False) -> None:
        """A call by that *name* to the part for *lane* failed. *late*: it brought an answer."""
        part = self.health.part(lane)
        if part.breaker.state != "closed":
            return
        served = part.problem is None
        if error.outage and not late:
            self._begin_epoch()
        if self.health.failed(name, error, lane, late=late):
            if self._standby is not None and served:
                self._standby.begin_outage()
            self._begin_epoch()
            if (session := self._sessions.peek()) is not None:
                session.wake.set()  # its probe may be due before what is waited for
        self.watch()

    def note(self, keys: Iterable[bytes]) -> None:
        """What the primary holds under *keys* must go: journal it."""
        keys = list(keys)
        self._journal.add(keys)
        self._write_down()
        # While the standby serves them, its own stamps tell what changes.
        if not self.health.away or any(self._primary.lane(key) not in self.health.away for key in keys):
            self._begin_epoch()

    def note_prefix(self, prefix: bytes) -> None:
        """The same for everything under *prefix*."""
        self._journal.add_prefix(prefix)
        self._write_down()
        if not self.health.all_away:
            self._begin_epoch()

    def _write_down(self) -> None:
        """Begin at once: who has made the note may be cancelled before he could wait for it."""
        if self._pages is not None and self._pages.is_behind and self._sessions.peek() is not None:
            self._pages.begin()

    async def save(self) -> None:
        """Return when what was noted is written down, where it is; see ``Pages.save``."""
        if self._pages is not None and self._pages.is_behind:
            await self._pages.save()

    def stored(self, keys: Iterable[bytes]) -> None:
        """The primary holds something new under *keys*. Some may be of another part by that, which is away."""
        if self._standby is not None and self.health.away:
            self._standby.distrust(keys)

    def set(self, heads: Mapping[bytes, bytes]) -> None:
        """The primary has confirmed that it has set the keys of *heads*, each to what has that head."""
        self._replay.recent.set(heads)
        self.stored(heads)

    def deleted(self, keys: Collection[bytes]) -> None:
        """The primary has confirmed that it has deleted *keys*."""
        self._replay.recent.deleted(keys)
        self._journal.deleted(keys)
        self.stored(keys)

    def cleared(self, prefix: bytes) -> None:
        """The primary clears *prefix*. To be said before, since another may take its place half-way, and after."""
        self._replay.recent.cleared(prefix)

    def replaced(self) -> None:
        """The primary is another server than before: what the last one confirmed it may never have heard of."""
        keys, heads, prefixes = self._replay.recent.take()
        if not (keys or heads or prefixes):
            return
        _log.info(
            "%s is another server than before: what was deleted lately is deleted again (%d keys), what was set is "
            "looked at (%d)",
            self._primary.name.capitalize(),
            len(keys),
            len(heads),
        )
        self.note(keys)
        for prefix in prefixes:
            self.note_prefix(prefix)
        self._journal.check(heads)
        self._begin_epoch()
        self.wake()

    # Coming back

    def watch(self) -> None:
        """See to it that the task runs if there is work for it."""
        if not self._is_needed():
            return
        session = self._sessions.get()
        if session.task is None or session.task.done():
            session.task = asyncio.get_running_loop().create_task(self._keep(session), name="mcp_hub_cache failover")

    def _is_needed(self) -> bool:
        return bool(self.health.away) or len(self._journal) > 0 or self._is_unread()

    def _is_unread(self) -> bool:
        return self._pages is not None and self._pages.is_unread

    def wake(self) -> None:
        """Probe, or replay, now: somebody else has found the primary alive."""
        self.watch()
        session = self._sessions.get()
        session.hurry = True
        session.wake.set()

    async def get_ready(self) -> None:
        """Return when it is known what other processes had still to tell the primary: nothing is believed before."""
        session = self._sessions.get()
        reading = session.reading
        if reading is None or reading.done():  # and has failed
            reading = asyncio.get_running_loop().create_task(self._read(), name="mcp_hub_cache journal")
            session.reading = reading
        await asyncio.wait([reading])
        if reading.cancelled():
            raise StoreUnreachableError("the store was closed while it was asked.")
        reading.result()

    async def _read(self) -> None:
        if self._pages is not None and await self._pages.load() and len(self._journal):
            _log.info(
                "%s has still to be told of %d deletes from before: they are made now",
                self._primary.name.capitalize(),
                len(self._journal),
            )
            self.wake()
        self.is_ready = True
        self.watch()

    async def _read_again(self) -> None:
        assert self._pages is not None
        try:
            found = await self._pages.load()
        except Exception:  # noqa: BLE001  # see the last rule
            _log.exception("unexpected error while reading the journal")
            return
        if found:
            self._begin_epoch()

    async def settle(self, keys: Collection[bytes]) -> None:
        """See to what is noted of *keys*, so that no replay touches what follows.

        Raises:
            StoreError: The primary could not be told, or a part of theirs has gone away.
        """
        async with self._sessions.get().lock:
            doubts = self._journal.doubts(keys)
            for lane in {self._primary.lane(key) for key in (*doubts.covered, *doubts.heads)}:
                if lane in self.health.away:
                    raise self.health.problem(lane)
                await self._ping(lane)
            await self._replay.settle(doubts)

    async def _keep(self, session: _Session) -> None:
        while self._is_needed():
            pause = min((part.breaker.until_probe() for part in self.health.away.values()), default=math.inf)
            due = [part for part in self.health.away.values() if part.breaker.until_probe() <= pause]
            has_work = self._is_unread() or (not self.health.all_away and self._has_work())
            if has_work and (wait := self._backoff.next()) < pause:
                pause, due = wait, []
            try:
                async with asyncio.timeout(pause):
                    await session.wake.wait()
                due = list(self.health.away.values()) if session.hurry else []
            except TimeoutError:
                pass
            session.wake.clear()
            session.hurry = False
            await self.save()
            for part in due:
                if part.lane in self.health.away:
                    await self._probe(session, part)
            if self._is_unread():
                await self._read_again()
            if not self.health.all_away and self._has_work():
                await self._catch_up(session)

    def _is_there(self, key: bytes) -> bool:
        return self._primary.lane(key) not in self.health.away

    def _has_work(self) -> bool:
        """Whether the journal holds something for the parts that are there."""
        return self._replay.has_work(self._is_there, everything=not self.health.away)

    async def _tell(self, session: _Session, among: Callable[[bytes], bool], *, everything: bool) -> None:
        await self._replay.run(session.lock, among, everything=everything)
        if self._pages is not None:
            await self._pages.prune()

    async def _catch_up(self, session: _Session) -> None:
        lane = self.health.a_lane()
        try:
            await self._ping(lane)
            await self._tell(session, self._is_there, everything=not self.health.away)
        except StoreError as error:
            self.failed("replay", error, lane)
        except Exception:  # noqa: BLE001  # see the last rule
            _log.exception("unexpected error while catching up with the %s store", self._primary.name)
        else:
            self.health.answered("replay", lane)
            self._backoff.reset()

    async def _probe(self, session: _Session, part: Part) -> None:
        lane = part.lane
        part.breaker.probe()
        try:
            await self._ping_in_time(session, lane)
            if self._pages is not None:
                await self._pages.load()
            notes, alone = len(self._journal), len(self.health.away) == 1
            try:
                await self._tell(
                    session, lambda key: self._is_there(key) or self._primary.lane(key) == lane, everything=alone
                )
            except StoreError as error:
                if error.outage or refuses(error):
                    raise
            if self._standby is not None and alone and not part.is_suspected:
                await self._standby.drop(self._prefix)
        except StoreError as error:
            self._probe_failed(part, error)
        except Exception as error:  # noqa: BLE001  # see the last rule
            _log.exception("unexpected error while probing the %s store", self._primary.name)
            self._probe_failed(part, StoreUnreachableError(f"unexpected {type(error).__name__} in the store."))
        except BaseException:
            # It may be collected with a loop that was closed under it, long after another has found the part again.
            if part.breaker.state == "half-open":
                part.breaker.probe_failed()
            raise
        else:
            self.health.is_back(part, max(notes - len(self._journal), 0))
            if self._standby is not None and self.health.away:
                # A key may come to be of another part: with its size, or a slot that moves. What stands in for those
                # that are still away must not be what stood in for this one.
                self._standby.begin_outage()
            self._backoff.reset()
            self._begin_epoch()

    def _probe_failed(self, part: Part, error: StoreError) -> None:
        suspected = part.is_suspected
        if self.health.still_away(part, error):
            if self._standby is not None and (part.problem is None or not suspected):
                self._standby.begin_outage()
            self._begin_epoch()

    async def _ping(self, lane: Hashable) -> None:
        try:
            await self._primary.ping(lane)
        except StorePermissionError:
            pass  # it is there; only PING is not for us

    async def _ping_in_time(self, session: _Session, lane: Hashable) -> None:
        started = session.stopwatch.start()
        try:
            await self._ping(lane)
        finally:
            took = session.stopwatch.stop(started)
        if took > self.slow_after:
            raise self._slowness(took)

    async def aclose(self) -> None:
        """End the running loop's tasks, with what was noted written down."""
        if self._sessions.peek() is not None:
            await self.save()
            if len(self._journal) and (self._pages is None or not self._pages.works):
                _log.warning(
                    "%s is still to be told of %d deletes: they are lost if this process ends before it is back",
                    self._primary.name.capitalize(),
                    len(self._journal),
                )
        await self._sessions.aclose()


async def _end_session(session: _Session) -> None:
    session.stopwatch.close()
    tasks = [task for task in (session.task, session.reading) if task is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for future in list(session.waiters):
        future.cancel()
