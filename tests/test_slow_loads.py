"""``soft_timeout``, ``timeout`` and refreshing in the background: what callers get while a load takes its time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import MISSING, Cache, FileCache, LoadTimeoutError, Policy, RedisCache, acached
from mcp_hub_cache._frame import Kind, peek
from tests.backends import NAMES, poll, stored, turns
from tests.servers import Server, valkey_server
from tests.shifted import Boom, Shifted, Source, beside_kind, idle, rests_everywhere, shifted

STALE: dict[str, Any] = {"ttl": 60, "stale_ttl": 600}
AT_ONCE = Policy(soft_timeout=0, **STALE)
SOON = Policy(soft_timeout=0.01, **STALE)


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture(params=NAMES)
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Shifted]:
    world = shifted(request, tmp_path)
    yield world
    await world.aclose()


@pytest.fixture
def cache(world: Shifted) -> Cache:
    return world.open()


async def make_stale(world: Shifted, cache: Cache, *keys: str) -> None:
    await cache.set_many({key: ["old"] for key in keys or ("k",)}, policy=AT_ONCE)
    world.advance(61)


# soft_timeout=0: stale-while-revalidate


async def test_what_is_stale_is_served_at_once_and_refreshed_once(world: Shifted, cache: Cache) -> None:
    source = Source(held=True)
    await make_stale(world, cache)
    values = await asyncio.gather(*(cache.get_or_load("k", source, policy=AT_ONCE) for _ in range(50)))
    assert values == [["old"]] * 50
    assert len({id(value) for value in values}) == 50
    assert (cache.stats.stale_hits, cache.stats.hits, cache.stats.misses) == (50, 0, 0)
    await source.started.wait()
    assert await cache.get_or_load("k", source, policy=AT_ONCE) == ["old"]
    source.go.set()
    await idle(cache)
    assert await cache.get_or_load("k", source, policy=AT_ONCE) == [1]
    assert await cache.get("k") == [1]
    assert (source.calls, cache.stats.loads, cache.stats.stale_hits) == (1, 1, 51)


async def test_a_function_serves_what_is_stale_at_once(world: Shifted, cache: Cache) -> None:
    source = Source()

    @acached(cache=cache, policy=AT_ONCE)
    async def function(n: int) -> list[int]:
        return await source()

    assert await function(1) == [1]
    assert await function(1) == [1]
    world.advance(61)
    assert await function(1) == [1]
    await idle(cache)
    assert await function(1) == [2]
    stats = function.stats()
    assert (stats.stale_hits, stats.hits, stats.misses, stats.loads) == (1, 2, 1, 2)


async def test_a_refresh_outlives_whoever_started_it(world: Shifted, cache: Cache) -> None:
    source = Source(held=True)
    await make_stale(world, cache)
    task = asyncio.create_task(cache.get_or_load("k", source, policy=AT_ONCE))
    assert await task == ["old"]
    patient = asyncio.create_task(cache.get_or_load("k", source))  # who takes nothing stale joins it, and leaves
    await source.started.wait()
    await poll(lambda: cache.stats.misses == 1)
    patient.cancel()
    await asyncio.gather(patient, return_exceptions=True)
    source.go.set()
    await idle(cache)
    assert source.cancelled == 0
    assert await cache.get("k") == [1]


async def test_one_process_refreshes_for_all(world: Shifted, cache: Cache) -> None:
    other, mine, theirs = world.open(), Source(held=True), Source()
    await make_stale(world, cache)
    assert await cache.get_or_load("k", mine, policy=AT_ONCE) == ["old"]
    await mine.started.wait()
    for _ in range(3):
        assert await other.get_or_load("k", theirs, policy=AT_ONCE) == ["old"]
        await idle(other)
    mine.go.set()
    await idle(cache)
    assert await beside_kind(cache, "k") is None  # the lease is given back
    assert await other.get_or_load("k", theirs, policy=AT_ONCE) == [1]
    assert theirs.calls == 0
    assert (other.stats.stale_hits, other.stats.hits) == (3, 1)


async def test_many_processes_at_once_are_one_call(world: Shifted, cache: Cache) -> None:
    caches = [cache, *(world.open() for _ in range(4))]
    source = Source(held=True)
    await make_stale(world, cache)
    values = await asyncio.gather(
        *(each.get_or_load("k", source, policy=AT_ONCE) for each in caches for _ in range(10))
    )
    assert values == [["old"]] * 50
    await source.started.wait()
    await idle(*(each for each in caches if each._engine.session().placeholders._held == {}))
    source.go.set()
    await idle(*caches)
    assert source.calls == 1
    assert await asyncio.gather(*(each.get("k") for each in caches)) == [[1]] * 5


async def test_there_are_no_more_refreshes_than_the_cap(world: Shifted) -> None:
    cache = world.open(max_refreshes=2)
    keys = [f"k{n}" for n in range(5)]
    sources = {key: Source(held=True) for key in keys}
    await make_stale(world, cache, *keys)
    for _ in range(3):
        for key in keys:
            assert await cache.get_or_load(key, sources[key], policy=AT_ONCE) == ["old"]
        await poll(lambda: sum(source.started.is_set() for source in sources.values()) == 2)
    assert [sources[key].calls for key in keys] == [1, 1, 0, 0, 0]
    for source in sources.values():
        source.go.set()
    await idle(cache)
    for key in keys[2:4]:
        assert await cache.get_or_load(key, sources[key], policy=AT_ONCE) == ["old"]
    await idle(cache)
    assert [sources[key].calls for key in keys] == [1, 1, 1, 1, 0]
    assert await cache.get_many(keys) == {key: [1] for key in keys[:4]}


async def test_a_cap_of_0_means_served_and_not_refreshed(world: Shifted) -> None:
    cache, source = world.open(max_refreshes=0), Source()
    await make_stale(world, cache)
    assert await cache.get_or_load("k", source, policy=AT_ONCE) == ["old"]
    await idle(cache)
    assert source.calls == 0


async def test_a_refresh_that_fails_is_said_once_without_content_and_rests(
    world: Shifted, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(Boom("hunter2"))
    await make_stale(world, cache)
    with caplog.at_level(logging.WARNING, "mcp_hub_cache"):
        for turn in range(3):
            for _ in range(5):
                assert await cache.get_or_load("k", source, policy=AT_ONCE) == ["old"]
                await idle(cache)
            assert source.calls == turn + 1
            world.advance(30.1)
    (record,) = caplog.records
    assert "in the background failed (Boom)" in record.getMessage()
    assert "hunter2" not in caplog.text
    assert record.exc_info is None
    source.error = None
    assert await cache.get_or_load("k", source, policy=AT_ONCE) == ["old"]
    await idle(cache)
    assert await cache.get("k") == [4]


async def test_a_delete_during_a_refresh_wins(world: Shifted, cache: Cache) -> None:
    for changer in (cache, world.open()):
        source = Source(held=True)
        await make_stale(world, cache)
        assert await cache.get_or_load("k", source, policy=AT_ONCE) == ["old"]
        await source.started.wait()
        await changer.delete("k")
        source.go.set()
        await idle(cache)
        assert await cache.get("k", MISSING) is MISSING
        assert await stored(cache, "k") is None


async def test_closing_ends_refreshes(world: Shifted, cache: Cache) -> None:
    before = asyncio.all_tasks()
    source = Source(held=True)
    await make_stale(world, cache)
    assert await cache.get_or_load("k", source, policy=AT_ONCE) == ["old"]
    await source.started.wait()
    await cache.aclose()
    assert source.cancelled == 1
    assert asyncio.all_tasks() <= before


# soft_timeout: wait so long


async def test_after_the_soft_timeout_what_is_stale_is_served_and_the_load_goes_on(
    world: Shifted, cache: Cache
) -> None:
    source = Source(held=True)
    await make_stale(world, cache)
    first = asyncio.create_task(cache.get_or_load("k", source, policy=SOON))
    await source.started.wait()
    second = asyncio.create_task(cache.get_or_load("k", source, policy=SOON))
    third = asyncio.create_task(cache.get_or_load("k", source, policy=AT_ONCE))
    values = await asyncio.gather(first, second, third)
    assert values == [["old"]] * 3
    assert len({id(value) for value in values}) == 3
    assert (cache.stats.stale_hits, cache.stats.hits) == (3, 0)
    source.go.set()
    await idle(cache)
    assert (source.calls, source.cancelled) == (1, 0)
    assert await cache.get("k") == [1]


async def test_a_load_in_time_is_waited_for(world: Shifted, cache: Cache) -> None:
    source = Source()
    await make_stale(world, cache)
    assert await cache.get_or_load("k", source, soft_timeout=100, **STALE) == [1]
    assert (cache.stats.stale_hits, cache.stats.hits, cache.stats.misses) == (0, 0, 1)


async def test_where_nothing_is_stale_the_soft_timeout_means_nothing(world: Shifted, cache: Cache) -> None:
    source = Source(held=True)
    task = asyncio.create_task(cache.get_or_load("k", source, policy=SOON))
    await source.started.wait()
    await asyncio.sleep(0.03)
    assert not task.done()
    source.go.set()
    assert await task == [1]


async def test_a_load_that_fails_after_the_soft_timeout_rests(world: Shifted, cache: Cache) -> None:
    source = Source(Boom(), held=True)
    await make_stale(world, cache)
    assert await cache.get_or_load("k", source, policy=SOON) == ["old"]
    source.go.set()
    await idle(cache)
    assert await cache.get_or_load("k", source, policy=SOON) == ["old"]
    assert source.calls == 1


async def test_who_is_cancelled_before_the_soft_timeout_takes_the_load_with_him(world: Shifted, cache: Cache) -> None:
    source = Source(held=True)
    await make_stale(world, cache)
    task = asyncio.create_task(cache.get_or_load("k", source, soft_timeout=100, **STALE))
    await source.started.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await poll(lambda: source.cancelled == 1)
    source.go.set()
    assert await cache.get_or_load("k", source, soft_timeout=100, **STALE) == [2]  # it did not fail: nothing rests


@pytest.mark.parametrize("change", ["delete", "set", "invalidate", "clear"])
async def test_who_makes_a_change_reads_nothing_older_whoever_refreshes_meanwhile(
    change: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Others keep asking for what is stale all the time, in the same process; loads take their time."""
    policy = Policy(ttl=0.005, stale_ttl=60, soft_timeout=0.001, tags=("t",))
    for cache in (RedisCache(request.getfixturevalue("valkey").url, timeout=30), FileCache(tmp_path, timeout=30)):
        version, going = 0, True

        async def load() -> int:
            read = version  # noqa: B023  # as it is when it is called
            await asyncio.sleep(0.002)
            return read

        async def agent(cache: Cache = cache) -> None:
            while going:  # noqa: B023
                await cache.get_or_load("k", load, policy=policy)
                await asyncio.sleep(0.0007)

        async with cache:
            agents = [asyncio.create_task(agent()) for _ in range(6)]
            for _ in range(100):
                await asyncio.sleep(0.008)  # it goes stale, and is refreshed
                version += 1
                match change:
                    case "delete":
                        await cache.delete("k")
                    case "set":
                        await cache.set("k", version, ttl=0.004, tags=["t"])
                    case "invalidate":
                        assert await cache.invalidate("t")
                    case _:
                        await cache.clear()
                assert await cache.get_or_load("k", load, policy=policy) == version
            going = False
            await asyncio.gather(*agents)


