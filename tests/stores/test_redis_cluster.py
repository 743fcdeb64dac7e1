"""A cluster of real nodes: the conformance suite, slots that move, and calls that are split."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mcp_hub_cache import RedisCache
from mcp_hub_cache import _exceptions as errors
from mcp_hub_cache._protocols import Coherent, Replaceable, Store, Write
from mcp_hub_cache.stores._redis_outlet import BIG
from mcp_hub_cache.stores._redis_slots import slot_of
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import StoreConformance, entry_frame
from tests.backends import PATIENT, poll
from tests.clusters import Cluster, cluster
from tests.servers import certificates, redis_server

KEYS = [b"mcp_hub:ns:e:%d" % number for number in range(60)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(replicas=0) as made:
        yield made


@pytest.fixture
async def store(nodes: Cluster) -> AsyncIterator[RedisStore]:
    for node in nodes.nodes:
        node.command("FLUSHALL")
    store = RedisStore(nodes.url, cluster=True, timeout=5.0)
    yield store
    await store.aclose()


def write(store: Store, key: bytes, payload: bytes = b"1") -> Write:
    return Write(key, entry_frame(store, key, payload, ttl=60), 60.0, None)


def key_at(slot: int, name: str = "k") -> bytes:
    """A key of *slot*."""
    return next(key for n in range(10**6) if slot_of(key := f"mcp_hub:{name}{n}".encode()) == slot)


class TestOnCluster(StoreConformance):
    @pytest.fixture(autouse=True)
    def _serve(self, nodes: Cluster) -> None:
        self.nodes = nodes

    @asynccontextmanager
    async def open_pair(self) -> AsyncIterator[tuple[Store, Store]]:
        host, _, port = self.nodes.url.partition("://")[2].partition(",")[0].partition(":")
        one = RedisStore(self.nodes.url, cluster=True, timeout=5.0)
        two = RedisStore(host=host, port=int(port), cluster=True, timeout=5.0, max_connections=1)
        yield one, two
        await one.aclose()
        await two.aclose()

    async def wait_coherent(self, store: Coherent, key: bytes) -> bool:
        pytest.skip("there is no feed in a cluster")


def test_slots() -> None:
    """The examples of the specification."""
    assert slot_of(b"123456789") == 12739
    assert slot_of(b"{user1000}.following") == slot_of(b"{user1000}.followers") == slot_of(b"user1000")
    assert slot_of(b"foo{}{bar}") != slot_of(b"bar") == slot_of(b"foo{bar}{zap}")
    assert slot_of(b"foo{{bar}}zap") == slot_of(b"{bar")


async def test_a_lane_is_a_node(nodes: Cluster, store: RedisStore) -> None:
    assert {store.lane(key) for key in KEYS} == {""}  # nobody has asked yet
    await store.write_many([write(store, key) for key in KEYS])
    for key in KEYS:
        assert store.lane(key) == f"127.0.0.1:{nodes.primary_of(slot_of(key)).port}"
    assert len({store.lane(key) for key in KEYS}) == 3
    big = write(store, KEYS[0], b"x" * (BIG + 1))
    assert await store.write_many([big]) == ["done"]
    assert store.lane(KEYS[0]) == (store.lane(KEYS[0])[0], "bulk")  # type: ignore[index]  # a pair now
    assert await store.get_many(KEYS[:2]) == [big.frame, (await store.get_many(KEYS[1:2]))[0]]
    for lane in (None, "", store.lane(KEYS[0]), store.lane(KEYS[1]), "127.0.0.1:1"):
        await store.ping(lane)


async def test_calls_about_keys_of_many_nodes_are_split(nodes: Cluster, store: RedisStore) -> None:
    written = [write(store, key, b"%d" % number) for number, key in enumerate(KEYS)]
    assert await store.write_many(written) == ["done"] * len(KEYS)
    assert await store.get_many(KEYS) == [one.frame for one in written]
    assert {key async for page in store.scan(b"mcp_hub:") for key, _ in page} == set(KEYS)
    await store.used_many([*KEYS, b"none"])
    assert await store.delete_many(KEYS[:10]) == [one.frame[:64] for one in written[:10]]
    assert await store.clear(b"mcp_hub:") == len(KEYS) - 10
    assert [node.command("DBSIZE") for node in nodes.nodes] == [0, 0, 0]


async def test_status_says_what_there_is(nodes: Cluster) -> None:
    async with RedisCache(nodes.url, cluster=True, timeout=PATIENT) as cache:
        await cache.set("a", 1)
        status = await cache.status()
    assert status.facts["cluster_primaries"] == 3
    assert str(status.facts["l1_feed"]).startswith("off:")
    assert (status.redis_mode, status.total_keys) == ("cluster", 1)
    assert (status.connected_clients or 0) >= 3


# Slots that move


async def test_a_slot_that_has_moved(nodes: Cluster, store: RedisStore) -> None:
    """MOVED: the call goes to where the key is, and so do the calls after it."""
    key = KEYS[0]
    before = write(store, key)
    await store.write_many([before])
    source = nodes.primary_of(slot_of(key))
    target = next(node for node in nodes.primaries() if node is not source)
    nodes.move(slot_of(key), target)
    try:
        assert await store.get_many([key]) == [before.frame]
        await poll(lambda: store.lane(key) == f"127.0.0.1:{target.port}")
        after = write(store, key, b"2")
        assert await store.write_many([after]) == ["done"]
        assert target.command("GET", key) == after.frame
    finally:
        nodes.move(slot_of(key), source)


async def test_a_slot_that_is_moving(nodes: Cluster, store: RedisStore) -> None:
    """ASK: what has moved already is asked for there, what has not is asked for here; begun and written likewise."""
    slot = slot_of(KEYS[0])
    keys = [b"{mcp_hub:ns:e:0}%d" % number for number in range(4)]
    assert {slot_of(key) for key in keys} == {slot}
    written = [write(store, key) for key in keys]
    await store.write_many(written)
    source = nodes.primary_of(slot)
    target = next(node for node in nodes.primaries() if node is not source)
    finish = nodes.move(slot, target, finish=False)
    source.command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys[:2])
    try:
        assert await store.get_many(keys) == [one.frame for one in written]
        assert await store.head_many(keys) == [one.frame[:64] for one in written]
        new = b"{mcp_hub:ns:e:0}new"
        (begun,) = await store.begin_many([new], hold=30.0)
        assert begun.leader
        assert target.command("ASKING") == b"OK"
        assert await store.write_many([write(store, new)._replace(fence=begun.fence)]) == ["done"]
        assert await store.delete_many(keys[1:3]) == [one.frame[:64] for one in written[1:3]]
        assert store.lane(new) == f"127.0.0.1:{source.port}"
    finally:
        finish()
    assert await store.get_many([*keys, new]) == [
        written[0].frame, None, None, written[3].frame, (await store.get_many([new]))[0]
    ]  # fmt: skip
    assert await store.clear(b"") == 3
    nodes.move(slot, source)


async def test_slots_that_move_under_load(nodes: Cluster) -> None:
    """No wrong value and no error, whatever moves where; a plain move says nothing of lost changes."""
    replaced = 0

    def count() -> None:
        nonlocal replaced
        replaced += 1

    store = RedisStore(nodes.url, cluster=True, timeout=20.0)
    assert isinstance(store, Replaceable)
    store.on_replaced = count
    stop = asyncio.Event()
    rounds = 0

    async def work(key: bytes) -> None:
        nonlocal rounds
        number = 0
        while not stop.is_set():
            number += 1
            one = write(store, key, b"%b %d" % (key, number))
            assert await store.write_many([one]) == ["done"]
            assert await store.get_many([key]) == [one.frame]
            if number % 3 == 0:
                assert await store.delete_many([key]) == [one.frame[:64]]
                assert await store.get_many([key]) == [None]
            rounds += 1

    moved = KEYS[:8]
    workers = [asyncio.ensure_future(work(key)) for key in KEYS[:20]]
    await poll(lambda: rounds > 100)
    try:
        for key in moved:
            source = nodes.primary_of(slot_of(key))
            target = next(node for node in nodes.primaries() if node is not source)
            await asyncio.to_thread(nodes.move, slot_of(key), target)
            seen = rounds
            await poll(lambda seen=seen: rounds > seen + 50)  # type: ignore[misc]  # bound now
    finally:
        stop.set()
        await asyncio.gather(*workers)
        await store.aclose()
    assert replaced == 0


# The cache above


async def test_tags_clear_and_keys(nodes: Cluster) -> None:
    async with (
        RedisCache(nodes.url, cluster=True, timeout=PATIENT, namespace="a") as one,
        RedisCache(nodes.url, cluster=True, timeout=PATIENT, namespace="a") as two,
        RedisCache(nodes.url, cluster=True, timeout=PATIENT, namespace="b") as other,
    ):
        await asyncio.gather(*(one.set(f"k{n}", n, ttl="10m", tags=[f"t{n % 2}"]) for n in range(20)))
        await other.set("k", "theirs", ttl="10m")
        assert await two.get_many([f"k{n}" for n in range(20)]) == {f"k{n}": n for n in range(20)}
        await two.invalidate("t1")
        assert await one.get_many([f"k{n}" for n in range(20)]) == {f"k{n}": n for n in range(0, 20, 2)}
        listed = one.keys()
        assert {key async for key in listed} == {f"k{n}" for n in range(0, 20, 2)}
        await one.clear()
        assert await two.get("k0") is None
        assert await other.get("k") == "theirs"


async def test_one_load_for_a_fleet(nodes: Cluster) -> None:
    loads = 0
    caches = [RedisCache(nodes.url, cluster=True, timeout=PATIENT, coalesce="fleet") for _ in range(3)]
    gate = asyncio.Event()

    async def load() -> int:
        nonlocal loads
        loads += 1
        await gate.wait()
        return 42

    await caches[0].clear()
    asked = [asyncio.ensure_future(cache.get_or_load(f"k{n}", load, ttl="10m")) for cache in caches for n in range(6)]
    await poll(lambda: loads == 6)
    gate.set()
    assert await asyncio.gather(*asked) == [42] * 18
    assert loads == 6
    for cache in caches:
        await cache.aclose()


# Trouble


async def test_one_stopped_node_stalls_only_its_own_keys(nodes: Cluster) -> None:
    """Row: Redis stopped. The others' keys are answered while its own time out, and each write has its own outcome."""
    store = RedisStore(nodes.url, cluster=True, timeout=3.0)
    written = [write(store, key) for key in KEYS]
    await store.write_many(written)
    stopped = nodes.nodes[0]
    theirs = [key for key in KEYS if store.lane(key) == f"127.0.0.1:{stopped.port}"]
    others = [key for key in KEYS if key not in theirs]
    assert theirs and others
    stopped.pause()
    try:
        stuck = asyncio.ensure_future(store.get_many(theirs))
        mixed = asyncio.ensure_future(store.write_many(written))
        for key in others:
            assert await store.get_many([key]) == [written[KEYS.index(key)].frame]
        assert not stuck.done()
        with pytest.raises(errors.StoreTimeoutError):
            await stuck
        outcomes = dict(zip(KEYS, await mixed, strict=True))
        assert {outcomes[key] for key in others} == {"done"}
        assert all(isinstance(outcomes[key], errors.StoreTimeoutError) for key in theirs)
        with pytest.raises(errors.StoreError):
            await store.ping(store.lane(theirs[0]))
        await store.ping(store.lane(others[0]))
    finally:
        stopped.resume()

    async def serves() -> bool:
        try:
            return await store.get_many(theirs) == [written[KEYS.index(key)].frame for key in theirs]
        except errors.StoreError:
            return False

    await poll(serves)
    await store.aclose()


