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
from typing import Any, Final, NamedTuple, TypeVar, cast

from ._blake import blake2b
from ._changes import Part
from ._classes import ClassSet
from ._codec import BYTES, FAILURE, DecodeError, decode
from ._direct import Direct
from ._exceptions import StoreError
from ._failures import Failures
from ._flight import Flights
from ._frame import Frame, FrameError, Head, Kind, Mark, open_entry, sums, unpack, unpack_head
from ._freshness import SKEW, is_fresh, stands_in
from ._l1 import L1, NOT_SHARED
from ._leases import Rests, Rivals
from ._lifetime import PerLoop
from ._lines import Lines
from ._marks import OWNED, Marks, Standing
from ._near import Near
from ._placeholders import Placeholders
from ._protocols import Coherent, Immediate, Monitored, Observer, Store, Switching, Used
from ._steps import LARGE, copied, last
from ._tokens import draw
from ._use import Use

T = TypeVar("T")

log = logging.getLogger("mcp_hub_cache")

_MAX_WARNED: Final = 1000
CHUNK: Final = 128  # of a call with many keys: each chunk has the deadline to itself
_ENTRY: Final = int(Kind.ENTRY)  # an Enum's members are looked up slowly
_SLICE: Final = 2000  # entries of L1 looked at before the loop may turn


MISS: Final = object()
"""What ``Engine.fetch`` answers where there is no fresh value."""


class Hit(NamedTuple):
    """A usable value and the head it was stored with.

    Attributes:
        value: The value; of a cached failure, the exception.
        head: Its frame's.
        tier: Where it was found.
        near: Its place in L1, where it was found there.
        stale: Its frame, where it is not fresh but may stand in.
    """

    value: Any
    head: Head
    tier: str
    near: Near | None = None
    stale: Frame | None = None


# What ``Hit(...)`` does, without its frame of Python: a third of the time.
_hit: Final[Callable[[tuple[Any, Head, str, Near | None, Frame | None]], Hit]] = partial(tuple.__new__, Hit)


class Takes(NamedTuple):
    """What a reader would take besides fresh values.

    Attributes:
        stale_ttl: Seconds past its freshness for which an entry may stand in.
        failures: The exceptions that are answers; None: none are.
        share: The one object that all get who promised not to change it.
    """

    stale_ttl: float = 0.0
    failures: Failures | None = None
    share: bool = False


FRESH: Final = Takes()
"""Fresh values alone."""


