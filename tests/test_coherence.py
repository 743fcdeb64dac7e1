"""Near caches of two processes over one folder and one server: none serves what another has replaced.

Over a folder a change is known at once. Over Redis it is known as soon as the server's word of it arrives, and where
that is lost or late nothing is served from memory that was replaced more than ``TRUST`` seconds ago.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import MISSING, Cache, FileCache, RedisCache
from mcp_hub_cache._changes import Slot
from mcp_hub_cache._protocols import Coherent
from mcp_hub_cache._steady import steady
from mcp_hub_cache.stores._redis_feed import TRUST
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import FaultProxy
from tests.backends import PATIENT, poll, turns
from tests.servers import Server, valkey_server

ROOT = str(Path(__file__).parents[1])
LATER = 2.0  # seconds that a busy machine may add to what the clock decides
RACE_SECONDS = 2.5
RACE_KEYS = [f"k{n}" for n in range(50)]

# Another process with a cache on the same; does what it reads, one line each, and answers with one.
OTHER = """
import asyncio, json, sys
from mcp_hub_cache import FileCache, RedisCache
from tests.test_coherence import race, served
async def main():
    kind, where = sys.argv[1:]
    async with (FileCache if kind == "file" else RedisCache)(where, timeout=30) as cache:
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            name, *arguments = json.loads(line)
            if name == "race":
                answer = await race(cache, "other", 2)
            elif name == "served":
                answer = await served(cache)
            else:
                answer = await getattr(cache, name)(*arguments)
            print(json.dumps(answer), flush=True)
