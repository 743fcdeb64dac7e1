"""Tags when something goes wrong, and tagged entries in the near cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import MISSING, Cache, RedisCache
from mcp_hub_cache._current import current_entry
from mcp_hub_cache._protocols import Write
from mcp_hub_cache._tags import ANY_DIGEST, mark_key, tag_digest
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FaultyStore
from tests.backends import PATIENT, WITH_FAILOVER, Backend, poll
from tests.servers import Server, valkey_server


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture(params=WITH_FAILOVER)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    server = request.getfixturevalue("valkey") if request.param.startswith("redis") else None
    return Backend(request.param, tmp_path, server)


@pytest.fixture
async def cache(backend: Backend) -> AsyncIterator[Cache]:
    yield backend.open()
    await backend.aclose()


@pytest.fixture
async def other(backend: Backend, cache: Cache) -> Cache:
    """Another process's."""
    return backend.open()


@pytest.fixture
async def memory() -> AsyncIterator[Cache]:
    async with Cache(MemoryStore()) as cache:
        yield cache


async def soon(backend: Backend, holds: Callable[[], Awaitable[bool]]) -> None:
    """At once, unless it is the server that tells of it."""
    if backend.is_told_later:
        await poll(holds)
    else:
        assert await holds()


async def is_gone(cache: Cache, *keys: str) -> bool:
    return await cache.get_many(keys) == {}


def load(value: object, *added: str) -> Callable[[], Awaitable[Any]]:
    async def loader() -> object:
        current_entry().tags.update(added)
        return value

    return loader


async def names(cache: Cache) -> list[str]:
    return [key async for key in aiter(cache.keys())]


async def never() -> Any:
    raise AssertionError("there is nothing to load")


async def is_stored(cache: Cache, key: str, value: object) -> bool:
    return bool(await cache.get(key, MISSING) == value)


# Trouble


def mark_of(cache: Cache, tag: str) -> bytes:
    return mark_key(cache._space.root, tag_digest(tag) if tag else ANY_DIGEST)


async def test_an_evicted_mark_is_a_miss_and_no_resurrection(backend: Backend, cache: Cache, other: Cache) -> None:
    for plants in (cache, other):
        await cache.set_many({"a": "old", "b": "old"}, tags=["t"])
        assert await other.get("a") == "old"
        await cache.store.delete_many([mark_of(cache, "t")])
        for each in (cache, other):
            await soon(backend, lambda each=each: is_gone(each, "a", "b"))
        assert await plants.get_or_load("a", load("new"), tags=["t"]) == "new"
        for each in (cache, other):
            await soon(backend, lambda each=each: is_stored(each, "a", "new"))
            assert await is_gone(each, "b")
        await cache.invalidate("t")


@pytest.mark.parametrize("tag", ["t", ""])
async def test_a_damaged_mark_is_a_miss_and_mends(backend: Backend, cache: Cache, other: Cache, tag: str) -> None:
    async def loaded(key: str) -> bool:
        return await cache.get_or_load(key, load("again", "t")) == await other.get(key, MISSING)

    await cache.get_or_load("k", load([1], "t"))
    (mark,) = await cache.store.get_many([mark_of(cache, tag)])
    (foreign,) = await cache.store.get_many([mark_of(cache, "" if tag else "t")])
    assert mark is not None and foreign is not None
    for number, bad in enumerate((mark[:20] + bytes([mark[20] ^ 1]) + mark[21:], foreign, b"rubbish", mark[:40])):
        await cache.set(f"k{number}", [1], tags=["t"])
        await cache.store.write_many([Write(mark_of(cache, tag), bad, 600.0, None)])
        if tag:
            await soon(backend, lambda number=number: is_gone(other, f"k{number}"))
        await soon(backend, lambda number=number: loaded(f"new{number}"))
    await cache.invalidate("t")
    await soon(backend, lambda: is_gone(other, "new0", "new3"))


async def test_a_cancelled_invalidation_is_carried_out(cache: Cache) -> None:
    await cache.set("k", 1, tags=["t"])
    task = asyncio.ensure_future(cache.invalidate("t"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await poll(lambda: is_gone(cache, "k"))


async def test_a_store_that_is_away_has_not_taken_note() -> None:
    store = FaultyStore(MemoryStore())
    async with Cache(store) as cache:
        await cache.set("k", 1, tags=["t"])
        store.break_down()
        assert await cache.invalidate("t") is False
        assert await cache.get("k") is None
        assert await cache.get_or_load("k", load(2), tags=["t"]) == 2
        await cache.set("k2", 2, tags=["t"])
        store.repair()
        assert await cache.invalidate("t") is True
        assert await is_gone(cache, "k", "k2")


async def test_a_failover_makes_up_for_what_was_invalidated_meanwhile() -> None:
    memory, standby = MemoryStore(), MemoryStore()
    primary = FaultyStore(memory)
    async with (
        Cache(FailoverStore(primary, standby, probe_after=0.01, probe_max=0.02)) as cache,
        Cache(memory) as truth,
    ):
        await cache.set_many({"a": "old", "b": "old"}, tags=["t"])
        await cache.set("free", 1, tags=["u"])
        primary.break_down()
        assert await cache.invalidate("t") is True
        assert await cache.get_or_load("a", load("new"), tags=["t"]) == "new"
        assert await cache.get("a") == "new"  # the standby has it
        assert await cache.invalidate("t") is True
        assert await is_gone(cache, "a", "b")
        assert await truth.get("b") == "old"  # as another process sees it, until it is made up for
        primary.repair()
        await poll(cache.health_check)
        await poll(lambda: is_gone(truth, "a", "b"))
        assert await is_gone(cache, "a", "b")
        assert await cache.get("free") == 1


# Near


async def is_near(cache: Cache, key: str) -> bool:
    await cache.get(key)
    entry = await cache.get_entry(key)
    return entry is not None and entry.tier == "l1"


async def test_tagged_entries_are_served_from_memory(backend: Backend, cache: Cache, other: Cache) -> None:
    for who in (cache, other):
        await cache.set_many({"k": [1], "free": [1]}, tags=["t", "u"])
        await poll(lambda: is_near(cache, "k"))
        before = cache.stats.hits_by_tier["l1"]
        for _ in range(10):
            assert await cache.get("k") == [1]
            assert await cache.get_many(["k"]) == {"k": [1]}
            assert await cache.get_or_load("k", never, tags=["t"]) == [1]
        assert cache.stats.hits_by_tier["l1"] == before + 30
        await who.invalidate("t")
        if who is cache:
            assert await cache.get("k", MISSING) is MISSING
        await soon(backend, lambda: is_gone(cache, "k"))


async def test_without_news_marks_are_read_every_time(valkey: Server) -> None:
    valkey.command("FLUSHALL")
    async with (
        RedisCache(valkey.url, timeout=PATIENT, max_connections=1) as cache,
        RedisCache(valkey.url, timeout=PATIENT, max_connections=1) as other,
    ):
        for who in (cache, other):
            await cache.set("k", 1, tags=["t"])
            for each in (cache, other) * 3:
                assert await each.get("k") == 1
            await who.invalidate("t")
            for each in (cache, other):
                assert await each.get("k", MISSING) is MISSING
        assert "l1" not in {**cache.stats.hits_by_tier, **other.stats.hits_by_tier}
