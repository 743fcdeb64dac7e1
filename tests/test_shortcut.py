"""Shortcuts: what a call may take from the near cache without the full path, and what it must never."""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
import threading
import typing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pytest

from mcp_hub_cache import Cache, MemoryCache, UncacheableError, acached
from mcp_hub_cache._reads import Reads
from mcp_hub_cache._shortcut import CURRENT
from mcp_hub_cache._stats import Counters
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock
from tests.backends import turns

TENANT: ContextVar[Any] = ContextVar("tenant")


async def bare(value: object) -> int:
    return 1


class Source:
    """Answers with something new each time, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *parts: object) -> str:
        self.calls += 1
        return f"{parts} for the {self.calls}. time"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> MemoryStore:
    return MemoryStore(clock=clock)


@pytest.fixture
async def cache(store: MemoryStore) -> typing.AsyncIterator[Cache]:
    async with Cache(store) as cache:
        yield cache


@pytest.fixture
def full_path(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The keys that were looked up by the full path."""
    seen: list[bytes] = []
    look_up = Reads.look_up

    async def noted(self: Reads, session: Any, key: bytes, *args: Any, **options: Any) -> Any:
        seen.append(key)
        return await look_up(self, session, key, *args, **options)

    monkeypatch.setattr(Reads, "look_up", noted)
    return seen


async def warm(call: Any) -> Any:
    """Call until nothing changes: loaded, read into L1, met there."""
    for _ in range(3):
        value = await call()
    return value


async def test_the_third_hit_takes_the_shortcut(cache: Cache, full_path: list[bytes]) -> None:
    source = Source()

    @acached(cache=cache)
    async def find(query: str, limit: int = 10) -> str:
        return source(query, limit)

    first = await warm(lambda: find("a"))
    full_path.clear()
    assert [await find("a"), await find("a", 10), await find(limit=10, query="a")] == [first] * 3
    assert full_path == []
    assert source.calls == 1
    assert await find("a", 11) != first
    assert await find("b") != first
    assert source.calls == 3


async def test_types_are_told_apart(cache: Cache) -> None:
    @acached(cache=cache)
    async def kind(value: Any) -> str:
        return type(value).__name__

    class Text(str):
        __slots__ = ()

    awkward = [1, True, 1.0, "1", b"1", None, 0, False, -0.0, 0.0, "", b"", (1,), [1], "\ud800", 2**70]
    for value in awkward * 4:
        assert await kind(value) == type(value).__name__
    with pytest.raises(Exception, match="Text"):
        await kind(Text("1"))


async def test_arguments_with_manners_of_their_own_take_the_full_path(cache: Cache) -> None:
    class Rude:
        def __init__(self) -> None:
            self.__cache_key__ = "rude"

        def __hash__(self) -> int:
            raise ZeroDivisionError

        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

    @acached(cache=cache, ignore=["who"])
    async def ignoring(who: Any, n: int) -> int:
        return n

    for _ in range(4):
        assert await ignoring(Rude(), 3) == 3
        assert await ignoring([], 3) == 3
    assert ignoring.stats().loads == 1


async def test_hits_are_counted_for_the_function_and_for_the_cache(cache: Cache) -> None:
    @acached(cache=cache)
    async def find(n: int) -> str:
        return str(n)

    for _ in range(10):
        await find(1)
    assert (find.stats().hits, find.stats().misses) == (9, 1)
    assert cache.stats.hits_by_tier == find.stats().hits_by_tier == {"memory": 1, "l1": 8}
    assert cache.stats.saved_seconds == pytest.approx(find.stats().saved_seconds)
    for _ in range(5):
        await cache.get(find.key(1))
    assert cache.stats.hits_by_tier["l1"] == 13
    assert find.stats().hits_by_tier["l1"] == 8


async def test_what_a_function_counted_outlives_it(cache: Cache) -> None:
    def define() -> Any:
        @acached(cache=cache)
        async def find(n: int) -> str:
            return str(n)

        return find

    for _ in range(3):
        find = define()
        for _ in range(5):
            await find(1)
        del find
        gc.collect()
    assert cache.stats.hits == 14
    assert len(cache._counters._taps) == 1  # the cache's own


async def test_what_a_view_counted_outlives_it(cache: Cache) -> None:
    for _ in range(3):
        view = cache.with_namespace("tenant")
        await view.set("k", 1)
        for _ in range(5):
            assert await view.get("k") == 1
        del view
        gc.collect()
    assert cache.stats.hits == 15
    assert len(cache._counters._taps) == 1


