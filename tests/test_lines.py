"""Batching, on a clock of its own: what goes together, what waits for what, and who is told what."""

from __future__ import annotations

import asyncio
import gc
import operator
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from mcp_hub_cache import Cache
from mcp_hub_cache._exceptions import (
    StoreError,
    StoreExhaustedError,
    StoreFullError,
    StoreProtocolError,
    StoreTimeoutError,
    StoreUnreachableError,
)
from mcp_hub_cache._lane import Lane
from mcp_hub_cache._lines import Lines
from mcp_hub_cache.stores.memory import MemoryStore
from tests.backends import turns


class Timer:
    def __init__(self, when: float, callback: Callable[..., object], args: tuple[object, ...]) -> None:
        self.when, self.callback, self.args, self.live = when, callback, args, True

    def cancel(self) -> None:
        self.live = False


class FakeTime:
    """The running loop, but for its clock and timers."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[Timer] = []
        self._loop = asyncio.get_running_loop()
        self.create_future = self._loop.create_future
        self.call_soon = self._loop.call_soon

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., object], *args: object) -> Timer:
        self.timers.append(Timer(when, callback, args))
        return self.timers[-1]

    def live(self) -> list[Timer]:
        return [timer for timer in self.timers if timer.live]

    def advance(self, by: float, *, blocked: bool = False) -> None:
        """Let time pass, with every timer at its time; or, if *blocked*, as for a process that was busy meanwhile."""
        until = self.now + by
        if blocked:
            self.now = until
        while due := sorted((timer for timer in self.live() if timer.when <= until), key=lambda timer: timer.when):
            due[0].cancel()
            self.now = max(self.now, due[0].when)
            due[0].callback(*due[0].args)
        self.now = until


class Layer:
    """The layer below: records its calls, and answers when it is told to."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.futures: list[asyncio.Future[Any]] = []

    def __call__(self, items: Sequence[Any]) -> asyncio.Future[Any]:
        self.calls.append(list(items))
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]

    async def answer(self, n: int = -1) -> None:
        """Answer call *n* with what was asked, as text behind an "a"."""
        self.futures[n].set_result([_answer(item) for item in self.calls[n]])
        await turns(3)

    async def fail(self, error: BaseException, n: int = -1) -> None:
        self.futures[n].set_exception(error)
        await turns(3)


def _answer(item: Any) -> Any:
    return f"a{item.decode()}" if isinstance(item, bytes) else f"a{item}"


@pytest.fixture
async def time() -> FakeTime:
    return FakeTime()


def lane_of(time: FakeTime, **options: Any) -> Lane:
    options = {"reads_in_flight": 1, "writes_in_flight": 1, "deadline": 0.5, **options}
    return Lane(time, **options)  # type: ignore[arg-type]


@pytest.fixture
async def lane(time: FakeTime) -> Lane:
    return lane_of(time)


@pytest.fixture
async def get() -> Layer:
    return Layer()


@pytest.fixture
async def put() -> Layer:
    return Layer()


def read(lane: Lane, layer: Layer, *keys: str) -> list[asyncio.Future[Any]]:
    return [lane.read(layer, key.encode(), key) for key in keys]


def write(lane: Lane, layer: Layer, *items: str, size: int = 1) -> list[asyncio.Future[Any]]:
    """Items are a key and a number, such as "k1": the key is the letter."""
    return [lane.write(layer, item[0].encode(), item, size) for item in items]


# Batches


async def test_a_lone_request_is_off_before_its_caller_waits(lane: Lane, get: Layer, put: Layer) -> None:
    read(lane, get, "a")
    write(lane, put, "b1")
    assert get.calls == [["a"]]
    assert put.calls == [["b1"]]


