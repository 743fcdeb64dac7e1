"""Who may share a load in progress: everybody, until something happens to the key; then nobody who comes after it.

Another process does what happens here, or a second cache over the same store in its place. Over Redis, one that waits
for nothing hears of it when the server's word arrives; where there is no feed, whoever joins asks.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import Cache, Policy, RedisCache, current_entry
from mcp_hub_cache import _placeholders as placeholders
from mcp_hub_cache._tags import mark_key, tag_digest
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import FaultyStore
from tests.backends import PATIENT, poll, turns
from tests.servers import Server, valkey_server

KINDS = ("memory", "file", "redis", "redis without the feed")
WAVE = 100


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


class World:
    """One store, and caches over it; counts what each store is asked for.

    Attributes:
        reads: How often each key was read, by the cache that was opened last with ``count``.
    """

    def __init__(self, kind: str, folder: Path, server: Server | None) -> None:
        self.kind = kind
        self.reads: Counter[bytes] = Counter()
        self.hears = kind == "redis"  # not at once, but soon
        self._folder = folder / "cache"
        self._server = server
        self._memory = MemoryStore()
        self._opened: list[Cache] = []

    def store(self) -> Any:
        if self.kind == "memory":
            return self._memory
        if self._server is None:
            return FileStore(self._folder)
        connections = 1 if "without" in self.kind else 50
        return RedisStore(self._server.url, timeout=PATIENT, max_connections=connections)

    def open(self, *, count: bool = False, **options: Any) -> Cache:
        store = self.store()
        if count:
            get = store.get_many

            def counted(keys: Sequence[bytes]) -> Any:
                self.reads.update(keys)
                return get(keys)

            store.get_many = counted
        self._opened.append(Cache(store, timeout=PATIENT, **options))
        if count and self.kind == "memory":
            del store.get_many  # the others share it
        return self._opened[-1]

    async def change(self, here: Cache, change: Callable[[], Awaitable[Any]], *keys: bytes) -> None:
        """Carry out *change* elsewhere; return when it is known *here*."""
        before = [here.store.stamp(key) for key in keys] if self.hears else []  # type: ignore[attr-defined]
        await change()
        if self.hears:
            await poll(lambda: all(here.store.stamp(key) != was for key, was in zip(keys, before, strict=True)))  # type: ignore[attr-defined]

    async def aclose(self) -> None:
        for cache in self._opened:
            await cache.aclose()


@pytest.fixture(params=KINDS)
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    server = request.getfixturevalue("valkey") if request.param.startswith("redis") else None
    if server is not None:
        server.command("FLUSHALL")
    world = World(request.param, tmp_path, server)
    yield world
    await world.aclose()


class Source:
    """A loader: counts its calls; each waits for a gate of its own, and returns its number."""

    def __init__(self) -> None:
        self.calls = 0
        self.gates = [asyncio.Event() for _ in range(10)]
        self.tags: list[str] = []

    async def __call__(self) -> list[int]:
        self.calls += 1
        number = self.calls
        await self.gates[number - 1].wait()
        current_entry().tags.update(self.tags)
        return [number]

    async def called(self, times: int = 1) -> None:
        await poll(lambda: self.calls >= times, 8)

    def go(self) -> None:
        for gate in self.gates:
            gate.set()


def wave(cache: Cache, source: Source, **how: Any) -> list[asyncio.Future[Any]]:
    return [asyncio.ensure_future(cache.get_or_load("k", source, **how)) for _ in range(WAVE)]


async def settled(cache: Cache, world: World) -> None:
    """Return when what this cache has written itself moves nothing any more."""
    for _ in range(3):
        await cache.store.ping()
        await turns()


# After a change

CHANGES: dict[str, Callable[[Cache], Awaitable[Any]]] = {
    "delete": lambda cache: cache.delete("k"),
    "delete_many": lambda cache: cache.delete_many(["a", "k"]),
    "clear": lambda cache: cache.clear(),
    "clear the owner's": lambda cache: cache.clear(owner="me"),
    "invalidate": lambda cache: cache.invalidate("other", "t"),
}


@pytest.mark.parametrize("joined", [0, 3])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", ["nothing", "something stale"])
async def test_who_comes_after_anothers_change_starts_anew(world: World, change: str, joined: int, before: str) -> None:
    here, there, source = world.open(), world.open(), Source()
    how = {"tags": ["t"], "owner": "me", "stale_ttl": "1h"}
    if before == "something stale":
        stale = Source()
        stale.go()
        await there.get_or_load("k", stale, policy=Policy(ttl=0.02), **how)
        until = there.store.now() + 0.02
        await poll(lambda: there.store.now() > until)
    early = wave(here, source, **how)
    await source.called()
    for _ in range(joined):  # its looks are what this process goes by, then
        early += wave(here, source, **how)
        await settled(here, world)
    key = here._key("k")
    known = mark_key(here._engine.root(key), tag_digest("t")) if change == "invalidate" else key
    await world.change(here, lambda: CHANGES[change](there), known)
    late = wave(here, source, **how)
    await source.called(2)
    source.gates[1].set()
    assert await asyncio.gather(*late) == [[2]] * WAVE
    source.gates[0].set()
    assert await asyncio.gather(*early) == [[1]] * len(early)
    assert source.calls == 2
    # What stays is the new one, whoever ended last.
    assert (await here.get("k"), await there.get("k")) == ([2], [2])


async def test_who_comes_after_anothers_set_gets_what_was_set(world: World) -> None:
    here, there, source = world.open(), world.open(), Source()
    early = wave(here, source)
    await source.called()
    await world.change(here, lambda: there.set("k", "set"), here._key("k"))
    assert await asyncio.gather(*wave(here, source)) == ["set"] * WAVE
    source.go()
    assert await asyncio.gather(*early) == [[1]] * WAVE
    assert source.calls == 1
    assert (await here.get("k"), await there.get("k")) == ("set", "set")


async def test_the_first_who_joins_asks_even_before_the_word_arrives(world: World) -> None:
    """What this process planted has moved the counter: nothing is known yet that could be out of date."""
    here, there, source = world.open(), world.open(), Source()
    early = wave(here, source)
    await source.called()
    await there.delete("k")
    late = wave(here, source)
    await source.called(2)
    source.go()
    assert await asyncio.gather(*late) == [[2]] * WAVE
    assert await asyncio.gather(*early) == [[1]] * WAVE


async def test_a_tag_that_the_loader_adds_counts_for_who_comes_later(world: World) -> None:
    """It is not known before the load has ended: who has come meanwhile loads again."""
    here, there, source = world.open(), world.open(), Source()
    source.tags = ["t"]
    early = wave(here, source)
    await source.called()
    await there.invalidate("t")
    late = wave(here, source)
    await turns(20)
    source.gates[0].set()
    await source.called(2)
    source.go()
    assert await asyncio.gather(*late) == [[2]] * WAVE
    # Of the others, whoever joined when it had begun can't be told from these, and gets the newer one.
    leader, *others = await asyncio.gather(*early)
    assert leader == [1]
    assert all(other in ([1], [2]) for other in others)
    assert source.calls == 2
    assert (await here.get("k"), await there.get("k")) == ([2], [2])


async def test_a_placeholder_that_was_evicted_is_a_change(world: World) -> None:
    here, there, source = world.open(), world.open(), Source()
    early = wave(here, source)
    await source.called()
    key = here._key("k")
    await there.get("whatever")  # only a cache that was used closes its store
    await world.change(here, lambda: there.store.delete_many([key]), key)
    late = wave(here, source)
    await source.called(2)
    source.go()
    assert await asyncio.gather(*early, *late) == [[1]] * WAVE + [[2]] * WAVE


async def test_a_change_of_another_key_is_none(world: World) -> None:
    here, there, source = world.open(), world.open(), Source()
    tasks = wave(here, source, tags=["t"])
    await source.called()
    for change in (there.set("other", 1), there.delete("k2"), there.clear(prefix="k2"), there.invalidate("t2")):
        await change
        tasks += wave(here, source, tags=["t"])
        await settled(here, world)
    source.go()
    assert await asyncio.gather(*tasks) == [[1]] * len(tasks)
    assert source.calls == 1


# Without a change


async def test_nobody_is_thrown_out_for_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 callers in waves on one slow load: over its own echo, renewals, and changes of a key with its counter."""
    monkeypatch.setattr(placeholders, "HOLD", 3.0)
    here, there, source = world.open(), world.open(), Source()
    renewed = 0
    renew = here.store.renew_many  # type: ignore[attr-defined]

    def counted(*args: Any, **how: Any) -> Any:
        nonlocal renewed
        renewed += 1
        return renew(*args, **how)

    monkeypatch.setattr(here.store, "renew_many", counted)
    await here.get("whatever")
    double = neighbour(here, "k")
    tasks = wave(here, source, tags=["t"])
    await source.called()
    for turn in range(9):
        seen = renewed
        tasks += wave(here, source, tags=["t"])
        await there.set(double, turn)
        if turn in {3, 6}:
            await poll(lambda seen=seen: renewed > seen)  # type: ignore[misc]
        await settled(here, world)
    assert renewed >= 2
    source.go()
    assert await asyncio.gather(*tasks) == [[1]] * 1000
    assert source.calls == 1
    assert here.stats.loads == 1
    assert await here.get("k") == [1]


