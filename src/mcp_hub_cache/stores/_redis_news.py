"""The connection of a feed (``_redis_feed``): asks the server for news of what changes, and parses them.

Strategy: redis-py opens it (``_redis_driver``); then it learns its own id, has the server track all keys under a
prefix (CLIENT TRACKING with BCAST) and send the news to that id (REDIRECT), and subscribes. On RESP2, since on RESP3
the driver drops these messages silently.

One connection and not two: tracking ends with the connection that asked for it, so that a second one would be one more
that can die unheard. It must ask before it subscribes, for a subscriber may say nothing but PING.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

from .._exceptions import StoreError, StorePermissionError
from ._redis_driver import hand_over
from ._redis_errors import lost, not_redis, store_error
from ._redis_link import NOTHING, ReplyError, pack, parser
from ._redis_places import Place

_CHANNEL: Final = b"__redis__:invalidate"
_ID: Final = pack((b"CLIENT", b"ID"))
_PING: Final = pack((b"PING",))
_SUBSCRIBE: Final = pack((b"SUBSCRIBE", _CHANNEL)) + _PING
_CURE: Final = (
    "For the near cache, grant it to the user: ACL SETUSER … +client|id +client|tracking +subscribe +ping "
    "&__redis__:invalidate."
)


class Listener(Protocol):
    """Hears what a connection brings."""

    def on_changed(self, news: News, keys: list[bytes] | None, /) -> None:
        """These keys have changed, or have gone; None: any may have."""
        ...

    def on_pong(self, news: News, /) -> None:
        """A ping was answered, after all that had been told before."""
        ...

    def on_lost(self, news: News, error: StoreError, /) -> None:
        """It has ended, or is of no use any more."""
        ...


class News(asyncio.Protocol):
    """A connection: first it asks and is answered, in order; once begun, it brings news and pongs.

    Attributes:
        closed: Done when the connection is over.
    """

    def __init__(
        self, listener: Listener, where: str, loop: asyncio.AbstractEventLoop, writer: asyncio.StreamWriter
    ) -> None:  # fmt: skip
        self._listener = listener
        self._where = where
        self._loop = loop
        # Kept because a StreamWriter closes its transport when it is finalised.
        self._writer = writer
        self._transport: asyncio.WriteTransport = writer.transport
        self.closed: asyncio.Future[None] = loop.create_future()
        self._begun = False
        self._asked: asyncio.Future[list[Any]] | None = None
        self._count = 0
        self._answers: list[Any] = []
        self._parser = parser()
        hand_over(writer, self)

    async def subscribe(self, prefix: bytes) -> None:
        """Have the server tell what changes under *prefix*. Returns when it has confirmed all of it.

        Raises:
            StoreError: It refuses, or the connection has ended.
        """
        (me,) = await self._ask(_ID, 1)
        track = (b"CLIENT", b"TRACKING", b"ON", b"REDIRECT", b"%d" % me, b"BCAST", b"PREFIX", prefix)
        await self._ask(pack(track) + _SUBSCRIBE, 3)

    async def _ask(self, data: bytes, count: int) -> list[Any]:
        if self.closed.done():
            raise lost(self._where)
        self._count, self._answers = count, []
        self._asked = asked = self._loop.create_future()
        self._transport.write(data)
        answers: list[Any] = await asked
        for answer in answers:
            if isinstance(answer, ReplyError):
                raise self._error(answer)
        return answers

    def begin(self) -> None:
        """Hand on all that comes from now on. What came before concerned nobody: no stamp was given yet."""
        self._begun = True

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._transport.write(_PING)

    def abort(self) -> None:
        """End the connection now."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets()) is not NOTHING:
                if self._begun:
                    self._take(reply)
                elif self._asked is not None and not self._asked.done():
                    self._answers.append(reply)
                    if len(self._answers) == self._count:
                        self._asked.set_result(self._answers)
        except Exception:  # noqa: BLE001  # whatever it was: what is said can't be told any more
            self._fail(not_redis(self._where))

    def _take(self, reply: Any) -> None:
        if isinstance(reply, ReplyError):
            self._fail(self._error(reply))
        elif reply[0] == b"message":
            self._listener.on_changed(self, reply[2])
        elif reply[0] == b"pong":
            self._listener.on_pong(self)
        else:
            raise ValueError(reply[0])

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # the base class's signature
        if not self.closed.done():
            self.closed.set_result(None)
        self._fail(lost(self._where))

    def _fail(self, error: StoreError) -> None:
        if self._begun:
            self._listener.on_lost(self, error)
        elif self._asked is not None and not self._asked.done():
            self._asked.set_exception(error)

    def _error(self, reply: Exception) -> StoreError:
        error = store_error(str(reply), self._where)
        if isinstance(error, StorePermissionError):
            return StorePermissionError(str(error).removesuffix(error.cure).rstrip(), cure=_CURE)
        return error


async def open_news(listener: Listener, place: Place, prefix: bytes, timeout: float) -> News:
    """Return a connection on which the server tells, confirmed, what changes under *prefix*.

    Raises:
        StoreError: It could not be had within *timeout* seconds, or the server refuses.

    Cancellation:
        Nothing stays open.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            writer = await place.open(timeout)
            news = News(listener, place.where, loop, writer)
            try:
                await news.subscribe(prefix)
            except BaseException:
                news.abort()
                await news.closed
                raise
    except TimeoutError as error:
        raise store_error(error, place.where) from None
    return news