async def test_what_is_no_cluster(nodes: Cluster) -> None:
    with redis_server() as server:
        store = RedisStore(server.url, cluster=True, timeout=5.0)
        with pytest.raises(errors.StoreError, match="cluster"):
            await store.get_many([b"k"])
        await store.aclose()
    store = RedisStore(port=nodes.nodes[0].port, timeout=5.0)
    outcomes = await store.write_many([write(store, key) for key in KEYS])
    failed = [outcome for outcome in outcomes if isinstance(outcome, errors.StoreError)]
    assert failed
    assert all("REDIS_CLUSTER=true" in error.cure for error in failed)
    await store.aclose()


async def test_a_cluster_that_is_away() -> None:
    store = RedisStore("redis://127.0.0.1:1,127.0.0.1:2", cluster=True, timeout=5.0)
    for _ in range(2):
        with pytest.raises(errors.StoreUnreachableError):
            await store.get_many([b"k"])
    with pytest.raises(errors.StoreUnreachableError):
        await store.clear(b"mcp_hub:")
    await store.aclose()


async def test_tls_users_and_announced_names(tmp_path: Path) -> None:
    """Certificates are for the name that nodes announce; users and TLS are the same at every node."""
    pems = certificates(tmp_path, "localhost")
    named = ("--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", "hostname")
    with cluster(*named, "--tls-cluster", "yes", replicas=0, make=redis_server, tls=pems) as nodes:
        for node in nodes.nodes:
            node.command("ACL", "SETUSER", "agent", "on", ">pw", "~mcp_hub:*", "+@all")
        url = f"rediss://localhost:{nodes.nodes[0].tls_port}"
        store = RedisStore(url, cluster=True, username="agent", password="pw", ca_certs=pems.ca, timeout=5.0)
        assert await store.write_many([write(store, key) for key in KEYS]) == ["done"] * len(KEYS)
        assert None not in await store.get_many(KEYS)
        assert {store.lane(key) for key in KEYS} == {f"localhost:{node.tls_port}" for node in nodes.nodes}
        assert await store.clear(b"mcp_hub:") == len(KEYS)
        await store.aclose()


def test_the_class_is_chosen_by_the_target() -> None:
    plain, clustered = RedisStore(), RedisStore(cluster=True)
    assert type(plain) is RedisStore
    assert isinstance(clustered, RedisStore) and type(clustered) is not RedisStore
    assert isinstance(clustered, Store)
