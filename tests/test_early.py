"""How long entries live by their policy: refreshed ahead, jittered, by a function of the result, or not stored."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import FOREVER, MISSING, Cache, Policy, acached
from mcp_hub_cache.testing import FakeClock
from tests.backends import NAMES, poll, stored
from tests.servers import Server, valkey_server
from tests.shifted import Boom, Shifted, Source, idle, shifted

COST = 2.0
EARLY: dict[str, Any] = {"ttl": 60, "early": 1}
TEN_AHEAD = math.exp(-5)  # the draw that refreshes an entry of that cost ten seconds ahead


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


class Costly(Source):
    """A loader that takes so many seconds by the clock that measures loads."""

    def __init__(self, clock: FakeClock, **options: Any) -> None:
        super().__init__(**options)
        self._watch = clock

    async def __call__(self) -> list[int]:
        self._watch.advance(COST)
        return await super().__call__()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("mcp_hub_cache._leader.monotonic", clock)
    return clock


def draws(cache: Cache, drawn: float) -> list[float]:
    """Let *cache* draw this, whatever for; the list grows with each draw."""
    made: list[float] = []

    def draw() -> float:
        made.append(drawn)
        return drawn

    cache._engine.draw = draw
    return made


# early


async def test_an_entry_is_refreshed_at_the_drawn_time(world: Shifted, cache: Cache, watch: FakeClock) -> None:
    source = Costly(watch)
    draws(cache, TEN_AHEAD)
    assert await cache.get_or_load("k", source, **EARLY) == [1]
    entry = await cache.get_entry("k")
    assert entry is not None and entry.load_cost == COST
    for step in (0, 48):
        world.advance(step)
        for _ in range(3):
            assert await cache.get_or_load("k", source, **EARLY) == [1]
            await idle(cache)
    assert source.calls == 1
    world.advance(3)
    assert await cache.get_or_load("k", source, **EARLY) == [1]
    await idle(cache)
    assert source.calls == 2
    assert await cache.get_or_load("k", source, **EARLY) == [2]
    assert source.calls == 2
    assert await cache.ttl("k") == pytest.approx(60, abs=10)
    assert cache.stats.misses == 1
    assert cache.stats.stale_hits == 0


async def test_nothing_is_refreshed_ahead_unless_it_is_asked_for(
    world: Shifted, cache: Cache, watch: FakeClock
) -> None:
    source = Costly(watch)
    draws(cache, 2.0**-53)
    await cache.get_or_load("k", source, ttl=60)
    world.advance(59)
    assert await cache.get_or_load("k", source, ttl=60) == [1]
    assert await cache.get("k") == [1]
    await idle(cache)
    assert source.calls == 1


async def test_a_set_value_costs_nothing_and_is_not_refreshed_ahead(world: Shifted, cache: Cache) -> None:
    source = Source()
    draws(cache, 2.0**-53)
    await cache.set("k", "set", ttl=60)
    world.advance(59)
    assert await cache.get_or_load("k", source, ttl=60, early=100) == "set"
    await idle(cache)
    assert source.calls == 0


async def test_nobody_waits_for_a_refresh_ahead(world: Shifted, cache: Cache, watch: FakeClock) -> None:
    source = Costly(watch)
    draws(cache, TEN_AHEAD)
    await cache.get_or_load("k", source, **EARLY)
    world.advance(51)
    source.go.clear()
    source.started.clear()
    for _ in range(3):
        values = await asyncio.gather(*(cache.get_or_load("k", source, **EARLY) for _ in range(20)))
        assert values == [[1]] * 20
        await source.started.wait()
    assert source.calls == 2
    assert await cache.get_or_load("k", source) == [1]  # nor who does not refresh ahead
    source.go.set()
    await idle(cache)
    assert await cache.get("k") == [2]


async def test_one_process_refreshes_ahead_for_all(world: Shifted, cache: Cache, watch: FakeClock) -> None:
    other, mine, theirs = world.open(), Costly(watch), Costly(watch)
    for each in (cache, other):
        draws(each, TEN_AHEAD)
        await each.get_or_load("k", mine, **EARLY)
    world.advance(51)
    mine.go.clear()
    mine.started.clear()
    assert await cache.get_or_load("k", mine, **EARLY) == [1]
    await mine.started.wait()
    for _ in range(3):
        assert await other.get_or_load("k", theirs, **EARLY) == [1]
        await idle(other)
    mine.go.set()
    await idle(cache)
    assert await other.get_or_load("k", theirs, **EARLY) == [2]
    await idle(other)
    assert (mine.calls, theirs.calls) == (2, 0)


async def test_a_function_is_refreshed_ahead(world: Shifted, cache: Cache, watch: FakeClock) -> None:
    source = Costly(watch)
    draws(cache, TEN_AHEAD)

    @acached(cache=cache, **EARLY)
    async def function(n: int) -> list[int]:
        return await source()

    for _ in range(5):
        assert await function(1) == [1]
    world.advance(51)
    assert await function(1) == [1]
    await idle(cache)
    assert await function(1) == [2]
    assert source.calls == 2
    assert function.stats().misses == 1


async def test_an_entry_of_the_near_cache_draws_once(world: Shifted, cache: Cache, watch: FakeClock) -> None:
    source, made = Costly(watch), draws(cache, TEN_AHEAD)
    await cache.get_or_load("k", source, **EARLY)
    before = len(made)
    for _ in range(50):
        await cache.get_or_load("k", source, **EARLY)
    assert len(made) - before == (50 if world.name == "redis" else 1)  # which has no near cache here


async def test_a_refresh_ahead_that_fails_rests(
    world: Shifted, cache: Cache, watch: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    other, source, theirs = world.open(), Costly(watch), Costly(watch)
    draws(cache, TEN_AHEAD)
    draws(other, TEN_AHEAD)
    await cache.get_or_load("k", source, **EARLY)
    world.advance(51)
    source.error = Boom("hunter2")
    for _ in range(5):
        assert await cache.get_or_load("k", source, **EARLY) == [1]
        await idle(cache)
    assert source.calls == 2
    assert await other.get_or_load("k", theirs, **EARLY) == [1]
    await idle(other)
    assert theirs.calls == 0
    assert len(caplog.records) == 1
    assert "hunter2" not in caplog.text
    world.advance(9.1)  # it has expired: now somebody has to wait
    source.error = None
    assert await cache.get_or_load("k", source, **EARLY) == [3]


async def test_a_delete_during_a_refresh_ahead_wins(world: Shifted, cache: Cache, watch: FakeClock) -> None:
    source = Costly(watch)
    draws(cache, TEN_AHEAD)
    await cache.get_or_load("k", source, **EARLY)
    world.advance(51)
    source.go.clear()
    await cache.get_or_load("k", source, **EARLY)
    await poll(lambda: source.calls == 2)
    await cache.delete("k")
    source.go.set()
    await idle(cache)
    assert await cache.get("k", MISSING) is MISSING


# jitter


@pytest.mark.parametrize(("drawn", "ttl"), [(2.0**-53, 60.0), (0.5, 45.0), (1.0, 30.0)])
async def test_jitter_takes_of_the_ttl_what_is_drawn(world: Shifted, cache: Cache, drawn: float, ttl: float) -> None:
    policy = Policy(ttl=60, jitter=30, stale_ttl=100)
    draws(cache, drawn)
    await cache.set("set", 1, policy=policy)
    await cache.set_many({"many": 1}, policy=policy)
    await cache.add("added", 1, policy=policy)
    await cache.get_or_load("loaded", Source(), policy=policy)
    for key in ("set", "many", "added", "loaded"):
        entry = await cache.get_entry(key)
        assert entry is not None
        assert entry.fresh_until - entry.created == pytest.approx(ttl)
        assert entry.keep_until - entry.fresh_until == pytest.approx(100)


async def test_nothing_outlives_its_ttl_and_not_all_expires_together(world: Shifted, cache: Cache) -> None:
    policy = Policy(ttl=60, jitter=30)
    keys = [f"k{n}" for n in range(50)]
    for key in keys:
        await cache.get_or_load(key, Source(), policy=policy)
    ttls = [ttl for key in keys if (ttl := await cache.ttl(key)) is not None]
    assert all(0 < ttl <= 60 for ttl in ttls)
    assert len({round(ttl, 3) for ttl in ttls}) > 10
    world.advance(60)
    assert await cache.get_many(keys) == {}


# ttl by the result, and what is not stored


@pytest.mark.parametrize(
    ("given", "expected"),
    [(5, 5.0), (0.5, 0.5), ("10m", 600.0), (timedelta(minutes=1), 60.0), (FOREVER, math.inf)],
)
async def test_a_ttl_by_the_result(world: Shifted, cache: Cache, given: Any, expected: float) -> None:
    async def load() -> dict[str, Any]:
        return {"n": 1}

    assert await cache.get_or_load("k", load, ttl=lambda result: given if result == {"n": 1} else 1) == {"n": 1}
    entry = await cache.get_entry("k")
    assert entry is not None
    assert entry.fresh_until - entry.created == pytest.approx(expected)
    await cache.set("set", {"n": 1}, policy=Policy(ttl=lambda _: given))
    entry = await cache.get_entry("set")
    assert entry is not None
    assert entry.fresh_until - entry.created == pytest.approx(expected)


@pytest.mark.parametrize("given", [0, -1, 0.0, -math.inf, timedelta(0), timedelta(days=-1)])
async def test_a_ttl_of_0_or_less_means_not_stored(world: Shifted, cache: Cache, given: Any) -> None:
    source = Source()
    for turn in (1, 2):
        assert await cache.get_or_load("k", source, ttl=lambda _: given) == [turn]
        await idle(cache)
        assert await stored(cache, "k") is None


@pytest.mark.parametrize("given", ["soon", math.nan, None, True])
async def test_a_ttl_by_the_result_that_is_none(world: Shifted, cache: Cache, given: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="the ttl returns must be"):
        await cache.get_or_load("k", Source(), ttl=lambda _: given)
    await idle(cache)
    assert await stored(cache, "k") is None


async def test_jitter_leaves_half_of_a_ttl_by_the_result(world: Shifted, cache: Cache) -> None:
    draws(cache, 1.0)
    await cache.get_or_load("k", Source(), ttl=lambda _: 10, jitter=100)
    assert await cache.ttl("k") == pytest.approx(5, abs=4)


async def test_what_is_not_to_be_stored_leaves_what_is_stale(world: Shifted, cache: Cache) -> None:
    policy = Policy(ttl=60, stale_ttl=600)
    await cache.set("k", "old", policy=policy)
    world.advance(61)
    assert await cache.get_or_load("k", Source(), policy=policy, cache_if=lambda _: False) == [1]
    assert await cache.get_or_load("k", Source(), policy=policy, ttl=lambda _: 0) == [1]
    await idle(cache)
    assert await cache.get_or_load("k", Source(Boom()), policy=policy) == "old"
