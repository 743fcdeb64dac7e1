"""One connection's side of the conversation: bytes come in, replies go to who asked, in the order asked.

Strategy: hiredis is fed as bytes arrive; each reply resolves the future of the oldest request. A large value is
received where it is to stay (``_redis_inlet``), on the connection that is for such.

Rule: any doubt ends the connection. What that means for those who wait is its owner's to say (``_redis_wire``).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, cast

import hiredis
from hiredis import ReplyError

from .._answer import Answer
from .._exceptions import StoreError
from ._redis_inlet import Inlet
from ._redis_outlet import Outlet

__all__ = ["NOTHING", "BulkLink", "Doubt", "Link", "Owner", "ReplyError", "Request", "pack", "parser"]

# Typed here, since hiredis declares a tuple of one.
pack = cast("Callable[[tuple[bytes, ...]], bytes]", hiredis.pack_command)
"""Make a command's bytes of its parts."""

NOTHING: Final = object()
"""What a parser's ``gets`` answers where no whole reply is left."""

_BUFFER: Final = 256 * 1024


def parser() -> hiredis.Reader:
    """Return a new parser of what a server says."""
    return hiredis.Reader(notEnoughData=NOTHING)


class Doubt(Exception):  # noqa: N818  # not an error to be shown: it becomes one
    """Raised by a ``convert``: the reply is of a shape that its request can't have. Ends the connection."""


class Request:
    """Commands that were sent, or are to be: what ``Wire.send`` was given, and who waits."""

    __slots__ = ("again", "convert", "count", "data", "future", "sent")

    def __init__(
        self,
        future: Answer[Any],
        data: bytes | Sequence[bytes],
        count: int,
        convert: Callable[[list[Any]], Any],
        sent: float,
        *,
        again: bool,
    ) -> None:
        self.future = future
        self.data = data
        self.count = count
        self.convert = convert
        self.sent = sent
        self.again = again


class Owner(Protocol):
    """Whose connection it is."""

    def on_doubt(self, link: Link) -> None:
        """*link* brought something that can't be told apart from a mix-up."""
        ...

    def on_lost(self, link: Link) -> None:
        """*link*'s connection has ended, by the server or by ``abort``."""
        ...


class Link(asyncio.BufferedProtocol):
    """One connection's protocol: parses, and resolves the oldest request of its wire."""

    def __init__(self, wire: Owner, loop: asyncio.AbstractEventLoop, writer: asyncio.StreamWriter) -> None:
        self._wire = wire
        self._loop = loop
        # Kept because a StreamWriter closes its transport when it is finalised.
        self._writer = writer
        self.transport: asyncio.WriteTransport = writer.transport
        self._outlet = Outlet(loop, self.transport)
        self.write = self._outlet.write
        self.closed: asyncio.Future[None] = loop.create_future()
        self.pending: deque[Request] = deque()
        self.asked: Request | None = None  # what it was asked first of all
        self.heard = False
        self._buffer = bytearray(_BUFFER)
        # A view, since asyncio's TLS reads into slices of what it gets: of a bytearray, they would be copies.
        self._view = memoryview(self._buffer)
        self._replies: list[Any] = []
        self._reader = reader = parser()
        self._feed = cast("Callable[[bytearray, int, int], None]", reader.feed)  # it takes any buffer
        self._gets = reader.gets

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # the base class's signature
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        self.heard = True
        try:
            self._feed(self._buffer, 0, nbytes)
            self._take(self._gets)
        except Exception:  # noqa: BLE001  # whatever it was: the replies can't be told apart any more
            self._wire.on_doubt(self)

    def _take(self, gets: Callable[[], Any]) -> None:
        pending, replies = self.pending, self._replies
        while (reply := gets()) is not NOTHING:
            if not pending:
                raise Doubt
            request = pending[0]
            replies.append(reply)
            if len(replies) < request.count:
                continue
            pending.popleft()
            answer, self._replies = replies, []
            replies = self._replies
            future = request.future
            if future.done():
                continue
            try:
                converted = request.convert(answer)
            except StoreError as error:
                future.set_exception(error)
            except Exception:
                pending.appendleft(request)  # so that it fails with the others
                raise
            else:
                future.set_result(converted)

    def pause_writing(self) -> None:
        self._outlet.pause()

    def resume_writing(self) -> None:
        self._outlet.resume()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # the base class's signature
        if not self.closed.done():
            self.closed.set_result(None)
        self._wire.on_lost(self)

    def abort(self) -> None:
        """End the connection now; nothing that still comes is looked at."""
        self.pending = deque()
        self.transport.abort()


class BulkLink(Link):
    """One that receives large values where they are to stay."""

    _inlet: Inlet | None = None
    _full: Inlet | None = None

    def get_buffer(self, sizehint: int) -> memoryview:
        return super().get_buffer(sizehint) if self._inlet is None else self._inlet.rest()

    def buffer_updated(self, nbytes: int) -> None:
        self.heard = True
        self._finish()
        if self._inlet is not None:
            self._inlet.filled(nbytes)
            if self._inlet.is_full:
                # Later: whoever calls here has still hold of the bytes.
                self._full, self._inlet = self._inlet, None
                self._loop.call_soon(self._finish)
            return
        if not self._reader.has_data():
            self._inlet = Inlet.of(self._view[:nbytes])
        if self._inlet is None:
            super().buffer_updated(nbytes)

    def _finish(self) -> None:
        if self._full is None:
            return
        full, self._full = self._full, None
        try:
            self._take(iter(([full.value()], NOTHING)).__next__)
        except Exception:  # noqa: BLE001  # as above
            self._wire.on_doubt(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()
        super().connection_lost(exc)

    def abort(self) -> None:
        self._full = None
        super().abort()
