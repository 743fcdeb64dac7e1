"""Reading: what the store says to be under a key, and whether that is worth anything.

Strategy: L1 is asked first, then the store over the session's lines. What comes from there is verified in steps, each
of which may end it: an intact frame of this very key, an entry, its tags' marks standing, fresh (or stale, for whoever
takes that), decodable. Only then it is a hit.

Rules:
- A read that fails is a miss, and counted. Whatever the store answers, nobody is served what is not under the key that
  was asked for.
- L1 takes in what was read under the counter from before the read; an entry with tags hangs on their counters as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from ._classes import ClassSet
from ._codec import BYTES, FAILURE, DecodeError, decode
from ._engine import CHUNK, Engine, Session, every
from ._exceptions import StoreError
from ._failures import Failures
from ._frame import COPIED, LONGEST_FRONT, Frame, FrameError, Head, Kind, Mark
from ._freshness import SKEW, is_fresh, stands_in
from ._l1 import NOT_SHARED
from ._marks import OWNED, Standing
from ._near import Near
from ._protocols import Observer
from ._steps import LARGE, STEP, copied, last

_ENTRY: Final = int(Kind.ENTRY)  # an Enum's members are looked up slowly

MISS: Final = object()
"""What ``Reads.fetch`` answers where there is no fresh value."""


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


class Reads:
    """Reads through one engine.

    Attributes:
        has_l1: Whether there is a near cache at all.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._observers = engine.observers
        self._slot = engine.slot
        self._now = engine.now
        self._unpack = engine.form.unpack
        self._unbounded = min(engine.limits)  # bytes of a frame that is within all limits
        # The short way is for what is that short; where limits are tighter still, there is none.
        self._open_entry = engine.form.open_entry if self._unbounded >= COPIED else _no_entry
        self._max_frame = engine.limits.value_bytes + LONGEST_FRONT
        self.has_l1 = engine.slot is not None

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
            data = await session.lines.read(self._engine.store_get, key, key)
        except StoreError as error:
            self._engine.trouble(error)
            return None, False
        return await self.accept(session, key, data, classes, near, takes), True

    async def fetch(self, key: bytes, classes: ClassSet) -> Any:
        """Return the store's fresh value under *key* and tell of it; ``MISS``: there is none. Passes L1 by."""
        session = self._engine.session()
        hit: Hit | None = None
        try:
            data = await session.lines.read(self._engine.store_get, key, key)
        except StoreError as error:
            self._engine.trouble(error)
            data = None
        if data is not None:
            if (value := self._quick(key, data, classes, self._now())) is not MISS:
                return value
            hit = await self.accept(session, key, data, classes, None, FRESH)
        tell_read(hit, self._observers)
        return MISS if hit is None else hit.value

    def _quick(self, key: bytes, data: bytes, classes: ClassSet, now: float) -> Any:
        """The value of what most reads find, told of, by a short way, in two thirds of the time; else ``MISS``.

        ``accept`` sees to all else, and says what is wrong with it.
        """
        entry = self._open_entry(data, key)
        if entry is None:
            return MISS
        codec, created, fresh_until, keep_until, cost, payload = entry
        # ``is_fresh`` spelled out.
        if not (created - SKEW <= now < fresh_until and now < keep_until):
            return MISS
        try:
            value = decode(codec, payload, classes)
        except DecodeError:
            return MISS
        tell_hit(self._engine.tier, cost, self._observers)
        return value

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
        large = data is not None and LARGE < len(data) <= self._max_frame
        summed = await last(self._engine.form.sums(data, STEP)) if large and data is not None else None
        frame = self.intact(key, data, summed)
        if frame is None:
            return None
        if frame.marks:
            near, good = await self._check(session, key, frame.marks, near)
            if not good:
                return None
        if large and frame.head.codec == BYTES and not isinstance(frame.payload, bytes):
            frame = frame._replace(payload=await copied(frame.payload))
        return self._admit(session, key, frame, classes, near, takes)

    async def _check(
        self, session: Session, key: bytes, marks: tuple[Mark, ...], near: Near | None
    ) -> tuple[Near | None, bool]:
        """Whether the marks of the entry under *key* stand; and *near*, which then hangs on them too, if it can."""
        if all(mark == OWNED for _, mark in marks):
            return near, True
        try:
            standing = await session.marks.stand(self._engine.root(key), marks)
        except StoreError as error:
            self._engine.trouble(error)
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

    def _expect(self, key: bytes) -> Near | None:
        """An empty entry for what is about to be read; None where nothing tells of changes now."""
        slot = None if self._slot is None else self._slot(key)
        if slot is None or (word := slot.changes.words[slot.at]) & 1:
            return None
        return Near(key, slot.changes, slot.at, word)

    async def read_many(self, keys: Sequence[bytes], classes: ClassSet) -> dict[bytes, Any]:
        """Return the values of the fresh entries among *keys*, which are all different."""
        session = self._engine.session()
        values: dict[bytes, Any] = {}
        for start in range(0, len(keys), CHUNK):
            await self._read_chunk(session, keys[start : start + CHUNK], classes, values)
        for _ in range(len(keys) - len(values)):
            tell_read(None, self._observers)
        return values

    async def _read_chunk(
        self, session: Session, keys: Sequence[bytes], classes: ClassSet, values: dict[bytes, Any]
    ) -> None:
        expected: dict[bytes, Near | None] = {}
        if self._slot is not None:
            for key in keys:
                if (hit := self._hit_near(session, key, classes, FRESH)) is not None:
                    values[key] = hit.value
                    tell_read(hit, self._observers)
                else:
                    expected[key] = self._expect(key)
            keys = list(expected)
        parts = session.lines.read_groups(self._engine.store_get, keys)
        tagged: list[tuple[bytes, Frame]] = []
        for (part, _), answer in zip(parts, await every([future for _, future in parts]), strict=True):
            if isinstance(answer, StoreError):
                self._engine.trouble(answer)
                continue
            now = self._now()
            for key, data in zip(part, answer, strict=True):
                if data is None:
                    continue
                if not expected and (value := self._quick(key, data, classes, now)) is not MISS:
                    values[key] = value
                    continue
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
            tell_read(hit, self._observers)

    async def stand_all(self, session: Session, tagged: Sequence[tuple[bytes, Frame]]) -> list[Standing]:
        """Say of each (key, frame), all of one namespace, whether its marks stand; none, where the store fails."""
        try:
            return await session.marks.stand_all(self._engine.root(tagged[0][0]), [frame.marks for _, frame in tagged])
        except StoreError as error:
            self._engine.trouble(error)
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
            self._engine.damaged(key, "undecodable", error)
            return None
        if near is not None:
            near.fill(frame, value, head.fresh_until - now)
            evicted = session.l1.put(near)
            if session.use is not None:
                session.use.begin()
            if evicted:
                self._engine.tell_all(lambda observer: observer.eviction(evicted))
        return _hit((value, head, self._engine.tier, None, stale))

    def intact(self, key: bytes, data: bytes | None, summed: int | None = None) -> Frame | None:
        """The entry's frame, None for placeholders, nothing and damage. *summed*: see ``unpack``."""
        if data is None:
            return None
        limits = self._engine.limits
        try:
            frame = self._unpack(data, key, summed) if len(data) <= self._max_frame else None
        except FrameError as error:
            self._engine.damaged(key, error.reason, error)
            return None
        if frame is not None and frame.head.kind != _ENTRY:
            return None
        if frame is None or (len(data) > self._unbounded and limits.excess(frame.head.codec, frame.payload)):
            self._engine.damaged(key, "oversized", FrameError("oversized"))
            return None
        return frame

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
        session = self._engine.session()
        try:
            data = await session.lines.read(self._engine.store_get, key, key)
        except StoreError as error:
            self._engine.trouble(error)
            return None
        return await self.fresh_frame(session, key, data)

    def fresh_head(self, key: bytes, data: bytes | None) -> Head | None:
        """The head in *data*, if it is a fresh entry's. What it can't tell is whether the entry's marks stand."""
        try:
            head = None if data is None else self._engine.form.verified_head(data, key)
        except FrameError:
            return None
        if head is None or head.kind != _ENTRY or head.codec == FAILURE or not is_fresh(head, self._now()):
            return None
        return head


def _no_entry(data: bytes, key: bytes) -> None:  # as ``Form.open_entry``
    """Leave it to the long way."""


def _hung(near: Near | None, standing: Standing) -> Near | None:
    """Let *near* hang on the marks of its entry, too; None where nothing would tell of their changes."""
    if near is None or standing.parts is None:
        return None
    near.hang_on(standing.parts)
    return near


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
