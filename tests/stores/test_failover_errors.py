"""Trouble that is no outage, and what does not survive a switch: fences, stamps, leases."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator

import pytest

from mcp_hub_cache._exceptions import (
    StoreAuthError,
    StoreBusyError,
    StoreError,
    StoreExhaustedError,
    StoreFullError,
    StorePermissionError,
    StoreReadOnlyError,
    StoreTimeoutError,
)
from mcp_hub_cache._frame import unpack_head
from mcp_hub_cache._protocols import Fence, Held, Patch, Used
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FaultyStore
from tests.stores.failing import SECRET, A, B, Make, worlds


@pytest.fixture
async def world() -> AsyncIterator[Make]:
    async with worlds() as make:
        yield make


# Errors that are no outage


@pytest.mark.parametrize("error", [StoreBusyError, StoreFullError, StoreReadOnlyError, StoreExhaustedError])
async def test_other_trouble_is_passed_on_and_opens_nothing(world: Make, error: type[StoreError]) -> None:
    w = world()
    w.primary.break_down(error("on command."))
    for _ in range(5):
        with pytest.raises(error, match=r"on command\."):
            await w.get(A)
        with pytest.raises(error):
            await w.store.begin_many([A], hold=1.0)
    assert w.states == []
    assert w.kept() == [] and not w.files._planted


async def test_a_server_that_says_busy_is_there(world: Make) -> None:
    w = world()
    await w.contact()
    for error in (StoreTimeoutError, StoreTimeoutError, StoreBusyError, StoreTimeoutError, StoreTimeoutError):
        w.primary.break_down(error("on command."))
        with contextlib.suppress(StoreBusyError):
            await w.get(A)
    assert w.states == []


async def test_wrong_credentials_are_said_loudly_and_nothing_falls_back(
    world: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mcp_hub_cache")
    w = world()
    await w.set(A, b"old")
    w.primary.break_down(StoreAuthError("NOAUTH Authentication required.", cure="Set REDIS_PASSWORD."))
    for _ in range(3):
        with pytest.raises(StoreAuthError, match="REDIS_PASSWORD"):
            await w.get(A)
        with pytest.raises(StoreAuthError):
            await w.store.delete_many([A])
    assert w.primary.calls["get_many"] == 1
    assert w.primary.calls.get("delete_many") is None
    assert w.kept() == [] and not w.files._planted
    assert w.store.stamp(A) is None
    assert w.states == [("healthy", "misconfigured")]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "Redis refuses to serve the cache: NOAUTH Authentication required. Set REDIS_PASSWORD."),
        ("INFO", "No cache to fall back to: calls go through uncached"),
    ]
    await w.come_back()
    assert await w.get(A) is None
    assert await w.on_server(A) is None


async def test_credentials_put_right_on_a_server_that_is_gone(world: Make) -> None:
    w = world(probe_after=0.001, probe_max=0.001)
    await w.set(A, b"old")
    await w.go_down(StoreAuthError("on command."))
    w.primary.break_down()
    await w.until("degraded")
    assert await w.set(A, b"new") == "done"
    assert await w.get(A) == b"new"
    w.primary.break_down(StoreAuthError("on command."))
    await w.until("misconfigured")
    with pytest.raises(StoreAuthError):
        await w.get(A)
    w.primary.repair()
    await w.until("healthy")
    assert await w.get(A) is None


async def test_a_missing_permission_costs_those_calls_alone(
    world: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()
    await w.set(A)
    denied = FaultyStore(w.server)
    denied.break_down(StorePermissionError("NOPERM.", cure="ACL SETUSER …"))
    monkeypatch.setattr(w.primary, "info", denied.info)
    with pytest.raises(StorePermissionError):
        await w.store.info()
    assert w.store.state().state == "healthy"
    monkeypatch.setattr(w.primary, "begin_many", denied.begin_many)
    for _ in range(3):
        with pytest.raises(StorePermissionError):
            await w.store.begin_many([B], hold=1.0)
        assert await w.get(A) == SECRET
    assert w.store.state().state == "misconfigured"
    assert [record.getMessage() for record in caplog.records] == [
        "Redis refuses to serve the cache: NOPERM. ACL SETUSER …"
    ]
    denied.repair()
    await w.store.begin_many([B], hold=1.0)
    assert w.states == [("healthy", "misconfigured"), ("misconfigured", "healthy")]


async def test_a_primary_that_answers_but_takes_no_deletes_is_back(
    world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()
    await w.set(A, b"old")
    await w.set(B, b"old")
    await w.go_down()
    await w.store.delete_many([A])
    replica = FaultyStore(w.server)
    replica.break_down(StoreReadOnlyError("on command."))
    monkeypatch.setattr(w.primary, "delete_many", replica.delete_many)
    await w.come_back()
    assert [await w.get(A), await w.get(B)] == [None, b"old"]


# Fences, stamps and leases across a switch


async def test_a_fence_is_worthless_on_the_other_side(world: Make) -> None:
    w = world()
    (before,) = await w.store.begin_many([A], hold=500.0)
    await w.go_down()
    assert await w.set(A, fence=before.fence) == "refused"
    (during,) = await w.store.begin_many([A], hold=500.0)
    await w.come_back()
    assert await w.set(A, fence=during.fence) == "refused"
    assert await w.get(A) == b""  # the placeholder of the first


async def test_a_fence_made_of_a_head_read_through_us(world: Make) -> None:
    w = world()
    await w.set(A)
    (head,) = await w.store.head_many([A])
    assert head is not None
    patch = Patch(A, Fence(w.store.id, unpack_head(head).token), head, 600.0)
    assert await w.store.patch_many([patch]) == ["done"]
    await w.go_down()
    assert await w.store.patch_many([patch]) == ["refused"]


async def test_a_stamp_does_not_survive_a_switch(world: Make) -> None:
    w = world()
    await w.contact()
    seen = {w.store.stamp(A)}
    w.primary.break_down()
    for _ in range(3):
        await w.get(A)
        seen.add(w.store.stamp(A))
    assert len(seen) == 4
    during = w.store.stamp(A)
    await w.store.delete_many([B])
    assert w.store.stamp(A) == during
    await w.set(A)
    assert w.store.stamp(A) != during
    seen.add(w.store.stamp(A))
    await w.come_back()
    assert w.store.stamp(A) not in seen


async def test_whoever_waits_for_a_change_is_woken_by_a_switch(world: Make) -> None:
    w = world()
    await w.contact()
    stamp = w.store.stamp(A)
    assert stamp is not None
    waiter = asyncio.ensure_future(w.store.changed(A, stamp))
    await asyncio.sleep(0)
    await w.go_down()
    await asyncio.wait_for(waiter, 5)
    stamp = w.store.stamp(A)
    assert stamp is not None
    waiter = asyncio.ensure_future(w.store.changed(A, stamp))
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_leases_go_to_the_store_that_issued_them(world: Make) -> None:
    w = world()
    (mine,) = await w.store.begin_many([A], hold=5.0)
    await w.go_down()
    (theirs,) = await w.store.begin_many([B], hold=5.0)
    held = [Held(A, mine.fence), Held(B, theirs.fence)]
    assert await w.store.renew_many(held, hold=5.0) == [False, True]
    await w.store.release_many(held)
    assert await w.files.head_many([B]) == [None]
    assert await w.server.head_many([A]) != [None]
    await w.come_back()
    await w.store.release_many(held)
    assert await w.server.head_many([A]) == [None]


async def test_in_the_standby_for_ever_is_as_long_as_anything_stays_there(world: Make) -> None:
    w = world(standby_ttl=30.0)
    await w.go_down()
    begun = await w.store.begin_many([A], hold=math.inf)
    begun += await w.store.begin_many([B], hold=5.0)
    assert await w.store.renew_many([Held(B, begun[1].fence)], hold=math.inf) == [True]
    w.clock.advance(29.0)
    assert None not in await w.files.head_many([A, B])
    w.clock.advance(2.0)
    assert await w.files.head_many([A, B]) == [None, None]


async def test_uses_are_told_to_the_store_that_serves(world: Make) -> None:
    w = world()
    assert isinstance(w.store, Used)
    for key in (A, B):
        await w.set(key)
    await w.store.used_many([A])
    assert list(w.server._entries) == [B, A]
    assert (w.primary.calls["used_many"], list(w.files._entries)) == (1, [])
    await w.go_down()
    for key in (A, B):
        await w.set(key)
    await w.store.used_many([A])
    assert w.kept() == [B, A]
    assert w.primary.calls["used_many"] == 1


async def test_uses_told_to_a_primary_that_has_gone_count_as_a_failure(world: Make) -> None:
    w = world(failures=1)
    await w.contact()
    w.primary.break_down()
    await w.store.used_many([A])
    assert w.states == [("healthy", "degraded")]


async def test_uses_are_nothing_to_stores_that_have_no_use_for_them() -> None:
    store = FailoverStore(FaultyStore(MemoryStore()), None)
    await store.used_many([A])
    await store.aclose()
