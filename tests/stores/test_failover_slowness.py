"""Slow is as good as failed: measured by the round trip, less what this process was busy for itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest_asyncio

from mcp_hub_cache._protocols import Write
from mcp_hub_cache.stores._failover_stopwatch import Stopwatch
from tests.stores.failing import A, Make, World, worlds


@pytest_asyncio.fixture
async def world() -> AsyncIterator[Make]:
    async with worlds() as make:
        yield make


async def _slowly(w: World, seconds: float) -> bytes | None:
    w.primary.hang.clear()
    asyncio.get_running_loop().call_later(seconds, w.primary.hang.set)
    return await w.get(A)


async def test_slow_round_trips_in_a_row_open_the_breaker(world: Make) -> None:
    w = world(failures=2, slow_after=0.01)
    await w.set(A, b"there")
    assert await _slowly(w, 0.05) == b"there"  # its caller has it all the same
    assert w.store.state().state == "healthy"
    assert await _slowly(w, 0.05) == b"there"
    state = w.store.state()
    assert state.state == "degraded"
    assert state.problem is not None
    assert "takes" in state.problem
    assert "CACHE_SLOW_AFTER" in state.problem


async def test_nothing_is_believed_that_an_earlier_outage_left(world: Make) -> None:
    w = world(failures=1, slow_after=0.01)
    await w.go_down()
    await w.come_back()
    await w.set(A, b"there")
    w.files.write(Write(A, w.frame(A, b"left behind"), 600.0, None))  # as where it could not be dropped
    w.clock.advance(1)
    assert await _slowly(w, 0.05) == b"there"
    assert w.store.state().state == "degraded"
    assert await w.get(A) is None
    await w.set(A, b"new")
    assert await w.get(A) == b"new"


async def test_a_quick_one_in_between_begins_the_count_anew(world: Make) -> None:
    w = world(failures=2, slow_after=0.2)
    await w.set(A, b"there")
    await _slowly(w, 0.4)
    await w.get(A)
    await _slowly(w, 0.4)
    assert w.store.state().state == "healthy"


async def test_large_values_may_take_their_time(world: Make) -> None:
    w = world(failures=1, slow_after=0.01)
    await w.set(A, bytes(100_000))
    await _slowly(w, 0.05)
    assert w.store.state().state == "healthy"


async def test_a_probe_that_is_slow_has_failed(world: Make) -> None:
    w = world(failures=1, slow_after=0.01)
    await w.set(A, b"there")
    await _slowly(w, 0.05)
    assert w.store.state().state == "degraded"
    w.primary.hang.clear()
    before = w.asked()
    w.store._keeper.wake()
    while w.asked() == before:
        await asyncio.sleep(0)
    await asyncio.sleep(0.03)  # how long the probe takes
    w.primary.hang.set()
    while w.store._health.part(None).breaker.state == "half-open":
        await asyncio.sleep(0)
    assert w.store.state().state == "degraded"
    await w.come_back()


async def test_a_loop_that_was_held_up_is_no_slow_server(world: Make) -> None:
    w = world(failures=1, slow_after=0.2)
    await w.set(A, b"there")
    w.primary.hang.clear()
    reading = asyncio.ensure_future(w.get(A))
    await asyncio.sleep(0)
    w.primary.hang.set()
    time.sleep(0.4)  # that is what it is about
    assert await reading == b"there"
    assert w.store.state().state == "healthy"


async def test_the_stopwatch_takes_out_what_the_loop_was_late_by() -> None:
    stopwatch = Stopwatch(asyncio.get_running_loop())
    started = stopwatch.start()
    time.sleep(0.3)
    assert stopwatch.stop(started) < 0.2
    started = stopwatch.start()
    await asyncio.sleep(0.1)
    assert stopwatch.stop(started) > 0.05
    stopwatch.close()
