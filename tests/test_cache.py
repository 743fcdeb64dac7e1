"""The contract of ``AsyncCache``, on memory, in a folder and on a real Valkey."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID
from zlib import crc32

import pytest

from mcp_hub_cache import (
    FOREVER,
    MISSING,
    AsyncCache,
    Cache,
    CacheStatus,
    Entry,
    FileCache,
    InvalidKeyError,
    MemoryCache,
    RedisCache,
    UncacheableError,
    ValueTooLargeError,
    WrongLoopError,
)
from mcp_hub_cache._async_cache import Seconds
from mcp_hub_cache._frame import HEAD_SIZE, pack, unpack_head
from mcp_hub_cache._freshness import Life
from mcp_hub_cache._lane import Lane
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FaultyStore
from tests.backends import NAMES, Backend, poll, store_raw, stored, turns
from tests.servers import Server, valkey_server


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


@pytest.fixture
async def timed(backend: Backend) -> AsyncIterator[Cache]:
    yield backend.open_timed()
    await backend.aclose()


@dataclass
class Point:
    x: int
    tags: list[str]


async def keys_of(cache: AsyncCache, prefix: str = "") -> set[str]:
    return {key async for key in cache.keys(prefix)}


# What it is


def test_the_ready_made_caches_are_async_caches(tmp_path: Path) -> None:
    for cache in (MemoryCache(), FileCache(tmp_path), RedisCache("redis://localhost:1/0")):
        assert isinstance(cache, AsyncCache)
        assert isinstance(cache, Cache)


def test_the_protocol_is_more_than_a_name() -> None:
    assert not isinstance(object(), AsyncCache)


@pytest.mark.parametrize("secret", ["redis://user:hunter2@localhost:1/0"])
def test_a_repr_tells_what_it_is_and_no_secret(secret: str) -> None:
    text = repr(RedisCache(secret, namespace="billing"))
    assert "billing" in text
    assert "redis" in text
    assert "hunter2" not in text


def test_making_a_cache_touches_nothing(tmp_path: Path) -> None:
    FileCache(tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("option", ["l1_max_entries", "l1_max_bytes", "max_key_length", "max_value_bytes"])
@pytest.mark.parametrize("value", [-1, True, 1.5, "10"])
def test_wrong_bounds_are_refused(option: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=option):
        MemoryCache(**{option: value})


def test_a_wrong_coalesce_is_refused() -> None:
    with pytest.raises(ValueError, match='must be "process" or "fleet", not \'flet\''):
        MemoryCache(coalesce="flet")  # type: ignore[arg-type]


async def test_tags_that_are_no_text_are_named(cache: Cache) -> None:
    for tags in ([["a"]], [5]):
        with pytest.raises(TypeError, match=r'a tag must be text, such as "user:42", not (list|int)'):
            await cache.invalidate(*tags)  # type: ignore[arg-type]


@pytest.mark.parametrize("namespace", ["", "a:b", "a b", "x" * 65, ".", "..", "ä", "a/b", "a*", "a\n"])
def test_wrong_namespaces_are_refused(namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        MemoryCache(namespace=namespace)
    with pytest.raises(ValueError, match="namespace"):
        MemoryCache().with_namespace(namespace)


# get, set, delete


async def test_a_value_comes_back(cache: Cache) -> None:
    assert await cache.get("plan:42") is None
    assert await cache.get("plan:42", "nothing") == "nothing"
    await cache.set("plan:42", {"steps": [1, 2.5, None, True, "ü"]})
    assert await cache.get("plan:42") == {"steps": [1, 2.5, None, True, "ü"]}
    assert await cache.get("plan:42", "nothing") == {"steps": [1, 2.5, None, True, "ü"]}


@pytest.mark.parametrize("value", [None, 0, "", [], {}, False, b"", ()])
async def test_empty_values_are_hits(cache: Cache, value: object) -> None:
    assert await cache.get("k", MISSING) is MISSING
    await cache.set("k", value)
    got = await cache.get("k", MISSING)
    assert got == value
    assert type(got) is type(value)
    assert await cache.exists("k")
    assert await cache.get_many(["k", "other"]) == {"k": value}
    assert await cache.delete("k") is True


async def test_a_cached_none_spares_the_load(cache: Cache) -> None:
    calls = 0

    async def load() -> None:
        nonlocal calls
        calls += 1

    assert await cache.get_or_load("k", load) is None
    assert await cache.get_or_load("k", load) is None
    assert calls == 1


def test_missing_says_so_and_is_false() -> None:
    assert repr(MISSING) == str(MISSING) == "MISSING"
    assert not MISSING


@pytest.mark.parametrize(
    "value",
    [
        (1, (2, [3])),
        {1, 2},
        frozenset({"a"}),
        b"\x00\xff",
        {1: "int key", "1": "str key", None: 0},
        10**40,
        math.inf,
        datetime(2025, 3, 30, 2, 30, fold=1, tzinfo=UTC),
        timedelta(days=-1, microseconds=1),
        UUID(int=7),
        Decimal("1.10"),
        "\ud800",
    ],
    ids=repr,
)
async def test_standard_types_come_back_as_themselves(cache: Cache, value: object) -> None:
    await cache.set("k", value)
    got = await cache.get("k")
    assert got == value
    assert type(got) is type(value)
    assert repr(got) == repr(value)


async def test_classes_come_back_where_as_type_names_them(cache: Cache) -> None:
    await cache.set("k", [Point(1, ["a"])], as_type=list[Point])
    got = await cache.get("k", as_type=list[Point])
    assert got == [Point(1, ["a"])]
    assert type(got[0]) is Point
    entry = await cache.get_entry("k", as_type=list[Point])
    assert entry is not None
    assert entry.value == got
    assert await cache.get_many(["k"], as_type=list[Point]) == {"k": got}
    # Bytes can't name a class: without as_type there is nothing that could be made of it.
    assert await cache.get("k", "default") == "default"
    assert await cache.get_many(["k"]) == {}


async def test_set_overwrites(cache: Cache) -> None:
    for value in ("short", "long" * 10_000, 1, {"a": 1}):
        await cache.set("k", value)
        assert await cache.get("k") == value


async def test_delete_says_whether_there_was_something(cache: Cache) -> None:
    assert await cache.delete("k") is False
    await cache.set("k", 1)
    assert await cache.delete("k") is True
    assert await cache.delete("k") is False
    assert await cache.get("k") is None


@pytest.mark.parametrize(
    "key",
    [
        *("a b", "../../etc/passwd", "*?[x]", "\n\0\t", "a/b\\c", "-", ":", "e:"),
        *("ü" * 500, "x" * 1024, "😀" * 1024),
    ],
)
async def test_any_text_is_a_key(cache: Cache, key: str) -> None:
    await cache.set(key, key)
    await cache.set("decoy", 1)
    assert await cache.get(key) == key
    assert await keys_of(cache) == {key, "decoy"}
    assert await keys_of(cache, key) == {key}
    assert await cache.ttl(key) is not None
    assert await cache.delete(key) is True
    assert await keys_of(cache) == {"decoy"}


# Many


async def test_many_at_once(cache: Cache) -> None:
    mapping = {f"k{n}": n for n in range(500)}
    await cache.set_many(mapping)
    wanted = [f"k{n}" for n in range(499, -1, -1)]
    got = await cache.get_many([*wanted, "none", "k1"])
    assert got == mapping
    assert list(got) == wanted
    assert await cache.delete_many([*wanted[:300], "none", wanted[0]]) == 300
    assert len(await cache.get_many(wanted)) == 200


async def test_many_takes_any_iterable(cache: Cache) -> None:
    await cache.set_many({"a": 1, "b": 2})
    assert await cache.get_many(key for key in "ab") == {"a": 1, "b": 2}
    assert await cache.delete_many({"a", "b"}) == 2


async def test_many_of_nothing(cache: Cache) -> None:
    await cache.set_many({})
    assert await cache.get_many([]) == {}
    assert await cache.delete_many([]) == 0


async def test_one_text_is_not_many_keys(cache: Cache) -> None:
    with pytest.raises(TypeError, match="several keys"):
        await cache.get_many("abc")
    with pytest.raises(TypeError, match="several keys"):
        await cache.delete_many("abc")


async def test_set_many_gives_all_its_ttl(cache: Cache) -> None:
    await cache.set_many({"a": 1, "b": 2}, ttl="10m")
    for key in "ab":
        left = await cache.ttl(key)
        assert left is not None
        assert 590 < left <= 600


async def test_set_many_is_refused_before_anything_is_stored(cache: Cache) -> None:
    await cache.set("a", "old")
    with pytest.raises(UncacheableError):
        await cache.set_many({"a": "new", "b": object()})
    with pytest.raises(InvalidKeyError):
        await cache.set_many({"a": "new", "": 1})
    assert await cache.get("a") == "old"
    assert await keys_of(cache) == {"a"}


# Keys and clear


async def test_keys_and_clear_with_hundreds(cache: Cache) -> None:
    mine = {f"job:{n}" for n in range(1100)}
    await cache.set_many(dict.fromkeys(mine, 1))
    await cache.set_many({"job": 1, "jobs:1": 1, "JOB:1": 1})
    assert await keys_of(cache) == mine | {"job", "jobs:1", "JOB:1"}
    assert await keys_of(cache, "job:") == mine
    assert await keys_of(cache, "none") == set()
    assert await cache.clear(prefix="job:") == 1100
    assert await keys_of(cache) == {"job", "jobs:1", "JOB:1"}
    assert await cache.clear() == 3
    assert await cache.clear() == 0
    assert await keys_of(cache) == set()


async def test_prefixes_are_no_patterns(cache: Cache) -> None:
    await cache.set_many({"a*b": 1, "aXb": 1, "a?": 1, "ab": 1, "[ab]c": 1, "ac": 1})
    assert await keys_of(cache, "a*") == {"a*b"}
    assert await keys_of(cache, "a?") == {"a?"}
    assert await cache.clear(prefix="[ab]") == 1
    assert "ac" in await keys_of(cache)


async def test_keys_can_be_left_early(cache: Cache) -> None:
    await cache.set_many({f"k{n}": n for n in range(1200)})
    async for _ in cache.keys():
        break
    assert await cache.get("k1") == 1


async def test_keys_may_be_deleted_while_they_are_listed(cache: Cache) -> None:
    await cache.set_many({f"k{n}": n for n in range(700)})
    async for key in cache.keys():
        await cache.delete(key)
    assert await keys_of(cache) == set()


@pytest.mark.parametrize("prefix", [None, 1, b"x", 0])
async def test_a_prefix_is_text(cache: Cache, prefix: Any) -> None:
    with pytest.raises(TypeError, match="prefix"):
        await keys_of(cache, prefix)


@pytest.mark.parametrize("prefix", [1, b"x", None, 0])
async def test_what_is_no_prefix_does_not_clear_everything(cache: Cache, prefix: Any) -> None:
    await cache.set("k", 1)
    with pytest.raises(TypeError, match="prefix"):
        await cache.clear(prefix=prefix)
    assert await cache.get("k") == 1


# Namespaces


async def test_namespaces_never_touch_each_other(cache: Cache, backend: Backend) -> None:
    names = ["default", "defaul", "default2", "default.x", "e", "t", "D", "default-e"]
    views: dict[str, AsyncCache] = {
        name: cache.with_namespace(name) if n % 2 else backend.open(namespace=name) for n, name in enumerate(names)
    }
    for name, view in views.items():
        await view.set("k", name)
        await view.set("e:k", name)
        await view.set_many({f"{name}:e:k": name, "only" + name: 1})
    for name, view in views.items():
        assert await view.get("k") == await view.get("e:k") == name
        assert await keys_of(view) == {"k", "e:k", f"{name}:e:k", "only" + name}
        assert (await view.status()).total_keys == 4
    assert await views["default"].clear() == 4
    assert await views["e"].clear() == 4
    assert await views["defaul"].delete("k")
    assert await views["defaul"].touch("e:k", 5)
    for name in ("default2", "default.x", "t", "D", "default-e"):
        assert len(await keys_of(views[name])) == 4
        assert await views[name].get("k") == name
        left = await views[name].ttl("e:k")
        assert left is not None
        assert left > 3000
    assert await keys_of(cache) == set()


async def test_prefixes_apart(backend: Backend, cache: Cache) -> None:
    one, two = backend.open(prefix="app:"), backend.open(prefix="app2:")
    await one.set("k", 1)
    await two.set("k", 2)
    assert await cache.get("k") is None
    assert await one.clear() == 1
    assert await two.get("k") == 2


async def test_a_view_shares_its_caches_life(cache: Cache) -> None:
    view = cache.with_namespace("other")
    await view.set("k", 1)
    assert await view.get("k") == 1
    assert cache.stats.hits == view.stats.hits == 1
    assert (view.namespace, cache.namespace) == ("other", "default")


async def test_no_view_leads_out_of_its_scope(cache: Cache) -> None:
    acme = cache.with_scope("acme")
    await acme.set("k", "acme's")
    assert await cache.with_scope("acme").get("k") == "acme's"
    assert await acme.with_scope("acme").get("k") is None
    await acme.with_namespace("other").set("k", "acme's other")
    assert await cache.with_namespace("other").get("k") is None
    assert await cache.with_namespace("other").with_scope("acme").get("k") == "acme's other"
    assert await acme.with_namespace("other").with_namespace(cache.namespace).get("k") == "acme's"
    await cache.with_scope("run").set("k", "any run's")
    assert await acme.with_scope("run").get("k") is None

    async def load() -> str:
        return "acme's run's"

    assert await acme.get_or_load("k", load, scope="run") == "acme's run's"
    assert await acme.with_scope("run").get("k") == "acme's run's"
    with pytest.raises(TypeError, match="functions of arguments are for @acached"):
        acme.with_scope(lambda: "run")  # type: ignore[arg-type]


# Time

GOOD_TTLS: list[tuple[Seconds, float]] = [
    (60, 60.0),
    (0.5, 0.5),
    ("90s", 90.0),
    ("10m", 600.0),
    ("1h30m", 5400.0),
    (" 1h 30m ", 5400.0),
    ("1.5h", 5400.0),
    ("250ms", 0.25),
    ("1d", 86_400.0),
    ("2w", 1_209_600.0),
    (timedelta(minutes=2), 120.0),
    (FOREVER, math.inf),
    (math.inf, math.inf),
]
BAD_TTLS: list[Any] = [
    *(0, 0.0, -1, -0.5, -math.inf, math.nan, True, False, 10**400, 1e300),
    *("", " ", "junk", "10", "10 minutes", "-5s", "0s", "1h-30m", "m", "1e3s", "inf", "10m!", "9" * 300 + "s"),
    *(timedelta(0), timedelta(seconds=-1)),
]


@pytest.mark.parametrize(("ttl", "seconds"), GOOD_TTLS)
async def test_ttl_says_how_long(timed: Cache, ttl: Seconds, seconds: float) -> None:
    async def check(key: str) -> None:
        left = await timed.ttl(key)
        assert left is not None
        assert left == seconds == math.inf or seconds - 10 < left <= seconds

    await timed.set("set", 1, ttl=ttl)
    await check("set")
    assert await timed.add("add", 1, ttl=ttl)
    await check("add")
    await timed.set("touch", 1)
    assert await timed.touch("touch", ttl)
    await check("touch")

    async def load() -> int:
        return 1

    await timed.get_or_load("load", load, ttl=ttl)
    await check("load")
    assert await timed.ttl("none") is None


@pytest.mark.parametrize("ttl", BAD_TTLS, ids=lambda ttl: repr(ttl)[:20])
async def test_a_bad_ttl_is_an_error_and_changes_nothing(cache: Cache, ttl: Any) -> None:
    await cache.set("k", "old")

    async def load() -> str:
        pytest.fail("called")

    attempts: list[Callable[[], Any]] = [
        lambda: cache.set("k", "new", ttl=ttl),
        lambda: cache.set_many({"k": "new", "l": "new"}, ttl=ttl),
        lambda: cache.add("l", "new", ttl=ttl),
        lambda: cache.touch("k", ttl),
        lambda: cache.get_or_load("l", load, ttl=ttl),
        lambda: cache.get_or_load("k", load, ttl=ttl),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="ttl must be"):
            await attempt()
    assert await cache.get("k") == "old"
    assert await keys_of(cache) == {"k"}
    left = await cache.ttl("k")
    assert left is not None
    assert left > 3000
    with pytest.raises(ValueError, match="default_ttl must be"):
        MemoryCache(default_ttl=ttl)


@pytest.mark.parametrize("ttl", [[], b"10m", object(), 1j])
async def test_a_ttl_of_another_type(cache: Cache, ttl: Any) -> None:
    with pytest.raises(TypeError, match="ttl must be"):
        await cache.set("k", 1, ttl=ttl)
    assert await cache.get("k") is None


async def test_no_ttl_is_the_default_ttl(backend: Backend, cache: Cache) -> None:
    left = await _ttl_after_set(cache)
    assert 3590 < left <= 3600
    left = await _ttl_after_set(backend.open(default_ttl="5m"))
    assert 290 < left <= 300
    assert await _ttl_after_set(backend.open(default_ttl=FOREVER)) == math.inf


async def _ttl_after_set(cache: Cache) -> float:
    await cache.set("k", 1)
    left = await cache.ttl("k")
    assert left is not None
    return left


async def test_an_entry_expires(timed: Cache, backend: Backend) -> None:
    await timed.set("brief", 1, ttl=0.3)
    await timed.set("long", 2, ttl=100)
    await timed.set("forever", 3, ttl=FOREVER)
    assert await timed.get("brief") == 1
    await backend.let_pass(timed, 0.31)
    assert await timed.get("brief", MISSING) is MISSING
    assert await timed.get_entry("brief") is None
    assert await timed.get_many(["brief", "long"]) == {"long": 2}
    assert await timed.exists("brief") is False
    assert await timed.ttl("brief") is None
    assert await timed.touch("brief", 100) is False
    assert await keys_of(timed) == {"long", "forever"}
    assert await timed.delete("brief") is False
    assert await timed.add("brief", "again") is True
    assert await timed.clear() == 3


async def test_a_delete_and_a_clear_do_not_count_the_expired(timed: Cache, backend: Backend) -> None:
    await timed.set_many({"a": 1, "b": 2, "c": 3}, ttl=0.2)
    await timed.set("d", 4)
    await backend.let_pass(timed, 0.21)
    assert await timed.delete("a") is False
    assert await timed.delete_many(["b", "d"]) == 1
    await timed.set("d", 4)
    assert await timed.clear() == 1


async def test_a_hit_does_not_prolong(timed: Cache, backend: Backend) -> None:
    await timed.set("k", 1, ttl=0.4)
    await backend.let_pass(timed, 0.21)
    assert await timed.get("k") == 1
    await backend.let_pass(timed, 0.2)
    assert await timed.get("k") is None


async def test_forever_is_for_long(timed: Cache, backend: Backend) -> None:
    if backend.name == "redis":
        pytest.skip("a server's time can't be moved")
    await timed.set("k", 1, ttl=FOREVER)
    await timed.set("century", 1, ttl=100 * 365 * 86_400)
    await backend.let_pass(timed, 99 * 365 * 86_400)
    assert await timed.get("k") == await timed.get("century") == 1
    assert await timed.ttl("k") == math.inf


async def test_touch_prolongs_and_shortens(timed: Cache, backend: Backend) -> None:
    await timed.set("k", {"big": "x" * 1000}, ttl=0.5)
    before = await timed.get_entry("k")
    assert await timed.touch("k", 100) is True
    await backend.let_pass(timed, 0.51)
    entry = await timed.get_entry("k")
    assert entry is not None
    assert before is not None
    assert entry.value == {"big": "x" * 1000}
    assert entry.created == before.created
    assert entry.fresh_until > before.fresh_until
    assert await timed.touch("k", FOREVER)
    assert await timed.ttl("k") == math.inf
    assert await timed.touch("k", 0.2)
    await backend.let_pass(timed, 0.21)
    assert await timed.get("k") is None
    assert await timed.touch("k", 100) is False
    assert await timed.touch("none", 100) is False


async def test_touch_is_seen_by_others_at_once(backend: Backend, timed: Cache) -> None:
    other = backend.open_timed()
    await timed.set("k", 1, ttl=0.4)
    assert await other.get("k") == 1
    await timed.touch("k", 100)
    await backend.let_pass(timed, 0.41)
    assert await other.get("k") == 1
    await other.touch("k", 0.1)
    await backend.let_pass(timed, 0.11)
    assert await timed.get("k") is None


async def test_get_entry_tells_what_is_known(cache: Cache, backend: Backend) -> None:
    assert await cache.get_entry("k") is None
    now = cache.store.now()
    await cache.set("k", [1], ttl=60)
    entry = await cache.get_entry("k")
    assert isinstance(entry, Entry)
    assert entry.value == [1]
    # The server's time is known from its first answer on, this machine's before that.
    assert abs(entry.created - now) < 5
    assert entry.fresh_until == entry.keep_until == pytest.approx(entry.created + 60)
    assert entry.load_cost == 0
    assert entry.tier == backend.name
    await cache.set("k", None, ttl=FOREVER)
    entry = await cache.get_entry("k")
    assert entry is not None
    assert entry.value is None
    assert entry.fresh_until == entry.keep_until == math.inf


# add


async def test_add_only_where_nothing_is(cache: Cache) -> None:
    assert await cache.add("k", 1, ttl=60) is True
    assert await cache.add("k", 2) is False
    assert await cache.get("k") == 1
    left = await cache.ttl("k")
    assert left is not None
    assert left <= 60
    await cache.delete("k")
    assert await cache.add("k", None) is True
    assert await cache.add("k", 3) is False


async def test_of_a_hundred_concurrent_adds_one_is_true(cache: Cache, backend: Backend) -> None:
    caches = [cache, backend.open()]
    for turn in range(5):
        key = f"lock{turn}"
        answers = await asyncio.gather(*(caches[n % 2].add(key, n) for n in range(100)))
        assert answers.count(True) == 1
        assert await cache.get(key) == answers.index(True)


async def test_a_cancelled_add_leaves_nothing_behind(cache: Cache, backend: Backend) -> None:
    other = backend.open()
    for steps in range(8):
        key = f"k{steps}"
        task = asyncio.create_task(cache.add(key, "cancelled"))
        await turns(steps)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # Either it was in time or it left no trace; a lock that nobody holds would be the worst.
        assert await other.add(key, "other") is (await other.get(key) == "other")
        assert await other.get(key) in ("other", "cancelled")


# A load in progress is no entry


async def test_a_load_in_progress_is_not_an_entry(cache: Cache, backend: Backend) -> None:
    other = backend.open()
    started, finish = asyncio.Event(), asyncio.Event()

    async def load() -> int:
        started.set()
        await finish.wait()
        return 1

    task = asyncio.create_task(cache.get_or_load("k", load))
    await started.wait()
    frame = await stored(cache, "k")
    assert frame is not None, "the placeholder, which is what this test is about"
    for each in (cache, other):
        assert await each.get("k", MISSING) is MISSING
        assert await each.get_entry("k") is None
        assert await each.get_many(["k"]) == {}
        assert await each.exists("k") is False
        assert await each.ttl("k") is None
        assert await each.touch("k", 60) is False
        assert await keys_of(each) == set()
        assert (await each.status()).total_keys == 0
    finish.set()
    assert await task == 1
    assert await other.get("k") == 1


async def test_a_placeholder_does_not_count_when_deleted_or_cleared(cache: Cache, backend: Backend) -> None:
    other = backend.open()
    never = asyncio.Event()
    tasks = []
    for key in ("a", "b"):
        started = asyncio.Event()

        async def load(started: asyncio.Event = started) -> None:
            started.set()
            await never.wait()

        tasks.append(asyncio.create_task(cache.get_or_load(key, load)))
        await started.wait()
    assert await other.delete("a") is False
    assert await other.clear() == 0
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_add_wins_over_a_load_in_progress(cache: Cache, backend: Backend) -> None:
    for adder in (cache, backend.open()):
        started, finish = asyncio.Event(), asyncio.Event()

        async def load(started: asyncio.Event = started, finish: asyncio.Event = finish) -> str:
            started.set()
            await finish.wait()
            return "loaded"

        await cache.delete("k")
        task = asyncio.create_task(cache.get_or_load("k", load))
        await started.wait()
        assert await adder.add("k", "added") is True
        finish.set()
        assert await task == "loaded"
        assert await cache.get("k") == "added"


# Limits and bad input


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("", InvalidKeyError, "at least one character"),
        ("x" * 1025, InvalidKeyError, r"at most 1,024 characters.*has 1,025"),
        ("a\ud800", InvalidKeyError, "surrogate"),
        (None, TypeError, "str, not NoneType"),
        (b"k", TypeError, "str, not bytes"),
        (1, TypeError, "str, not int"),
    ],
)
async def test_a_bad_key_is_an_error_everywhere(cache: Cache, key: Any, error: type[Exception], message: str) -> None:
    async def load() -> None:
        pytest.fail("called")

    await cache.set("k", 1)
    attempts: list[Callable[[], Any]] = [
        lambda: cache.get(key),
        lambda: cache.get_many(["k", key]),
        lambda: cache.get_entry(key),
        lambda: cache.set(key, 1),
        lambda: cache.set_many({"k": 2, key: 1}),
        lambda: cache.add(key, 1),
        lambda: cache.delete(key),
        lambda: cache.delete_many(["k", key]),
        lambda: cache.exists(key),
        lambda: cache.ttl(key),
        lambda: cache.touch(key, 1),
        lambda: cache.get_or_load(key, load),
    ]
    for attempt in attempts:
        with pytest.raises(error, match=message):
            await attempt()
    assert await cache.get("k") == 1
    assert await keys_of(cache) == {"k"}


async def test_the_key_limit_can_be_set(backend: Backend, cache: Cache) -> None:
    short = backend.open(max_key_length=5)
    await short.set("12345", 1)
    with pytest.raises(InvalidKeyError, match="at most 5 characters"):
        await short.set("123456", 1)
    assert await keys_of(cache) == {"12345"}
    long = backend.open(max_key_length=16_000)
    key = "ü" * 16_000
    await long.set(key, 1)
    assert await long.get(key) == 1


def _local() -> None: ...


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (object(), "value"),
        ({"a": [1, _local]}, r"value\[key 0\]\[1\]"),
        ([Point(1, [])], r"value\[0\]"),
        (iter([]), "value"),
        (type("Anon", (dict,), {})(), "value"),
        ({"deep": {"set": {object()}}}, r"value\[key 0\]\[key 0\]"),
        (ValueError("x"), "value"),
    ],
)
async def test_an_unserialisable_value_is_an_error_that_names_the_place(cache: Cache, value: Any, where: str) -> None:
    await cache.set("k", "old", ttl=60)
    for attempt in (
        lambda: cache.set("k", value),
        lambda: cache.add("new", value),
        lambda: cache.set_many({"k": value}),
    ):
        with pytest.raises(UncacheableError, match=where):
            await attempt()
    assert await cache.get("k") == "old"
    assert await keys_of(cache) == {"k"}


async def test_cyclic_and_bottomless_values_are_errors(cache: Cache) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (cycle, deep, {"a": cycle}):
        with pytest.raises(UncacheableError):
            await cache.set("k", value)
    assert await cache.get("k") is None
    while deep:  # taken apart step by step: the interpreter would recurse
        deep = deep[0]


async def test_the_value_limit(backend: Backend, cache: Cache) -> None:
    small = backend.open(max_value_bytes=100)
    await small.set("k", "x" * 98)
    for attempt in (
        lambda: small.set("k", "y" * 99),
        lambda: small.add("new", "y" * 99),
        lambda: small.set_many({"other": 1, "k": "y" * 99}),
    ):
        with pytest.raises(ValueTooLargeError, match=r"takes 101 bytes.*at most 100"):
            await attempt()
    assert await cache.get("k") == "x" * 98
    assert await keys_of(cache) == {"k"}


async def test_eight_mib_fit_and_no_more(cache: Cache) -> None:
    limit = 8 * 1024 * 1024
    await cache.set("k", b"x" * limit)
    with pytest.raises(ValueTooLargeError, match="8,388,608"):
        await cache.set("k", b"y" * (limit + 1))
    assert await cache.get("k") == b"x" * limit


@pytest.mark.parametrize("l1_max_entries", [1024, 0])
async def test_large_values_are_verified_and_come_back_exactly(backend: Backend, l1_max_entries: int) -> None:
    cache = backend.open(l1_max_entries=l1_max_entries)
    for value in (bytes(range(256)) * 4096, {"text": "x" * 1_000_000}):
        await cache.set("k", value)
        found = await cache.get("k")
        assert type(found) is type(value)
        assert found == value
    frame = await stored(cache, "k")
    assert frame is not None
    await store_raw(cache, "k", frame[:-1] + bytes([frame[-1] ^ 1]))
    await poll_miss(cache)
    assert cache.stats.errors == {"corrupt": 1}
    await backend.aclose()


async def poll_miss(cache: Cache) -> None:
    """Until the near cache has heard of what was written past it."""
    while await cache.get("k", MISSING) is not MISSING:
        await asyncio.sleep(0)


async def test_errors_never_hold_the_value(cache: Cache) -> None:
    for value in ({"password": object(), "hunter2": object()}, ["hunter2", object()], "hunter2" * 2_000_000):
        with pytest.raises((UncacheableError, ValueTooLargeError)) as caught:
            await cache.set("k", value)
        if not isinstance(value, dict):  # a dict's keys say where
            assert "hunter2" not in str(caught.value)


async def test_a_loader_that_is_none(cache: Cache) -> None:
    def plain() -> int:
        return 1

    with pytest.raises(TypeError, match="can't be awaited"):
        await cache.get_or_load("k", plain)  # type: ignore[arg-type]
    assert await cache.get("k") is None


# Nobody shares mutable objects


async def test_what_was_set_is_a_copy(cache: Cache) -> None:
    value = {"a": [1]}
    await cache.set("k", value)
    value["a"].append(2)
    assert await cache.get("k") == {"a": [1]}


async def test_hits_never_share_mutable_objects(cache: Cache) -> None:
    await cache.set("k", {"a": [1], "p": (1, [2])})
    await cache.set("point", Point(1, ["a"]), as_type=Point)
    for _ in range(4):  # from the store, then from L1 where there is one
        got = await cache.get("k")
        got["a"].append(2)
        got["p"][1].append(3)
        point = await cache.get("point", as_type=Point)
        assert point == Point(1, ["a"])
        point.tags.append("mine")
        entry = await cache.get_entry("k")
        assert entry is not None
        entry.value["a"].append(9)
        (many,) = (await cache.get_many(["k"])).values()
        assert many == {"a": [1], "p": (1, [2])}
        many.clear()


async def test_a_hit_in_l1_is_one_and_follows_changes(cache: Cache, backend: Backend) -> None:
    async def near() -> bool:
        await cache.get("k")
        entry = await cache.get_entry("k")
        return entry is not None and entry.tier == "l1"

    async def becomes(value: object) -> None:
        """At once; but what others change on a server is known when its word of it has arrived."""
        if backend.name == "redis":
            await poll(lambda: _is(cache, value))
        assert await cache.get("k", MISSING) == value

    other = backend.open()
    await cache.set("k", [1])
    await poll(near)
    await other.set("k", [2])
    await becomes([2])
    await poll(near)
    await other.delete("k")
    await becomes(MISSING)
    await other.set("k", [3])
    await becomes([3])
    await poll(near)
    await cache.set("k", [4])
    assert await cache.get("k") == [4]
    await poll(near)
    await other.clear()
    await becomes(MISSING)


async def _is(cache: Cache, value: object) -> bool:
    return bool(await cache.get("k", MISSING) == value)


async def test_without_l1_every_read_goes_to_the_store(backend: Backend, cache: Cache) -> None:
    for options in ({"l1_max_entries": 0}, {"l1_max_bytes": 0}):
        bare = backend.open(**options)
        await bare.set("k", 1)
        assert [await bare.get("k") for _ in range(3)] == [1, 1, 1]
        assert bare.stats.hits_by_tier == {backend.name: 3}
        assert (await bare.status()).l1_entries == 0


async def test_coalesced_callers_never_share_mutable_objects(cache: Cache) -> None:
    async def load() -> dict[str, list[int]]:
        await asyncio.sleep(0)
        return {"a": [1]}

    results = await asyncio.gather(*(cache.get_or_load("k", load) for _ in range(5)))
    assert len({id(result) for result in results}) == len({id(result["a"]) for result in results}) == 5
    for result in results:
        assert result == {"a": [1]}
        result["a"].append(2)
    assert await cache.get("k") == {"a": [1]}


async def test_without_l1_only_what_is_fresh_is_a_hit(backend: Backend, cache: Cache) -> None:
    bare = backend.open(l1_max_entries=0)
    now = bare.store.now()
    for created, fresh_until, keep_until, hit in (
        (now - 1, now + 60, now + 60, True),
        (now + 60, now + 90, now + 90, False),  # written under a clock that has since been set back
        (now - 9, now - 1, now + 60, False),
        (now - 9, now + 60, now - 1, False),
    ):
        key, times = bare._key("k"), {"created": created, "fresh_until": fresh_until, "keep_until": keep_until}
        await store_raw(bare, "k", pack(key, b"1", codec=1, token=bytes(8), **times))
        assert await bare.get("k", MISSING) == (1 if hit else MISSING)
    assert (bare.stats.hits, bare.stats.misses, bare.stats.errors) == (1, 3, {})


async def test_without_l1_a_hit_tells_what_it_has_saved(backend: Backend, cache: Cache) -> None:
    async def load() -> str:
        await asyncio.sleep(0.002)
        return "x"

    bare = backend.open(l1_max_entries=0)
    await bare.get_or_load("k", load)
    before = bare.stats.saved_seconds
    assert await bare.get("k") == "x"
    assert bare.stats.saved_seconds >= before + 0.001


# Damage


def _flip(at: int) -> Callable[[bytes], bytes]:
    return lambda frame: frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :]


def _newer(frame: bytes) -> bytes:
    head = bytearray(frame[: HEAD_SIZE - 4])
    head[4] = 255
    return bytes(head) + struct.pack("<I", crc32(head)) + frame[HEAD_SIZE:]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "payload": (_flip(-2), "corrupt"),
    "head": (_flip(20), "corrupt"),
    "key": (_flip(HEAD_SIZE + 18), "corrupt"),
    "magic": (_flip(1), "foreign"),
    "cut in the payload": (lambda frame: frame[:-1], "truncated"),
    "cut in the head": (lambda frame: frame[:40], "truncated"),
    "longer": (lambda frame: frame + b"x", "truncated"),
    "foreign": (lambda _: b"SECRET of another program", "foreign"),
    "empty": (lambda _: b"", "foreign"),
    "pickle": (lambda _: b"\x80\x04\x95SECRET", "foreign"),
    "newer": (_newer, "newer"),
}


@pytest.mark.parametrize("l1_max_entries", [1024, 0])
@pytest.mark.parametrize("kind", DAMAGE)
async def test_damaged_bytes_are_a_miss_counted_and_logged_without_contents(
    cache: Cache, backend: Backend, kind: str, l1_max_entries: int, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGE[kind]
    reader = backend.open(l1_max_entries=l1_max_entries)
    await cache.set("k:SECRET", {"a": "SECRET"})
    frame = await stored(cache, "k:SECRET")
    assert frame is not None
    await store_raw(cache, "k:SECRET", damage(frame))
    with caplog.at_level(logging.DEBUG, "mcp_hub_cache"):
        assert await reader.get("k:SECRET", MISSING) is MISSING
        assert await reader.get_many(["k:SECRET", "none"]) == {}
        assert await reader.get_entry("k:SECRET") is None
        assert reader.stats.hits == 0
        assert reader.stats.misses == 4
        assert reader.stats.errors == {reason: 3}
        assert await reader.exists("k:SECRET") is False
        assert await reader.ttl("k:SECRET") is None
        assert await reader.touch("k:SECRET", 60) is False
    assert reader.stats.errors == {reason: 6}
    assert caplog.text.count("treated as a miss") == 1  # said once, counted each time
    assert reason in caplog.text
    assert "SECRET" not in caplog.text

    async def load() -> str:
        return "new"

    assert await reader.get_or_load("k:SECRET", load) == "new"
    assert await reader.get("k:SECRET") == await cache.get("k:SECRET") == "new"


@pytest.mark.parametrize("kind", DAMAGE)
async def test_damaged_bytes_can_be_overwritten_and_deleted(cache: Cache, kind: str) -> None:
    damage, _ = DAMAGE[kind]
    await cache.set("k", 1)
    frame = await stored(cache, "k")
    assert frame is not None
    for overwrite in (lambda: cache.set("k", 2), lambda: cache.add("k", 2)):
        await store_raw(cache, "k", damage(frame))
        await overwrite()
        assert await cache.get("k") == 2
    await store_raw(cache, "k", damage(frame))
    assert await cache.delete("k") in (True, False)  # the head may well be intact
    assert await cache.get("k", MISSING) is MISSING
    await store_raw(cache, "k", damage(frame))
    await cache.touch("k", 60)
    await cache.clear()
    assert await stored(cache, "k") is None


async def test_a_frame_under_another_key_is_a_miss(cache: Cache, backend: Backend) -> None:
    await cache.set("alice", "her secret")
    frame = await stored(cache, "alice")
    assert frame is not None
    await store_raw(cache, "bob", frame)
    for reader in (cache, backend.open(l1_max_entries=0)):
        assert await reader.get("bob") is None
        assert reader.stats.errors == {"wrong-key": 1}


async def test_a_payload_that_cannot_be_decoded_is_a_miss(
    cache: Cache, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    codec, _ = cache._writes.encode({"a": 1}, cache_classes())
    write = cache._writes.framed(cache._key("k"), codec, b'{"SECRET": [1,', Life(60.0))
    await store_raw(cache, "k", write.frame)
    for reader in (cache, backend.open(l1_max_entries=0)):
        assert await reader.get("k", "default") == "default"
        assert reader.stats.errors == {"undecodable": 1}
    assert "SECRET" not in caplog.text


def cache_classes() -> Any:
    from mcp_hub_cache._classes import NOTHING

    return NOTHING


async def test_an_unknown_codec_is_a_miss(cache: Cache) -> None:
    write = cache._writes.framed(cache._key("k"), 77, b"1", Life(60.0))
    assert unpack_head(write.frame).codec == 77
    await store_raw(cache, "k", write.frame)
    assert await cache.get("k") is None
    assert cache.stats.errors == {"undecodable": 1}


# Very many at once


class Counting(MemoryStore):
    """Tells how much it was asked for in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def get_many(self, keys: Any, /) -> Any:
        self.most = max(self.most, len(keys))
        return super().get_many(keys)


