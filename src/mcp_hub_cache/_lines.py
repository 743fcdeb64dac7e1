"""Batching: requests that arrive while others are in flight become one call.

Strategy, after the way pipelining database drivers work: a request that finds its line idle starts at once, in its
caller's own step; those that come meanwhile queue, and go together when a call returns. Nobody waits for company.

Rules:
- Callers await their own future and nothing else. One that is cancelled leaves; the batch goes on. So no call of the
  layer below is ever cut off in the middle because somebody lost interest.
- A lane has a line for reads, with a few batches in flight, and one for writes, with one. Writes of a key happen in the
  order they were asked for; a read that is asked for after a write of its key waits for it.
- What has been submitted as a write happens, even when nobody waits any more; a read that nobody waits for is dropped.
- One deadline counts from submission and covers queueing. It frees the caller; what is in flight ends by the lower
  layer's own limits. One timer per lane watches the oldest request: no timer per call.
- A timer that itself ran late proves only that this process was busy. It grants a moment to take in what has arrived
  meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, Final

from ._exceptions import StoreError, StoreExhaustedError, StoreProtocolError, StoreTimeoutError, StoreUnreachableError

Call = Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]

_LATE: Final = 0.05  # seconds by which a timer may be late before the process counts as busy
_LOOK_AHEAD: Final = 256  # requests looked at to fill a batch


class _Request:
    __slots__ = ("call", "due", "future", "item", "keys", "size")

    def __init__(  # noqa: PLR0917  # made in one place, for every request
        self, call: Call, keys: Sequence[bytes], item: Any, size: int, future: asyncio.Future[Any], due: float
    ) -> None:
        self.call = call
        self.keys = keys
        self.item = item
        self.size = size
        self.future = future
        self.due = due


class _Batch:
    __slots__ = ("abandoned", "requests", "work", "writes")

    def __init__(self, requests: list[_Request], *, writes: bool) -> None:
        self.requests = requests
        self.writes = writes
        self.abandoned = False
        self.work: asyncio.Future[Any] | None = None


class Lane:
    """The reads and writes of keys that may share a batch."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        deadline: float,
        max_items: int = 64,
        max_bytes: int = 1024 * 1024,
        reads_in_flight: int = 3,
        max_queued: int = 100_000,
    ) -> None:
        self._loop = loop
        self._deadline = deadline
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._reads_in_flight = reads_in_flight
        self._max_queued = max_queued
        self._reads: deque[_Request] = deque()
        self._writes: deque[_Request] = deque()
        self._unwritten: dict[bytes, int] = {}  # writes queued or in flight, by key
        self._held: dict[bytes, list[_Request]] = {}  # reads that wait for those
        self._in_flight: set[_Batch] = set()
        self._reading = 0
        self._writing = 0
        self._going = False
        self._timer: asyncio.TimerHandle | None = None
        self._settled: asyncio.Future[None] | None = None

    def read(self, call: Call, key: bytes, item: Any) -> asyncio.Future[Any]:
        """Return the future answer of *call* to *item*."""
        request = self._request(call, (key,), item, 0)
        self._admit(request)
        return request.future

    def read_group(self, call: Call, keys: Sequence[bytes]) -> asyncio.Future[Any]:
        """Return the future answers to all *keys* as one list: one request, where ``read`` of each would be many."""
        request = self._request(call, keys, keys, 0)
        self._admit(request)
        return request.future

    def _admit(self, request: _Request) -> None:
        if self._unwritten:
            for key in request.keys:
                if key in self._unwritten:
                    self._held.setdefault(key, []).append(request)
                    return
        if self._reading < self._reads_in_flight and not self._reads:
            self._start(_Batch([request], writes=False))
        else:
            self._enqueue(self._reads, request)

    def write(self, call: Call, key: bytes, item: Any, size: int) -> asyncio.Future[Any]:
        """Return the future outcome; it happens whether or not anybody awaits it."""
        request = self._request(call, (key,), item, size)
        if len(self._writes) >= self._max_queued:
            self._enqueue(self._writes, request)  # refuses it
            return request.future
        self._unwritten[key] = self._unwritten.get(key, 0) + 1
        if not self._writing and not self._writes:
            self._start(_Batch([request], writes=True))
        else:
            self._enqueue(self._writes, request)
        return request.future

    def _request(self, call: Call, keys: Sequence[bytes], item: Any, size: int) -> _Request:
        due = self._loop.time() + self._deadline
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._watch, due)
        return _Request(call, keys, item, size, self._loop.create_future(), due)

    def _enqueue(self, queue: deque[_Request], request: _Request) -> None:
        if len(queue) < self._max_queued:
            queue.append(request)
        else:
            request.future.set_exception(
                StoreExhaustedError(
                    f"{len(queue)} requests wait for the store already.", cure="It is too slow for this load."
                )
            )

    # Batches

    def _start(self, batch: _Batch) -> None:
        if batch.writes:
            self._writing += 1
        else:
            self._reading += 1
        self._in_flight.add(batch)
        try:
            answer = batch.requests[0].call([request.item for request in batch.requests])
        except Exception as error:  # noqa: BLE001  # _end hands it to the callers
            self._end(batch, error, ())
            return
        if isinstance(answer, asyncio.Future):
            if answer.done():
                self._ended(batch, answer)
                return
            work = answer
        else:
            work = asyncio.ensure_future(answer)
        batch.work = work
        work.add_done_callback(lambda done: self._ended(batch, done))

    def _ended(self, batch: _Batch, work: asyncio.Future[Any]) -> None:
        if work.cancelled():
            self._end(batch, StoreUnreachableError("the store was closed while it was asked."), ())
        elif (error := work.exception()) is not None:
            self._end(batch, error, ())
        else:
            self._end(batch, None, work.result())

    def _end(self, batch: _Batch, error: BaseException | None, answers: Sequence[Any]) -> None:
        self._in_flight.discard(batch)
        if not batch.abandoned:
            self._free(batch)
        if error is None and len(answers) != len(batch.requests):
            error = StoreProtocolError(f"{len(batch.requests)} requests got {len(answers)} answers.")
        elif error is not None and not isinstance(error, StoreError):
            cause, error = error, StoreError(f"unexpected {type(error).__name__} in the store.")
            error.__cause__ = cause
        if error is not None:
            for request in batch.requests:
                if not request.future.done():
                    request.future.set_exception(error)
        else:
            for request, answer in zip(batch.requests, answers, strict=True):
                if not request.future.done():
                    request.future.set_result(answer)
        if batch.writes:
            for request in batch.requests:
                self._written(request.keys[0])
        self._go_on()

    def _free(self, batch: _Batch) -> None:
        if batch.writes:
            self._writing -= 1
        else:
            self._reading -= 1

    def _written(self, key: bytes) -> None:
        left = self._unwritten[key] - 1
        if left:
            self._unwritten[key] = left
            return
        del self._unwritten[key]
        if self._settled is not None and not self._unwritten:
            self._settled.set_result(None)
            self._settled = None
        for request in self._held.pop(key, ()):
            self._admit(request)

    def _go_on(self) -> None:
        if self._going:  # a call that was over at once got us here again: the loop below goes on, not the stack
            return
        self._going = True
        try:
            while self._writes and not self._writing and (batch := self._next_writes()):
                self._start(_Batch(batch, writes=True))
            while self._reads and self._reading < self._reads_in_flight and (batch := self._next_reads()):
                self._start(_Batch(batch, writes=False))
        finally:
            self._going = False

    def _next_reads(self) -> list[_Request]:
        batch: list[_Request] = []
        while self._reads and len(batch) < self._max_items:
            request = self._reads[0]
            if batch and request.call is not batch[0].call:
                break
            self._reads.popleft()
            if not request.future.done():
                batch.append(request)
        return batch

    def _next_writes(self) -> list[_Request]:
        """Take writes of one kind, none overtaking another of its key."""
        batch: list[_Request] = []
        passed: list[_Request] = []
        blocked = {request.keys[0] for flying in self._in_flight if flying.writes for request in flying.requests}
        size = 0
        while self._writes and len(batch) < self._max_items and len(passed) < _LOOK_AHEAD:
            request = self._writes.popleft()
            if request.keys[0] in blocked or (batch and request.call is not batch[0].call):
                passed.append(request)
                blocked.add(request.keys[0])
                continue
            size += request.size
            if batch and size > self._max_bytes:
                passed.append(request)
                break
            batch.append(request)
        self._writes.extendleft(reversed(passed))
        return batch

    # Deadlines

    def _watch(self, scheduled: float) -> None:
        now = self._loop.time()
        if now - scheduled > _LATE:
            self._timer = self._loop.call_at(now + _LATE, self._watch, now + _LATE)
            return
        self._timer = None
        waiting = [request for batch in self._in_flight for request in batch.requests]
        waiting += [request for queue in (self._reads, self._writes, *self._held.values()) for request in queue]
        next_due = min(
            (request.due for request in waiting if request.due > now and not request.future.done()), default=0.0
        )
        for request in waiting:
            if request.due <= now and not request.future.done():
                request.future.set_exception(
                    StoreTimeoutError(
                        f"no answer from the store within {self._deadline:g} s.", cure="Is it overloaded?"
                    )
                )
        if next_due:
            self._timer = self._loop.call_at(next_due, self._watch, next_due)
        self._abandon()

    def _abandon(self) -> None:
        """Give the places of reads that nobody waits for to others; so many at once that the store is not buried."""
        for batch in list(self._in_flight):
            stuck = (
                not batch.writes and not batch.abandoned and all(request.future.done() for request in batch.requests)
            )
            if stuck and len(self._in_flight) < 4 * self._reads_in_flight:
                batch.abandoned = True
                self._free(batch)
        self._go_on()

    def settled(self) -> asyncio.Future[None]:
        """Return a future that is done when no write is queued or in flight, whether or not anybody waits for it."""
        if self._settled is None:
            self._settled = self._loop.create_future()
            if not self._unwritten:
                self._settled.set_result(None)
        settled = self._settled
        if settled.done():
            self._settled = None
        return settled

    async def aclose(self) -> None:
        """Fail what waits, and end what is in flight."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting = [*self._reads, *self._writes, *(request for held in self._held.values() for request in held)]
        works = [batch.work for batch in self._in_flight if batch.work is not None]
        self._reads.clear()
        self._writes.clear()
        self._held.clear()
        for request in waiting:
            if not request.future.done():
                request.future.set_exception(StoreUnreachableError("the cache was closed."))
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        for batch in list(self._in_flight):  # what has ended just now, and has not been told yet
            for request in batch.requests:
                if not request.future.done():
                    request.future.set_exception(StoreUnreachableError("the cache was closed."))


class Lines:
    """Lanes, made as keys need them."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, lane_of: Callable[[bytes], Hashable], *, deadline: float
    ) -> None:  # fmt: skip
        self._loop = loop
        self._lane_of = lane_of
        self._deadline = deadline
        self._lanes: dict[Hashable, Lane] = {}

    def lane(self, key: bytes) -> Lane:
        """Return the lane that *key* belongs to."""
        name = self._lane_of(key)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(self._loop, deadline=self._deadline)
        return lane

    def read(self, call: Call, key: bytes, item: Any) -> asyncio.Future[Any]:
        """See ``Lane.read``."""
        return self.lane(key).read(call, key, item)

    def write(self, call: Call, key: bytes, item: Any, size: int = 0) -> asyncio.Future[Any]:
        """See ``Lane.write``."""
        return self.lane(key).write(call, key, item, size)

    def read_groups(self, call: Call, keys: Sequence[bytes]) -> list[tuple[Sequence[bytes], asyncio.Future[Any]]]:
        """Split *keys* by lane and ask for each part; the parts with the futures of their lists of answers."""
        parts: dict[Lane, list[bytes]] = {}
        for key in keys:
            parts.setdefault(self.lane(key), []).append(key)
        return [(part, lane.read_group(call, part)) for lane, part in parts.items()]

    async def settle(self) -> None:
        """Return when all writes asked for are over, or the deadline has passed."""
        if self._lanes:
            await asyncio.wait([lane.settled() for lane in self._lanes.values()], timeout=self._deadline)

    async def aclose(self) -> None:
        """Let writes end within the deadline, then close all lanes."""
        await self.settle()
        for lane in list(self._lanes.values()):
            await lane.aclose()
