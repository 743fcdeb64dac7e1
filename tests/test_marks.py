"""Marks: how long they live, what they leave, and loads in progress when a tag is invalidated."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import FOREVER, MISSING, Cache
from mcp_hub_cache._current import current_entry
from mcp_hub_cache._tags import ANY_DIGEST, mark_key, tag_digest
from mcp_hub_cache.stores.memory import MemoryStore
from tests.backends import WITH_FAILOVER, Backend, poll
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


@pytest.fixture(params=["memory", "file"])
async def timed(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    backend = Backend(request.param, tmp_path)
    yield backend
    await backend.aclose()


def load(value: object, *added: str, ttl: float | None = None) -> Callable[[], Awaitable[Any]]:
    async def loader() -> object:
        current_entry().tags.update(added)
        if ttl is not None:
            current_entry().ttl = ttl
        return value

    return loader


# How long they live


async def by_set(cache: Cache, key: str, ttl: float) -> None:
    await cache.set(key, key, ttl=ttl, tags=["t"])


async def by_add(cache: Cache, key: str, ttl: float) -> None:
    assert await cache.add(key, key, ttl=ttl, tags=["t"])


async def by_load(cache: Cache, key: str, ttl: float) -> None:
    await cache.get_or_load(key, load(key), ttl=ttl, tags=["t"])


async def by_adding(cache: Cache, key: str, ttl: float) -> None:
    await cache.get_or_load(key, load(key, "t", ttl=ttl))


async def by_touch(cache: Cache, key: str, ttl: float) -> None:
    await cache.set(key, key, ttl=1, tags=["t"])
    assert await cache.touch(key, ttl)


WAYS = [by_set, by_add, by_load, by_adding, by_touch]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ttls", [(3600.0, 10.0), (10.0, 3600.0), (20_000.0, 30_000.0), (30_000.0, 20_000.0)])
async def test_as_long_as_the_longest_entry(timed: Backend, way: Any, ttls: tuple[float, ...]) -> None:
    cache, other = timed.open_timed(), timed.open_timed()
    for number, ttl in enumerate(ttls):
        await way((cache, other)[number], str(number), ttl)
    for ttl in sorted(ttls):
        await timed.let_pass(cache, ttl - 0.5 - (cache.store.now() - 1_700_000_000.0))
        for number, each in enumerate(ttls):
            assert await other.get(str(number)) == (str(number) if each >= ttl else None)
    assert await cache.invalidate("t")
    assert await other.get_many(["0", "1"]) == {}


@pytest.mark.parametrize("way", WAYS)
async def test_an_entry_that_comes_late_keeps_the_mark(timed: Backend, way: Any) -> None:
    """By the store's clock, whatever the machine's own: a laptop that slept has counted nothing of it."""
    cache = timed.open_timed()
    await by_set(cache, "first", 3600.0)
    for number in range(5):
        await timed.let_pass(cache, 3000.0)
        await way(cache, f"k{number}", 3000.0)
        await timed.let_pass(cache, 2999.0)
        assert await cache.get(f"k{number}") == f"k{number}"


@pytest.mark.parametrize("way", WAYS)
async def test_for_ever(timed: Backend, way: Any) -> None:
    cache = timed.open_timed()
    for ttl in (10.0, FOREVER, 20.0):
        await way(cache, f"{ttl}", ttl)
    await timed.let_pass(cache, 50 * 365 * 86_400.0)
    assert await cache.get("inf") == "inf"
    await cache.invalidate("t")
    assert await cache.get("inf") is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ttls", [(20_000.0, 10.0), (10.0, 20_000.0), (FOREVER, 10.0), (10.0, FOREVER)])
async def test_on_a_server_too(way: Any, ttls: tuple[float, ...], valkey: Server, tmp_path: Path) -> None:
    backend = Backend("redis", tmp_path, valkey)
    cache, other = backend.open(), backend.open()
    key = mark_key(cache._space.root, tag_digest("t"))
    for number, ttl in enumerate(ttls):
        await way((cache, other)[number], str(number), ttl)

    def lives() -> float:
        left = valkey.command("PTTL", key)
        return math.inf if left == -1 else left / 1000

    await poll(lambda: lives() >= max(ttls) - 60)
    assert lives() < 60_000 or max(ttls) == math.inf
    await backend.aclose()


@pytest.mark.parametrize("ttl", [1e-12, 1e-3, 100 * 365 * 86_400.0])
async def test_the_shortest_and_the_longest(timed: Backend, ttl: float) -> None:
    cache = timed.open_timed()
    await cache.set("k", 1, ttl=ttl, tags=["t"])
    await cache.set_many({"k2": 1}, ttl=ttl, tags=["t"])
    assert await cache.get_or_load("k3", load(1, "t", ttl=ttl)) == 1
    assert await cache.get("k3", MISSING) == (1 if ttl > 1e-6 else MISSING)


async def test_nothing_is_left_when_all_has_ended(timed: Backend) -> None:
    cache = timed.open_timed()
    for number, ttl in enumerate((5.0, 4000.0, 10_000.0)):
        await cache.set(f"k{number}", 1, ttl=ttl, tags=[f"t{number}", "t"])
        await cache.get_or_load(f"l{number}", load(1, f"u{number}", ttl=ttl))
    await cache.touch("k0", 9000.0)
    await cache.invalidate("t1")
    await timed.let_pass(cache, 3 * 10_000.0)
    if timed.name == "file":
        await cache.store.sweep()  # type: ignore[attr-defined]
    assert [key async for page in cache.store.scan(b"") for key, _ in page] == []
    assert (await cache.store.info())["total_keys"] == 0


async def test_nothing_is_left_after_invalidating(cache: Cache) -> None:
    for number in range(20):
        await cache.set("k", number, tags=[f"t{number}"])
        await cache.invalidate(f"t{number}", "nobody's")
    await cache.delete("k")
    assert [key async for page in cache.store.scan(cache._space.root) for key, _ in page] == []


async def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_hub_cache._marks._MOST_KNOWN", 10)
    async with Cache(MemoryStore()) as cache:
        for number in range(50):
            await cache.set(f"k{number}", number, tags=[f"t{number}"])
        for number in range(50):
            assert await cache.get(f"k{number}") == number
        assert len(cache._engine.session().marks._known) <= 10


# A load in progress


class Load:
    """A load that waits before and after it adds its tags."""

    def __init__(self, *added: str, skip: bool = False) -> None:
        self.calls = 0
        self.started = asyncio.Event()
        self.add = asyncio.Event()
        self.added = asyncio.Event()
        self.go = asyncio.Event()
        self._tags = added
        self._skip = skip

    async def __call__(self) -> list[int]:
        self.calls += 1
        number = self.calls
        self.started.set()
        await self.add.wait()
        current_entry().tags.update(self._tags)
        if self._skip and number == 1:
            current_entry().skip()
        self.added.set()
        await self.go.wait()
        return [number]


async def is_answered(cache: Cache, key: str, value: object) -> bool:
    return bool(await cache.get(key, MISSING) == value)


@pytest.mark.parametrize("who", ["own", "foreign"])
async def test_a_static_tag_invalidated_during_the_load(backend: Backend, cache: Cache, other: Cache, who: str) -> None:
    load = Load()
    load.add.set()
    first = [asyncio.ensure_future(cache.get_or_load("k", load, tags=["t"])) for _ in range(3)]
    await load.started.wait()
    await (cache if who == "own" else other).invalidate("t")
    newcomers: list[asyncio.Future[list[int]]] = []

    async def has_begun_anew() -> bool:
        newcomers.append(asyncio.ensure_future(cache.get_or_load("k", load, tags=["t"])))
        await asyncio.sleep(0.01)
        return load.calls == 2

    if who == "own":
        newcomers.append(asyncio.ensure_future(cache.get_or_load("k", load, tags=["t"])))
        await poll(lambda: load.calls == 2)
    else:
        await poll(has_begun_anew)
        if not backend.is_told_later:
            assert load.calls == 2
    load.go.set()
    assert await asyncio.gather(*first) == [[1]] * 3
    assert await newcomers[-1] == [2]
    await asyncio.gather(*newcomers)
    for each in (cache, other):
        assert await each.get("k", MISSING) in ([2], MISSING)


@pytest.mark.parametrize("who", ["own", "foreign"])
@pytest.mark.parametrize("tags", [(), ("t",)])
async def test_what_a_load_stored_that_was_invalidated_is_a_miss(
    cache: Cache, other: Cache, who: str, tags: tuple[str, ...]
) -> None:
    load = Load("t")
    load.add.set()
    first = asyncio.ensure_future(cache.get_or_load("k", load, tags=tags))
    await load.added.wait()
    await (cache if who == "own" else other).invalidate("t")
    load.go.set()
    assert await first == [1]
    for each in (cache, other):
        await poll(lambda each=each: is_answered(each, "k", MISSING))
    for _ in range(5):
        assert await other.get("k", MISSING) is MISSING


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("who", ["own", "foreign"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_tag_that_is_added_and_invalidated(
    cache: Cache, other: Cache, when: str, who: str, *, skip: bool
) -> None:
    load = Load("t", skip=skip)
    first = asyncio.ensure_future(cache.get_or_load("k", load))
    await load.started.wait()
    if when == "after":
        load.add.set()
        await load.added.wait()
    await (cache if who == "own" else other).invalidate("t")
    newcomer = asyncio.ensure_future(cache.get_or_load("k", load))
    await asyncio.sleep(0)
    load.add.set()
    load.go.set()
    assert await first == [1]
    assert await newcomer == [2]
    for each in (cache, other):
        await poll(lambda each=each: is_answered(each, "k", [2]))


async def test_another_tags_invalidation_costs_a_load_that_adds_tags_its_place_at_most(cache: Cache) -> None:
    added, plain = Load("t"), Load()
    loads = [asyncio.ensure_future(cache.get_or_load(key, load)) for key, load in (("a", added), ("p", plain))]
    for load in (added, plain):
        await load.started.wait()
        load.add.set()
        load.go.set()
    await cache.invalidate("u")
    assert await asyncio.gather(*loads) == [[1], [1]]
    assert await cache.get("p") == [1]
    assert await cache.get_or_load("a", added) in ([1], [2])
    assert await cache.get("a") in ([1], [2])


async def test_a_mark_that_goes_during_the_load_costs_the_result(cache: Cache) -> None:
    for digest, tags, added in ((tag_digest("t"), ("t",), ()), (ANY_DIGEST, (), ("t",))):
        load = Load(*added)
        first = asyncio.ensure_future(cache.get_or_load("k", load, tags=tags))
        await load.started.wait()
        await cache.store.delete_many([mark_key(cache._space.root, digest)])
        load.add.set()
        load.go.set()
        assert await first == [1]
        await poll(lambda: is_answered(cache, "k", MISSING))
        await cache.delete("k")
