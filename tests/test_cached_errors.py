"""``cache_errors``: exceptions that are answers, kept for a while and raised again, here and in other processes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import MISSING, Cache, Policy, acached
from mcp_hub_cache.stores.memory import MemoryStore
from tests.backends import NAMES, poll, stored
from tests.servers import Server, valkey_server
from tests.shifted import Shifted, Source, idle, shifted


class NotFound(Exception):
    def __init__(self, name: str, *, status: int = 404) -> None:
        super().__init__(name)
        self.status = status


class Gone(NotFound):
    pass


class Unlisted(Exception):
    pass


class Holding(Exception):
    """Listed, but with something in it that can't be stored."""


ERRORS = Policy(ttl=3600, cache_errors={NotFound: 60, LookupError: 30, Holding: 60})


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture(params=NAMES)
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Shifted]:
    world = shifted(request, tmp_path)
    yield world
    await world.aclose()


@pytest.fixture
def cache(world: Shifted) -> Cache:
    return world.open()


async def raised(cache: Cache, source: Source, key: str = "k", **options: Any) -> Any:
    options = {"policy": ERRORS} | options
    with pytest.raises(Exception) as caught:  # noqa: PT011  # which one, is what is asked
        await cache.get_or_load(key, source, **options)
    return caught.value


async def test_the_second_caller_gets_the_exception_rebuilt(world: Shifted, cache: Cache) -> None:
    other, source = world.open(), Source(NotFound("it", status=410))
    source.error.add_note("a note")  # type: ignore[union-attr]
    assert await raised(cache, source) is source.error
    errors = [await raised(each, source) for each in (cache, cache, other, other)]
    for error in errors:
        assert type(error) is NotFound
        assert error.args == ("it",)
        assert vars(error) == {"status": 410, "__notes__": ["a note"]}
        assert error.__cause__ is None
    assert len({id(error) for error in (source.error, *errors)}) == 5
    assert source.calls == 1
    assert (cache.stats.hits, cache.stats.load_errors, other.stats.hits) == (2, 1, 2)


async def test_a_function_raises_it_again(world: Shifted, cache: Cache) -> None:
    calls = 0

    @acached(cache=cache, policy=ERRORS)
    async def find(name: str) -> str:
        nonlocal calls
        calls += 1
        raise NotFound(name)

    for _ in range(5):
        with pytest.raises(NotFound, match="it"):
            await find("it")
    assert calls == 1
    assert find.stats().hits == 4
    assert await find.peek("it") is MISSING
    assert await find.invalidate("it") is False  # it is no entry that anybody speaks of, and gone all the same
    with pytest.raises(NotFound):
        await find("it")
    assert calls == 2


async def test_its_trace_does_not_grow(world: Shifted, cache: Cache) -> None:
    source = Source(NotFound("it"))
    depths = set()
    for _ in range(5):
        error, depth = await raised(cache, source), 0
        trace = error.__traceback__
        while trace is not None:
            depth, trace = depth + 1, trace.tb_next
        depths.add(depth)
    assert max(depths) < 15


@pytest.mark.parametrize(
    ("make", "ttl"),
    [
        (lambda: NotFound("it"), 60),
        (lambda: Gone("it"), 60),
        (lambda: LookupError("it"), 30),
        (lambda: KeyError("it"), 30),
    ],
    ids=["listed", "derived", "another", "derived from another"],
)
async def test_each_is_kept_as_long_as_its_nearest_class(
    world: Shifted, cache: Cache, make: Callable[[], Exception], ttl: float
) -> None:
    source = Source(make())
    await raised(cache, source)
    world.advance(ttl - 1)
    assert type(await raised(cache, source)) is type(source.error)
    assert source.calls == 1
    world.advance(1.1)
    assert await raised(cache, source) is source.error
    assert source.calls == 2


async def test_the_nearest_class_decides(world: Shifted, cache: Cache) -> None:
    source = Source(Gone("it"))
    policy = Policy(cache_errors={Exception: 1000, NotFound: 60, Gone: 5})
    await raised(cache, source, policy=policy)
    world.advance(6)
    assert await raised(cache, source, policy=policy) is source.error
    assert source.calls == 2


async def test_what_is_not_listed_is_not_stored(world: Shifted, cache: Cache) -> None:
    source = Source(Unlisted("it"))
    for calls in (1, 2):
        assert await raised(cache, source) is source.error
        assert source.calls == calls
    await idle(cache)
    assert await stored(cache, "k") is None


async def test_a_failure_is_no_entry_to_anybody_else(world: Shifted, cache: Cache) -> None:
    source = Source(NotFound("it"))
    await raised(cache, source)
    await raised(cache, source)  # it is in the near cache now, where there is one
    assert await stored(cache, "k") is not None
    assert await cache.get("k", MISSING) is MISSING
    assert await cache.get_many(["k"]) == {}
    assert await cache.get_entry("k") is None
    assert await cache.exists("k") is False
    assert await cache.ttl("k") is None
    assert await cache.touch("k", 600) is False
    assert [key async for key in cache.keys()] == []  # noqa: SIM118  # no dict
    assert (await cache.status()).total_keys == 0
    assert await cache.delete("k") is False
    assert await stored(cache, "k") is None
    await raised(cache, source)
    assert source.calls == 2
    assert await cache.add("k", "added") is True
    assert await cache.get("k") == "added"