async def test_what_comes_while_a_call_is_in_flight_goes_together(lane: Lane, get: Layer) -> None:
    futures = read(lane, get, "a", "b", "c", "d")
    assert get.calls == [["a"]]
    await get.answer()
    assert get.calls == [["a"], ["b", "c", "d"]]
    await get.answer()
    assert await asyncio.gather(*futures) == ["aa", "ab", "ac", "ad"]


async def test_several_batches_of_reads_may_be_in_flight_and_end_in_any_order(time: FakeTime, get: Layer) -> None:
    lane = lane_of(time, reads_in_flight=3, max_items=2)
    futures = read(lane, get, *"abcdefg")
    assert get.calls == [["a"], ["b", "c"], ["d", "e"]]
    await get.answer(1)
    assert get.calls[3:] == [["f", "g"]]
    for n in (3, 2, 0):
        await get.answer(n)
    assert await asyncio.gather(*futures) == [f"a{key}" for key in "abcdefg"]


async def test_what_comes_in_one_iteration_goes_together_though_there_is_room(time: FakeTime, get: Layer) -> None:
    lane = lane_of(time, reads_in_flight=3)
    read(lane, get, *"abc")
    assert get.calls == [["a"]]
    await turns()
    assert get.calls == [["a"], ["b", "c"]]
    read(lane, get, "d")
    await turns()
    assert get.calls[2:] == [["d"]]


async def test_who_was_answered_together_asks_together(time: FakeTime, get: Layer) -> None:
    lane = lane_of(time, reads_in_flight=3)

    async def agent(name: str) -> None:
        await lane.read(get, name.encode(), name)
        await lane.read(get, name.upper().encode(), name.upper())

    agents = [asyncio.create_task(agent(name)) for name in "abcd"]
    await turns(2)
    assert get.calls == [["a"], ["b", "c", "d"]]
    await get.answer(1)
    assert get.calls[2:] == [["B", "C", "D"]]
    for n in (0, 2, 3):
        await get.answer(n)
    await asyncio.gather(*agents)


async def test_a_batch_that_is_full_does_not_wait_for_more(time: FakeTime, get: Layer) -> None:
    lane = lane_of(time, reads_in_flight=3, max_items=2)
    read(lane, get, *"abcd")
    assert get.calls == [["a"], ["b", "c"]]


async def test_several_batches_of_writes_are_in_flight_where_no_key_is_in_two(time: FakeTime, put: Layer) -> None:
    lane = lane_of(time, writes_in_flight=3)
    write(lane, put, "a1")
    write(lane, put, "b1", "a2")
    await turns()
    assert put.calls == [["a1"]]  # b1 has gathered with a2, which must wait
    await put.answer(0)
    write(lane, put, "c1")
    await turns()
    assert put.calls[1:] == [["b1", "a2"], ["c1"]]


async def test_one_batch_of_writes_is_in_flight(lane: Lane, put: Layer) -> None:
    write(lane, put, "a1", "b1", "c1")
    assert put.calls == [["a1"]]
    await put.answer()
    assert put.calls == [["a1"], ["b1", "c1"]]


async def test_batches_are_bounded_by_count(time: FakeTime, get: Layer, put: Layer) -> None:
    lane = lane_of(time, reads_in_flight=1, max_items=4)
    read(lane, get, *"abcdefghij")
    await turns()
    write(lane, put, *(f"{key}1" for key in "klmnopqrst"))
    for layer in (get, put):
        for _ in range(3):
            await layer.answer()
        assert [len(call) for call in layer.calls] == [1, 4, 4, 1]


async def test_batches_of_writes_are_bounded_by_bytes(time: FakeTime, put: Layer) -> None:
    lane = lane_of(time, max_bytes=100)
    write(lane, put, "a1")
    write(lane, put, "b1", "c1", "d1", size=50)
    write(lane, put, "e1", size=500)
    write(lane, put, "f1", "g1", size=1)
    for _ in range(4):
        await put.answer()
    assert put.calls == [["a1"], ["b1", "c1"], ["d1"], ["e1"], ["f1", "g1"]]


