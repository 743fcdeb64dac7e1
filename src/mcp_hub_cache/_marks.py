"""Tags: random marks under keys of their own, so that one write invalidates any number of entries.

Strategy: a tag's mark is the token of a placeholder that stands under the tag's own key. An entry records the marks it
was written under and is good only while each of them still stands. To invalidate a tag is to delete its mark: the next
load plants another one, which no older entry knows. There is nothing to count, no clock to compare, and a mark that the
server evicted means a miss, never a resurrection (after the "surrogate keys" of HTTP caches; the marks in place of
times are this library's).

Rules:
- Marks are taken before the loader is called. For a tag that is added inside it, that is too late: there, one mark for
  *any* invalidation in the namespace is taken before, and must still stand after the tag's mark was taken. Who
  invalidates removes that one first, and the tags' after it.
- A mark lives at least as long as the longest entry under it: each write prolongs it where needed, never shortens it.
- What is known of a mark is used again only while its counter says that it stands (``_changes``); where the store tells
  of no changes, marks are read with every entry that has them. That a mark's time is over moves no counter: a new entry
  is written under a known mark only while that is sure to live.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from ._changes import Part, Slot
from ._direct import Direct
from ._exceptions import StoreError
from ._frame import FrameError, Head, Kind, Mark, unpack
from ._lines import Lines
from ._placeholders import heed
from ._protocols import Begun, Fence, Held, Leases, Store
from ._tags import ANY_DIGEST, mark_key

OWNED: Final = bytes(8)
"""The mark of an owner, who is no tag: owners have none that changes."""

_HOLD: Final = 3600.0  # seconds that a new mark lives unless entries want more
_MOST_KNOWN: Final = 10_000
_MARKS: Final = frozenset((Kind.PLACEHOLDER, Kind.MARK))


class _Known:
    """What is known of one mark."""

    __slots__ = ("lives_until", "mark", "part")

    def __init__(self, mark: bytes | None, part: Part | None) -> None:
        self.mark = mark
        self.part = part  # None: nothing tells of its changes
        self.lives_until = -math.inf  # at least, on the store's clock, by which it expires

    def stands(self, now: float) -> bool:
        # Where nothing stands, nothing can end by time.
        return self.part is not None and self.part.holds() and (self.mark is None or now < self.lives_until)


class Standing(NamedTuple):
    """Whether an entry's marks stand; and the counters that tell when they no longer do, None: nothing tells."""

    good: bool
    parts: tuple[Part, ...] | None


class Taking(NamedTuple):
    """Marks that are on their way."""

    digests: tuple[bytes, ...]
    answers: tuple[bytes | tuple[bytes, Part | None, Any], ...]  # the mark where it is known, else its key and future