asyncio.run(main())
"""


class Other:
    """The other process."""

    def __init__(self, kind: str, where: str) -> None:
        path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-c", OTHER, kind, where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.ask("get", "whatever")  # it is up

    def tell(self, *command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, *command: Any) -> Any:
        """Have it done; blocks this process, whose loop has seen nothing of it when it is."""
        self.tell(*command)
        return self.hear()

    def close(self) -> None:
        self._process.communicate()


class World:
    """Two processes on one folder or server: this one, and another."""

    def __init__(self, kind: str, where: str) -> None:
        self.kind = kind
        self.where = where
        self.other = Other(kind, where)

    def open(self, **options: Any) -> Cache:
        options.setdefault("timeout", PATIENT)
        return (FileCache if self.kind == "file" else RedisCache)(self.where, **options)


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture(params=["file", "redis"])
def world(request: pytest.FixtureRequest, tmp_path: Path, valkey: Server) -> Iterator[World]:
    valkey.command("FLUSHALL")
    world = World(request.param, valkey.url if request.param == "redis" else str(tmp_path / "shared"))
    yield world
    world.other.close()


@pytest.fixture
async def cache(world: World) -> AsyncIterator[Cache]:
    async with world.open() as cache:
        yield cache


async def near(cache: Cache, key: str) -> Any:
    """The value of *key*, once it is served from memory."""
    while True:
        await cache.get(key)
        entry = await cache.get_entry(key)
        if entry is not None and entry.tier == "l1":
            return entry.value
        await asyncio.sleep(0.002)


async def becomes(cache: Cache, key: str, value: object) -> None:
    """Return when *key* has *value*, which over a folder it has at once."""
    if cache.store.name == "file":
        assert await cache.get(key, MISSING) == value
        return
    begun = steady()
    while await cache.get(key, MISSING) != value:
        assert steady() - begun < TRUST + LATER
        await asyncio.sleep(0)


# One after another


async def test_own_changes_are_known_at_once(cache: Cache) -> None:
    for turn in range(30):
        await cache.set("k", [turn])
        assert await cache.get("k") == [turn]
        assert await near(cache, "k") == [turn]
        await cache.set_many({"k": [turn, "again"]})
        assert await cache.get_many(["k"]) == {"k": [turn, "again"]}
        assert await near(cache, "k") == [turn, "again"]
        await cache.delete("k")
        assert await cache.get("k", MISSING) is MISSING
        assert await cache.add("k", "added")
        assert await near(cache, "k") == "added"
        await cache.clear()
        assert await cache.get("k", MISSING) is MISSING
        assert await cache.get_or_load("k", lambda: asyncio.sleep(0, "loaded")) == "loaded"
        assert await near(cache, "k") == "loaded"


async def test_what_another_process_changes_is_known(world: World, cache: Cache) -> None:
    for turn in range(10):
        await cache.set("k", [turn])
        await near(cache, "k")
        world.other.ask("set", "k", ["theirs", turn])
        await becomes(cache, "k", ["theirs", turn])
        assert await near(cache, "k") == ["theirs", turn]
        world.other.ask("touch", "k", 1000)
        assert await near(cache, "k") == ["theirs", turn]
        world.other.ask("delete", "k")
        await becomes(cache, "k", MISSING)
        world.other.ask("set", "k", ["again", turn])
        await becomes(cache, "k", ["again", turn])
        await near(cache, "k")
        world.other.ask("clear")
        await becomes(cache, "k", MISSING)


async def test_what_is_not_changed_stays_near(world: World, cache: Cache) -> None:
    await cache.set_many({key: key for key in RACE_KEYS})
    for key in RACE_KEYS:
        await near(cache, key)
    world.other.ask("set", "another", 1)
    await becomes(cache, "another", 1)
    entries = [await cache.get_entry(key) for key in RACE_KEYS]
    tiers = [entry.tier for entry in entries if entry is not None]
    assert tiers == ["l1"] * len(RACE_KEYS)


async def test_what_expires_is_gone(cache: Cache) -> None:
    await cache.set("k", "short", ttl=0.5)
    begun = cache.store.now()
    await near(cache, "k")
    while (value := await cache.get("k", MISSING)) is not MISSING:
        assert value == "short"
        assert cache.store.now() - begun < 0.6 + LATER
        await asyncio.sleep(0)
    assert cache.store.now() >= begun + 0.4


async def test_a_flushed_server_has_nothing(valkey: Server) -> None:
    async with RedisCache(valkey.url, timeout=PATIENT) as cache:
        for command in (("FLUSHALL",), ("FLUSHDB", "ASYNC")):
            await cache.set("k", 1)
            await near(cache, "k")
            valkey.command(*command)
            await becomes(cache, "k", MISSING)


# A change and a read at once


class _Held:
    """Reads that have their answer and are not given it yet."""

    def __init__(self, store: FileStore | RedisStore) -> None:
        self._get = store.get_many
        self.hold = False
        self.answered = asyncio.Event()
        self.go = asyncio.Event()

    async def get_many(self, keys: Sequence[bytes], /) -> list[bytes | None]:
        answers = await self._get(keys)
        if self.hold:
            self.hold = False
            self.answered.set()
            await self.go.wait()
        return answers


@pytest.mark.parametrize("how", ["set", "delete", "clear"])
@pytest.mark.parametrize("who", ["this process", "another"])
async def test_what_changed_while_it_was_read_is_not_kept(world: World, how: str, who: str) -> None:
    store = FileStore(world.where) if world.kind == "file" else RedisStore(world.where, timeout=PATIENT)
    held = _Held(store)
    store.get_many = held.get_many  # type: ignore[assignment]
    assert isinstance(store, Coherent)
    async with Cache(store, timeout=PATIENT) as cache:
        await cache.set("k", "old")
        assert await near(cache, "k") == "old"
        await cache.set("k", "old, and nobody has read it")
        held.hold = True
        reading = asyncio.ensure_future(cache.get("k"))
        await asyncio.wait_for(held.answered.wait(), PATIENT)
        before = _slot(store, cache).stamp()
        arguments = {"set": ("k", "new"), "delete": ("k",), "clear": ()}[how]
        if who == "another":
            world.other.ask(how, *arguments)
        else:
            async with world.open() as twin:  # one that does not know of this one's reads in progress
                await getattr(twin, how)(*arguments)
        await poll(lambda: _slot(store, cache).stamp() not in {None, before})  # None: it is being made just now
        held.go.set()
        assert await reading == "old, and nobody has read it"  # it was, when it was asked for
        for _ in range(3):
            assert await cache.get("k", MISSING) == ("new" if how == "set" else MISSING)


def _slot(store: Coherent, cache: Cache) -> Slot:
    slot = store.slot(cache._key("k"))
    assert slot is not None
    return slot


@asynccontextmanager
async def behind_a_proxy(valkey: Server) -> AsyncIterator[tuple[FaultProxy, Cache, Other]]:
    """This process through a proxy, the other one directly."""
    other = Other("redis", valkey.url)
    try:
        async with FaultProxy(valkey.url) as between, RedisCache(between.url, timeout=PATIENT) as cache:
            yield between, cache, other
    finally:
        other.close()


@pytest.mark.parametrize("first", ["the answer", "the news"])
async def test_an_answer_and_the_news_in_either_order(valkey: Server, first: str) -> None:
    async with behind_a_proxy(valkey) as (between, cache, other):
        await cache.set("k", "old")
        assert await near(cache, "k") == "old"
        for turn in range(5):
            await cache.set("k", f"old {turn}")
            answers = between.hold(between.of(b"MGET"))
            news = between.hold(b"SUBSCRIBE")
            reading = asyncio.ensure_future(cache.get("k"))
            await asyncio.wait_for(answers.hit.wait(), PATIENT)
            other.ask("set", "k", f"new {turn}")
            await asyncio.wait_for(news.hit.wait(), PATIENT)
            (answers if first == "the answer" else news).end()
            if first == "the answer":
                assert await reading == f"old {turn}"
            else:
                await turns(50)
            between.heal()
            assert await reading == f"old {turn}"
            await becomes(cache, "k", f"new {turn}")
            assert await near(cache, "k") == f"new {turn}"


# Lost and late news


async def test_a_lost_feed_serves_nothing_old(valkey: Server) -> None:
    async with behind_a_proxy(valkey) as (_, cache, other):
        for turn in range(5):
            await cache.set("k", turn)
            assert await near(cache, "k") == turn
            valkey.command("CLIENT", "KILL", "TYPE", "pubsub")
            other.ask("set", "k", f"new {turn}")
            await becomes(cache, "k", f"new {turn}")
            assert await near(cache, "k") == f"new {turn}"


async def test_late_news_are_waited_for_no_longer_than_said(valkey: Server) -> None:
    async with behind_a_proxy(valkey) as (between, cache, other):
        await cache.set("k", "old")
        assert await near(cache, "k") == "old"
        between.hold(between.of(b"SUBSCRIBE"))
        other.ask("set", "k", "new")
        begun = steady()
        assert await cache.get("k") == "old"  # what nobody has told it, it can't know
        await becomes(cache, "k", "new")
        assert steady() - begun < TRUST + LATER
        between.heal()
        for _ in range(100):
            assert await cache.get("k") == "new"
            await asyncio.sleep(0)
        assert await near(cache, "k") == "new"


async def test_a_server_without_a_feed_is_read_every_time(valkey: Server) -> None:
    async with RedisCache(valkey.url, timeout=PATIENT, max_connections=1) as cache:
        await cache.set("k", 1)
        for _ in range(20):
            entry = await cache.get_entry("k")
            assert entry is not None and entry.tier == "redis"
        assert (await cache.status()).facts["l1_feed"] == "off: max_connections is 1"


# Two at once


async def race(cache: Cache, name: str, seed: int) -> int:
    """Change and read the same keys as everybody else, at random, for a while; answer how many reads were near."""
    rng, until, number = random.Random(seed), steady() + RACE_SECONDS, 0

    async def worker() -> None:
        nonlocal number
        while steady() < until:
            key, number = rng.choice(RACE_KEYS), number + 1
            match rng.randrange(20):
                case 0 | 1 | 2:
                    await cache.set(key, [name, number])
                case 3:
                    await cache.set_many({key: [name, number], rng.choice(RACE_KEYS): [name, number]})
                case 4:
                    await cache.delete(key)
                case 5:
                    await cache.get_or_load(key, lambda number=number: asyncio.sleep(0, [name, number]))
                case 6:
                    await cache.get_many(RACE_KEYS[:10])
                case _:
                    await cache.get(key)

    await asyncio.gather(*(worker() for _ in range(8)))
    return cache.stats.hits_by_tier.get("l1", 0)


async def served(cache: Cache) -> list[Any]:
    """What *cache* has under each key, read twice, so that the second time it comes from memory."""
    await cache.get_many(RACE_KEYS)
    return [await cache.get(key) for key in RACE_KEYS]


@pytest.mark.parametrize("turn", range(2))
async def test_after_a_race_of_two_writers_all_agree(world: World, cache: Cache, turn: int) -> None:
    await cache.set("warm", 1)
    await near(cache, "warm")
    world.other.tell("race")
    hits = await race(cache, "this", turn)
    their_hits = await asyncio.to_thread(world.other.hear)
    assert hits > 0 and their_hits > 0  # near caches were in use
    async with world.open(l1_max_entries=0) as bare:
        truth = await served(bare)
        assert any(truth)
        for ask in (lambda: served(cache), lambda: asyncio.to_thread(world.other.ask, "served")):
            if world.kind == "file":
                assert await ask() == truth
            else:
                await poll(_agrees(ask, truth), TRUST + LATER)
            assert await ask() == truth
        tiers = [entry.tier for key in RACE_KEYS if (entry := await cache.get_entry(key)) is not None]
        assert "l1" in tiers
        assert await served(bare) == truth


def _agrees(ask: Callable[[], Any], truth: list[Any]) -> Callable[[], Any]:
    async def agrees() -> bool:
        return bool(await ask() == truth)

    return agrees
