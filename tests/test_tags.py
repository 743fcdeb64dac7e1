"""Tags as callers see them: whatever was stored under one is gone once it is invalidated, here and elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from mcp_hub_cache import MISSING, Cache, Policy, acached
from mcp_hub_cache._current import current_entry
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FaultyStore
from tests.backends import PATIENT, WITH_FAILOVER, Backend, poll
from tests.servers import Server, valkey_server


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture(params=WITH_FAILOVER)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    server = request.getfixturevalue("valkey") if request.param.startswith("redis") else None
    return Backend(request.param, tmp_path, server)


@pytest.fixture
async def cache(backend: Backend) -> AsyncIterator[Cache]:
    yield backend.open()
    await backend.aclose()


@pytest.fixture
async def other(backend: Backend, cache: Cache) -> Cache:
    """Another process's."""
    return backend.open()


@pytest.fixture
async def memory() -> AsyncIterator[Cache]:
    async with Cache(MemoryStore()) as cache:
        yield cache


async def soon(backend: Backend, holds: Callable[[], Awaitable[bool]]) -> None:
    """At once, unless it is the server that tells of it."""
    if backend.is_told_later:
        await poll(holds)
    else:
        assert await holds()


async def is_gone(cache: Cache, *keys: str) -> bool:
    return await cache.get_many(keys) == {}


def load(value: object, *added: str) -> Callable[[], Awaitable[Any]]:
    async def loader() -> object:
        current_entry().tags.update(added)
        return value

    return loader


async def names(cache: Cache) -> list[str]:
    return [key async for key in aiter(cache.keys())]


async def never() -> Any:
    raise AssertionError("there is nothing to load")


# What is stored under a tag


async def fill(cache: Cache) -> list[str]:
    """Store under the tag "t" in every way there is; the keys."""
    await cache.set("set", [1], tags=["t", "u"])
    await cache.set_many({"many1": [1], "many2": [1]}, tags=["t"])
    assert await cache.add("add", [1], tags=["t"])
    await cache.set("by policy", [1], policy=Policy(tags=["t"]))
    await cache.get_or_load("static", load([1]), tags=["t"])
    await cache.get_or_load("added", load([1], "t"))
    await cache.get_or_load("both", load([1], "v", "t"), tags=["w"])
    await cache.set("free", [1], tags=["w"])
    await cache.set("bare", [1])
    return ["set", "many1", "many2", "add", "by policy", "static", "added", "both"]


async def test_however_it_was_stored(backend: Backend, cache: Cache, other: Cache) -> None:
    for who in (cache, other):
        keys = await fill(cache)
        for each in (cache, other):
            assert list(await each.get_many(keys)) == keys
        assert await who.invalidate("t") is True
        assert await is_gone(who, *keys)
        for each in (cache, other):
            await soon(backend, lambda each=each, keys=keys: is_gone(each, *keys))
            assert await each.get_many(["free", "bare"]) == {"free": [1], "bare": [1]}
        assert await cache.get_or_load("static", load("again"), tags=["t"]) == "again"
        await soon(backend, lambda: is_stored(other, "static", "again"))
        await cache.delete_many([*keys, "free", "bare"])


async def is_stored(cache: Cache, key: str, value: object) -> bool:
    return bool(await cache.get(key, MISSING) == value)


async def test_every_way_of_asking(backend: Backend, cache: Cache, other: Cache) -> None:
    for each in (cache, other):
        await cache.set("k", [1], tags=["t"], ttl=50)
        await cache.set("free", [1])
        await each.get("k")
        await cache.invalidate("t")
        await soon(backend, lambda each=each: is_gone(each, "k"))
        assert await each.get("k", MISSING) is MISSING
        assert await each.get_entry("k") is None
        assert await each.get_many(["k", "free"]) == {"free": [1]}
        assert not await each.exists("k")
        assert await each.ttl("k") is None
        assert await names(each) == ["free"]
        assert (await each.status()).total_keys == 1
        assert not await each.touch("k", 100)
        assert await each.add("k", [2])
        assert await each.get("k") == [2]
        await cache.delete("k")


async def test_several_at_once_unknown_ones_and_none(cache: Cache) -> None:
    for tag in "abc":
        await cache.set(tag, 1, tags=[tag, "all"])
    assert await cache.invalidate("a", "c", "a", "nobody's")
    assert await cache.get_many(list("abc")) == {"b": 1}
    assert await cache.invalidate("nobody's")
    assert await cache.invalidate()
    assert await cache.get_many(list("abc")) == {"b": 1}
    assert await cache.invalidate("all")
    assert await cache.get("b") is None
    many = [f"t{n}" for n in range(300)]
    await cache.set("many", 1, tags=many)
    assert await cache.get("many") == 1
    assert await cache.invalidate(*many[::-1])
    assert await cache.get("many") is None


async def test_invalidating_none_asks_nobody() -> None:
    store = FaultyStore(MemoryStore())
    async with Cache(store) as cache:
        assert await cache.invalidate()
        assert store.calls == {}


@pytest.mark.parametrize(
    ("tags", "error"),
    [
        *[(given, TypeError) for given in ("abc", b"abc", 7, [7], [None])],
        *[(given, ValueError) for given in ([""], ["x" * 1025])],
    ],
)
async def test_what_is_no_tag(memory: Cache, tags: Any, error: type[Exception]) -> None:
    for call in (
        lambda: memory.set("k", 1, tags=tags),
        lambda: memory.set_many({"k": 1}, tags=tags),
        lambda: memory.add("k", 1, tags=tags),
        lambda: memory.get_or_load("k", never, tags=tags),
    ):
        with pytest.raises(error, match="tag"):
            await call()
    if isinstance(tags, list):
        with pytest.raises(error, match="tag"):
            await memory.invalidate(*tags)
        with pytest.raises(error, match="tag"):
            await memory.get_or_load("k", load(1, *tags))
    assert await memory.get("k") is None


