"""``@acached``: what it makes of a function, which calls share an entry, and what comes back."""

from __future__ import annotations

import asyncio
import enum
import functools
import gc
import inspect
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypedDict, TypeVar
from uuid import UUID

import msgspec
import pydantic
import pytest

from mcp_hub_cache import (
    FOREVER,
    MISSING,
    AsyncCache,
    Cache,
    CircularLoadError,
    MemoryCache,
    Policy,
    SettingsError,
    UncacheableError,
    acached,
    default_cache,
)
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock
from tests.backends import NAMES, Backend, poll, turns
from tests.servers import Server, valkey_server

T = TypeVar("T")


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    server = request.getfixturevalue("valkey") if request.param == "redis" else None
    return Backend(request.param, tmp_path, server)


@pytest.fixture
async def each(backend: Backend) -> AsyncIterator[Cache]:
    """A cache on each backend."""
    yield backend.open()
    await backend.aclose()


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    async with MemoryCache() as cache:
        yield cache


class Boom(Exception):
    pass


async def keys_of(cache: AsyncCache) -> list[str]:
    return [key async for key in cache.keys()]  # noqa: SIM118  # no dict


# On each backend


async def test_the_second_call_is_a_hit(each: Cache) -> None:
    calls = []

    @acached(cache=each)
    async def search(query: str, limit: int = 10) -> list[str]:
        calls.append((query, limit))
        return [query] * limit

    assert await search("a", 2) == ["a", "a"]
    assert await search("a", limit=2) == ["a", "a"]
    assert await search(query="a", limit=2) == ["a", "a"]
    assert await search("b", 2) == ["b", "b"]
    assert calls == [("a", 2), ("b", 2)]
    assert search.stats().hits == 2
    assert search.stats().misses == 2


async def test_a_thousand_concurrent_callers_are_one_call(each: Cache) -> None:
    calls = 0
    go = asyncio.Event()

    @acached(cache=each)
    async def search(query: str) -> list[str]:
        nonlocal calls
        calls += 1
        await go.wait()
        return [query]

    tasks = [asyncio.create_task(search("q")) for _ in range(1000)]
    await poll(lambda: search.stats().misses == 1000)
    go.set()
    results = await asyncio.gather(*tasks)
    assert results == [["q"]] * 1000
    assert calls == 1
    assert len({id(result) for result in results}) == 1000
    assert search.stats().coalesced == 999


async def test_another_process_finds_it(each: Cache, backend: Backend) -> None:
    calls = 0

    def made(cache: Cache) -> Any:
        @acached(cache=cache)
        async def compute(x: int) -> Point:
            nonlocal calls
            calls += 1
            return Point(x, ["a"])

        return compute

    assert await made(each)(1) == await made(backend.open())(1) == Point(1, ["a"])
    assert calls == 1


async def test_the_extras(each: Cache) -> None:
    calls = 0

    @acached(cache=each)
    async def compute(x: int, *, y: int = 2) -> int:
        nonlocal calls
        calls += 1
        return calls

    assert await compute.peek(1) is MISSING
    assert calls == 0
    assert await compute(1) == 1
    assert await compute.peek(1, y=2) == 1
    assert await compute.bypass(1) == 2
    assert await compute.peek(1) == 1
    assert await compute.refresh(1) == 3
    assert await compute(1) == 3
    assert await compute.invalidate(1) is True
    assert await compute.invalidate(1) is False
    assert await compute.peek(1) is MISSING
    assert calls == 3
    assert compute.key(1) == compute.key(1, y=2) == compute.key(x=1)
    assert compute.key(1) != compute.key(1, y=3)
    assert await compute(1) == 4
    assert await each.get(compute.key(1)) == 4


async def test_clear_takes_this_functions_entries_alone(each: Cache) -> None:
    @acached(cache=each)
    async def search(x: int) -> int:
        return x

    @acached(cache=each)
    async def search2(x: int) -> int:
        return x

    @acached(cache=each, key="search:{x}")
    async def keyed(x: int) -> int:
        return x

    @acached(cache=each, key=lambda x: f"search:{x}:other")
    async def other(x: int) -> int:
        return x

    functions = [search, search2, keyed, other]
    for function in functions:
        for n in range(20):
            await function(n)
    await each.set("search", 1)
    for n, function in enumerate(functions):
        assert await function.clear() == 20
        assert await function.clear() == 0
        assert await function.peek(1) is MISSING
        for rest in functions[n + 1 :]:
            assert await rest.peek(1) == 1
    assert await each.get("search") == 1


@pytest.mark.parametrize("how", ["invalidate", "clear"])
@pytest.mark.parametrize("key", [None, "k:{x}"])
async def test_an_invalidate_or_clear_during_a_call_wins(each: Cache, how: str, key: str | None) -> None:
    started, go = asyncio.Event(), asyncio.Event()
    calls = 0

    @acached(cache=each, key=key)
    async def compute(x: int) -> int:
        nonlocal calls
        calls += 1
        mine = calls
        started.set()
        await go.wait()
        return mine

    first = asyncio.create_task(compute(1))
    await started.wait()
    await (compute.invalidate(1) if how == "invalidate" else compute.clear())
    later = asyncio.create_task(compute(1))
    await poll(lambda: calls == 2)
    go.set()
    assert await asyncio.gather(first, later) == [1, 2]
    assert await compute.peek(1) == 2


# What it is


async def test_it_is_a_real_function(cache: Cache) -> None:
    async def plain(a: int, /, b: str = "x", *args: int, c: float, **rest: Any) -> list[str]:
        """Say something."""
        return []

    for decorated in (acached(plain), acached(ttl=1, cache=cache)(plain)):
        assert inspect.isfunction(decorated)
        assert inspect.iscoroutinefunction(decorated)
        assert asyncio.iscoroutinefunction(decorated)
        assert inspect.signature(decorated) == inspect.signature(plain)
        assert decorated.__name__ == "plain"
        assert decorated.__qualname__ == plain.__qualname__
        assert decorated.__module__ == __name__
        assert decorated.__doc__ == "Say something."
        assert decorated.__wrapped__ is plain
        assert decorated.__annotations__ == plain.__annotations__
        assert inspect.iscoroutinefunction(decorated.refresh)
        assert inspect.iscoroutinefunction(decorated.invalidate)


