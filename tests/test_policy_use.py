"""Which policy holds: that of the call, of the function, of the cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from mcp_hub_cache import Cache, LoadTimeoutError, Policy, acached
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    async with Cache(MemoryStore(clock=FakeClock())) as cache:
        yield cache


async def awaited(value: object) -> Any:
    return value


async def ttl_of(cache: Cache, key: str) -> float:
    ttl = await cache.ttl(key)
    assert ttl is not None
    return ttl


async def test_the_caches_policy_holds_where_a_call_says_nothing() -> None:
    async with Cache(MemoryStore(clock=FakeClock()), policy=Policy(ttl="10m", tags=["all"]), default_ttl=5) as cache:
        await cache.get_or_load("a", lambda: awaited(1))
        await cache.set("b", 1)
        await cache.set_many({"c": 1})
        await cache.add("d", 1)
        assert [await ttl_of(cache, key) for key in "abcd"] == [600.0] * 4
        await cache.invalidate("all")
        assert await cache.get_many(list("abcd")) == {}


async def test_a_call_wins_and_none_does_not() -> None:
    async with Cache(MemoryStore(clock=FakeClock()), policy=Policy(ttl="10m"), default_ttl=5) as cache:
        shared = Policy(ttl="1m")
        given: list[tuple[dict[str, Any], float]] = [
            ({}, 600.0),
            ({"ttl": None}, 600.0),
            ({"ttl": 7}, 7.0),
            ({"policy": shared}, 60.0),
            ({"policy": shared, "ttl": None}, 60.0),
            ({"policy": shared, "ttl": 7}, 7.0),
            ({"policy": Policy()}, 5.0),  # a policy replaces the cache's as a whole
        ]
        for number, (options, ttl) in enumerate(given):
            await cache.get_or_load(f"k{number}", lambda: awaited(1), **options)
            assert await ttl_of(cache, f"k{number}") == ttl
            await cache.set(f"s{number}", 1, **options)
            assert await ttl_of(cache, f"s{number}") == ttl
        assert shared == Policy(ttl="1m")


async def test_tags_of_a_set_come_to_those_of_its_policy(cache: Cache) -> None:
    shared = Policy(tags=["policy"])
    for tag in ("policy", "call"):
        await cache.set("k", 1, policy=shared, tags=["call"])
        assert await cache.invalidate(tag)
        assert await cache.get("k") is None


async def test_a_functions_policy_is_a_change_to_the_caches() -> None:
    base = Policy(ttl="10m", stale_ttl="1h")
    clock = FakeClock()
    async with Cache(MemoryStore(clock=clock), policy=base) as cache:
        calls = 0

        async def load(name: str) -> int:
            nonlocal calls
            calls += 1
            return calls

        plain = acached(cache=cache)(load)
        swift = acached(cache=cache, version=2, soft_timeout=0)(load)  # which needs the cache's stale_ttl
        short = acached(cache=cache, version=3, ttl="1m")(load)
        other = acached(cache=cache, version=4, policy=Policy(ttl=7))(load)
        bare = acached(cache=lambda: cache, version=5)(load)
        for function, ttl in ((plain, 600.0), (swift, 600.0), (short, 60.0), (other, 7.0), (bare, 600.0)):
            await function("x")
            assert await ttl_of(cache, function.key("x")) == ttl
        clock.advance(601)
        assert await swift("x") == 2  # stale: the cache's stale_ttl and its own soft_timeout
        assert await other("x") != 4  # has none


async def test_one_policy_for_many(cache: Cache) -> None:
    shared = Policy(ttl="10m", tags=["shared"])

    @acached(cache=cache, policy=shared)
    async def one(n: int) -> int:
        return n

    @acached(cache=cache, policy=shared, ttl=None, tags=None)
    async def two(n: int) -> int:
        return n

    @acached(cache=cache, policy=shared, ttl=5)
    async def three(n: int) -> int:
        return n

    functions = (one, two, three)
    for function in functions:
        await function(1)
    assert [await ttl_of(cache, each.key(1)) for each in functions] == [600.0, 600.0, 5.0]
    await cache.invalidate("shared")
    assert [await cache.exists(each.key(1)) for each in functions] == [False] * 3


async def test_with_policy_is_the_same_function_under_another_policy(cache: Cache) -> None:
    calls = 0

    @acached(cache=cache, ttl="10m", tags=["n:{n}"])
    async def double(n: int) -> int:
        nonlocal calls
        calls += 1
        return 2 * n

    brief = double.with_policy(ttl=5, jitter=None)
    other = double.with_policy(Policy(ttl=7))
    both = double.with_policy(Policy(ttl=7), ttl=8)
    again = brief.with_policy(stale_ttl=3)
    assert brief.key(1) == double.key(1) == other.key(1)
    assert brief.__name__ == "double"
    for function, ttl in ((double, 600.0), (brief, 5.0), (other, 7.0), (both, 8.0), (again, 5.0)):
        assert await function(1) == 2
        assert await ttl_of(cache, double.key(1)) == ttl
        assert await double(1) == 2  # one entry for all
        await double.invalidate(1)
    assert calls == 5
    assert (double.stats().loads, brief.stats().loads) == (1, 1)

    await brief(1)
    await cache.invalidate("n:1")  # the function's tags stay where nothing else is said
    assert not await cache.exists(double.key(1))
    await other(1)
    await cache.invalidate("n:1")  # and go with a policy that has none
    assert await cache.exists(double.key(1))
    with pytest.raises(ValueError, match="soft_timeout needs"):
        double.with_policy(soft_timeout=0)


async def test_with_policy_on_methods(cache: Cache) -> None:
    class Client:
        def __init__(self, url: str) -> None:
            self.__cache_key__ = url

        __cache_key__ = ""

        @acached(cache=cache, ttl="10m")
        async def fetch(self, n: int) -> str:
            return f"{self.__cache_key__}/{n}"

    one, two = Client("one"), Client("two")
    brief = one.fetch.with_policy(ttl=5)
    assert await brief(1) == "one/1"
    assert await two.fetch(1) == "two/1"
    assert await one.fetch(1) == "one/1"
    assert await ttl_of(cache, one.fetch.key(1)) == await ttl_of(cache, brief.key(1)) == 5.0
    assert await ttl_of(cache, two.fetch.key(1)) == 600.0
    assert await brief.refresh(1) == "one/1"
    assert await brief.invalidate(1) is True
    assert await one.fetch.peek(1) is not None
    unbound = Client.fetch.with_policy(ttl=6)
    assert await unbound(one, 1) == "one/1"
    assert await ttl_of(cache, one.fetch.key(1)) == 6.0


async def test_rules_are_made_once_for_what_is_given_again_and_again(cache: Cache) -> None:
    shared = Policy(ttl=5)
    assert cache.rules(shared, ttl=6) is cache.rules(shared, ttl=6)
    assert cache.rules(shared, ttl=1).ttl == 1.0
    assert type(cache.rules(shared, ttl=1.0).ttl) is float
    with pytest.raises(ValueError, match="the bool"):
        cache.rules(shared, ttl=True)  # equal to 1, and no duration
    assert cache.rules(shared, tags=["a"]).tags == ("a",)
    assert cache.rules(shared, tags=["b"]).tags == ("b",)


def test_rules_of_policies_that_come_and_go_are_their_own(cache: Cache) -> None:
    """A policy that is gone may leave its id to another."""
    for number in range(1, 1000):
        assert cache.rules(Policy(ttl=number)).ttl == number


def test_a_policy_that_is_never_used_up(cache: Cache) -> None:
    def tags() -> Iterator[str]:
        yield from ("a", "b")

    @acached(cache=cache, tags=tags())
    async def function() -> int:
        return 1

    assert function.with_policy(ttl=5) is not function
    assert cache.rules(tags=tags()).tags == ("a", "b")


async def test_a_timeout_names_the_load_and_no_key(cache: Cache) -> None:
    @acached(cache=cache, timeout=0.001)
    async def slow(secret: str) -> str:
        await asyncio.Event().wait()
        return secret

    with pytest.raises(
        LoadTimeoutError, match=r"loading .*slow took more than 0\.001 s, which is its timeout"
    ) as error:
        await slow("hunter2")
    assert "hunter2" not in str(error.value)
