"""The feed of ``RedisStore`` on real servers: what moves a stamp, what voids it, and what happens when it is lost."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import re
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mcp_hub_cache._frame import HEAD_SIZE
from mcp_hub_cache._protocols import Coherent, Fence, Held, Patch, Write
from mcp_hub_cache._steady import steady
from mcp_hub_cache.stores import _redis_feed
from mcp_hub_cache.stores._redis_feed import TRUST
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import FaultProxy, entry_frame
from tests.backends import poll, turns
from tests.forks import in_child
from tests.servers import Server, certificates, fake_server, redis_server, valkey_server

K, OTHER = b"mcp_hub:t:e:k", b"mcp_hub:t:e:other"
LATER = 2.0  # seconds that a busy machine may add to what the clock decides


@pytest.fixture(scope="module", params=["valkey", "redis"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with valkey_server() if request.param == "valkey" else redis_server() as server:
        yield server


@asynccontextmanager
async def opened(url: str, **options: object) -> AsyncIterator[RedisStore]:
    store = RedisStore(url, timeout=10.0, **options)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def store(server: Server) -> AsyncIterator[RedisStore]:
    server.command("FLUSHALL")
    async with opened(server.url) as store:
        await live(store)
        yield store


async def live(store: RedisStore, key: bytes = K) -> int:
    """The stamp, once there is one."""
    await store.ping()
    await poll(lambda: store.stamp(key) is not None)
    stamp = store.stamp(key)
    assert stamp is not None
    return stamp


async def gone(store: RedisStore, key: bytes = K) -> None:
    await poll(lambda: store.stamp(key) is None)


async def moved(store: RedisStore, stamp: int, key: bytes = K) -> None:
    """Return when *key* has a stamp that is another one."""
    await poll(lambda: store.stamp(key) not in {None, stamp})


def write(store: RedisStore, key: bytes = K, fence: Fence | None = None, keep: float = 60.0) -> Write:
    return Write(key, entry_frame(store, key, ttl=keep), keep, fence)


# What moves a stamp


def test_it_is_coherent() -> None:
    assert isinstance(RedisStore("redis://localhost"), Coherent)


async def test_nothing_is_told_before_it_is_asked_for(server: Server) -> None:
    async with opened(server.url) as store:
        assert store.stamp(K) is None
        await store.write_many([write(store)])
        assert server.command("CLIENT", "LIST", "TYPE", "pubsub") == b""
        assert "l1_feed" not in await store.info()
        assert store.stamp(K) is None  # never waits: this asks
        await live(store)
        assert (await store.info())["l1_feed"] == "on"


async def test_a_foreign_change_moves_it_and_no_other(server: Server, store: RedisStore) -> None:
    for command in (
        ("SET", K, "1"),
        ("APPEND", K, "2"),
        ("PEXPIRE", K, "60000"),
        ("RENAME", K, OTHER),
        ("RENAME", OTHER, K),
        ("MSET", "mcp_hub:x", "1", K, "2"),
        ("EVAL", "redis.call('SET', KEYS[1], 'x')", "1", K),
        ("DEL", K),
    ):
        stamp, bystander = await live(store), store.stamp(b"mcp_hub:t:e:bystander")
        server.command(*command)
        await moved(store, stamp)
        assert store.stamp(b"mcp_hub:t:e:bystander") == bystander


async def test_another_store_moves_it(server: Server, store: RedisStore) -> None:
    async with opened(server.url) as other:
        stamp = await live(store)
        await other.write_many([write(other)])
        await moved(store, stamp)


async def test_expiry_and_eviction_move_it(server: Server, store: RedisStore) -> None:
    await store.write_many([write(store, keep=0.05)])
    stamp = await live(store)
    await moved(store, stamp)
    assert server.command("EXISTS", K) == 0
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        await store.write_many([write(store)])
        stamp = await live(store)
        server.command("CONFIG", "SET", "maxmemory", "1")
        await poll(lambda: server.command("EXISTS", K) == 0)
        await moved(store, stamp)
    finally:
        server.command("CONFIG", "SET", "maxmemory", "0")


@pytest.mark.parametrize("flush", [("FLUSHALL",), ("FLUSHDB", "ASYNC")])
async def test_a_flush_voids_everything(server: Server, store: RedisStore, flush: tuple[str, ...]) -> None:
    stamps = {key: await live(store, key) for key in (K, OTHER, b"mcp_hub:never written")}
    slot = store.slot(K)
    server.command("SET", "mcp_hub:something", "1")
    server.command(*flush)
    for key, stamp in stamps.items():
        await moved(store, stamp, key)
    assert slot is not None and slot.stamp() is None


async def test_only_keys_under_the_prefix_have_stamps(server: Server) -> None:
    async with opened(server.url, prefix="ours:") as ours, opened(server.url, prefix=b"theirs:") as theirs:
        mine, other = await live(ours, b"ours:k"), await live(theirs, b"theirs:k")
        assert ours.slot(b"theirs:k") is theirs.slot(b"ours:k") is None
        # The same counters, of which each table moves for its own prefix alone.
        server.command("SET", "theirs:k", "1")
        await moved(theirs, other, b"theirs:k")
        server.command("SET", "ours:k", "1")
        await moved(ours, mine, b"ours:k")


Change = Callable[[RedisStore], Awaitable[object]]
FENCE_TOKEN = b"12345678"


def _own(store: RedisStore) -> Fence:
    return Fence(store.id, FENCE_TOKEN)


OWN: dict[str, Change] = {
    "write": lambda store: store.write_many([write(store)]),
    "fenced write": lambda store: store.write_many([write(store, fence=_own(store))]),
    "patch": lambda store: store.patch_many([Patch(K, _own(store), entry_frame(store, K)[:HEAD_SIZE], 60.0)]),
    "delete": lambda store: store.delete_many([K]),
    "begin": lambda store: store.begin_many([OTHER, K], hold=5.0),
    "renew": lambda store: store.renew_many([Held(K, _own(store))], hold=5.0),
    "release": lambda store: store.release_many([Held(K, _own(store))]),
}


@pytest.mark.parametrize("change", OWN.values(), ids=OWN.keys())
async def test_own_changes_move_it_at_send_and_at_reply(server: Server, change: Change) -> None:
    """The server's own word is held back, so that it can't be what moves it."""
    async with FaultProxy(server.url) as between, opened(between.url) as store:
        before = await live(store)
        between.hold(b"SUBSCRIBE")
        future = asyncio.ensure_future(change(store))
        sent = store.stamp(K)
        assert sent not in {None, before}
        await future
        assert store.stamp(K) not in {None, before, sent}


async def test_an_own_clear_moves_what_it_removes(server: Server) -> None:
    async with FaultProxy(server.url) as between, opened(between.url) as store:
        await store.write_many([write(store), write(store, OTHER)])
        before = [await live(store), await live(store, OTHER)]
        between.hold(b"SUBSCRIBE")
        assert await store.clear(b"mcp_hub:t:") == 2
        after = [store.stamp(K), store.stamp(OTHER)]
        assert None not in after
        assert set(before).isdisjoint(after)


async def test_an_own_write_that_failed_moves_it_too(server: Server, store: RedisStore) -> None:
    before = await live(store)
    future = store.write_many([write(store)])
    sent = store.stamp(K)
    server.kill_clients()
    await asyncio.gather(future, return_exceptions=True)
    assert store.stamp(K) not in {before, sent}


async def test_an_own_write_whose_caller_left_is_heard_of(server: Server) -> None:
    async with FaultProxy(server.url) as between, opened(between.url) as store:
        await store.write_many([write(store, OTHER)])  # what waits for the connection is not sent at all
        await live(store)
        between.hold(b"SUBSCRIBE")
        future = store.write_many([write(store)])
        sent = store.stamp(K)
        future.cancel()
        await turns(2)
        cancelled = store.stamp(K)
        assert cancelled not in {None, sent}
        await poll(lambda: server.command("EXISTS", K) == 1)
        between.heal()
        await moved(store, cancelled or 0)


async def test_distrust_voids_what_was_given_and_goes_on(server: Server, store: RedisStore) -> None:
    before, slot = await live(store), store.slot(K)
    store.distrust()
    after = store.stamp(K)
    assert after not in {None, before}
    assert slot is not None and slot.stamp() is None
    server.command("SET", K, "1")
    await moved(store, after or 0)
    slot = store.slot(K)
    assert slot is not None
    until = slot.changes.until
    await poll(lambda: slot.changes.until > until)


# Waiting for a change


async def test_changed_returns_with_the_change(server: Server, store: RedisStore) -> None:
    await store.changed(K, 12345)  # already another one
    await store.changed(b"of another prefix", 12345)
    for change in (lambda: server.command("SET", K, "1"), lambda: server.command("FLUSHALL"), store.distrust):
        waiters = [asyncio.ensure_future(store.changed(K, await live(store))) for _ in range(3)]
        await turns()
        assert not any(waiter.done() for waiter in waiters)
        change()
        await asyncio.wait_for(asyncio.gather(*waiters), 10)


@pytest.mark.parametrize("loss", ["kill", "close"])
async def test_changed_returns_with_the_loss_of_the_feed(server: Server, store: RedisStore, loss: str) -> None:
    waiter = asyncio.ensure_future(store.changed(K, await live(store)))
    await turns()
    if loss == "kill":
        server.command("CLIENT", "KILL", "TYPE", "pubsub")
    else:
        await store.aclose()
    await asyncio.wait_for(waiter, 10)


async def test_a_waiter_that_leaves_leaves_nothing(store: RedisStore) -> None:
    waiters = [asyncio.ensure_future(store.changed(K, await live(store))) for _ in range(2)]
    await turns()
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    connections = store._wires.peek()
    assert connections is not None and connections.feed is not None
    assert connections.feed._waiters == {}


# Loss


async def test_a_lost_connection_voids_at_once_and_comes_back(
    server: Server, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        before, slot = await live(store), store.slot(K)
        assert slot is not None
        server.command("CLIENT", "KILL", "TYPE", "pubsub")
        server.command("SET", K, "while nobody listened")
        await gone(store)
        assert slot.changes.until == -math.inf  # not merely late
        assert await live(store) != before
        assert slot.stamp() is None
        assert (await store.info())["l1_feed"] == "on"
    said = [record.message for record in caplog.records]
    assert len(said) == 6
    assert "is off: Redis connection failed" in said[0]
    assert said[1] == "The near cache in front of Redis is on again"
    assert {record.levelname for record in caplog.records} == {"INFO"}


async def test_a_server_that_is_restarted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with valkey_server() as server:
        async with opened(server.url) as store:
            before = await live(store)
            server.kill()
            await gone(store)
            until = time.monotonic() + 0.5
            while time.monotonic() < until:  # as a busy cache asks
                assert store.stamp(K) is None
                await asyncio.sleep(0.001)
            server.start()
            assert await live(store) != before
    assert len(caplog.records) == 2


async def test_a_cable_that_was_pulled(server: Server) -> None:
    """Nothing says that the connection is dead; the clock does."""
    async with FaultProxy(server.url) as between, opened(between.url) as store:
        before, slot = await live(store), store.slot(K)
        assert slot is not None
        begun = steady()
        between.hold(between.of(b""))
        server.command("SET", K, "unheard")
        assert store.stamp(K) == before
        await poll(lambda: slot.stamp() is None)
        assert steady() - begun < TRUST + LATER
        between.heal()
        assert await live(store) != before


async def test_trust_counts_from_when_the_ping_was_sent(server: Server) -> None:
    """For the answer may say how things were when it left."""
    async with FaultProxy(server.url) as between, opened(between.url) as store:
        await live(store)
        slot = store.slot(K)
        assert slot is not None
        held = between.hold(b"SUBSCRIBE")
        await asyncio.wait_for(held.hit.wait(), 10)
        until, sent = slot.changes.until, steady()
        await poll(lambda: steady() > sent + 0.5)
        between.heal()
        await poll(lambda: slot.changes.until > until)
        assert slot.changes.until <= sent + TRUST


async def test_a_stopped_server(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with valkey_server() as server:
        async with opened(server.url) as store:
            before, slot = await live(store), store.slot(K)
            assert slot is not None
            begun = steady()
            server.pause()
            try:
                await poll(lambda: slot.stamp() is None)
                assert steady() - begun < TRUST + LATER
                await poll(lambda: store.slot(K) is None)
                assert "late to tell" in caplog.text
            finally:
                server.resume()
            assert await live(store) != before


async def test_a_blocked_process_trusts_nothing_until_it_has_heard(server: Server, store: RedisStore) -> None:
    before, slot = await live(store), store.slot(K)
    assert slot is not None
    other = await live(store, OTHER)
    server.command("SET", OTHER, "1")
    time.sleep(TRUST + 0.1)
    assert slot.stamp() is None
    # No news was lost: what was not changed is as good as before.
    await poll(lambda: slot.stamp() == before)
    assert store.stamp(OTHER) not in {None, other}


async def test_garbage_ends_it(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with FaultProxy(server.url) as between, opened(between.url) as store:
        await live(store)
        between.edit(lambda data: data.replace(b"*3\r\n$7\r\nmessage", b"HTTP/1.1 400 Bad Request"))
        server.command("SET", K, "1")
        await gone(store)
        assert "not what a Redis server says" in str((await store.info())["l1_feed"])
        assert store.slot(K) is None


# Servers that refuse


@pytest.mark.parametrize(
    "denied", [("-client|tracking",), ("-client|id",), ("-subscribe",), ("-ping",), ("resetchannels",), ("-client",)]
)
async def test_without_permission_there_is_no_feed_and_nothing_else_is_hurt(
    server: Server, denied: tuple[str, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_redis_feed, "_SELDOM", 0.2)
    caplog.set_level(logging.INFO)
    server.command("ACL", "SETUSER", "guest", "reset", "on", ">pw", "~*", "&*", "+@all", *denied)
    async with opened(server.url, username="guest", password="pw") as store:
        entry = write(store)
        assert await store.write_many([entry]) == ["done"]
        store.stamp(K)
        feed = store._wires.get().feed
        assert feed is not None
        await poll(lambda: feed.state() not in {None, "on", "off: connecting"})
        assert store.stamp(K) is None
        assert await store.get_many([K]) == [entry.frame]
        said = str((await store.info())["l1_feed"])
        assert said.startswith("off: ")
        assert "ACL SETUSER" in said and "+client|tracking" in said and "&__redis__:invalidate" in said
        assert "pw" not in said
        assert len(caplog.records) == 1
        assert caplog.records[0].levelname == "INFO"
        server.command("ACL", "SETUSER", "guest", "&*", "+@all")
        await live(store)
        assert [record.message for record in caplog.records][1:] == ["The near cache in front of Redis is on again"]
    server.command("ACL", "DELUSER", "guest")


async def test_a_refusing_server_is_left_alone(server: Server) -> None:
    server.command("ACL", "SETUSER", "guest", "reset", "on", ">pw", "~*", "&*", "+@all", "-client|tracking")
    async with FaultProxy(server.url) as between, opened(between.url, username="guest", password="pw") as store:
        await store.get_many([K])
        store.stamp(K)
        feed = store._wires.get().feed
        assert feed is not None
        await poll(lambda: str(feed.state()).startswith("off: Redis"))
        tries = between.accepted
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            assert store.stamp(K) is None
            await asyncio.sleep(0.001)
        assert between.accepted == tries == 2  # a wire, and one try
    server.command("ACL", "DELUSER", "guest")


async def test_a_server_that_does_not_know_of_tracking() -> None:
    with fake_server() as url:
        async with opened(url) as store:
            assert await store.write_many([write(store)]) == ["done"]
            store.stamp(K)
            feed = store._wires.get().feed
            assert feed is not None
            await poll(lambda: str(feed.state()).startswith("off: Redis"))
            assert store.stamp(K) is None


async def test_a_server_that_agrees_and_tells_nothing(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_redis_feed, "_BEAT", 0.02)
    caplog.set_level(logging.INFO)
    message = re.compile(rb"\*3\r\n\$7\r\nmessage\r\n.*?(?=\*2\r\n\$4\r\npong|\Z)", re.DOTALL)
    async with FaultProxy(server.url) as between, opened(between.url) as store:
        between.edit(lambda data: message.sub(b"", data))
        await live(store)
        (connection,) = between.of(b"SUBSCRIBE")
        await poll(lambda: connection.said.count(b"PING") > 5)  # reading alone proves nothing
        assert store.stamp(K) is not None
        await store.write_many([write(store)])
        await gone(store)
        said = str((await store.info())["l1_feed"])
        assert "tells nothing" in said and "proxy" in said
        assert store.slot(K) is None
        assert len(caplog.records) == 1


async def test_with_one_connection_there_is_no_feed(server: Server) -> None:
    async with opened(server.url, max_connections=1) as store:
        await store.write_many([write(store)])
        for _ in range(20):
            assert store.stamp(K) is None
            store.distrust()
            await store.changed(K, 1)
            await store.ping()
        assert (await store.info())["l1_feed"] == "off: max_connections is 1"


async def test_with_two_there_is_one(server: Server) -> None:
    async with opened(server.url, max_connections=2) as store:
        stamp = await live(store)
        await store.write_many([write(store)])
        await moved(store, stamp)


# Ways to a server


async def test_over_tls_with_a_password_and_a_socket(tmp_path: Path) -> None:
    pems = certificates(tmp_path, "localhost")
    with redis_server(tls=pems, password="pw") as server:
        url = f"rediss://localhost:{server.tls_port}/3"
        for options in ({"url": url, "ca_certs": pems.ca}, {"url": None, "unix_socket_path": server.socket_path}):
            async with opened(password="pw", **options) as store:  # type: ignore[arg-type]
                stamp = await live(store)
                server.command("SET", K, "1")
                await moved(store, stamp)


# Rest


async def test_where_nobody_asks_the_pings_rest(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_redis_feed, "_BEAT", 0.01)
    monkeypatch.setattr(_redis_feed, "_REST", 5)
    monkeypatch.setattr(_redis_feed, "TRUST", 0.3)
    async with FaultProxy(server.url) as between, opened(between.url) as store:
        before, slot = await live(store), store.slot(K)
        assert slot is not None
        await poll(lambda: slot.stamp() is None)
        (connection,) = between.of(b"SUBSCRIBE")
        said = connection.said
        await asyncio.sleep(0.1)
        assert connection.said == said
        assert (await store.info())["l1_feed"] == "on"
        # It went on listening.
        server.command("SET", OTHER, "1")
        other = slot.changes.words[hash(OTHER) % len(slot.changes.words)]
        await poll(lambda: slot.changes.words[hash(OTHER) % len(slot.changes.words)] != other or other != 0)
        assert store.stamp(K) is None  # which wakes it
        await poll(lambda: slot.stamp() == before)
        # And while somebody waits for a change there is no rest.
        waiter = asyncio.ensure_future(store.changed(K, await live(store)))
        await turns()
        said = connection.said
        await poll(lambda: len(connection.said) > len(said) + 20 * len("*1\r\n$4\r\nPING\r\n"))
        server.command("SET", K, "1")
        await asyncio.wait_for(waiter, 10)


# Loops and processes


def test_two_loops_one_after_another(server: Server) -> None:
    store = RedisStore(server.url, timeout=10.0)

    async def use() -> int:
        stamp = await live(store)
        server.command("SET", K, "1")
        await moved(store, stamp)
        slot = store.slot(K)
        assert slot is not None
        await store.aclose()
        assert store.stamp(K) is None
        assert slot.stamp() is None
        assert len(asyncio.all_tasks()) == 1
        return stamp

    first = asyncio.run(use(), debug=True)
    assert store.stamp(K) is None
    assert asyncio.run(use(), debug=True) != first
    assert server.command("CLIENT", "LIST", "TYPE", "pubsub") == b""


def test_a_loop_that_was_closed_the_hard_way(server: Server) -> None:
    store = RedisStore(server.url, timeout=10.0)

    async def begin() -> tuple[int, float]:
        stamp, slot = await live(store), store.slot(K)
        assert slot is not None
        return stamp, slot.changes.until

    loop = asyncio.new_event_loop()
    first, until = loop.run_until_complete(begin())
    loop.close()
    assert until <= steady() + TRUST  # and nothing moves it on any more
    assert store.stamp(K) is None

    async def go_on() -> None:
        assert await live(store) != first
        await store.aclose()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the transports of the first loop: they were never closed
        asyncio.run(go_on())
        gc.collect()


def test_a_loop_that_paused(server: Server) -> None:
    """What changed while the loop stood still is known before anything is trusted again."""
    store = RedisStore(server.url, timeout=10.0)

    async def begin() -> int:
        return await live(store)

    async def go_on(before: int) -> None:
        await moved(store, before)
        await store.aclose()

    with asyncio.Runner() as runner:
        stamp = runner.run(begin())
        server.command("SET", K, "1")
        runner.run(go_on(stamp))


@pytest.mark.parametrize("when", ["connecting", "live", "waiting to come back"])
async def test_aclose_leaves_nothing(server: Server, when: str) -> None:
    async with opened(server.url) as store:
        await store.ping()
        store.stamp(K)
        if when != "connecting":
            await live(store)
            waiter = asyncio.ensure_future(store.changed(K, await live(store)))
            await turns()
            if when != "live":
                server.command("CLIENT", "KILL", "TYPE", "pubsub")
                await gone(store)
        await store.aclose()
        if when != "connecting":
            await waiter
        assert len(asyncio.all_tasks()) == 1
        await poll(lambda: server.command("CLIENT", "LIST", "TYPE", "pubsub") == b"")
        await live(store)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_forked_child_trusts_nothing(server: Server, store: RedisStore) -> None:
    stamp, slot = await live(store), store.slot(K)
    assert slot is not None

    def child() -> None:
        assert slot.stamp() is None
        assert store.slot(K) is None
        assert store.stamp(K) is None

    in_child(child)
    assert slot.stamp() == stamp
    server.command("SET", K, "1")
    await moved(store, stamp)
