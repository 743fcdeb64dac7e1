"""The engine: what belongs to an event loop. ``Reads``, ``Writes``, ``Loads`` and ``Upkeep`` work through it.

Strategy: all loop-bound parts stand in one ``Session``, opened when it is first asked for. Keys are whole store keys
from here on down; ``Cache`` makes them of names.

Rules:
- Trouble with the store never reaches a caller. A read that fails is a miss, a write that fails is counted. Where it
  was asked for, ``trouble`` raises what a person must put right, instead of letting a call go on: last, when whatever
  had to be removed is removed; and never in place of what a loader has yielded or raised already.
- Only a fresh, intact entry of exactly the key that was asked for is a hit, whatever the store answers.
- An own delete, set or clear also detaches the load in this process, so that it wins even while the store can't be
  reached.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final, TypeVar, cast

from ._blake import blake2b
from ._budget import UNBOUNDED, Budget, Unbounded
from ._changes import Part
from ._codec import DecodeError, Limits
from ._direct import Direct
from ._exceptions import StoreError, StoreMisconfiguredError
from ._flight import Flights
from ._form import Form
from ._frame import Kind
from ._l1 import L1
from ._leases import Rests, Rivals
from ._lifetime import PerLoop
from ._lines import Lines
from ._marks import Marks
from ._near import Near
from ._placeholders import Placeholders
from ._protocols import Coherent, Immediate, Monitored, Observer, Retiming, Store, Switching, Used
from ._tokens import draw
from ._use import Use

T = TypeVar("T")

log = logging.getLogger("mcp_hub_cache")

_MAX_WARNED: Final = 1000
CHUNK: Final = 128  # of a call with many keys: each chunk has the deadline to itself
_ENTRY: Final = int(Kind.ENTRY)  # an Enum's members are looked up slowly
_SLICE: Final = 2000  # entries of L1 looked at before the loop may turn


class Session:
    """What belongs to one event loop."""

    __slots__ = (
        "behind",
        "claims",
        "flights",
        "is_closing",
        "is_direct",
        "l1",
        "lines",
        "loop",
        "marks",
        "placeholders",
        "rests",
        "rivals",
        "tasks",
        "use",
    )

    def __init__(  # noqa: PLR0917  # its parts
        self,
        loop: asyncio.AbstractEventLoop,
        lines: Lines | Direct,
        l1: L1[Near],
        placeholders: Placeholders,
        marks: Marks,
        rivals: Rivals,
        rests: Rests,
    ) -> None:
        self.loop = loop
        self.lines = lines
        self.is_direct = isinstance(lines, Direct)
        self.flights = Flights(loop)
        self.l1 = l1
        self.placeholders = placeholders
        self.marks = marks
        self.rivals = rivals
        self.rests = rests
        self.is_closing = False
        self.claims: dict[bytes, object] = {}  # by key, the set that is to be handed on, unless another change comes
        self.behind = 0  # refreshes in the background
        self.tasks: set[asyncio.Task[Any]] = set()
        self.use: Use | None = None

    def forget(self, key: bytes) -> None:
        """Let go of what is known of *key*: it changes now. Loads in progress serve those who wait, and no one else."""
        self.flights.detach(key)
        self.l1.drop(key)
        if self.claims:
            self.claims.pop(key, None)

    def forget_loads(self, prefix: bytes) -> None:
        """The same of every key that begins with *prefix*, but for what is near: that takes its time."""
        self.flights.detach_all(prefix)
        for key in [key for key in self.claims if key.startswith(prefix)]:
            del self.claims[key]

    async def drop_prefix(self, prefix: bytes) -> None:
        """Drop every key that begins with *prefix* from L1, in slices."""
        keys = self.l1.snapshot()
        for start in range(0, len(keys), _SLICE):
            for key in keys[start : start + _SLICE]:
                if key.startswith(prefix):
                    self.l1.drop(key)
            if start + _SLICE < len(keys):
                await asyncio.sleep(0)

    def run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start *work* in a task that goes on if its caller is cancelled, and ends with the session."""
        task = asyncio.create_task(work, name="mcp-hub-cache work")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task


