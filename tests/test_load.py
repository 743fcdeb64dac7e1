"""``get_or_load``: one load per key, and what happens to it when the world changes meanwhile."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import MISSING, Cache, CircularLoadError, FileCache, MemoryCache, current_entry
from mcp_hub_cache._frame import Kind, unpack_head
from mcp_hub_cache._placeholders import HOLD
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock, FaultyStore
from tests.backends import NAMES, Backend, poll, stored, turns
from tests.servers import Server, valkey_server


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    server = request.getfixturevalue("valkey") if request.param == "redis" else None
    return Backend(request.param, tmp_path, server)


@pytest.fixture
async def cache(backend: Backend) -> AsyncIterator[Cache]:
    yield backend.open()
    await backend.aclose()


@pytest.fixture
async def memory() -> AsyncIterator[Cache]:
    async with MemoryCache() as cache:
        yield cache


class Loader:
    """Counts its calls; each waits until it is let go, and returns its number."""

    def __init__(self, *, going: bool = False) -> None:
        self.calls = 0
        self.ended = 0
        self.cancelled = 0
        self.started = asyncio.Event()
        self.go = asyncio.Event()
        self.error: BaseException | None = None
        if going:
            self.go.set()

    async def __call__(self) -> list[int]:
        self.calls += 1
        number = self.calls
        self.started.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.ended += 1
        if self.error is not None:
            raise self.error
        return [number]


class Boom(Exception):
    pass


# One call


async def test_a_thousand_concurrent_callers_are_one_call(cache: Cache) -> None:
    loader = Loader()
    tasks = [asyncio.create_task(cache.get_or_load("k", loader)) for _ in range(1000)]
    await poll(lambda: cache.stats.misses == 1000)
    loader.go.set()
    assert await asyncio.gather(*tasks) == [[1]] * 1000
    assert loader.calls == 1
    assert cache.stats.coalesced == 999
    assert cache.stats.loads == 1
    assert await cache.get_or_load("k", loader) == [1]
    assert loader.calls == 1


async def test_a_thousand_callers_of_a_quick_loader_are_one_call(cache: Cache) -> None:
    loader = Loader(going=True)
    assert await asyncio.gather(*(cache.get_or_load("k", loader) for _ in range(1000))) == [[1]] * 1000
    assert loader.calls == 1


async def test_keys_are_loaded_side_by_side(cache: Cache) -> None:
    everybody = asyncio.Event()
    inside = 0

    async def load() -> int:
        nonlocal inside
        inside += 1
        if inside == 20:
            everybody.set()
        await everybody.wait()
        return inside

    assert await asyncio.gather(*(cache.get_or_load(f"k{n}", load) for n in range(20))) == [20] * 20


async def test_the_leader_gets_the_loaders_own_object(memory: Cache) -> None:
    made: list[object] = []

    async def load() -> list[int]:
        made.append([1])
        return made[-1]  # type: ignore[return-value]

    first, second = await asyncio.gather(memory.get_or_load("k", load), memory.get_or_load("k", load))
    assert (first is made[0], second is made[0]) == (True, False)


async def test_the_stored_value_is_as_the_loader_returned_it(cache: Cache) -> None:
    loader = Loader(going=True)
    value = await cache.get_or_load("k", loader)
    value.append(99)
    assert await cache.get("k") == [1]


async def test_the_cost_of_the_load_is_remembered(memory: Cache) -> None:
    async def load() -> int:
        return 1

    await memory.get_or_load("k", load)
    entry = await memory.get_entry("k")
    assert entry is not None
    assert 0 <= entry.load_cost < 5
    assert memory.stats.load_seconds >= 0


async def test_the_loader_runs_in_the_leaders_context(memory: Cache) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    async def load() -> str:
        seen = variable.get()
        variable.set("changed inside")
        return seen

    variable.set("leader's")
    assert await memory.get_or_load("k", load) == "leader's"
    assert variable.get() == "leader's"


# Errors


@pytest.mark.parametrize("error", [Boom("text"), LookupError(), StopAsyncIteration("x"), RuntimeError("StopIteration")])
async def test_an_error_reaches_every_waiter_unchanged_and_is_not_stored(cache: Cache, error: Exception) -> None:
    loader = Loader()
    loader.error = error
    tasks = [asyncio.create_task(cache.get_or_load("k", loader)) for _ in range(20)]
    await poll(lambda: cache.stats.misses == 20)
    loader.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is error for result in results)
    assert loader.calls == 1
    assert cache.stats.load_errors == 1
    assert await cache.get("k", MISSING) is MISSING
    assert await cache.exists("k") is False
    loader.error = None
    assert await cache.get_or_load("k", loader) == [2]


async def test_after_an_error_no_placeholder_is_left(cache: Cache) -> None:
    async def fail() -> None:
        raise Boom

    for _ in range(3):
        with pytest.raises(Boom):
            await cache.get_or_load("k", fail)
    assert await _gone(cache, "k")


async def _gone(cache: Cache, key: str) -> bool:
    await poll(lambda: _is_gone(cache, key))
    return True


async def _is_gone(cache: Cache, key: str) -> bool:
    return await stored(cache, key) is None


async def test_a_shared_errors_trace_does_not_grow(memory: Cache) -> None:
    loader = Loader()
    loader.error = Boom()
    tasks = [asyncio.create_task(memory.get_or_load("k", loader)) for _ in range(50)]
    await turns()
    loader.go.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    depth, trace = 0, loader.error.__traceback__
    while trace is not None:
        depth, trace = depth + 1, trace.tb_next
    assert depth < 15


async def test_a_loader_that_raises_cancelled_error(cache: Cache) -> None:
    async def load() -> None:
        raise asyncio.CancelledError

    async def call() -> str:
        try:
            await cache.get_or_load("k", load)
        except asyncio.CancelledError:
            return "told"
        return "not told"

    assert await asyncio.wait_for(asyncio.gather(*(call() for _ in range(5))), 20) == ["told"] * 5
    assert await cache.get("k", MISSING) is MISSING
    loader = Loader(going=True)
    assert await cache.get_or_load("k", loader) == [1]


ENDING = """
import asyncio
from mcp_hub_cache import MemoryCache