async def test_a_wrong_call_is_a_type_error_in_the_functions_name(cache: Cache) -> None:
    @acached(cache=cache)
    async def compute(x: int) -> int:
        return x

    for wrong in (compute, compute.refresh, compute.invalidate, compute.peek, compute.bypass):
        with pytest.raises(TypeError, match=r"compute\(\)"):
            await wrong()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"compute\(\).*'z'"):
            await wrong(1, z=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"compute\(\)"):
        compute.key(1, 2)  # type: ignore[call-arg]


async def test_all_kinds_of_parameters(cache: Cache) -> None:
    calls = []

    @acached(cache=cache)
    async def compute(a: int, /, b: int = 2, *args: int, c: int = 3, **rest: int) -> int:
        calls.append((a, b, args, c, rest))
        return len(calls)

    same = [compute(1), compute(1, 2), compute(1, b=2), compute(1, c=3), compute(1, 2)]
    assert [await call for call in same] == [1] * 5
    others = [compute(1, 2, 3), compute(1, 2, 3, 4), compute(1, d=4), compute(1, a=1), compute(1, d=4, e=5)]
    assert [await call for call in others] == [2, 3, 4, 5, 6]
    assert await compute(1, e=5, d=4) == 6


@pytest.mark.parametrize(
    "left", [1, 1.0, True, "1", b"1", None, "None", (1,), [1], {"a": 1}, 0.0, -0.0, "", frozenset({1})], ids=repr
)
@pytest.mark.parametrize(
    "right", [1, 1.0, True, "1", b"1", None, "None", (1,), [1], {"a": 1}, 0.0, -0.0, "", frozenset({1})], ids=repr
)
def test_arguments_of_different_types_are_different(left: Any, right: Any) -> None:
    @acached
    async def compute(x: Any) -> int:
        return 1

    assert (compute.key(left) == compute.key(right)) == (repr(left) == repr(right))


def test_parts_do_not_run_together() -> None:
    @acached
    async def compute(*parts: str) -> int:
        return 1

    keys = [compute.key(*parts) for parts in [("a:b", "c"), ("a", "b:c"), ("a", "b", "c"), ("abc",), ()]]
    assert len(set(keys)) == 5


def test_keys_show_no_argument() -> None:
    @acached
    async def compute(password: str) -> int:
        return 1

    assert "hunter2" not in compute.key("hunter2")
    assert "compute" in compute.key("hunter2")
    assert len(compute.key("x" * 10_000)) < 200


async def test_an_argument_without_a_stable_form_is_an_error_that_names_it(cache: Cache) -> None:
    called = False

    @acached(cache=cache)
    async def compute(query: str, client: object) -> int:
        nonlocal called
        called = True
        return 1

    for bad in (object(), lambda: 1, iter([]), int, {"a": [object()]}):
        with pytest.raises(UncacheableError, match="argument client") as caught:
            await compute("hunter2", bad)
        assert "hunter2" not in str(caught.value)
        assert "ignore=" in str(caught.value)
    assert not called


async def test_functions_made_by_a_factory_are_told_apart_by_what_they_close_over(cache: Cache) -> None:
    def inbox_of(user: str, number: int) -> Any:
        @acached(cache=cache)
        async def inbox(folder: str) -> list[str]:
            return [user, folder, str(number)]

        return inbox

    assert await inbox_of("ann", 1)("new") == ["ann", "new", "1"]
    assert await inbox_of("bob", 1)("new") == ["bob", "new", "1"]
    assert await inbox_of("ann", 2)("new") == ["ann", "new", "2"]
    again = inbox_of("ann", 1)
    assert await again("new") == ["ann", "new", "1"]
    assert again.stats().hits == 1


@dataclass(frozen=True)
class Owner:
    name: str


@pytest.mark.parametrize("of", [Owner, lambda name: {"n": name}, lambda name: [name]], ids=["frozen", "dict", "list"])
async def test_what_a_function_closes_over_is_never_mixed_up(
    cache: Cache, of: Callable[[str], object], caplog: pytest.LogCaptureFixture
) -> None:
    def inbox_of(owner: object) -> Any:
        @acached(cache=cache)
        async def inbox() -> str:
            return str(owner)

        return inbox

    try:
        answers = [await inbox_of(of(name))() for name in ("ann", "bob")]
    except UncacheableError:  # saying no is as good
        return
    assert answers == [str(of("ann")), str(of("bob"))] or caplog.records


async def test_functions_are_told_apart_by_the_functions_and_settings_that_they_close_over(cache: Cache) -> None:
    def plain(func: Any) -> Any:
        async def wrapper(*args: Any) -> Any:
            return await func(*args)

        return wrapper

    async def one(x: int) -> str:
        return f"one {x}"

    async def two(x: int) -> str:
        return f"two {x}"

    assert [await acached(cache=cache)(plain(func))(1) for func in (one, two)] == ["one 1", "two 1"]

    def applying(func: Any, settings: dict[str, int]) -> Any:
        @acached(cache=cache)
        async def run(x: int) -> int:
            return int(func(x)) + settings["add"]

        return run

    double, negative = (lambda x: 2 * x), (lambda x: -x)
    runs = [applying(func, {"add": add}) for func in (double, negative) for add in (0, 10)]
    assert [await run(3) for run in runs] == [6, 16, -3, 7]
    assert await applying(double, {"add": 10})(3) == 16


async def test_what_a_function_closes_over_may_be_defined_after_it(cache: Cache) -> None:
    def made(n: int) -> Any:
        @acached(cache=cache)
        async def run() -> int:
            return later

        later = n
        return run

    assert [await made(1)(), await made(2)()] == [1, 2]


