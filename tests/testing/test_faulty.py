"""``FaultyStore``: what it fails, what it claims; ``faulty`` and ``as_default``."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import Cache, MemoryCache, acached, default_cache
from mcp_hub_cache import _protocols as protocols
from mcp_hub_cache._exceptions import StoreFullError, StoreTimeoutError, StoreUnreachableError
from mcp_hub_cache._protocols import Immediate, Store, Write
from mcp_hub_cache._shortcut import CURRENT
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import FaultyStore, as_default, entry_frame, faulty
from tests.backends import Plain, turns

K, OTHER = b"mcp_hub:t:e:k", b"mcp_hub:t:e:other"
STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda _: MemoryStore(),
    "file": FileStore,
    "redis": lambda _: RedisStore(),
    "failover": lambda _: FailoverStore(MemoryStore(), MemoryStore()),
    "plain": lambda _: Plain(MemoryStore()),
}
CAPABILITIES = [
    each
    for name, each in vars(protocols).items()
    if inspect.isclass(each) and getattr(each, "_is_runtime_protocol", False) and each not in {Store, Immediate}
]


def write(store: Store, key: bytes = K) -> Write:
    return Write(key, entry_frame(store, key), 60.0, None)


@pytest.mark.parametrize("name", STORES)
def test_it_can_do_what_the_wrapped_one_can_and_no_more(name: str, tmp_path: Path) -> None:
    store = STORES[name](tmp_path)
    claims = {each.__name__ for each in CAPABILITIES if isinstance(store, each)}
    wrapped = FaultyStore(store)
    assert {each.__name__ for each in CAPABILITIES if isinstance(wrapped, each)} == claims
    assert isinstance(wrapped, Store)
    assert isinstance(wrapped, FaultyStore)
    assert "immediate" not in vars(type(wrapped))
    assert (wrapped.name, wrapped.id) == (store.name, store.id)


def test_there_are_capabilities_to_speak_of() -> None:
    assert {"Coherent", "Leases", "Used", "Evicting", "Monitored", "Switching", "Replaceable"} <= {
        each.__name__ for each in CAPABILITIES
    }


def test_what_it_is_told_to_tell_the_wrapped_one_tells() -> None:
    store = MemoryStore(max_bytes=2000)
    told: list[int] = []
    wrapped: Any = FaultyStore(store)
    wrapped.on_evict = told.append
    assert store.on_evict == wrapped.on_evict


async def test_failing_once_and_then_no_more() -> None:
    store = FaultyStore(MemoryStore())
    fault = store.break_down(times=1)
    with pytest.raises(StoreUnreachableError, match="broken by the test"):
        await store.get_many([K])
    assert await store.get_many([K]) == [None]
    assert (fault.count, store.calls) == (1, {"get_many": 2})


async def test_failing_some_methods() -> None:
    store = FaultyStore(MemoryStore())
    with store.break_down(StoreFullError("no room."), "write_many", "scan"):
        with pytest.raises(StoreFullError, match="no room"):
            await store.write_many([write(store)])
        assert await store.get_many([K]) == [None]
        with pytest.raises(StoreFullError):
            await anext(store.scan(b""))
    assert await store.write_many([write(store)]) == ["done"]
    assert [len(page) async for page in store.scan(b"")] == [1]


async def test_the_later_of_two_counts() -> None:
    store = FaultyStore(MemoryStore())
    store.break_down()
    with store.break_down(StoreTimeoutError("late.")), pytest.raises(StoreTimeoutError):
        await store.ping()
    with pytest.raises(StoreUnreachableError):
        await store.ping()
    store.repair()
    await store.ping()


async def test_an_error_is_not_written_to() -> None:
    store = FaultyStore(MemoryStore())
    error = StoreFullError("no room.", cure="Make some.")
    store.break_down(error)
    with pytest.raises(StoreFullError, match=r"^no room\. Make some\.$") as caught:
        await store.ping()
    assert caught.value is not error
    assert error.__traceback__ is None


async def test_failing_after_the_effect() -> None:
    store = FaultyStore(MemoryStore())
    with store.break_down(None, "write_many", after=True), pytest.raises(StoreUnreachableError):
        await store.write_many([write(store)])
    assert await store.get_many([K]) != [None]


async def test_chance_comes_from_the_seed() -> None:
    async def failures(seed: int) -> list[int]:
        store = FaultyStore(MemoryStore(), seed=seed)
        store.break_down(probability=0.5)
        ended = await asyncio.gather(*[store.get_many([K]) for _ in range(40)], return_exceptions=True)
        return [at for at, each in enumerate(ended) if isinstance(each, BaseException)]

    first, again, other = await failures(1), await failures(1), await failures(2)
    assert first == again != other
    assert 0 < len(first) < 40


@pytest.mark.parametrize("after", [False, True])
async def test_stalled_calls_go_on(after: bool) -> None:
    store = FaultyStore(MemoryStore())
    fault = store.stall("write_many", times=1, after=after)
    writing = asyncio.ensure_future(store.write_many([write(store)]))
    await asyncio.wait_for(fault.hit.wait(), 10)
    assert await store.write_many([write(store, OTHER)]) == ["done"]  # one alone
    await turns()
    assert not writing.done()
    assert (await store.get_many([K]) != [None]) is after
    fault.end()
    assert await writing == ["done"]


async def test_a_stalled_call_can_be_cancelled() -> None:
    store = FaultyStore(MemoryStore())
    store.stall()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(store.ping(), 0.01)


async def test_slow_calls() -> None:
    store = FaultyStore(MemoryStore())
    begun = asyncio.get_running_loop().time()
    store.slow_down((0.05, 0.06), "ping")
    await store.ping()
    assert asyncio.get_running_loop().time() - begun >= 0.045


def test_what_is_no_fault() -> None:
    store = FaultyStore(MemoryStore())
    with pytest.raises(ValueError, match="no method of stores: get; there are begin_many, "):
        store.break_down(None, "get")
    with pytest.raises(ValueError, match="seconds must be 0 or more"):
        store.slow_down(-1)
    with pytest.raises(ValueError, match="times must be"):
        store.stall(times=0)


async def test_a_broken_cache_is_a_miss() -> None:
    cache, faults = faulty(l1_max_entries=0)
    async with cache:
        await cache.set("k", 1)
        with faults.break_down():
            assert await cache.get("k") is None
        assert await cache.get("k") == 1
        assert cache.stats.errors == {"unreachable": 1}


async def test_a_near_cache_over_a_faulty_store_is_a_near_cache() -> None:
    cache, faults = faulty()
    async with cache:
        await cache.set("k", 1)
        assert await cache.get("k") == 1
        with faults.break_down():
            assert await cache.get("k") == 1


async def test_the_default_cache_within_a_block() -> None:
    calls = 0

    @acached(ttl=60)
    async def double(n: int) -> int:
        nonlocal calls
        calls += 1
        return 2 * n

    async def stands(cache: object) -> None:
        assert await default_cache() is cache
        assert CURRENT.cache is cache

    cache, faults = faulty()
    other = MemoryCache()
    with as_default(cache):
        await stands(cache)
        assert [await double(2) for _ in range(3)] == [4, 4, 4]
        assert calls == 1
        with as_default(other):
            await stands(other)
            assert await double(2) == 4
        await stands(cache)
        assert [await double(2) for _ in range(3)] == [4, 4, 4]
        assert calls == 2
        with faults.break_down():
            assert await double(3) == 6
        assert faults.calls
    assert CURRENT.cache is None
    await cache.aclose()
    await other.aclose()


async def test_the_default_cache_from_before_is_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_BACKEND", "memory")
    before = await default_cache()
    cache, _ = faulty()
    with as_default(cache):
        assert await default_cache() is cache
    assert await default_cache() is before
    assert CURRENT.cache is before
    await cache.aclose()
    await before.aclose()


async def test_a_default_that_is_opened_meanwhile_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_BACKEND", "memory")
    opening = asyncio.ensure_future(default_cache())
    await turns(2)
    cache, _ = faulty()
    with as_default(cache):
        before = await opening
        await turns()
        assert CURRENT.cache is cache
    assert isinstance(before, Cache)
    assert CURRENT.cache is await default_cache() is before
    await cache.aclose()
    await before.aclose()


def test_without_a_loop_there_is_no_default_to_replace() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"), as_default(MemoryCache()):
        pass