async def test_a_read_of_very_many_is_not_one_call_to_the_store() -> None:
    store = Counting()
    async with Cache(store, l1_max_entries=0) as cache:
        assert await cache.get_many([f"k{n}" for n in range(20_000)]) == {}
        assert store.most <= 5000


async def test_a_delete_of_very_many_drops_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Lane.__init__.__kwdefaults__, "max_queued", 2000)
    names = [f"k{n}" for n in range(5000)]
    store = FaultyStore(MemoryStore())
    async with Cache(store, timeout=30) as cache:
        await cache.set_many(dict.fromkeys(names, 1))
        store.hang.clear()
        deleting = asyncio.create_task(cache.delete_many(names))
        await turns()
        store.hang.set()
        assert await deleting == 5000
        assert await keys_of(cache) == set()


async def test_the_shortest_ttl() -> None:
    store = MemoryStore()
    async with Cache(store) as cache:
        await cache.set("k", 1, ttl=5e-324)
        assert await cache.get("k") is None
        assert cache.stats.errors == {}


# Trouble with the store is never the caller's


async def test_a_broken_store_is_a_miss_and_a_dropped_write(caplog: pytest.LogCaptureFixture) -> None:
    store = FaultyStore(MemoryStore())
    async with Cache(store) as cache:
        await cache.set("k", 1)
        store.break_down()
        with caplog.at_level(logging.WARNING, "mcp_hub_cache"):
            assert await cache.get("k", "default") == "default"
            assert await cache.get_many(["k"]) == {}
            assert await cache.get_entry("k") is None
            await cache.set("k", 2)
            await cache.set_many({"k": 2})
            assert await cache.add("new", 2) is False
            assert await cache.delete("k") is False
            assert await cache.delete_many(["k"]) == 0
            assert await cache.exists("k") is False
            assert await cache.ttl("k") is None
            assert await cache.touch("k", 5) is False
            assert await cache.clear() == 0
            assert await keys_of(cache) == set()
            assert await cache.health_check() is False

            async def load() -> str:
                return "loaded"

            assert await cache.get_or_load("k", load) == "loaded"
            status = await cache.status()
        assert status.status == "unhealthy"
        assert status.problem
        assert cache.stats.errors["unreachable"] >= 10
        assert "broken by the test" in caplog.text
        # The first tells a person what is wrong; a flood would tell no more.
        assert sum("broken by the test" in each.getMessage() for each in caplog.records) < 6
        store.repair()
        assert await cache.health_check() is True
        assert await cache.get("k") == 1