@pytest.mark.parametrize("made", [list, dict], ids=["list", "dict"])
async def test_what_a_function_counts_in_is_not_part_of_its_key(cache: Cache, made: Any) -> None:
    calls = made()

    def decorated() -> Any:
        @acached(cache=cache)
        async def run(x: int) -> int:
            if isinstance(calls, list):
                calls.append(x)
            else:
                calls[x] = calls.get(x, 0) + 1
            return x

        return run

    assert [await decorated()(1), await decorated()(1)] == [1, 1]
    assert len(calls) == 1


async def test_a_counter_that_a_function_closes_over_is_not_part_of_its_key(cache: Cache) -> None:
    calls = 0

    def made() -> Any:
        @acached(cache=cache)
        async def compute(x: int) -> int:
            nonlocal calls
            calls += 1
            return x

        return compute

    assert await made()(1) == await made()(1) == 1
    assert calls == 1


# Options


async def test_ttl(cache: Cache) -> None:
    @acached(cache=cache, ttl="10m")
    async def minutes() -> int:
        return 1

    @acached(cache=cache, ttl=FOREVER)
    async def forever() -> int:
        return 1

    @acached(cache=cache)
    async def default() -> int:
        return 1

    left = []
    for function in (minutes, forever, default):
        await function()
        left.append(await cache.ttl(function.key()))
    assert 590 < (left[0] or 0) <= 600
    assert left[1] == float("inf")
    assert 3590 < (left[2] or 0) <= 3600


async def test_ignore(cache: Cache) -> None:
    calls = 0

    @acached(cache=cache, ignore=["client", "trace"])
    async def compute(client: object, x: int, *, trace: object = None) -> int:
        nonlocal calls
        calls += 1
        return x

    assert await compute(object(), 1) == await compute(object(), 1, trace=object()) == 1
    assert await compute(object(), 2) == 2
    assert calls == 2


def test_ignore_takes_one_name_as_text() -> None:
    @acached(ignore="client")
    async def compute(client: object, x: int) -> int:
        return x

    assert compute.key(object(), 1) == compute.key(object(), 1)


async def test_a_key_template(cache: Cache) -> None:
    @acached(cache=cache, key="user:{user_id}:{part}")
    async def load(user_id: int, part: str = "all", *, verbose: bool = False) -> str:
        return f"{user_id} {part}"

    assert load.key(42) == "user:42:all"
    assert await load(42, verbose=True) == "42 all"
    assert await cache.get("user:42:all") == "42 all"
    assert load.key(1, "a:b") != load.key(1, "a", verbose=True) != load.key("1", "a")  # type: ignore[arg-type]
    assert load.key(42) != load.key("42")  # type: ignore[arg-type]
    with pytest.raises(UncacheableError, match="part"):
        load.key(1, [])  # type: ignore[arg-type]


async def test_a_tag_template_shows_arguments_as_who_invalidates_writes_them(cache: Cache) -> None:
    @acached(cache=cache, tags=["user:{user_id}", "all"])
    async def load(user_id: object) -> str:
        return "x"

    for value, tag in ((42, "user:42"), ("42", "user:42"), ("a:b c", "user:a:b c"), (7, "all")):
        await load(value)
        assert await load.peek(value) == "x"
        assert await cache.invalidate(tag)
        assert await load.peek(value) is MISSING


async def test_tags_made_of_arguments_are_checked(cache: Cache) -> None:
    @acached(cache=cache, tags=["{user}"])
    async def load(user: str) -> str:
        return "x"

    for user in ("", "x" * 1025):
        with pytest.raises(ValueError, match="a tag has 1 to 1,024 characters"):
            await load(user)
    with pytest.raises(ValueError, match=r"tag template's field \{nobody\}"):
        acached(tags=["{nobody}"])(load.__wrapped__)
    with pytest.raises(ValueError, match=r"scope template's field \{nobody\}"):
        acached(scope="{nobody}")(load.__wrapped__)


async def test_a_function_without_a_policy_has_its_caches() -> None:
    clock, up = FakeClock(), True
    cache = Cache(MemoryStore(clock=clock), policy=Policy(ttl="10m", stale_ttl="1h", tags=["all"]))

    @acached(cache=cache, ttl="1m")
    async def load(number: int) -> int:
        if not up:
            raise OSError("down")
        return number

    @acached(cache=cache, soft_timeout=0, tags=(tag for tag in ["{number}", "mine"]))
    async def other(number: int) -> int:
        return number

    assert [await load(1), await other(1)] == [1, 1]
    up = False
    clock.advance(61)
    assert await load(1) == 1  # stale, and it stands in
    assert await load.peek(1) is MISSING
    with pytest.raises(OSError, match="down"):
        await load.with_policy(Policy(ttl="1m"))(1)
    with pytest.raises(OSError, match="down"):
        await load(2)
    assert await other.peek(1) == 1
    for tag in ("1", "mine"):
        await cache.invalidate(tag)
        assert await other.peek(1) is MISSING
        await other.refresh(1)
    await cache.invalidate("all")
    assert await other.peek(1) == 1  # its own tags are in place of the cache's
    with pytest.raises(OSError, match="down"):
        await load(1)
    await cache.aclose()


async def test_another_policy_keeps_the_keys_whatever_has_changed_meanwhile(cache: Cache) -> None:
    state = 1

    @acached(cache=cache)
    async def load() -> int:
        return state

    key = load.key()
    state = 2  # a function is known by what it closes over, too
    assert load.with_policy(ttl=5).key() == load.with_policy(ttl=5).with_policy(ttl=6).key() == key


async def test_a_key_function(cache: Cache) -> None:
    @acached(cache=cache, key=lambda user, **_: f"u{user['id']}")
    async def load(user: dict[str, int], *, verbose: bool = False) -> int:
        return user["id"]

    assert await load({"id": 7, "x": 1}) == 7
    assert await load({"id": 7, "x": 2}, verbose=True) == 7
    assert await cache.get("u7") == 7
    assert load.stats().hits == 1