class Session:
    """What belongs to one event loop."""

    __slots__ = (
        "behind",
        "flights",
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
        self.behind = 0  # refreshes in the background
        self.tasks: set[asyncio.Task[Any]] = set()
        self.use: Use | None = None

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
        prefix: bytes = b"",
        draw: Callable[[], float] = draw,
    ) -> None:
        self._namespace_at = len(prefix)
        self.draw = draw
        self.store = store
        self.observers = observers
        self.timeout = timeout
        self._l1_size = (l1_max_entries, l1_max_bytes)
        # None: there is no L1. Looked at once, since isinstance with a protocol is slow.
        self._coherent = store.slot if isinstance(store, Coherent) else None
        self._slot = self._coherent if all(self._l1_size) else None
        self.has_l1 = self._slot is not None
        self.monitored = store if isinstance(store, Monitored) else None
        self._tier = store.name
        if isinstance(store, Switching):
            store.on_state = self._switched
        self._warned: set[str] = set()
        self._sessions: PerLoop[Session] = PerLoop(self._open, owner=f"this {store.name} cache", close=self._close)
        # The store's call, bound once: a line tells kinds of requests apart by their call.
        self.store_get = store.get_many
        self._now = store.now

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

    def root(self, key: bytes) -> bytes:
        """What all keys of the namespace of *key* begin with; a namespace holds no colon."""
        return key[: key.index(b":", self._namespace_at) + 1]

    # Reading

    async def look_up(
        self, session: Session, key: bytes, classes: ClassSet, takes: Takes = FRESH
    ) -> tuple[Hit | None, bool]:
        """Return the usable entry under *key*, or None; and whether the store could be asked at all. Tells nobody."""
        near: Near | None = None
        if self._slot is not None:
            if (hit := self._hit_near(session, key, classes, takes)) is not None:
                return hit, True
            near = self._expect(key)
        try:
            data = await session.lines.read(self.store_get, key, key)
        except StoreError as error:
            self.trouble(error)
            return None, False
        return await self.accept(session, key, data, classes, near, takes), True

    async def fetch(self, key: bytes, classes: ClassSet) -> Any:
        """Return the store's fresh value under *key* and tell of it; ``MISS``: there is none. Passes L1 by."""
        session = self._sessions.get()
        hit: Hit | None = None
        try:
            data = await session.lines.read(self.store_get, key, key)
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
                        pass  # ``accept`` says so, or knows better
                    else:
                        tell_hit(self._tier, cost, self.observers)
                        return value
            hit = await self.accept(session, key, data, classes, None, FRESH)
        tell_read(hit, self.observers)
        return MISS if hit is None else hit.value

    async def accept(  # noqa: PLR0917  # called for every read
        self,
        session: Session,
        key: bytes,
        data: bytes | None,
        classes: ClassSet,
        near: Near | None,
        takes: Takes,
    ) -> Hit | None:
        """Verify what the store said to be under *key*; only a usable, intact entry of that very key is a hit.

        *near*, made before the store was asked, is filled with it and put in L1.
        """
        large = data is not None and len(data) > LARGE
        frame = self.intact(key, data, await last(sums(data, LARGE)) if large and data is not None else None)
        if frame is None:
            return None
        if frame.marks:
            near, good = await self._check(session, key, frame.marks, near)
            if not good:
                return None
        if large and frame.head.codec == BYTES:
            frame = frame._replace(payload=await copied(frame.payload))
        return self._admit(session, key, frame, classes, near, takes)

    async def _check(
        self, session: Session, key: bytes, marks: tuple[Mark, ...], near: Near | None
    ) -> tuple[Near | None, bool]:
        """Whether the marks of the entry under *key* stand; and *near*, which then hangs on them too, if it can."""
        if all(mark == OWNED for _, mark in marks):
            return near, True
        try:
            standing = await session.marks.stand(self.root(key), marks)
        except StoreError as error:
            self.trouble(error)
            return None, False
        return _hung(near, standing), standing.good

    def _hit_near(self, session: Session, key: bytes, classes: ClassSet, takes: Takes) -> Hit | None:
        near = session.l1.get(key)
        if near is None:
            return None
        if near.is_fresh():
            if near.head.codec == FAILURE:
                value = NOT_SHARED if takes.failures is None else near.fail(takes.failures, classes)
            else:
                value = near.share(classes) if takes.share else near.read(classes)
            if value is not NOT_SHARED:
                return Hit(value, near.head, "l1", near)
        if near.is_over():
            session.l1.drop(key)
        return None

    def untrusted(self, near: Near, classes: ClassSet) -> Hit | None:
        """What L1 holds and can't vouch for, to stand in while the store can't be asked."""
        value = near.untrusted(classes)
        return None if value is NOT_SHARED else Hit(value, near.head, "l1", None, near.frame())

    def part(self, key: bytes) -> Part | None:
        """The state of the counter of *key* now; None where nothing tells of changes now."""
        slot = self._coherent(key) if self._coherent is not None else None
        return None if slot is None else slot.part()

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
                if (hit := self._hit_near(session, key, classes, FRESH)) is not None:
                    values[key] = hit.value
                    tell_read(hit, self.observers)
                else:
                    expected[key] = self._expect(key)
            keys = list(expected)
        parts = session.lines.read_groups(self.store_get, keys)
        tagged: list[tuple[bytes, Frame]] = []
        for (part, _), answer in zip(parts, await every([future for _, future in parts]), strict=True):
            if isinstance(answer, StoreError):
                self.trouble(answer)
                continue
            now = self._now()
            for key, data in zip(part, answer, strict=True):
                frame = self.intact(key, data)
                if frame is None:
                    continue
                if frame.marks:
                    tagged.append((key, frame))
                    continue
                self._take_in(session, key, frame, classes, expected.get(key), values, now)
        if tagged:
            for (key, frame), standing in zip(tagged, await self.stand_all(session, tagged), strict=True):
                if standing.good:
                    near = _hung(expected.get(key), standing)
                    self._take_in(session, key, frame, classes, near, values, self._now())

    def _take_in(  # noqa: PLR0917  # called for every read of many
        self,
        session: Session,
        key: bytes,
        frame: Frame,
        classes: ClassSet,
        near: Near | None,
        values: dict[bytes, Any],
        now: float,
    ) -> None:
        hit = self._admit(session, key, frame, classes, near, FRESH, now)
        if hit is not None:
            values[key] = hit.value
            tell_read(hit, self.observers)

    async def stand_all(self, session: Session, tagged: Sequence[tuple[bytes, Frame]]) -> list[Standing]:
        """Say of each (key, frame), all of one namespace, whether its marks stand; none, where the store fails."""
        try:
            return await session.marks.stand_all(self.root(tagged[0][0]), [frame.marks for _, frame in tagged])
        except StoreError as error:
            self.trouble(error)
            return [Standing(good=False, parts=None)] * len(tagged)

    def _admit(  # noqa: PLR0917  # called for every read
        self,
        session: Session,
        key: bytes,
        frame: Frame,
        classes: ClassSet,
        near: Near | None,
        takes: Takes,
        now: float | None = None,
    ) -> Hit | None:
        """Take a frame whose marks stand for what it is at this moment.

        *near*, made before the store was asked, is filled with it and put in L1.
        """
        head = frame.head
        if now is None:
            now = self._now()
        stale = None
        if not is_fresh(head, now):
            if not takes.stale_ttl or not stands_in(head, now, takes.stale_ttl) or head.codec == FAILURE:
                return None
            stale, near = frame, None
        try:
            if head.codec != FAILURE:
                value = decode(head.codec, frame.payload, classes)
            elif takes.failures is None:
                return None
            else:
                value = takes.failures.decode(frame.payload, classes)
        except DecodeError as error:
            self._damaged(key, "undecodable", error)
            return None
        if near is not None:
            near.fill(frame, value, head.fresh_until - now)
            evicted = session.l1.put(near)
            if session.use is not None:
                session.use.begin()
            if evicted:
                self._tell_all(lambda observer: observer.eviction(evicted))
        return _hit((value, head, self._tier, None, stale))

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

    async def fresh_frame(self, session: Session, key: bytes, data: bytes | None) -> Frame | None:
        """The frame of the entry in *data*, if it is good: fresh, its marks standing, and no failure."""
        frame = self.intact(key, data)
        if frame is None or not is_fresh(frame.head, self._now()) or frame.head.codec == FAILURE:
            return None
        if frame.marks and not (await self._check(session, key, frame.marks, None))[1]:
            return None
        return frame

    async def frame(self, key: bytes) -> Frame | None:
        """Return the frame of the good entry under *key*, or None. Nothing is decoded."""
        session = self.session()
        try:
            data = await session.lines.read(self.store_get, key, key)
        except StoreError as error:
            self.trouble(error)
            return None
        return await self.fresh_frame(session, key, data)

    def fresh_head(self, data: bytes | None) -> Head | None:
        """The head in *data*, if it is a fresh entry's. What it can't tell is whether the entry's marks stand."""
        try:
            head = None if data is None else unpack_head(data)
        except FrameError:
            return None
        if head is None or head.kind != _ENTRY or head.codec == FAILURE or not is_fresh(head, self._now()):
            return None
        return head

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


def _hung(near: Near | None, standing: Standing) -> Near | None:
    """Let *near* hang on the marks of its entry, too; None where nothing would tell of their changes."""
    if near is None or standing.parts is None:
        return None
    near.hang_on(standing.parts)
    return near


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
