"""``current_entry()``: what a loader may see and decide of the entry that it loads."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import FOREVER, MISSING, Cache, CurrentEntry, Policy, acached, current_entry
from tests.backends import NAMES, poll, stored
from tests.servers import Server, valkey_server
from tests.shifted import Boom, Shifted, Source, idle, shifted

STALE: dict[str, Any] = {"ttl": 60, "stale_ttl": 600}
NO_ENTRY = r"there is no current entry: current_entry\(\) is for functions while a cache loads by them"


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


async def span_of(cache: Cache, key: str = "k") -> tuple[float, float]:
    """Seconds fresh and seconds kept, from the entry's creation."""
    entry = await cache.get_entry(key)
    assert entry is not None
    return round(entry.fresh_until - entry.created, 6), round(entry.keep_until - entry.created, 6)


# ttl


@pytest.mark.parametrize(
    ("given", "fresh", "kept"),
    [(5, 5, 605), ("10m", 600, 1200), (FOREVER, math.inf, math.inf)],
)
async def test_a_loader_says_how_long_its_result_stays_fresh(
    world: Shifted, cache: Cache, given: Any, fresh: float, kept: float
) -> None:
    policy = Policy(**STALE)

    async def load() -> int:
        entry = current_entry()
        assert entry.ttl == 60
        entry.ttl = given
        assert entry.ttl == fresh
        return 1

    await cache.get_or_load("k", load, policy=policy)
    assert await span_of(cache) == (fresh, kept)
    assert policy == Policy(**STALE)
    await cache.get_or_load("other", Source(), policy=policy)
    assert await span_of(cache, "other") == (60, 660)  # it was for the one entry


async def test_it_wins_over_a_function_of_the_result(world: Shifted, cache: Cache) -> None:
    async def load() -> int:
        entry = current_entry()
        assert entry.ttl is None
        entry.ttl = 5
        return 1

    def unasked(result: object) -> float:
        raise AssertionError

    await cache.get_or_load("k", load, ttl=unasked)
    assert await span_of(cache) == (5, 5)


async def test_jitter_takes_at_most_half_of_it(world: Shifted, cache: Cache) -> None:
    cache._engine.draw = lambda: 1.0

    async def load() -> int:
        current_entry().ttl = 10
        return 1

    await cache.get_or_load("k", load, ttl=60, jitter=50)
    assert await span_of(cache) == (5, 5)


@pytest.mark.parametrize("given", [0, -1, "soon", math.nan, True])
async def test_a_ttl_that_is_none_is_refused_where_it_is_said(world: Shifted, cache: Cache, given: Any) -> None:
    async def load() -> int:
        with pytest.raises(ValueError, match="ttl must be"):
            current_entry().ttl = given
        return 1

    await cache.get_or_load("k", load, ttl=60)
    assert await span_of(cache) == (60, 60)


# tags, skip


async def test_a_loader_adds_tags(world: Shifted, cache: Cache) -> None:
    other = world.open()
    policy = Policy(tags=["static"])

    async def load() -> int:
        tags = current_entry().tags
        assert tags == {"static"}
        tags.add("added")
        tags.update(["updated"])
        assert current_entry().tags == {"static", "added", "updated"}
        return 1

    for tag in ("static", "added", "updated"):
        await cache.get_or_load("k", load, policy=policy)
        assert await other.get("k") == 1
        assert await other.invalidate(tag)
        await poll(lambda: _is_gone(cache))
    assert policy.tags == ("static",)


async def _is_gone(cache: Cache) -> bool:
    return await cache.get("k", MISSING) is MISSING


@pytest.mark.parametrize(("tag", "error"), [(42, TypeError), ("", ValueError), ("x" * 1025, ValueError)])
async def test_a_tag_that_is_none_is_refused_where_it_is_said(
    world: Shifted, cache: Cache, tag: Any, error: type[Exception]
) -> None:
    async def load() -> int:
        for add in (current_entry().tags.add, lambda tag: current_entry().tags.update(["good", tag])):
            with pytest.raises(error, match="a tag"):
                add(tag)
        return 1

    assert await cache.get_or_load("k", load) == 1
    assert await cache.get("k") == 1