def neighbour(cache: Cache, name: str) -> str:
    """Another key with the same counter, where there are counters."""
    slot = cache.store.slot(cache._key(name))  # type: ignore[attr-defined]
    if slot is None:
        return "another"
    names = (f"n{number}" for number in range(5_000_000))
    return next(each for each in names if cache.store.slot(cache._key(each)).at == slot.at)  # type: ignore[attr-defined]


async def test_many_at_once_cost_one_look(world: World) -> None:
    here, source = world.open(count=True), Source()
    key = here._key("k")
    tasks = wave(here, source)
    await source.called()
    await settled(here, world)
    looks = []
    for _ in range(9):
        before = world.reads[key]
        tasks += wave(here, source)
        await turns()
        await settled(here, world)
        looks.append(world.reads[key] - before)
    if "without" in world.kind:
        assert looks == [1] * 9
    else:  # the first who join find the counter moved by what this process planted; from then on it tells
        assert looks[0] <= 1
        assert looks[1:] == [0] * 8
    source.go()
    assert await asyncio.gather(*tasks) == [[1]] * 1000
    assert source.calls == 1


# A store that can't be asked


@pytest.mark.parametrize("trouble", ["fails", "hangs"])
async def test_where_the_store_cant_be_asked_they_join(trouble: str) -> None:
    store, source = FaultyStore(MemoryStore()), Source()
    async with Cache(store, timeout=0.1 if trouble == "hangs" else PATIENT) as cache:
        tasks = wave(cache, source)
        await source.called()
        if trouble == "fails":
            store.break_down()
        else:
            store.hang.clear()
        tasks += wave(cache, source)
        await poll(lambda: cache.stats.misses == 2 * WAVE)  # they have asked, and wait
        store.repair()
        tasks += wave(cache, source)
        await poll(lambda: cache.stats.misses == 3 * WAVE)
        source.go()
        assert await asyncio.gather(*tasks) == [[1]] * 3 * WAVE
        assert source.calls == 1
        assert await cache.get("k") == [1]


