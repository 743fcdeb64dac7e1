"""``FaultProxy``: each fault as a client sees it, over a server that answers each line with itself."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mcp_hub_cache import RedisCache
from mcp_hub_cache.testing import FaultProxy
from tests.backends import poll
from tests.servers import valkey_server

PATIENT = 10.0


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, line: bytes) -> bytes:
        """What comes back: a line; b"": the connection has ended."""
        self._writer.write(line + b"\n")
        return await self.hear()

    def say(self, line: bytes) -> None:
        self._writer.write(line + b"\n")

    async def hear(self) -> bytes:
        return (await asyncio.wait_for(self._reader.readline(), PATIENT)).rstrip(b"\n")

    async def hear_all(self) -> bytes:
        return await asyncio.wait_for(self._reader.read(), PATIENT)

    def close(self) -> None:
        self._writer.close()

    async def is_silent(self) -> bool:
        """Whether nothing comes while another connection through another proxy would long have answered."""
        try:
            async with asyncio.timeout(0.05):
                return not await self._reader.readline()
        except TimeoutError:
            return True


class Setting:
    """A proxy in front of a server that says what it hears, and clients of it."""

    def __init__(self, proxy: FaultProxy, heard: list[bytes]) -> None:
        self.proxy = proxy
        self.heard = heard
        self.clients: list[Client] = []

    async def client(self) -> Client:
        reader, writer = await asyncio.open_connection(self.proxy.host, self.proxy.port)
        self.clients.append(Client(reader, writer))
        return self.clients[-1]


@asynccontextmanager
async def opened(seed: int = 0) -> AsyncIterator[Setting]:
    heard: list[bytes] = []
    open_ones: set[asyncio.Task[None]] = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_ones.add(task)
        try:
            while line := await reader.readline():
                heard.append(line.rstrip(b"\n"))
                writer.write(line)
        except OSError:
            pass
        finally:
            writer.close()
            open_ones.discard(task)

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with FaultProxy(f"127.0.0.1:{port}", seed=seed) as proxy:
        setting = Setting(proxy, heard)
        try:
            yield setting
        finally:
            for client in setting.clients:
                client.close()
            server.close()
    await poll(lambda: not open_ones)


async def test_it_passes_on_what_nothing_strikes() -> None:
    async with opened() as s:
        client = await s.client()
        assert await client.ask(b"a") == b"a"
        large = b"x" * 60_000
        assert await client.ask(large) == large
        assert (s.proxy.accepted, len(s.proxy.links), s.proxy.links[0].said[:2]) == (1, 1, b"a\n")
        client.close()
        await poll(lambda: not s.proxy.links)


async def test_refusing_and_listening_again() -> None:
    async with opened() as s:
        old = await s.client()
        assert await old.ask(b"a") == b"a"
        with s.proxy.refuse():
            with s.proxy.refuse():
                pass
            with pytest.raises(ConnectionRefusedError):
                await s.client()
            assert await old.ask(b"b") == b"b"
        assert await (await s.client()).ask(b"c") == b"c"


async def test_a_black_hole_swallows_and_keeps_connections_open() -> None:
    async with opened() as s:
        client = await s.client()
        assert await client.ask(b"a") == b"a"
        hole = s.proxy.black_hole()
        client.say(b"lost")
        late = await s.client()
        late.say(b"lost too")
        assert await client.is_silent()
        assert s.heard == [b"a"]
        hole.end()
        assert await client.ask(b"b") == b"b"
        assert await late.ask(b"c") == b"c"
        assert s.heard == [b"a", b"b", b"c"]


async def test_a_black_hole_one_way() -> None:
    async with opened() as s:
        client = await s.client()
        with s.proxy.black_hole(to="client"):
            client.say(b"heard")
            await poll(lambda: s.heard == [b"heard"])
            assert await client.is_silent()
        assert await client.ask(b"b") == b"b"


async def test_nobody_learns_through_a_black_hole_that_the_other_has_gone() -> None:
    async with opened() as s:
        client = await s.client()
        assert await client.ask(b"a") == b"a"
        hole = s.proxy.black_hole()
        client.close()
        late = await s.client()
        late.say(b"lost")
        await poll(lambda: len(s.proxy.links) == 2)
        hole.end()
        await poll(lambda: len(s.proxy.links) == 1)


async def test_held_replies_come_in_order_when_released() -> None:
    async with opened() as s:
        client, other = await s.client(), await s.client()
        assert await client.ask(b"SUBSCRIBE") == b"SUBSCRIBE"
        held = s.proxy.hold(b"SUBSCRIBE")
        for line in (b"1", b"2"):
            client.say(line)
        await asyncio.wait_for(held.hit.wait(), PATIENT)
        assert await other.ask(b"3") == b"3"  # it did not say that word
        client.say(b"4")
        await poll(lambda: b"4" in s.heard)
        held.end()
        assert [await client.hear() for _ in range(3)] == [b"1", b"2", b"4"]


async def test_some_connections_and_not_those_that_come_later() -> None:
    async with opened() as s:
        client = await s.client()
        assert await client.ask(b"a") == b"a"
        held = s.proxy.hold(s.proxy.of(b""))
        client.say(b"b")
        await asyncio.wait_for(held.hit.wait(), PATIENT)
        assert await (await s.client()).ask(b"c") == b"c"
        s.proxy.heal()
        assert await client.hear() == b"b"


async def test_a_fault_that_begins_meanwhile_strikes_what_is_held() -> None:
    async with opened() as s:
        client = await s.client()
        held = s.proxy.hold()
        client.say(b"a")
        await asyncio.wait_for(held.hit.wait(), PATIENT)
        s.proxy.edit(bytes.upper)
        held.end()
        assert await client.hear() == b"A"


@pytest.mark.parametrize("seconds", [0.1, (0.1, 0.2)])
async def test_a_delay_lasts_at_least_so_long(seconds: float | tuple[float, float]) -> None:
    async with opened() as s:
        client = await s.client()
        s.proxy.delay(seconds)
        begun = time.monotonic()
        assert await client.ask(b"a") == b"a"
        assert time.monotonic() - begun >= 0.09


async def test_a_limited_line_passes_no_more_than_that() -> None:
    async with opened() as s:
        client = await s.client()
        s.proxy.limit(20_000, to="client")
        begun = time.monotonic()
        assert len(await client.ask(b"x" * 4000)) == 4000
        assert time.monotonic() - begun >= 0.18


async def test_cutting() -> None:
    async with opened() as s:
        one, other = await s.client(), await s.client()
        assert [await one.ask(b"one"), await other.ask(b"other")] == [b"one", b"other"]
        assert s.proxy.cut(b"one") == 1
        with pytest.raises(ConnectionResetError):
            await one.hear()
        assert await other.ask(b"still") == b"still"
        assert s.proxy.cut(how="close") == 1
        assert await other.hear() == b""
        assert await (await s.client()).ask(b"new") == b"new"
        await poll(lambda: len(s.proxy.links) == 1)


async def test_cutting_in_the_middle() -> None:
    async with opened() as s:
        client = await s.client()
        with s.proxy.cut_after(5):
            assert await client.ask(b"abc") == b"abc"
            client.say(b"defg")
            assert await client.hear_all() == b"d"
            late = await s.client()
            late.say(b"1234567")
            assert await late.hear_all() == b"12345"
        assert await (await s.client()).ask(b"1234567") == b"1234567"


async def test_garbling_changes_one_byte() -> None:
    async with opened() as s:
        client = await s.client()
        s.proxy.garble(times=1)
        client.say(b"aaaaaaaaaa")
        (chunk,) = [await asyncio.wait_for(client._reader.readexactly(11), PATIENT)]
        assert sum(a != b for a, b in zip(chunk, b"aaaaaaaaaa\n", strict=True)) == 1
        assert (await client.ask(b"b")).endswith(b"b")


async def test_dropping_duplicating_and_injecting() -> None:
    async with opened() as s:
        client = await s.client()
        dropped = s.proxy.drop()
        client.say(b"lost")
        await asyncio.wait_for(dropped.hit.wait(), PATIENT)
        s.proxy.duplicate()
        assert await client.ask(b"twice") == b"twice"
        assert await client.hear() == b"twice"
        s.proxy.links[0].inject(b"foreign\n")
        assert await client.ask(b"own") == b"foreign"
        assert await client.hear() == b"own"
        assert dropped.count == 1


async def test_chance_comes_from_the_seed() -> None:
    async def lines(seed: int) -> list[bytes]:
        async with opened(seed) as s:
            client = await s.client()
            s.proxy.edit(bytes.upper, probability=0.5)
            return [await client.ask(b"a") for _ in range(20)]

    first, again, other = await lines(1), await lines(1), await lines(2)
    assert first == again != other
    assert set(first) == {b"a", b"A"}


async def test_a_server_that_is_not_there() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with FaultProxy(f"127.0.0.1:{bound.getsockname()[1]}") as proxy:
            reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), PATIENT)
            writer.close()


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("localhost:6379", "redis://{}"),
        ("redis://me:p%40ss@localhost:6379/3", "redis://me:p%40ss@{}/3"),
        ("rediss://localhost:6380/0?ssl_cert_reqs=required", "rediss://{}/0?ssl_cert_reqs=required"),
        ("unix:///run/redis.sock", "redis://{}"),
    ],
)
async def test_its_url_is_like_the_servers(server: str, url: str) -> None:
    async with FaultProxy(server) as proxy:
        assert proxy.url == url.format(f"127.0.0.1:{proxy.port}")
        assert "p%40ss" not in repr(proxy)


@pytest.mark.parametrize("server", ["", "localhost", "redis://localhost", "unix://"])
def test_what_is_no_server(server: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        FaultProxy(server)


def test_what_is_no_fault() -> None:
    proxy = FaultProxy("localhost:6379")
    for wrong in (
        lambda: proxy.delay(-1),
        lambda: proxy.delay((2, 1)),
        lambda: proxy.limit(0),
        lambda: proxy.cut_after(-1),
        lambda: proxy.edit(bytes, times=0),
        lambda: proxy.garble(probability=0),
    ):
        with pytest.raises(ValueError, match="must be"):
            wrong()


async def test_a_cache_behind_it(tmp_path: Path) -> None:
    with valkey_server() as server:
        async with FaultProxy(server.url) as broken, RedisCache(broken.url, timeout=PATIENT) as cache:
            await cache.set("k", 1)
            assert await cache.get("k") == 1
        async with FaultProxy(f"unix://{server.socket_path}") as broken, RedisCache(broken.url) as cache:
            assert await cache.get("k") == 1