async def test_calls_of_different_kinds_are_not_mixed(lane: Lane, get: Layer) -> None:
    head = Layer()
    read(lane, get, "a")
    read(lane, head, "b", "c")
    read(lane, get, "d")
    await get.answer()
    assert head.calls == [["b", "c"]]
    assert get.calls == [["a"]]
    await head.answer()
    assert get.calls == [["a"], ["d"]]


async def test_a_group_is_one_request(lane: Lane, get: Layer) -> None:
    first = lane.read_group(get, [b"a", b"b"])
    second, third = lane.read_group(get, [b"c"]), lane.read_group(get, [b"d", b"a"])
    await get.answer()
    assert get.calls == [[b"a", b"b"], [b"c", b"d", b"a"]]
    await get.answer()
    assert await asyncio.gather(first, second, third) == [["aa", "ab"], ["ac"], ["ad", "aa"]]


async def test_groups_and_single_reads_share_batches(lane: Lane, get: Layer) -> None:
    read(lane, get, "x")
    futures = [
        *read(lane, get, "a"),
        lane.read_group(get, [b"b"]),
        *read(lane, get, "c"),
        lane.read_group(get, [b"d", b"e"]),
    ]
    futures[1].cancel()
    await get.answer()
    assert get.calls[1] == ["a", b"b", "c", b"d", b"e"]
    await get.answer()
    assert [await futures[n] for n in (0, 2, 3)] == ["aa", "ac", ["ad", "ae"]]


async def test_a_large_group_goes_by_itself(time: FakeTime, get: Layer) -> None:
    lane = lane_of(time, reads_in_flight=4, max_items=3)
    read(lane, get, "x", "a", "b")
    keys = [b"%d" % n for n in range(5)]
    lane.read_group(get, keys)
    read(lane, get, "c")
    await turns()
    assert get.calls == [["x"], ["a", "b"], keys, ["c"]]