async def test_a_loader_that_skips_is_not_stored(world: Shifted, cache: Cache) -> None:
    calls = 0

    async def load() -> int:
        nonlocal calls
        calls += 1
        current_entry().skip()
        return calls

    assert [await cache.get_or_load("k", load) for _ in range(2)] == [1, 2]
    await idle(cache)
    assert await stored(cache, "k") is None


async def test_a_failure_that_is_skipped_is_not_stored(world: Shifted, cache: Cache) -> None:
    async def load() -> int:
        current_entry().skip()
        raise Boom

    with pytest.raises(Boom):
        await cache.get_or_load("k", load, cache_errors={Boom: 60})
    await idle(cache)
    assert await stored(cache, "k") is None


async def test_skipping_leaves_what_is_stale(world: Shifted, cache: Cache) -> None:
    async def load() -> str:
        current_entry().skip()
        return "new"

    await cache.set("k", "old", policy=Policy(**STALE))
    world.advance(61)
    assert await cache.get_or_load("k", load, **STALE) == "new"
    await idle(cache)
    assert await cache.get_or_load("k", Source(Boom()), **STALE) == "old"


# Where there is one


def test_outside_of_loads_there_is_none() -> None:
    with pytest.raises(LookupError, match=NO_ENTRY):
        current_entry()


async def test_when_the_loader_has_ended_there_is_none(world: Shifted, cache: Cache) -> None:
    later = asyncio.Event()
    tasks: list[asyncio.Task[CurrentEntry]] = []

    async def load(*, fail: bool = False) -> int:
        async def outlive() -> CurrentEntry:
            assert current_entry() is not None  # while the loader runs, its tasks are part of it
            running.set()
            await later.wait()
            return current_entry()

        running = asyncio.Event()
        tasks.append(asyncio.create_task(outlive()))
        await running.wait()
        if fail:
            raise Boom
        return 1

    await cache.get_or_load("k", load)
    with pytest.raises(LookupError, match=NO_ENTRY):
        current_entry()
    with pytest.raises(Boom):
        await cache.get_or_load("other", lambda: load(fail=True))
    later.set()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, LookupError)


async def test_nested_loads_have_their_own(world: Shifted, cache: Cache) -> None:
    @acached(cache=cache, ttl=7, tags=["inner"])
    async def inner(n: int) -> int:
        entry = current_entry()
        assert (entry.ttl, entry.tags) == (7, {"inner"})
        entry.ttl = 8
        entry.tags.add("more")
        return n

    @acached(cache=cache, ttl=70, tags=["outer"])
    async def outer(n: int) -> int:
        current_entry().tags.add("before")
        assert await inner(n) == n
        assert await inner(n) == n
        entry = current_entry()
        assert (entry.ttl, entry.tags) == (70, {"outer", "before"})
        entry.ttl = 80
        return n

    await outer(1)
    assert await span_of(cache, inner.key(1)) == (8, 8)
    assert await span_of(cache, outer.key(1)) == (80, 80)
    await cache.invalidate("more")
    assert await inner.peek(1) is MISSING
    assert await outer.peek(1) == 1


async def test_loads_at_once_have_their_own(world: Shifted, cache: Cache) -> None:
    everybody = asyncio.Barrier(10)

    async def load(n: int) -> int:
        await everybody.wait()
        current_entry().ttl = n
        await everybody.wait()
        assert current_entry().ttl == n
        return n

    await asyncio.gather(*(cache.get_or_load(f"k{n}", lambda n=n: load(n)) for n in range(1, 11)))
    assert [await span_of(cache, f"k{n}") for n in range(1, 11)] == [(n, n) for n in range(1, 11)]


async def test_an_uncached_call_has_none(world: Shifted, cache: Cache) -> None:
    @acached(cache=cache)
    async def function() -> bool:
        try:
            current_entry()
        except LookupError:
            return False
        return True

    assert await function.bypass() is False
    assert await function() is True