async def test_misuse_is_an_error_on_a_broken_store_too() -> None:
    store = FaultyStore(MemoryStore())
    store.break_down()
    async with Cache(store) as cache:
        with pytest.raises(InvalidKeyError):
            await cache.get("")
        with pytest.raises(UncacheableError):
            await cache.set("k", object())


async def test_a_hung_store_costs_the_deadline_and_no_more() -> None:
    store = FaultyStore(MemoryStore())
    async with Cache(store, timeout=0.05) as cache:
        store.hang.clear()
        assert await cache.get("k", "default") == "default"
        await cache.set("k", 1)

        async def load() -> str:
            return "loaded"

        assert await cache.get_or_load("k", load) == "loaded"
        assert await cache.health_check() is False
        assert set(cache.stats.errors) == {"timeout"}
        store.repair()
        assert await cache.health_check() is True


async def test_errors_of_a_store_that_knows_no_manners_stay_inside() -> None:
    class Rude(MemoryStore):
        def get_many(self, keys: Any, /) -> Any:
            raise ZeroDivisionError("hunter2")

        async def write_many(self, writes: Any, /) -> Any:
            raise ZeroDivisionError("hunter2")

    async with Cache(Rude()) as cache:
        assert await cache.get("k") is None
        await cache.set("k", 1)
        assert cache.stats.errors == {"other": 2}