async def test_an_observer_hears_every_hit(store: MemoryStore) -> None:
    observer = Counters()
    async with Cache(store, observer=observer) as cache:

        @acached(cache=cache)
        async def find(n: int) -> str:
            return str(n)

        for _ in range(6):
            await find(1)
        for _ in range(6):
            await cache.get(find.key(1))
    assert observer.snapshot().hits == 11


async def test_a_mutable_value_is_nobody_elses(cache: Cache) -> None:
    @dataclass
    class Found:
        names: list[str]

    @acached(cache=cache)
    async def plain(n: int) -> dict[str, list[int]]:
        return {"n": [n]}

    @acached(cache=cache)
    async def rich(n: int) -> Found:
        return Found([str(n)])

    for _ in range(6):
        value = await plain(1)
        assert value == {"n": [1]}
        value["n"].append(2)
        found = await rich(1)
        assert found == Found(["1"])
        found.names.append("x")
        got = await cache.get(plain.key(1))
        assert got == {"n": [1]}
        got.clear()


async def test_shared_values_are_one_object_for_those_who_promised(cache: Cache) -> None:
    @acached(cache=cache, share=True, key="x:{n}")
    async def shared(n: int) -> dict[str, int]:
        return {"n": n}

    @acached(cache=cache, key="x:{n}")
    async def own(n: int) -> dict[str, int]:
        return {"n": n}

    await warm(lambda: shared(1))
    assert await shared(1) is await shared(1)
    assert await own(1) is not await own(1)
    assert await own(1) is not await shared(1)
    assert await cache.get("x:1") is not await shared(1)
    assert await cache.get_or_load("x:1", lambda: own(1), share=True) is await shared(1)


async def test_shared_objects_are_of_the_classes_asked_for(cache: Cache) -> None:
    @dataclass
    class One:
        n: int

    def define(returns: Any) -> Any:
        async def shared(n: int) -> Any:
            return One(n)

        shared.__annotations__["return"] = returns
        return acached(cache=cache, share=True, key="x:{n}")(shared)

    first, second = define(One), define(One | int)
    for _ in range(4):
        assert await first(1) == One(1) == await second(1)


async def test_all_who_share_a_load_share_its_result(cache: Cache) -> None:
    go = asyncio.Event()

    @acached(cache=cache, share=True)
    async def load(n: int) -> dict[str, int]:
        await go.wait()
        return {"n": n}

    tasks = [asyncio.create_task(load(1)) for _ in range(5)]
    await turns()
    go.set()
    values = await asyncio.gather(*tasks)
    assert {id(value) for value in values} == {id(values[0])}


@pytest.mark.parametrize(
    "change",
    ["set", "delete", "delete_many", "clear", "invalidate", "clear the function", "set_many", "foreign", "store"],
)
async def test_no_shortcut_survives_a_change(cache: Cache, store: MemoryStore, change: str) -> None:
    source = Source()

    @acached(cache=cache)
    async def find(n: int) -> str:
        return source(n)

    old = await warm(lambda: find(1))
    key = find.key(1)
    await warm(lambda: cache.get(key))
    async with Cache(store) as other:
        match change:
            case "set":
                await cache.set(key, "new")
            case "set_many":
                await cache.set_many({key: "new"})
            case "delete":
                await cache.delete(key)
            case "delete_many":
                await cache.delete_many([key])
            case "clear":
                await cache.clear()
            case "invalidate":
                await find.invalidate(1)
            case "clear the function":
                await find.clear()
            case "foreign":
                await other.delete(key)
            case "store":
                store.distrust()
                await store.delete_many([cache._key(key)])
    expected = "new" if change in {"set", "set_many"} else None
    assert await cache.get(key) == expected
    for _ in range(4):
        assert await find(1) != old
        assert await cache.get(key) != old


async def test_a_shortcut_ends_with_the_ttl(cache: Cache, clock: FakeClock) -> None:
    source = Source()

    @acached(cache=cache, ttl=10)
    async def find(n: int) -> str:
        return source(n)

    first = await warm(lambda: find(1))
    key = find.key(1)
    await warm(lambda: cache.get(key))
    clock.advance(9.9)
    assert await find(1) == await cache.get(key) == first
    clock.advance(0.2)
    assert await cache.get(key) is None
    assert await find(1) != first


