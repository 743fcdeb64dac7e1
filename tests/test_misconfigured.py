"""``on_misconfigured``: what calls get while a person has to put the store's configuration right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from mcp_hub_cache import Cache, MemoryCache, StoreMisconfiguredError, acached
from mcp_hub_cache._exceptions import (
    StoreAuthError,
    StoreBusyError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreProtocolError,
    StoreTLSError,
    StoreUnreachableError,
)
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FaultyStore

AUTH = StoreAuthError("no.", cure="Set REDIS_PASSWORD.")

Call = Callable[[Cache], Awaitable[object]]


async def _keys(cache: Cache) -> list[str]:
    return [key async for key in cache.keys("")]


async def _fetched(cache: Cache) -> object:
    @acached(ttl=60, cache=cache)
    async def fetch() -> str:
        raise AssertionError("loaded")

    return await fetch()


async def _never() -> str:
    raise AssertionError("loaded")


# Every call of a cache; what it answers where trouble is served.
CALLS: dict[str, tuple[Call, object]] = {
    "get": (lambda cache: cache.get("k"), None),
    "get_many": (lambda cache: cache.get_many(["k", "l"]), {}),
    "get_entry": (lambda cache: cache.get_entry("k"), None),
    "set": (lambda cache: cache.set("k", 2), None),
    "set with tags": (lambda cache: cache.set("k", 2, tags=["t"]), None),
    "set_many": (lambda cache: cache.set_many({"k": 2, "l": 2}), None),
    "set_many with tags": (lambda cache: cache.set_many({"k": 2, "l": 2}, tags=["t"]), None),
    "add": (lambda cache: cache.add("k", 2), False),
    "delete": (lambda cache: cache.delete("k"), False),
    "delete_many": (lambda cache: cache.delete_many(["k", "l"]), 0),
    "exists": (lambda cache: cache.exists("k"), False),
    "ttl": (lambda cache: cache.ttl("k"), None),
    "touch": (lambda cache: cache.touch("k", 9), False),
    "invalidate": (lambda cache: cache.invalidate("t"), False),
    "clear": (lambda cache: cache.clear(), 0),
    "clear of an owner": (lambda cache: cache.clear(owner="f"), 0),
    "keys": (_keys, []),
}
LOADS: dict[str, Call] = {
    "get_or_load": lambda cache: cache.get_or_load("k", _never),
    "get_or_load with tags": lambda cache: cache.get_or_load("k", _never, tags=["t"]),
    "get_or_load, stale_ttl": lambda cache: cache.get_or_load("k", _never, stale_ttl=60),
    "get_or_load, refresh": lambda cache: cache.get_or_load("k", _never, refresh=True),
    "acached": _fetched,
}


class World:
    """A cache that raises, over a primary that can be broken."""

    def __init__(self, *, guarded: bool, mode: str = "raise") -> None:
        self.memory = MemoryStore()
        self.faulty = FaultyStore(self.memory)
        self.standby = MemoryStore()
        options: dict[str, Any] = {"probe_after": 3600.0, "probe_max": 3600.0}
        store: Any = FailoverStore(self.faulty, self.standby, **options) if guarded else self.faulty
        self.cache = Cache(store, on_misconfigured=mode, timeout=30)  # type: ignore[arg-type]  # text for both


@pytest.fixture(params=["behind a breaker", "alone"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    world = World(guarded=request.param == "behind a breaker")
    yield world
    await world.cache.aclose()
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("call", [*CALLS, *LOADS])
async def test_every_call_raises_with_the_cure_and_loads_nothing(world: World, call: str) -> None:
    await world.cache.set("k", 1, tags=["t"])
    world.faulty.break_down(AUTH)
    for _ in range(2):
        with pytest.raises(StoreAuthError, match=r"^no\. Set REDIS_PASSWORD\.$") as caught:
            await {**LOADS, **{name: one for name, (one, _) in CALLS.items()}}[call](world.cache)
        assert caught.value is not AUTH and caught.value.cure == AUTH.cure
    assert world.cache.stats.errors["auth"] >= 2
    assert [key for key in world.standby._entries if key.startswith(b"mcp_hub:")] == []  # the journal is none


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("call", CALLS)
async def test_by_default_no_call_raises(guarded: bool, call: str) -> None:
    world = World(guarded=guarded, mode="serve")
    await world.cache.set("k", 1)
    world.faulty.break_down(AUTH)
    one, answer = CALLS[call]
    assert await one(world.cache) == answer
    assert world.cache.stats.errors["auth"] >= 1
    await world.cache.aclose()


@pytest.mark.parametrize("kind", [StoreTLSError, StorePermissionError, StoreMisconfiguredError])
async def test_whatever_a_person_must_put_right_is_raised(world: World, kind: type[StoreError]) -> None:
    world.faulty.break_down(kind("no."))
    with pytest.raises(kind):
        await world.cache.get("k")


@pytest.mark.parametrize(
    "kind", [StoreUnreachableError, StoreBusyError, StoreFullError, StoreProtocolError, StoreError]
)
async def test_nothing_else_is_raised(world: World, kind: type[StoreError]) -> None:
    world.faulty.break_down(kind("no."))
    for _ in range(5):
        assert await world.cache.get("k") is None
        await world.cache.set("k", 1)
        await world.cache.delete("k")
    assert await world.cache.get_or_load("k", _one) == 1


async def _one() -> int:
    return 1


async def test_status_and_health_never_raise(world: World) -> None:
    world.faulty.break_down(AUTH)
    assert await world.cache.health_check() is False
    status = await world.cache.status()
    assert (status.status, status.problem) == ("misconfigured", str(AUTH))


async def test_status_counts_nothing_where_listing_is_denied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.cache.set("k", 1)
    denied = FaultyStore(world.memory)
    denied.break_down(StorePermissionError("SCAN."))
    monkeypatch.setattr(world.faulty, "scan", denied.scan)
    assert (await world.cache.status()).total_keys == 0
    assert await world.cache.get("k") == 1
    with pytest.raises(StorePermissionError):
        await _keys(world.cache)


async def test_it_serves_again_when_it_is_put_right(world: World) -> None:
    await world.cache.set("k", 1)
    world.faulty.break_down(AUTH)
    with pytest.raises(StoreAuthError):
        await world.cache.set("k", 2)
    world.faulty.repair()
    await world.cache.health_check()  # has it looked at now
    async with asyncio.timeout(20):
        while not await world.cache.health_check():
            await asyncio.sleep(0.005)
    await world.cache.set("l", 3)
    assert await world.cache.get("l") == 3


@pytest.mark.parametrize("tags", [(), ("t",)])
@pytest.mark.parametrize("many", [False, True])
async def test_what_could_not_be_replaced_does_not_pass_for_its_successor(tags: tuple[str, ...], many: bool) -> None:
    """The rule of writes holds in this mode, too: what was to be replaced is removed, or made up for."""
    world = World(guarded=True)
    await world.cache.set("k", "old")
    world.faulty.break_down(AUTH)
    with pytest.raises(StoreAuthError):
        await (world.cache.set_many({"k": "new"}, tags=tags) if many else world.cache.set("k", "new", tags=tags))
    world.faulty.repair()
    await world.cache.store.ping()
    async with asyncio.timeout(20):
        while not await world.cache.health_check():
            await asyncio.sleep(0.005)
    assert await world.cache.get("k") is None
    await world.cache.aclose()


@pytest.mark.parametrize("ends", ["value", "error", "cached error"])
@pytest.mark.parametrize("late_tag", [False, True])
async def test_what_a_loader_has_yielded_is_nobodys_loss(world: World, ends: str, late_tag: bool) -> None:
    """The password is changed while it loads: all who wait get the loader's answer, the next caller the error."""
    from mcp_hub_cache import current_entry

    begun, go_on = asyncio.Event(), asyncio.Event()

    async def load() -> str:
        if late_tag:
            current_entry().tags.add("late")
        begun.set()
        await go_on.wait()
        if ends != "value":
            raise LookupError("the loader's own")
        return "loaded"

    errors: Any = {LookupError: "1m"} if ends == "cached error" else None
    calls = [
        asyncio.ensure_future(world.cache.get_or_load("k", load, cache_errors=errors, tags=["t"])) for _ in range(3)
    ]
    await begun.wait()
    world.faulty.break_down(AUTH)
    go_on.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(answer) for answer in answers] == ["loaded" if ends == "value" else "the loader's own"] * 3
    with pytest.raises(StoreAuthError):
        await world.cache.get_or_load("k", load)


