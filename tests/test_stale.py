"""Stale entries: who never sees them, when they stand in, and how long the next try rests after a failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import MISSING, Cache, Policy, acached
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock, FaultyStore
from tests.backends import NAMES, poll, stored
from tests.servers import Server, valkey_server
from tests.shifted import Boom, Shifted, Source, idle, rests_everywhere, shifted

STALE: dict[str, Any] = {"ttl": 60, "stale_ttl": 600}


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


async def make_stale(world: Shifted, cache: Cache, value: object = "old", key: str = "k") -> None:
    await cache.set(key, value, policy=Policy(**STALE))
    world.advance(61)


# Who never sees them


async def test_nothing_that_reads_speaks_of_what_is_stale(world: Shifted, cache: Cache) -> None:
    await cache.set("fresh", 1, ttl=3600, tags=["tag"])
    await cache.set_many({"k": "old", "tagged": "old"}, policy=Policy(**STALE), tags=["tag"])
    await make_stale(world, cache)
    for key in ("k", "tagged"):
        assert await stored(cache, key) is not None
        assert await cache.get(key, MISSING) is MISSING
        assert await cache.get_entry(key) is None
        assert await cache.exists(key) is False
        assert await cache.ttl(key) is None
        assert await cache.touch(key, 600) is False
        assert await cache.get(key, MISSING) is MISSING
    assert await cache.get_many(["k", "fresh", "tagged"]) == {"fresh": 1}
    assert [key async for key in cache.keys()] == ["fresh"]  # noqa: SIM118  # no dict
    assert (await cache.status()).total_keys == 1
    assert await cache.delete("k") is False
    assert await stored(cache, "k") is None
    assert await cache.delete_many(["tagged", "fresh"]) == 1
    assert cache.stats.stale_hits == 0


async def test_add_takes_the_place_of_what_is_stale(world: Shifted, cache: Cache) -> None:
    await make_stale(world, cache)
    assert await cache.add("k", "new") is True
    assert await cache.get("k") == "new"


async def test_peek_does_not_see_them(world: Shifted, cache: Cache) -> None:
    @acached(cache=cache, **STALE)
    async def function(n: int) -> int:
        return n

    await function(1)
    assert await function.peek(1) == 1
    world.advance(61)
    assert await function.peek(1) is MISSING


# Fail-safe


async def test_what_is_stale_stands_in_for_a_load_that_fails(world: Shifted, cache: Cache) -> None:
    source = Source(Boom())
    await make_stale(world, cache)
    assert await cache.get_or_load("k", source, **STALE) == "old"
    stats = cache.stats
    assert (source.calls, stats.stale_hits, stats.hits, stats.load_errors) == (1, 1, 0, 1)
    assert await cache.get("k", MISSING) is MISSING


@pytest.mark.parametrize(
    ("policy", "later"),
    [({}, 0), ({"stale_ttl": 0}, 0), ({"stale_ttl": 10}, 10), ({"stale_ttl": 6000}, 600)],
    ids=["no stale_ttl", "0", "less than it was stored with", "more than it was stored with"],
)
async def test_both_must_allow_it(world: Shifted, cache: Cache, policy: dict[str, Any], later: float) -> None:
    source = Source(Boom())
    await make_stale(world, cache)
    world.advance(later)
    with pytest.raises(Boom) as caught:
        await cache.get_or_load("k", source, **policy)
    assert caught.value is source.error
    assert cache.stats.stale_hits == 0


async def test_a_good_load_takes_its_place(world: Shifted, cache: Cache) -> None:
    await make_stale(world, cache)
    assert await cache.get_or_load("k", Source(), **STALE) == [1]
    assert await cache.get("k") == [1]
    assert (cache.stats.stale_hits, cache.stats.loads) == (0, 1)
    world.advance(61)
    assert await cache.get_or_load("k", Source(Boom()), **STALE) == [1]


async def test_each_caller_has_a_copy_of_its_own(world: Shifted, cache: Cache) -> None:
    source = Source(Boom(), held=True)
    await make_stale(world, cache, ["old"])
    tasks = [asyncio.create_task(cache.get_or_load("k", source, **STALE)) for _ in range(20)]
    await source.started.wait()
    late = [asyncio.create_task(cache.get_or_load("k", source, **STALE)) for _ in range(20)]
    for _ in range(5):
        await asyncio.sleep(0)
    source.go.set()
    values = await asyncio.gather(*tasks, *late)
    assert values == [["old"]] * 40
    assert len({id(value) for value in values}) == 40
    values[0].append("mine")
    assert await cache.get_or_load("k", source, **STALE) == ["old"]
    assert source.calls == 1
    assert (cache.stats.stale_hits, cache.stats.hits) == (41, 0)


async def test_a_refresh_lets_nothing_stand_in(world: Shifted, cache: Cache) -> None:
    source = Source(Boom())
    await make_stale(world, cache)
    with pytest.raises(Boom):
        await cache.get_or_load("k", source, refresh=True, **STALE)
    assert cache.stats.stale_hits == 0


async def test_callers_who_take_nothing_stale_get_the_error_of_a_shared_load(world: Shifted, cache: Cache) -> None:
    source = Source(Boom(), held=True)
    await make_stale(world, cache)
    safe = asyncio.create_task(cache.get_or_load("k", source, **STALE))
    await source.started.wait()
    strict = asyncio.create_task(cache.get_or_load("k", source))
    await poll(lambda: cache.stats.misses == 1)  # the strict one's; the other's is none yet
    source.go.set()
    assert await safe == "old"
    with pytest.raises(Boom):
        await strict
    assert source.calls == 1


# The throttle


async def test_after_a_failure_the_next_try_rests(world: Shifted, cache: Cache) -> None:
    source = Source(Boom())
    await make_stale(world, cache)
    for _ in range(5):
        assert await cache.get_or_load("k", source, throttle=20, **STALE) == "old"
    assert source.calls == 1
    world.advance(19.9)
    assert await cache.get_or_load("k", source, throttle=20, **STALE) == "old"
    assert source.calls == 1
    await idle(cache)
    world.advance(0.2)
    source.error = None
    assert await cache.get_or_load("k", source, throttle=20, **STALE) == [2]
    assert cache.stats.stale_hits == 6


async def test_a_throttle_of_0_tries_each_time(world: Shifted, cache: Cache) -> None:
    source = Source(Boom())
    await make_stale(world, cache)
    for _ in range(3):
        assert await cache.get_or_load("k", source, throttle=0, **STALE) == "old"
    assert source.calls == 3


async def test_the_next_try_rests_in_other_processes_too(world: Shifted, cache: Cache) -> None:
    other, source, theirs = world.open(), Source(Boom()), Source()
    await make_stale(world, cache)
    assert await cache.get_or_load("k", source, throttle=20, **STALE) == "old"
    await rests_everywhere(cache, "k")
    for _ in range(3):
        assert await other.get_or_load("k", theirs, **STALE) == "old"
    assert theirs.calls == 0
    assert (other.stats.stale_hits, other.stats.hits) == (3, 0)
    world.advance(20.1)
    assert await other.get_or_load("k", theirs, **STALE) == [1]


async def test_who_takes_nothing_stale_does_not_rest(world: Shifted, cache: Cache) -> None:
    other, source, theirs = world.open(), Source(Boom()), Source()
    await make_stale(world, cache)
    assert await cache.get_or_load("k", source, **STALE) == "old"
    await rests_everywhere(cache, "k")
    assert await other.get_or_load("k", theirs) == [1]
    assert await cache.get("k") == [1]


@pytest.mark.parametrize("who", ["this process", "another"])
@pytest.mark.parametrize("how", ["set", "delete", "refresh"])
async def test_what_takes_the_place_of_an_entry_ends_its_rest(world: Shifted, cache: Cache, how: str, who: str) -> None:
    changer = cache if who == "this process" else world.open()
    source, again = Source(Boom()), Source()
    await make_stale(world, cache)
    assert await cache.get_or_load("k", source, throttle=10_000, **STALE) == "old"
    await rests_everywhere(cache, "k")
    if how == "refresh":
        assert await changer.get_or_load("k", Source(), refresh=True, **STALE) == [1]
    elif how == "delete":
        await changer.delete("k")
        await changer.get_or_load("k", Source(), **STALE)
    else:
        await changer.set("k", "set", policy=Policy(**STALE))
    world.advance(61)
    assert await cache.get_or_load("k", again, **STALE) == [1]
    assert again.calls == 1


async def test_a_refresh_does_not_rest(world: Shifted, cache: Cache) -> None:
    other, source, again = world.open(), Source(Boom()), Source(Boom())
    await make_stale(world, cache)
    assert await cache.get_or_load("k", source, **STALE) == "old"
    await rests_everywhere(cache, "k")
    for each in (cache, other):
        with pytest.raises(Boom):
            await each.get_or_load("k", again, refresh=True, **STALE)
    assert again.calls == 2


async def test_one_of_two_processes_tries_after_the_rest_of_another_entry(world: Shifted, cache: Cache) -> None:
    """What is left of an older entry's rest is no lease, and keeps nobody from taking one."""
    other, mine, theirs = world.open(), Source(held=True), Source()
    await make_stale(world, cache)
    assert await cache.get_or_load("k", Source(Boom()), throttle=10_000, **STALE) == "old"
    await rests_everywhere(cache, "k")
    await make_stale(world, cache, "newer")
    assert await cache.get_or_load("k", mine, soft_timeout=0, **STALE) == "newer"
    await mine.started.wait()
    assert await other.get_or_load("k", theirs, soft_timeout=0, **STALE) == "newer"
    await idle(other)
    assert theirs.calls == 0
    mine.go.set()
    await idle(cache)
    assert await other.get("k") == [1]


