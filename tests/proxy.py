"""A TCP proxy between a cache and its server, for what a network does: holding back, swallowing, cutting off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress


class Connection:
    """One client's, and the server's behind it."""

    def __init__(self) -> None:
        self.said = b""  # all that the client has sent
        self.passing = asyncio.Event()
        self.passing.set()
        self.held = asyncio.Event()  # something from the server waits to pass


class Proxy:
    """Passes everything on until told otherwise.

    Attributes:
        url: Where clients come to.
        edit: What replies go through.
        accepted: How many connections there ever were.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""
        self.accepted = 0
        self.connections: list[Connection] = []
        self.edit: Callable[[bytes], bytes] = lambda data: data

    def of(self, word: bytes) -> list[Connection]:
        """The connections on which clients have said *word*."""
        return [connection for connection in self.connections if word in connection.said]

    def hold(self, word: bytes = b"") -> list[Connection]:
        """Pass nothing on to clients any more that have said *word*, as a cable that was pulled."""
        held = self.of(word)
        for connection in held:
            connection.held.clear()
            connection.passing.clear()
        return held

    def release(self) -> None:
        """Pass on what was held, and all that follows."""
        for connection in self.connections:
            connection.passing.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        connection = Connection()
        self.connections.append(connection)
        self.accepted += 1
        try:
            behind, server = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                with suppress(OSError):
                    await self._relay(connection, reader, writer, behind, server)
            finally:
                server.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self.connections.remove(connection)
            self._tasks.discard(task)

    async def _relay(
        self,
        connection: Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        behind: asyncio.StreamReader,
        server: asyncio.StreamWriter,
    ) -> None:
        async def up() -> None:
            while data := await reader.read(65536):
                connection.said += data
                server.write(data)

        async def down() -> None:
            while data := await behind.read(65536):
                if not connection.passing.is_set():
                    connection.held.set()
                    await connection.passing.wait()
                writer.write(self.edit(data))

        ways = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def proxy(port: int) -> AsyncIterator[Proxy]:
    """Listen, in front of *port*."""
    made = Proxy(port)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    try:
        yield made
    finally:
        server.close()
        await made.aclose()
        await server.wait_closed()