async def test_a_key_function_must_return_text(cache: Cache) -> None:
    @acached(cache=cache, key=lambda x: x)
    async def load(x: Any) -> int:
        return 1

    with pytest.raises(TypeError, match=r"load must return text, not int"):
        await load(1)
    with pytest.raises(ValueError, match="at least one character"):
        await load("")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ttl": 0}, ValueError, "ttl must be"),
        ({"ttl": "soon"}, ValueError, "ttl must be"),
        ({"ttl": True}, ValueError, "ttl must be"),
        ({"ttl": []}, TypeError, "ttl must be"),
        ({"ignore": ["nope"]}, ValueError, r"'nope'.*it takes x"),
        ({"key": "user:{nope}"}, ValueError, "nope"),
        ({"key": "user:{x!r}"}, ValueError, "conversion"),
        ({"key": 5}, TypeError, "key must be a template or a function"),
        ({"namespace": "a:b"}, ValueError, "namespace"),
        ({"scope": 1.5}, TypeError, "scope must be"),
        ({"cache": 5}, TypeError, "cache must be"),
        ({"cache_if": True}, TypeError, "cache_if must be"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    async def compute(x: int) -> int:
        return x

    with pytest.raises(error, match=message):
        acached(**options)(compute)


def test_async_key_and_scope_functions_are_refused() -> None:
    async def make(x: int) -> str:
        return "k"

    for option in ("key", "scope"):
        with pytest.raises(TypeError, match="plain functions"):
            acached(**{option: make})  # type: ignore[call-overload]


async def test_version_separates(cache: Cache) -> None:
    async def compute(x: int) -> str:
        return "x"

    functions = [acached(cache=cache, version=version)(compute) for version in (None, 1, "1", 2)]
    functions += [acached(cache=cache, version=version, key="k:{x}")(compute) for version in (None, 1, "1", 2)]
    assert len({function.key(1) for function in functions}) == 8


async def test_namespace(cache: Cache) -> None:
    @acached(cache=cache, namespace="tools")
    async def compute(x: int) -> int:
        return x

    await compute(1)
    assert await keys_of(cache) == []
    view = cache.with_namespace("tools")
    assert await keys_of(view) == [compute.key(1)]
    assert await compute.invalidate(1) is True
    await compute(1)
    assert await compute.clear() == 1


async def test_cache_if(cache: Cache) -> None:
    @acached(cache=cache, cache_if=bool)
    async def compute(x: int) -> list[int]:
        return [1] * x

    assert await compute(0) == []
    assert await compute.peek(0) is MISSING
    assert await compute(1) == [1]
    assert await compute.peek(1) == [1]


async def test_a_cache_factory_is_asked_at_the_call(cache: Cache) -> None:
    asked = 0

    def factory() -> Cache:
        nonlocal asked
        asked += 1
        return cache

    @acached(cache=factory)
    async def compute(x: int) -> int:
        return x

    assert asked == 0
    assert await compute(1) == 1
    assert asked == 1
    assert await cache.get(compute.key(1)) == 1


async def test_a_factory_may_answer_differently(cache: Cache) -> None:
    async with MemoryCache() as second:
        current = [cache]

        @acached(cache=lambda: current[0], namespace="n")
        async def compute(x: int) -> str:
            return "x"

        await compute(1)
        current[0] = second
        assert await compute.peek(1) is MISSING
        await compute(1)
        assert await keys_of(second.with_namespace("n")) == [compute.key(1)]


# Scope

tenant: ContextVar[str] = ContextVar("tenant")


async def test_a_scope_by_value_separates(cache: Cache) -> None:
    async def compute(x: int) -> int:
        return x

    functions = [acached(cache=cache, scope=scope)(compute) for scope in ("a", "b", 1, "1", True)]
    functions += [acached(cache=cache, scope=scope, key="k:{x}")(compute) for scope in ("a", "b")]
    assert len({function.key(1) for function in functions}) == 7


@pytest.mark.parametrize("key", [None, "k:{x}", lambda x: f"k{x}"])
async def test_a_scope_by_context_variable(cache: Cache, key: Any) -> None:
    @acached(cache=cache, scope=tenant, key=key)
    async def compute(x: int) -> str:
        return tenant.get()

    async def as_tenant(name: str) -> str:
        tenant.set(name)
        return await compute(1)

    names = ["a", "b", "a", "c", "b"]
    assert await asyncio.gather(*(asyncio.create_task(as_tenant(name)) for name in names)) == names
    assert compute.stats().loads == 3


async def test_an_unset_scope_variable_means_uncached_and_warned_of_once(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0
    unset: ContextVar[str] = ContextVar("unset")

    @acached(cache=cache, scope=unset)
    async def compute(x: int) -> int:
        nonlocal calls
        calls += 1
        return calls

    assert [await compute(1) for _ in range(3)] == [1, 2, 3]
    assert await compute.refresh(1) == 4
    assert await compute.peek(1) is MISSING
    assert await compute.invalidate(1) is False
    assert calls == 4
    assert await keys_of(cache) == []
    assert len(caplog.records) == 1
    assert "compute" in caplog.text
    assert "unset" in caplog.text
    with pytest.raises(LookupError, match="unset"):
        compute.key(1)
    context = copy_context()
    context.run(unset.set, "x")
    assert await asyncio.create_task(compute(1), context=context) == 5
    assert await asyncio.create_task(compute(1), context=context) == 5


async def test_a_scope_variable_with_a_default(cache: Cache) -> None:
    with_default: ContextVar[str] = ContextVar("with_default", default="public")

    @acached(cache=cache, scope=with_default)
    async def compute(x: int) -> int:
        return x

    await compute(1)
    # Whether a default counts as set is the author's word; it must in any case not be mixed up with a set value.
    token = with_default.set("private")
    assert await compute.peek(1) is MISSING
    with_default.reset(token)


async def test_a_scope_by_function(cache: Cache) -> None:
    @acached(cache=cache, scope=lambda user, x: user.split("@")[1], ignore=["user"])
    async def compute(user: str, x: int) -> str:
        return user

    assert await compute("ann@a", 1) == "ann@a"
    assert await compute("bob@a", 1) == "ann@a"
    assert await compute("cid@b", 1) == "cid@b"


# Methods


class Client:
    def __init__(self, url: str) -> None:
        self.url = url
        self.calls = 0

    @property
    def __cache_key__(self) -> str:
        return self.url

    @acached(cache=lambda: current_cache[0])
    async def fetch(self, path: str, limit: int = 1) -> str:
        """Fetch it."""
        self.calls += 1
        return f"{self.url}/{path}/{limit}"


class ByMethod(Client):
    def __cache_key__(self) -> str:  # type: ignore[override]
        return self.url


class ByAttribute:
    __cache_key__ = "constant"

    @acached(cache=lambda: current_cache[0])
    async def fetch(self, path: str) -> int:
        return id(self)


current_cache: list[Cache] = []


@pytest.fixture
def current(cache: Cache) -> Iterator[Cache]:
    current_cache[:] = [cache]
    yield cache
    current_cache.clear()


async def test_methods_are_keyed_by_what_identifies_the_instance(current: Cache) -> None:
    for kind in (Client, ByMethod):
        one, same, other = kind("a"), kind("a"), kind("b")
        assert await one.fetch("x") == await same.fetch("x") == "a/x/1"
        assert await other.fetch("x") == "b/x/1"
        assert (one.calls, same.calls, other.calls) == (1, 0, 1)
    one, two = ByAttribute(), ByAttribute()
    assert await one.fetch("x") == await two.fetch("x") == id(one)


async def test_a_subclass_has_entries_of_its_own(current: Cache) -> None:
    assert Client("a").fetch.key("x") != ByMethod("a").fetch.key("x")


async def test_the_extras_of_a_bound_method(current: Cache) -> None:
    client = Client("a")
    assert await client.fetch.peek("x") is MISSING
    assert await client.fetch.refresh("x", limit=2) == "a/x/2"
    assert await client.fetch.peek("x", 2) == "a/x/2"
    assert client.fetch.key("x", 2) == Client.fetch.key(client, "x", limit=2) == Client("a").fetch.key("x", 2)
    assert await client.fetch.invalidate("x", 2) is True
    assert await client.fetch.bypass("x") == "a/x/1"
    assert await client.fetch.peek("x") is MISSING
    assert await Client.fetch(client, "x") == "a/x/1"
    await Client("b").fetch("x")
    assert await client.fetch.clear() == 2
    assert client.fetch.stats().loads == Client.fetch.stats().loads


def test_what_inspection_says_of_methods() -> None:
    bound = Client("a").fetch
    assert inspect.iscoroutinefunction(bound)
    assert inspect.iscoroutinefunction(Client.fetch)
    assert bound.__name__ == "fetch"
    assert bound.__doc__ == "Fetch it."
    assert list(inspect.signature(Client.fetch).parameters) == ["self", "path", "limit"]


def test_the_signature_of_a_bound_method_is_without_self() -> None:
    assert list(inspect.signature(Client("a").fetch).parameters) == ["path", "limit"]


async def test_a_class_that_does_not_say_how_it_is_identified(current: Cache) -> None:
    def make() -> Any:
        class Anonymous:
            @acached(cache=current)
            async def fetch(self, x: int) -> int:
                return x

        return Anonymous

    if sys.version_info >= (3, 12):
        with pytest.raises(TypeError, match="__cache_key__"):
            make()
        return
    anonymous = make()()
    with pytest.raises(TypeError, match=r"Anonymous.*__cache_key__"):
        await anonymous.fetch(1)
    with pytest.raises(TypeError, match=r"Anonymous.*__cache_key__"):
        anonymous.fetch.key(1)


async def test_what_identifies_an_instance_must_have_a_stable_form(current: Cache) -> None:
    class Bad:
        __cache_key__ = object()

        @acached(cache=current)
        async def fetch(self, x: int) -> int:
            return x

    with pytest.raises(UncacheableError, match="__cache_key__"):
        await Bad().fetch(1)


async def test_a_key_template_on_a_method_keeps_instances_apart(current: Cache) -> None:
    class Api:
        def __init__(self, url: str) -> None:
            self.url = url

        @property
        def __cache_key__(self) -> str:
            return self.url

        @acached(cache=current, key="user:{user_id}")
        async def user(self, user_id: int) -> str:
            return f"{user_id} at {self.url}"

    assert await Api("a").user(1) == "1 at a"
    assert await Api("b").user(1) == "1 at b"
    assert Api("a").user.key(1).startswith("user:1")


async def test_static_methods_in_both_orders(current: Cache) -> None:
    class Tools:
        @staticmethod
        @acached(cache=current)
        async def under(x: int) -> list[int]:
            return [x]

        @acached(cache=current)
        @staticmethod
        async def over(x: int) -> list[int]:
            return [x]

    for owner in (Tools, Tools()):
        for method in (owner.under, owner.over):
            assert await method(1) == [1]
            assert await method.peek(1) == [1]
            assert inspect.iscoroutinefunction(method)
            assert method.stats().loads == 1
    assert Tools.under.key(1) != Tools.over.key(1)


def test_class_methods_are_refused() -> None:
    with pytest.raises(TypeError, match="static method"):

        class Over:
            @acached  # type: ignore[arg-type]
            @classmethod
            async def make(cls) -> int:
                return 1

    with pytest.raises(TypeError, match="static method"):

        class Under:
            @classmethod
            @acached
            async def make(cls) -> int:
                return 1


async def test_in_a_pydantic_model(current: Cache) -> None:
    class Model(pydantic.BaseModel):
        __cache_key__: ClassVar[str] = "m"
        name: str

        @acached(cache=current)
        async def fetch(self, x: int) -> str:
            return self.name * x

        @staticmethod
        @acached(cache=current)
        async def tool(x: int) -> int:
            return x

    assert set(Model.model_fields) == {"name"}
    model = Model(name="a")
    assert await model.fetch(2) == "aa"
    assert await model.fetch.peek(2) == "aa"
    assert await Model.tool(3) == 3
    assert model.model_dump() == {"name": "a"}


async def test_in_a_dataclass_with_slots(current: Cache) -> None:
    @dataclass(frozen=True, slots=True)
    class Api:
        url: str

        @property
        def __cache_key__(self) -> str:
            return self.url

        @acached(cache=current)
        async def fetch(self, x: int) -> str:
            return f"{self.url}{x}"

    assert await Api("a").fetch(1) == "a1"
    assert await Api("b").fetch(1) == "b1"


async def test_super_calls_reach_the_cached_parent(current: Cache) -> None:
    class Child(Client):
        async def fetch(self, path: str, limit: int = 1) -> str:  # type: ignore[override]
            return "child of " + await super().fetch(path, limit)

    assert await Child("a").fetch("x") == "child of a/x/1"


# What it refuses


def test_sync_functions_are_refused_with_advice() -> None:
    def plain(x: int) -> int:
        return x

    for decorate in (acached, acached(ttl=5)):
        with pytest.raises(TypeError, match=r"plain is none.*async def.*to_thread"):
            decorate(plain)  # type: ignore[arg-type]
    for nothing in (5, "x", None, int, len):
        with pytest.raises(TypeError):
            acached(ttl=5)(nothing)  # type: ignore[arg-type]


def test_async_generators_are_refused() -> None:
    async def stream(x: int) -> AsyncIterator[int]:
        yield x

    with pytest.raises(TypeError, match="async generator"):
        acached(stream)  # type: ignore[arg-type]


def test_bound_methods_and_partials_are_refused() -> None:
    class Api:
        async def fetch(self, x: int) -> int:
            return x

    async def compute(x: int, y: int) -> int:
        return x

    with pytest.raises(TypeError, match="bound"):
        acached(Api().fetch)
    with pytest.raises(TypeError, match="partial"):
        acached(functools.partial(compute, 1))


# What comes back


@dataclass
class Point:
    x: int
    tags: list[str] = field(default_factory=list)


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.Flag):
    A = enum.auto()
    B = enum.auto()


class Pair(NamedTuple):
    left: int
    right: Point


class Movie(TypedDict):
    title: str
    at: datetime


class User(pydantic.BaseModel):
    name: str
    born: date | None = None
    tags: set[str] = set()
    _secret: int = pydantic.PrivateAttr(default=0)


class Struct(msgspec.Struct):
    a: int
    b: list[Point] = []


@dataclass
class Box(Generic[T]):
    item: T


VALUES: list[tuple[Any, Any]] = [
    (Point, Point(1, ["a"])),
    (list[Point], [Point(1), Point(2)]),
    (dict[str, Point | None], {"a": Point(1), "b": None}),
    (Point | User, User(name="x")),
    (User, User(name="x", born=date(2000, 1, 1), tags={"a"})),
    (User, User(name="only this is set")),
    (Struct, Struct(1, [Point(1)])),
    (Pair, Pair(1, Point(2))),
    (Movie, {"title": "x", "at": datetime(2025, 1, 1, tzinfo=UTC)}),
    (datetime, datetime(2025, 1, 1, 12, tzinfo=UTC)),
    (UUID, UUID(int=5)),
    (Decimal, Decimal("1.50")),
    (Color, Color.RED),
    (Level, Level.LOW),
    (Mode, Mode.A | Mode.B),
    (bytes, b"\x00"),
    (set[int], {1, 2}),
    (tuple[int, ...], (1, 2)),
    (tuple[Point, set[Color]], (Point(1), {Color.RED})),
    (Box[Point], Box(Point(1))),
    (dict[Color, list[Pair]], {Color.RED: [Pair(1, Point(1))]}),
    (int | None, None),
    (Any, {"a": (1, 2)}),
]


@pytest.mark.parametrize(("annotation", "value"), VALUES, ids=lambda part: str(part)[:40])
async def test_a_hit_equals_a_miss(cache: Cache, annotation: Any, value: Any) -> None:
    calls = 0

    async def compute() -> Any:
        nonlocal calls
        calls += 1
        return value

    compute.__annotations__["return"] = annotation
    decorated = acached(cache=cache)(compute)
    first, second = await decorated(), await decorated()
    assert first is value
    assert second == value
    assert type(second) is type(value)
    assert repr(second) == repr(value)
    assert calls == 1


async def test_local_classes_under_future_annotations(cache: Cache) -> None:
    @dataclass
    class Local:
        x: int

    class Inner(NamedTuple):
        local: Local

    @acached(cache=cache)
    async def compute(x: int) -> list[Local]:
        return [Local(x)]

    @acached(cache=cache)
    async def nested(x: int) -> Inner | None:
        return Inner(Local(x))

    for function, value in ((compute, [Local(1)]), (nested, Inner(Local(1)))):
        assert await function(1) == value
        assert await function(1) == value
        assert function.stats().hits == 1


async def test_a_bare_decorator_finds_local_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_BACKEND", "memory")

    @dataclass
    class Local:
        x: int

    @acached
    async def compute(x: int) -> Local:
        return Local(x)

    assert await compute(1) == await compute(1) == Local(1)
    assert compute.stats().hits == 1
    await (await default_cache()).aclose()


async def test_local_classes_in_methods_of_local_classes(cache: Cache) -> None:
    @dataclass
    class Local:
        x: int

    class Api:
        __cache_key__ = "api"

        @acached(cache=cache)
        async def fetch(self, x: int) -> Local:
            return Local(x)

    assert await Api().fetch(1) == await Api().fetch(1) == Local(1)
    assert Api.fetch.stats().hits == 1


async def test_local_classes_that_stand_in_the_annotation_alone(cache: Cache) -> None:
    @dataclass
    class Local:
        x: int

    def make(x: int) -> Any:
        return Local(x)

    @acached(cache=cache)
    async def compute(x: int) -> Local:
        return make(x)

    assert await compute(1) == await compute(1) == Local(1)
    assert compute.stats().hits == 1


async def test_local_classes_that_stand_in_the_annotation_of_a_local_classs_method_alone(cache: Cache) -> None:
    @dataclass
    class Local:
        x: int

    def make(x: int) -> Any:
        return Local(x)

    class Api:
        __cache_key__ = "api"

        @acached(cache=cache)
        async def fetch(self, x: int) -> Local:
            return make(x)

    assert await Api().fetch(1) == await Api().fetch(1) == Local(1)
    assert Api.fetch.stats().hits == 1


async def test_a_class_that_is_defined_further_down(cache: Cache) -> None:
    @acached(cache=cache)
    async def compute(x: int) -> Later:
        return Later(x)

    assert await compute(1) == await compute(1) == Later(1)
    assert compute.stats().hits == 1


@dataclass
class Later:
    x: int


async def test_a_parameter_annotation_for_checkers_alone_does_not_matter(cache: Cache) -> None:
    async def compute(x: NowhereAtAll) -> Point:  # type: ignore[name-defined]  # noqa: F821
        return Point(x)

    decorated = acached(cache=cache)(compute)
    assert await decorated(1) == await decorated(1) == Point(1)
    assert decorated.stats().hits == 1


async def test_an_annotation_that_cannot_be_evaluated(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    @acached(cache=cache)
    async def compute(x: int) -> list[NowhereAtAll]:  # type: ignore[name-defined]  # noqa: F821
        return [x]

    assert await compute(1) == await compute(1) == [1]
    assert compute.stats().hits == 1
    assert len(caplog.records) == 1
    assert "NowhereAtAll" in caplog.text


class Sub(User):
    pass


@dataclass
class WithAttribute:
    x: int


def _with_attribute() -> WithAttribute:
    value = WithAttribute(1)
    value.extra = 2  # type: ignore[attr-defined]
    return value


@pytest.mark.parametrize(
    ("annotation", "value", "says"),
    [
        (User, Sub(name="x"), "Sub"),
        (None, Point(1), "Point"),
        (int, Point(1), "Point"),
        (WithAttribute, _with_attribute(), "extra"),
        (pydantic.SecretStr, pydantic.SecretStr("hunter2"), "SecretStr"),
        (object, object(), "object"),
    ],
    ids=str,
)
async def test_what_cannot_be_revived_exactly_is_returned_not_stored_warned_of_once_and_counted(
    cache: Cache, annotation: Any, value: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    async def compute(x: int) -> Any:
        nonlocal calls
        calls += 1
        return value

    compute.__annotations__["return"] = annotation
    decorated = acached(cache=cache)(compute)
    for _ in range(3):
        assert await decorated(1) is value
    assert calls == 3
    assert decorated.stats().errors == {"uncacheable": 3}
    (warning,) = (record.message for record in caplog.records if "not cached" in record.message)
    assert "compute" in warning
    assert says in warning
    assert "hunter2" not in caplog.text
    assert await keys_of(cache) == []


async def test_a_changed_class_makes_misses_not_errors(cache: Cache) -> None:
    def deploy(**fields: type) -> Any:
        model = pydantic.create_model("Release", __module__=__name__, **fields)  # type: ignore[call-overload]

        async def compute() -> Any:
            return model(**{name: kind(1) for name, kind in fields.items()})

        compute.__annotations__["return"] = model
        compute.__qualname__ = "compute"
        return acached(cache=cache)(compute)

    old, new = deploy(a=int), deploy(a=int, b=str)
    assert old.key() != new.key()
    await old()
    assert (await new()).b == "1"
    assert cache.stats.errors == {}


async def test_hits_may_be_changed_freely(cache: Cache) -> None:
    @acached(cache=cache)
    async def compute() -> dict[str, Point]:
        return {"a": Point(1, ["x"])}

    for _ in range(4):
        got = await compute()
        assert got == {"a": Point(1, ["x"])}
        got["a"].tags.append("y")
        peeked = await compute.peek()
        assert peeked == {"a": Point(1, ["x"])}


# Coalescing, errors, circles


@pytest.mark.parametrize("position", range(21))
async def test_of_21_callers_the_cancelled_one_alone_sees_it(cache: Cache, position: int) -> None:
    go = asyncio.Event()
    calls = 0

    @acached(cache=cache)
    async def compute(x: int) -> list[int]:
        nonlocal calls
        calls += 1
        await go.wait()
        return [x]

    tasks = [asyncio.create_task(compute(1)) for _ in range(21)]
    await turns()
    tasks[position].cancel()
    go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [n == position for n in range(21)]
    assert calls == 1
    assert await compute.peek(1) == [1]


async def test_the_last_one_to_leave_cancels_the_function(cache: Cache) -> None:
    cancelled = asyncio.Event()

    @acached(cache=cache)
    async def compute(x: int) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    tasks = [asyncio.create_task(compute(1)) for _ in range(3)]
    await turns()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait_for(cancelled.wait(), 20)
    assert await compute.peek(1) is MISSING


async def test_an_error_reaches_every_caller_and_is_not_stored(cache: Cache) -> None:
    error = Boom("text")
    calls = 0

    @acached(cache=cache)
    async def compute(x: int) -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        if calls == 1:
            raise error
        return calls

    results = await asyncio.gather(*(compute(1) for _ in range(10)), return_exceptions=True)
    assert all(result is error for result in results)
    assert await compute(1) == 2
    assert compute.stats().load_errors == 1


async def test_a_function_that_calls_itself_with_equal_arguments(cache: Cache) -> None:
    @acached(cache=cache)
    async def compute(x: int) -> int:
        return await compute(x)

    with pytest.raises(CircularLoadError, match=r"compute.*compute"):
        await asyncio.wait_for(compute(1), 20)


async def test_a_function_may_call_itself_with_others(cache: Cache) -> None:
    calls = 0

    @acached(cache=cache)
    async def fibonacci(n: int) -> int:
        nonlocal calls
        calls += 1
        return n if n < 2 else sum(await asyncio.gather(fibonacci(n - 1), fibonacci(n - 2)))

    assert await asyncio.wait_for(fibonacci(30), 60) == 832_040
    assert calls == 31


async def test_functions_that_wait_for_each_other(cache: Cache) -> None:
    both = asyncio.Barrier(2)

    @acached(cache=cache)
    async def a(x: int) -> int:
        await both.wait()
        return await b(x)

    @acached(cache=cache)
    async def b(x: int) -> int:
        await both.wait()
        return await a(x)

    results = await asyncio.wait_for(asyncio.gather(a(1), b(1), return_exceptions=True), 20)
    assert any(isinstance(result, CircularLoadError) for result in results)


async def test_concurrent_refreshes_share_a_call(each: Cache) -> None:
    calls = 0
    go = asyncio.Event()

    @acached(cache=each)
    async def compute(x: int) -> int:
        nonlocal calls
        calls += 1
        await go.wait()
        return calls

    tasks = [asyncio.create_task(compute.refresh(1)) for _ in range(50)]
    await poll(lambda: calls == 1)
    go.set()
    assert await asyncio.gather(*tasks) == [1] * 50
    assert await compute(1) == 1


async def test_bypass_neither_reads_nor_writes_nor_shares(cache: Cache) -> None:
    calls = 0

    @acached(cache=cache)
    async def compute(x: object) -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        return calls

    await asyncio.gather(*(compute.bypass(1) for _ in range(5)))
    assert calls == 5
    assert await compute.peek(1) is MISSING
    await compute.bypass(object())  # there is no key to be made
    assert compute.stats().loads == 0


# The default cache


async def test_the_default_cache_is_opened_from_the_environment_at_the_first_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @acached
    async def compute(x: int) -> int:
        return x

    assert not (tmp_path / "there").exists()
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "there"))
    monkeypatch.setenv("CACHE_NAMESPACE", "mine")
    assert await compute(1) == 1
    assert (tmp_path / "there" / "mcp_hub_cache").is_dir()
    cache = await default_cache()
    assert cache is await default_cache()
    assert cache.namespace == "mine"
    assert await cache.get(compute.key(1)) == 1
    await cache.aclose()


async def test_many_first_callers_open_one_default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_BACKEND", "memory")
    caches = await asyncio.gather(*(default_cache() for _ in range(20)))
    assert len(set(map(id, caches))) == 1
    await caches[0].aclose()


async def test_a_cancelled_first_caller_does_not_hurt_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_BACKEND", "memory")
    tasks = [asyncio.create_task(default_cache()) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert isinstance(results[1], Cache)
    assert results[1] is results[2]


async def test_a_wrong_setting_is_told_and_can_be_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    @acached
    async def compute(x: int) -> int:
        return x

    monkeypatch.setenv("CACHE_BACKEND", "floppy")
    for _ in range(2):
        with pytest.raises(SettingsError, match=r"CACHE_BACKEND.*floppy"):
            await compute(1)
    monkeypatch.setenv("CACHE_BACKEND", "memory")
    assert await compute(1) == 1
    await (await default_cache()).aclose()


def test_the_default_cache_works_under_a_second_asyncio_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path))
    calls = 0

    @acached
    async def compute(x: int) -> int:
        nonlocal calls
        calls += 1
        return x

    for _ in range(3):
        assert asyncio.run(_call(compute, 1)) == 1
    assert calls == 1
    gc.collect()


