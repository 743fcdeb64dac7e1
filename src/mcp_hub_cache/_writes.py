"""Writing: what changes an entry, from a value or without one.

Rules:
- An unconditional write wins over every load in progress. A fenced one lands only where its token still stands.
- A write that failed leaves nothing older behind: what it was to replace is removed, and can't pass for its successor.
- What has many keys goes in chunks, each with the deadline to itself.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

from ._classes import ClassSet
from ._codec import encode
from ._engine import CHUNK, Engine, Session, every
from ._exceptions import StoreError, StoreTimeoutError, ValueTooLargeError
from ._frame import Frame, Mark
from ._freshness import Life, Span, span
from ._placeholders import heed
from ._protocols import Fence, Outcome, Patch, Write
from ._reads import Reads
from ._steps import LARGE, STEP, last
from ._tags import ANY_DIGEST, mark_key, tag_digest
from ._tokens import new_token

T = TypeVar("T")

_Entry: TypeAlias = tuple[bytes, int, bytes, Life]  # key, codec, payload, how long it lives

# What ``Write(...)`` does, without its frame of Python.
_write: Final[Callable[[tuple[bytes, bytes, float | None, Fence | None, bool]], Write]] = partial(tuple.__new__, Write)
_TRIES: Final = 3  # for what is compared and written: others may be quicker so often


class Writes:
    """Writes through one engine.

    Args:
        engine: Whose store to write to.
        reads: The way to what is there.
    """

    def __init__(self, engine: Engine, reads: Reads) -> None:
        self._engine = engine
        self._reads = reads
        self._store = engine.store
        self._pack = engine.form.pack
        self._unbounded = min(engine.limits)  # bytes of a payload that is within all limits
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
        return codec, payload if len(payload) <= self._unbounded else self.bounded(codec, payload)

    def bounded(self, codec: int, payload: bytes) -> bytes:
        """Return *payload*.

        Raises:
            ValueTooLargeError: It is larger than this cache takes.
        """
        excess = self._engine.limits.excess(codec, payload)
        if excess:
            raise ValueTooLargeError(f"the value {excess}")
        return payload

    async def write(
        self,
        key: bytes,
        codec: int,
        payload: bytes,
        life: Life,
        tags: Collection[str] = (),
    ) -> None:
        """Store one entry, unconditionally: wins over loads in progress."""
        session = self._engine.session()
        session.forget(key)
        if tags or len(payload) > LARGE:
            await self._write_chunk(session, [(key, codec, payload, life)], tags)
            return
        write = self.framed(key, codec, payload, life)
        # ``_submit`` spelled out: one coroutine less.
        try:
            outcome: Outcome = await session.lines.write(self._write, key, write, len(write.frame))
        except StoreError as error:
            outcome = error
        finally:
            session.l1.drop(key)
        if outcome != "done" and isinstance(outcome, StoreError):
            await self.withdraw(session, key, outcome)
            self._engine.trouble(outcome)

    async def _marks(self, session: Session, key: bytes, tags: Collection[str]) -> tuple[Mark, ...] | None:
        taken = await session.marks.taken(session.marks.take(self._engine.root(key), map(tag_digest, tags)))
        return None if taken is None else tuple([Mark(digest, mark) for digest, mark in taken.items()])

    async def write_many(self, entries: Sequence[_Entry], tags: Collection[str] = ()) -> None:
        """Store (key, codec, payload, life) each, unconditionally: wins over loads in progress."""
        session = self._engine.session()
        for key, *_ in entries:
            session.forget(key)
        problem: StoreError | None = None
        for start in range(0, len(entries), CHUNK):
            try:
                await self._write_chunk(session, entries[start : start + CHUNK], tags)
            except StoreError as error:  # when all has been tried
                problem = problem or error
        if problem is not None:
            raise problem

    async def _write_chunk(self, session: Session, entries: Sequence[_Entry], tags: Collection[str]) -> None:
        if not tags and all(len(payload) <= LARGE for _, _, payload, _ in entries):
            await self._hand_on(session, [self.framed(*entry) for entry in entries])
            return
        # It takes something before it can be handed on. In a task of its own: it is carried out where the caller
        # leaves, as what takes one trip is, unless the key has been changed once more by then.
        claim = object()
        session.claims.update(dict.fromkeys([key for key, *_ in entries], claim))
        written = _shielded(session.run(self._write_later(session, entries, tags, claim)))
        try:
            _, late = await self._in_time(session, written, None)
        except _EndedError:
            return
        if late is not None:
            for key, *_ in entries:
                await self.withdraw(session, key, late)

    async def _write_later(
        self, session: Session, entries: Sequence[_Entry], tags: Collection[str], claim: object
    ) -> None:
        marks: tuple[Mark, ...] | None = ()
        sums: list[int | None] = []
        problem: BaseException | None = None
        try:
            if tags:
                marks = await self._marks(session, entries[0][0], tags)
            if marks is not None:
                sums = [await self.summed(key, payload, marks) for key, _, payload, _ in entries]
        except (StoreError, asyncio.CancelledError) as error:  # cancelled: the program ends
            marks, problem = None, error
        ours = [session.claims.get(key) is claim for key, *_ in entries]
        for (key, *_), is_ours in zip(entries, ours, strict=True):
            if is_ours:
                del session.claims[key]
        if marks is not None:
            framed = zip(entries, sums, ours, strict=True)
            writes = [self.framed(*entry, marks=marks, summed=summed) for entry, summed, is_ours in framed if is_ours]
            await self._hand_on(session, writes)
            return
        # What the entries were to replace would outlive the next invalidation of these tags.
        left = [key for (key, *_), is_ours in zip(entries, ours, strict=True) if is_ours]
        if isinstance(problem, asyncio.CancelledError):
            self._hand_on_deletes(session, left)
        else:
            await self._submit_all(session, self._delete, [(key, key) for key in left])
        if problem is not None:
            raise problem

    async def _hand_on(self, session: Session, writes: Sequence[Write]) -> None:
        errors: list[StoreError] = []
        outcomes = await self._submit_all(session, self._write, [(one.key, one) for one in writes])
        for write, outcome in zip(writes, outcomes, strict=True):
            if isinstance(outcome, StoreError):
                errors.append(outcome)
                await self.withdraw(session, write.key, outcome)
        self._engine.trouble(*errors)

    async def _in_time(
        self, session: Session, work: Coroutine[Any, Any, T], instead: T
    ) -> tuple[T, StoreTimeoutError | None]:
        """Return what *work*, an operation of several trips, returns; *instead*, and why, if it takes too long."""
        try:
            return await self._engine.budget(session).within(work), None
        except StoreTimeoutError as late:
            self._engine.trouble(late)
            return instead, late

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
        try:
            return await every(futures)
        finally:
            for key, _ in items:
                session.l1.drop(key)

    async def summed(self, key: bytes, payload: bytes, marks: tuple[Mark, ...]) -> int | None:
        """Return what makes ``framed`` quick with a *payload* that is large; None: it is not, or nothing does."""
        if len(payload) <= LARGE:
            return None
        return await last(self._engine.form.sums_to_pack(key, payload, marks, STEP))

    def framed(
        self,
        key: bytes,
        codec: int,
        payload: bytes,
        life: Life,
        *,
        fence: Fence | None = None,
        by_caller: bool = False,
        cost: float = 0.0,
        marks: tuple[Mark, ...] = (),
        summed: int | None = None,
    ) -> Write:
        """Return the write of a new entry, as of now; sees that its marks live as long as it does."""
        now = self._store.now()
        until = self._span(now, life)
        frame = self._pack(
            key,
            payload,
            codec=codec,
            token=new_token(),
            created=now,
            fresh_until=until.fresh_until,
            keep_until=until.keep_until,
            cost=cost,
            marks=marks,
            summed=summed,
        )
        if marks:
            self._prolong(key, marks, until.keep_until - now)
        return _write((key, frame, until.keep(now), fence, by_caller))

    def _span(self, now: float, life: Life) -> Span:
        ttl, stale_ttl, jitter = life
        return span(now, ttl, stale_ttl, jitter, self._engine.draw()) if jitter else span(now, ttl, stale_ttl)

    def _prolong(self, key: bytes, marks: tuple[Mark, ...], keep: float) -> None:
        self._engine.session().marks.prolong(self._engine.root(key), marks, keep)

    def patched(self, key: bytes, frame: Frame, life: Life) -> Patch:
        """Return the patch that lets the entry in *frame* live anew from now; sees to its marks."""
        now, head = self._store.now(), frame.head
        until = self._span(now, life)
        patched = self._engine.form.prolonged(key, frame, fresh_until=until.fresh_until, keep_until=until.keep_until)
        self._prolong(key, frame.marks, until.keep_until - now)
        # The serving store's id: a switch of stores in between makes it refuse.
        return Patch(key, Fence(self._store.id, head.token), patched, until.keep(now))

    def patch(self, session: Session, patch: Patch) -> Coroutine[Any, Any, Outcome]:
        """Carry out a patch."""
        return self._submit(session, self._patch, patch.key, patch)

    def put(self, session: Session, write: Write) -> Coroutine[Any, Any, Outcome]:
        """Carry out a fenced write."""
        return self._submit(session, self._write, write.key, write, len(write.frame))

    async def _submit(self, session: Session, call: Any, key: bytes, item: Any, size: int = 0) -> Outcome:
        try:
            outcome: Outcome = await session.lines.write(call, key, item, size)
        except StoreError as error:
            outcome = error
        finally:  # where nobody waits for it any more, too
            session.l1.drop(key)
        if isinstance(outcome, StoreError):
            self._engine.trouble(outcome)
        return outcome

    async def add(self, key: bytes, codec: int, payload: bytes, life: Life, tags: Collection[str] = ()) -> bool:
        """Store only where no fresh entry is: begin, then write what the beginning's token allows."""
        session = self._engine.session()
        added, _ = await self._in_time(session, self._add(session, key, codec, payload, life, tags), False)
        return added

    async def _add(  # noqa: PLR0917  # what an entry is made of
        self, session: Session, key: bytes, codec: int, payload: bytes, life: Life, tags: Collection[str]
    ) -> bool:
        for _ in range(_TRIES):
            marks = await self._marks(session, key, tags) if tags else ()
            if marks is None or (begun := await session.placeholders.begin(key)) is None:
                return False
            held = session.placeholders.hold(key, begun) if begun.leader else None
            outcome: Outcome = "refused"
            try:
                if await self._reads.fresh_frame(session, key, begun.frame) is not None:
                    return False
                summed = await self.summed(key, payload, marks)
                write = self.framed(
                    key, codec, payload, life, fence=begun.fence, by_caller=True, marks=marks, summed=summed
                )
                outcome = await self.put(session, write)
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
        """Give the fresh entry under *key* a new ttl from now; what it may stand in beyond that stays as long."""
        session = self._engine.session()
        touched, _ = await self._in_time(session, self._touch(session, key, ttl), False)
        return touched

    async def _touch(self, session: Session, key: bytes, ttl: float) -> bool:
        for _ in range(_TRIES):
            frame = await self._reads.frame(key)
            if frame is None:
                return False
            head = frame.head
            stale_ttl = head.keep_until - head.fresh_until if head.fresh_until < math.inf else 0.0
            outcome = await self.patch(session, self.patched(key, frame, Life(ttl, stale_ttl)))
            if outcome != "refused":
                return outcome == "done"
        return False

    async def invalidate(self, root: bytes, tags: Collection[str]) -> bool:
        """Invalidate *tags* in the namespace whose keys begin with *root*; whether the store has taken note in time.

        Cancellation: what has begun is carried out; so it is where the time is over.
        """
        digests = [tag_digest(tag) for tag in tags]
        session = self._engine.session()
        wanted = frozenset(digests)
        session.flights.detach_all(root, only=lambda flight: flight.cargo.is_of(wanted))
        told = _shielded(session.run(self._invalidate(session, root, digests)))
        try:
            errors, late = await self._in_time(session, told, [])
        except _EndedError:
            return False
        self._engine.trouble(*errors)
        return late is None and not errors

    async def _invalidate(self, session: Session, root: bytes, digests: Sequence[bytes]) -> list[StoreError]:
        # Whoever adds a tag inside its loader takes the tag's mark and then looks whether "any" still stands: in this
        # order it can't have both the new mark of the one and the old mark of the other.
        errors: list[StoreError] = []
        keys = [mark_key(root, digest) for digest in (ANY_DIGEST, *digests)]
        try:
            for start, end in ((0, 1), *((at, at + CHUNK) for at in range(1, len(keys), CHUNK))):
                asked = keys[start:end]
                for key in asked:
                    session.marks.forget(key)
                answers = await self._submit_all(session, self._delete, [(key, key) for key in asked])
                errors += [answer for answer in answers if isinstance(answer, StoreError)]
        except asyncio.CancelledError:  # the program ends
            self._hand_on_deletes(session, keys)
            raise
        return errors

    def _hand_on_deletes(self, session: Session, keys: Iterable[bytes]) -> None:
        """Delete *keys*, and wait for nothing: what is handed on is carried out before the session has ended."""
        for key in keys:
            session.lines.write(self._delete, key, key).add_done_callback(heed)
            session.l1.drop(key)

    async def delete_many(self, keys: Sequence[bytes]) -> int:
        """Remove; answer how many fresh entries went. Wins over loads in progress."""
        session = self._engine.session()
        for key in keys:
            session.forget(key)
        removed = 0
        errors: list[StoreError] = []
        for start in range(0, len(keys), CHUNK):
            chunk = [(key, key) for key in keys[start : start + CHUNK]]
            answers = await self._submit_all(session, self._delete, chunk)
            for (key, _), answer in zip(chunk, answers, strict=True):
                if isinstance(answer, StoreError):
                    errors.append(answer)
                elif self._reads.fresh_head(key, answer) is not None:
                    removed += 1
        self._engine.trouble(*errors)
        return removed


class _EndedError(Exception):
    """The cache was closed before a task of its own had ended."""


async def _shielded(task: asyncio.Task[T]) -> T:
    """Return what *task* does, which goes on where its caller leaves.

    Raises:
        _EndedError: It was ended by whoever closed the cache; a caller that nobody cancelled is not cancelled for that.
    """
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.add_done_callback(heed)
        raise
    if task.cancelled():
        raise _EndedError
    return task.result()
