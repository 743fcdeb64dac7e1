"""Connections to a Redis server that are kept for life: the driver opens them, a ``Wire`` uses them.

Strategy: redis-py opens a connection (``_redis_driver``) and hands its transport to a protocol of ours, which feeds
hiredis as bytes arrive. Requests go out at once, pipelined; replies resolve the futures of the requests in the
order sent. No task owns the reading, so there is nobody whose cancellation could leave a reply behind.

Rules:
- First in, first out, always. A request whose future is cancelled keeps its place, and its replies are thrown away.
- Any doubt (a reply nobody asked for, bytes that don't parse, an answer of the wrong shape) ends the connection and
  fails everything on it. A connection is never used again after an error of its own.
- One deadline counts from ``send`` and covers connecting, too. One timer per wire watches the oldest request: no
  timer per request. One that ran late proves only that this process was busy, and grants a moment to read what has
  come meanwhile.
- A failed connect fails all that wait for it, at once. The next request tries anew; there is no retry loop in here.
- A connection that the server had closed while it was idle is found out by the next request. Where that may be
  repeated, it is, once, on a new connection and under its first deadline.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from .._answer import Answer
from .._exceptions import StoreError
from .._lane import LATE
from .._steady import steady
from ._redis_address import Address
from ._redis_clock import Clock
from ._redis_driver import hand_over
from ._redis_errors import lost, not_redis, store_error, timed_out, unreachable
from ._redis_link import BulkLink, Link, Request, pack
from ._redis_places import IDENTIFY, Fixed, Place

T = TypeVar("T")

_GRACE: Final = 0.1  # seconds granted then
_TIME: Final = pack((b"TIME",))
_QUESTION: Final = _TIME + b"".join(map(pack, IDENTIFY))


class Wire:
    """One connection, opened when first needed and again after it was lost.

    Args:
        loop: The running loop.
        place: Where to connect: a server's address, or what finds it.
        timeout: Seconds from ``send`` to the answer, connecting included.
        clock: Learns the server's time with every connect, and now and then.
        bulk: Whether large values are asked for, each by itself.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        place: Address | Place,
        timeout: float,
        clock: Clock,
        *,
        bulk: bool = False,
    ) -> None:
        self._link_class = BulkLink if bulk else Link
        self._loop = loop
        self._place: Place = Fixed(place) if isinstance(place, Address) else place
        self._timeout = timeout
        self._clock = clock
        self._pending: deque[Request] = deque()
        self._link: Link | None = None
        self._opening: asyncio.Task[Link] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._graced: Request | None = None
        self._ask_at = 0.0
        self._question = _QUESTION
        self._ending: set[asyncio.Future[Any]] = set()  # given up, but not over yet
        self._closed = False

    def send(
        self,
        data: bytes | Sequence[bytes],
        count: int,
        convert: Callable[[list[Any]], T],
        *,
        again: bool = False,
        since: float | None = None,
    ) -> Answer[T]:
        """Send commands and return the future of their answer.

        Args:
            data: The commands, packed, whole or in parts.
            count: How many replies they get; at least 1.
            convert: Makes the answer of the replies, error replies among them as ``ReplyError`` objects. Called at most
                once, while bytes are being taken in: must be quick. May raise ``StoreError`` or ``Doubt``.
            again: Whether doing it twice is no worse than doing it once.
            since: The loop's time that the deadline counts from; None: now.

        Cancellation:
            Cancelling the future stops nothing that was sent.
        """
        future: Answer[T] = Answer(loop=self._loop)
        if self._closed:
            future.set_exception(unreachable(self._place.where, "The store was closed."))
            return future
        sent = self._loop.time() if since is None else since
        request = Request(future, data, count, convert, sent, again=again)
        pending = self._pending
        pending.append(request)
        link = self._link
        if link is not None:
            if len(pending) == 1:
                link.heard = False
            link.write(data)
        elif self._opening is None:
            self._open()
        if self._timer is None:
            due = request.sent + self._timeout
            self._timer = self._loop.call_at(due, self._watch, due)
        return future

    # Opening

    def _open(self) -> None:
        self._opening = task = self._loop.create_task(self._connect(), name="mcp_hub_cache: connect to Redis")
        self._ending.add(task)
        task.add_done_callback(self._opened)

    async def _connect(self) -> Link:
        writer = await self._place.open(self._timeout)
        link = self._link_class(self, self._loop, writer)
        hand_over(writer, link)
        return link

    def _opened(self, task: asyncio.Task[Link]) -> None:
        self._ending.discard(task)
        given_up = task is not self._opening
        if not given_up:
            self._opening = None
        if task.cancelled():
            if not given_up:
                self._fail(unreachable(self._place.where, "Connecting was cancelled."))
        elif (error := task.exception()) is not None:
            if not given_up:
                self._fail(store_error(error, self._place.where))
        elif given_up:
            self._end(task.result())
        elif task.result().closed.done():
            self._fail(lost(self._place.where))
        else:
            self._begin(task.result())

    def _begin(self, link: Link) -> None:
        """Send what has gathered, behind the question for the time and who it is."""
        waiting = [request for request in self._pending if not request.future.done()]
        link.asked = question = self._ask(waiting[0].sent if waiting else self._loop.time())
        link.pending = self._pending = deque([question, *waiting])
        self._link = link
        for request in self._pending:
            link.write(request.data)

    def _ask(self, sent: float) -> Request:
        self._ask_at = self._loop.time() + self._place.ask_every
        asked = steady()
        future: Answer[None] = Answer(loop=self._loop)
        future.add_done_callback(_retrieve)
        count = 3 if self._question is _QUESTION else 1
        return Request(future, self._question, count, lambda replies: self._learn(replies, asked), sent, again=False)

    def _learn(self, replies: list[Any], asked: float) -> None:
        time, *identity = replies
        if isinstance(time, list) and len(time) == 2:  # an ACL may refuse it: then this machine's clock does
            self._clock.learn(int(time[0]) + int(time[1]) / 1e6, asked, steady())
        self._place.met(identity)

    # Ending

    def on_lost(self, link: Link) -> None:
        """*link*'s connection has ended, by the server or by ``abort``."""
        if link is not self._link:
            return
        self._link = None
        self._place.lost()
        if self._pending and self._pending[0] is link.asked:
            # Some proxies hang up on a command that they don't know. Nothing else was answered yet.
            self._question, link.heard = _TIME, False
        if link.heard or self._closed:
            self._fail(lost(self._place.where))
            return
        repeated = deque(request for request in self._pending if request.again and not request.future.done())
        failed = [request for request in self._pending if not request.again]
        self._pending = repeated
        for request in repeated:
            request.again = False
        if repeated:
            self._open()
        _fail(failed, lost(self._place.where))  # last: who hears of it may send at once

    def on_doubt(self, link: Link) -> None:
        """*link* brought something that can't be told apart from a mix-up."""
        self._end(link)
        if link is self._link:
            self._link = None
            self._place.lost()
            self._fail(not_redis(self._place.where))

    def _fail(self, error: StoreError) -> None:
        failed, self._pending = self._pending, deque()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        _fail(failed, error)

    def renew(self) -> None:
        """Give up the connection and fail what waits for its answers: the server is not the right one any more.

        One that is being opened is the place's to judge.
        """
        if self._link is not None:
            self._drop(lost(self._place.where))

    def _drop(self, error: StoreError) -> None:
        """Give up the connection, or opening it, and fail what waits for it."""
        if self._opening is not None:
            opening, self._opening = self._opening, None
            opening.cancel()
        if self._link is not None:
            link, self._link = self._link, None
            self._place.lost()
            self._end(link)
        self._fail(error)

    def _end(self, link: Link) -> None:
        if not link.closed.done():
            self._ending.add(link.closed)
            link.closed.add_done_callback(self._ending.discard)
            link.abort()

    def _watch(self, due: float) -> None:
        self._timer = None
        now = self._loop.time()
        if now >= self._ask_at and self._link is not None:
            self._link.heard = self._link.heard and bool(self._pending)
            self._pending.append(self._ask(now))
            self._link.write(self._question)
            self._place.check()
        if not self._pending:
            return
        oldest = self._pending[0]
        next_due = oldest.sent + self._timeout
        if next_due <= now:
            if now - due <= LATE or oldest is self._graced:
                self._drop(timed_out(self._place.where, self._timeout))
                return
            self._graced, next_due = oldest, now + _GRACE
        self._timer = self._loop.call_at(next_due, self._watch, next_due)

    async def aclose(self) -> None:
        """Fail what is pending, end the connection, and return when it is over."""
        self._closed = True
        self._drop(unreachable(self._place.where, "The store was closed."))
        self._graced = None
        while self._ending:
            await asyncio.wait(self._ending)


class Wires:
    """The wires of one loop: for reads, for writes (in their order), for big values, for housekeeping; or fewer.

    Args:
        limit: At most so many connections, by sharing.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, place: Address | Place, timeout: float, clock: Clock, limit: int
    ) -> None:  # fmt: skip
        count = min(limit, 4)
        self._all = [Wire(loop, place, timeout, clock, bulk=number == min(2, count - 1)) for number in range(count)]
        self.reads = self._all[0]
        self.writes = self._all[min(1, len(self._all) - 1)]
        self.bulk = self._all[min(2, len(self._all) - 1)]
        self.admin = self._all[-1]

    def renew(self) -> None:
        """Fail what waits on any of them, and connect anew for what comes."""
        for wire in self._all:
            wire.renew()

    async def aclose(self) -> None:
        """Close all of them."""
        for wire in self._all:
            await wire.aclose()


def _fail(requests: deque[Request] | list[Request], error: StoreError) -> None:
    for request in requests:
        if not request.future.done():
            request.future.set_exception(error.again())


def _retrieve(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