# Where the store can't be asked


@pytest.fixture
async def doubtful() -> AsyncIterator[tuple[FakeClock, FaultyStore, Cache]]:
    clock = FakeClock()
    store = FaultyStore(MemoryStore(clock=clock))
    async with Cache(store) as cache:
        yield clock, store, cache


async def test_what_l1_can_not_vouch_for_stands_in(doubtful: tuple[FakeClock, FaultyStore, Cache]) -> None:
    clock, store, cache = doubtful
    source = Source(Boom())
    await cache.set("k", ["old"])
    assert await cache.get("k") == ["old"]
    store.break_down()
    store.distrust()
    assert await cache.get("k") is None
    first = await cache.get_or_load("k", source, **STALE)
    second = await cache.get_or_load("k", source, **STALE)
    assert first == second == ["old"]
    assert first is not second
    assert (source.calls, cache.stats.stale_hits) == (1, 2)
    with pytest.raises(Boom):
        await cache.get_or_load("k", source)
    clock.advance(3601)  # it says no more than it was trusted to say
    with pytest.raises(Boom):
        await cache.get_or_load("k", source, **STALE)


async def test_what_is_known_to_have_changed_does_not_stand_in(doubtful: tuple[FakeClock, FaultyStore, Cache]) -> None:
    _, store, cache = doubtful
    await cache.set("k", "old")
    assert await cache.get("k") == "old"
    async with Cache(store._store) as other:
        await other.delete("k")
        store.break_down()
        store.distrust()
        with pytest.raises(Boom):
            await cache.get_or_load("k", Source(Boom()), **STALE)


async def test_where_the_store_is_down_what_l1_has_is_served_at_once(
    doubtful: tuple[FakeClock, FaultyStore, Cache],
) -> None:
    _, store, cache = doubtful
    source = Source()
    await cache.set("k", "old")
    assert await cache.get("k") == "old"
    store.break_down()
    store.distrust()
    assert await cache.get_or_load("k", source, soft_timeout=0, **STALE) == "old"
    await idle(cache)
    assert source.calls == 1
    store.repair()
    assert await cache.get("k") == "old"
