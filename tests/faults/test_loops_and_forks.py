"""Caches that are closed while they are busy, used from two loops, and inherited by forked children."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcp_hub_cache import Cache, CacheError, FileCache, MemoryCache, RedisCache, WrongLoopError
from mcp_hub_cache.stores.file import FileStore
from tests.faults.children import temps
from tests.forks import in_child
from tests.servers import Server, valkey_server

BACKENDS = ("memory", "file", "redis", "failover")
SHARED = BACKENDS[1:]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with valkey_server() as running:
        yield running


def make(backend: str, folder: Path, server: Server) -> Cache:
    match backend:
        case "memory":
            return MemoryCache(timeout=30)
        case "file":
            return FileCache(folder, timeout=30)
        case "redis":
            return RedisCache(server.url, timeout=30)
        case _:
            return RedisCache(server.url, timeout=30, fallback=FileStore(folder))


async def for_ever() -> None:
    await asyncio.Event().wait()


def work(cache: Cache, n: int) -> list[asyncio.Task[object]]:
    """Everything that can be asked for, under way."""
    return [
        asyncio.create_task(each)  # type: ignore[arg-type]  # coroutines of all kinds of results
        for each in (
            cache.set(f"s{n}", "x" * 20_000, tags=["t"]),
            cache.set_many({f"s{n}": 1, f"m{n}": 2}),
            cache.get(f"s{n}"),
            cache.get_many([f"s{n}", f"m{n}"]),
            cache.get_entry(f"s{n}"),
            cache.add(f"a{n}", 1),
            cache.touch(f"s{n}", 50),
            cache.exists(f"s{n}"),
            cache.ttl(f"s{n}"),
            cache.delete(f"s{n}"),
            cache.delete_many([f"m{n}"]),
            cache.invalidate(f"t{n}"),
            cache.clear(prefix=f"c{n}"),
            cache.get_or_load(f"l{n}", for_ever),
            cache.get_or_load(f"l{n}", for_ever),
            cache.get_or_load(f"q{n}", lambda: asyncio.sleep(0, 1)),
            cache.health_check(),
            cache.status(),
            listing(cache),
        )
    ]


async def listing(cache: Cache) -> list[str]:
    return [key async for key in cache.keys("")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20])
async def test_aclose_while_busy(backend: str, steps: int, tmp_path: Path, server: Server) -> None:
    """Row: loop closed. Each call ends, with a result or an error of ours; nothing is left."""
    server.command("FLUSHALL")
    before = asyncio.all_tasks()
    cache = make(backend, tmp_path, server)
    await cache.set("warm", 1)
    tasks = [task for n in range(5) for task in work(cache, n)]
    for _ in range(steps):
        await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await cache.aclose()
        # Who had not begun, or went on, opened it again: that has an end, too.
        stuck = {task for n in range(5) for task in tasks[19 * n + 13 : 19 * n + 15]}
        await asyncio.wait(set(tasks) - stuck)
        await cache.aclose()
        await asyncio.wait(tasks)
    for task in tasks:
        error = task.exception()
        assert error is None or isinstance(error, CacheError), repr(error)
    for _ in range(5):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert not temps(tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_two_running_loops(backend: str, tmp_path: Path, server: Server) -> None:
    """Row: second event loop. A clear error for the second, and none for the first."""
    async with make(backend, tmp_path, server) as cache:
        await cache.set("k", 1)
        calls = (lambda: cache.get("k"), lambda: cache.set("k", 2), lambda: cache.get_or_load("k", for_ever))

        async def other() -> None:
            for call in calls:
                with pytest.raises(WrongLoopError, match="Give each running loop a cache of its own"):
                    await call()
            await cache.aclose()  # not its to close

        await asyncio.to_thread(asyncio.run, other())
        assert await cache.get("k") == 1


@pytest.mark.parametrize("backend", SHARED)
async def test_forks_under_load(backend: str, tmp_path: Path, server: Server) -> None:
    """Row: fork. Nobody is told another's value, the parent's calls go on, the child has its own."""
    server.command("FLUSHALL")
    async with make(backend, tmp_path, server) as cache:
        await cache.set_many({f"k{n}": n for n in range(200)})
        stop = asyncio.Event()
        rounds = 0

        async def reader(first: int) -> None:
            nonlocal rounds
            while not stop.is_set():
                for n in range(first, 200, 8):
                    assert await cache.store.get_many([cache._key(f"k{n}")]) != [None]
                    assert await cache.get(f"k{n}") == n
                    await cache.set(f"w{first}", n)
                    assert await cache.get(f"w{first}") == n
                rounds += 1

        readers = [asyncio.create_task(reader(first)) for first in range(8)]

        async def child() -> None:
            for n in range(0, 200, 5):
                assert await cache.get(f"k{n}") == n
            await cache.set(f"of {os.getpid()}", "child")
            assert await cache.get_or_load("by a child", lambda: asyncio.sleep(0, 5)) == 5
            await cache.aclose()

        def by_multiprocessing() -> None:
            asyncio.run(child())

        for turn in range(4):
            goal = rounds + 2
            if turn % 2:
                in_child(lambda: asyncio.run(child()))
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 and later warn of forking with threads
                    process = multiprocessing.get_context("fork").Process(target=by_multiprocessing)
                    process.start()
                await asyncio.to_thread(process.join, 60)
                assert process.exitcode == 0
            async with asyncio.timeout(60):
                while rounds < goal and not any(each.done() for each in readers):
                    await asyncio.sleep(0.001)
        stop.set()
        await asyncio.gather(*readers)
        assert len([key async for key in cache.keys("of ")]) == 4
        assert cache.stats.errors == {}


@pytest.mark.parametrize("backend", SHARED)
def test_two_threads_with_a_loop_each(backend: str, tmp_path: Path, server: Server) -> None:
    """Row: second event loop. Caches of their own over one folder or server; each hears of the other's changes."""
    server.command("FLUSHALL")
    failed: list[BaseException] = []
    barrier = threading.Barrier(2, timeout=60)

    async def main(name: str, other: str) -> None:
        async with make(backend, tmp_path, server) as cache:
            for turn in range(30):
                await cache.set(name, turn)
                assert await cache.get(name) == turn
                await asyncio.to_thread(barrier.wait)
                async with asyncio.timeout(30):
                    while await cache.get(other) != turn:
                        await asyncio.sleep(0.001)
                await asyncio.to_thread(barrier.wait)
            assert cache.stats.errors == {}

    def thread(name: str, other: str) -> None:
        try:
            asyncio.run(main(name, other))
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    both = [threading.Thread(target=thread, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert failed == []