async def test_a_refresh_is_joined_by_those_who_come_meanwhile(cache: Cache) -> None:
    go, source = asyncio.Event(), Source()
    go.set()

    @acached(cache=cache)
    async def find(n: int) -> str:
        await go.wait()
        return source(n)

    await warm(lambda: find(1))
    go.clear()
    refresh = asyncio.create_task(find.refresh(1))
    await turns()
    comers = [asyncio.create_task(find(1)) for _ in range(3)]
    await turns()
    go.set()
    assert len({await refresh, *(await asyncio.gather(*comers))}) == 1
    assert source.calls == 2


async def test_tables_hold_no_more_than_l1(store: MemoryStore) -> None:
    async with Cache(store, l1_max_entries=5) as cache:

        @acached(cache=cache)
        async def find(n: int) -> str:
            return str(n)

        for n in range(50):
            await warm(lambda n=n: find(n))  # type: ignore[misc]
            await warm(lambda n=n: cache.get(find.key(n)))  # type: ignore[misc]
        assert len(cache._names.table) <= 5


async def test_scopes_are_told_apart_and_an_unset_one_is_uncached(cache: Cache) -> None:
    source = Source()

    @acached(cache=cache, scope=TENANT)
    async def find(n: int) -> str:
        return source(n)

    async def of(tenant: Any) -> str:
        token = TENANT.set(tenant)
        try:
            return str(await warm(lambda: find(1)))
        finally:
            TENANT.reset(token)

    seen = [await of(tenant) for tenant in ("a", "b", None, 1, True, "a", "b", None, 1, True)]
    assert seen[:5] == seen[5:]
    assert len(set(seen)) == 5
    assert await find(1) != await find(1)


async def test_nothing_is_served_after_closing_but_by_a_new_session(cache: Cache, full_path: list[bytes]) -> None:
    source = Source()

    @acached(cache=cache)
    async def find(n: int) -> str:
        return source(n)

    first = await warm(lambda: find(1))
    await warm(lambda: cache.get(find.key(1)))
    await cache.aclose()
    assert cache._names.table == {}
    full_path.clear()
    assert await find(1) == first  # the store still has it
    assert len(full_path) == 1


def test_one_function_on_two_loops_one_after_the_other() -> None:
    source = Source()
    cache = MemoryCache()

    @acached(cache=cache)
    async def find(n: int) -> str:
        return source(n)

    async def use() -> str:
        return str(await warm(lambda: find(1)))

    assert asyncio.run(use()) == asyncio.run(use())
    loop = asyncio.new_event_loop()
    unclean = loop.run_until_complete(use())
    loop.close()  # nothing was closed properly
    assert asyncio.run(use()) == unclean
    assert source.calls == 1


def test_a_load_of_a_loop_that_died_is_joined_by_nobody() -> None:
    cache = MemoryCache()
    stuck = True

    @acached(cache=cache)
    async def find(n: int) -> str:
        if stuck:
            await asyncio.Event().wait()
        return str(n)

    async def begin() -> None:
        begun.append(asyncio.ensure_future(find(1)))
        await turns()

    begun: list[asyncio.Future[str]] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    stuck = False
    try:
        assert asyncio.run(find(1)) == "1"
    finally:
        begun[0].cancel()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(loop), return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_default_caches_of_two_loops_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a store of its own: what one loop invalidates must not come back from the other's."""
    monkeypatch.setenv("CACHE_BACKEND", "memory")

    @acached
    async def where(n: int) -> str:
        return threading.current_thread().name

    ready, done = threading.Event(), threading.Event()
    seen: list[str] = []

    async def here() -> None:
        seen.append(str(await warm(lambda: where(1))))
        assert CURRENT.cache is not None
        ready.set()
        await asyncio.to_thread(done.wait)
        seen.append(await where(1))

    async def there() -> None:
        await where.invalidate(1)  # of this loop's cache
        seen.append(await where(1))
        await where.invalidate(1)
        seen.append(str(await warm(lambda: where(1))))

    first = threading.Thread(target=lambda: asyncio.run(here()), name="first")
    first.start()
    assert ready.wait(20)
    second = threading.Thread(target=lambda: asyncio.run(there()), name="second")
    second.start()
    second.join(20)
    done.set()
    first.join(20)
    assert seen == ["first", "second", "second", "first"]


async def test_a_thousand_waiters_by_name_share_one_load(cache: Cache) -> None:
    go, source = asyncio.Event(), Source()

    @acached(cache=cache)
    async def find(n: int) -> str:
        await go.wait()
        return source(n)

    tasks = [asyncio.create_task(find(1)) for _ in range(1000)]
    await turns()
    for task in tasks[::3]:
        task.cancel()
    await turns()
    go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {result for result in results if isinstance(result, str)} == {"(1,) for the 1. time"}
    assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 334
    assert find.stats().coalesced == 666
    assert (cache.stats.misses, find.stats().misses) == (1000, 1000)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
