"""The store is told what the near cache serves, so that it does not drop that first."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mcp_hub_cache import Cache, RedisCache
from mcp_hub_cache import _use as use
from mcp_hub_cache._direct import Done
from mcp_hub_cache._exceptions import StoreUnreachableError
from mcp_hub_cache._tags import mark_key, tag_digest
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.memory import MemoryStore
from tests.backends import PATIENT, poll
from tests.servers import Server, valkey_server


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


class Listening(MemoryStore):
    """Takes note of what it is told."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.told: list[list[bytes]] = []
        self.error: StoreUnreachableError | None = None

    def used_many(self, keys: Sequence[bytes], /) -> Any:
        self.told.append(list(keys))
        if self.error is not None:
            raise self.error
        return super().used_many(keys) if keys else Done(None)


async def a_minute(cache: Cache) -> None:
    """Let the minute pass that is under way, and all that follows from it happen."""
    session = cache._engine.session()
    assert session.use is not None
    timer = session.use._timer
    if timer is not None:
        timer.cancel()
        session.use._tell()
    while session.tasks:
        await asyncio.gather(*session.tasks)


def key_of(cache: Cache, *names: str) -> list[bytes]:
    return [cache._key(name) for name in names]


async def near(cache: Cache, *names: str) -> None:
    for name in names:
        await cache.get(name)


async def test_a_minute_is_what_the_loop_is_asked_for() -> None:
    async with Cache(Listening()) as cache:
        await cache.set("k", 1)
        session = cache._engine.session()
        assert session.use is not None
        assert session.use._timer is None  # nothing to serve yet
        await near(cache, "k")
        timer = session.use._timer
        assert timer is not None
        left = timer.when() - asyncio.get_running_loop().time()
        assert 0 < left <= use.INTERVAL == 60.0
        await near(cache, "k", "k")
        assert session.use._timer is timer


async def test_what_was_served_since(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use, "INTERVAL", 0.01)
    store = Listening()
    async with Cache(store) as cache:
        await cache.set_many({"a": [1], "b": [1], "c": [1]})
        await near(cache, "a", "b", "c")
        await near(cache, "a", "c")
        await poll(lambda: bool(store.told))
        assert sorted(store.told[0]) == key_of(cache, "a", "c")
        await near(cache, "b")
        await poll(lambda: len(store.told) > 1)
        assert store.told[1:] == [key_of(cache, "b")]


async def test_each_way_of_being_served_counts() -> None:
    store = Listening()
    async with Cache(store) as cache:
        for ask in (
            lambda: cache.get("k"),
            lambda: cache.get_many(["k"]),
            lambda: cache.get_entry("k"),
            lambda: cache.get_or_load("k", lambda: asyncio.sleep(0, 2)),
        ):
            await cache.set("k", 1)
            await near(cache, "k")
            await a_minute(cache)
            store.told.clear()
            await ask()  # type: ignore[no-untyped-call]
            await a_minute(cache)
            assert store.told == [key_of(cache, "k")]
            await a_minute(cache)
            assert len(store.told) == 1  # it was told, and nothing was served since


async def test_the_marks_that_it_hangs_on() -> None:
    store = Listening()
    async with Cache(store) as cache:
        await cache.set("k", 1, tags=["t", "u"])
        await cache.set("dead", 1, tags=["v"])
        await near(cache, "k", "dead", "k")
        await cache.invalidate("v")
        await a_minute(cache)
        marks = [mark_key(cache._space.root, tag_digest(tag)) for tag in "tu"]
        (told,) = store.told
        assert set(told) == {*key_of(cache, "k"), *marks}


async def test_nothing_where_nothing_was_served() -> None:
    store = Listening()
    async with Cache(store) as cache:
        await cache.set_many({"a": 1, "b": 1}, tags=["t"])
        await near(cache, "a", "b")
        for _ in range(3):
            await a_minute(cache)
        assert store.told == []
        await cache.delete_many(["a", "b"])
        await a_minute(cache)
        session = cache._engine.session()
        assert session.use is not None
        assert session.use._timer is None  # L1 is empty: nothing is asked for
        await cache.set("a", 1)
        await near(cache, "a", "a")
        await a_minute(cache)
        assert store.told[0][:1] == key_of(cache, "a")


async def test_nothing_after_the_cache_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use, "INTERVAL", 0.01)
    store = Listening()
    async with Cache(store) as cache:
        await cache.set("k", 1)
        await near(cache, "k", "k")
        session = cache._engine.session()
    assert session.use is not None
    assert session.use._timer is None
    told = len(store.told)
    await asyncio.sleep(0.05)  # five of its minutes
    assert len(store.told) == told
    gc.collect()


async def test_many_are_told_in_chunks_and_trouble_is_none() -> None:
    store = Listening()
    names = [f"k{n}" for n in range(300)]
    async with Cache(store) as cache:
        await cache.set_many(dict.fromkeys(names, 1))
        await near(cache, *names, *names)
        await a_minute(cache)
        assert sorted(key for told in store.told for key in told) == sorted(key_of(cache, *names))
        assert max(map(len, store.told)) <= 128
        await near(cache, *names)
        store.error = StoreUnreachableError("gone.")
        store.told.clear()
        await a_minute(cache)
        assert len(store.told) == 1  # no use in asking on
        store.error = None
        await near(cache, "k1")
        await a_minute(cache)
        assert store.told[1:] == [key_of(cache, "k1")]
        assert cache.stats.errors == {}


async def test_a_store_in_memory_spares_what_is_served() -> None:
    """Of many that come, those go first that nobody asks for; with their mark, tagged ones stay whole."""
    for told in (True, False):
        async with Cache(MemoryStore(max_bytes=40_000)) as cache:
            await cache.set("served", "x" * 100, tags=["t"])
            await near(cache, "served", "served")
            for number in range(30):
                await cache.set_many({f"{number} {n}": "y" * 100 for n in range(20)})
                await near(cache, "served")
                if told:
                    await a_minute(cache)
            (frame,) = await cache.store.get_many(key_of(cache, "served"))
            assert (frame is not None) == told
            async with Cache(cache.store, l1_max_entries=0) as bare:
                assert (await bare.get("served") is not None) == told


async def test_a_failover_tells_whoever_serves() -> None:
    primary = Listening()
    async with Cache(FailoverStore(primary, MemoryStore())) as cache:
        await cache.set("k", 1)
        await near(cache, "k", "k")
        await a_minute(cache)
        assert primary.told == [key_of(cache, "k")]


async def test_a_server_counts_it_as_used(valkey: Server) -> None:
    async with RedisCache(valkey.url, timeout=PATIENT) as cache:
        await cache.set_many({"served": 1, "idle": 1}, tags=["t"])

        async def is_near() -> bool:
            await cache.get("served")
            entry = await cache.get_entry("served")
            return entry is not None and entry.tier == "l1"

        await poll(is_near)
        (served, idle), mark = key_of(cache, "served", "idle"), mark_key(cache._space.root, tag_digest("t"))

        def idle_seconds(key: bytes) -> int:
            seconds: int = valkey.command("OBJECT", "IDLETIME", key)
            return seconds

        await poll(lambda: min(map(idle_seconds, (served, idle, mark))) >= 2)
        await near(cache, "served")
        assert min(map(idle_seconds, (served, mark))) >= 2  # it was not asked
        await a_minute(cache)
        assert max(map(idle_seconds, (served, mark))) < 2 <= idle_seconds(idle)
