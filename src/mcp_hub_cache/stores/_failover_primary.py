"""The store that calls go to as long as it can be reached, and what is done around each of them.

Rules:
- How a call ended is reported (``_failover_keeper``) before anybody hears of it.
- What the journal covers reads as a miss, whether it was noted before the call or while it was under way. It is deleted
  here before anything of it is begun or written, so that no replay ever comes after a newer write.
- A set, delete or clear that failed is noted, and so is one that was cut off: nobody knows whether it was done.
- So is a beginning in doubt: what it may have planted would be waited for until it expires.
- Loads stand apart otherwise. Their fenced writes say nothing about what stood there before, so they are noted only
  when in doubt; otherwise a full server would have its prefix cleared by those who can't store. One whose key the
  journal covers is refused by what is deleted first.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Final, TypeVar, cast

from .._exceptions import StoreError, StoreProtocolError
from .._frame import HEAD_SIZE
from .._protocols import Begun, Fence, Held, Leases, Outcome, Patch, Store, Used, Write
from ._failover_journal import Doubts, Journal
from ._failover_keeper import Keeper

T = TypeVar("T")
W = TypeVar("W", bound=Write | Patch)
F = TypeVar("F", bound=Write | Patch | Held)
Frames = list[bytes | None]

_SMALL: Final = 64 * 1024  # bytes up to which a round trip is none that may take its time


def fitted(items: Sequence[F], made: int, store: Store) -> list[F]:
    """Return *items*, with fences that name the store *made* taken for fences of *store*.

    Whoever reads a frame through a ``FailoverStore`` can only name that one; the token says whether it is still there.
    """
    return [
        cast("F", item._replace(fence=Fence(store.id, item.fence.token)))
        if item.fence is not None and item.fence.store == made
        else item
        for item in items
    ]


class Primary:
    """A store, with everything that must happen when it fails.

    Args:
        store: Where the bytes go.
        keeper: Told how every call ended.
        journal: What must not be believed.
    """

    def __init__(self, store: Store, keeper: Keeper, journal: Journal) -> None:
        self.store = store
        self._keeper = keeper
        self._journal = journal

    def _doubts(self, keys: Sequence[bytes]) -> Doubts:
        if len(self._journal):
            self._keeper.watch()
        return self._journal.doubts(keys)

    def _lane(self, keys: Sequence[bytes]) -> Hashable:
        return self.store.lane(keys[0]) if keys else None

    async def _told(
        self, name: str, asked: Awaitable[T], lane: Hashable = None, note: Callable[[], None] | None = None
    ) -> T:
        stopwatch = self._keeper.stopwatch
        started = stopwatch.start()
        try:
            answer = await asked
        except BaseException as error:
            stopwatch.stop(started)
            if note is not None:
                note()
            if isinstance(error, StoreError):
                self._keeper.failed(name, error, lane)
            raise
        self.heard(name, lane, stopwatch.stop(started), answer if isinstance(answer, list) else ())
        return answer

    def heard(self, name: str, lane: Hashable, seconds: float, moved: Sequence[object]) -> None:
        """A call brought its answer after *seconds*, having *moved* what may be large."""
        if seconds > self._keeper.slow_after and _size(moved) <= _SMALL:
            self._keeper.was_slow(name, lane, seconds)
        else:
            self._keeper.health.answered(name, lane)

    # Reading

    async def get_many(self, keys: Sequence[bytes]) -> Frames:
        """See ``Store``; so for all that follow."""
        return await self.read("get", self.store.get_many(keys), keys)

    async def head_many(self, keys: Sequence[bytes]) -> Frames:
        """See ``Store``."""
        return await self.read("head", self.store.head_many(keys), keys)

    async def read(self, name: str, asked: Awaitable[Frames], keys: Sequence[bytes]) -> Frames:
        """Await what was *asked* just now, and take out what must not be believed."""
        doubts = self._doubts(keys)
        frames = await self._told(name, asked, self._lane(keys))
        doubts |= self._doubts(keys)
        if not doubts:
            return frames
        return [None if doubts.concern(key, frame) else frame for key, frame in zip(keys, frames, strict=True)]

    async def scan(self, prefix: bytes) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        """See ``Store``."""
        try:
            async with aclosing(self.store.scan(prefix)) as pages:
                async for page in pages:
                    doubts = self._doubts([key for key, _ in page])
                    yield [item for item in page if not doubts.concern(*item)]
        except StoreError as error:
            self._keeper.failed("scan", error, None)
            raise
        self._keeper.health.answered("scan", None)

    # Beginning and writing

    async def begin_many(self, keys: Sequence[bytes], *, hold: float) -> list[Begun]:
        """See ``Store``."""

        async def begin() -> list[Begun]:
            await self._settle(keys)
            return await self.store.begin_many(keys, hold=hold)

        try:
            return await self._told("begin", begin(), self._lane(keys))
        except BaseException as error:
            if not isinstance(error, StoreError) or _in_doubt(error):
                self._keeper.note(keys)
            raise

    async def _settle(self, keys: Sequence[bytes]) -> None:
        if self._doubts(keys):
            await self._keeper.settle(keys)

    async def change(
        self, name: str, ask: Callable[[Sequence[W]], Awaitable[list[Outcome]]], items: Sequence[W]
    ) -> list[Outcome]:
        """Write or patch. An outage of the whole call is the outcome of each item that was sent.

        Raises:
            StoreError: The call failed as a whole, for another reason.
        """
        outcomes: list[Outcome] = ["refused"] * len(items)
        sent = {at: item for at, item in enumerate(items) if item.fence is None or item.fence.store == self.store.id}
        if not sent:
            return outcomes
        batch = list(sent.values())
        stopwatch, lane = self._keeper.stopwatch, self.store.lane(batch[0].key)
        started = stopwatch.start()
        try:
            await self._settle([item.key for item in batch])
            answers: Sequence[Outcome] | StoreError = await ask(batch)
        except StoreError as error:
            answers = error
        except BaseException:
            self.note(batch)
            raise
        finally:
            took = stopwatch.stop(started)
        for at, answer in zip(sent, self.changed(name, batch, answers, took, lane), strict=True):
            outcomes[at] = answer
        return outcomes

    def note(self, items: Iterable[Write | Patch]) -> None:
        """Nobody knows what became of *items*."""
        self._keeper.note(item.key for item in items if _is_change(item))

    def changed(
        self,
        name: str,
        items: Sequence[W],
        answers: Sequence[Outcome] | StoreError,
        seconds: float,
        lane: Hashable,
    ) -> list[Outcome]:
        """Report the *answers* to items that were sent, or the error that ended the call, and return the outcomes.

        Args:
            name: What was done.
            items: What it was done with.
            answers: What came of it.
            seconds: How long it took.
            lane: Whose they were when they were sent: a write may change that.

        Raises:
            StoreError: As for ``change``.
        """
        outcomes: list[Outcome] = [answers] * len(items) if isinstance(answers, StoreError) else list(answers)
        failed = [
            (item, outcome)
            for item, outcome in zip(items, outcomes, strict=True)
            if isinstance(outcome, StoreError) and (item.fence is None or item.fence.store == self.store.id)
        ]
        self._stored([item for item, outcome in zip(items, outcomes, strict=True) if outcome == "done"])
        if not failed:
            self.heard(name, lane, seconds, [item[1] for item in items if isinstance(item, Write)])
            return outcomes
        self._keeper.note(item.key for item, error in failed if _is_change(item) or _in_doubt(error))
        self._keeper.failed(name, failed[0][1], lane)  # one round trip, one failure
        if isinstance(answers, StoreError) and not answers.outage:
            raise answers
        return outcomes

    def _stored(self, items: Sequence[Write | Patch]) -> None:
        heads = {item.key: item.frame[:HEAD_SIZE] for item in items if isinstance(item, Write) and item.is_change}
        if heads:
            self._keeper.set(heads)
        if len(heads) < len(items):
            self._keeper.stored(item.key for item in items)

    async def delete_many(self, keys: Sequence[bytes]) -> Frames:
        """See ``Store``."""
        heads = await self._told(
            "delete", self.store.delete_many(keys), self._lane(keys), lambda: self._keeper.note(keys)
        )
        self._keeper.deleted(keys)
        return heads

    async def clear(self, prefix: bytes) -> int:
        """See ``Store``."""
        self._keeper.cleared(prefix)
        count = await self._told("clear", self.store.clear(prefix), note=lambda: self._keeper.note_prefix(prefix))
        self._keeper.cleared(prefix)
        return count

    # The rest

    async def ping(self, lane: Hashable) -> None:
        """See ``Store``."""
        await self._told("ping", self.store.ping(lane), lane)

    async def info(self) -> Mapping[str, str | int | float]:
        """See ``Store``."""
        return await self._told("info", self.store.info())

    async def renew_many(self, held: Sequence[Held], *, hold: float) -> list[bool]:
        """See ``Leases``."""
        assert isinstance(self.store, Leases)
        return await self._told("renew", self.store.renew_many(held, hold=hold), self._lane([one.key for one in held]))

    async def release_many(self, held: Sequence[Held]) -> None:
        """See ``Leases``."""
        assert isinstance(self.store, Leases)
        await self._told("release", self.store.release_many(held), self._lane([one.key for one in held]))

    async def used_many(self, keys: Sequence[bytes]) -> None:
        """See ``Used``; nothing where the store is none."""
        if isinstance(self.store, Used):
            await self._told("used", self.store.used_many(keys), self._lane(keys))


def _is_change(item: Write | Patch) -> bool:
    return isinstance(item, Write) and item.is_change


def _in_doubt(error: StoreError) -> bool:
    """Whether what failed with *error* may have been done all the same."""
    return error.outage or isinstance(error, StoreProtocolError) or type(error) is StoreError


def _size(moved: Sequence[object]) -> int:
    return sum(len(one) for one in moved if isinstance(one, bytes))