class Engine:
    """The session of one store, and who is told of trouble with it. See the module for the rules.

    Attributes:
        session: Returns what belongs to the running loop, opened now if it is not yet.
    """

    def __init__(
        self,
        store: Store,
        *,
        timeout: float,
        l1_max_entries: int,
        l1_max_bytes: int,
        observers: tuple[Observer, ...],
        form: Form,
        limits: Limits,
        prefix: bytes = b"",
        raises: bool = False,
        draw: Callable[[], float] = draw,
    ) -> None:
        self._namespace_at = len(prefix)
        self._raises = raises
        self.draw = draw
        self.store = store
        self.form = form
        self.limits = limits
        self.observers = observers
        self.timeout = timeout
        self._l1_size = (l1_max_entries, l1_max_bytes)
        # None: there is no L1. Looked at once, since isinstance with a protocol is slow.
        self._coherent = store.slot if isinstance(store, Coherent) else None
        self.slot = self._coherent if all(self._l1_size) else None
        self.monitored = store if isinstance(store, Monitored) else None
        self.tier = store.name
        if isinstance(store, Switching):
            store.on_state = self._switched
        if isinstance(store, Retiming):
            store.retimed = form.retimed
        self._warned: set[str] = set()
        self._sessions: PerLoop[Session] = PerLoop(self._open, owner=f"this {store.name} cache", close=self._close)
        self.session = self._sessions.get
        # The store's call, bound once: a line tells kinds of requests apart by their call.
        self.store_get = store.get_many
        self.now = store.now

    def _open(self, loop: asyncio.AbstractEventLoop) -> Session:
        lines: Lines | Direct
        if "immediate" in vars(type(self.store)):  # of the class itself: one derived from it may do otherwise
            lines = Direct(loop, cast("Immediate", self.store))
        else:
            lines = Lines(loop, self.store.lane, deadline=self.timeout)
        session = Session(
            loop,
            lines,
            L1(*self._l1_size),
            Placeholders(self.store, lines, self.trouble),
            Marks(self.store, lines, self._coherent, self.trouble),
            Rivals(self.store, lines),
            Rests(self.store.now),
        )
        if isinstance(self.store, Used):
            session.use = Use(loop, self.store, session.l1, session.marks, session.run)
        return session

    async def _close(self, session: Session) -> None:
        if session.use is not None:
            session.use.end()
        waits: list[Callable[[], Coroutine[Any, Any, None]]] = [
            session.flights.aclose,
            partial(self._wait_for_tasks, session),
        ]
        if not session.is_closing:  # cut off, it is begun anew (``PerLoop``): what goes on for others is to end well
            session.is_closing = True
            for wait in waits:
                await wait()
            waits.clear()
        # In this order read from below, and each step whatever became of the one before: a close that is cancelled half
        # way, as by the end of the program, would leave connections open.
        async with AsyncExitStack() as steps:
            steps.push_async_callback(self.store.aclose)
            steps.callback(session.l1.clear)
            steps.push_async_callback(session.lines.aclose)
            steps.push_async_callback(session.placeholders.aclose)  # after all who may plant one
            steps.push_async_callback(self._end_tasks, session)
            for wait in reversed(waits):
                steps.push_async_callback(wait)

    async def _wait_for_tasks(self, session: Session) -> None:
        if session.tasks:
            await asyncio.wait(session.tasks, timeout=self.timeout)

    async def _end_tasks(self, session: Session) -> None:
        for task in session.tasks:
            task.cancel()
        await asyncio.gather(*session.tasks, return_exceptions=True)

    def budget(self, session: Session, spent: float = 0.0) -> Budget | Unbounded:
        """Return the budget of one operation, of which so many seconds are spent already."""
        return UNBOUNDED if session.is_direct else Budget(session.loop, self.timeout, spent)

    def _switched(self, old: str, new: str) -> None:
        self.tier = self.store.name if self.monitored is None else self.monitored.serving
        self.tell_all(lambda observer: observer.state(old, new))

    async def aclose(self) -> None:
        """End every task and give back everything of the running loop."""
        await self._sessions.aclose()

    def l1_figures(self) -> tuple[int, int]:
        """Entries and bytes that the near cache holds."""
        session = self._sessions.peek()
        return (0, 0) if session is None else (len(session.l1), session.l1.size_bytes)

    def root(self, key: bytes) -> bytes:
        """What all keys of the namespace of *key* begin with; a namespace holds no colon."""
        return key[: key.index(b":", self._namespace_at) + 1]

    def part(self, key: bytes) -> Part | None:
        """The state of the counter of *key* now; None where nothing tells of changes now."""
        slot = self._coherent(key) if self._coherent is not None else None
        return None if slot is None else slot.part()

    # Trouble

    def trouble(self, *errors: StoreError) -> None:
        """Count errors of the store, and log them once per kind.

        Raises:
            StoreMisconfiguredError: One of them is, and the cache is to raise those.
        """
        for error in errors:
            self.tell_all(lambda observer, kind=error.kind: observer.error(kind))  # type: ignore[misc]  # bound now
            if self.monitored is None:  # such a store says it itself
                self.warn_once(f"store {error.kind}", f"{self.store.name} cache: {error}")
        if self._raises:
            for error in errors:
                if isinstance(error, StoreMisconfiguredError):
                    raise error.again() from error.__cause__

    def damaged(self, key: bytes, reason: str, error: Exception) -> None:
        """Count what stands under *key* and can't be read, and log it once, by digest."""
        self.tell_all(lambda observer: observer.error(reason))
        digest = blake2b(key, digest_size=8).hexdigest()
        hint = f" ({error}; was it stored with another as_type?)" if isinstance(error, DecodeError) else ""
        self.warn_once(f"{digest} {reason}", f"entry with key digest {digest} is {reason}{hint}; treated as a miss")

    def tell_all(self, tell: Callable[[Observer], None]) -> None:
        """Call *tell* with every observer."""
        for observer in self.observers:
            tell(observer)

    def warn_once(self, topic: str, text: str) -> None:
        """Log *text*, the first time that there is one on *topic*."""
        if topic not in self._warned and len(self._warned) < _MAX_WARNED:
            self._warned.add(topic)
            log.warning("%s", text)


async def every(futures: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """The results of all, ``StoreError``s among them."""
    results = await asyncio.gather(*futures, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, StoreError):
            raise result
    return results
