"""Keeps an eye on a primary: whether it serves, what it has still to be told, and when it is back.

Strategy: calls report how they ended; what follows from that is decided and logged here, once per change. All state is
synchronous and bound to no loop. One task per loop runs while there is something to do, and only then: it probes while
the breaker is open, and replays what is left in the journal while it is closed.

Rules:
- A probe pings, replays what the journal holds, has the standby's leftovers dropped, and closes the breaker, in this
  order.
- A primary that answers pings but takes no deletes now (read-only, busy) is back all the same: the journal covers what
  it missed.
- Deletes are replayed under a lock, in batches that are put together when it is held. So none is ever on its way for a
  key that somebody else has settled and written since.
- Whatever a store raises in a probe, the probe has failed and the next one comes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from typing import Final

from .._exceptions import (
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreMisconfiguredError,
    StorePermissionError,
    StoreReadOnlyError,
)
from .._lifetime import PerLoop
from .._protocols import Store, StoreState
from ._failover_breaker import Backoff, Breaker
from ._failover_journal import Journal
from ._failover_standby import Standby

_log = logging.getLogger("mcp_hub_cache")

_BATCH: Final = 256  # deletes replayed in one call
_DATA: Final = frozenset({"get", "head", "begin", "write", "patch", "delete"})
_ANSWERS: Final = (StoreBusyError, StoreFullError, StoreReadOnlyError, StorePermissionError)
_KINDS: Final = {"file": "file-based", "memory": "in-memory"}


class _Session:
    """What belongs to one event loop."""

    __slots__ = ("lock", "task", "waiters", "wake")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.wake = asyncio.Event()
        self.lock = asyncio.Lock()
        self.waiters: set[asyncio.Future[None]] = set()


class Keeper:
    """The health of a primary, and its way back.

    Args:
        primary: The store to watch.
        standby: What serves instead; None: nothing does.
        prefix: What every key starts with.
        breaker: Decides when to leave the primary alone.
        backoff: Of replays while the breaker is closed.
        journal: What the primary has still to be told.
        clock: Seconds since the epoch, for ``StoreState.since``.

    Attributes:
        on_epoch: Called with every switch, failed round trip and new note.
        on_state: Called with the old and the new state.
    """

    def __init__(
        self,
        primary: Store,
        standby: Standby | None,
        *,
        prefix: bytes,
        breaker: Breaker,
        backoff: Backoff,
        journal: Journal,
        clock: Callable[[], float],
    ) -> None:
        self.on_epoch: Callable[[], None] | None = None
        self.on_state: Callable[[str, str], None] | None = None
        self._primary = primary
        self._standby = standby
        self._prefix = prefix
        self._breaker = breaker
        self._backoff = backoff
        self._journal = journal
        self._clock = clock
        self._problem: StoreError | None = None  # why the breaker is open
        self._denied: dict[str, StoreError] = {}  # what permissions are missing for
        self._since: float | None = None
        self._sessions = PerLoop(
            lambda _: _Session(),
            owner=f"the failover of the {primary.name} store",
            close=_end_session,
            at_loop_end=False,
        )

    # How it is

    @property
    def up(self) -> bool:
        """Whether the primary serves."""
        return self._breaker.state == "closed"

    def stand_in(self) -> Standby | None:
        """Return what may serve in the primary's place."""
        return None if self._problem is not None and _refuses(self._problem) else self._standby

    def problem(self) -> StoreError:
        """Return why the primary does not serve, to be raised: a copy, since raising writes to an exception."""
        problem = self._problem
        assert problem is not None
        copy = type(problem).__new__(type(problem), *problem.args)
        copy.cure = problem.cure
        return copy

    def state(self) -> StoreState:
        """See ``Monitored.state``."""
        problem = self._problem
        if problem is None:
            problem = next((error for name, error in self._denied.items() if name in _DATA), None)
            if problem is None:
                return StoreState("healthy", self._since)
            return StoreState("misconfigured", self._since, str(problem))
        if _refuses(problem):
            return StoreState("misconfigured", self._since, str(problem))
        return StoreState("unhealthy" if self._standby is None else "degraded", self._since, str(problem))

    def _announce(self, old: StoreState) -> None:
        new = self.state().state
        if new != old.state:
            self._since = self._clock()
            if self.on_state is not None:
                self.on_state(old.state, new)

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

    def answered(self, name: str) -> None:
        """A call by that *name* brought an answer."""
        self._breaker.answered()
        if self._denied and name in self._denied:
            old = self.state()
            del self._denied[name]
            self._announce(old)

    def failed(self, name: str, error: StoreError) -> None:
        """A call by that *name* failed."""
        if not self.up:
            return
        old = self.state()
        if error.outage:
            self._begin_epoch()
            if self._standby is not None and not self._breaker.failed_in_a_row:
                self._standby.begin_outage()
            first = not self._breaker.contacted
            if self._breaker.failed():
                self._go_down(error, old, first=first)
        elif _refuses(error):
            first = not self._breaker.contacted
            self._breaker.trip()
            self._go_down(error, old, first=first)
        elif isinstance(error, _ANSWERS):
            self._breaker.answered()
            if isinstance(error, StorePermissionError):
                self._denied[name] = error
                if old.state == "healthy" and name in _DATA:
                    _log.error("%s refuses to serve the cache: %s", self._primary.name.capitalize(), error)
                self._announce(old)
        self.watch()

    def note(self, keys: Iterable[bytes]) -> None:
        """What the primary holds under *keys* must go: journal it."""
        self._journal.add(keys)
        if self.up:  # while the standby serves, its own stamps tell what changes
            self._begin_epoch()

    def note_prefix(self, prefix: bytes) -> None:
        """The same for everything under *prefix*."""
        self._journal.add_prefix(prefix)
        if self.up:
            self._begin_epoch()

    def _go_down(self, error: StoreError, old: StoreState, *, first: bool) -> None:
        self._problem = error
        self._begin_epoch()
        name, text = self._primary.name.capitalize(), str(error)
        if first:
            _log.error("Failed to initialize %s cache backend: %s", name, text)
        elif _refuses(error):
            _log.error("%s refuses to serve the cache: %s", name, text)
        else:
            # Stores tend to say so themselves.
            _log.error("%s connection failed: %s", name, text.removeprefix(f"{name} connection failed: "))
        if (standby := self.stand_in()) is not None:
            kind = standby.store.name
            _log.info("Falling back to %s cache", _KINDS.get(kind, kind))
        else:
            _log.info("No cache to fall back to: calls go through uncached")
        self._announce(old)

    # Coming back

    def watch(self) -> None:
        """See to it that the task runs if there is work for it."""
        if self.up and not len(self._journal):
            return
        session = self._sessions.get()
        if session.task is None or session.task.done():
            session.task = asyncio.get_running_loop().create_task(self._keep(session), name="mcp_hub_cache failover")

    def wake(self) -> None:
        """Probe now: somebody else has found the primary alive."""
        self.watch()
        self._sessions.get().wake.set()

    async def settle(self, keys: Collection[bytes]) -> None:
        """Delete in the primary those of *keys* that the journal covers, so that no replay touches what follows.

        Raises:
            StoreError: They could not be deleted, or the breaker has opened.
        """
        async with self._sessions.get().lock:
            if not self.up:
                raise self.problem()
            covered, serials = self._journal.among(keys), self._journal.serials(keys)
            if covered:
                await self._ping()
                await self._primary.delete_many(list(covered))
                self._journal.forget(serials)

    async def _keep(self, session: _Session) -> None:
        while not self.up or len(self._journal):
            try:
                async with asyncio.timeout(self._backoff.next() if self.up else self._breaker.until_probe()):
                    await session.wake.wait()
            except TimeoutError:
                pass
            session.wake.clear()
            if self.up:
                await self._catch_up(session)
            else:
                await self._probe(session)

    async def _catch_up(self, session: _Session) -> None:
        try:
            await self._ping()
            await self._replay(session)
        except StoreError as error:
            self.failed("replay", error)
        except Exception:  # noqa: BLE001  # see the last rule
            _log.exception("unexpected error while catching up with the %s store", self._primary.name)
        else:
            self.answered("replay")
            self._backoff.reset()

    async def _probe(self, session: _Session) -> None:
        self._breaker.probe()
        try:
            await self._ping()
            notes = len(self._journal)
            try:
                await self._replay(session)
            except StoreError as error:
                if error.outage or _refuses(error):
                    raise
            if self._standby is not None:
                await self._standby.drop(self._prefix)
        except StoreError as error:
            self._breaker.probe_failed()
            self._still_down(error)
        except BaseException as error:
            self._breaker.probe_failed()
            if not isinstance(error, Exception):
                raise
            _log.exception("unexpected error while probing the %s store", self._primary.name)
        else:
            self._back(notes - len(self._journal))

    async def _ping(self) -> None:
        try:
            await self._primary.ping()
        except StorePermissionError:
            pass  # it is there; only PING is not for us

    async def _replay(self, session: _Session) -> None:
        for prefix, serial in self._journal.prefixes().items():
            await self._primary.clear(prefix)
            self._journal.forget_prefix(prefix, serial)
        for _ in range(len(self._journal) // _BATCH + 1):  # what comes meanwhile is for the next time
            async with session.lock:
                batch = self._journal.oldest(_BATCH)
                if batch:
                    await self._primary.delete_many(list(batch))
                    self._journal.forget(batch)

    def _still_down(self, error: StoreError) -> None:
        problem = self._problem
        assert problem is not None
        if _refuses(problem) == _refuses(error):
            self._problem = error
            return
        if self._standby is not None:
            self._standby.begin_outage()
        self._go_down(error, self.state(), first=False)

    def _back(self, replayed: int) -> None:
        old = self.state()
        self._problem = None
        self._breaker.close()
        self._backoff.reset()
        self._begin_epoch()
        _log.info(
            "%s is back: it serves the cache again (%d deletes made up for)", self._primary.name.capitalize(), replayed
        )
        self._announce(old)

    async def aclose(self) -> None:
        """End the running loop's task."""
        if self._sessions.peek() is not None and len(self._journal):
            _log.warning(
                "%s is still to be told of %d deletes: they are lost if this process ends before it is back",
                self._primary.name.capitalize(),
                len(self._journal),
            )
        await self._sessions.aclose()


def _refuses(error: StoreError) -> bool:
    """Whether a person must change something before the store serves anything at all."""
    return isinstance(error, StoreMisconfiguredError) and not isinstance(error, StorePermissionError)


async def _end_session(session: _Session) -> None:
    if session.task is not None:
        session.task.cancel()
        await asyncio.gather(session.task, return_exceptions=True)
    for future in list(session.waiters):
        future.cancel()
