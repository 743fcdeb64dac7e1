"""Batches of requests, and queues of batches: what goes together, and in which order. No I/O, and no loop.

A request is an entry in the lists of its batch: at 100 callers, an object, a clock call and a place in the queue for
each took 2 of the 12 µs that a read and its decoding cost in all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Any

Call = Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]


class Batch:
    """Requests that go together: ``futures``, ``dues``, ``counts`` and a write's ``keys`` belong together by place."""

    __slots__ = ("call", "contested", "counts", "dues", "futures", "items", "keys", "size", "work")

    def __init__(
        self, call: Call, items: Sequence[Any] = (), futures: Sequence[asyncio.Future[Any]] = ()
    ) -> None:  # fmt: skip
        self.call = call
        self.items = [*items]
        self.futures = [*futures]
        self.dues: list[float] = []  # those of the latest requests may be missing
        self.counts: list[int] | None = None  # items of each request, 0: one by itself; None: all are by themselves
        self.keys: list[bytes] = []
        self.size = 0
        self.contested = False  # another write of one of its keys was queued or in flight when that one came
        self.work: asyncio.Future[Any] | None = None

    def add(self, item: Any, future: asyncio.Future[Any]) -> None:
        """Add a request of one item."""
        self.items.append(item)
        self.futures.append(future)
        if self.counts is not None:
            self.counts.append(0)

    def add_group(self, items: Sequence[Any], future: asyncio.Future[Any]) -> None:
        """Add a request of many items, answered by a list."""
        if self.counts is None:
            self.counts = [0] * len(self.futures)
        self.items.extend(items)
        self.futures.append(future)
        self.counts.append(len(items))

    def stamp(self, due: float) -> None:
        """Give *due* to those that have none yet."""
        self.dues += [due] * (len(self.futures) - len(self.dues))

    def is_left(self) -> bool:
        """Whether nobody waits for any of it any more. Takes out the requests of one item that nobody waits for."""
        left = [future.done() for future in self.futures]
        if True in left and self.counts is None:
            live = [at for at, was_left in enumerate(left) if not was_left]
            self.items = [self.items[at] for at in live]
            self.futures = [self.futures[at] for at in live]
            self.dues = [self.dues[at] for at in live if at < len(self.dues)]
        return False not in left

    def answer(self, answers: Sequence[Any]) -> None:
        """Hand out *answers*, one for each item."""
        counts = self.counts
        if counts is not None:
            rest = iter(answers)
            answers = [list(islice(rest, count)) if count else next(rest) for count in counts]
        for future, answer in zip(self.futures, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    def fail(self, error: BaseException) -> None:
        """Tell everybody of *error*."""
        for future in self.futures:
            if not future.done():
                future.set_exception(error)


class Queue:
    """Batches that wait. The latest of each call is open: it takes requests as long as it has room."""

    def __init__(self, due: Callable[[], float], max_items: int, max_size: int, max_queued: int) -> None:
        self.batches: deque[Batch] = deque()
        self._open: dict[Call, Batch] = {}
        self._due = due
        self._max_items = max_items
        self._max_size = max_size
        self._max_queued = max_queued

    def batch(self, call: Call, count: int = 1, size: int = 0) -> Batch | None:
        """Return the batch that a request of *call* belongs to; None: too many wait."""
        batch = self._open.get(call)
        return batch if batch is not None and self.has_room(batch, count, size) else self._new(call)

    def last(self, call: Call, size: int) -> Batch | None:
        """The same for one that must not get ahead of any that is here."""
        batch = self.batches[-1] if self.batches else None
        return batch if batch is not None and batch.call == call and self.has_room(batch, 1, size) else self._new(call)

    def has_room(self, batch: Batch, count: int = 1, size: int = 0) -> bool:
        """Whether *batch* takes *count* items of *size* bytes more."""
        return len(batch.items) + count <= self._max_items and batch.size + size <= self._max_size

    def _new(self, call: Call) -> Batch | None:
        # Counted here alone, which lets the last batch be filled, and costs a request nothing.
        if sum([len(batch.futures) for batch in self.batches]) >= self._max_queued:
            return None
        before = self._open.get(call)
        if before is not None:
            before.stamp(self._due())
        batch = self._open[call] = Batch(call)
        self.batches.append(batch)
        return batch

    def stamp(self) -> None:
        """Note when what has come by now is due."""
        if self._open:
            due = self._due()
            for batch in self._open.values():
                batch.stamp(due)

    def grows(self) -> bool:
        """Whether the first batch may still get more requests."""
        first = self.batches[0]
        return self._open.get(first.call) is first and self.has_room(first)

    def pop(self) -> Batch:
        """Take out the first batch."""
        batch = self.batches.popleft()
        if self._open.get(batch.call) is batch:
            del self._open[batch.call]
        return batch