# timeout


async def test_a_load_that_takes_too_long_is_cancelled_and_all_are_told(world: Shifted, cache: Cache) -> None:
    source = Source(held=True)
    tasks = [asyncio.create_task(cache.get_or_load("k", source, timeout=0.05, label="slow")) for _ in range(10)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, LoadTimeoutError) for result in results)
    assert "loading slow took more than 0.05 s, which is its timeout. Raise that" in str(results[0])
    assert isinstance(results[0], TimeoutError)
    await idle(cache)
    assert source.cancelled == source.calls >= 1  # a busy machine may have brought some of them late
    assert await stored(cache, "k") is None
    source.go.set()
    calls = source.calls
    assert await cache.get_or_load("k", source, timeout=50) == [calls + 1]
    assert await cache.get("k") == [calls + 1]


async def test_a_loader_in_time_is_left_alone(world: Shifted, cache: Cache) -> None:
    source = Source()
    assert await cache.get_or_load("k", source, timeout=50) == [1]
    assert await cache.get("k") == [1]


@pytest.mark.parametrize("stale", [False, True])
async def test_a_loader_that_is_deaf_to_its_timeout(world: Shifted, cache: Cache, *, stale: bool) -> None:
    told, end = asyncio.Event(), asyncio.Event()

    async def deaf() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.set()
            await end.wait()
        return "too late"

    if stale:
        await make_stale(world, cache)
        assert await cache.get_or_load("k", deaf, timeout=0.02, **STALE) == ["old"]
        await told.wait()
        source = Source()
        assert await cache.get_or_load("k", source, **STALE) == ["old"]
        assert source.calls == 0  # it rests from the timeout on
        world.advance(30.1)
    else:
        with pytest.raises(LoadTimeoutError):
            await cache.get_or_load("k", deaf, timeout=0.02)
        await told.wait()
    assert await cache.get_or_load("k", Source(), **STALE) == [1]
    end.set()
    await idle(cache)
    assert await cache.get("k") == [1]