async def load():
    raise {error}

async def main():
    async with MemoryCache() as cache:
        await cache.get_or_load("k", load)

asyncio.run(main())
"""


@pytest.mark.parametrize(("error", "code"), [("SystemExit(7)", 7), ("KeyboardInterrupt", -signal.SIGINT)])
def test_a_loader_that_ends_the_program(error: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(error=error)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert "never awaited" not in done.stderr


async def test_an_error_before_the_first_await(memory: Cache) -> None:
    def load() -> Awaitable[int]:
        raise Boom

    with pytest.raises(Boom):
        await memory.get_or_load("k", load)
    assert await stored(memory, "k") is None


async def test_an_error_of_cache_if_reaches_the_caller(memory: Cache) -> None:
    def broken(value: object) -> bool:
        raise Boom

    with pytest.raises(Boom):
        await memory.get_or_load("k", Loader(going=True), cache_if=broken)
    assert await memory.get("k") is None


# Cancellation


@pytest.mark.parametrize("position", range(21))
async def test_a_cancelled_caller_alone_sees_it(memory: Cache, position: int) -> None:
    loader = Loader()
    tasks = [asyncio.create_task(memory.get_or_load("k", loader)) for _ in range(21)]
    await turns()
    assert loader.calls == 1
    tasks[position].cancel()
    await turns()
    assert [task.done() for task in tasks] == [n == position for n in range(21)]
    assert tasks[position].cancelled()
    loader.go.set()
    rest = [task for n, task in enumerate(tasks) if n != position]
    assert await asyncio.gather(*rest) == [[1]] * 20
    assert (loader.calls, loader.cancelled) == (1, 0)
    assert await memory.get("k") == [1]


@pytest.mark.parametrize("steps", range(12))
async def test_the_leader_is_cancelled_at_any_step(cache: Cache, steps: int) -> None:
    loader = Loader()
    leader = asyncio.create_task(cache.get_or_load("k", loader))
    follower = asyncio.create_task(cache.get_or_load("k", loader))
    await turns(steps)
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)
    await asyncio.wait_for(loader.started.wait(), 20)
    loader.go.set()
    assert await follower == [loader.calls]
    assert loader.cancelled == 0


async def test_the_last_one_to_leave_cancels_the_loader(cache: Cache) -> None:
    loader = Loader()
    tasks = [asyncio.create_task(cache.get_or_load("k", loader)) for _ in range(5)]
    await poll(lambda: cache.stats.misses == 5)
    await loader.started.wait()
    for task in tasks[:4]:
        task.cancel()
    await turns()
    assert loader.cancelled == 0
    tasks[4].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await poll(lambda: loader.cancelled == 1)
    assert loader.calls == 1
    assert await _gone(cache, "k")
    loader.go.set()
    assert await cache.get_or_load("k", loader) == [2]
    assert await cache.get("k") == [2]


async def test_whoever_comes_right_after_the_last_one_left_starts_a_new_load(cache: Cache) -> None:
    loader = Loader()
    task = asyncio.create_task(cache.get_or_load("k", loader))
    await loader.started.wait()
    task.cancel()
    await asyncio.sleep(0)
    loader.go.set()
    assert await cache.get_or_load("k", loader) == [2]
    assert loader.cancelled == 1


async def test_a_load_that_was_cancelled_takes_nothing_from_its_successor(cache: Cache) -> None:
    started, cleaned, clean = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def stubborn() -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await clean.wait()
            cleaned.set()
        return "never"

    task = asyncio.create_task(cache.get_or_load("k", stubborn))
    await started.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    loader = Loader()
    successor = asyncio.create_task(cache.get_or_load("k", loader))
    await loader.started.wait()
    clean.set()
    await cleaned.wait()
    await turns()
    joiner = asyncio.create_task(cache.get_or_load("k", loader))
    await poll(lambda: cache.stats.misses == 3)
    loader.go.set()
    assert await asyncio.gather(successor, joiner) == [[1], [1]]
    assert await cache.get("k") == [1]


async def test_a_loader_that_swallows_its_cancellation_stores_nothing(memory: Cache) -> None:
    started, over = asyncio.Event(), asyncio.Event()

    async def deaf() -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        over.set()
        return "half a result"

    task = asyncio.create_task(memory.get_or_load("k", deaf))
    await started.wait()
    task.cancel()
    await over.wait()
    await turns()
    assert await memory.get("k") is None


async def test_a_timeout_around_a_call(cache: Cache) -> None:
    loader = Loader()
    patient = asyncio.create_task(cache.get_or_load("k", loader))
    await loader.started.wait()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await cache.get_or_load("k", loader)
    loader.go.set()
    assert await patient == [1]


# A delete, set or clear during a load wins


async def _set_and_delete(cache: Cache) -> None:
    await cache.set("k", "set")
    await cache.delete("k")


async def _delete_and_add(cache: Cache) -> None:
    await cache.delete("k")
    assert await cache.add("k", "added")


CHANGES: dict[str, tuple[Callable[[Cache], Awaitable[object]], object]] = {
    "delete": (lambda cache: cache.delete("k"), MISSING),
    "delete_many": (lambda cache: cache.delete_many(["a", "k"]), MISSING),
    "set": (lambda cache: cache.set("k", "set"), "set"),
    "set_many": (lambda cache: cache.set_many({"k": "set"}), "set"),
    "clear": (lambda cache: cache.clear(), MISSING),
    "clear a prefix": (lambda cache: cache.clear(prefix="k"), MISSING),
    "add": (lambda cache: cache.add("k", "added"), "added"),
    "set and delete": (_set_and_delete, MISSING),
    "delete and add": (_delete_and_add, "added"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("by", ["the same cache", "another"])
async def test_a_change_during_a_load_wins(cache: Cache, backend: Backend, change: str, by: str) -> None:
    changer = cache if by == "the same cache" else backend.open()
    act, left = CHANGES[change]
    loader = Loader()
    waiters = [asyncio.create_task(cache.get_or_load("k", loader)) for _ in range(3)]
    await loader.started.wait()
    await poll(lambda: cache.stats.misses == 3)
    await act(changer)
    loader.go.set()
    assert await asyncio.gather(*waiters) == [[1]] * 3
    for each in (cache, changer, backend.open()):
        assert await each.get("k", MISSING) == left


@pytest.mark.parametrize("change", ["delete", "clear", "clear a prefix", "delete_many"])
async def test_callers_after_a_delete_start_a_new_load(cache: Cache, backend: Backend, change: str) -> None:
    first, second = Loader(), Loader()
    before = asyncio.create_task(cache.get_or_load("k", first))
    await first.started.wait()
    await CHANGES[change][0](cache)
    after = [asyncio.create_task(cache.get_or_load("k", second)) for _ in range(3)]
    await second.started.wait()
    second.go.set()
    assert await asyncio.gather(*after) == [[1]] * 3
    first.go.set()
    assert await before == [1]
    assert (first.calls, second.calls) == (1, 1)
    await cache.set("marker", 1)
    assert await backend.open().get("k") == [1]


async def test_callers_here_after_a_delete_elsewhere_start_a_new_load(tmp_path: Path) -> None:
    cache, elsewhere = (FileCache(tmp_path, timeout=30) for _ in range(2))
    first, second = Loader(), Loader(going=True)
    async with cache, elsewhere:
        before = asyncio.create_task(cache.get_or_load("k", first))
        await first.started.wait()
        await elsewhere.delete("k")
        after = asyncio.create_task(cache.get_or_load("k", second))
        await poll(lambda: cache.stats.misses == 2)
        first.go.set()
        assert await asyncio.gather(before, after) == [[1], [1]]
        assert (first.calls, second.calls) == (1, 1)


async def test_a_new_load_after_a_delete_is_what_stays(cache: Cache) -> None:
    """Whichever of the two ends first."""
    for order in ((0, 1), (1, 0)):
        await cache.delete("k")
        gates = [asyncio.Event(), asyncio.Event()]
        started = [asyncio.Event(), asyncio.Event()]

        def loader_of(n: int, started: list[asyncio.Event] = started, gates: list[asyncio.Event] = gates) -> Any:
            async def load() -> str:
                started[n].set()
                await gates[n].wait()
                return ("old", "new")[n]

            return load

        old = asyncio.create_task(cache.get_or_load("k", loader_of(0)))
        await started[0].wait()
        await cache.delete("k")
        new = asyncio.create_task(cache.get_or_load("k", loader_of(1)))
        await started[1].wait()
        for n in order:
            gates[n].set()
            await (old, new)[n]
        assert (await old, await new) == ("old", "new")
        assert await cache.get("k") == "new"


async def test_a_delete_between_lookup_and_begin_is_harmless(cache: Cache) -> None:
    for steps in range(15):
        key = f"k{steps}"
        loader = Loader(going=True)
        load = asyncio.create_task(cache.get_or_load(key, loader))
        await turns(steps)
        begun = loader.calls
        await cache.delete(key)
        assert await load == [1]
        if begun:  # stored before the delete or not at all; in no case afterwards
            assert await cache.get(key, MISSING) is MISSING


async def test_what_another_process_stored_between_lookup_and_begin_is_taken(cache: Cache, backend: Backend) -> None:
    other, loader = backend.open(), Loader(going=True)
    await other.set("k", "theirs")
    frame = await stored(other, "k")
    assert frame is not None
    asked = cache._engine.store_get

    async def too_early(keys: Any) -> list[None]:
        return [None] * len(keys)

    cache._engine.store_get = too_early  # the lookup was before the other's set, the beginning after it
    try:
        assert await cache.get_or_load("k", loader) == "theirs"
    finally:
        cache._engine.store_get = asked
    assert loader.calls == 0


async def test_two_processes_load_at_once_and_one_result_stays(cache: Cache, backend: Backend) -> None:
    other, mine, theirs = backend.open(), Loader(), Loader()
    here = asyncio.create_task(cache.get_or_load("k", mine))
    await mine.started.wait()
    there = asyncio.create_task(other.get_or_load("k", theirs))
    await poll(lambda: other.stats.misses == 1)
    mine.go.set()
    assert await here == [1]
    theirs.go.set()
    assert await there == [1]
    assert await cache.get("k") == await other.get("k") == [1]


# refresh


async def test_refresh_loads_where_there_is_something(cache: Cache) -> None:
    loader = Loader(going=True)
    await cache.set("k", "old")
    assert await cache.get_or_load("k", loader) == "old"
    assert await cache.get_or_load("k", loader, refresh=True) == [1]
    assert await cache.get("k") == [1]


async def test_concurrent_refreshes_share_a_call(cache: Cache) -> None:
    loader = Loader()
    await cache.set("k", "old")
    tasks = [asyncio.create_task(cache.get_or_load("k", loader, refresh=True)) for _ in range(100)]
    await loader.started.wait()
    assert await cache.get("k") == "old"
    loader.go.set()
    assert await asyncio.gather(*tasks) == [[1]] * 100
    assert loader.calls == 1


async def test_a_refresh_does_not_share_a_load_that_began_before_it(cache: Cache) -> None:
    first, second = Loader(), Loader()
    load = asyncio.create_task(cache.get_or_load("k", first))
    await first.started.wait()
    refresh = asyncio.create_task(cache.get_or_load("k", second, refresh=True))
    await second.started.wait()
    second.go.set()
    assert await refresh == [1]
    second_value = await cache.get("k")
    first.go.set()
    assert await load == [1]
    assert await cache.get("k") == second_value
    assert (first.calls, second.calls) == (1, 1)


async def test_a_refresh_that_fails_leaves_what_was_there(cache: Cache) -> None:
    loader = Loader(going=True)
    loader.error = Boom()
    await cache.set("k", "old")
    with pytest.raises(Boom):
        await cache.get_or_load("k", loader, refresh=True)
    assert await cache.get("k") == "old"


async def test_a_delete_during_a_refresh_wins(cache: Cache, backend: Backend) -> None:
    for changer in (cache, backend.open()):
        loader = Loader()
        await cache.set("k", "old")
        refresh = asyncio.create_task(cache.get_or_load("k", loader, refresh=True))
        await loader.started.wait()
        assert await changer.delete("k") is True
        loader.go.set()
        assert await refresh == [1]
        assert await cache.get("k", MISSING) is MISSING


# What is not stored


async def test_cache_if_says_no(cache: Cache) -> None:
    loader = Loader(going=True)
    assert await cache.get_or_load("k", loader, cache_if=lambda value: value == [2]) == [1]
    assert await cache.get("k") is None
    assert await _gone(cache, "k")
    assert await cache.get_or_load("k", loader, cache_if=lambda value: value == [2]) == [2]
    assert await cache.get_or_load("k", loader, cache_if=lambda value: value == [2]) == [2]
    assert loader.calls == 2


@dataclass
class Unlisted:
    x: int


async def test_what_cannot_be_stored_is_returned_counted_and_warned_of_once(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Unlisted] = []

    async def load() -> Unlisted:
        await asyncio.sleep(0)
        made.append(Unlisted(len(made)))
        return made[-1]

    with caplog.at_level(logging.WARNING, "mcp_hub_cache"):
        for _ in range(3):
            assert await cache.get_or_load("k", load) is made[-1]
    assert len(made) == 3
    assert cache.stats.errors == {"uncacheable": 3}
    assert len(caplog.records) == 1
    assert "Unlisted" in caplog.text
    assert await cache.get("k") is None


async def test_a_result_that_is_too_large_is_returned_and_not_stored(
    backend: Backend, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    small = backend.open(max_value_bytes=10)

    async def load() -> str:
        return "hunter2" * 10

    assert await small.get_or_load("k", load) == "hunter2" * 10
    assert await cache.get("k") is None
    assert small.stats.errors == {"uncacheable": 1}
    assert "at most 10" in caplog.text
    assert "hunter2" not in caplog.text


async def test_waiters_share_nothing_when_cache_if_says_no(memory: Cache) -> None:
    loader = Loader()
    tasks = [asyncio.create_task(memory.get_or_load("k", loader, cache_if=lambda _: False)) for _ in range(3)]
    await turns()
    loader.go.set()
    results = await asyncio.gather(*tasks)
    assert len({id(result) for result in results}) == 3


@pytest.mark.parametrize("how", ["skip", "cache_if"])
async def test_who_joins_while_it_is_decided_what_to_do_with_the_result_shares_nothing_either(
    cache: Cache, how: str
) -> None:
    """A tag that the loader adds has its mark asked for; whoever comes meanwhile has to look."""
    loop = asyncio.get_running_loop()
    options: dict[str, Any] = {"cache_if": lambda _: False} if how == "cache_if" else {}
    for number in range(60):
        key, steps, others = f"k{number}", number % 6, []

        async def load(key: str = key, steps: int = steps, others: list[Any] = others) -> list[str]:
            await asyncio.sleep(0.003)
            current_entry().tags.add(key)
            if how == "skip":
                current_entry().skip()

            def join(left: int) -> None:
                if left:
                    loop.call_soon(join, left - 1)
                else:
                    others.append(asyncio.create_task(cache.get_or_load(key, load, **options)))

            if not others:
                loop.call_soon(join, steps)
            return ["mine"]

        one = await cache.get_or_load(key, load, **options)
        await poll(lambda others=others: bool(others))  # type: ignore[misc]  # bound now
        assert await others[0] is not one
        await asyncio.gather(*others)


# Loads that wait for each other


async def test_a_loader_that_asks_for_its_own_key(cache: Cache) -> None:
    async def load() -> object:
        return await cache.get_or_load("k", load, label="load")

    with pytest.raises(CircularLoadError, match="load -> load"):
        await asyncio.wait_for(cache.get_or_load("k", load, label="load"), 20)
    assert await cache.get("k", MISSING) is MISSING


async def test_a_loader_that_catches_it_may_go_on(memory: Cache) -> None:
    async def load() -> str:
        with pytest.raises(CircularLoadError):
            await memory.get_or_load("k", load)
        return "all the same"

    assert await asyncio.wait_for(memory.get_or_load("k", load), 20) == "all the same"
    assert await memory.get("k") == "all the same"


@pytest.mark.parametrize("length", [2, 3, 10])
async def test_loads_in_a_circle(cache: Cache, length: int) -> None:
    def loader_of(n: int) -> Callable[[], Awaitable[object]]:
        async def load() -> object:
            return await cache.get_or_load(f"k{(n + 1) % length}", loader_of((n + 1) % length))

        return load

    with pytest.raises(CircularLoadError):
        await asyncio.wait_for(cache.get_or_load("k0", loader_of(0)), 20)


async def test_two_loads_that_come_to_wait_for_each_other(cache: Cache) -> None:
    both = asyncio.Barrier(2)

    def loader_of(other: str) -> Callable[[], Awaitable[object]]:
        async def load() -> object:
            await both.wait()
            return await cache.get_or_load(other, loader_of("none"))

        return load

    results = await asyncio.wait_for(
        asyncio.gather(
            cache.get_or_load("a", loader_of("b")), cache.get_or_load("b", loader_of("a")), return_exceptions=True
        ),
        20,
    )
    assert any(isinstance(result, CircularLoadError) for result in results)


async def test_a_circle_through_tasks_of_a_loader(memory: Cache) -> None:
    async def load() -> list[object]:
        async def inner() -> object:
            return await memory.get_or_load("k", load)

        return await asyncio.gather(inner(), inner())

    with pytest.raises(CircularLoadError):
        await asyncio.wait_for(memory.get_or_load("k", load), 20)


async def test_a_loader_may_ask_for_other_keys(cache: Cache) -> None:
    async def leaf() -> int:
        return 1

    async def load(n: int) -> int:
        if n == 0:
            return await cache.get_or_load("leaf", leaf)
        below = [cache.get_or_load(f"k{n - 1}", lambda: load(n - 1)) for _ in range(3)]
        return sum(await asyncio.gather(*below))

    assert await asyncio.wait_for(cache.get_or_load("top", lambda: load(5)), 20) == 3**5


async def test_a_task_that_outlives_its_loader_is_no_re_entrance(cache: Cache) -> None:
    later, results = asyncio.Event(), []

    async def load() -> int:
        async def afterwards() -> None:
            await later.wait()
            results.append(await cache.get_or_load("k", again))

        tasks.append(asyncio.create_task(afterwards()))
        return 1

    async def again() -> int:
        return 2

    tasks: list[asyncio.Task[None]] = []
    assert await cache.get_or_load("k", load) == 1
    await cache.delete("k")
    # While another load of the key is on, which the task may well wait for:
    loader = Loader()
    other = asyncio.create_task(cache.get_or_load("k", loader))
    await loader.started.wait()
    later.set()
    await turns(20)
    loader.go.set()
    await asyncio.wait_for(asyncio.gather(*tasks, other), 20)
    assert results == [[1]]


async def test_the_edges_of_a_cancelled_wait_are_gone(memory: Cache) -> None:
    """A waits for B, gives up, and then B may wait for A."""
    b_started, a_goes_on, b_asks = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def load_b() -> str:
        b_started.set()
        await b_asks.wait()
        return "b after " + await memory.get_or_load("a", load_a)

    async def load_a() -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await memory.get_or_load("b", load_b)
        b_asks.set()
        await a_goes_on.wait()
        return "a"

    b = asyncio.create_task(memory.get_or_load("b", load_b))
    await b_started.wait()
    a = asyncio.create_task(memory.get_or_load("a", load_a))
    await b_asks.wait()
    await turns()
    a_goes_on.set()
    assert await asyncio.wait_for(asyncio.gather(a, b), 20) == ["a", "b after a"]


@pytest.mark.parametrize("how", ["refresh", "delete first", "set first"])
async def test_a_loader_that_loads_its_own_key_anew(memory: Cache, how: str) -> None:
    depth = 0

    async def load() -> object:
        nonlocal depth
        depth += 1
        assert depth < 30, "it goes down without end"
        if how == "delete first":
            await memory.delete("k")
        elif how == "set first":
            await memory.set("k", 1, ttl=1e-6)
        return await memory.get_or_load("k", load, refresh=how == "refresh")

    with pytest.raises(CircularLoadError):
        await asyncio.wait_for(memory.get_or_load("k", load), 20)


# Placeholders and the store


async def test_a_load_holds_a_placeholder_and_its_result_replaces_it(cache: Cache) -> None:
    loader = Loader()
    task = asyncio.create_task(cache.get_or_load("k", loader))
    await loader.started.wait()
    frame = await stored(cache, "k")
    assert frame is not None
    assert unpack_head(frame).kind == Kind.PLACEHOLDER
    loader.go.set()
    await task
    frame = await stored(cache, "k")
    assert frame is not None
    assert unpack_head(frame).kind == Kind.ENTRY


async def test_an_evicted_placeholder_means_not_stored() -> None:
    clock = FakeClock()
    loader = Loader()
    async with Cache(MemoryStore(clock=clock)) as cache:
        task = asyncio.create_task(cache.get_or_load("k", loader))
        await loader.started.wait()
        clock.advance(HOLD + 1)  # a process that was stopped for so long has lost its place
        loader.go.set()
        assert await task == [1]
        assert await cache.get("k") is None


async def test_where_the_store_fails_loads_are_still_shared() -> None:
    store = FaultyStore(MemoryStore())
    loader = Loader()
    async with Cache(store) as cache:
        store.break_down()
        tasks = [asyncio.create_task(cache.get_or_load("k", loader)) for _ in range(100)]
        await poll(lambda: cache.stats.misses == 100)
        loader.go.set()
        assert await asyncio.gather(*tasks) == [[1]] * 100
        assert loader.calls == 1
        # One that could not look up did not try to begin or to write either.
        assert set(store.calls) == {"get_many"}


async def test_a_load_that_could_not_begin_stores_nothing() -> None:
    store = FaultyStore(MemoryStore())
    loader = Loader()
    async with Cache(store) as cache:
        store.break_down()
        task = asyncio.create_task(cache.get_or_load("k", loader))
        await loader.started.wait()
        store.repair()
        await cache.set("k", "set meanwhile by somebody")
        loader.go.set()
        assert await task == [1]
        assert await cache.get("k") == "set meanwhile by somebody"


async def test_closing_ends_loads(cache: Cache) -> None:
    before = asyncio.all_tasks()
    loader = Loader()
    task = asyncio.create_task(cache.get_or_load("k", loader))
    await loader.started.wait()
    await cache.aclose()
    assert loader.cancelled == 1
    await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 20)
    assert asyncio.all_tasks() <= before
    loader.go.set()
    assert await cache.get_or_load("k", loader) == [2]


async def test_errors_name_a_load_by_its_label_or_the_start_of_its_key(memory: Cache) -> None:
    async def load() -> object:
        return await memory.get_or_load("k" * 500, load)

    with pytest.raises(CircularLoadError) as caught:
        await memory.get_or_load("k" * 500, load)
    assert len(str(caught.value)) < 400


# Owners


async def test_clear_by_owner_takes_what_is_theirs(cache: Cache) -> None:
    async def load() -> int:
        return 1

    for n in range(300):
        await cache.get_or_load(f"mine{n}", load, owner="me")
    await cache.get_or_load("yours", load, owner="you")
    await cache.set("mine", 1)
    assert await cache.clear(owner="me", prefix="mine1") == 111
    assert await cache.clear(owner="me") == 189
    assert await cache.clear(owner="me") == 0
    assert await cache.get_many(["mine", "yours", "mine5"]) == {"mine": 1, "yours": 1}


async def test_clear_by_owner_wins_over_its_load_in_progress(cache: Cache) -> None:
    loader = Loader()
    task = asyncio.create_task(cache.get_or_load("k", loader, owner="me"))
    await loader.started.wait()
    await cache.clear(owner="me")
    loader.go.set()
    assert await task == [1]
    assert await cache.get("k") is None


async def test_clear_by_owner_wins_over_anothers_load_in_progress(cache: Cache, backend: Backend) -> None:
    loader = Loader()
    task = asyncio.create_task(cache.get_or_load("k", loader, owner="me"))
    await loader.started.wait()
    await backend.open().clear(owner="me")
    loader.go.set()
    assert await task == [1]
    assert await cache.get("k") is None


async def test_clear_by_owner_leaves_loads_of_others(cache: Cache) -> None:
    loader = Loader()
    task = asyncio.create_task(cache.get_or_load("k", loader, owner="you"))
    await loader.started.wait()
    await cache.clear(owner="me")
    loader.go.set()
    assert await task == [1]
    assert await cache.get("k") == [1]
