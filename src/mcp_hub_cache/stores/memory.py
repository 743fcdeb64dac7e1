"""A store in this process's memory: for tests, for programs that need no more, and as the last resort.

Strategy: one dict from key to (frame, dead line), guarded by nothing, since no method awaits between looking and
acting: what concerns a key is atomic on its event loop. Those methods return an answer that is there already, so that
callers pay no task. Expired entries go when they are met and by a sweep over a few keys with every write; the oldest go
for room.

The placeholders of loads stand in a table of their own, as tokens. They come and go with every miss; as entries among
the others, with a frame, a place and a size, they took a fifth of its time. No key stands in both tables.

What goes over all entries (scan, clear, info) lets the loop have a turn after every hundred. For that the keys also
stand in buckets by their hash, each of which is copied when its turn comes: a copy of all keys alone would hold up the
loop (30 ms for a million), and a walk along a dict can't go on once the dict has changed.

The store outlives event loops: it holds nothing that is bound to one, except the waiters in ``changed``.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from typing import ClassVar, Final, Literal, TypeVar

from .._changes import SLOTS, Changes, Slot
from .._direct import Done
from .._exceptions import StoreFullError
from .._frame import HEAD_SIZE, TOKEN, Kind, is_live, peek, placeholder
from .._protocols import Begun, Fence, Held, Outcome, Patch, Write
from .._tokens import new_token
from . import next_store_id

T = TypeVar("T")

_make: Final = tuple.__new__
_SWEEP: Final = 2  # expired entries looked for per write: more than one, so that the dead go faster than the new come
_BRIEF: Final = 60.0  # seconds of life from which on a placeholder is no load's: a tag's mark, which counts for room
_PAGE: Final = 100  # entries looked at between two turns of the loop: a millisecond, or two on a busy machine
_BUCKETS: Final = 256


class MemoryStore:
    """Frames in a dict, least recently used dropped first.

    Args:
        max_bytes: Room for frames and keys together; None: no bound.
        clock: Seconds since the epoch; a fake one for tests. The default never goes backwards.
        on_evict: Called with the number of entries dropped for room.
    """

    name = "memory"
    immediate: ClassVar[Literal[True]] = True

    def __init__(
        self,
        *,
        max_bytes: int | None = 256 * 1024 * 1024,
        clock: Callable[[], float] | None = None,
        on_evict: Callable[[int], None] | None = None,
    ) -> None:
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"max_bytes must be more than 0 or None, not {max_bytes!r}")
        self.id = next_store_id()
        self.on_evict = on_evict
        offset = time.time() - time.monotonic()
        self._clock = clock if clock is not None else lambda: time.monotonic() + offset
        self._max_bytes = max_bytes
        self._size = 0
        self._entries: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()  # least recently used first
        self._planted: dict[bytes, tuple[bytes, float]] = {}  # token and dead line of placeholders, oldest first
        self._buckets: defaultdict[int, set[bytes]] = defaultdict(set)
        self._words = [0] * SLOTS
        self._changes = Changes(self._words, self._clock if clock is not None else time.monotonic)
        self._waiters: dict[int, list[asyncio.Future[None]]] = {}

    def now(self) -> float:
        """Seconds since the epoch; see ``Store.now``."""
        return self._clock()

    def lane(self, key: bytes, /) -> Hashable:  # noqa: ARG002  # the protocol's
        """One lane: nothing here can make one key wait for another."""
        return None

    # What stands under a key, and changing it. All synchronous.

    def get(self, key: bytes, /) -> bytes | None:
        """See ``Immediate.get``."""
        held = self._entries.get(key)
        if held is None:
            return self._placeholder(key) if key in self._planted else None
        frame, dead = held
        if self._clock() >= dead:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return frame

    def _peek(self, key: bytes, now: float) -> bytes | None:
        held = self._entries.get(key)
        if held is None:
            return self._placeholder(key) if key in self._planted else None
        return held[0] if now < held[1] else None

    def _placeholder(self, key: bytes) -> bytes | None:
        token, dead = self._planted[key]
        now = self._clock()
        if now >= dead:
            del self._planted[key]
            self._bump(key)
            return None
        return placeholder(key, token, now, dead - now)

    def _put(self, key: bytes, frame: bytes, keep: float | None) -> Outcome:
        size = len(key) + len(frame)
        if self._max_bytes is not None and size > self._max_bytes:
            return StoreFullError(
                f"an entry of {size} bytes does not fit in {self._max_bytes}.", cure="Raise max_bytes."
            )
        held = self._entries.pop(key, None)  # to come back as the one used last
        self._bump(key)
        if held is None:
            self._planted.pop(key, None)
            self._buckets[hash(key) % _BUCKETS].add(key)
        else:
            self._size -= len(key) + len(held[0])
        now = self._clock()
        self._entries[key] = (frame, math.inf if keep is None else now + keep)
        self._size += size
        self._make_room(now)
        return "done"

    def _drop(self, key: bytes) -> bytes | None:
        held = self._entries.pop(key, None)
        self._bump(key)
        if held is None:
            frame = self._placeholder(key) if key in self._planted else None
            self._planted.pop(key, None)
            return frame
        self._buckets[hash(key) % _BUCKETS].discard(key)
        self._size -= len(key) + len(held[0])
        return held[0] if self._clock() < held[1] else None

    def _make_room(self, now: float) -> None:
        for _ in range(_SWEEP):
            oldest = next(iter(self._entries), None)
            if oldest is None or now < self._entries[oldest][1]:
                break
            self._drop(oldest)
        if self._max_bytes is None or self._size <= self._max_bytes:
            return
        evicted = 0
        while self._size > self._max_bytes:
            self._drop(next(iter(self._entries)))
            evicted += 1
        if self.on_evict is not None:
            self.on_evict(evicted)

    def _bump(self, key: bytes) -> None:
        bucket = hash(key) % SLOTS
        self._words[bucket] += 2
        if self._waiters:
            for future in self._waiters.pop(bucket, ()):
                if not future.done():
                    future.get_loop().call_soon_threadsafe(_wake, future)

    def _holds(self, key: bytes, fence: Fence) -> bool:
        """Whether what stands under *key* still carries the fence's token."""
        if (planted := self._planted.get(key)) is not None:
            token, dead = planted
        elif (held := self._entries.get(key)) is not None:
            token, dead = held[0][TOKEN], held[1]
        else:
            return False
        return token == fence.token and fence.store == self.id and self._clock() < dead

    # Store

    def get_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """See ``Store.get_many``."""
        return Done([self.get(key) for key in keys])

    def head_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """See ``Store.head_many``."""
        return Done([frame and frame[:HEAD_SIZE] for frame in map(self.get, keys)])

    def begin_many(self, keys: Sequence[bytes], /, *, hold: float) -> Awaitable[list[Begun]]:
        """See ``Store.begin_many``."""
        return Done([self.begin(key, hold) for key in keys])

    def begin(self, key: bytes, hold: float, /) -> Begun:
        """See ``Immediate.begin``."""
        frame = self.get(key)
        if frame is not None:
            return Begun(frame, Fence(self.id, frame[TOKEN]), leader=False)
        token, now = new_token(), self._clock()
        if hold > _BRIEF:
            self._put(key, placeholder(key, token, now, hold), hold)
            return Begun(None, Fence(self.id, token), leader=True)
        self._bump(key)
        self._planted[key] = (token, now + hold)
        oldest = next(iter(self._planted))  # one for each that comes: the dead never grow more
        if now >= self._planted[oldest][1]:
            self._drop(oldest)
        # NamedTuples without the frame of Python that their own constructors take: 0.2 µs each.
        return _make(Begun, (None, _make(Fence, (self.id, token)), True))

    def write_many(self, writes: Sequence[Write], /) -> Awaitable[list[Outcome]]:
        """See ``Store.write_many``."""
        return Done([self.write(write) for write in writes])

    def write(self, write: Write, /) -> Outcome:
        """See ``Immediate.write``."""
        if write.fence is not None and not self._holds(write.key, write.fence):
            return "refused"
        return self._put(write.key, write.frame, write.keep)

    def patch_many(self, patches: Sequence[Patch], /) -> Awaitable[list[Outcome]]:
        """See ``Store.patch_many``."""
        return Done([self._patch(patch) for patch in patches])

    def _patch(self, patch: Patch) -> Outcome:
        frame = self.get(patch.key)
        if frame is None or not self._holds(patch.key, patch.fence):
            return "refused"
        return self._put(patch.key, patch.head + frame[HEAD_SIZE:], patch.keep)

    def delete_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """See ``Store.delete_many``."""
        return Done([frame and frame[:HEAD_SIZE] for frame in map(self._drop, keys)])

    async def scan(self, prefix: bytes, /) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        """See ``Store.scan``. Pages of up to 100, with a turn of the loop between them."""
        for keys in self._pages():
            now = self._clock()
            held = ((key, self._peek(key, now)) for key in keys if key.startswith(prefix))
            page = [(key, frame[:HEAD_SIZE]) for key, frame in held if frame is not None]
            if page:
                yield page
            await asyncio.sleep(0)

    def _pages(self) -> Iterator[list[bytes]]:
        """All keys that are there throughout, up to 100 at a time; the loop may have its turn between them."""
        page = list(self._planted)
        for number in range(_BUCKETS):
            page += self._buckets.get(number, ())
            while len(page) > _PAGE:
                yield page[:_PAGE]
                del page[:_PAGE]
        yield page

    async def clear(self, prefix: bytes, /) -> int:
        """See ``Store.clear``. What is written while it goes on may stay; up to 100 entries go at once."""
        total = 0
        for keys in self._pages():
            for key in keys:
                if key.startswith(prefix):
                    frame = self._drop(key)
                    head = None if frame is None else peek(frame)
                    total += head is not None and head.kind == Kind.ENTRY
            await asyncio.sleep(0)
        return total

    def ping(self, _lane: Hashable = None, /) -> Awaitable[None]:
        """Always serves."""
        return Done(None)

    async def info(self) -> Mapping[str, str | int | float]:
        """Entries and bytes held."""
        live = expired = 0
        for keys in self._pages():
            now = self._clock()
            for frame, dead in filter(None, map(self._entries.get, keys)):
                head = peek(frame)
                if now >= dead or not is_live(head, now):
                    expired += 1
                else:
                    live += head is not None and head.kind == Kind.ENTRY
            await asyncio.sleep(0)
        return {
            "total_keys": live,
            "expired_keys": expired,
            "total_bytes": self._size,
        }

    def aclose(self) -> Awaitable[None]:
        """Nothing to give back; the entries stay for the next loop."""
        return Done(None)

    # Coherent, Leases and Used

    def stamp(self, key: bytes, /) -> int | None:
        """See ``Coherent.stamp``."""
        return self.slot(key).stamp()

    def slot(self, key: bytes, /) -> Slot:
        """See ``Coherent.slot``."""
        return Slot(self._changes, hash(key) % SLOTS)

    def distrust(self) -> None:
        """See ``Coherent.distrust``."""
        self._changes = self._changes.anew()

    async def changed(self, key: bytes, stamp: int, /) -> None:
        """See ``Coherent.changed``."""
        if self.stamp(key) != stamp:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(hash(key) % SLOTS, [])
        waiters.append(future)
        try:
            await future
        finally:
            if future in waiters:
                waiters.remove(future)

    def renew_many(self, held: Sequence[Held], /, *, hold: float) -> Awaitable[list[bool]]:
        """See ``Leases.renew_many``."""
        return Done([self._renew(one, hold) for one in held])

    def _renew(self, held: Held, hold: float) -> bool:
        if not self._holds(held.key, held.fence):
            return False
        dead = self._clock() + hold
        planted = self._planted.pop(held.key, None)
        if planted is None:
            frame, until = self._entries[held.key]
            self._entries[held.key] = (frame, max(dead, until))
        else:
            self._planted[held.key] = (held.fence.token, max(dead, planted[1]))  # now the youngest
        return True

    def release_many(self, held: Sequence[Held], /) -> Awaitable[None]:
        """See ``Leases.release_many``."""
        for one in held:
            if self._holds(one.key, one.fence):
                self._drop(one.key)
        return Done(None)

    def used_many(self, keys: Sequence[bytes], /) -> Awaitable[None]:
        """See ``Used.used_many``."""
        now = self._clock()
        for key in keys:
            held = self._entries.get(key)
            if held is not None and now < held[1]:  # the dead stay where the sweep comes by
                self._entries.move_to_end(key)
        return Done(None)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