async def test_what_is_stale_stands_in_for_a_load_that_takes_too_long(world: Shifted, cache: Cache) -> None:
    other, source = world.open(), Source(held=True)
    await make_stale(world, cache)
    values = await asyncio.gather(*(cache.get_or_load("k", source, timeout=0.05, **STALE) for _ in range(5)))
    assert values == [["old"]] * 5
    assert (source.calls, cache.stats.stale_hits) == (1, 5)
    await rests_everywhere(cache, "k")
    assert source.cancelled == 1
    assert await other.get_or_load("k", source, **STALE) == ["old"]
    assert source.calls == 1


async def test_a_refresh_in_the_background_has_the_timeout_too(
    world: Shifted, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(held=True)
    await make_stale(world, cache)
    assert await cache.get_or_load("k", source, policy=AT_ONCE, timeout=0.02) == ["old"]
    await idle(cache)
    assert source.cancelled == 1
    assert "LoadTimeoutError" in caplog.text


async def test_an_error_that_the_loader_makes_of_its_timeout_is_no_answer(world: Shifted, cache: Cache) -> None:
    async def load() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise Boom from None

    with pytest.raises(LoadTimeoutError):
        await cache.get_or_load("k", load, timeout=0.02, cache_errors={Boom: 60})
    await idle(cache)
    assert await stored(cache, "k") is None


async def test_a_placeholder_is_held_while_a_refresh_goes_on(world: Shifted, cache: Cache) -> None:
    source = Source(held=True)
    await make_stale(world, cache)
    assert await cache.get_or_load("k", source, policy=AT_ONCE) == ["old"]
    await source.started.wait()
    await turns()
    frame = await stored(cache, "k")
    head = None if frame is None else peek(frame)
    assert head is not None and head.kind == Kind.ENTRY  # what stands in stays where it is
    assert await beside_kind(cache, "k") == Kind.PLACEHOLDER