async def test_all_who_wait_for_one_load_are_told(world: World) -> None:
    world.faulty.break_down(AUTH)
    calls = [world.cache.get_or_load("k", _never) for _ in range(20)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(answer) for answer in answers} == {StoreAuthError}


@pytest.mark.parametrize("call", ["invalidate", "clear"])
async def test_a_cancelled_caller_leaves_no_error_behind(world: World, call: str) -> None:
    """What goes on without its caller raises to nobody, and is no exception that was never retrieved."""
    world.faulty.hang.clear()
    task = asyncio.ensure_future(CALLS[call][0](world.cache))
    async with asyncio.timeout(20):
        while not world.faulty.calls:
            await asyncio.sleep(0)
    task.cancel()
    world.faulty.break_down(AUTH)
    world.faulty.hang.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_it_is_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='"serve" or "raise", not \'panic\''):
        MemoryCache(on_misconfigured="panic")  # type: ignore[arg-type]  # that is the point
    from mcp_hub_cache import open_cache

    monkeypatch.setenv("CACHE_ON_MISCONFIGURED", "RAISE")
    opened = open_cache(cache_backend="memory")
    assert opened._engine._raises
    monkeypatch.setenv("CACHE_ON_MISCONFIGURED", "serve")
    assert not open_cache(cache_backend="memory")._engine._raises