async def test_who_lists_no_errors_loads(world: Shifted, cache: Cache) -> None:
    source, good = Source(NotFound("it")), Source()
    await raised(cache, source)
    assert await cache.get_or_load("k", good, ttl=60) == [1]
    assert await cache.get("k") == [1]


async def test_who_lists_other_errors_loads(world: Shifted, cache: Cache) -> None:
    await raised(cache, Source(NotFound("it")))
    assert await cache.get_or_load("k", Source(), cache_errors={Unlisted: 5}) == [1]


@pytest.mark.parametrize("how", ["set", "delete", "clear", "invalidate"])
async def test_a_change_takes_it_away(world: Shifted, cache: Cache, how: str) -> None:
    source = Source(NotFound("it"))
    await raised(cache, source, tags=["tag"])
    arguments = {"set": ("k", "set"), "delete": ("k",), "clear": (), "invalidate": ("tag",)}[how]
    await getattr(cache, how)(*arguments)
    source.error = None
    value = await cache.get_or_load("k", source, policy=ERRORS)
    assert value == ("set" if how == "set" else [2])


async def test_a_change_during_the_load_wins_over_its_failure(world: Shifted, cache: Cache) -> None:
    for changer in (cache, world.open()):
        source = Source(NotFound("it"), held=True)
        task = asyncio.create_task(raised(cache, source))
        await source.started.wait()
        await changer.delete("k")
        source.go.set()
        assert await task is source.error
        await idle(cache)
        assert await stored(cache, "k") is None


async def test_hits_in_the_near_cache_raise_it(cache: Cache, world: Shifted) -> None:
    if world.name == "redis":
        return  # no near cache here; see ``Shifted``
    source = Source(NotFound("it"))
    for _ in range(5):
        await raised(cache, source)
    assert cache.stats.hits_by_tier["l1"] >= 3
    world.advance(61)
    await raised(cache, source)
    assert source.calls == 2


async def test_an_answer_is_never_stood_in_for_and_stands_in_for_nothing(world: Shifted, cache: Cache) -> None:
    policy = ERRORS.replace(ttl=60, stale_ttl=6000)
    await cache.set("k", "old", policy=policy)
    world.advance(61)
    source = Source(NotFound("it"))
    assert await raised(cache, source, policy=policy) is source.error
    assert type(await raised(cache, source, policy=policy)) is NotFound
    assert (source.calls, cache.stats.stale_hits) == (1, 0)
    world.advance(61)
    source.error = Unlisted()
    assert await raised(cache, source, policy=policy) is source.error


async def test_a_refresh_asks_again(world: Shifted, cache: Cache) -> None:
    source = Source(NotFound("it"))
    await raised(cache, source)
    source.error = NotFound("other")
    assert await raised(cache, source, refresh=True) is source.error
    assert (await raised(cache, source)).args == ("other",)
    source.error = None
    assert await cache.get_or_load("k", source, policy=ERRORS, refresh=True) == [3]
    assert await cache.get_or_load("k", source, policy=ERRORS) == [3]


async def test_waiters_of_one_load_share_the_one_exception(world: Shifted, cache: Cache) -> None:
    source = Source(NotFound("it"), held=True)
    tasks = [asyncio.create_task(raised(cache, source)) for _ in range(10)]
    await poll(lambda: cache.stats.misses == 10)
    source.go.set()
    assert {id(error) for error in await asyncio.gather(*tasks)} == {id(source.error)}
    assert source.calls == 1


async def test_what_can_not_be_rebuilt_is_raised_and_said_once(
    world: Shifted, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(Holding(object(), "hunter2"))
    with caplog.at_level(logging.WARNING, "mcp_hub_cache"):
        for _ in range(3):
            assert await raised(cache, source, label="find") is source.error
    assert source.calls == 3
    assert cache.stats.errors == {"uncacheable": 3}
    (record,) = caplog.records
    assert "find" in record.getMessage()
    assert "hunter2" not in caplog.text


async def test_cancelled_and_timed_out_loads_are_no_answers(world: Shifted, cache: Cache) -> None:
    source = Source(held=True)
    errors = Policy(cache_errors={Exception: 60}, timeout=0.02)
    error = await raised(cache, source, policy=errors)
    assert isinstance(error, TimeoutError)
    await idle(cache)
    assert await stored(cache, "k") is None


async def test_a_failure_that_no_class_here_goes_by_is_a_miss() -> None:
    store = MemoryStore()

    def policy() -> tuple[Policy, type[Exception]]:
        made = type("Made", (Exception,), {"__module__": "somewhere"})
        return Policy(cache_errors={made: 60}), made

    old, made = policy()
    async with Cache(store) as cache, Cache(store) as other:
        await raised(cache, Source(made("it")), policy=old)
        new, made_anew = policy()
        source = Source(made_anew("it"))
        error = await raised(other, source, policy=new)
        assert type(error) is made_anew  # the class that is listed here, by that name
        assert source.calls == 0
        assert await other.get_or_load("k", Source(), policy=ERRORS) == [1]
        assert other.stats.errors["undecodable"] > 0
