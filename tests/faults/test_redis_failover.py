"""Row "Sentinel, Cluster failover": a primary dies, or hangs and comes back, under a load of everything.

No value of another key, none older than what a replica had confirmed, no error to a caller; it recovers by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import Cache, RedisCache
from mcp_hub_cache import _exceptions as errors
from mcp_hub_cache._protocols import Write
from mcp_hub_cache.stores._redis_sentinel import _LOOK
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import entry_frame
from tests.backends import poll
from tests.clusters import Cluster, Watched, cluster, followed, section, wait_until, watched

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

SECONDS = 45.0  # to recover in, on a busy machine


@pytest.fixture
def fleet() -> Iterator[Watched]:
    with watched() as made:
        yield made


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


class Load:
    """Reads, writes, deletes and loads with tags; each value says whose it is, and its number only grows."""

    def __init__(self, cache: Cache, keys: list[str]) -> None:
        self.cache = cache
        self.keys = keys
        self.number = 0
        self.written: dict[str, int] = {}  # the last that was there afterwards
        self.floor: dict[str, int] = {}  # the last that a replica has, too
        self.wrong: list[str] = []
        self.rounds = 0
        self._stop = False

    def next(self, key: str) -> dict[str, Any]:
        self.number += 1
        return {"key": key, "number": self.number}

    def check(self, key: str, value: Any) -> None:
        if value is not None and (value["key"] != key or value["number"] < self.floor.get(key, 0)):
            self.wrong.append(f"{key} (at least {self.floor.get(key)}): {value}")

    async def _work(self, key: str) -> None:
        loaded = f"loaded {key}"

        async def load() -> dict[str, Any]:
            return self.next(loaded)

        while not self._stop:
            value = self.next(key)
            await self.cache.set(key, value, ttl="10m")
            found = await self.cache.get(key)
            self.check(key, found)
            if found == value:
                self.written[key] = value["number"]
            self.check(loaded, await self.cache.get_or_load(loaded, load, ttl="10m", tags=["t"]))
            if value["number"] % 5 == 0:
                await self.cache.delete(key)
                self.check(key, await self.cache.get(key))
            if value["number"] % 50 == 0:
                await self.cache.invalidate("t")
            self.rounds += 1
            await asyncio.sleep(0.001)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.ensure_future(self._work(key)) for key in self.keys]
        try:
            yield
        finally:
            self._stop = True
            await asyncio.gather(*tasks)
        assert self.wrong == []

    async def turn(self, count: int = 200) -> None:
        """Return after so many more rounds."""
        until = self.rounds + count
        await poll(lambda: self.rounds >= until, SECONDS)

    async def settle(self, confirm: Callable[[], None]) -> None:
        """Have what is written by now confirmed, and expect no older value from now on."""
        before = dict(self.written)
        await asyncio.to_thread(confirm)
        self.floor.update(before)

    async def recovered(self) -> None:
        """Return when every key can be written and read again."""

        async def good(key: str) -> bool:
            value = self.next(key)
            name = f"after {key}"
            await self.cache.set(name, value, ttl="10m")
            return bool(await self.cache.get(name) == value)

        async def all_good() -> bool:
            return all(await asyncio.gather(*(good(key) for key in self.keys)))

        await poll(all_good, SECONDS)


def replaced(store: Any) -> list[str]:
    """Where it is noted that the server is another one; whoever else listens still hears of it."""
    while isinstance(store, FailoverStore):
        store = store._primary.store
    events: list[str] = []
    others = store.on_replaced

    def note() -> None:
        events.append("replaced")
        if others is not None:
            others()

    store.on_replaced = note
    return events


KEYS = [f"k{number}" for number in range(24)]


@pytest.mark.parametrize("hangs", [False, True], ids=["killed", "stopped"])
async def test_a_primary_under_sentinel(fleet: Watched, hangs: bool) -> None:  # a parameter of the test
    cache = RedisCache(sentinels=fleet.hosts, timeout=1.0, namespace="ns")
    events = replaced(cache.store)
    load = Load(cache, KEYS)
    former = fleet.primary()
    async with load.running():
        await load.turn()
        await load.settle(fleet.confirm)
        assert events == []
        if hangs:
            former.pause()
        else:
            former.kill()
        await asyncio.to_thread(wait_until, lambda: fleet.primary() is not former)
        await load.recovered()
        assert events
        if hangs:
            # It takes itself for a primary, for some ten seconds; what it has is older than what was written since.
            load.floor.update(load.written)
            former.resume()
        await load.turn()
        await load.recovered()
        await poll(lambda: cache.store.stamp(b"mcp_hub:x") is not None, SECONDS)  # type: ignore[attr-defined]  # the feed
    listening = [line for line in fleet.primary().command("CLIENT", "LIST").decode().splitlines() if " sub=1 " in line]
    assert any("mcp-hub-cache" in line for line in listening)
    await cache.aclose()


@pytest.mark.parametrize("hangs", [False, True], ids=["killed", "stopped"])
async def test_a_primary_of_a_cluster(nodes: Cluster, hangs: bool) -> None:  # a parameter of the test
    cache = RedisCache(nodes.url, cluster=True, timeout=1.0, namespace="ns")
    events = replaced(cache.store)
    load = Load(cache, KEYS)

    def confirm() -> None:
        for _, _, primary, (replica,) in nodes.slots():
            followed(primary, replica)

    async with load.running():
        await load.turn()
        await load.settle(confirm)
        assert events == []
        former = nodes.primary_of(0)
        survivor = next(node for node in nodes.primaries() if node is not former)
        if hangs:
            former.pause()
        else:
            former.kill()

        def promoted() -> bool:
            ranges = survivor.command("CLUSTER", "SLOTS")
            return all(primary[1] != former.port for _, _, primary, *_ in ranges)

        await asyncio.to_thread(wait_until, promoted)
        await load.recovered()
        assert events
        if hangs:
            load.floor.update(load.written)
            former.resume()
        await load.turn()
        await load.recovered()
    await cache.aclose()


async def test_a_former_primary_that_came_back_is_not_written_to(fleet: Watched) -> None:
    """READONLY, where nobody closed the connection: the next call goes to the primary."""
    store = RedisStore(sentinels=fleet.hosts, timeout=5.0)

    def one(key: bytes) -> Write:
        return Write(key, entry_frame(store, key, b"1", ttl=60), 60.0, None)

    assert await store.write_many([one(b"a")]) == ["done"]
    former, other = fleet.primary(), fleet.other()
    # Behind the backs of the sentinels, whose own way would close the connections.
    for sentinel in fleet.sentinels:
        sentinel.pause()
    other.command("REPLICAOF", "NO", "ONE")
    former.command("REPLICAOF", "127.0.0.1", other.port)
    (outcome,) = await store.write_many([one(b"b")])
    assert isinstance(outcome, errors.StoreReadOnlyError)
    sent = former.command("INFO", "commandstats").count(b"cmdstat_set:calls=2,")
    with pytest.raises(errors.StoreUnreachableError, match="sentinels"):
        await store.write_many([one(b"b")])
    assert former.command("INFO", "commandstats").count(b"cmdstat_set:calls=2,") == sent
    former.command("REPLICAOF", "NO", "ONE")
    other.command("REPLICAOF", "127.0.0.1", former.port)
    for sentinel in fleet.sentinels:
        sentinel.resume()

    async def written() -> bool:
        try:
            return await store.write_many([one(b"c")]) == ["done"]
        except errors.StoreError:
            return False

    await poll(written, SECONDS)
    assert fleet.primary().command("EXISTS", "c") == 1
    await store.aclose()


@pytest.mark.parametrize("near", [True, False])
async def test_a_former_primary_that_nobody_told_is_used_for_seconds_at_most(near: bool) -> None:  # of the test
    """It is cut off from the sentinels, but not from here: nothing closes our connections."""
    with watched(as_user="watcher") as fleet:
        old, new = fleet.primary(), fleet.other()
        url = f"sentinel://:watcher@{fleet.hosts}/mymaster"
        ours = RedisCache(url, timeout=5.0, l1_max_entries=100 if near else 0)
        await ours.set("k", "before")
        assert await ours.get("k") == "before"
        fleet.confirm()
        old.command("ACL", "DELUSER", "watcher")
        await poll(lambda: fleet.primary() is new, SECONDS)
        await poll(lambda: section(new, "replication")["role"] == "master", SECONDS)
        demoted = time.monotonic()
        async with RedisCache(url, timeout=5.0) as elsewhere:
            assert await elsewhere.get("k") == "before"
            await elsewhere.set("k", "after")
        assert await ours.get("k") == "before"  # what its primary says
        await poll(lambda: _gets(ours, "k", "after"), SECONDS)
        assert time.monotonic() - demoted < _LOOK + 1.0 + 4.0  # a round trip, and what a busy machine adds
        assert section(old, "replication")["role"] == "master"
        await ours.set("k", "later")
        assert b"later" in bytes(new.command("GET", b"mcp_hub:default:e:k"))
        await ours.aclose()


async def _gets(cache: Cache, key: str, value: str) -> bool:
    found: Any = await cache.get(key)
    assert found in {"before", value}  # no miss: there was no outage
    return bool(found == value)


async def test_files_stand_in_for_the_keys_of_one_node(tmp_path: Path) -> None:
    """One node hangs and comes back: its keys alone go to the files, and what was deleted meanwhile stays so."""
    with cluster("--cluster-require-full-coverage", "no", replicas=0) as nodes:
        options = {"failover": {"probe_max": 0.5}, "timeout": 1.0}
        async with RedisCache(nodes.url, cluster=True, fallback=FileStore(tmp_path), **options) as cache:  # type: ignore[arg-type]  # of several types
            keys = [f"k{number}" for number in range(60)]
            await cache.set_many(dict.fromkeys(keys, "old"))
            stopped = nodes.nodes[0]
            lane = f"127.0.0.1:{stopped.port}"
            theirs = [key for key in keys if cache.store.lane(cache._key(key)) == lane]
            others = [key for key in keys if key not in theirs]
            assert len(theirs) > 5 and len(others) > 5
            stopped.pause()
            try:
                await asyncio.gather(*(cache.get(key) for key in theirs))
                await poll(lambda: cache.store.state().state == "degraded", SECONDS)
                deleted, replaced_, left = theirs[0], theirs[1], theirs[2]
                await cache.delete(deleted)
                await cache.set(replaced_, "new")
                assert await cache.get_many([deleted, replaced_, left]) == {replaced_: "new"}
                for key in others:
                    assert await cache.get(key) == "old"
                await cache.delete(others[0])
                assert await cache.get(others[0]) is None
            finally:
                stopped.resume()

            async def is_back() -> bool:
                return cache.store.state().state == "healthy" and await cache.get(left) == "old"

            await poll(is_back, SECONDS)
            assert await cache.get_many([deleted, replaced_, others[0]]) == {}
            assert await cache.get_many(others[1:]) == dict.fromkeys(others[1:], "old")
