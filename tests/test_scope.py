"""Scopes: one tenant, user or agent run never reads what is another's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import MISSING, Cache, UncacheableError, acached
from mcp_hub_cache._keys import KeySpace
from tests.backends import NAMES, Backend, poll, store_raw, stored
from tests.servers import Server, valkey_server

TENANT: ContextVar[Any] = ContextVar("TENANT")
# Values that look alike, and are different tenants.
TENANTS: tuple[Any, ...] = ("a", "b", "", "None", None, 1, "1", True, 1.0, b"a", ("a",), ("a", "b"), "a:b", "a:", "*")


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


async def as_tenant(tenant: object, call: Callable[[], Any]) -> Any:
    """What *call* gives in a task in which the variable is set, or not set: MISSING."""

    async def inside() -> Any:
        if tenant is not MISSING:
            TENANT.set(tenant)
        return await call()

    return await asyncio.create_task(inside())


async def names(cache: Cache, prefix: str = "") -> list[str]:
    return sorted([key async for key in cache.keys(prefix)])


# Views


async def test_each_scope_has_keys_of_its_own(cache: Cache) -> None:
    views = [cache, *(cache.with_scope(tenant) for tenant in TENANTS)]
    for number, view in enumerate(views):
        await view.set("k", number)
        await view.set(f"only {number}", number)
    for number, view in enumerate(views):
        assert await view.get("k") == number
        assert await view.get_many(["k", "only 0", f"only {number}"]) == {"k": number, f"only {number}": number} | (
            {"only 0": 0} if number == 0 else {}
        )
        assert await names(view) == ["k", f"only {number}"]
        assert await names(view, "on") == [f"only {number}"]
        assert await view.exists("k")
        assert not await view.exists(f"only {number + 1}")


async def test_what_one_scope_changes_no_other_sees(cache: Cache) -> None:
    one, other = cache.with_scope("a"), cache.with_scope("b")
    for view in (cache, one, other):
        await view.set_many({"k": "old", "l": "old", "m": "old"})
    await one.set("k", "new")
    assert await one.delete("l")
    assert await one.delete_many(["l", "m"]) == 1
    assert not await one.touch("m", 60)
    assert await one.add("m", "added")
    assert not await other.add("m", "added")
    for view in (cache, other):
        assert await view.get_many(["k", "l", "m"]) == {"k": "old", "l": "old", "m": "old"}
    assert await one.get_many(["k", "l", "m"]) == {"k": "new", "m": "added"}


async def test_clearing_a_scope_clears_it_alone_and_clearing_all_clears_all(cache: Cache) -> None:
    one, other = cache.with_scope("a"), cache.with_scope("b")
    for view in (cache, one, other):
        await view.set_many({"k1": 1, "k2": 2, "l": 3})
    assert await one.clear(prefix="k") == 2
    assert [await names(view) for view in (cache, one, other)] == [["k1", "k2", "l"], ["l"], ["k1", "k2", "l"]]
    assert await one.clear() == 1
    assert [await names(view) for view in (cache, one, other)] == [["k1", "k2", "l"], [], ["k1", "k2", "l"]]
    assert await cache.clear(prefix="k") == 2  # of nobody's
    assert await names(other) == ["k1", "k2", "l"]
    assert await cache.clear() == 4
    assert [await names(view) for view in (cache, one, other)] == [[], [], []]


async def test_clearing_one_scope_leaves_anothers_load_in_progress(cache: Cache) -> None:
    one, other = cache.with_scope("a"), cache.with_scope("b")
    go, began = asyncio.Event(), []

    async def load() -> str:
        began.append(1)
        await go.wait()
        return "loaded"

    tasks = [asyncio.create_task(view.get_or_load("k", load)) for view in (one, other)]
    await poll(lambda: len(began) == 2)  # each its own
    await one.clear()
    go.set()
    assert await asyncio.gather(*tasks) == ["loaded"] * 2
    assert (await one.get("k"), await other.get("k"), await cache.get("k")) == (None, "loaded", None)


async def test_the_same_scope_is_the_same_for_all(backend: Backend) -> None:
    here, there = backend.open(), backend.open()
    await here.with_scope("a").set("k", 1)
    assert await here.with_scope("a").get("k") == 1
    assert await there.with_scope("a").get("k") == 1

    async def by_variable() -> Any:
        return await there.with_scope(TENANT).get("k")

    assert await as_tenant("a", by_variable) == 1
    await backend.aclose()


async def test_a_scope_within_a_scope_is_not_that_of_another(cache: Cache) -> None:
    """Two tenants have a run of the same number each."""
    views = [
        cache,
        *(cache.with_scope(name) for name in ("a", "b", "run")),
        *(cache.with_scope(name).with_scope("run") for name in ("a", "b", "run")),
        cache.with_scope("run").with_scope("a"),
    ]
    for number, view in enumerate(views):
        await view.set("k", number)
    assert [await view.get("k") for view in views] == list(range(len(views)))
    for tenant in ("a", "b"):
        view = cache.with_scope(tenant)
        assert await view.get_or_load("k2", text(tenant), scope="run") == tenant
        assert await view.with_scope("run").get("k2") == tenant
    assert await cache.with_scope("run").get("k2") is None
    assert await cache.clear() == len(views) + 2


async def test_another_namespace_keeps_the_scope(cache: Cache) -> None:
    one, other = (cache.with_scope(tenant).with_namespace("n") for tenant in ("a", "b"))
    await one.set("k", "a's")
    assert await other.get("k") is None
    assert await cache.with_namespace("n").get("k") is None
    assert await cache.with_namespace("n").with_scope("a").get("k") == "a's"
    assert await cache.with_scope("a").get("k") is None


def text(value: str) -> Callable[[], Any]:
    async def load() -> str:
        return value

    return load


async def test_a_view_of_an_unset_variable_is_refused(cache: Cache) -> None:
    with pytest.raises(LookupError, match="TENANT is not set"):
        cache.with_scope(TENANT)


async def test_what_has_no_stable_form_is_no_scope(cache: Cache) -> None:
    with pytest.raises(UncacheableError, match="scope"):
        cache.with_scope(object())  # type: ignore[arg-type]
    with pytest.raises(UncacheableError, match="scope"):
        await cache.get_or_load("k", text("x"), scope=object())  # type: ignore[arg-type]


def test_no_two_scopes_share_a_key() -> None:
    spaces = [KeySpace(), KeySpace(scope="0" * 22), KeySpace(namespace="s"), KeySpace(namespace="e")]
    for one, other in combinations(spaces, 2):
        assert not one.entries.startswith(other.entries)
        assert not other.entries.startswith(one.entries)


# get_or_load


async def test_a_load_is_shared_within_a_scope_alone(cache: Cache) -> None:
    go, calls = asyncio.Event(), []

    async def load() -> str:
        calls.append(TENANT.get())
        await go.wait()
        return f"{TENANT.get()}'s"

    def ask() -> Any:
        return asyncio.gather(*(cache.get_or_load("k", load, scope=TENANT) for _ in range(20)))

    tasks = [asyncio.create_task(as_tenant(tenant, ask)) for tenant in ("a", "b", "c")]
    await poll(lambda: len(calls) == 3)
    go.set()
    assert await asyncio.gather(*tasks) == [[f"{tenant}'s"] * 20 for tenant in ("a", "b", "c")]
    assert sorted(calls) == ["a", "b", "c"]
    # By value it is the same scope.
    for tenant in ("a", "b", "c"):
        assert await cache.get_or_load("k", load, scope=tenant) == f"{tenant}'s"
        assert await cache.with_scope(tenant).get("k") == f"{tenant}'s"
    assert await cache.get("k") is None


async def test_an_unset_variable_means_uncached_with_one_warning(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    async def load() -> int:
        nonlocal calls
        calls += 1
        return calls

    with caplog.at_level(logging.WARNING, "mcp_hub_cache"):
        assert [await cache.get_or_load("k", load, scope=TENANT) for _ in range(3)] == [1, 2, 3]
    (record,) = caplog.records
    assert "is called uncached: the scope variable TENANT is not set" in record.getMessage()
    assert await names(cache) == []


# Functions


SCOPES: dict[str, Any] = {
    "template": "{user}",
    "template with text": "user:{user}",
    "function": lambda user, n: user,
}


@pytest.mark.parametrize("key", [None, "n:{n}"])
@pytest.mark.parametrize("scope", SCOPES)
async def test_a_function_tells_scopes_apart_by_an_argument(cache: Cache, scope: str, key: str | None) -> None:
    calls = 0

    @acached(cache=cache, scope=SCOPES[scope], ignore=["user"], key=key)
    async def find(user: str, n: int) -> str:
        nonlocal calls
        calls += 1
        return f"{user}'s {n}"

    for _ in range(3):
        for user in ("ann", "bob", "", "ann:bob"):
            for n in range(3):
                assert await find(user, n) == await find(n=n, user=user) == f"{user}'s {n}"
    assert calls == 12
    assert await find.invalidate("ann", 1)
    assert await find.peek("ann", 1) is MISSING
    assert await find.peek("bob", 1) == "bob's 1"


async def test_a_template_is_checked_at_decoration(cache: Cache) -> None:
    with pytest.raises((TypeError, ValueError), match="usr"):

        @acached(cache=cache, scope="{usr}")
        async def find(user: str) -> str:
            return user


async def test_functions_by_value_and_by_variable(cache: Cache) -> None:
    async def find(n: int) -> str:
        return f"{TENANT.get()}'s {n}"

    by_variable = acached(cache=cache, scope=TENANT)(find)
    for _ in range(3):  # the third is from memory, by the shortcut
        for tenant in TENANTS:
            assert await as_tenant(tenant, lambda: by_variable(1)) == f"{tenant}'s 1"
    assert by_variable.stats().loads == len(TENANTS)
    # By value it is the same scope: nothing is called, with no variable set.
    by_value = [(tenant, acached(cache=cache, scope=tenant)(find)) for tenant in ("a", "b", 1, "1", True)]
    assert [await function(1) for _, function in by_value] == [f"{tenant}'s 1" for tenant, _ in by_value]
    assert len({function.key(1) for _, function in by_value}) == len(by_value)


async def test_a_variable_that_comes_and_goes(cache: Cache) -> None:
    calls = 0

    @acached(cache=cache, scope=TENANT)
    async def find(n: int) -> int:
        nonlocal calls
        calls += 1
        return calls

    async def of(tenant: object) -> int:
        result: int = await as_tenant(tenant, lambda: find(1))
        return result

    assert [await of(tenant) for tenant in ("a", MISSING, "a", MISSING, "b", "a", "b")] == [1, 2, 1, 3, 4, 1, 4]


async def test_a_refresh_in_the_background_is_the_tenants_own(backend: Backend) -> None:
    cache = backend.open_timed()
    calls: list[str] = []

    @acached(cache=cache, scope=TENANT, ttl=0.5, stale_ttl="1h", soft_timeout=0)
    async def find(n: int) -> str:
        calls.append(TENANT.get())
        return f"{TENANT.get()}'s, the {calls.count(TENANT.get())}."

    for tenant in ("a", "b"):
        assert await as_tenant(tenant, lambda: find(1)) == f"{tenant}'s, the 1."
    await backend.let_pass(cache, 0.6)
    for tenant in ("a", "b"):
        assert await as_tenant(tenant, lambda: find(1)) == f"{tenant}'s, the 1."
    await poll(lambda: len(calls) == 4)
    assert sorted(calls[2:]) == ["a", "b"]  # refreshes begin in no order
    await backend.aclose()


async def test_a_function_on_a_scoped_cache_keeps_its_scope_in_another_namespace(cache: Cache) -> None:
    functions = []
    for tenant in ("a", "b"):

        def make(tenant: str) -> Any:
            async def find(n: int) -> str:
                return tenant

            find.__qualname__ = "find"
            return acached(cache=cache.with_scope(tenant), namespace="n", key="k:{n}")(find)

        functions.append(make(tenant))
    assert [await find(1) for find in functions] == ["a", "b"]


# Frames under keys that are not theirs


@pytest.mark.parametrize("way", ["views", "a function", "none's and somebody's"])
async def test_swapped_frames_are_misses(backend: Backend, way: str) -> None:
    cache = backend.open(l1_max_entries=0)

    @acached(cache=cache, scope="{user}", ignore=["user"])
    async def find(user: str) -> str:
        return f"{user}'s"

    if way == "a function":
        one = other = cache
        keys = [find.key("ann"), find.key("bob")]
        assert [await find("ann"), await find("bob")] == ["ann's", "bob's"]
    else:
        one, other = (cache if way != "views" else cache.with_scope("ann")), cache.with_scope("bob")
        keys = ["k", "k"]
        await one.set("k", "ann's")
        await other.set("k", "bob's")
    (first, second) = await stored(one, keys[0]), await stored(other, keys[1])
    assert first is not None
    assert second is not None
    await store_raw(one, keys[0], second)
    await store_raw(other, keys[1], first)
    assert cache.stats.errors == {}
    assert await one.get(keys[0]) is None
    assert await other.get(keys[1]) is None
    assert cache.stats.errors == {"wrong-key": 2}
    assert await one.get_many([keys[0]]) == await other.get_many([keys[1]]) == {}
    assert await one.get_entry(keys[0]) is None
    assert not await one.exists(keys[0])
    assert cache.stats.errors == {"wrong-key": 6}
    # And one is loaded in its place.
    if way == "a function":
        assert [await find("ann"), await find("bob")] == ["ann's", "bob's"]
        assert find.stats().loads == 4
    else:
        assert await one.get_or_load("k", text("new"), stale_ttl="1h") == "new"
        assert await one.get("k") == "new"
        assert await other.get("k") is None
    await backend.aclose()


async def test_a_swapped_frame_stands_in_for_nothing(backend: Backend) -> None:
    """Not where the load fails either, and not for who looks at what is stale."""
    cache = backend.open(l1_max_entries=0)
    one, other = cache.with_scope("ann"), cache.with_scope("bob")
    await one.set("k", "ann's")
    frame = await stored(one, "k")
    assert frame is not None
    await store_raw(other, "k", frame)

    async def fail() -> str:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        await other.get_or_load("k", fail, stale_ttl="1h")
    with pytest.raises(LookupError, match="gone"):
        await other.get_or_load("k", fail, stale_ttl="1h", soft_timeout=0)
    await backend.aclose()
