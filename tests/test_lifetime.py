"""``PerLoop``: state under one loop after another, in threads, in forked children."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import CacheError, FileCache, MemoryCache, RedisCache, WrongLoopError, _flight
from mcp_hub_cache._lifetime import PerLoop
from tests.backends import poll
from tests.forks import in_child
from tests.servers import valkey_server


class State:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.closed = 0


async def close(state: State) -> None:
    assert asyncio.get_running_loop() is state.loop
    await asyncio.sleep(0)
    state.closed += 1


def per_loop() -> PerLoop[State]:
    return PerLoop(State, owner="the thing", close=close)


async def test_one_loop_has_one_state() -> None:
    states = per_loop()
    assert states.peek() is None
    state = states.get()
    assert states.get() is states.peek() is state
    assert state.loop is asyncio.get_running_loop()
    await states.aclose()
    assert state.closed == 1
    assert states.peek() is None
    await states.aclose()
    assert state.closed == 1


async def test_after_closing_there_is_a_new_state() -> None:
    states = per_loop()
    first = states.get()
    await states.aclose()
    second = states.get()
    assert second is not first
    await states.aclose()
    assert (first.closed, second.closed) == (1, 1)


async def test_using_it_while_it_closes_makes_a_new_state() -> None:
    states = per_loop()
    first = states.get()
    closing = asyncio.create_task(states.aclose())
    await asyncio.sleep(0)
    second = states.get()
    await closing
    assert second is not first
    assert states.get() is second
    assert (first.closed, second.closed) == (1, 0)
    await states.aclose()
    assert second.closed == 1


def test_without_a_loop() -> None:
    states = per_loop()
    assert states.peek() is None
    with pytest.raises(RuntimeError, match="no running event loop"):
        states.get()


def test_asyncio_run_closes_what_it_opened() -> None:
    states, seen = per_loop(), []

    async def main() -> None:
        seen.append(states.get())

    for turn in range(3):
        asyncio.run(main())
        assert len(seen) == turn + 1
        assert [state.closed for state in seen] == [1] * (turn + 1)
    assert len({id(state) for state in seen}) == 3


def test_a_loop_that_was_closed_the_hard_way_is_abandoned() -> None:
    states, seen = per_loop(), []

    async def main() -> None:
        seen.append(states.get())

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    asyncio.run(main())
    assert [state.closed for state in seen] == [0, 1]


def test_a_loop_that_stands_still_is_no_hindrance() -> None:
    states, seen = per_loop(), []

    async def main() -> None:
        seen.append(states.get())

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    asyncio.run(main())
    assert seen[0] is not seen[1]
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def test_run_until_complete_twice_keeps_the_state() -> None:
    states, seen = per_loop(), []

    async def main() -> None:
        seen.append(states.get())

    with asyncio.Runner() as runner:
        runner.run(main())
        runner.run(main())
        assert seen[0] is seen[1]
        assert seen[0].closed == 0
    assert seen[0].closed == 1


async def test_two_running_loops_are_an_error_that_names_the_owner() -> None:
    states = per_loop()
    mine = states.get()

    async def other() -> None:
        assert states.peek() is None
        with pytest.raises(WrongLoopError, match=r"the thing is in use by another event loop.*of its own"):
            states.get()
        await states.aclose()  # not theirs to close

    await asyncio.to_thread(asyncio.run, other())
    assert states.get() is mine
    assert mine.closed == 0
    await states.aclose()


async def test_two_threads_that_race_for_it_get_one_state_and_one_error() -> None:
    states, barrier = per_loop(), threading.Barrier(2)

    async def contend() -> str:
        barrier.wait()
        try:
            states.get()
        except WrongLoopError:
            return "error"
        finally:
            await asyncio.to_thread(barrier.wait)
        return "state"

    for _ in range(20):
        answers = await asyncio.gather(*(asyncio.to_thread(asyncio.run, contend()) for _ in range(2)))
        assert sorted(answers) == ["error", "state"]


async def test_an_error_in_close_is_told_to_whoever_closes() -> None:
    async def broken(state: State) -> None:
        raise LookupError

    states = PerLoop(State, owner="it", close=broken)
    states.get()
    with pytest.raises(LookupError):
        await states.aclose()
    await states.aclose()


async def test_without_close_there_is_nothing_to_do() -> None:
    states = PerLoop(State, owner="it")
    first = states.get()
    await states.aclose()
    assert states.get() is not first


def test_what_is_dropped_is_collected() -> None:
    references = []

    async def main() -> None:
        states = per_loop()
        references.append(weakref.ref(states.get()))

    asyncio.run(main())
    gc.collect()
    assert references[0]() is None


def test_a_cache_dropped_without_closing_is_collected_while_its_loop_runs_on() -> None:
    async def main() -> None:
        cache = MemoryCache()
        await cache.set("k", "x" * 1000)
        reference = weakref.ref(cache.store)
        del cache
        for _ in range(5):
            gc.collect()
            await asyncio.sleep(0)
        assert reference() is None

    asyncio.run(main())


# Fork


def run_in_child(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run *work* in a forked child under a new ``asyncio.run``, and fail as it fails."""
    # The child of a running loop has its thread's "a loop runs" mark, which os.fork clears by itself.
    in_child(lambda: asyncio.run(work()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_forked_child_has_a_state_of_its_own() -> None:
    states = per_loop()
    mine = states.get()

    async def child() -> None:
        assert states.peek() is None
        theirs = states.get()
        assert theirs is not mine
        assert mine.closed == 0
        await states.aclose()
        assert (theirs.closed, mine.closed) == (1, 0)

    run_in_child(child)
    assert states.get() is mine
    await states.aclose()
    assert mine.closed == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_forked_child_uses_the_same_folder_through_threads_of_its_own(tmp_path: Path) -> None:
    async with FileCache(tmp_path, timeout=30) as cache:
        await cache.set("parents", 1)

        async def child() -> None:
            assert await cache.get("parents") == 1
            await cache.set("childs", 2)

        run_in_child(child)
        assert await cache.get("childs") == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_forked_child_has_connections_of_its_own() -> None:
    with valkey_server() as server:
        async with RedisCache(server.url, timeout=30) as cache:
            await cache.set_many({f"k{n}": n for n in range(100)})

            async def child() -> None:
                for n in range(100):
                    assert await cache.get(f"k{n}") == n
                await cache.set("childs", 2)
                await cache.aclose()

            reads = [asyncio.create_task(cache.get(f"k{n}")) for n in range(100)]
            await asyncio.sleep(0)  # requests are on their way while it forks
            run_in_child(child)
            assert await asyncio.gather(*reads) == [*range(100)]
            assert await cache.get("childs") == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_between_two_runs(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, timeout=30)

    async def store() -> None:
        await cache.set("k", 1)

    async def read() -> None:
        assert await cache.get("k") == 1

    asyncio.run(store())
    run_in_child(read)
    asyncio.run(read())


# Closing that is cut off


async def test_closing_waits_once_for_a_loader_that_is_deaf_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flight, "_PATIENCE", 0.01)
    go, cancelled = asyncio.Event(), 0

    async def deaf() -> None:
        nonlocal cancelled
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                cancelled += 1

    cache = MemoryCache()
    task = asyncio.create_task(cache.get_or_load("k", deaf))
    await poll(lambda: len(cache._engine.session().flights) == 1)
    await asyncio.sleep(0)
    await cache.aclose()
    assert cancelled == 1
    with pytest.raises(CacheError, match="closed"):
        await task
    go.set()
    await poll(lambda: len(asyncio.all_tasks()) == 1)


@pytest.mark.parametrize("again", [True, False])
async def test_closing_is_carried_through_where_it_is_cancelled(again: bool) -> None:
    gate = asyncio.Event()

    async def close_slowly(state: State) -> None:
        await gate.wait()
        state.closed += 1

    states = PerLoop(State, owner="the thing", close=close_slowly)
    state = states.get()
    closing = asyncio.create_task(states.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert closing.cancelled()
    assert state.closed == 0
    gate.set()
    if again:
        await states.aclose()
        assert state.closed >= 1
    await poll(lambda: state.closed >= 1 and len(asyncio.all_tasks()) == 1)
    assert states.get() is not state
    await states.aclose()


def test_so_it_is_where_the_loop_ends_meanwhile() -> None:
    kept: list[State] = []

    async def close_slowly(state: State) -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        state.closed += 1

    states = PerLoop(State, owner="the thing", close=close_slowly)

    async def main() -> None:
        kept.append(states.get())
        closing = asyncio.create_task(states.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        assert kept[0].closed == 0

    asyncio.run(main())
    assert kept[0].closed == 1