class Marks:
    """The marks that one event loop has met.

    Args:
        store: Where they stand.
        lines: The way there.
        slot: ``Coherent.slot`` of the store; None: it tells of no changes.
        trouble: Told of the store's errors.
    """

    def __init__(
        self,
        store: Store,
        lines: Lines | Direct,
        slot: Callable[[bytes], Slot | None] | None,
        trouble: Callable[[StoreError], None],
    ) -> None:
        self._store = store
        self._lines = lines
        self._slot = slot
        self._trouble = trouble
        self._known: dict[bytes, _Known] = {}
        self._any_keys: dict[bytes, bytes] = {}
        # Bound once: a line tells kinds of requests apart by the identity of their call.
        self._get = store.get_many
        self._begin = partial(store.begin_many, hold=_HOLD)
        self._delete = store.delete_many
        self._leases = store if isinstance(store, Leases) else None
        self._renewals: dict[float, Any] = {}

    # Knowing

    def _key(self, root: bytes, digest: bytes) -> bytes:
        if digest is not ANY_DIGEST:
            return mark_key(root, digest)
        key = self._any_keys.get(root)  # asked for with every load
        if key is None:
            key = self._any_keys[root] = mark_key(root, digest)
        return key

    def _standing(self, key: bytes) -> _Known | None:
        known = self._known.get(key)
        return known if known is not None and known.stands(self._store.now()) else None

    def _learn(self, key: bytes, data: bytes | None, part: Part | None) -> _Known:
        """Take in what was read under *key*; *part* is from before that."""
        head = _mark_in(data, key)
        before = self._known.pop(key, None)
        known = self._known[key] = _Known(None if head is None else head.token, part)
        if len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]
        if head is not None:
            known.lives_until = head.keep_until
            if before is not None and before.mark == head.token:
                known.lives_until = max(known.lives_until, before.lives_until)
            if known.lives_until <= self._store.now():
                # Prolonged by somebody, for who knows how long: stores need not write that into the frame.
                self._renew(key, known, _HOLD)
        return known

    # Reading

    async def stand(self, root: bytes, marks: Iterable[Mark]) -> Standing:
        """Say whether *marks*, of one entry, still stand. Raises ``StoreError`` where that can't be had."""
        (standing,) = await self.stand_all(root, [tuple(marks)])
        return standing

    async def stand_all(self, root: bytes, entries: Sequence[tuple[Mark, ...]]) -> list[Standing]:
        """The same for many entries, in one trip.

        Raises:
            StoreError: The store could not be asked.
        """
        current: dict[bytes, _Known] = {}
        asked: dict[bytes, tuple[bytes, Part | None, Any]] = {}
        for marks in entries:
            for digest, mark in marks:
                if mark == OWNED or digest in current or digest in asked:
                    continue
                key = self._key(root, digest)
                if (known := self._standing(key)) is not None:
                    current[digest] = known
                else:
                    asked[digest] = key, *self._read(key)
        for digest, (key, part, future) in asked.items():
            current[digest] = self._learn(key, await future, part)
        return [self._standing_of(marks, current) for marks in entries]

    @staticmethod
    def _standing_of(marks: tuple[Mark, ...], current: dict[bytes, _Known]) -> Standing:
        known = [(mark, current[digest]) for digest, mark in marks if mark != OWNED]
        good = all(mark == one.mark for mark, one in known)
        parts = tuple(one.part for _, one in known if one.part is not None)
        return Standing(good, parts if len(parts) == len(known) else None)

    # Taking

    def any(self, root: bytes) -> bytes | None:
        """Return the mark of any invalidation, if it is known to stand: what every load asks."""
        known = self._standing(self._key(root, ANY_DIGEST))
        return None if known is None else known.mark

    def take(self, root: bytes, digests: Iterable[bytes]) -> Taking:
        """Ask for the marks of tags. Begins at once; ``taken`` has the answer."""
        wanted = tuple(digests)
        # Read, and planted only where there is none: what this store changes itself moves the counters, and marks whose
        # counters move whenever they are taken would have to be asked for again with every load.
        return Taking(wanted, tuple([self._asked(self._key(root, digest)) for digest in wanted]))

    def _asked(self, key: bytes) -> tuple[bytes, Part | None, Any] | bytes:
        known = self._standing(key)
        if known is not None and known.mark is not None:
            return known.mark
        part, future = self._read(key)
        return key, part, future

    def _read(self, key: bytes) -> tuple[Part | None, Any]:
        """The state of the counter of *key*, and the future of what is read after that."""
        slot = None if self._slot is None else self._slot(key)
        part = None if slot is None else slot.part()
        future = self._lines.read(self._get, key, key)
        future.add_done_callback(heed)  # of several, the first to fail is the last to be awaited
        return part, future

    async def taken(self, taking: Taking) -> dict[bytes, bytes] | None:
        """Return the marks by the digests of their tags, planted where there were none.

        None: the store could not be asked.
        """
        marks: dict[bytes, bytes] = {}
        planted: dict[bytes, tuple[bytes, Any]] = {}
        try:
            for digest, asked in zip(taking.digests, taking.answers, strict=True):
                if isinstance(asked, bytes):
                    marks[digest] = asked
                    continue
                key, part, future = asked
                known = self._learn(key, await future, part)
                if known.mark is None:
                    future = self._lines.write(self._begin, key, key)
                    future.add_done_callback(heed)
                    planted[digest] = key, future
                else:
                    marks[digest] = known.mark
            for digest, (key, future) in planted.items():
                begun = await self._planted(key, await future)
                marks[digest] = begun.fence.token
                known = self._known[key] = _Known(begun.fence.token, None)
                known.lives_until = self._store.now() + _HOLD if begun.leader else -math.inf
        except StoreError as error:
            self._trouble(error)
            return None
        return marks

    async def _planted(self, key: bytes, begun: Begun) -> Begun:
        """*begun*, where that left a mark under *key*; what is no mark would be a miss for ever, and makes room."""
        if begun.leader or (begun.frame is not None and _mark_in(begun.frame, key) is not None):
            return begun
        await self._lines.write(self._delete, key, key)
        again: Begun = await self._lines.write(self._begin, key, key)
        return again

    async def current(self, root: bytes, digest: bytes) -> bytes | None:
        """Return the mark as the store has it at this moment, whatever is known of it; None: none, or not to be had."""
        key = self._key(root, digest)
        try:
            head = _mark_in(await self._lines.read(self._get, key, key), key)
        except StoreError as error:
            self._trouble(error)
            return None
        return None if head is None else head.token

    def prolong(self, root: bytes, marks: Iterable[Mark], keep: float) -> None:
        """See that *marks* live for *keep* seconds more, where they stand. Waits for nothing."""
        until = self._store.now() + keep
        for digest, mark in marks:
            key = self._key(root, digest)
            known = self._known.get(key)
            if mark == OWNED or (known is not None and known.mark == mark and known.lives_until >= until):
                continue
            # A power of two that is more than enough: writes of like entries then need not ask again and again, and
            # share their batches.
            hold = 2.0 ** math.ceil(math.log2(max(keep, 1.0) * 1.5)) if keep < math.inf else math.inf
            self._renew(key, known if known is not None and known.mark == mark else _Known(mark, None), hold)

    def _renew(self, key: bytes, known: _Known, hold: float) -> None:
        if self._leases is None or known.mark is None:
            return
        future = self._lines.write(self._renewal(hold), key, Held(key, Fence(self._store.id, known.mark)))
        known.lives_until = self._store.now() + hold  # so that those who come before the answer need not ask as well
        future.add_done_callback(partial(_renewed, known))

    def _renewal(self, hold: float) -> Any:
        assert self._leases is not None
        renewal = self._renewals.get(hold)
        if renewal is None:
            renewal = self._renewals[hold] = partial(self._leases.renew_many, hold=hold)
        return renewal

    def forget(self, key: bytes) -> None:
        """The mark under *key* changes now."""
        self._known.pop(key, None)

    def used(self) -> list[bytes]:
        """The keys of the marks that are known to stand."""
        now = self._store.now()
        return [key for key, known in self._known.items() if known.mark is not None and known.stands(now)]


def _renewed(known: _Known, answer: asyncio.Future[bool]) -> None:
    if answer.cancelled() or answer.exception() is not None or not answer.result():
        known.lives_until = -math.inf


def _mark_in(data: bytes | None, key: bytes) -> Head | None:
    """The head of the mark that *data* is, None where it is none."""
    if data is None:
        return None
    try:
        head = unpack(data, key).head
    except FrameError:
        return None
    return head if head.kind in _MARKS else None