@pytest.mark.parametrize("place", ["a file where the folder should be", "no right to write"])
async def test_a_folder_that_cannot_be_made_is_one_warning_and_no_cache(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    if place == "no right to write":
        folder = Path("/proc/mcp_hub_cache_test")
        if not folder.parent.is_dir():
            pytest.skip("no /proc here")
    else:
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "cache"
    calls = 0

    async def load() -> int:
        nonlocal calls
        calls += 1
        await go_on.wait()
        return calls

    go_on = asyncio.Event()
    go_on.set()
    with caplog.at_level(logging.WARNING):
        async with FileCache(folder, timeout=30) as cache:
            await cache.set("k", 1)
            assert await cache.get("k") is None
            for n in range(1, 6):
                assert await cache.get_or_load("k", load) == n
            callers = [asyncio.create_task(cache.get_or_load("l", load)) for _ in range(10)]
            go_on.clear()
            before = cache.stats.misses
            await poll(lambda: cache.stats.misses == before + 10)
            go_on.set()
            assert await asyncio.gather(*callers) == [6] * 10
            assert await cache.delete("k") is False
            assert await cache.add("k", 1) is False
            assert await cache.health_check() is False
            status = await cache.status()
            assert status.status in ("unhealthy", "misconfigured")
            assert str(folder) in (status.problem or "")
            assert await cache.clear() == 0
    warnings = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(folder) in warnings[0].getMessage()


# Health and status


async def test_status_and_health(cache: Cache, backend: Backend) -> None:
    assert await cache.health_check() is True
    await cache.set_many({"a": 1, "b": 2})
    await cache.get_many(["a", "b", "c"])
    status = await cache.status()
    assert isinstance(status, CacheStatus)
    assert status.status == "healthy"
    assert status.backend == backend.name
    assert status.namespace == "default"
    assert status.key_prefix == "mcp_hub:"
    assert status.default_ttl_seconds == 3600
    assert status.total_keys == 2
    assert (status.hits, status.misses, status.coalesced) == (2, 1, 0)
    assert status.hit_rate == pytest.approx(2 / 3)
    assert status.degraded_since is None
    assert status.problem is None
    told = status.as_dict()
    assert told["hits"] == 2
    assert told["hit_rate"] == 0.6667
    if backend.name == "file":
        assert status.cache_dir
        assert status.total_files == 2
        assert status.expired_files == 0
        assert status.total_size_mb is not None
    if backend.name == "redis":
        assert status.redis_version
        assert status.connected_clients
        assert status.memory_used_human


async def test_an_observer_hears_it_all(backend: Backend, cache: Cache) -> None:
    heard: list[tuple[object, ...]] = []

    class Ear:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args: heard.append((name, *args))

    each = backend.open(observer=Ear())

    async def load() -> int:
        return 1

    async def fail() -> int:
        raise ValueError("no luck")

    await each.get_or_load("k", load)
    await each.get("k")
    with pytest.raises(ValueError, match="no luck"):
        await each.get_or_load("bad", fail)
    names = [name for name, *_ in heard]
    assert names.count("miss") == 2
    assert ("hit", backend.name) in heard
    assert [(args[1]) for name, *args in heard if name == "load"] == [True, False]


# Loops, threads, ends


def test_a_second_asyncio_run(backend: Backend) -> None:
    cache = backend.open()

    async def first() -> None:
        await cache.set("k", [1])
        assert await cache.get("k") == [1]

    async def second() -> object:
        await cache.set("l", 2)
        return await cache.get("k")

    asyncio.run(first())
    assert asyncio.run(second()) == [1]
    assert asyncio.run(second()) == [1]


def test_nothing_is_pending_at_the_end_of_asyncio_run(backend: Backend) -> None:
    threads = set(threading.enumerate())
    loops = []

    async def use() -> None:
        loops.append(asyncio.get_running_loop())
        cache = backend.open()
        started = asyncio.Event()

        async def load() -> None:
            started.set()
            await asyncio.Event().wait()

        await cache.set("k", 1)
        task = asyncio.create_task(cache.get_or_load("l", load))
        await started.wait()
        task.cancel()

    asyncio.run(use())
    assert asyncio.all_tasks(loops[0]) == set()
    # The thread that shuts the others down may have a moment left.
    for each in set(threading.enumerate()) - threads:
        each.join(20)
        assert not each.is_alive()
    gc.collect()  # a transport left open would say so here


async def test_nothing_is_pending_after_aclose(backend: Backend) -> None:
    before = asyncio.all_tasks()
    threads = set(threading.enumerate())
    async with backend.open() as cache:
        started = asyncio.Event()

        async def load() -> None:
            started.set()
            await asyncio.Event().wait()

        await cache.set("k", 1)
        await cache.get("k")
        task = asyncio.create_task(cache.get_or_load("l", load))
        await started.wait()
    assert asyncio.all_tasks() - before <= {task}
    await asyncio.gather(task, return_exceptions=True)
    assert asyncio.all_tasks() == before
    # The folder's threads; one that only shuts the others down may have a moment left.
    await poll(lambda: {each for each in threading.enumerate() if each.name.startswith("mcp_hub_cache")} <= threads)


async def test_a_closed_cache_opens_again(cache: Cache) -> None:
    await cache.set("k", 1)
    await cache.aclose()
    await cache.aclose()
    assert await cache.get("k") == 1


async def test_closing_one_that_was_never_used(backend: Backend) -> None:
    await backend.open().aclose()
    async with backend.open():
        pass


async def test_async_with_gives_the_cache_and_closes_it(backend: Backend) -> None:
    before = asyncio.all_tasks()
    cache = backend.open()
    with pytest.raises(KeyError):  # noqa: PT012  # the block is what is tested
        async with cache as same:
            assert same is cache
            await cache.set("k", 1)
            raise KeyError
    assert asyncio.all_tasks() == before


async def test_two_running_loops_are_told_apart(cache: Cache) -> None:
    await cache.set("k", 1)
    with pytest.raises(WrongLoopError, match="another event loop that is still running"):
        await asyncio.to_thread(asyncio.run, cache.get("k"))
    assert await cache.get("k") == 1


async def test_a_loop_that_has_ended_is_no_hindrance(backend: Backend, cache: Cache) -> None:
    other = backend.open()

    async def use() -> None:
        await other.set("k", 1)

    await asyncio.to_thread(asyncio.run, use())
    assert await other.get("k") == 1
    await other.aclose()


async def test_calls_in_flight_when_the_cache_is_closed_end(cache: Cache) -> None:
    await cache.set("k", 1)
    reads = [asyncio.create_task(cache.get(f"k{n}")) for n in range(50)]
    writes = [asyncio.create_task(cache.set(f"w{n}", n)) for n in range(50)]
    await asyncio.sleep(0)
    await cache.aclose()
    assert await asyncio.gather(*reads) == [None] * 50
    await asyncio.gather(*writes)
    # What was handed on before the end is carried out.
    assert len(await cache.get_many([f"w{n}" for n in range(50)])) == 50


# Cancellation


async def test_cancelled_callers_hurt_nobody(cache: Cache) -> None:
    await cache.set_many({f"k{n}": n for n in range(40)})
    for turn in range(12):
        tasks = [asyncio.create_task(cache.get(f"k{n}")) for n in range(40)]
        await turns(turn % 5)
        for task in tasks[turn % 3 :: 2]:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for n, answer in enumerate(answers):
            assert answer == n or isinstance(answer, asyncio.CancelledError)
    assert await cache.get("k7") == 7


async def test_a_write_that_was_handed_on_is_carried_out(cache: Cache) -> None:
    for n in range(5):
        task = asyncio.create_task(cache.set("k", n))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await cache.get("k") == n


async def test_a_clear_comes_after_a_cancelled_write() -> None:
    store = FaultyStore(MemoryStore())
    async with Cache(store) as cache:
        store.hang.clear()
        task = asyncio.create_task(cache.set("k", 1))
        await turns()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        clearing = asyncio.create_task(cache.clear())
        await turns()
        store.hang.set()
        await clearing
        assert await cache.get("k") is None


async def test_a_delete_comes_after_a_cancelled_write() -> None:
    store = FaultyStore(MemoryStore())
    async with Cache(store) as cache:
        store.hang.clear()
        task = asyncio.create_task(cache.set("k", 1))
        await turns()
        task.cancel()
        deleting = asyncio.create_task(cache.delete("k"))
        await turns()
        store.hang.set()
        assert await deleting is True
        assert await cache.get("k") is None


async def test_a_set_that_could_not_be_stored_leaves_no_older_value(backend: Backend, tmp_path: Path) -> None:
    room = 40_000
    caches = [Cache(MemoryStore(max_bytes=room)), FileCache(tmp_path / "small", max_bytes=room)]
    for cache in caches:
        async with cache:
            await cache.set("k", "old")
            await cache.set("k", "x" * 2 * room)
            assert await cache.get("k", MISSING) is MISSING
            assert cache.stats.errors == {"full": 1}


async def test_a_clear_whose_caller_left_clears_nothing_that_is_stored_next(cache: Cache) -> None:
    for steps in range(6):
        await cache.set("before", 1)
        clearing = asyncio.create_task(cache.clear())
        await turns(steps)
        clearing.cancel()
        await asyncio.gather(clearing, return_exceptions=True)
        await cache.set("after", 1)
        assert await cache.get("after") == 1
        assert await cache.add(f"added{steps}", 1)


async def test_a_large_value_is_checked_in_steps() -> None:
    value, turns_had = bytes(range(256)) * 12_000, 0

    async def have_turns() -> None:
        nonlocal turns_had
        while True:
            await asyncio.sleep(0)
            turns_had += 1

    async with MemoryCache(l1_max_entries=0) as cache:
        await cache.set("k", value)
        other = asyncio.create_task(have_turns())
        await turns()
        before = turns_had
        assert await cache.get("k") == value
        assert turns_had - before >= len(value) // (512 * 1024)
        other.cancel()
