"""What may or may not have reached the primary, and what the standby may be believed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from mcp_hub_cache._exceptions import (
    StoreBusyError,
    StoreError,
    StoreExhaustedError,
    StoreFullError,
    StoreReadOnlyError,
    StoreTimeoutError,
    StoreUnreachableError,
)
from mcp_hub_cache._frame import unpack_head
from mcp_hub_cache._protocols import Held, Outcome, Write
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.testing import FaultyStore, entry_frame
from tests.stores.failing import A, B, C, Make, View, worlds


@pytest.fixture
async def world() -> AsyncIterator[Make]:
    async with worlds() as make:
        yield make


# In doubt, with the breaker closed


@pytest.mark.parametrize("error", [StoreTimeoutError, StoreBusyError, StoreReadOnlyError, StoreExhaustedError])
async def test_a_delete_that_failed_is_a_miss_at_once_and_made_up_for(world: Make, error: type[StoreError]) -> None:
    w = world(probe_after=0.001, probe_max=0.001)
    await w.set(A, b"old")
    stamp = w.store.stamp(A)
    w.primary.break_down(error("on command."))
    if error.outage:
        await w.store.delete_many([A])
    else:
        with pytest.raises(error):
            await w.store.delete_many([A])
    assert w.store.stamp(A) != stamp
    w.primary.repair()
    if error.outage:
        await w.trusted()
    assert await w.get(A) is None
    assert await w.store.head_many([A]) == [None]
    assert [page async for page in w.store.scan(b"mcp_hub:") if page] == []
    await w.caught_up()
    assert await w.on_server(A) is None
    assert w.states == []


@pytest.mark.parametrize("error", [StoreFullError, StoreReadOnlyError, StoreUnreachableError])
async def test_a_set_that_failed_hides_what_it_was_to_replace(world: Make, error: type[StoreError]) -> None:
    w = world()
    await w.set(A, b"old")
    w.primary.break_down(error("on command."))
    if error.outage:
        assert await w.set(A, b"new") == "done"
        assert await w.in_files(A) == b"new"
    else:
        with pytest.raises(error):
            await w.set(A, b"new")
        assert await w.in_files(A) is None
    w.primary.repair()
    if error.outage:
        assert await w.get(A) == b"new"  # as long as it is suspected to be away
        await w.trusted()
        assert await w.on_server(A) is None
    else:
        assert await w.on_server(A) == b"old"  # nothing has been replayed yet
    assert await w.get(A) is None
    assert await w.set(A, b"newer") == "done"
    assert await w.get(A) == b"newer"
    await w.store._keeper._tell(w.store._keeper._sessions.get(), lambda _: True, everything=True)
    assert await w.on_server(A) == b"newer"


async def test_an_item_that_failed_is_made_up_for_like_a_call(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    w = world()
    await w.set(A, b"old")
    await w.set(B, b"old")
    full = StoreFullError("on command.")

    async def half(writes: list[Write]) -> list[Outcome]:
        return [full, *await w.server.write_many(writes[1:])]

    monkeypatch.setattr(w.primary, "write_many", half)
    outcomes = await w.store.write_many([Write(key, w.frame(key, b"new"), 600.0, None) for key in (A, B)])
    assert outcomes == [full, "done"]
    assert [await w.get(A), await w.get(B)] == [None, b"new"]


@pytest.mark.parametrize("error", [StoreTimeoutError, StoreReadOnlyError])
async def test_a_failed_delete_is_made_up_for_without_another_call(world: Make, error: type[StoreError]) -> None:
    w = world(probe_after=0.001, probe_max=0.001)
    await w.set(A, b"old")
    w.primary.break_down(error("on command."))
    with contextlib.suppress(StoreReadOnlyError):
        await w.store.delete_many([A])
    w.primary.repair()
    await w.caught_up()
    assert await w.on_server(A) is None


async def test_a_batch_of_which_every_item_failed_is_one_failure(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    w = world()
    await w.contact()
    gone = StoreUnreachableError("on command.")

    async def none(writes: Sequence[Write]) -> list[Outcome]:
        return [gone] * len(writes)

    monkeypatch.setattr(w.primary, "write_many", none)
    writes = [Write(key, w.frame(key, b"new"), 600.0, None) for key in (A, B, C)]
    for _ in range(2):
        assert await w.store.write_many(writes) == ["done"] * 3
        await w.trusted()
    assert w.states == []
    assert await w.store.write_many(writes) == ["done"] * 3
    assert w.states == [("healthy", "degraded")]
    assert [await w.get(key) for key in (A, B, C)] == [b"new"] * 3


async def test_a_load_begins_on_what_the_journal_left(world: Make) -> None:
    w = world()
    await w.set(A, b"old")
    w.primary.break_down()
    await w.store.delete_many([A])
    w.primary.repair()
    (begun,) = await w.store.begin_many([A], hold=5.0)
    assert (begun.frame, begun.leader) == (None, True)
    assert await w.set(A, b"new", fence=begun.fence) == "done"
    assert await w.get(A) == b"new"


async def test_a_load_that_began_before_a_delete_in_doubt_is_not_stored(world: Make) -> None:
    w = world()
    (begun,) = await w.store.begin_many([A], hold=5.0)
    w.primary.break_down()
    await w.store.delete_many([A])
    w.primary.repair()
    assert await w.set(A, b"stale", fence=begun.fence) == "refused"
    assert await w.get(A) is None


async def test_a_load_whose_write_failed_is_written_nowhere_else(world: Make) -> None:
    w = world()
    (begun,) = await w.store.begin_many([A], hold=5.0)
    w.primary.break_down()
    outcome = await w.set(A, fence=begun.fence)
    assert isinstance(outcome, StoreUnreachableError)
    assert await w.in_files(A) is None


@pytest.mark.parametrize("how", ["away", "refuses"])
async def test_what_could_not_be_given_back_holds_nobody_up_when_the_primary_is_back(world: Make, how: str) -> None:
    w = world()
    (begun,) = await w.store.begin_many([A], hold=10.0)
    assert begun.leader
    if how == "away":
        await w.go_down()
    else:
        w.primary.break_down(StoreReadOnlyError("it is a replica."))
    await w.store.release_many([Held(A, begun.fence)])
    assert (await w.server.get_many([A])) != [None]
    if how == "away":
        await w.come_back()
    else:
        w.primary.repair()
    (again,) = await w.store.begin_many([A], hold=10.0)
    assert again.leader


async def test_a_full_server_does_not_fill_the_journal_with_loads(world: Make) -> None:
    w = world()
    (begun,) = await w.store.begin_many([A], hold=5.0)
    w.primary.break_down(StoreFullError("on command."))
    with pytest.raises(StoreFullError):
        await w.set(A, fence=begun.fence)
    assert not len(w.store._journal)


@pytest.mark.parametrize("change", ["delete", "clear"])
async def test_a_change_that_was_cut_off_is_in_doubt(world: Make, change: str) -> None:
    w = world()
    await w.set(A, b"old")
    w.primary.hang.clear()
    task: asyncio.Future[Any] = asyncio.ensure_future(
        w.store.delete_many([A]) if change == "delete" else w.store.clear(b"mcp_hub:t:")
    )
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    w.primary.repair()
    assert w.store.state().state == "healthy"
    assert await w.get(A) is None


@pytest.mark.parametrize("breaks", [False, True])
async def test_a_set_whose_caller_left_goes_on_and_how_it_ends_is_heard(world: Make, breaks: bool) -> None:
    w = world()
    await w.set(A, b"old")
    w.primary.hang.clear()
    task = asyncio.ensure_future(w.set(A, b"new"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if breaks:
        w.primary.break_down()
    w.primary.hang.set()
    async with asyncio.timeout(5):
        while len(asyncio.all_tasks()) > 1 and not len(w.store._journal):
            await asyncio.sleep(0)
    w.primary.repair()
    assert await w.on_server(A) == (b"old" if breaks else b"new")
    assert await w.get(A) == (None if breaks else b"new")


async def test_reads_under_way_while_a_delete_fails_are_not_believed(world: Make) -> None:
    w = world()
    await w.set(A, b"old")
    w.primary.hang.clear()
    reads = [asyncio.ensure_future(read) for read in (w.store.get_many([A]), w.store.head_many([A]))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert w.primary.calls["head_many"] == 1
    w.store._keeper.note([A])
    w.primary.hang.set()
    assert await asyncio.gather(*reads) == [[None], [None]]


@pytest.mark.parametrize("breaks", [False, True])
async def test_a_reader_that_leaves_leaves_nothing_behind(world: Make, breaks: bool) -> None:
    w = world()
    await w.set(A)
    w.primary.hang.clear()
    read = asyncio.ensure_future(w.store.get_many([A]))
    await asyncio.sleep(0)
    read.cancel()
    with pytest.raises(asyncio.CancelledError):
        await read
    if breaks:
        w.primary.break_down()
    w.primary.hang.set()
    async with asyncio.timeout(5):
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)
    assert w.store.state().state == "healthy"


async def test_a_reader_that_leaves_while_the_standby_is_asked(world: Make) -> None:
    w = world()
    slow = FaultyStore(w.files)
    slow.hang.clear()
    assert w.store._standby is not None
    w.store._standby.store = slow
    w.primary.break_down()
    read = asyncio.ensure_future(w.store.get_many([A]))
    async with asyncio.timeout(5):
        while "get_many" not in slow.calls:
            await asyncio.sleep(0)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        await w.store.aclose()
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)


async def test_replays_wait_for_one_another(world: Make) -> None:
    """A set that has settled its key is not hit by a replay of the same delete that was under way."""
    w = world()
    await w.contact()
    w.primary.break_down(StoreBusyError("on command."))
    with pytest.raises(StoreBusyError):
        await w.store.delete_many([A])
    w.primary.repair()
    session = w.store._keeper._sessions.get()
    w.primary.hang.clear()
    replay = asyncio.ensure_future(w.store._keeper._tell(session, lambda _: True, everything=True))
    await asyncio.sleep(0)
    write = asyncio.ensure_future(w.set(A, b"new"))
    await asyncio.sleep(0)
    w.primary.hang.set()
    await replay
    assert await write == "done"
    assert await w.on_server(A) == b"new"
    assert w.primary.calls["delete_many"] == 2  # the one that failed, and one replay


# The standby


async def test_leftovers_of_an_earlier_outage_are_not_believed(world: Make) -> None:
    """1. A set fails and goes to the standby; 2. another reaches the primary; 3. a read fails: a miss."""
    w = world()
    await w.contact()
    w.primary.break_down()
    await w.set(A, b"1")
    w.clock.advance(0.001)
    assert await w.get(A) == b"1"
    w.primary.repair()
    await w.trusted()
    w.clock.advance(0.001)
    await w.set(A, b"2")
    w.clock.advance(0.001)
    w.primary.break_down()
    assert await w.get(A) is None
    (begun,) = await w.store.begin_many([A], hold=5.0)
    assert begun.leader
    assert await w.store.delete_many([A]) != [None]  # the placeholder
    assert await w.in_files(A) is None


async def test_leftovers_of_a_suspicion_are_not_believed_in_the_next_one(world: Make) -> None:
    """Nothing was asked in between, but others may have changed what they liked."""
    w = world()
    await w.contact()
    w.primary.break_down()
    await w.set(A, b"1")
    w.primary.repair()
    await w.trusted()
    w.clock.advance(0.001)
    frame = entry_frame(w.server, A, b"theirs")
    await w.server.write_many([Write(A, frame, 60.0, None)])
    w.clock.advance(0.001)
    w.primary.break_down()
    assert await w.get(A) is None


async def test_neighbours_in_the_same_outage_share_the_standby(world: Make) -> None:
    w = world()
    neighbour = FailoverStore(w.primary, View(w.files), clock=w.clock)
    w.primary.break_down()
    await w.get(A)
    w.clock.advance(1.0)
    await neighbour.write_many([Write(A, entry_frame(w.files, A, b"theirs"), 60.0, None)])
    assert await w.get(A) == b"theirs"
    await neighbour.aclose()


async def test_nothing_stays_in_the_standby_for_long(world: Make) -> None:
    w = world(standby_ttl=30.0)
    await w.go_down()
    await w.set(A, ttl=3600.0)
    await w.set(B, ttl=math.inf)
    await w.set(C, ttl=5.0)
    heads = [unpack_head(head or b"") for head in await w.store.head_many([A, B, C])]
    assert [head.keep_until - w.clock() for head in heads] == [30.0, 30.0, 5.0]
    assert [head.fresh_until - w.clock() for head in heads] == [30.0, 30.0, 5.0]
    w.clock.advance(31.0)
    assert [await w.in_files(A), await w.in_files(B)] == [None, None]


@pytest.mark.parametrize("skew", [-100.0, 100.0])
async def test_a_frame_made_by_another_clock_is_as_old_as_its_writing(world: Make, skew: float) -> None:
    w = world()
    await w.contact()
    w.primary.break_down()
    await w.get(B)
    w.clock.advance(skew)
    frame = w.frame(A)
    w.clock.advance(-skew)
    await w.store.write_many([Write(A, frame, 600.0, None)])
    (stored,) = await w.store.get_many([A])
    assert unpack_head(stored or b"").created == w.clock()


async def test_foreign_bytes_go_to_the_standby_as_they_are(world: Make) -> None:
    w = world()
    await w.go_down()
    assert await w.store.write_many([Write(A, b"no frame", None, None)]) == ["done"]
    assert await w.store.get_many([A]) == [b"no frame"]
    w.clock.advance(61.0)
    assert await w.store.get_many([A]) == [None]


async def test_trouble_of_the_standby_is_passed_on(world: Make) -> None:
    w = world()
    await w.go_down()
    broken = FaultyStore(w.files)
    broken.break_down(StoreFullError("on command."))
    assert w.store._standby is not None
    w.store._standby.store = broken
    with pytest.raises(StoreFullError):
        await w.set(A)
    w.store._standby.store = w.files
    await w.come_back()


async def test_a_standby_that_cannot_be_dropped_does_not_keep_the_primary_out(world: Make) -> None:
    w = world()
    broken = FaultyStore(w.files)
    assert w.store._standby is not None
    w.store._standby.store = broken
    await w.go_down()
    broken.break_down(StoreFullError("on command."))
    await w.come_back()


async def test_without_a_standby_calls_fail_at_once(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mcp_hub_cache")
    w = world(standby=False)
    await w.set(A, b"old")
    await w.go_down(StoreTimeoutError("redis:6379 did not answer.", cure="Is it overloaded?"))
    asked = w.asked()
    calls: list[Callable[[], Any]] = [
        lambda: w.get(A),
        lambda: w.set(A, b"new"),
        lambda: w.store.delete_many([B]),
        lambda: w.store.begin_many([A], hold=1.0),
        lambda: w.store.clear(b"mcp_hub:none:"),
        w.store.info,
        lambda: anext(w.store.scan(b"")),
    ]
    for call in calls:
        with pytest.raises(StoreTimeoutError, match=r"^redis:6379 did not answer\. Is it overloaded\?$") as caught:
            await call()
        assert caught.value.cure == "Is it overloaded?"
    assert w.asked() == asked
    assert w.store.state().state == "unhealthy"
    assert w.store.stamp(A) is None
    assert caplog.records[-1].getMessage() == "No cache to fall back to: calls go through uncached"
    await w.come_back()
    assert await w.get(A) is None
    assert w.states == [("healthy", "unhealthy"), ("unhealthy", "healthy")]
