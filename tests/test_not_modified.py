"""``current_entry()``: what a loader sees of the entry that is there, and how it says that it is still good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import MISSING, Cache, Policy, current_entry
from mcp_hub_cache._frame import unpack
from tests.backends import NAMES, stored
from tests.servers import Server, valkey_server
from tests.shifted import Boom, Shifted, idle, shifted

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


async def test_stale_value_is_a_copy_of_what_is_there(world: Shifted, cache: Cache) -> None:
    seen: list[Any] = []

    async def load() -> list[str]:
        entry = current_entry()
        seen.extend([entry.stale_value, entry.stale_value])
        if seen[0] is not MISSING:
            seen[0].append("mine")
        raise Boom

    with pytest.raises(Boom):
        await cache.get_or_load("k", load, **STALE)
    assert seen == [MISSING, MISSING]
    await cache.set("k", ["old"], policy=Policy(**STALE))
    with pytest.raises(Boom):  # fresh, and to be loaded anew
        await cache.get_or_load("k", load, refresh=True)
    assert seen[2:] == [["old"], ["old"]]
    world.advance(61)
    del seen[:]
    assert await cache.get_or_load("k", load, throttle=0, **STALE) == ["old"]
    assert seen == [["old", "mine"], ["old"]]
    del seen[:]
    with pytest.raises(Boom):  # who would not take it does not see it
        await cache.get_or_load("k", load)
    assert seen == [MISSING, MISSING]


async def test_a_cached_failure_is_no_stale_value(world: Shifted, cache: Cache) -> None:
    async def load() -> int:
        assert current_entry().stale_value is MISSING
        raise Boom

    for _ in range(2):
        with pytest.raises(Boom):
            await cache.get_or_load("k", load, refresh=True, cache_errors={Boom: 60})


async def test_not_modified_needs_something(world: Shifted, cache: Cache) -> None:
    async def load() -> object:
        with pytest.raises(LookupError, match="nothing is stored that could be unmodified: ask unconditionally"):
            current_entry().not_modified()
        return 1

    assert await cache.get_or_load("k", load, **STALE) == 1


async def unmodified() -> Any:
    return current_entry().not_modified()


async def test_not_modified_patches_the_head_alone(world: Shifted, cache: Cache) -> None:
    other = world.open()
    await cache.set("k", ["old"], policy=Policy(**STALE), tags=["tag"])
    assert await other.get("k") == ["old"]
    before = await stored(cache, "k")
    assert before is not None
    world.advance(61)
    writes = count_writes(cache)
    assert await cache.get_or_load("k", unmodified, ttl=100, stale_ttl=600) == ["old"]
    assert writes == []
    after = await stored(cache, "k")
    assert after is not None
    key = cache._key("k")
    old, new = unpack(before, key), unpack(after, key)
    assert bytes(new.payload) == bytes(old.payload)
    assert new.marks == old.marks
    assert (new.head.token, new.head.created) == (old.head.token, old.head.created)
    assert new.head.fresh_until - cache.store.now() == pytest.approx(100, abs=20)
    assert new.head.keep_until - new.head.fresh_until == pytest.approx(600)
    for each in (cache, other, cache, other):
        assert await each.get("k") == ["old"]
        assert await each.ttl("k") == pytest.approx(100, abs=20)
    world.advance(50)
    assert await other.get("k") == ["old"]
    assert await cache.invalidate("tag")
    assert await cache.get("k") is None


def count_writes(cache: Cache) -> list[Any]:
    """Entries that *cache* writes from now on, other than by patching."""
    made: list[Any] = []
    put = cache._writes.put

    def counted(session: Any, write: Any) -> Any:
        made.append(write)
        return put(session, write)

    cache._writes.put = counted  # type: ignore[method-assign]
    return made


async def test_not_modified_of_what_is_still_fresh(world: Shifted, cache: Cache) -> None:
    await cache.set("k", "old", ttl=60)
    world.advance(30)
    assert await cache.get_or_load("k", unmodified, ttl=60, refresh=True) == "old"
    world.advance(40)
    assert await cache.get("k") == "old"


async def test_not_modified_keeps_what_the_first_load_cost(world: Shifted, cache: Cache) -> None:
    async def load() -> int:
        await asyncio.sleep(0.02)
        return 1

    await cache.get_or_load("k", load, **STALE)
    first = await cache.get_entry("k")
    world.advance(61)
    await cache.get_or_load("k", unmodified, **STALE)
    second = await cache.get_entry("k")
    assert first is not None and second is not None
    assert first.load_cost == second.load_cost > 0.01


async def test_not_modified_with_a_ttl_of_its_own(world: Shifted, cache: Cache) -> None:
    async def load() -> Any:
        current_entry().ttl = 5
        return current_entry().not_modified()

    await cache.set("k", "old", policy=Policy(**STALE))
    world.advance(61)
    assert await cache.get_or_load("k", load, **STALE) == "old"
    assert await cache.get("k") == "old"
    world.advance(6)
    assert await cache.get("k") is None


async def test_not_modified_with_tags_added(world: Shifted, cache: Cache) -> None:
    async def load() -> Any:
        current_entry().tags.add("added")
        return current_entry().not_modified()

    for tag in ("added", "before"):
        await cache.set("k", ["old"], policy=Policy(**STALE), tags=["before"])
        world.advance(61)
        assert await cache.get_or_load("k", load, tags=["before"], **STALE) == ["old"]
        assert await cache.get("k") == ["old"]
        assert await cache.invalidate(tag)
        assert await cache.get("k") is None


@pytest.mark.parametrize("how", ["delete", "set", "clear", "invalidate"])
async def test_a_change_during_the_load_wins_over_not_modified(world: Shifted, cache: Cache, how: str) -> None:
    for changer in (cache, world.open()):
        started, go = asyncio.Event(), asyncio.Event()

        async def load(started: asyncio.Event = started, go: asyncio.Event = go) -> Any:
            started.set()
            await go.wait()
            return current_entry().not_modified()

        await cache.set("k", "old", policy=Policy(**STALE), tags=["tag"])
        world.advance(61)
        task = asyncio.create_task(cache.get_or_load("k", load, tags=["tag"], **STALE))
        await started.wait()
        arguments = {"set": ("k", "set"), "delete": ("k",), "clear": (), "invalidate": ("tag",)}[how]
        await getattr(changer, how)(*arguments)
        go.set()
        assert await task == "old"
        await idle(cache)
        assert await world.open().get("k", MISSING) == ("set" if how == "set" else MISSING)


async def test_another_value_after_not_modified_is_stored(world: Shifted, cache: Cache) -> None:
    async def load() -> list[str]:
        current_entry().not_modified()
        return ["changed my mind"]

    await cache.set("k", ["old"], policy=Policy(**STALE))
    world.advance(61)
    assert await cache.get_or_load("k", load, **STALE) == ["changed my mind"]
    assert await cache.get("k") == ["changed my mind"]


async def test_a_refresh_in_the_background_may_find_it_not_modified(world: Shifted, cache: Cache) -> None:
    await cache.set("k", "old", policy=Policy(**STALE))
    world.advance(61)
    assert await cache.get_or_load("k", unmodified, soft_timeout=0, **STALE) == "old"
    await idle(cache)
    assert await cache.get("k") == "old"
