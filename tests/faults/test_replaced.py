"""Rows "Redis restarts" and "Sentinel, Cluster failover": it is told that the server is another one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from mcp_hub_cache import _exceptions as errors
from mcp_hub_cache._protocols import Replaceable, Store, Write
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import entry_frame
from tests.backends import poll
from tests.servers import Server, valkey_server


def write(store: Store, key: bytes) -> Write:
    return Write(key, entry_frame(store, key, b"1", ttl=60), 60.0, None)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with valkey_server() as made:
        yield made


class Told:
    """Hears of replaced servers, in the order of everything else that happened."""

    def __init__(self, store: RedisStore) -> None:
        assert isinstance(store, Replaceable)
        self.events: list[str] = []
        store.on_replaced = lambda: self.events.append("replaced")

    @property
    def times(self) -> int:
        return self.events.count("replaced")


async def read(store: RedisStore, told: Told, key: bytes = b"k") -> None:
    """Ask until there is an answer, which takes its place among the events before anybody awaits it."""

    async def answered() -> bool:
        asked = store.get_many([key])
        try:
            await asked
        except errors.StoreError:
            return False
        told.events.append("answer")
        return True

    await poll(answered)


async def test_a_restart_is_told_before_the_first_answer() -> None:
    """Row: Redis restarts. All connections together tell of it once."""
    with valkey_server() as server:
        store = RedisStore(server.url, timeout=5.0)
        told = Told(store)
        await store.write_many([write(store, b"k")])
        await read(store, told)
        await store.clear(b"none:")
        assert told.times == 0
        server.kill()
        server.start()
        told.events.clear()
        await read(store, told)
        assert told.events == ["replaced", "answer"]
        await store.write_many([write(store, b"k")])
        await store.clear(b"none:")
        assert told.times == 1
        await store.aclose()


async def test_a_connection_that_was_closed_is_no_other_server(server: Server) -> None:
    """Row: idle connection closed by the server."""
    store = RedisStore(server.url, timeout=5.0)
    told = Told(store)
    for _ in range(3):
        await read(store, told)
        server.kill_clients()
    await read(store, told)
    assert told.times == 0
    await store.aclose()
    await read(store, told)
    assert told.times == 0
    await store.aclose()


async def test_a_promotion_is_told(server: Server) -> None:
    """The same process, and it may have been a replica meanwhile: its replication id is another one."""
    store = RedisStore(server.url, timeout=5.0)
    told = Told(store)
    await read(store, told)
    with valkey_server("--repl-diskless-sync-delay", "0") as other:
        server.command("REPLICAOF", "127.0.0.1", other.port)
        await poll(lambda: b"master_link_status:up" in server.command("INFO", "replication"))
        server.command("REPLICAOF", "NO", "ONE")
    server.kill_clients()
    await read(store, told)
    assert told.events == ["answer", "replaced", "answer"]
    await store.aclose()


async def test_where_info_is_denied_every_reconnect_may_be_another_server() -> None:
    """Rows: Redis restarts; managed servers that deny INFO."""
    with valkey_server() as server:
        server.command("ACL", "SETUSER", "default", "-info")
        store = RedisStore(server.url, timeout=5.0)
        told = Told(store)
        await read(store, told)
        await store.write_many([write(store, b"k")])
        assert told.times == 0
        server.kill_clients()
        await read(store, told)
        assert told.events == ["answer", "replaced", "answer"]
        await store.aclose()


async def test_a_server_that_hangs_up_on_info_is_not_asked_again() -> None:
    """Some proxies end the connection on a command that they don't know: repeatable calls never notice."""
    accepted = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        while data := await reader.readuntil(b"\r\n") if not reader.at_eof() else b"":
            word = data.strip()
            if word == b"CLIENT":
                writer.write(b"+OK\r\n")
            elif word == b"TIME":
                writer.write(b"*2\r\n$10\r\n1700000000\r\n$1\r\n0\r\n")
            elif word == b"MGET":
                writer.write(b"*1\r\n$-1\r\n")
            elif word == b"INFO":
                break
        writer.close()

    async def serve_quietly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            writer.close()

    listening = await asyncio.start_server(serve_quietly, "127.0.0.1", 0)
    store = RedisStore(port=listening.sockets[0].getsockname()[1], timeout=5.0)
    assert await store.get_many([b"k"]) == [None]
    assert accepted == 2
    assert await store.get_many([b"k"]) == [None]
    assert accepted == 2
    await store.aclose()
    listening.close()
    await listening.wait_closed()
