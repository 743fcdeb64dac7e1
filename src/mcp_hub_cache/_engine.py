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
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from ._blake import blake2b
from ._classes import ClassSet
from ._codec import BYTES, DecodeError, decode
from ._direct import Direct
from ._exceptions import StoreError
from ._flight import Flights
from ._frame import Frame, FrameError, Head, Kind, open_entry, sums, unpack, unpack_head
from ._l1 import L1, NOT_SHARED
from ._lifetime import PerLoop
from ._lines import Lines
from ._near import Near
from ._placeholders import Placeholders
from ._policy import SKEW, is_fresh
from ._protocols import Coherent, Monitored, Observer, Store, Switching
from ._steps import LARGE, copied, last

T = TypeVar("T")

log = logging.getLogger("mcp_hub_cache")

_MAX_WARNED: Final = 1000
CHUNK: Final = 128  # of a call with many keys: each chunk has the deadline to itself
_ENTRY: Final = int(Kind.ENTRY)  # an Enum's members are looked up slowly
_SLICE: Final = 2000  # entries of L1 looked at before the loop may turn


MISS: Final = object()
"""What ``Engine.fetch`` answers where there is no fresh value."""


class Hit(NamedTuple):
    """A fresh value and the head it was stored with."""

    value: Any
    head: Head
    tier: str
    near: Near | None = None  # of L1


# What ``Hit(...)`` does, without its frame of Python: a third of the time.
_hit: Final[Callable[[tuple[Any, Head, str, Near | None]], Hit]] = partial(tuple.__new__, Hit)


