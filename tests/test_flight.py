"""Single flight: joining, leaving, landing and detaching, and who waits for whom."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mcp_hub_cache import CacheError, CircularLoadError
from mcp_hub_cache import _flight as flight_module
from mcp_hub_cache._flight import Flight, Flights
from tests.backends import poll, turns


@pytest.fixture
async def flights() -> AsyncIterator[Flights]:
    flights = Flights(asyncio.get_running_loop())
    yield flights
    await flights.aclose()


class Work:
    """Starts, waits until it is let go, and yields its name."""

    def __init__(self, name: str = "result") -> None:
        self.name = name
        self.started = asyncio.Event()
        self.go = asyncio.Event()
        self.calls = 0
        self.cancelled = 0
        self.flight: Flight | None = None

    async def __call__(self, flight: Flight) -> str:
        self.calls += 1
        self.flight = flight
        flight.begun = True
        self.started.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.name


async def fly(
    flights: Flights, key: bytes, name: str, work: Any, *, anew: bool = False, group: object = None
) -> tuple[Any, bool]:
    flight, leads = flights.board(key, name, work, anew=anew, group=group)
    return await flights.wait(flight), leads


def run(flights: Flights, work: Any, key: bytes = b"k", *, anew: bool = False) -> asyncio.Task[tuple[Any, bool]]:
    return asyncio.create_task(fly(flights, key, key.decode(), work, anew=anew))


async def test_one_leads_and_the_others_join(flights: Flights) -> None:
    work = Work()
    tasks = [run(flights, work) for _ in range(5)]
    await work.started.wait()
    assert flights.joinable(b"k") is not None
    assert len(flights) == 1
    work.go.set()
    assert await asyncio.gather(*tasks) == [("result", True)] + [("result", False)] * 4
    assert work.calls == 1
    assert flights.joinable(b"k") is None
    assert len(flights) == 0


async def test_keys_fly_apart(flights: Flights) -> None:
    a, b = Work("a"), Work("b")
    tasks = [run(flights, a, b"a"), run(flights, b, b"b")]
    await turns()
    assert len(flights) == 2
    b.go.set()
    assert await tasks[1] == ("b", True)
    a.go.set()
    assert await tasks[0] == ("a", True)


async def test_after_landing_the_work_is_called_anew(flights: Flights) -> None:
    work = Work()
    work.go.set()
    assert await run(flights, work) == await run(flights, work) == ("result", True)
    assert work.calls == 2


async def test_what_has_landed_goes_without_the_collector(flights: Flights) -> None:
    class Result:
        pass

    async def work(flight: Flight) -> Result:
        return Result()

    gc.disable()
    try:
        result = weakref.ref((await fly(flights, b"k", "k", work))[0])
        await turns()
        assert result() is None
    finally:
        gc.enable()


async def test_an_error_is_the_same_object_for_all(flights: Flights) -> None:
    error = LookupError("x")

    async def fail(flight: Flight) -> None:
        await asyncio.sleep(0)
        raise error

    results = await asyncio.gather(*(run(flights, fail) for _ in range(5)), return_exceptions=True)
    assert all(result is error for result in results)
    assert flights.joinable(b"k") is None


async def test_work_that_fails_before_its_first_await(flights: Flights) -> None:
    def fail(flight: Flight) -> Any:
        raise LookupError

    with pytest.raises(LookupError):
        await fly(flights, b"k", "k", fail)


async def test_no_task_says_that_its_error_was_never_retrieved(flights: Flights) -> None:
    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    work = Work()

    async def fail(flight: Flight) -> None:
        await work(flight)
        raise LookupError

    task = run(flights, fail)
    await work.started.wait()
    flights.detach(b"k")
    task.cancel()
    work.go.set()
    await asyncio.gather(task, return_exceptions=True)
    await turns()
    gc.collect()
    assert heard == []


# Leaving


@pytest.mark.parametrize("position", range(5))
async def test_whoever_leaves_leaves_alone(flights: Flights, position: int) -> None:
    work = Work()
    tasks = [run(flights, work) for _ in range(5)]
    await work.started.wait()
    await turns()
    tasks[position].cancel()
    await turns()
    assert [task.done() for task in tasks] == [n == position for n in range(5)]
    work.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [n == position for n in range(5)]
    assert work.cancelled == 0


async def test_the_last_one_to_leave_cancels_the_work(flights: Flights) -> None:
    work = Work()
    tasks = [run(flights, work) for _ in range(3)]
    await work.started.wait()
    await turns()
    for n, task in enumerate(tasks):
        assert work.cancelled == 0, f"{n} had left"
        task.cancel()
        await turns()
    assert work.cancelled == 1
    assert flights.joinable(b"k") is None


async def test_work_that_is_cancelled_before_its_first_step(flights: Flights) -> None:
    work = Work()
    tasks = [run(flights, work) for _ in range(2)]
    await asyncio.sleep(0)  # the callers wait; the work has not had a step yet
    await flights.aclose()
    assert work.calls == 0
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert [type(result) for result in results] == [CacheError] * 2
    assert len(flights) == 0
    assert not flights._flights
    with pytest.raises(CacheError, match="closed while"):  # nobody would end what began now
        await run(flights, work)
    assert work.calls == 0


async def test_a_caller_that_is_cancelled_before_it_runs_starts_nothing(flights: Flights) -> None:
    work = Work()
    task = run(flights, work)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert work.calls == 0
    assert len(flights) == 0


async def test_leaving_in_the_very_step_of_the_landing(flights: Flights) -> None:
    work = Work()
    leaver, other = run(flights, work), run(flights, work)
    await work.started.wait()
    await turns()
    work.go.set()
    await asyncio.sleep(0)  # landed: the futures are set, the callers have not run yet
    leaver.cancel()
    results = await asyncio.gather(leaver, other, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1] == ("result", False)


async def test_whoever_joins_a_cancelled_flight_starts_a_new_one(flights: Flights) -> None:
    work = Work()
    first = run(flights, work)
    await work.started.wait()
    first.cancel()
    await asyncio.sleep(0)
    second = run(flights, work)
    await turns()
    work.go.set()
    assert await second == ("result", True)
    assert (work.calls, work.cancelled) == (2, 1)


async def test_a_cancelled_flight_does_not_take_its_successor_with_it(flights: Flights) -> None:
    slow_end = asyncio.Event()

    async def stubborn(flight: Flight) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await slow_end.wait()

    first = run(flights, stubborn)
    await turns()
    first.cancel()
    await turns()
    work = Work()
    second = run(flights, work)
    await work.started.wait()
    slow_end.set()
    await turns()
    assert flights.joinable(b"k") is not None
    third = run(flights, Work("never"))
    await turns()
    work.go.set()
    assert await asyncio.gather(second, third) == [("result", True), ("result", False)]


async def test_work_that_raises_cancelled_error_reaches_all(flights: Flights) -> None:
    async def cancels_itself(flight: Flight) -> None:
        await asyncio.sleep(0)
        raise asyncio.CancelledError("of its own")

    results = await asyncio.wait_for(
        asyncio.gather(*(run(flights, cancels_itself) for _ in range(3)), return_exceptions=True), 20
    )
    assert [type(result) for result in results] == [asyncio.CancelledError] * 3


# Detaching


async def test_a_detached_flight_serves_those_who_wait_and_nobody_else(flights: Flights) -> None:
    old, new = Work("old"), Work("new")
    before = [run(flights, old) for _ in range(2)]
    await old.started.wait()
    await turns()
    flights.detach(b"k")
    assert old.flight is not None
    assert old.flight.detached
    after = [run(flights, new) for _ in range(2)]
    await new.started.wait()
    old.go.set()
    assert await asyncio.gather(*before) == [("old", True), ("old", False)]
    # The old one's landing left the new one where it was.
    assert flights.joinable(b"k") is not None
    new.go.set()
    assert await asyncio.gather(*after) == [("new", True), ("new", False)]


async def test_a_detached_flight_that_everybody_leaves_is_cancelled(flights: Flights) -> None:
    old, new = Work("old"), Work("new")
    before = run(flights, old)
    await old.started.wait()
    flights.detach(b"k")
    after = run(flights, new)
    await new.started.wait()
    before.cancel()
    await turns()
    assert old.cancelled == 1
    assert flights.joinable(b"k") is not None
    new.go.set()
    assert await after == ("new", True)


async def test_detaching_what_is_not_there(flights: Flights) -> None:
    flights.detach(b"k")
    flights.detach_all(b"")


async def test_detaching_by_prefix(flights: Flights) -> None:
    works = {key: Work() for key in (b"a:1", b"a:2", b"ab", b"b")}
    tasks = [run(flights, work, key) for key, work in works.items()]
    await turns()
    flights.detach_all(b"a:")
    assert {key for key in works if flights.joinable(key) is not None} == {b"ab", b"b"}
    for work in works.values():
        work.go.set()
    assert [await task for task in tasks] == [("result", True)] * 4


async def test_anew_joins_what_is_anew_and_has_not_begun(flights: Flights) -> None:
    asked = asyncio.Event()

    async def begins_late(flight: Flight) -> str:
        await asked.wait()
        flight.begun = True
        await asyncio.sleep(0)
        return "late"

    first = run(flights, begins_late, anew=True)
    await turns()
    second = run(flights, begins_late, anew=True)
    third = run(flights, begins_late)
    await turns()
    asked.set()
    assert await asyncio.gather(first, second, third) == [("late", True), ("late", False), ("late", False)]


async def test_anew_does_not_join_what_may_find_the_old_value(flights: Flights) -> None:
    """A load that was not meant to be anew may yet find an entry when it begins, and call nothing."""
    begun = asyncio.Event()

    async def finds_something(flight: Flight) -> str:
        await begun.wait()
        return "found"

    first = run(flights, finds_something)
    await turns()
    new = Work("new")
    second = run(flights, new, anew=True)
    await new.started.wait()
    begun.set()
    new.go.set()
    assert await asyncio.gather(first, second) == [("found", True), ("new", True)]


async def test_anew_detaches_what_has_begun(flights: Flights) -> None:
    old, new = Work("old"), Work("new")
    first = run(flights, old)
    await old.started.wait()
    second = run(flights, new, anew=True)
    await new.started.wait()
    third = run(flights, Work("never"))
    await turns()
    assert old.flight is not None
    assert old.flight.detached
    new.go.set()
    old.go.set()
    assert await asyncio.gather(first, second, third) == [("old", True), ("new", True), ("new", False)]


# Who waits for whom


async def test_a_flight_that_joins_itself(flights: Flights) -> None:
    async def work(flight: Flight) -> Any:
        return await fly(flights, b"k", "k", work)

    with pytest.raises(CircularLoadError, match="k -> k"):
        await asyncio.wait_for(fly(flights, b"k", "k", work), 20)
    assert len(flights) == 0


async def test_a_circle_is_named_in_its_order(flights: Flights) -> None:
    def work_of(key: str) -> Any:
        following = {"a": "b", "b": "c", "c": "a"}[key]

        async def work(flight: Flight) -> Any:
            return await fly(flights, following.encode(), following, work_of(following))

        return work

    with pytest.raises(CircularLoadError, match="c -> a -> b -> c"):
        await asyncio.wait_for(fly(flights, b"a", "a", work_of("a")), 20)


async def test_a_circle_by_a_way_round(flights: Flights) -> None:
    """a waits for b and c at once; c for d; d for a."""

    async def d(flight: Flight) -> Any:
        return await fly(flights, b"a", "a", a)

    async def c(flight: Flight) -> Any:
        return await fly(flights, b"d", "d", d)

    b = Work("b")

    async def a(flight: Flight) -> Any:
        return await asyncio.gather(fly(flights, b"b", "b", b), fly(flights, b"c", "c", c))

    with pytest.raises(CircularLoadError):
        await asyncio.wait_for(fly(flights, b"a", "a", a), 20)
    b.go.set()


async def test_diamonds_are_no_circles(flights: Flights) -> None:
    """a waits for b and c, which both wait for d."""

    async def leaf(flight: Flight) -> str:
        await asyncio.sleep(0)
        return "d"

    async def middle(flight: Flight) -> Any:
        return (await fly(flights, b"d", "d", leaf))[0]

    async def top(flight: Flight) -> Any:
        parts = await asyncio.gather(*(fly(flights, key, key.decode(), middle) for key in (b"b", b"c", b"b")))
        return [part for part, _ in parts]

    result, _ = await asyncio.wait_for(fly(flights, b"a", "a", top), 20)
    assert result == ["d", "d", "d"]


async def test_edges_are_gone_with_their_wait(flights: Flights) -> None:
    other = Work("other")
    edges: list[int] = []

    async def work(flight: Flight) -> str:
        for _ in range(2):
            task = asyncio.create_task(fly(flights, b"other", "other", other))
            await turns()
            edges.append(len(flight.waits_for))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            edges.append(len(flight.waits_for))
        return "done"

    assert await asyncio.wait_for(fly(flights, b"k", "k", work), 20) == ("done", True)
    assert edges == [1, 0, 1, 0]


async def test_two_waits_of_one_flight_for_another_are_two(flights: Flights) -> None:
    other = Work("other")
    edges: list[int] = []

    async def work(flight: Flight) -> Any:
        tasks = [asyncio.create_task(fly(flights, b"other", "other", other)) for _ in range(2)]
        await turns()
        edges.append(len(flight.waits_for))
        tasks[0].cancel()
        await turns()
        edges.append(len(flight.waits_for))
        other.go.set()
        return await tasks[1]

    await asyncio.wait_for(fly(flights, b"k", "k", work), 20)
    assert edges == [1, 1]


async def test_a_task_that_outlives_its_flight_is_free(flights: Flights) -> None:
    later = asyncio.Event()
    results: list[Any] = []
    tasks: list[asyncio.Task[None]] = []

    async def afterwards() -> None:
        await later.wait()
        results.append(await fly(flights, b"k", "k", Work("never called")))

    async def work(flight: Flight) -> str:
        tasks.append(asyncio.create_task(afterwards()))
        return "done"

    await fly(flights, b"k", "k", work)
    again = Work("again")
    second = run(flights, again)
    await again.started.wait()
    later.set()
    await turns()
    again.go.set()
    await asyncio.wait_for(asyncio.gather(second, *tasks), 20)
    assert results == [("again", False)]


# The end


async def test_closing_cancels_and_waits(flights: Flights) -> None:
    before = asyncio.all_tasks()
    works = [Work() for _ in range(3)]
    tasks = [run(flights, work, f"k{n}".encode()) for n, work in enumerate(works)]
    await turns()
    flights.detach(b"k1")  # detached ones are closed as well
    await flights.aclose()
    assert [work.cancelled for work in works] == [1, 1, 1]
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, CacheError)
        assert "closed" in str(result)
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("how", ["patience", "timeout"])
async def test_closing_waits_no_longer_than_said_for_what_is_deaf_to_it(
    flights: Flights, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()

    async def deaf(flight: Flight) -> str:
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue
        return "at last"

    monkeypatch.setattr(flight_module, "_PATIENCE", 0.01 if how == "patience" else 3600)
    task = asyncio.create_task(fly(flights, b"k", "k", deaf))
    await turns()
    if how == "patience":
        await flights.aclose()
    else:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await flights.aclose()
    with pytest.raises(CacheError, match="closed"):
        await task
    go.set()
    await poll(lambda: len(asyncio.all_tasks()) == 1)


async def test_what_flew_is_collected(flights: Flights) -> None:
    class Big:
        pass

    async def work(flight: Flight) -> Big:
        return Big()

    result, _ = await fly(flights, b"k", "k", work)
    reference = weakref.ref(result)
    del result
    await turns()
    gc.collect()
    assert reference() is None
