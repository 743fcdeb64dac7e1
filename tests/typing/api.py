"""What type checkers make of the public API. Nothing here runs: mypy in strict mode and pyright read it.

Each ``type: ignore`` is an error that has to be there: both checkers report one that is not needed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar, assert_type

from mcp_hub_cache import (
    FOREVER,
    MISSING,
    Acached,
    AsyncCache,
    Cache,
    CacheStatus,
    CurrentEntry,
    Entry,
    FileCache,
    LoadTimeoutError,
    MemoryCache,
    MissingType,
    Observer,
    Policy,
    RedisCache,
    Stats,
    Store,
    acached,
    current_entry,
    default_cache,
    open_cache,
)
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.memory import MemoryStore

T = TypeVar("T")
N = TypeVar("N", int, str)


@dataclass
class Item:
    name: str


# Functions, bare and with options


@acached
async def bare(query: str, limit: int = 10, *, exact: bool = False) -> list[Item]:
    return []


@acached(ttl="10m", key="search:{query}", ignore=["limit"], version=2, cache_if=bool, namespace="tools", share=True)
async def optioned(query: str, limit: int = 10, *, exact: bool = False) -> list[Item]:
    return []


@acached()
async def empty_options() -> None: ...


async def functions() -> None:
    assert_type(await bare("q"), list[Item])
    assert_type(await bare("q", 5, exact=True), list[Item])
    assert_type(await bare(query="q", limit=5), list[Item])
    assert_type(await optioned("q", limit=5), list[Item])
    await empty_options()

    await bare()  # type: ignore[call-arg]  # query is missing
    await bare(1)  # type: ignore[arg-type]  # no str
    await bare("q", 5, True)  # type: ignore[call-arg]  # exact is keyword-only
    await bare("q", unknown=1)  # type: ignore[call-arg]
    await optioned(1)  # type: ignore[arg-type]
    await empty_options(1)  # type: ignore[call-arg]
    text: str = await bare("q")  # type: ignore[assignment]  # a list
    print(text)


async def extras() -> None:
    for function in (bare, optioned):
        assert_type(function.key("q", exact=True), str)
        assert_type(await function.invalidate("q", 5), bool)
        assert_type(await function.refresh("q", limit=5), list[Item])
        assert_type(await function.peek("q"), list[Item] | MissingType)
        assert_type(await function.bypass("q"), list[Item])
        assert_type(await function.clear(), int)
        assert_type(function.stats(), Stats)
        assert_type(function.__name__, str)

        function.key()  # type: ignore[call-arg]
        function.key(1)  # type: ignore[arg-type]
        await function.invalidate("q", "5")  # type: ignore[arg-type]
        await function.refresh("q", nope=1)  # type: ignore[call-arg]
        await function.peek(query=1)  # type: ignore[arg-type]
        await function.bypass()  # type: ignore[call-arg]
        await function.clear("q")  # type: ignore[call-arg]

    found = await bare.peek("q")
    if found is not MISSING:
        assert_type(found, list[Item])
    maybe = found or []
    assert_type(maybe, list[Item])


def as_arguments() -> None:
    """A decorated function goes wherever the plain one went."""

    def takes(function: Callable[[str], Coroutine[Any, Any, list[Item]]]) -> None: ...
    def takes_acached(function: Acached[[str, int], int]) -> None: ...
    def takes_other(function: Callable[[int], Coroutine[Any, Any, list[Item]]]) -> None: ...

    takes(bare)
    takes(optioned)
    takes_other(bare)  # type: ignore[arg-type]

    @acached
    async def two(x: str, y: int, /) -> int:
        return y

    takes_acached(two)
    takes_acached(bare)  # type: ignore[arg-type]


# Generic functions


@acached
async def first(items: Sequence[T]) -> T:
    return items[0]


@acached(ttl=5)
async def same(value: N, other: N) -> N:
    return value


async def generics() -> None:
    assert_type(await first([1, 2]), int)
    assert_type(await first.refresh(["a"]), str)
    assert_type(await first.peek([1.5]), float | MissingType)
    assert_type(await same("a", "b"), str)
    await same(1, "b")  # type: ignore[type-var]
    await first(5)  # type: ignore[arg-type]


# Parameters of all kinds


@acached
async def all_kinds(a: int, /, b: str = "", *args: float, c: bool, **rest: bytes) -> dict[str, int]:
    return {}


async def kinds() -> None:
    assert_type(await all_kinds(1, "b", 1.0, 2.0, c=True, d=b""), dict[str, int])
    assert_type(all_kinds.key(1, c=True), str)
    await all_kinds(1)  # type: ignore[call-arg]
    await all_kinds(1, c=True, d="")  # type: ignore[arg-type]
    await all_kinds.refresh(a=1, c=True)  # type: ignore[call-arg, arg-type]


# Methods


class Client:
    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def __cache_key__(self) -> str:
        return self.url

    @acached
    async def fetch(self, path: str, *, raw: bool = False) -> bytes:
        return b""

    @acached(ttl="1h", scope="me")
    async def get(self, path: str, default: T) -> str | T:
        return path

    @staticmethod
    @acached
    async def under(x: int) -> list[int]:
        return [x]

    @staticmethod
    @acached(ttl=60)
    async def under_with_options(x: int) -> list[int]:
        return [x]

    async def uses_itself(self) -> bytes:
        return await self.fetch("x", raw=True)


class Child(Client):
    async def more(self) -> bytes:
        return await super().fetch("x") + await self.fetch.refresh("x")


async def methods(client: Client, child: Child) -> None:
    assert_type(await client.fetch("x"), bytes)
    assert_type(await child.fetch("x", raw=True), bytes)
    assert_type(await Client.fetch(client, "x"), bytes)
    assert_type(await client.get("x", 5), str | int)
    assert_type(client.fetch.key("x"), str)
    assert_type(await client.fetch.invalidate("x", raw=True), bool)
    assert_type(await client.fetch.refresh("x"), bytes)
    assert_type(await client.fetch.peek("x"), bytes | MissingType)
    assert_type(await client.fetch.bypass("x"), bytes)
    assert_type(await client.fetch.clear(), int)
    assert_type(client.fetch.stats(), Stats)
    assert_type(await Client.fetch.refresh(client, "x"), bytes)

    await client.fetch()  # type: ignore[call-arg]
    await client.fetch(1)  # type: ignore[arg-type]
    await client.fetch(client, "x")  # type: ignore[call-arg, arg-type]
    client.fetch.key(1)  # type: ignore[arg-type]
    await client.fetch.refresh("x", nope=1)  # type: ignore[call-arg]
    await Client.fetch("x")  # type: ignore[call-arg, arg-type]

    assert_type(await Client.under(1), list[int])
    assert_type(await Client.under_with_options.refresh(1), list[int])
    assert_type(Client.under.key(1), str)
    await Client.under("x")  # type: ignore[arg-type]
    await Client.under.peek("x")  # type: ignore[arg-type]
    # A limit: on an instance both checkers bind a static method's first parameter. It runs all right.
    print(await client.under(1))  # type: ignore[call-arg]
    print(await client.under_with_options.refresh(1))  # type: ignore[call-arg]


class Fetches(Protocol):
    async def fetch(self, path: str, *, raw: bool = False) -> bytes: ...


def methods_satisfy_protocols(client: Client) -> None:
    def takes(each: Callable[[str], Coroutine[Any, Any, bytes]]) -> None: ...

    takes(client.fetch)


# What is refused


def refused() -> None:
    @acached  # type: ignore[type-var, arg-type, unused-ignore]
    def sync(x: int) -> int:
        return x

    @acached(ttl=5)  # type: ignore[arg-type]
    def sync_with_options(x: int) -> int:
        return x

    @acached(ttl=5)  # type: ignore[arg-type]
    async def stream(x: int) -> AsyncIterator[int]:
        yield x

    print(sync, sync_with_options, stream)


tenant: ContextVar[str] = ContextVar("tenant")


def options(cache: AsyncCache) -> None:
    acached(ttl=5)
    acached(ttl="5m")
    acached(ttl=timedelta(minutes=5))
    acached(ttl=FOREVER)
    acached(cache=cache)
    acached(cache=lambda: cache)
    acached(cache=open_cache)
    acached(scope=tenant)
    acached(scope="tenant")
    acached(scope=lambda user: user)
    acached(key=lambda x: f"k{x}")
    acached(ignore=("a", "b"))
    acached(ignore="a")

    acached(ttl=b"5m")  # type: ignore[call-overload]
    acached(cache=5)  # type: ignore[call-overload]
    acached(scope=1.5)  # type: ignore[call-overload]
    acached(key=5)  # type: ignore[call-overload]
    acached(nope=1)  # type: ignore[call-overload]
    acached("5m")  # type: ignore[call-overload]


# Policies


class NotFoundError(Exception): ...


def max_age(result: Item) -> float:
    return 5.0 if result.name else 0.0


patient = Policy(ttl="10m", stale_ttl=timedelta(hours=1), soft_timeout=0, tags=["all"])


def policies(cache: AsyncCache) -> None:
    assert_type(patient.replace(ttl=5, stale_ttl="1d"), Policy)
    Policy()
    Policy(ttl=FOREVER, cache_errors={NotFoundError: "30s", LoadTimeoutError: 5}, timeout=2.5)
    Policy(ttl=max_age, jitter="10s", early=1, cache_if=lambda result: result is not None)
    Policy(coalesce="fleet", wait_timeout="5s", on_wait_timeout="error", tags=(f"n{n}" for n in range(3)))
    Policy(stale_ttl=60, throttle=0, on_wait_timeout="stale", coalesce="fleet")

    Policy("10m")  # type: ignore[call-arg]
    Policy(ttl=b"10m")  # type: ignore[arg-type]
    Policy(early="1")  # type: ignore[arg-type]
    Policy(coalesce="cluster")  # type: ignore[arg-type]
    Policy(on_wait_timeout="raise")  # type: ignore[arg-type]
    Policy(cache_errors=[NotFoundError])  # type: ignore[arg-type]
    Policy(cache_errors={KeyboardInterrupt: 5})  # type: ignore[dict-item]
    Policy(tags=[1])  # type: ignore[list-item]
    Policy(nope=1)  # type: ignore[call-arg]
    patient.ttl = 5  # type: ignore[misc]

    acached(policy=patient)
    acached(policy=patient, ttl="1m", stale_ttl=None, tags=["user:{user_id}"], scope="{tenant_id}")
    acached(policy=patient, cache_errors={NotFoundError: 5}, coalesce="fleet", early=1, cache=cache)
    acached(ttl=max_age)

    acached(policy={"ttl": 5})  # type: ignore[call-overload]
    acached(policy="10m")  # type: ignore[call-overload]
    acached(coalesce="cluster")  # type: ignore[call-overload]
    acached(soft_timout=0)  # type: ignore[call-overload]
    acached(tags=5)  # type: ignore[call-overload]


@acached(policy=patient, tags=["user:{user_id}"])
async def profile(user_id: int, part: str = "") -> Item:
    entry = current_entry()
    assert_type(entry, CurrentEntry)
    assert_type(entry.ttl, float | None)
    assert_type(entry.tags, set[str])
    assert_type(entry.stale_value, Any | MissingType)
    entry.ttl = "5m"
    entry.ttl = 5
    entry.ttl = timedelta(minutes=5)
    entry.tags.add("team:red")
    entry.tags.update({"a"}, ["b"])
    entry.skip()
    old: Item | None = None if entry.stale_value is MISSING else entry.stale_value
    print(old)
    entry.ttl = None  # type: ignore[assignment]
    entry.tags.add(5)  # type: ignore[arg-type]
    entry.stale_value = 5  # type: ignore[misc]
    return entry.not_modified()


async def other_policies(client: Client) -> None:
    quick = profile.with_policy(timeout="2s", soft_timeout=None)
    assert_type(await quick(42, part="x"), Item)
    assert_type(await quick.refresh(42), Item)
    assert_type(await profile.with_policy(patient)(42), Item)
    assert_type(await profile.with_policy(patient, ttl=5).peek(42), Item | MissingType)
    await quick("42")  # type: ignore[arg-type]
    profile.with_policy(ttl=b"")  # type: ignore[arg-type]
    profile.with_policy(nope=1)  # type: ignore[call-arg]
    profile.with_policy({"ttl": 5})  # type: ignore[arg-type]

    fetch = client.fetch.with_policy(stale_ttl="1h")
    assert_type(await fetch("x", raw=True), bytes)
    await fetch(1)  # type: ignore[arg-type]


# The cache


async def reading(cache: AsyncCache) -> None:
    assert_type(await cache.get("k"), Any)
    assert_type(await cache.get("k", 5), Any)
    assert_type(await cache.get("k", as_type=Item), Item | None)
    assert_type(await cache.get("k", MISSING, as_type=Item), Item | MissingType)
    assert_type(await cache.get("k", 5, as_type=str), str | int)
    assert_type(await cache.get("k", as_type=list[Item]), list[Item] | None)
    # Not a class but an annotation: checkers can't follow, and don't complain.
    assert_type(await cache.get("k", as_type=Item | None), Any)
    assert_type(await cache.get_many(["a", "b"]), dict[str, Any])
    assert_type(await cache.get_entry("k"), Entry[Any] | None)
    assert_type(await cache.exists("k"), bool)
    assert_type(await cache.ttl("k"), float | None)
    async for key in cache.keys("prefix"):
        assert_type(key, str)

    await cache.get(b"k")  # type: ignore[call-overload]
    await cache.get_many([1])  # type: ignore[list-item]


async def writing(cache: AsyncCache, mapping: Mapping[str, int]) -> None:
    await cache.set("k", object(), ttl="1h", as_type=Item)
    await cache.set_many(mapping, ttl=FOREVER)
    assert_type(await cache.add("k", 1, ttl=timedelta(1)), bool)
    assert_type(await cache.delete("k"), bool)
    assert_type(await cache.delete_many({"a", "b"}), int)
    assert_type(await cache.touch("k", 5), bool)
    assert_type(await cache.clear(), int)

    await cache.set("k", 1, tags=["user:42"], policy=patient)
    await cache.set_many(mapping, tags={"a"}, policy=patient)
    assert_type(await cache.add("k", 1, tags=("a",)), bool)
    assert_type(await cache.invalidate("user:42", "all"), bool)

    await cache.set("k")  # type: ignore[call-arg]
    await cache.set("k", 1, policy="10m")  # type: ignore[arg-type]
    await cache.set("k", 1, stale_ttl=5)  # type: ignore[call-arg]  # a policy's
    await cache.set("k", 1, tags=[1])  # type: ignore[list-item]
    await cache.invalidate(["user:42"])  # type: ignore[arg-type]
    await cache.set(1, 1)  # type: ignore[arg-type]
    await cache.set("k", 1, 60)  # type: ignore[call-arg]  # ttl is keyword-only
    await cache.set("k", 1, ttl=[5])  # type: ignore[arg-type]
    await cache.touch("k")  # type: ignore[call-arg]


async def loading(cache: AsyncCache) -> None:
    async def load() -> Item:
        return Item("x")

    def plain() -> Item:
        return Item("x")

    assert_type(await cache.get_or_load("k", load), Item)
    kept = await cache.get_or_load("k", load, ttl=5, as_type=Item, cache_if=lambda item: item.name != "", share=True)
    assert_type(kept, Item)
    assert_type(await cache.get_or_load("k", load, policy=patient, scope=tenant), Item)
    assert_type(await cache.get_or_load("k", load, ttl=max_age, tags=["a"], coalesce="fleet", scope=42), Item)
    await cache.get_or_load("k", load, policy=patient, timeout=None)
    assert_type(cache.with_scope("acme"), AsyncCache)
    assert_type(await cache.with_scope(tenant).get_or_load("k", load), Item)

    await cache.get_or_load("k", load, nope=1)  # type: ignore[call-arg]
    await cache.get_or_load("k", load, coalesce="cluster")  # type: ignore[arg-type]
    await cache.get_or_load("k", load, scope=lambda: "acme")  # type: ignore[arg-type]
    cache.with_scope(1.5)  # type: ignore[arg-type]
    await cache.get_or_load("k", plain)  # type: ignore[arg-type]
    await cache.get_or_load("k", load())  # type: ignore[arg-type, unused-coroutine, unused-ignore]


async def all_caches_are_async_caches(observer: Observer) -> None:
    def takes(cache: AsyncCache) -> None: ...

    takes(MemoryCache(max_bytes=None, namespace="n", default_ttl="1h", l1_max_entries=0, observer=observer))
    takes(FileCache("cache", max_bytes=10, durable=True))
    takes(RedisCache("redis://localhost", fallback=MemoryStore()))
    takes(Cache(MemoryStore()))
    takes(open_cache(cache_backend="memory"))
    takes(await default_cache())
    takes(MemoryStore())  # type: ignore[arg-type]

    MemoryCache(nope=1)  # type: ignore[call-arg]
    FileCache(5)  # type: ignore[arg-type]
    Cache(FileStore("x"), default_ttl=None)  # type: ignore[arg-type]

    async with MemoryCache() as memory:
        assert_type(memory, MemoryCache)
        assert_type(await memory.get("k", as_type=int), int | None)
        assert_type(await memory.status(), CacheStatus)
        assert_type(await memory.health_check(), bool)
        assert_type(memory.stats, Stats)
        assert_type(memory.with_namespace("other"), Cache)
        assert_type(memory.with_scope("acme"), Cache)
    Cache(MemoryStore(), policy=patient, coalesce="fleet", max_refreshes=0)
    FileCache("cache", policy=patient, coalesce="fleet", max_refreshes=0)
    MemoryCache(policy="10m")  # type: ignore[arg-type]


def stores_are_stores() -> list[Store]:
    return [MemoryStore(), FileStore("x")]