async def test_where_the_server_is_gone_they_join() -> None:
    source = Source()
    with valkey_server() as server:
        async with RedisCache(server.url) as cache:
            tasks = wave(cache, source)
            await source.called()
            tasks += wave(cache, source)
            await poll(lambda: cache.stats.misses == 2 * WAVE)
            server.kill()
            tasks += wave(cache, source)
            await poll(lambda: cache.stats.misses == 3 * WAVE)
            source.go()
            assert await asyncio.gather(*tasks) == [[1]] * 3 * WAVE
            assert source.calls == 1


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
async def test_it_is_the_same_under_eager_tasks(world: World) -> None:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]  # not on 3.11
    try:
        here, there, source = world.open(), world.open(), Source()
        early = wave(here, source)
        await source.called()
        early += wave(here, source)
        await settled(here, world)
        key = here._key("k")
        await world.change(here, lambda: there.delete("k"), key)
        late = wave(here, source)
        await source.called(2)
        source.go()
        assert await asyncio.gather(*early, *late) == [[1]] * 2 * WAVE + [[2]] * WAVE
        assert source.calls == 2
    finally:
        loop.set_task_factory(None)


async def test_who_is_about_to_join_a_load_that_its_last_waiter_leaves_gets_another() -> None:
    store = FaultyStore(MemoryStore())
    cache = Cache(store, timeout=PATIENT)
    started = asyncio.Event()

    async def endless() -> str:
        started.set()
        await asyncio.Event().wait()
        return "never"

    async def quick() -> str:
        return "another"

    first = asyncio.create_task(cache.get_or_load("a", endless, ttl=60, tags=["t"]))
    await started.wait()
    store.hang.clear()  # whoever joins asks first whether the load's tag still stands
    second = asyncio.create_task(cache.get_or_load("a", quick, ttl=60, tags=["t"]))
    await turns()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    store.hang.set()
    assert await second == "another"
    await cache.aclose()