async def test_answers_that_are_there_at_once_do_not_pile_up_on_the_stack(time: FakeTime) -> None:
    lane = lane_of(time, reads_in_flight=1, max_items=1)

    def at_once(items: Sequence[Any]) -> Awaitable[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(list(items))
        return future

    gate = Layer()
    lane.read(gate, b"gate", "gate")
    lane.write(gate, b"gate", "gate", 1)
    futures = [lane.read(at_once, b"k%d" % n, n) for n in range(5000)]
    futures += [lane.write(at_once, b"w%d" % n, n, 1) for n in range(5000)]
    await gate.answer(0)
    await gate.answer(1)
    assert await asyncio.gather(*futures) == [*range(5000)] * 2


async def test_calls_may_be_coroutines(lane: Lane) -> None:
    async def get(items: Sequence[Any]) -> list[Any]:
        await asyncio.sleep(0)
        return list(items)

    futures = [lane.read(get, b"%d" % n, n) for n in range(10)]
    futures += [lane.write(get, b"%d" % n, n, 1) for n in range(10)]
    assert await asyncio.gather(*futures) == [*range(10)] * 2


# Order


async def test_a_read_waits_for_the_writes_of_its_key_that_were_asked_for_before(
    lane: Lane, get: Layer, put: Layer
) -> None:
    write(lane, put, "a1", "b1")
    futures = read(lane, get, "a", "b", "c")
    await turns()
    assert get.calls == [["c"]]
    await get.answer()
    await put.answer()  # a1 is written, b1 is in flight
    assert get.calls == [["c"], ["a"]]
    await get.answer()
    await put.answer()
    assert get.calls == [["c"], ["a"], ["b"]]
    await get.answer()
    assert [await future for future in futures] == ["aa", "ab", "ac"]


async def test_a_read_waits_for_all_writes_of_its_key(lane: Lane, get: Layer, put: Layer) -> None:
    write(lane, put, "a1", "a2")
    read(lane, get, "a")
    await put.answer()
    assert get.calls == []
    await put.answer()
    assert get.calls == [["a"]]


async def test_a_group_waits_for_the_writes_of_all_its_keys(lane: Lane, get: Layer, put: Layer) -> None:
    write(lane, put, "a1", "b1")
    future = lane.read_group(get, [b"c", b"b", b"a"])
    await put.answer()
    assert get.calls == []
    await put.answer()
    assert get.calls == [[b"c", b"b", b"a"]]
    await get.answer()
    assert await future == ["ac", "ab", "aa"]


async def test_writes_of_a_key_keep_their_order_whatever_their_kind(lane: Lane, put: Layer) -> None:
    order: list[str] = []
    delete = Layer()
    write(lane, put, "x1")
    write(lane, put, "a1")
    write(lane, delete, "a2")
    write(lane, put, "a3")
    write(lane, delete, "b1")
    write(lane, put, "b2")
    seen = {id(put): 0, id(delete): 0}
    for _ in range(10):
        for layer in (put, delete):
            if len(layer.calls) > seen[id(layer)]:
                order += layer.calls[seen[id(layer)]]
                seen[id(layer)] += 1
                await layer.answer()
    assert [item for item in order if item[0] == "a"] == ["a1", "a2", "a3"]
    assert [item for item in order if item[0] == "b"] == ["b1", "b2"]
    assert len(order) == 6


async def test_writes_of_one_key_in_one_batch_keep_their_order(lane: Lane, put: Layer) -> None:
    write(lane, put, "x1", "a1", "b1", "a2", "a3")
    await put.answer()
    assert put.calls[1] == ["a1", "b1", "a2", "a3"]


async def test_reads_see_at_least_what_was_written_before_them(time: FakeTime) -> None:
    """Random requests, cancellations and ends against a store that takes effect when it answers."""
    for seed in range(60):
        rng = random.Random(seed)
        lane = lane_of(time, reads_in_flight=2, writes_in_flight=1 + seed % 3, max_items=3, max_bytes=5)
        stored: dict[bytes, int] = {}
        flying: list[Callable[[], None]] = []

        def store_call(
            apply: Callable[[Any], Any], flying: list[Callable[[], None]] = flying
        ) -> Callable[[Sequence[Any]], Awaitable[Any]]:
            def call(items: Sequence[Any]) -> Awaitable[Any]:
                future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                flying.append(lambda: future.set_result([apply(item) for item in items]))
                return future

            return call

        get = store_call(lambda key, stored=stored: stored.get(key, 0))
        sets = [store_call(lambda item, stored=stored: stored.__setitem__(*item)) for _ in range(2)]
        written: dict[bytes, int] = {}
        reads: list[tuple[int, asyncio.Future[Any]]] = []
        groups: list[tuple[list[int], asyncio.Future[Any]]] = []
        number = 0
        for _ in range(200):
            key = rng.choice([b"a", b"b", b"c"])
            action = rng.random()
            if action < 0.1:
                keys = [b"a", b"b", b"c"][: rng.randrange(1, 4)]
                future = lane.read_group(get, keys)
                groups.append(([written.get(key, 0) for key in keys], future))
            elif action < 0.35:
                number += 1
                written[key] = number
                future = lane.write(rng.choice(sets), key, (key, number), rng.randrange(4))
                if rng.random() < 0.2:
                    future.cancel()
            elif action < 0.7:
                future = lane.read(get, key, key)
                reads.append((written.get(key, 0), future))
                if rng.random() < 0.2:
                    future.cancel()
            elif flying:
                flying.pop(rng.randrange(len(flying)))()
                await turns(rng.randrange(3))
        await turns()
        while flying:
            flying.pop(rng.randrange(len(flying)))()
            await turns(4)
        assert stored == written
        for at_least, future in reads:
            assert future.done()
            assert future.cancelled() or future.result() >= at_least
        for at_least_each, future in groups:
            assert all(map(operator.ge, future.result(), at_least_each))
        assert not lane._unwritten
        assert not lane._held


# Callers that leave


async def test_a_queued_read_that_nobody_waits_for_is_dropped(lane: Lane, get: Layer) -> None:
    futures = read(lane, get, *"abcd")
    futures[1].cancel()
    futures[3].cancel()
    await get.answer()
    assert get.calls == [["a"], ["c"]]
    await get.answer()
    assert await futures[2] == "ac"


async def test_nobody_left_in_the_queue(lane: Lane, get: Layer) -> None:
    futures = read(lane, get, *"abc")
    for future in futures:
        future.cancel()
    await get.answer()
    assert get.calls == [["a"]]
    later = read(lane, get, "d")
    assert get.calls == [["a"], ["d"]]
    await get.answer()
    assert await later[0] == "ad"


async def test_in_a_batch_a_cancelled_caller_changes_nothing_for_the_others(lane: Lane, get: Layer) -> None:
    futures = read(lane, get, *"abcd")
    await get.answer()
    futures[2].cancel()
    await get.answer()
    assert [await futures[n] for n in (0, 1, 3)] == ["aa", "ab", "ad"]


async def test_a_write_happens_even_if_nobody_waits(lane: Lane, put: Layer) -> None:
    futures = write(lane, put, "a1", "b1", "c1")
    for future in futures:
        future.cancel()
    await put.answer()
    assert put.calls == [["a1"], ["b1", "c1"]]
    await put.answer()


async def test_a_read_waits_for_a_write_whose_caller_left(lane: Lane, get: Layer, put: Layer) -> None:
    write(lane, put, "a1")[0].cancel()
    read(lane, get, "a")
    assert get.calls == []
    await put.answer()
    assert get.calls == [["a"]]


# Trouble below


@pytest.mark.parametrize("writes", [False, True])
async def test_a_store_error_reaches_every_caller_of_the_batch_and_no_other(
    lane: Lane, get: Layer, writes: bool
) -> None:
    ask = (lambda *names: write(lane, get, *names)) if writes else (lambda *names: read(lane, get, *names))
    futures = ask("a", "b", "c")
    error = StoreFullError("no room.")
    await get.answer()
    await get.fail(error)
    assert await futures[0] == "aa"
    for future in futures[1:]:
        assert future.exception() is error
    after = ask("d")
    await get.answer()
    assert await after[0] == "ad"


async def test_an_unexpected_error_is_made_a_store_error(lane: Lane, get: Layer) -> None:
    futures = read(lane, get, "a")
    cause = ZeroDivisionError("hunter2")
    await get.fail(cause)
    error = futures[0].exception()
    assert isinstance(error, StoreError)
    assert error.__cause__ is cause
    assert "ZeroDivisionError" in str(error)
    assert "hunter2" not in str(error)


async def test_a_call_that_raises_at_once(lane: Lane) -> None:
    def broken(items: Sequence[Any]) -> Awaitable[Any]:
        raise StoreUnreachableError("gone.")

    futures = [lane.read(broken, b"a", 1), lane.read(broken, b"b", 1), lane.write(broken, b"a", 1, 1)]
    for future in futures:
        assert isinstance(future.exception(), StoreUnreachableError)
    assert not lane._unwritten


@pytest.mark.parametrize("answers", [[], [1], [1, 2, 3]])
async def test_a_wrong_number_of_answers_is_an_error_for_all(lane: Lane, get: Layer, answers: list[int]) -> None:
    futures = read(lane, get, "x", "a", "b")
    await get.answer()
    get.futures[-1].set_result(answers)
    await turns()
    for future in futures[1:]:
        error = future.exception()
        assert isinstance(error, StoreProtocolError)
        assert f"2 requests got {len(answers)} answers" in str(error)


async def test_a_call_that_is_cancelled_below(lane: Lane, get: Layer) -> None:
    futures = read(lane, get, "a")
    get.futures[0].cancel()
    await turns()
    assert isinstance(futures[0].exception(), StoreUnreachableError)


async def test_the_outcome_of_an_item_may_be_an_error(lane: Lane, put: Layer) -> None:
    futures = write(lane, put, "a1")
    error = StoreFullError("no room.")
    put.futures[0].set_result([error])
    assert await futures[0] is error


async def test_a_queue_has_an_end(time: FakeTime, get: Layer, put: Layer) -> None:
    lane = lane_of(time, reads_in_flight=1, max_queued=3, max_items=1)
    reads = read(lane, get, *"abcde")
    await turns()
    writes = write(lane, put, *(f"{key}1" for key in "klmno"))
    for refused in (reads[4], writes[4]):
        assert isinstance(refused.exception(), StoreExhaustedError)
    # What was refused holds nobody up.
    for _ in "abcd":
        await get.answer()
    after = read(lane, get, "o")
    await get.answer()
    assert await after[0] == "ao"


# The deadline


async def test_the_deadline_frees_the_caller(time: FakeTime, lane: Lane, get: Layer, put: Layer) -> None:
    futures = [*read(lane, get, "a", "b"), *write(lane, put, "c1", "d1"), *read(lane, get, "c")]
    await turns()
    time.advance(0.499)
    assert not any(future.done() for future in futures)
    time.advance(0.001)
    for future in futures:  # in flight, queued, or held back: one deadline for all
        error = future.exception()
        assert isinstance(error, StoreTimeoutError)
        assert "0.5 s" in str(error)


async def test_each_has_a_deadline_of_its_own(time: FakeTime, lane: Lane, get: Layer) -> None:
    first = read(lane, get, "a")[0]
    time.advance(0.3)
    second = read(lane, get, "b")[0]
    await turns()
    time.advance(0.2)
    assert isinstance(first.exception(), StoreTimeoutError)
    assert not second.done()
    time.advance(0.3)
    assert isinstance(second.exception(), StoreTimeoutError)


async def test_one_timer_watches_them_all_and_none_when_idle(time: FakeTime, lane: Lane, get: Layer) -> None:
    futures = read(lane, get, *(f"k{n}" for n in range(100)))
    assert len(time.live()) == 1
    await get.answer()
    await get.answer()
    await get.answer()
    assert all(future.done() for future in futures)
    time.advance(10)
    assert time.live() == []


async def test_a_late_answer_hurts_nobody(time: FakeTime, lane: Lane, get: Layer, put: Layer) -> None:
    late = [*read(lane, get, "a"), *write(lane, put, "b1")]
    time.advance(0.5)
    for future in late:
        assert isinstance(future.exception(), StoreTimeoutError)
    futures = read(lane, get, "c")
    await get.answer(0)
    await put.answer(0)
    await get.answer()
    assert await futures[0] == "ac"
    assert await _after_write(lane, get) == "ab"


async def _after_write(lane: Lane, get: Layer) -> Any:
    future = read(lane, get, "b")[0]
    await get.answer()
    return await future


async def test_stuck_reads_give_their_places_to_others(time: FakeTime, get: Layer) -> None:
    lane = lane_of(time, reads_in_flight=2)
    stuck = read(lane, get, "a", "b")
    await turns()
    time.advance(0.5)
    assert all(isinstance(future.exception(), StoreTimeoutError) for future in stuck)
    others = read(lane, get, "c", "d")
    await turns()
    assert get.calls[2:] == [["c"], ["d"]]
    await get.answer(2)
    await get.answer(3)
    assert [await future for future in others] == ["ac", "ad"]


async def test_a_store_that_never_answers_is_not_buried_in_calls(time: FakeTime, get: Layer) -> None:
    lane = lane_of(time, reads_in_flight=2)
    for n in range(100):
        future = read(lane, get, f"k{n}")[0]
        await turns(2)
        time.advance(0.5)
        assert isinstance(future.exception(), StoreTimeoutError)
    assert len(get.calls) <= 4 * 2 + 2


async def test_a_stuck_write_is_not_overtaken(time: FakeTime, lane: Lane, get: Layer, put: Layer) -> None:
    first = write(lane, put, "a1")
    time.advance(0.5)
    assert isinstance(first[0].exception(), StoreTimeoutError)
    second = write(lane, put, "a2")
    reading = read(lane, get, "a")
    assert (put.calls, get.calls) == ([["a1"]], [])
    await put.answer(0)
    await put.answer(1)
    await get.answer()
    assert await second[0] == "aa2"
    assert await reading[0] == "aa"


async def test_a_timer_that_is_late_itself_proves_nothing_against_the_store(
    time: FakeTime, lane: Lane, get: Layer
) -> None:
    futures = read(lane, get, "a")
    time.advance(30.0, blocked=True)  # a debugger, a suspended laptop, a long computation
    assert not futures[0].done()
    await get.answer()
    assert await futures[0] == "aa"


async def test_but_it_is_put_off_and_not_given_up(time: FakeTime, lane: Lane, get: Layer) -> None:
    futures = read(lane, get, "a")
    time.advance(30.0, blocked=True)
    time.advance(1.0)
    assert isinstance(futures[0].exception(), StoreTimeoutError)


# Closing


async def test_closing_ends_everything(time: FakeTime, lane: Lane, get: Layer, put: Layer) -> None:
    futures = [*write(lane, put, "c1", "d1"), *read(lane, get, "a", "b", "d")]
    await turns()
    late = read(lane, get, "e")
    await lane.aclose()
    futures += late
    assert get.futures[0].cancelled()
    assert put.futures[0].cancelled()
    for future in futures:
        assert isinstance(future.exception(), StoreUnreachableError)
    assert time.live() == []


async def test_closing_waits_for_what_it_ends(time: FakeTime) -> None:
    ended = []

    async def slow(items: Sequence[Any]) -> list[Any]:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(1)
        return []

    lane = lane_of(time)
    future = lane.read(slow, b"a", 1)
    await turns(2)
    before = asyncio.all_tasks()
    await lane.aclose()
    assert ended == [1]
    assert len(asyncio.all_tasks()) == len(before) - 1
    assert isinstance(future.exception(), StoreUnreachableError)


async def test_a_call_that_is_ended_before_its_first_step_leaves_no_warning(time: FakeTime) -> None:
    async def call(items: Sequence[Any]) -> list[Any]:
        return list(items)

    lane = lane_of(time)
    coroutines: list[Any] = []

    def asked(items: Sequence[Any]) -> Any:
        coroutines.append(call(items))
        return coroutines[-1]

    future = lane.read(asked, b"a", 1)
    await lane.aclose()
    assert isinstance(future.exception(), StoreUnreachableError)
    gc.collect()
    assert coroutines[0].cr_frame is None, "it was closed, and not dropped"


# Lines


async def test_keys_of_different_lanes_never_share_a_batch(get: Layer) -> None:
    lines = Lines(asyncio.get_running_loop(), lambda key: key[:1], deadline=5)
    for key in (b"a1", b"b1", b"a2", b"b2", b"a3"):
        lines.read(get, key, key.decode())
    assert lines.lane(b"a1") is lines.lane(b"a2") is not lines.lane(b"b1")
    assert not any({"a", "b"} <= {item[0] for item in call} for call in get.calls)
    assert ["b1"] in get.calls
    await lines.aclose()


async def test_a_key_stays_in_its_lane_until_its_writes_are_over(get: Layer, put: Layer) -> None:
    big: set[bytes] = set()
    lines = Lines(asyncio.get_running_loop(), lambda key: key in big, deadline=5)
    lines.write(put, b"a", "a1")
    small = lines.lane(b"a")
    big.add(b"a")
    lines.read(get, b"a", "a")
    lines.write(put, b"a", "a2")
    await turns()
    assert (put.calls, get.calls) == ([["a1"]], [])
    await put.answer()
    assert (put.calls, get.calls) == ([["a1"], ["a2"]], [])
    await put.answer()
    assert get.calls == [["a"]]
    assert lines.lane(b"a") is not small
    await get.answer()
    await lines.aclose()


async def test_groups_are_split_by_lane(get: Layer) -> None:
    lines = Lines(asyncio.get_running_loop(), lambda key: key[:1], deadline=5)
    parts = lines.read_groups(get, [b"a1", b"b1", b"a2"])
    assert [part for part, _ in parts] == [[b"a1", b"a2"], [b"b1"]]
    await get.answer(0)
    await get.answer(1)
    assert [await future for _, future in parts] == [["aa1", "aa2"], ["ab1"]]
    await lines.aclose()


async def test_settling_waits_for_the_writes_asked_for_until_then(put: Layer) -> None:
    lines = Lines(asyncio.get_running_loop(), lambda key: key[:1], deadline=20)
    await lines.settle()
    for key in (b"a1", b"a2", b"b1"):
        lines.write(put, key, key.decode())
    settling = asyncio.create_task(lines.settle())
    await turns()
    await put.answer(0)
    await put.answer(1)
    assert not settling.done()
    lines.write(put, b"b2", "b2")
    await put.answer(2)
    await asyncio.wait_for(settling, 20)
    await put.answer(3)
    await lines.aclose()


@pytest.mark.parametrize("queued", [False, True])
async def test_settling_waits_for_writes_whose_callers_left(put: Layer, queued: bool) -> None:
    lines = Lines(asyncio.get_running_loop(), lambda key: None, deadline=20)
    futures = [lines.write(put, b"a", f"a{n}") for n in range(2 if queued else 1)]
    futures[-1].cancel()
    if queued:
        await put.answer()
    settling = asyncio.create_task(lines.settle())
    await turns()
    try:
        assert put.calls[-1] == ["a1" if queued else "a0"]
        assert not settling.done()
    finally:
        await put.answer()
        await asyncio.wait_for(settling, 20)
        await lines.aclose()


async def test_settling_has_the_deadline_too(put: Layer) -> None:
    lines = Lines(asyncio.get_running_loop(), lambda key: None, deadline=0.01)
    future = lines.write(put, b"a", "a1")
    await asyncio.wait_for(lines.settle(), 20)
    await asyncio.gather(future, return_exceptions=True)
    await lines.aclose()


async def test_closing_lets_writes_end(put: Layer) -> None:
    lines = Lines(asyncio.get_running_loop(), lambda key: None, deadline=20)
    futures = [lines.write(put, b"a", "a1"), lines.write(put, b"b", "b1")]
    closing = asyncio.create_task(lines.aclose())
    await turns()
    await put.answer(0)
    await put.answer(1)
    await asyncio.wait_for(closing, 20)
    assert [await future for future in futures] == ["aa1", "ab1"]


class SlowWrites(MemoryStore):
    """Writes take effect late, as those of a thread or a server do."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.started = asyncio.Event()

    async def write_many(self, writes: Any, /) -> Any:
        self.started.set()
        await self.go.wait()
        return await super().write_many(writes)


async def test_a_clear_wins_over_a_set_whose_caller_left_before() -> None:
    store = SlowWrites()
    async with Cache(store, timeout=20) as cache:
        setting = asyncio.create_task(cache.set("k", "old"))
        await store.started.wait()
        setting.cancel()
        await asyncio.gather(setting, return_exceptions=True)
        clearing = asyncio.create_task(cache.clear())
        await turns()
        store.go.set()
        await clearing
        assert await cache.get("k") is None