async def test_any_text_is_a_tag(cache: Cache) -> None:
    tags = ["*", "a b", "ü", "\ud800", "\n", "x" * 1024, "{}", ":", "t", "T"]
    for tag in tags:
        await cache.set(f"k{tags.index(tag)}", 1, tags=[tag])
    for number, tag in enumerate(tags):
        assert await cache.invalidate(tag)
        assert len(await names(cache)) == len(tags) - number - 1


# The cost


@pytest.mark.parametrize("name", ["memory", "file", "redis"])
async def test_one_entry_or_thousands_cost_the_same(name: str, tmp_path: Path, valkey: Server) -> None:
    backend = Backend(name, tmp_path, valkey)
    store = FaultyStore(backend.open().store)
    async with Cache(store, timeout=PATIENT) as cache:
        calls = []
        for number in (1, 5000):
            await cache.set_many({f"k{n}": n for n in range(number)}, tags=["t"])
            assert len(await cache.get_many([f"k{n}" for n in range(number)])) == number
            store.calls.clear()
            assert await cache.invalidate("t")
            calls.append(dict(store.calls))
            assert await cache.get_many([f"k{n}" for n in range(number)]) == {}
        assert calls == [{"delete_many": 2}] * 2


async def test_marks_are_read_once_for_many_entries() -> None:
    store = FaultyStore(MemoryStore())
    async with Cache(store) as cache:
        await cache.set_many({f"k{n}": n for n in range(100)}, tags=["t", "u"])
        store.calls.clear()
        assert len(await cache.get_many([f"k{n}" for n in range(100)])) == 100
        assert store.calls["get_many"] <= 3  # the entries, then the two marks


# On functions


@pytest.mark.parametrize("user", [42, "42", "ann b:c/d", "ü%", UUID(int=7), True, None])
async def test_tags_of_arguments_are_what_one_would_write(cache: Cache, other: Cache, user: Any) -> None:
    calls = 0

    @acached(cache=cache, tags=["users", "user:{user_id}", "of:{user_id}/{kind}"])
    async def fetch(user_id: Any, kind: str = "x") -> str:
        nonlocal calls
        calls += 1
        return f"{user_id} {kind} {calls}"

    for tag in (f"user:{user}", f"of:{user}/x", "users"):
        before = calls
        first = await fetch(user)
        assert await fetch(user) == first
        assert calls == before + 1
        assert await cache.invalidate(f"user:{user}!", f"of:{user}/y", "user:{user_id}", "user:")
        assert await fetch(user) == first
        assert await cache.invalidate(tag)
        assert await fetch(user) != first
        await fetch.invalidate(user)


async def test_tags_of_a_methods_arguments(cache: Cache) -> None:
    calls = 0

    class Api:
        __cache_key__ = "api"

        @acached(cache=cache, tags=["page:{url}", "api"], key="page/{url}")
        async def page(self, url: str, *, depth: int = 1) -> int:
            nonlocal calls
            calls += 1
            current_entry().tags.add(f"depth:{depth}")
            return calls

    api = Api()
    for tag in ("page:http://a?b=c", "api", "depth:1"):
        first = await api.page("http://a?b=c")
        assert await api.page(url="http://a?b=c") == first
        await cache.invalidate(tag)
        assert await api.page("http://a?b=c") == first + 1
        await cache.clear()


@pytest.mark.parametrize("tag", ["user:{nobody}", "user:{user_id!r}", "user:{user_id:>3}", "user:{}", "user:{user_id"])
def test_a_tag_template_is_checked_at_decoration(tag: str) -> None:
    with pytest.raises(ValueError, match=r"tag template|'}'"):

        @acached(tags=[tag])
        async def fetch(user_id: int) -> int:
            return user_id


def test_self_is_no_field_of_a_tag() -> None:
    with pytest.raises(ValueError, match="tag template"):

        class Api:
            __cache_key__ = "api"

            @acached(tags=["{self}"])
            async def fetch(self, user_id: int) -> int:
                return user_id


async def test_an_argument_that_makes_no_tag_says_so(memory: Cache) -> None:
    @acached(cache=memory, tags=["{name}"])
    async def fetch(name: Any) -> int:
        return 1

    for name in ("", "x" * 1025):
        with pytest.raises(ValueError, match="a tag has 1 to"):
            await fetch(name)
    with pytest.raises(TypeError, match="name"):
        await fetch([1])


# Whose tags they are


async def test_namespaces_are_apart_and_scopes_share(cache: Cache) -> None:
    there, scoped = cache.with_namespace("there"), cache.with_scope("tenant")
    for each in (cache, there, scoped):
        await each.set("k", 1, tags=["t"])
    await there.invalidate("t")
    assert [await each.get("k") for each in (cache, there, scoped)] == [1, None, 1]
    await scoped.invalidate("t")
    assert [await each.get("k") for each in (cache, scoped)] == [None, None]


async def test_clearing_removes_marks(cache: Cache, other: Cache) -> None:
    await fill(cache)
    await fill(cache.with_namespace("there"))
    await cache.clear()
    root = cache._space.root
    assert [key async for page in cache.store.scan(root) for key, _ in page] == []
    there = cache.with_namespace("there")
    assert await there.get("set") == [1]
    await fill(other)
    assert await other.get("both") == [1]
