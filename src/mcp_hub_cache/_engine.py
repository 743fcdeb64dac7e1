"""The engine: what belongs to an event loop, and reading. ``Writes``, ``Loads`` and ``Upkeep`` work through it.

Strategy: all loop-bound parts stand in one ``Session``. A read asks L1, then the lines to the store. Keys are whole
store keys here; ``Cache`` makes them of names.

Rules:
- Trouble with the store never reaches a caller. A read that fails is a miss, a write that fails is counted.
- Only a fresh, intact entry of exactly the key that was asked for is a hit, whatever the store answers.
- An own delete, set or clear also detaches the load in this process, so that it wins even while the store can't be
  reached.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from ._classes import ClassSet
from ._codec import DecodeError, decode, is_immutable
from ._exceptions import StoreError
from ._flight import Flights
from ._frame import Frame, FrameError, Head, Kind, unpack, unpack_head
from ._l1 import L1
from ._lifetime import PerLoop
from ._lines import Lines
from ._placeholders import Placeholders
from ._policy import Freshness, freshness
from ._protocols import Coherent, Monitored, Observer, Store

T = TypeVar("T")

log = logging.getLogger("mcp_hub_cache")

_NOT_SHARED: Final = object()
_MAX_WARNED: Final = 1000
CHUNK: Final = 128  # of a call with many keys: each chunk has the deadline to itself


class Hit(NamedTuple):
    """A fresh value and the head it was stored with."""

    value: Any
    head: Head
    tier: str


class _Near(NamedTuple):
    frame: Frame
    stamp: int
    shared: Any  # the value, where it is immutable


class Session:
    """What belongs to one event loop."""

    __slots__ = ("flights", "l1", "lines", "placeholders", "tasks")

    def __init__(self, lines: Lines, l1: L1[_Near], placeholders: Placeholders) -> None:
        self.lines = lines
        self.flights = Flights()
        self.l1 = l1
        self.placeholders = placeholders
        self.tasks: set[asyncio.Task[Any]] = set()

    def forget(self, key: bytes) -> None:
        """Let go of what is known of *key*: it changes now. Loads in progress serve those who wait, and no one else."""
        self.flights.detach(key)
        self.l1.drop(key)

    def run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start *work* in a task that goes on if its caller is cancelled, and ends with the session."""
        task = asyncio.create_task(work, name="mcp-hub-cache work")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task


