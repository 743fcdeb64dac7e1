"""One client's connection through a proxy, and the faults that strike some of them."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Final, Literal

from ._faults import Fault

CHUNK: Final = 65536
_SAID: Final = 65536
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time

To = Literal["client", "server", "both"]
"""Which way bytes go."""

How = Literal["reset", "close"]
"""How a connection ends: by RST, or by FIN once what is on its way has arrived."""


class Link:
    """One client's connection, and the one to the server behind it.

    Attributes:
        said: The first 64 KiB of what the client has sent.
        doomed: How it is cut when what has just been passed on is written; None: not.
    """

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.said = b""
        self.doomed: How | None = None
        self._client = client
        self._server: asyncio.StreamWriter | None = None

    def note(self, data: bytes) -> None:
        """The client has sent *data*."""
        if len(self.said) < _SAID:
            self.said += data[: _SAID - len(self.said)]

    def attach(self, server: asyncio.StreamWriter) -> None:
        """Take *server* for the connection behind this one."""
        self._server = server

    def cut(self, how: How = "reset") -> None:
        """End both connections: by RST, or by FIN once what is on its way has arrived."""
        for writer in (self._client, self._server):
            if writer is None or writer.is_closing():
                continue
            if how == "close":
                writer.close()
                continue
            # A unix socket knows nothing of it.
            with suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def inject(self, data: bytes, *, to: Literal["client", "server"] = "client") -> None:
        """Send *data* as if it came from the other side."""
        writer = self._client if to == "client" else self._server
        if writer is not None and not writer.is_closing():
            writer.write(data)


On = bytes | Link | Iterable[Link]
"""Which connections: those whose client has said these bytes (b"": all), or these. Bytes mean later ones, too."""

Strike = Callable[[Fault, Link, bytes], Awaitable[bytes | None]]
"""Returns what is left of a chunk; None: nothing, and of the end of a stream, that nobody learns of it."""


class LinkFault(Fault):
    """Of some connections, in one direction or both."""

    def __init__(
        self,
        rng: random.Random,
        strike: Strike,
        on: On,
        to: To,
        *,
        times: int | None = None,
        probability: float = 1.0,
        piece: int = CHUNK,
        ends: bool = False,
    ) -> None:
        super().__init__(rng, times=times, probability=probability)
        self.strike = strike
        self.piece = piece  # bytes of a chunk at most
        self._on = set_of(on)
        self._to = to
        self._ends = ends  # whether it strikes the end of a stream

    def means(self, link: Link, to: To, data: bytes) -> bool:
        """Whether *data* of *link* on its way *to* one side is for it to strike."""
        return self._to in {to, "both"} and bool(data or self._ends) and is_among(link, self._on)


def set_of(on: On) -> bytes | frozenset[Link]:
    """What *on* says, to be asked again and again."""
    return on if isinstance(on, bytes) else frozenset((on,) if isinstance(on, Link) else on)


def is_among(link: Link, on: bytes | frozenset[Link]) -> bool:
    """Whether *on* means *link*."""
    return on in link.said if isinstance(on, bytes) else link in on