async def _call(function: Callable[..., Any], *args: Any) -> Any:
    return await function(*args)


async def test_running_loops_have_default_caches_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path))
    calls = []

    @acached
    async def compute(x: int) -> int:
        calls.append(threading.get_ident())
        return x

    async def in_thread() -> tuple[int, Cache]:
        return await compute(1), await default_cache()

    assert await compute(1) == 1
    mine = await default_cache()
    (value, theirs), (again, others) = await asyncio.gather(
        *(asyncio.to_thread(asyncio.run, in_thread()) for _ in range(2))
    )
    assert value == again == 1
    assert len({id(mine), id(theirs), id(others)}) == 3
    assert len(calls) == 1  # they share the folder
    await mine.aclose()


def test_nothing_is_left_when_the_program_ends_without_closing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path))
    loops = []

    @acached
    async def compute(x: int) -> int:
        loops.append(asyncio.get_running_loop())
        return x

    asyncio.run(_call(compute, 1))
    assert asyncio.all_tasks(loops[0]) == set()
    for thread in threading.enumerate():
        if thread.name.startswith("mcp_hub_cache"):  # the one that shuts the others down may have a moment left
            thread.join(20)
            assert not thread.is_alive()
    gc.collect()


def test_decorating_and_asking_for_keys_opens_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CACHE_BACKEND", "floppy")

    @acached
    async def compute(x: int) -> int:
        return x

    assert compute.key(1)
    assert compute.stats().loads == 0
    assert list(tmp_path.iterdir()) == []


def test_a_decorated_function_that_is_dropped_is_collected() -> None:
    import weakref

    def make() -> weakref.ref[Any]:
        @acached
        async def compute(x: int) -> int:
            return x

        return weakref.ref(compute)

    reference = make()
    gc.collect()
    assert reference() is None


async def test_a_refresh_that_can_not_be_stored_leaves_no_older_value(cache: Cache) -> None:
    results: list[object] = [1, object(), 3]

    @acached(cache=cache)
    async def run() -> Any:
        return results.pop(0)

    assert await run() == 1
    assert type(await run.refresh()) is object
    assert await run() == 3


def test_an_async_cache_if_is_refused() -> None:
    async def good(result: object) -> bool:
        return True

    with pytest.raises(TypeError, match="cache_if must be a plain function"):
        acached(cache_if=good)