class Engine:
    """The session and the reads of one store. See the module for the rules."""

    def __init__(
        self,
        store: Store,
        *,
        timeout: float,
        l1_max_entries: int,
        l1_max_bytes: int,
        observers: tuple[Observer, ...],
    ) -> None:
        self.store = store
        self.observers = observers
        self.timeout = timeout
        self._l1_size = (l1_max_entries, l1_max_bytes)
        self._stamp = store.stamp if isinstance(store, Coherent) and all(self._l1_size) else None
        self.monitored = store if isinstance(store, Monitored) else None
        self._warned: set[str] = set()
        self._sessions: PerLoop[Session] = PerLoop(self._open, owner=f"this {store.name} cache", close=self._close)
        # The store's call, bound once: a line tells kinds of requests apart by their call.
        self._get = store.get_many

    def _open(self, loop: asyncio.AbstractEventLoop) -> Session:
        lines = Lines(loop, self.store.lane, deadline=self.timeout)
        return Session(lines, L1(*self._l1_size), Placeholders(self.store, lines, self.trouble))

    async def _close(self, session: Session) -> None:
        await session.placeholders.aclose()
        await session.flights.aclose()
        if session.tasks:
            await asyncio.wait(session.tasks, timeout=self.timeout)
        for task in session.tasks:
            task.cancel()
        await asyncio.gather(*session.tasks, return_exceptions=True)
        await session.lines.aclose()
        await self.store.aclose()

    def session(self) -> Session:
        """Return what belongs to the running loop, opened now if it is not yet."""
        return self._sessions.get()

    async def aclose(self) -> None:
        """End every task and give back everything of the running loop."""
        await self._sessions.aclose()

    def l1_figures(self) -> tuple[int, int]:
        """Entries and bytes that the near cache holds."""
        session = self._sessions.peek()
        return (0, 0) if session is None else (len(session.l1), session.l1.size_bytes)

    # Reading

    async def read(self, key: bytes, classes: ClassSet) -> Hit | None:
        """Return the fresh entry under *key*, or None."""
        hit, _ = await self.look_up(self.session(), key, classes)
        tell_read(hit, self.observers)
        return hit

    async def look_up(self, session: Session, key: bytes, classes: ClassSet) -> tuple[Hit | None, bool]:
        """As ``read``, uncounted; and whether the store could be asked at all."""
        stamp = None if self._stamp is None else self._stamp(key)
        if stamp is not None and (near := session.l1.get(key)) is not None:
            hit = self._near(near, stamp, classes)
            if hit is not None:
                return hit, True
            session.l1.drop(key)
        try:
            data = await session.lines.read(self._get, key, key)
        except StoreError as error:
            self.trouble(error)
            return None, False
        return self.accept(session, key, data, classes, stamp), True

    async def read_many(self, keys: Sequence[bytes], classes: ClassSet) -> dict[bytes, Hit]:
        """Return the fresh entries among *keys*."""
        session = self.session()
        hits: dict[bytes, Hit] = {}
        wanted = list(dict.fromkeys(keys))
        for start in range(0, len(wanted), CHUNK):
            await self._read_chunk(session, wanted[start : start + CHUNK], classes, hits)
        for key in wanted:
            tell_read(hits.get(key), self.observers)
        return hits

    async def _read_chunk(
        self, session: Session, keys: Sequence[bytes], classes: ClassSet, hits: dict[bytes, Hit]
    ) -> None:
        stamps: dict[bytes, int | None] = {}
        for key in keys:
            stamps[key] = stamp = None if self._stamp is None else self._stamp(key)
            near = session.l1.get(key) if stamp is not None else None
            hit = None if near is None or stamp is None else self._near(near, stamp, classes)
            if hit is not None:
                hits[key] = hit
        parts = session.lines.read_groups(self._get, [key for key in keys if key not in hits])
        for (part, _), answer in zip(parts, await every([future for _, future in parts]), strict=True):
            if isinstance(answer, StoreError):
                self.trouble(answer)
                continue
            for key, data in zip(part, answer, strict=True):
                hit = self.accept(session, key, data, classes, stamps[key])
                if hit is not None:
                    hits[key] = hit

    def _near(self, near: _Near, stamp: int, classes: ClassSet) -> Hit | None:
        head = near.frame.head
        if near.stamp != stamp or not self._is_fresh(head):
            return None
        if near.shared is not _NOT_SHARED:
            return Hit(near.shared, head, "l1")
        try:
            return Hit(decode(head.codec, near.frame.payload, classes), head, "l1")
        except DecodeError:
            return None  # stored for other classes: let the full path say so

    def accept(
        self, session: Session, key: bytes, data: bytes | None, classes: ClassSet, stamp: int | None
    ) -> Hit | None:
        """Verify what the store said to be under *key*; only a fresh, intact entry of that very key is a hit."""
        frame = self.fresh_frame(key, data)
        if frame is None:
            return None
        try:
            value = decode(frame.head.codec, frame.payload, classes)
        except DecodeError as error:
            self._damaged(key, "undecodable", error)
            return None
        if stamp is not None and data is not None:
            shared = value if is_immutable(value) else _NOT_SHARED
            evicted = session.l1.put(key, _Near(frame, stamp, shared), len(key) + len(data))
            if evicted:
                self._tell_all(lambda observer: observer.eviction(evicted))
        return Hit(value, frame.head, self.store.name if self.monitored is None else self.monitored.serving)

    def intact(self, key: bytes, data: bytes | None) -> Frame | None:
        """The entry's frame, None for placeholders, nothing and damage."""
        if data is None:
            return None
        try:
            frame = unpack(data, key)
        except FrameError as error:
            self._damaged(key, error.reason, error)
            return None
        return frame if frame.head.kind == Kind.ENTRY else None

    def fresh_frame(self, key: bytes, data: bytes | None) -> Frame | None:
        """The same, if it is fresh."""
        frame = self.intact(key, data)
        return frame if frame is not None and self._is_fresh(frame.head) else None

    def _is_fresh(self, head: Head) -> bool:
        return freshness(head, self.store.now()) is Freshness.FRESH

    async def head(self, key: bytes) -> Head | None:
        """Return the head of the fresh, intact entry under *key*, or None. Nothing is decoded."""
        session = self.session()
        try:
            frame = self.fresh_frame(key, await session.lines.read(self._get, key, key))
        except StoreError as error:
            self.trouble(error)
            return None
        return None if frame is None else frame.head

    def fresh_head(self, data: bytes | None) -> Head | None:
        """The head in *data*, if it is a fresh entry's."""
        try:
            head = None if data is None else unpack_head(data)
        except FrameError:
            return None
        return head if head is not None and head.kind == Kind.ENTRY and self._is_fresh(head) else None

    # Trouble

    def trouble(self, error: StoreError) -> None:
        """Count an error of the store, and log it once per kind and text."""
        self._tell_all(lambda observer: observer.error(error.kind))
        if self.monitored is None:  # such a store says it itself
            self.warn_once(f"store {error.kind}", f"{self.store.name} cache: {error}")

    def _damaged(self, key: bytes, reason: str, error: Exception) -> None:
        self._tell_all(lambda observer: observer.error(reason))
        digest = hashlib.blake2b(key, digest_size=8).hexdigest()
        hint = f" ({error}; was it stored with another as_type?)" if isinstance(error, DecodeError) else ""
        self.warn_once(f"{digest} {reason}", f"entry with key digest {digest} is {reason}{hint}; treated as a miss")

    def _tell_all(self, tell: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            tell(observer)

    def warn_once(self, topic: str, text: str) -> None:
        if topic not in self._warned and len(self._warned) < _MAX_WARNED:
            self._warned.add(topic)
            log.warning("%s", text)


OWNED: Final = bytes(8)
"""The mark of an owner: owners have none that changes."""


async def every(futures: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """The results of all, ``StoreError``s among them."""
    results = await asyncio.gather(*futures, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, StoreError):
            raise result
    return results


def tell_read(hit: Hit | None, observers: tuple[Observer, ...]) -> None:
    """Tell of one read; no *hit* is a miss."""
    for observer in observers:
        if hit is None:
            observer.miss()
        else:
            observer.hit(hit.tier)
            observer.saved(hit.head.cost)
