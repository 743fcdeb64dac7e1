"""Batching: requests that arrive while others are in flight become one call.

Strategy, after the way pipelining database drivers work: a request that finds its line idle starts at once, in its
caller's own step. Those that find it busy gather, and go together at the end of the loop's iteration, or as soon as
they fill a batch; in both cases as places in flight become free. Callers who have been answered tend to ask again in
the iteration that wakes them, so what they ask then gathers, too. Nobody waits for company longer than that.

Rules:
- Callers await their own future and nothing else. One that is cancelled leaves; the batch goes on. So no call of the
  layer below is ever cut off in the middle because somebody lost interest.
- A lane has a line for reads and one for writes, each with a few batches in flight. Writes of a key happen in the
  order they were asked for: no two batches in flight have a key in common. A read that is asked for after a write of
  its key waits for it.
- What has been submitted as a write happens, even when nobody waits any more; a read that nobody waits for is dropped.
- One deadline counts from submission and covers queueing. It frees the caller; what is in flight ends by the lower
  layer's own limits. One timer per lane watches the oldest request: no timer per call.
- A timer that itself ran late proves only that this process was busy. It grants a moment to take in what has arrived
  meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from ._answer import when_done
from ._batches import Batch, Call, Queue
from ._exceptions import StoreError, StoreExhaustedError, StoreProtocolError, StoreTimeoutError, StoreUnreachableError

LATE: Final = 0.05
"""Seconds by which a timer may be late before the process counts as busy."""


class _Held(NamedTuple):
    """A read that waits for writes of its keys."""

    call: Call
    keys: Sequence[bytes]
    items: Sequence[Any]
    grouped: bool
    future: asyncio.Future[Any]
    due: float


class Lane:
    """The reads and writes of keys that may share a batch.

    Args:
        loop: The running one.
        deadline: Seconds from submission to the answer.
        max_items: In a batch; only a group may be larger.
        max_bytes: In a batch of writes; only a single write may be larger.
        reads_in_flight: Batches at once.
        writes_in_flight: Batches at once.
        max_queued: Requests that may wait, reads and writes each.
        home: Where the lane of every key with unanswered writes is noted.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        deadline: float,
        max_items: int = 64,
        max_bytes: int = 1024 * 1024,
        reads_in_flight: int = 3,
        writes_in_flight: int = 2,
        max_queued: int = 100_000,
        home: dict[bytes, Lane] | None = None,
    ) -> None:
        self._loop = loop
        self._create_future = loop.create_future
        self._deadline = deadline
        self._reads_in_flight = reads_in_flight
        self._writes_in_flight = writes_in_flight
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._reads = Queue(self._due, max_items, max_bytes, max_queued)
        self._writes = Queue(self._due, max_items, max_bytes, max_queued)
        self._reading: set[Batch] = set()
        self._writing: set[Batch] = set()
        self._abandoned: set[Batch] = set()
        self._unwritten: dict[bytes, int] = {}  # writes queued or in flight, by key
        self._held: dict[bytes, list[_Held]] = {}
        self._home = {} if home is None else home
        self._gathering = False
        self._filling: Batch | None = None  # the batch of single reads that takes what comes in this iteration
        self._storing: Batch | None = None  # the same of writes
        self._going = False
        self._timer: asyncio.TimerHandle | None = None
        self._settled: asyncio.Future[None] | None = None

    def read(self, call: Call, key: bytes, item: Any) -> asyncio.Future[Any]:
        """Return the future answer of *call* to *item*."""
        future = self._create_future()
        batch = self._filling
        if key in self._unwritten:
            self._hold(_Held(call, (key,), (item,), grouped=False, future=future, due=self._due()))
        elif batch is not None and batch.call is call:  # what most find while there is much to do
            batch.items.append(item)
            batch.futures.append(future)
            if len(batch.items) >= self._max_items:
                self._filling = None
                self._go_on()
        elif not (self._reading or self._gathering):
            self._start(Batch(call, (item,), (future,)), self._reading)
        elif (batch := self._reads.batch(call)) is not None:
            batch.add(item, future)
            self._joined(self._reads, batch)
            if self._reads.has_room(batch) and batch.counts is None:
                self._filling = batch
        else:
            self._refuse(future)
        return future

    def read_group(self, call: Call, keys: Sequence[bytes]) -> asyncio.Future[Any]:
        """Return the future answers to all *keys* as one list: one request, where ``read`` of each would be many."""
        future = self._create_future()
        self._filling = None
        if not self._unwritten.keys().isdisjoint(keys):
            self._hold(_Held(call, keys, keys, grouped=True, future=future, due=self._due()))
        elif not (self._reading or self._gathering):
            batch = Batch(call)
            batch.add_group(keys, future)
            self._start(batch, self._reading)
        elif (queued := self._reads.batch(call, len(keys))) is not None:
            queued.add_group(keys, future)
            self._joined(self._reads, queued)
        else:
            self._refuse(future)
        return future

    def write(self, call: Call, key: bytes, item: Any, size: int) -> asyncio.Future[Any]:
        """Return the future outcome; it happens whether or not anybody awaits it."""
        future = self._create_future()
        unwritten, batch = self._unwritten, self._storing
        if batch is not None and batch.call is call and key not in unwritten and batch.size + size <= self._max_bytes:
            # What most find while there is much to do.
            batch.items.append(item)
            batch.futures.append(future)
            batch.keys.append(key)
            batch.size += size
            unwritten[key] = 1
            self._home[key] = self
            if len(batch.items) >= self._max_items:
                self._storing = None
                self._go_on()
            return future
        others = unwritten.get(key, 0)
        idle = not (self._writing or self._gathering)
        queue = self._writes
        batch = Batch(call) if idle else queue.last(call, size) if others else queue.batch(call, 1, size)
        if batch is None:
            self._refuse(future)
            return future
        unwritten[key] = others + 1
        self._home[key] = self
        batch.add(item, future)
        batch.keys.append(key)
        batch.size += size
        batch.contested |= others > 0
        if idle:
            self._start(batch, self._writing)
        else:
            self._joined(queue, batch)
            self._storing = batch if queue.has_room(batch) else None
        return future

    def _joined(self, queue: Queue, batch: Batch) -> None:
        if not self._gathering:
            self._gather()
        elif not queue.has_room(batch):
            self._go_on()

    def _refuse(self, future: asyncio.Future[Any]) -> None:
        future.set_exception(
            StoreExhaustedError("too many requests wait for the store already.", cure="It is too slow for this load.")
        )

    # What comes in one iteration of the loop

    def _gather(self) -> None:
        """Let gather what comes in this iteration, behind what is ready to run in it by now."""
        self._gathering = True
        self._loop.call_soon(self._gathered)

    def _gathered(self) -> None:
        self._gathering = False
        self._filling = self._storing = None
        self._writes.stamp()
        self._reads.stamp()
        self._go_on()

    def _due(self) -> float:
        """Return when what is asked for now is due, and see to it that somebody looks."""
        due = self._loop.time() + self._deadline
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._watch, due)
        return due

    # Batches

    def _go_on(self) -> None:
        if self._going:  # a call that was over at once got us here again: the loops below go on, not the stack
            return
        self._going = True
        try:
            while self._may_go(self._writes, self._writing, self._writes_in_flight):
                if self._is_overtaking(self._writes.batches[0]):
                    break
                self._start(self._writes.pop(), self._writing)
            while self._may_go(self._reads, self._reading, self._reads_in_flight):
                batch = self._reads.pop()
                if not batch.is_left():
                    self._start(batch, self._reading)
        finally:
            self._going = False

    def _may_go(self, queue: Queue, flying: set[Batch], most: int) -> bool:
        return bool(queue.batches) and len(flying) < most and not (self._gathering and queue.grows())

    def _is_overtaking(self, batch: Batch) -> bool:
        return batch.contested and any(not {*batch.keys}.isdisjoint(flying.keys) for flying in self._writing)

    def _start(self, batch: Batch, flying: set[Batch]) -> None:
        flying.add(batch)
        if len(batch.dues) < len(batch.futures):
            batch.stamp(self._due())
        try:
            answer = batch.call(batch.items)
        except Exception as error:  # noqa: BLE001  # _end hands it to the callers
            self._end(batch, error, ())
            return
        batch.work = work = answer if isinstance(answer, asyncio.Future) else asyncio.ensure_future(answer)
        when_done(work, partial(self._ended, batch))

    def _ended(self, batch: Batch, work: asyncio.Future[Any]) -> None:
        closed = StoreUnreachableError("the store was closed while it was asked.") if work.cancelled() else None
        error = closed or work.exception()
        self._end(batch, error, work.result() if error is None else ())

    def _end(self, batch: Batch, error: BaseException | None, answers: Sequence[Any]) -> None:
        for flying in (self._reading, self._writing, self._abandoned):
            flying.discard(batch)
        if error is None and len(answers) != len(batch.items):
            error = StoreProtocolError(f"{len(batch.items)} requests got {len(answers)} answers.")
        if error is None:
            batch.answer(answers)
        else:
            batch.fail(StoreError.of(error))
        if batch.keys:
            self._written(batch.keys)
        if len(batch.futures) > 1 and not self._gathering:
            self._gather()  # those who have just been answered are ready to run, and may ask again
        if self._reads.batches or self._writes.batches:
            self._go_on()

    # Writes, and reads that wait for them

    def _written(self, keys: Sequence[bytes]) -> None:
        unwritten = self._unwritten
        for key in keys:
            others = unwritten[key] - 1
            if others:
                unwritten[key] = others
                continue
            del unwritten[key], self._home[key]
            if self._held:
                for held in self._held.pop(key, ()):
                    self._release(held)
        if self._settled is not None and not unwritten:
            self._settled.set_result(None)
            self._settled = None

    def _hold(self, held: _Held) -> None:
        key = next(key for key in held.keys if key in self._unwritten)
        self._held.setdefault(key, []).append(held)

    def _release(self, held: _Held) -> None:
        if not self._unwritten.keys().isdisjoint(held.keys):
            self._hold(held)
            return
        self._filling = None
        batch = self._reads.batch(held.call, len(held.items))
        if batch is None:
            self._refuse(held.future)
            return
        batch.stamp(self._due())
        batch.dues.append(held.due)
        if held.grouped:
            batch.add_group(held.items, held.future)
        else:
            batch.add(held.items[0], held.future)
        self._joined(self._reads, batch)

    def settled(self) -> asyncio.Future[None]:
        """Return a future that is done when no write is queued or in flight, whether or not anybody waits for it."""
        settled = self._settled or self._loop.create_future()
        if self._unwritten:
            self._settled = settled
        else:
            settled.set_result(None)
        return settled

    # Deadlines

    def _watch(self, scheduled: float) -> None:
        now = self._loop.time()
        if now - scheduled > LATE:
            self._timer = self._loop.call_at(now + LATE, self._watch, now + LATE)
            return
        self._timer = None
        waiting = [(read.future, read.due) for held in self._held.values() for read in held]
        for batch in self._batches():
            waiting += zip(batch.futures, batch.dues, strict=False)
        next_due = min((due for future, due in waiting if due > now and not future.done()), default=0.0)
        for future, due in waiting:
            if due <= now and not future.done():
                future.set_exception(
                    StoreTimeoutError(
                        f"no answer from the store within {self._deadline:g} s.", cure="Is it overloaded?"
                    )
                )
        if next_due:
            self._timer = self._loop.call_at(next_due, self._watch, next_due)
        self._abandon()

    def _batches(self) -> list[Batch]:
        flying = (self._reading, self._writing, self._abandoned)
        return [batch for some in (*flying, self._reads.batches, self._writes.batches) for batch in some]

    def _abandon(self) -> None:
        """Give the places of reads that nobody waits for to others; so many at once that the store is not buried."""
        for batch in list(self._reading):
            stuck = all(future.done() for future in batch.futures)
            if stuck and len(self._reading) + len(self._abandoned) < 4 * self._reads_in_flight:
                self._reading.remove(batch)
                self._abandoned.add(batch)
        self._go_on()

    async def aclose(self) -> None:
        """Fail what waits, and end what is in flight."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._filling = self._storing = None
        closed = StoreUnreachableError("the cache was closed.")
        batches = self._batches()
        works = [batch.work for batch in batches if batch.work is not None]
        for queue in (self._reads, self._writes):
            while queue.batches:
                queue.pop().fail(closed)
        for read in (read for held in self._held.values() for read in held):
            if not read.future.done():
                read.future.set_exception(closed)
        self._held.clear()
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        for batch in batches:  # what ended just now, and was not told
            batch.fail(closed)