async def test_under_eager_tasks_a_load_may_be_over_before_anybody_waits(cache: Cache) -> None:
    loop, source = asyncio.get_running_loop(), Source()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]  # not on 3.11

    @acached(cache=cache)
    async def at_once(n: int) -> str:
        return source(n)

    @acached(cache=cache)
    async def later(n: int) -> str:
        await asyncio.sleep(0)
        return source(n)

    @acached(cache=cache)
    async def failing(n: int) -> str:
        raise KeyError(n)

    try:
        for find in (at_once, later):
            async with asyncio.timeout(20):
                assert len({await find(1), *(await asyncio.gather(*(find(1) for _ in range(9))))}) == 1
                assert await find.refresh(1) == await find(1)
                await find.invalidate(1)
                assert await find(1) == await find(1)
        with pytest.raises(KeyError):
            await failing(1)
    finally:
        loop.set_task_factory(None)
    assert source.calls == 6


async def test_after_a_delete_nobody_joins_the_old_load(cache: Cache) -> None:
    gates = [asyncio.Event(), asyncio.Event()]
    source = Source()

    @acached(cache=cache)
    async def find(n: int) -> str:
        turn = source.calls
        result = source(n)
        await gates[turn].wait()
        return result

    old = asyncio.create_task(find(1))
    await turns()
    await find.invalidate(1)
    new = asyncio.create_task(find(1))
    await turns()
    gates[1].set()
    newer = await new
    gates[0].set()
    assert await old != newer
    assert await warm(lambda: find(1)) == newer


async def test_the_wrapper_is_like_the_function(cache: Cache) -> None:
    default = object()

    @acached(cache=cache, ignore=["e"])
    async def find(a: int, /, b: str = "b", *, c: bool = True, d: bytes, e: object = default) -> str:
        """Find it."""
        return f"{a} {b} {c} {d!r} {e is default}"

    assert inspect.iscoroutinefunction(find)
    assert list(inspect.signature(find).parameters) == ["a", "b", "c", "d", "e"]
    assert find.__doc__ == "Find it."
    assert find.__globals__ is globals()  # what frameworks evaluate annotations in
    assert typing.get_type_hints(find)["return"] is str
    for _ in range(4):
        assert await find(1, d=b"x") == "1 b True b'x' True"
        assert await find(1, "b", c=True, d=b"x", e=default) == "1 b True b'x' True"
        assert await find(1, "z", c=False, d=b"x") == "1 z False b'x' True"
    assert find.stats().loads == 2
    for wrong in (find, lambda: find(1), lambda: find(1, d=b"", f=1), lambda: find(a=1, d=b"")):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"find\(\)"):
            await wrong()


async def test_a_module_may_call_its_own_things_by_any_name(cache: Cache) -> None:
    names: dict[str, Any] = {"acached": acached, "cache": cache, "Exception": 3, "type": 4}
    exec("@acached(cache=cache)\nasync def find(a):\n    return str(a)", names)
    for _ in range(4):
        assert await names["find"]([1]) == "[1]"  # what can't be looked up by name
        assert await names["find"](1) == "1"


async def test_a_call_without_a_key_asks_for_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_BACKEND", "nonsense")

    @acached(scope=TENANT)
    async def find(n: int) -> int:
        return n

    assert await find(1) == 1  # its scope is not set
    with pytest.raises(UncacheableError):
        await acached(bare)(object())


async def test_parameters_may_have_any_name(cache: Cache) -> None:
    source = Source()

    @acached(cache=cache)
    async def one(type: str, near: int, get: str, value: str, call: str, changes: str, now: str) -> str:  # noqa: A002, PLR0917
        return source(type, near)

    @acached(cache=cache)
    async def other(_near: str, _type: str) -> str:
        return source(_near, _type)

    @acached(cache=cache)
    async def stars(*args: int, **options: int) -> str:
        return source(args, options)

    @acached(cache=cache)
    async def nothing() -> str:
        return source()

    for _ in range(4):
        first = await one("a", 1, "c", "d", "e", "f", "g")
        assert first == await one("a", 1, "c", "d", "e", "f", "g")
        assert await other("a", "b") == await other("a", "b") != first
        assert await stars(1, a=2) == await stars(1, a=2) != await stars(2)
        assert await nothing() == await nothing()
    assert source.calls == 5
