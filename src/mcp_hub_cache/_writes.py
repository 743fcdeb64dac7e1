"""Writing: what changes an entry, from a value or without one.

Rules:
- An unconditional write wins over every load in progress. A fenced one lands only where its token still stands.
- A write that failed leaves nothing older behind: what it was to replace is removed, and can't pass for its successor.
- What has many keys goes in chunks, each with the deadline to itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final

from ._classes import ClassSet
from ._codec import encode
from ._engine import CHUNK, OWNED, Engine, Session, every
from ._exceptions import StoreError, ValueTooLargeError
from ._frame import Mark, pack, patch_head
from ._placeholders import heed
from ._policy import span
from ._protocols import Fence, Outcome, Patch, Write
from ._tokens import new_token

# What ``Write(...)`` does, without its frame of Python.
_write: Final[Callable[[tuple[bytes, bytes, float | None, Fence | None]], Write]] = partial(tuple.__new__, Write)
_TRIES: Final = 3  # for what is compared and written: others may be quicker so often


class Writes:
    """Writes through one engine.

    Args:
        engine: Whose store to write to.
        max_value_bytes: The largest stored form of a value.
    """

    def __init__(self, engine: Engine, max_value_bytes: int) -> None:
        self._engine = engine
        self._store = engine.store
        self._max_value_bytes = max_value_bytes
        # Bound once: a line tells kinds of requests apart by the identity of their call.
        self._write = engine.store.write_many
        self._patch = engine.store.patch_many
        self._delete = engine.store.delete_many

    def encode(self, value: object, classes: ClassSet) -> tuple[int, bytes]:
        """Return codec and payload of *value*.

        Raises:
            UncacheableError: It can't be stored so that a hit equals a miss.
            ValueTooLargeError: Its stored form is larger than this cache takes.
        """
        codec, payload = encode(value, classes)
        if len(payload) > self._max_value_bytes:
            raise ValueTooLargeError(
                f"the value takes {len(payload):,} bytes; this cache stores at most {self._max_value_bytes:,}. "
                "Store less, or raise max_value_bytes."
            )
        return codec, payload

    async def write(self, key: bytes, codec: int, payload: bytes, ttl: float) -> None:
        """Store one entry, unconditionally: wins over loads in progress."""
        session = self._engine.session()
        session.forget(key)
        write = self.framed(key, codec, payload, ttl)
        # ``_submit`` spelled out: one coroutine less.
        try:
            outcome: Outcome = await session.lines.write(self._write, key, write, len(write.frame))
        except StoreError as error:
            outcome = error
        session.l1.drop(key)
        if outcome != "done" and isinstance(outcome, StoreError):
            self._engine.trouble(outcome)
            await self.withdraw(session, key, outcome)

    async def write_many(self, entries: Sequence[tuple[bytes, int, bytes]], ttl: float) -> None:
        """Store (key, codec, payload) each, unconditionally: wins over loads in progress."""
        session = self._engine.session()
        for key, _, _ in entries:
            session.forget(key)
        for start in range(0, len(entries), CHUNK):
            writes = [self.framed(*entry, ttl) for entry in entries[start : start + CHUNK]]
            outcomes = await self._submit_all(session, self._write, [(one.key, one) for one in writes])
            for write, outcome in zip(writes, outcomes, strict=True):
                if isinstance(outcome, StoreError):
                    self._engine.trouble(outcome)
                    await self.withdraw(session, write.key, outcome)

    async def withdraw(self, session: Session, key: bytes, cause: StoreError | None = None) -> None:
        """Remove what stands under *key*: its successor could not be stored, and it must not pass for that."""
        future = session.lines.write(self._delete, key, key)
        future.add_done_callback(heed)
        session.l1.drop(key)
        if cause is None or not cause.outage:  # what does not answer has cost its deadline already
            await asyncio.wait([future])

    async def _submit_all(self, session: Session, call: Any, items: Sequence[tuple[bytes, Any]]) -> list[Any]:
        """Hand on a chunk of writes and return their outcomes, ``StoreError``s among them."""
        sizes = (len(item.frame) if isinstance(item, Write) else 0 for _, item in items)
        futures = [session.lines.write(call, key, item, size) for (key, item), size in zip(items, sizes, strict=True)]
        outcomes = await every(futures)
        for key, _ in items:
            session.l1.drop(key)
        return outcomes

    def framed(
        self,
        key: bytes,
        codec: int,
        payload: bytes,
        ttl: float,
        *,
        fence: Fence | None = None,
        cost: float = 0.0,
        owner: bytes | None = None,
    ) -> Write:
        """Return the write of a new entry, as of now."""
        now = self._store.now()
        until = span(now, ttl)
        frame = pack(
            key,
            payload,
            codec=codec,
            token=new_token(),
            created=now,
            fresh_until=until.fresh_until,
            keep_until=until.keep_until,
            cost=cost,
            marks=() if owner is None else (Mark(owner, OWNED),),
        )
        return _write((key, frame, until.keep(now), fence))

    def put(self, session: Session, write: Write) -> Coroutine[Any, Any, Outcome]:
        """Carry out a fenced write."""
        return self._submit(session, self._write, write.key, write, len(write.frame))

    async def _submit(self, session: Session, call: Any, key: bytes, item: Any, size: int = 0) -> Outcome:
        try:
            outcome: Outcome = await session.lines.write(call, key, item, size)
        except StoreError as error:
            outcome = error
        session.l1.drop(key)
        if isinstance(outcome, StoreError):
            self._engine.trouble(outcome)
        return outcome

    async def add(self, key: bytes, codec: int, payload: bytes, ttl: float) -> bool:
        """Store only where no fresh entry is: begin, then write what the beginning's token allows."""
        session = self._engine.session()
        for _ in range(_TRIES):
            begun = await session.placeholders.begin(key)
            if begun is None:
                return False
            held = session.placeholders.hold(key, begun) if begun.leader else None
            outcome: Outcome = "refused"
            try:
                if self._engine.fresh_frame(key, begun.frame) is not None:
                    return False
                outcome = await self.put(session, self.framed(key, codec, payload, ttl, fence=begun.fence))
            finally:
                if held is not None:
                    session.placeholders.end(held, stored=outcome == "done")
            if outcome == "done":
                session.forget(key)
                return True
            if outcome != "refused":
                return False
        return False

    async def touch(self, key: bytes, ttl: float) -> bool:
        """Give the fresh entry under *key* a new ttl from now."""
        session = self._engine.session()
        for _ in range(_TRIES):
            head = await self._engine.head(key)
            if head is None:
                return False
            now = self._store.now()
            until = span(now, ttl)
            patched = patch_head(head, fresh_until=until.fresh_until, keep_until=until.keep_until)
            # The serving store's id: a switch of stores in between makes it refuse, and the next try finds out.
            fence = Fence(self._store.id, head.token)
            outcome = await self._submit(session, self._patch, key, Patch(key, fence, patched, until.keep(now)))
            if outcome != "refused":
                return outcome == "done"
        return False

    async def delete_many(self, keys: Sequence[bytes]) -> int:
        """Remove; answer how many fresh entries went. Wins over loads in progress."""
        session = self._engine.session()
        for key in keys:
            session.forget(key)
        removed = 0
        for start in range(0, len(keys), CHUNK):
            chunk = [(key, key) for key in keys[start : start + CHUNK]]
            for answer in await self._submit_all(session, self._delete, chunk):
                if isinstance(answer, StoreError):
                    self._engine.trouble(answer)
                elif self._engine.fresh_head(answer) is not None:
                    removed += 1
        return removed