class Session:
    """What belongs to one event loop."""

    __slots__ = ("flights", "l1", "lines", "placeholders", "tasks")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, lines: Lines | Direct, l1: L1[Near], placeholders: Placeholders
    ) -> None:
        self.lines = lines
        self.flights = Flights(loop)
        self.l1 = l1
        self.placeholders = placeholders
        self.tasks: set[asyncio.Task[Any]] = set()

    def forget(self, key: bytes) -> None:
        """Let go of what is known of *key*: it changes now. Loads in progress serve those who wait, and no one else."""
        self.flights.detach(key)
        self.l1.drop(key)

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
        # None: there is no L1. Looked at once, since isinstance with a protocol is slow.
        self._slot = store.slot if isinstance(store, Coherent) and all(self._l1_size) else None
        self.has_l1 = self._slot is not None
        self.monitored = store if isinstance(store, Monitored) else None
        self._tier = store.name
        if isinstance(store, Switching):
            store.on_state = self._switched
        self._warned: set[str] = set()
        self._sessions: PerLoop[Session] = PerLoop(self._open, owner=f"this {store.name} cache", close=self._close)
        # The store's call, bound once: a line tells kinds of requests apart by their call.
        self._get = store.get_many
        self._now = store.now

    def _open(self, loop: asyncio.AbstractEventLoop) -> Session:
        lines: Lines | Direct
        if "immediate" in vars(type(self.store)):  # of the class itself: one derived from it may do otherwise
            lines = Direct(loop)
        else:
            lines = Lines(loop, self.store.lane, deadline=self.timeout)
        return Session(loop, lines, L1(*self._l1_size), Placeholders(self.store, lines, self.trouble))

    async def _close(self, session: Session) -> None:
        await session.placeholders.aclose()
        await session.flights.aclose()
        if session.tasks:
            await asyncio.wait(session.tasks, timeout=self.timeout)
        for task in session.tasks:
            task.cancel()
        await asyncio.gather(*session.tasks, return_exceptions=True)
        await session.lines.aclose()
        session.l1.clear()
        await self.store.aclose()

    def _switched(self, old: str, new: str) -> None:
        self._tier = self.store.name if self.monitored is None else self.monitored.serving
        self._tell_all(lambda observer: observer.state(old, new))

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

    async def look_up(
        self, session: Session, key: bytes, classes: ClassSet, *, share: bool = False
    ) -> tuple[Hit | None, bool]:
        """Return the fresh entry under *key*, or None; and whether the store could be asked at all. Tells nobody."""
        near: Near | None = None
        if self._slot is not None:
            if (hit := self._hit_near(session, key, classes, share=share)) is not None:
                return hit, True
            near = self._expect(key)
        try:
            data = await session.lines.read(self._get, key, key)
        except StoreError as error:
            self.trouble(error)
            return None, False
        if data is not None and len(data) > LARGE:
            return await self._accept_large(session, key, data, classes, near), True
        return self.accept(session, key, data, classes, near), True

    async def fetch(self, key: bytes, classes: ClassSet) -> Any:
        """Return the store's fresh value under *key* and tell of it; ``MISS``: there is none. Passes L1 by."""
        session = self._sessions.get()
        hit: Hit | None = None
        try:
            data = await session.lines.read(self._get, key, key)
        except StoreError as error:
            self.trouble(error)
            data = None
        if data is not None:
            # What most reads find takes a short way, in two thirds of the time; ``accept`` sees to all else.
            if (entry := open_entry(data, key)) is not None:
                codec, created, fresh_until, keep_until, cost, payload = entry
                # ``is_fresh`` spelled out.
                if created - SKEW <= (now := self._now()) < fresh_until and now < keep_until:
                    try:
                        value = decode(codec, payload, classes)
                    except DecodeError:
                        pass  # ``accept`` says so
                    else:
                        tell_hit(self._tier, cost, self.observers)
                        return value
            args = (session, key, data, classes, None)
            hit = await self._accept_large(*args) if len(data) > LARGE else self.accept(*args)
        tell_read(hit, self.observers)
        return MISS if hit is None else hit.value

    def _hit_near(self, session: Session, key: bytes, classes: ClassSet, *, share: bool = False) -> Hit | None:
        near = session.l1.get(key)
        if near is None:
            return None
        if near.holds():
            value = near.share(classes) if share else near.read(classes)
            if value is not NOT_SHARED:
                return Hit(value, near.head, "l1", near)
        if near.is_over():
            session.l1.drop(key)
        return None

    def _expect(self, key: bytes) -> Near | None:
        """An empty entry for what is about to be read; None where nothing tells of changes now."""
        slot = None if self._slot is None else self._slot(key)
        if slot is None or (word := slot.changes.words[slot.at]) & 1:
            return None
        return Near(key, slot.changes, slot.at, word)

    async def read_many(self, keys: Sequence[bytes], classes: ClassSet) -> dict[bytes, Any]:
        """Return the values of the fresh entries among *keys*, which are all different."""
        session = self.session()
        values: dict[bytes, Any] = {}
        for start in range(0, len(keys), CHUNK):
            await self._read_chunk(session, keys[start : start + CHUNK], classes, values)
        for _ in range(len(keys) - len(values)):
            tell_read(None, self.observers)
        return values

    async def _read_chunk(
        self, session: Session, keys: Sequence[bytes], classes: ClassSet, values: dict[bytes, Any]
    ) -> None:
        expected: dict[bytes, Near | None] = {}
        if self._slot is not None:
            for key in keys:
                if (hit := self._hit_near(session, key, classes)) is not None:
                    values[key] = hit.value
                    tell_read(hit, self.observers)
                else:
                    expected[key] = self._expect(key)
            keys = list(expected)
        parts = session.lines.read_groups(self._get, keys)
        for (part, _), answer in zip(parts, await every([future for _, future in parts]), strict=True):
            if isinstance(answer, StoreError):
                self.trouble(answer)
                continue
            now = self._now()
            for key, data in zip(part, answer, strict=True):
                hit = self.accept(session, key, data, classes, expected.get(key), now)
                if hit is not None:
                    values[key] = hit.value
                    tell_read(hit, self.observers)

    def accept(  # noqa: PLR0917  # called for every read
        self,
        session: Session,
        key: bytes,
        data: bytes | None,
        classes: ClassSet,
        near: Near | None,
        now: float | None = None,
    ) -> Hit | None:
        """Verify what the store said to be under *key*; only a fresh, intact entry of that very key is a hit.

        *near*, made before the store was asked, is filled with it and put in L1.
        """
        frame = self.intact(key, data)
        return None if frame is None else self._admit(session, key, frame, classes, near, now)

    async def _accept_large(
        self, session: Session, key: bytes, data: bytes, classes: ClassSet, near: Near | None
    ) -> Hit | None:  # fmt: skip
        """``accept``, in steps."""
        frame = self.intact(key, data, await last(sums(data, LARGE)))
        if frame is None:
            return None
        if frame.head.codec == BYTES:
            frame = frame._replace(payload=await copied(frame.payload))
        return self._admit(session, key, frame, classes, near, None)

    def _admit(  # noqa: PLR0917  # called for every read
        self, session: Session, key: bytes, frame: Frame, classes: ClassSet, near: Near | None, now: float | None
    ) -> Hit | None:
        head = frame.head
        if now is None:
            now = self._now()
        if not is_fresh(head, now):
            return None
        try:
            value = decode(head.codec, frame.payload, classes)
        except DecodeError as error:
            self._damaged(key, "undecodable", error)
            return None
        if near is not None:
            near.fill(frame, value, head.fresh_until - now)
            evicted = session.l1.put(near)
            if evicted:
                self._tell_all(lambda observer: observer.eviction(evicted))
        return _hit((value, head, self._tier, None))

    def intact(self, key: bytes, data: bytes | None, summed: int | None = None) -> Frame | None:
        """The entry's frame, None for placeholders, nothing and damage. *summed*: see ``unpack``."""
        if data is None:
            return None
        try:
            frame = unpack(data, key, summed)
        except FrameError as error:
            self._damaged(key, error.reason, error)
            return None
        return frame if frame.head.kind == _ENTRY else None

    def fresh_frame(self, key: bytes, data: bytes | None) -> Frame | None:
        """The same, if it is fresh."""
        frame = self.intact(key, data)
        return frame if frame is not None and is_fresh(frame.head, self._now()) else None

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
        return head if head is not None and head.kind == _ENTRY and is_fresh(head, self._now()) else None

    # Trouble

    def trouble(self, error: StoreError) -> None:
        """Count an error of the store, and log it once per kind and text."""
        self._tell_all(lambda observer: observer.error(error.kind))
        if self.monitored is None:  # such a store says it itself
            self.warn_once(f"store {error.kind}", f"{self.store.name} cache: {error}")

    def _damaged(self, key: bytes, reason: str, error: Exception) -> None:
        self._tell_all(lambda observer: observer.error(reason))
        digest = blake2b(key, digest_size=8).hexdigest()
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
    if hit is not None:
        tell_hit(hit.tier, hit.head.cost, observers)
        return
    for observer in observers:
        observer.miss()


def tell_hit(tier: str, cost: float, observers: tuple[Observer, ...]) -> None:
    """Tell of one hit, of what had cost so many seconds to load."""
    for observer in observers:
        observer.hit(tier)
        if cost:
            observer.saved(cost)
