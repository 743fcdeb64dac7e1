"""A TCP proxy in front of a server, for what a network does: refusing, swallowing, holding back, cutting, garbling.

Strategy: each direction of a connection is a task that reads a chunk, sends it through the faults in force, and writes
what is left of it. Faults are looked up chunk by chunk, so each can begin and end at any moment; one that begins while
a chunk is held back still strikes it.

Rules:
- A chunk is what arrived at once: at most 64 KiB, and most often one batch of commands or of replies.
- The end of a stream is a chunk, too: while a fault holds or swallows, the other side does not learn of it.
- What could be connected to before can be again: the port is the proxy's from beginning to end.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit, urlunsplit

from ._faults import Fault, Seconds, checked, wait
from ._links import CHUNK, How, Link, LinkFault, On, To, is_among, set_of


class FaultProxy:
    """Stands in front of a server and passes everything on, until told otherwise.

    Each fault begins at once and lasts until ``end()`` of what its method returned, the end of a ``with`` block, or
    ``heal()``. ``on`` says which connections it strikes: all (b""), those whose client has said certain bytes, or some
    of ``links``. ``to`` says which way: ``client`` is the way of replies.

    Args:
        server: ``host:port``, or a URL: ``redis://``, ``rediss://``, ``unix://``.
        seed: Of what is left to chance.

    Attributes:
        url: Where clients come to: a URL like *server*, with its user, password and database.
        host, port: The same.
        accepted: How many connections there ever were.
        links: Those that are open.

    Raises:
        ValueError: *server* names none.

    Example:
        >>> async with FaultProxy("redis://localhost:6379/0") as proxy, RedisCache(proxy.url) as cache:
        ...     with proxy.black_hole():
        ...         await agent(cache)
    """

    def __init__(self, server: str, *, seed: int = 0) -> None:
        self._parts = urlsplit(server if "://" in server else f"redis://{server}")
        there = self._parts.path if self._parts.scheme == "unix" else self._parts.hostname and self._parts.port
        if not there:
            raise ValueError("server must be host:port, or a URL with a host and a port, or unix:///a/socket")
        self._rng = random.Random(seed)  # noqa: S311  # chance, no secret
        self._faults: list[LinkFault] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket: socket.socket | None = None
        self._refusals: set[Fault] = set()
        self.host = "127.0.0.1"
        self.port = 0
        self.accepted = 0
        self.links: list[Link] = []

    def __repr__(self) -> str:
        """Where it stands; no password."""
        return f"FaultProxy({self.host}:{self.port})"

    @property
    def url(self) -> str:
        """Where clients come to."""
        scheme, before, path, query, _ = self._parts
        user, at, _ = before.rpartition("@")
        if scheme == "unix":
            scheme, path = "redis", ""
        return urlunsplit((scheme, f"{user}{at}{self.host}:{self.port}", path, query, ""))

    def of(self, said: bytes) -> list[Link]:
        """Those connections, of those that are open, whose client has said this."""
        return [link for link in self.links if said in link.said]

    async def __aenter__(self) -> Self:
        """Listen."""
        self._bind()
        self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all connections, and listen no more."""
        await self.aclose()

    async def aclose(self) -> None:
        """End all connections, and listen no more."""
        self._close()
        for fault in self._faults:
            fault.end()
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Faults

    def refuse(self) -> Fault:
        """Refuse new connections, as a server that is not there. Those that are open stay."""
        fault = self._begin(LinkFault(self._rng, _pass, (), "both"))
        fault.on_end = partial(self._refused, fault)
        self._refusals.add(fault)
        # Bound, and not listening: clients are refused, and nobody else takes the port.
        self._close()
        self._bind()
        return fault

    def _refused(self, fault: Fault) -> None:
        self._refusals.discard(fault)
        if not self._refusals:
            self._listen()

    def black_hole(self, on: On = b"", *, to: To = "both") -> Fault:
        """Swallow what is sent, as a firewall that drops packets. Connections stay open, new ones are taken."""

        async def swallow(fault: Fault, _: Link, data: bytes) -> bytes | None:
            if data:
                return None
            await fault.over.wait()
            return data

        return self._begin(LinkFault(self._rng, swallow, on, to, ends=True))

    def hold(self, on: On = b"", *, to: To = "client") -> Fault:
        """Hold back what is sent, as a cable that was pulled; it is passed on, in order, when the fault ends."""

        async def hold(fault: Fault, _: Link, data: bytes) -> bytes:
            await fault.over.wait()
            return data

        return self._begin(LinkFault(self._rng, hold, on, to, ends=True))

    def delay(self, seconds: Seconds, on: On = b"", *, to: To = "client") -> Fault:
        """Let each chunk wait so many seconds, or a random number between two. Their order is kept."""
        checked(seconds)

        async def delay(_: Fault, __: Link, data: bytes) -> bytes:
            await wait(self._rng, seconds)
            return data

        return self._begin(LinkFault(self._rng, delay, on, to))

    def limit(self, bytes_per_second: float, on: On = b"", *, to: To = "both") -> Fault:
        """Pass on so many bytes a second, in each direction of each connection."""
        if not bytes_per_second > 0:
            raise ValueError(f"bytes_per_second must be more than 0, not {bytes_per_second!r}")
        piece = min(max(int(bytes_per_second / 20), 1), CHUNK)

        async def limit(_: Fault, __: Link, data: bytes) -> bytes:
            await asyncio.sleep(len(data) / bytes_per_second)
            return data

        return self._begin(LinkFault(self._rng, limit, on, to, piece=piece))

    def edit(
        self,
        edit: Callable[[bytes], bytes],
        on: On = b"",
        *,
        to: To = "client",
        times: int | None = None,
        probability: float = 1.0,
    ) -> Fault:
        """Pass on what *edit* makes of each chunk: of so many (*times*; None: all), each with a *probability*."""

        async def through(_: Fault, __: Link, data: bytes) -> bytes | None:
            return edit(data) or None

        return self._begin(LinkFault(self._rng, through, on, to, times=times, probability=probability))

    def garble(self, on: On = b"", *, to: To = "client", times: int | None = None, probability: float = 1.0) -> Fault:
        """Change one byte of a chunk; see ``edit``."""

        def garble(data: bytes) -> bytes:
            at = self._rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ self._rng.randrange(1, 256)]) + data[at + 1 :]

        return self.edit(garble, on, to=to, times=times, probability=probability)

    def drop(self, on: On = b"", *, to: To = "client", times: int | None = 1, probability: float = 1.0) -> Fault:
        """Leave out a chunk; see ``edit``."""
        return self.edit(lambda _: b"", on, to=to, times=times, probability=probability)

    def duplicate(self, on: On = b"", *, to: To = "client", times: int | None = 1, probability: float = 1.0) -> Fault:
        """Send a chunk twice; see ``edit``."""
        return self.edit(lambda data: data * 2, on, to=to, times=times, probability=probability)

    def cut(self, on: On = b"", *, how: How = "reset") -> int:
        """Cut connections now, by RST or by FIN; return how many. New ones are taken."""
        among = set_of(on)
        cut = [link for link in self.links if is_among(link, among)]
        for link in cut:
            link.cut(how)
        return len(cut)

    def cut_after(self, count: int, on: On = b"", *, to: To = "client", how: How = "close") -> Fault:
        """Cut each connection when so many bytes more have passed in that direction, amid a chunk if need be."""
        if count < 0:
            raise ValueError(f"count must be 0 or more, not {count!r}")
        left: dict[Link, int] = {}

        async def cut_after(_: Fault, link: Link, data: bytes) -> bytes | None:
            rest = left.get(link, count)
            left[link] = rest - len(data)
            if left[link] > 0:
                return data
            link.doomed = how
            return data[:rest] or None

        return self._begin(LinkFault(self._rng, cut_after, on, to))

    def heal(self) -> None:
        """End all faults. What was held back is passed on; what was cut stays cut."""
        for fault in self._faults:
            fault.end()
        self._faults = []

    def _begin(self, fault: LinkFault) -> Fault:
        self._faults = [each for each in self._faults if not each.over.is_set()]
        self._faults.append(fault)
        return fault

    # Connections

    def _bind(self) -> None:
        self._socket = bound = socket.socket()
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # its connections may be open still
        bound.bind((self.host, self.port))
        self.port = bound.getsockname()[1]

    def _listen(self) -> None:
        if self._socket is not None:
            self._socket.listen(1024)
            asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def _close(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _accept(self) -> None:
        assert self._socket is not None
        with suppress(BlockingIOError, ConnectionAbortedError):
            client, _ = self._socket.accept()
            client.setblocking(False)
            task = asyncio.ensure_future(self._serve(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=client)
        link = Link(writer)
        self.links.append(link)
        self.accepted += 1
        how: How = "reset"
        try:
            behind, server = await self._connect()
            link.attach(server)
            ways = [
                asyncio.ensure_future(self._relay(link, "server", reader, server)),
                asyncio.ensure_future(self._relay(link, "client", behind, writer)),
            ]
            try:
                done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                with suppress(OSError):
                    for way in done:
                        way.result()
                    how = "close"
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass  # there is no server
        finally:
            self.links.remove(link)
            link.cut(how)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._parts.scheme == "unix":
            return await asyncio.open_unix_connection(unquote(self._parts.path))
        return await asyncio.open_connection(self._parts.hostname, self._parts.port)

    async def _relay(self, link: Link, to: To, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            data = await reader.read(min((fault.piece for fault in self._faults), default=CHUNK))
            if to == "server":
                link.note(data)
            passed = await self._through(link, to, data)
            if passed:
                writer.write(passed)
            if link.doomed is not None:
                link.cut(link.doomed)
            if not data:
                return
            await writer.drain()

    async def _through(self, link: Link, to: To, data: bytes) -> bytes | None:
        struck: set[LinkFault] = set()
        while True:
            meant = (fault for fault in self._faults if fault not in struck and fault.means(link, to, data))
            fault = next(meant, None)
            if fault is None:
                return data
            struck.add(fault)
            if fault.strikes():
                left = await fault.strike(fault, link, data)
                if left is None:
                    return None
                data = left


async def _pass(_: Fault, __: Link, data: bytes) -> bytes:
    return data
