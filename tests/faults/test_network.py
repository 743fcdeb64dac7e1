"""Rows of FAULTS: Redis refused, stopped, cut off, cabled into nowhere; restarts; pools; replies of others; stampedes.

All through the public API, on a real Valkey, behind the shipped proxy where it is the network that breaks.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any, NamedTuple

import pytest

from mcp_hub_cache import RedisCache, acached
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.testing import FaultProxy
from tests.backends import poll
from tests.servers import Server, valkey_server

DEADLINE = 0.5
# What this machine may add when it is busy. That an operation is over in time is what counts, and not by how much.
SLACK = 1.5


@pytest.fixture
def server() -> Iterator[Server]:
    with valkey_server("--enable-debug-command", "yes") as server:
        yield server


@asynccontextmanager
async def cached(url: str, folder: Path | None = None, **options: Any) -> AsyncIterator[RedisCache]:
    fallback = None if folder is None else FileStore(folder)
    options = {"timeout": DEADLINE, "l1_max_entries": 0, "failover": {"probe_max": 0.5}} | options
    async with RedisCache(url, fallback=fallback, **options) as cache:
        yield cache


async def took(work: Awaitable[Any]) -> float:
    begun = perf_counter()
    await work
    return perf_counter() - begun


class Outage(NamedTuple):
    """A server that can be had, how it comes to be away, and how it comes back."""

    url: str
    begins: Callable[[], Any]
    ends: Callable[[], Any] = lambda: None


@contextmanager
def _stopped(server: Server, _: FaultProxy) -> Iterator[Outage]:
    yield Outage(server.url, server.pause, server.resume)


@contextmanager
def _paused(server: Server, _: FaultProxy) -> Iterator[Outage]:
    yield Outage(server.url, lambda: server.command("CLIENT", "PAUSE", 2_500, "ALL"))  # it ends by itself


@contextmanager
def _busy(server: Server, _: FaultProxy) -> Iterator[Outage]:
    sleep = Thread(target=server.command, args=("DEBUG", "SLEEP", "2.5"))

    def begin() -> None:
        sleep.start()
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.05) as asks, suppress(TimeoutError):
            while True:
                asks.sendall(b"PING\r\n")
                asks.recv(100)

    yield Outage(server.url, begin)
    sleep.join()


@contextmanager
def _refused(_: Server, proxy: FaultProxy) -> Iterator[Outage]:
    def begin() -> None:
        proxy.refuse()
        proxy.cut()

    yield Outage(proxy.url, begin, proxy.heal)


@contextmanager
def _swallowed(_: Server, proxy: FaultProxy) -> Iterator[Outage]:
    yield Outage(proxy.url, proxy.black_hole, proxy.heal)


@contextmanager
def _held(_: Server, proxy: FaultProxy) -> Iterator[Outage]:
    yield Outage(proxy.url, proxy.hold, proxy.heal)


@contextmanager
def _unplugged(_: Server, __: FaultProxy) -> Iterator[Outage]:
    """A server at the other end of a cable, which is pulled: nothing comes back, not even a refusal."""
    name = f"mhc{os.getpid() % 1_000_000}"
    here, there = (f"198.18.{os.getpid() % 256}.{last}" for last in (1, 2))

    def ip(*command: str) -> None:
        subprocess.run(["ip", *command], check=True, capture_output=True, text=True)

    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        try:
            ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no virtual cables here: {error.stderr}")
        ip("address", "add", f"{here}/30", "dev", f"{name}a")
        ip("-n", name, "address", "add", f"{there}/30", "dev", f"{name}b")
        ip("link", "set", f"{name}a", "up")
        ip("-n", name, "link", "set", f"{name}b", "up")
        with valkey_server("--bind", there, "--protected-mode", "no", start=False) as server:
            server.host, server.prefix = there, ("ip", "netns", "exec", name)
            server.start()
            yield Outage(
                server.url,
                lambda: ip("-n", name, "link", "set", f"{name}b", "down"),
                lambda: ip("-n", name, "link", "set", f"{name}b", "up"),
            )
    finally:
        ip("netns", "del", name)  # and the cable with it


@pytest.mark.parametrize("covered", [False, True], ids=["alone", "with a fallback"])
@pytest.mark.parametrize("outages", [_refused, _swallowed, _stopped, _paused, _busy, _held, _unplugged])
async def test_an_outage_costs_a_call_its_loader_and_one_deadline_and_then_next_to_nothing(
    server: Server,
    tmp_path: Path,
    outages: Callable[[Server, FaultProxy], AbstractContextManager[Outage]],
    covered: bool,
) -> None:
    loader_seconds = 0.2
    async with FaultProxy(server.url) as proxy:
        with outages(server, proxy) as outage:
            async with cached(outage.url, tmp_path if covered else None) as cache:
                calls = 0

                @acached(ttl=60, cache=cache)
                async def loaded(number: int, seconds: float = 0.0) -> int:
                    nonlocal calls
                    calls += 1
                    await asyncio.sleep(seconds)
                    return number

                await loaded(-1)
                outage.begins()
                assert await took(loaded(0, loader_seconds)) < loader_seconds + DEADLINE + SLACK
                await poll(lambda: cache.store.state().state != "healthy")
                seconds = [await took(loaded(number)) for number in range(1, 40)]
                if not covered:  # what the disk takes is the disk's
                    assert statistics.median(seconds) < 0.005  # 0.2 ms where nothing else runs
                assert max(seconds) < DEADLINE
                assert calls == 41
                outage.ends()
                await poll(lambda: cache.store.state().state == "healthy")
                await loaded(-1)
                assert calls == 41  # as it was


async def test_a_server_whose_system_takes_no_connection(tmp_path: Path) -> None:
    """The queue of its connections is full, so that the kernel drops whoever asks for one: SYNs without an answer."""
    with socket.socket() as full, ExitStack() as queued:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(16):
            one = queued.enter_context(socket.socket())
            one.setblocking(False)
            with suppress(BlockingIOError):
                one.connect(full.getsockname())
        with pytest.raises(TimeoutError):
            socket.create_connection(full.getsockname(), timeout=0.2)
        async with cached("redis://{}:{}/0".format(*full.getsockname()), tmp_path) as cache:
            assert await took(cache.get_or_load("k", lambda: asyncio.sleep(0.2, 1))) < 0.2 + DEADLINE + SLACK
            await poll(lambda: cache.store.state().state != "healthy")
            assert await took(cache.get("k")) < DEADLINE


async def test_a_thousand_callers_of_a_thousand_keys_wait_no_longer_than_one(server: Server) -> None:
    async with cached(server.url) as cache:
        await cache.set("k", 1)
        server.pause()
        try:
            begun = perf_counter()
            found = await asyncio.gather(*(cache.get(f"k{number}") for number in range(1000)))
            assert perf_counter() - begun < DEADLINE + SLACK
            assert set(found) == {None}
        finally:
            server.resume()


async def test_a_stampede_while_the_server_is_stopped_is_one_load(server: Server, tmp_path: Path) -> None:
    async with cached(server.url, tmp_path) as cache:
        await cache.set("k", 1)
        calls = 0

        async def load() -> str:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0.05)
            return "loaded"

        server.pause()
        try:
            loaded = await asyncio.gather(*(cache.get_or_load("cold", load) for _ in range(1000)))
        finally:
            server.resume()
        assert set(loaded) == {"loaded"}
        assert calls == 1


async def test_a_restart_under_load_is_over_soon_and_found_out_by_few_probes(server: Server) -> None:
    async with FaultProxy(server.url) as proxy, cached(proxy.url) as cache:
        await cache.set("k", 1)
        stop = False

        async def ask() -> None:
            while not stop:
                assert await cache.get("k", 1) == 1
                await asyncio.sleep(0.001)

        asking = [asyncio.create_task(ask()) for _ in range(50)]
        server.kill()
        proxy.cut()
        await poll(lambda: cache.store.state().state != "healthy")
        accepted, begun = proxy.accepted, perf_counter()
        await asyncio.sleep(1.0)  # how long it is away: probes are counted in it
        away = perf_counter() - begun
        # The shortest wait between two probes is half of probe_after, the first and its doubles; a probe may open a
        # connection for PING and look once more at what it was that refused.
        assert proxy.accepted - accepted <= 3 * (2 + away / 0.25)
        await asyncio.to_thread(server.start)
        begun = perf_counter()
        await poll(lambda: cache.store.state().state == "healthy")
        assert perf_counter() - begun < 0.5 + SLACK
        stop = True
        await asyncio.gather(*asking)


async def test_two_connections_for_a_thousand_callers_are_enough(server: Server) -> None:
    async with cached(server.url, max_connections=2, timeout=10) as cache:
        await asyncio.gather(*(cache.set(f"k{number}", number) for number in range(1000)))
        assert await asyncio.gather(*(cache.get(f"k{number}") for number in range(1000))) == [*range(1000)]
        assert cache.stats.errors == {}
        assert len([line for line in server.command("CLIENT", "LIST").splitlines() if b"redis-py" in line]) <= 2


@pytest.mark.parametrize("how", ["killed by the server", "timed out by the server", "cut by the network"])
async def test_a_connection_that_ended_while_it_was_idle_is_invisible(server: Server, how: str) -> None:
    async with FaultProxy(server.url) as proxy, cached(proxy.url, timeout=10) as cache:
        await cache.set("k", 1)
        assert await cache.get("k") == 1
        if how == "killed by the server":
            server.kill_clients()
        elif how == "timed out by the server":
            server.command("CONFIG", "SET", "timeout", 1)
        else:
            proxy.cut(how="close")
        await poll(lambda: not proxy.links)
        server.command("CONFIG", "SET", "timeout", 0)
        assert await cache.get("k") == 1
        await cache.set("k", 2)
        assert await cache.get("k") == 2
        assert cache.stats.errors == {}


async def test_a_reply_of_somebody_elses_is_served_to_nobody(server: Server) -> None:
    """A connection made dirty: a well-formed reply that nobody asked for comes before the one that was."""
    async with FaultProxy(server.url) as proxy, cached(proxy.url) as cache:
        names = [f"k{number}" for number in range(20)]
        for name in names:
            await cache.set(name, name)
        (key,) = server.command("KEYS", "*k7*")
        planted = b"*1\r\n$%d\r\n%b\r\n" % (len(value := server.command("GET", key)), value)
        for _ in range(20):
            with proxy.edit(lambda reply: planted + reply, times=1):
                found = await asyncio.gather(*(cache.get(name) for name in names))
            assert all(value in {None, name} for name, value in zip(names, found, strict=True))
        await poll(lambda: cache.store.state().state == "healthy")
        assert await asyncio.gather(*(cache.get(name) for name in names)) == names


async def test_replies_dropped_doubled_and_garbled_are_served_to_nobody(server: Server, tmp_path: Path) -> None:
    async with FaultProxy(server.url, seed=7) as proxy, cached(proxy.url, tmp_path) as cache:
        names = [f"k{number}" for number in range(50)]
        for name in names:
            await cache.set(name, name)
        for fault in (proxy.garble, proxy.drop, proxy.duplicate):
            with fault(times=None, probability=0.2):
                for _ in range(5):
                    found = await asyncio.gather(*(cache.get(name) for name in names))
                    assert all(value in {None, name} for name, value in zip(names, found, strict=True))
        proxy.cut()
        await poll(lambda: cache.store.state().state == "healthy")
        assert all(value in {None, name} for name, value in zip(names, found, strict=True))
