"""FailoverStore: the conformance suite on either store, and how the primary goes and comes back."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mcp_hub_cache._exceptions import (
    StoreTimeoutError,
    StoreUnreachableError,
)
from mcp_hub_cache._protocols import Coherent, Leases, Monitored, Store, Write
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock, FaultyStore, StoreConformance
from tests.stores.failing import SECRET, A, B, C, Make, View, World, worlds


class TestConformanceOfThePrimary(StoreConformance):
    clock: FakeClock

    @asynccontextmanager
    async def open_pair(self) -> AsyncIterator[tuple[Store, Store]]:
        self.clock = FakeClock()
        primary, standby = MemoryStore(clock=self.clock), MemoryStore(clock=self.clock)
        yield FailoverStore(primary, standby), FailoverStore(View(primary), View(standby))

    async def wait_expiry(self, store: Store, until: float) -> None:
        self.clock.advance(max(0.0, until - self.clock()) + 0.001)


class TestConformanceOfTheStandby(StoreConformance):
    """The same promises while the primary is away; only ``ping`` tells."""

    clock: FakeClock

    @asynccontextmanager
    async def open_pair(self) -> AsyncIterator[tuple[Store, Store]]:
        self.clock = FakeClock()
        standby = MemoryStore(clock=self.clock)
        stores = []
        for each in (standby, View(standby)):
            primary = FaultyStore(MemoryStore(clock=self.clock))
            primary.break_down()
            stores.append(FailoverStore(primary, each, standby_ttl=math.inf))
            await stores[-1].get_many([b"first contact"])
        yield stores[0], stores[1]

    async def wait_expiry(self, store: Store, until: float) -> None:
        self.clock.advance(max(0.0, until - self.clock()) + 0.001)

    async def test_is_a_store(self) -> None:
        async with self._pair() as (one, two):
            assert isinstance(one, Store)
            assert isinstance(one, Coherent)
            assert isinstance(one, Leases)
            assert isinstance(one, Monitored)
            assert (one.name, one.id != two.id) == (two.name, True)

    async def test_clock(self) -> None:
        async with self._pair() as (one, two):
            assert one.now() == two.now() == self.clock()


@pytest.fixture
async def world() -> AsyncIterator[Make]:
    async with worlds() as make:
        yield make


async def test_away_at_the_start_the_standby_serves_at_once(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mcp_hub_cache")
    w = world()
    w.primary.break_down(StoreUnreachableError("Redis connection failed: Error connecting to redis:6379."))
    assert await w.get(A) is None
    assert await w.set(A) == "done"
    assert await w.get(A) == SECRET
    assert w.asked() == 1
    assert w.states == [("healthy", "degraded")]
    state = w.store.state()
    assert (state.state, state.since) == ("degraded", w.clock())
    assert "redis:6379" in (state.problem or "")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "Failed to initialize Redis cache backend: Redis connection failed: Error connecting to redis:6379."),
        ("INFO", "Falling back to file-based cache"),
    ]


async def test_one_failure_is_a_suspicion_that_probes_look_into(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    """So that an outage costs a caller one deadline and no more."""
    caplog.set_level(logging.INFO, "mcp_hub_cache")
    w = world()
    await w.set(A, b"1")
    for _ in range(2):
        w.primary.break_down(StoreTimeoutError("redis:6379 did not answer within 0.5 s."))
        asked = w.primary.calls.get("get_many", 0)
        assert [await w.get(A), await w.get(A)] == [None, None]
        assert w.primary.calls["get_many"] == asked + 1
        w.primary.repair()
        await w.trusted()
        assert await w.get(A) == b"1"
    assert w.states == []
    assert (await w.store.info())["breaker"] == "closed"
    assert caplog.records == []


async def test_a_few_failures_in_a_row_open(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mcp_hub_cache")
    w = world(probe_after=0.001, probe_max=3600.0)
    await w.set(A, b"1")
    w.primary.break_down(StoreUnreachableError("Redis connection failed: redis:6379 closed the connection."))
    assert await w.get(A) is None
    await w.until("degraded")  # by itself
    assert w.primary.calls["get_many"] == 1
    assert w.primary.calls["ping"] == 2
    assert w.states == [("healthy", "degraded")]
    assert [record.getMessage() for record in caplog.records] == [
        "Redis connection failed: redis:6379 closed the connection.",
        "Falling back to file-based cache",
    ]


async def test_one_that_answers_probes_and_nothing_else_is_away_all_the_same(
    world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()
    await w.set(A, b"1")

    async def gone(_: object) -> Any:
        raise StoreTimeoutError("redis:6379 did not answer within 0.5 s.")

    monkeypatch.setattr(w.primary, "head_many", gone)
    for _ in range(3):
        await w.store.head_many([A])
        if not w.states:
            await w.trusted()
    assert w.states == [("healthy", "degraded")]


async def test_it_comes_back_by_itself(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mcp_hub_cache")
    w = world(probe_after=0.001, probe_max=0.001)
    w.primary.break_down()
    await w.set(A)
    w.primary.repair()
    await w.until("healthy")
    assert w.states == [("healthy", "degraded"), ("degraded", "healthy")]
    assert caplog.records[-1].getMessage() == "Redis is back: it serves the cache again (1 deletes made up for)"
    assert await w.set(A, b"new") == "done"
    assert await w.on_server(A) == b"new"
    assert SECRET.decode() not in caplog.text
    assert A.decode() not in caplog.text


async def test_deletes_and_sets_made_while_it_was_away_are_not_undone(world: Make) -> None:
    w = world()
    for key in (A, B, C):
        await w.set(key, b"old")
    await w.go_down()
    assert await w.store.delete_many([A]) == [None]
    assert await w.set(B, b"new") == "done"
    assert await w.get(B) == b"new"
    await w.come_back()
    assert [await w.get(A), await w.get(B), await w.get(C)] == [None, None, b"old"]
    assert [await w.on_server(A), await w.on_server(B)] == [None, None]
    assert await w.in_files(B) is None


async def test_a_clear_made_while_it_was_away_is_made_up_for(world: Make) -> None:
    w = world()
    other = b"mcp_hub:other:e:a"
    for key in (A, B, other):
        await w.set(key)
    await w.go_down()
    await w.set(C)
    assert await w.store.clear(b"mcp_hub:t:") == 1
    await w.come_back()
    assert [await w.on_server(A), await w.on_server(B), await w.on_server(other)] == [None, None, SECRET]


async def test_what_loads_stored_in_the_standby_says_nothing_about_the_primary(world: Make) -> None:
    w = world()
    await w.set(A, b"old")
    await w.go_down()
    (begun,) = await w.store.begin_many([A], hold=5.0)
    assert begun.leader
    assert await w.set(A, b"loaded", fence=begun.fence) == "done"
    assert await w.get(A) == b"loaded"
    await w.come_back()
    assert await w.get(A) == b"old"


async def test_what_was_added_in_the_standby_is_not_followed_by_what_the_primary_had(world: Make) -> None:
    w = world()
    await w.set(A, b"old")
    await w.go_down()
    (begun,) = await w.store.begin_many([A], hold=5.0)
    added = Write(A, w.frame(A, b"added"), 600.0, begun.fence, by_caller=True)
    assert await w.store.write_many([added]) == ["done"]
    assert await w.get(A) == b"added"
    await w.come_back()
    assert await w.get(A) is None


async def test_an_overflowing_journal_clears_everything(world: Make) -> None:
    w = world(max_journal=3)
    await w.set(A)
    await w.go_down()
    await w.store.delete_many([b"mcp_hub:t:e:%d" % n for n in range(4)])
    await w.come_back()
    assert await w.on_server(A) is None


# Lifetime, and the rest


async def test_everything_is_asked_of_the_store_that_serves(world: Make) -> None:
    w = world()
    await w.set(A)
    w.primary.break_down()
    assert [page async for page in w.store.scan(b"mcp_hub:")] == []
    assert (await w.store.info())["total_keys"] == 0
    assert await w.store.clear(b"mcp_hub:t:") == 0
    await w.noticed()
    with pytest.raises(StoreUnreachableError):
        await w.store.ping()
    assert await w.store.get_many([]) == []
    assert await w.store.write_many([]) == []


async def test_a_scan_goes_on_in_the_standby(world: Make) -> None:
    w = world()
    keys = {b"mcp_hub:t:e:%d" % n for n in range(1200)}
    await w.store.write_many([Write(key, w.frame(key), 600.0, None) for key in keys])
    pages = w.store.scan(b"mcp_hub:")
    first = {key for key, _ in await anext(pages)}
    assert first < keys
    w.primary.break_down()
    assert [page async for page in pages] == []


async def test_closing_ends_a_probe_that_hangs(world: Make) -> None:
    w = world(probe_after=0.001, probe_max=0.001)
    w.primary.break_down()
    await w.get(A)
    w.primary.hang.clear()
    w.primary.error = None
    pings = w.primary.calls.get("ping", 0)
    async with asyncio.timeout(5):
        while w.primary.calls.get("ping", 0) == pings:
            await asyncio.sleep(0.001)
    await w.store.aclose()
    assert len(asyncio.all_tasks()) == 1
    w.primary.repair()
    assert await w.get(A) is None  # opens again, and looks for the primary
    await w.until("healthy")


async def test_a_probe_that_raises_nonsense_is_a_probe_that_failed(
    world: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world(probe_after=0.001, probe_max=0.001)
    w.primary.break_down()
    await w.get(A)
    broken = asyncio.Event()

    async def nonsense(_lane: object) -> None:
        broken.set()
        raise AttributeError("from inside the driver")

    with monkeypatch.context() as patched:
        patched.setattr(w.primary, "ping", nonsense)
        await asyncio.wait_for(broken.wait(), 5)
    w.primary.repair()
    await w.until("healthy")
    assert "unexpected error while probing" in caplog.text


async def test_a_probe_that_is_collected_long_after_it_was_abandoned_opens_nothing(world: Make) -> None:
    """As one is whose loop was closed under it."""
    w = world()
    await w.go_down()
    w.primary.hang.clear()
    part = w.store._health.part(None)
    probe = w.store._keeper._probe(w.store._keeper._sessions.get(), part)
    probe.send(None)
    assert part.breaker.state == "half-open"
    w.primary.hang.set()
    await w.come_back()
    probe.close()
    assert part.breaker.state == "closed"


def test_a_second_loop_goes_on_where_the_first_one_ended() -> None:
    made: list[World] = []

    async def first() -> None:
        w = World(probe_after=0.001, probe_max=0.001)
        made.append(w)
        await w.set(A, b"old")
        await w.go_down()
        await w.store.delete_many([A])  # and no aclose

    async def second() -> None:
        w = made[0]
        w._changed = asyncio.Event()
        assert await w.get(A) is None
        assert w.store.state().state == "degraded"
        w.primary.repair()
        await w.until("healthy")
        assert await w.on_server(A) is None
        await w.store.aclose()

    asyncio.run(first(), debug=True)
    asyncio.run(second(), debug=True)


@pytest.mark.parametrize("wrong", [{"standby_ttl": 0.0}, {"failures": 0}, {"max_journal": 0}, {"probe_after": -1.0}])
def test_wrong_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        FailoverStore(MemoryStore(), MemoryStore(), **wrong)
