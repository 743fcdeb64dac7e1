"""``Budget``: one deadline over several trips; and what operations of several trips cost where one of them hangs."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mcp_hub_cache import Cache
from mcp_hub_cache._budget import UNBOUNDED, Budget
from mcp_hub_cache._exceptions import StoreTimeoutError
from mcp_hub_cache.testing import faulty
from tests.backends import PATIENT
from tests.operations import DEADLINE, LOAD, OPERATIONS, fill, load

METHODS = ("get_many", "head_many", "begin_many", "write_many", "patch_many", "delete_many", "renew_many")


async def nothing() -> str:
    return "done"


async def forever() -> None:
    await asyncio.Event().wait()


async def test_it_returns_what_the_work_returns() -> None:
    loop = asyncio.get_running_loop()
    assert await Budget(loop, PATIENT, 0.0).within(nothing()) == "done"
    assert await UNBOUNDED.within(nothing()) == "done"
    assert not UNBOUNDED.is_spent


async def test_it_ends_what_takes_too_long() -> None:
    budget = Budget(asyncio.get_running_loop(), 0.01, 0.0)
    with pytest.raises(StoreTimeoutError, match=r"within 0\.01 s"):
        await budget.within(forever())
    assert budget.is_spent
    with pytest.raises(StoreTimeoutError):
        await budget.within(forever())


async def test_what_was_spent_before_counts_and_what_lies_between_does_not() -> None:
    budget = Budget(asyncio.get_running_loop(), PATIENT, PATIENT - 0.02)
    await asyncio.sleep(0.03)
    assert await budget.within(nothing()) == "done"
    assert not budget.is_spent
    with pytest.raises(StoreTimeoutError):
        await asyncio.wait_for(budget.within(forever()), PATIENT / 2)


async def test_a_timeout_of_the_works_own_is_left_alone() -> None:
    async def late() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        await Budget(asyncio.get_running_loop(), PATIENT, 0.0).within(late())


async def test_a_caller_that_is_cancelled_is_cancelled() -> None:
    task = asyncio.ensure_future(Budget(asyncio.get_running_loop(), PATIENT, 0.0).within(forever()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_process_that_was_busy_has_a_moment_to_take_in_the_answer() -> None:
    loop = asyncio.get_running_loop()
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)

        async def answer() -> bytes:
            listening = asyncio.ensure_future(loop.sock_recv(near, 1))
            await asyncio.sleep(0)
            far.send(b"x")
            time.sleep(0.2)  # the answer is there; nobody has looked
            return await listening

        assert await Budget(loop, 0.1, 0.0).within(answer()) == b"x"


# One deadline for an operation, whichever of its trips hangs


async def test_an_operation_has_one_deadline_over_all_its_trips() -> None:
    """Each method of the store hangs in turn, then all but one; measured by what hangs at its only trip."""
    hanging = [[each] for each in METHODS] + [[each for each in METHODS if each != method] for method in METHODS]
    cases = [(name, stalled) for name in OPERATIONS for stalled in hanging]
    alone, *times = await asyncio.gather(
        timed(lambda cache: cache.get("k"), ["get_many"]),
        *[timed(OPERATIONS[name], stalled) for name, stalled in cases],
    )
    assert alone > DEADLINE * 0.9
    slow = [(case, took) for case, took in zip(cases, times, strict=True) if took > alone * 1.6 + LOAD]
    assert not slow


async def timed(operation: Callable[[Cache], Awaitable[Any]], stalled: list[str]) -> float:
    cache, faults = faulty(timeout=DEADLINE, l1_max_entries=0)
    async with cache:
        await fill(cache)
        await asyncio.sleep(0.002)
        faults.stall(*stalled)
        begun = time.monotonic()
        await asyncio.wait_for(operation(cache), PATIENT)
        took = time.monotonic() - begun
        faults.repair()
    return took


async def test_a_tagged_value_that_comes_too_late_leaves_nothing_older() -> None:
    cache, faults = faulty(timeout=0.1)
    async with cache:
        await cache.set("k", "old", tags=["a"])
        await cache.invalidate("a")
        await cache.set("k", "old")
        with faults.stall("begin_many"):
            await cache.set("k", "new", tags=["a"])
            assert set(cache.stats.errors) == {"timeout"}
        assert await cache.get("k") is None


async def test_a_load_whose_result_can_not_be_stored_in_time_is_handed_out() -> None:
    cache, faults = faulty(timeout=0.1)
    async with cache:
        with faults.stall("write_many"):
            assert await cache.get_or_load("k", load) == 1
        assert cache.stats.loads == 1
