"""RedisStore on real servers: the conformance suite, and every way in which a server says no or nothing."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mcp_hub_cache import RedisCache, open_cache
from mcp_hub_cache import _exceptions as errors
from mcp_hub_cache._frame import HEAD_SIZE, Kind, pack
from mcp_hub_cache._protocols import Coherent, Fence, Leases, Outcome, Store, Used, Write
from mcp_hub_cache.stores._redis_commands import px, set_all
from mcp_hub_cache.stores._redis_inlet import Inlet
from mcp_hub_cache.stores._redis_link import pack as redis_pack
from mcp_hub_cache.stores.redis import BIG, RedisStore
from mcp_hub_cache.testing import StoreConformance, entry_frame
from tests.backends import poll
from tests.servers import Server, certificates, fake_server, free_port, redis_server, valkey_server

SECRET = "hunter2:@/?#%"


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture
async def store(valkey: Server) -> AsyncIterator[RedisStore]:
    valkey.command("FLUSHALL")
    store = RedisStore(valkey.url, timeout=5.0)
    yield store
    await store.aclose()


def write(store: Store, key: bytes, payload: bytes = b"1", *, keep: float = 60.0, fence: Fence | None = None) -> Write:
    return Write(key, entry_frame(store, key, payload, ttl=keep), keep, fence)


async def refusal(store: RedisStore) -> errors.StoreError:
    """The error that a read gets."""
    with pytest.raises(errors.StoreError) as caught:
        await store.get_many([b"k"])
    await store.aclose()
    assert SECRET not in f"{caught.value!r} {caught.value} {store!r}"
    assert caught.value.cure in str(caught.value)
    return caught.value


# The contract, on every server that there is


class _OnServer(StoreConformance):
    url: str

    @asynccontextmanager
    async def open_pair(self) -> AsyncIterator[tuple[Store, Store]]:
        one, two = RedisStore(self.url, timeout=5.0), RedisStore(self.url, timeout=5.0, max_connections=1)
        yield one, two
        await one.aclose()
        await two.aclose()

    async def wait_coherent(self, store: Coherent, key: bytes) -> bool:
        await poll(lambda: store.stamp(key) is not None)
        return True


class TestOnValkey(_OnServer):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        with valkey_server(tcp=False) as server:
            cls.url = f"valkey+{server.url}"
            yield


class TestOnRedis(_OnServer):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        with redis_server() as server:
            cls.url = server.url
            yield


class TestOnFakeRedis(_OnServer):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        with fake_server() as url:
            cls.url = url
            yield

    async def wait_coherent(self, store: Coherent, key: bytes) -> bool:
        pytest.skip("fakeredis has no CLIENT TRACKING")

    async def test_big(self) -> None:
        pytest.skip("fakeredis fails at replies that do not fit in the socket's buffer")

    async def test_used(self) -> None:
        pytest.skip("fakeredis has no TOUCH")


async def test_the_protocols(store: RedisStore) -> None:
    assert isinstance(store, Store)
    assert isinstance(store, Leases)
    assert isinstance(store, Coherent)


async def test_the_server_hears_of_uses(valkey: Server, store: RedisStore) -> None:
    assert isinstance(store, Used)
    keys = [b"k%d" % n for n in range(300)]
    await store.write_many([write(store, key) for key in keys])
    for key in (keys[0], keys[-1]):
        valkey.command("RESTORE", key, 0, valkey.command("DUMP", key), "REPLACE", "IDLETIME", 1000)
        assert valkey.command("OBJECT", "IDLETIME", key) >= 1000
    await store.used_many([b"none", *keys])
    assert max(valkey.command("OBJECT", "IDLETIME", key) for key in (keys[0], keys[-1])) < 100
    assert await store.get_many([b"none"]) == [None]


async def test_a_server_that_refuses_to_hear_of_uses(valkey: Server, store: RedisStore) -> None:
    await store.write_many([write(store, b"k")])
    valkey.command("ACL", "SETUSER", "default", "-touch")
    try:
        with pytest.raises(errors.StorePermissionError):
            await store.used_many([b"k"])
    finally:
        valkey.command("ACL", "SETUSER", "default", "+touch")
    await store.used_many([b"k"])


def test_what_is_packed_by_hand_is_what_the_driver_would_pack() -> None:
    frames = [Write(b"k", b"\0\r\n", 60.0, None), Write(b"", b"", 60.0, None), Write(b"l", b"x" * 99, None, None)]
    frames += [Write(b"m", b"x", 0.0001, None), Write(b"n", b"x", 1e300, None), Write(b"o", b"x", None, None)]
    packed = [
        redis_pack((b"SET", key, frame, *((b"PX", px(keep)) if keep is not None else ())))
        for key, frame, keep, *_ in frames
    ]
    assert set_all(frames) == b"".join(packed)


# Keys of other programs


async def test_a_key_of_another_type(valkey: Server, store: RedisStore) -> None:
    valkey.command("RPUSH", "p:list", "x")
    assert await store.get_many([b"p:list"]) == [None]
    assert await store.head_many([b"p:list"]) == [None]
    assert [page async for page in store.scan(b"p:")] == []
    (begun,) = await store.begin_many([b"p:list"], hold=5)
    assert (begun.frame, begun.leader) == (b"", False)
    loaded = write(store, b"p:list", fence=begun.fence)
    assert await store.write_many([loaded]) == ["done"]
    assert await store.get_many([b"p:list"]) == [loaded.frame]


async def test_a_key_of_another_type_is_deleted_and_cleared(valkey: Server, store: RedisStore) -> None:
    valkey.command("RPUSH", "p:list", "x")
    valkey.command("HSET", "p:hash", "a", "b")
    assert await store.delete_many([b"p:list"]) == [None]
    assert await store.clear(b"p:") == 0
    assert valkey.command("EXISTS", "p:list", "p:hash") == 0


async def test_a_delete_fences_also_where_there_was_no_token(valkey: Server, store: RedisStore) -> None:
    valkey.command("RPUSH", "p:list", "x")
    valkey.command("SET", "p:short", "x")
    begun = await store.begin_many([b"p:list", b"p:short"], hold=5)
    await store.delete_many([b"p:list", b"p:short"])
    late = [write(store, key, fence=one.fence) for key, one in zip((b"p:list", b"p:short"), begun, strict=True)]
    assert await store.write_many(late) == ["refused", "refused"]


async def test_clear_of_many_beside_a_foreign_key(valkey: Server, store: RedisStore) -> None:
    valkey.command("SET", "theirs", "stays")
    valkey.command("SET", "mcp_hub:1", "a foreign string, no entry")
    names = [b"mcp_hub:ns:e:%d" % n for n in range(20_000)]
    for start in range(0, len(names), 1000):
        await store.write_many([write(store, name) for name in names[start : start + 1000]])
    await store.begin_many([b"mcp_hub:ns:e:loading"], hold=60)
    assert await store.clear(b"mcp_hub:") == len(names)
    assert valkey.command("KEYS", "*") == [b"theirs"]


async def test_globs_in_a_prefix_stand_for_themselves(store: RedisStore) -> None:
    prefixes = [b"a*:", b"a?:", b"a[b]:", b"a\\:", b"a^-:", b"ab:", b"a\\*:"]
    await store.write_many([write(store, prefix + b"1") for prefix in prefixes])
    for prefix in prefixes:
        assert [key async for page in store.scan(prefix) for key, _ in page] == [prefix + b"1"]
    assert await store.clear(b"a*:") == 1
    assert len([key async for page in store.scan(b"") for key, _ in page]) == len(prefixes) - 1


# Times


async def test_keeps_are_milliseconds_rounded_up(valkey: Server, store: RedisStore) -> None:
    await store.write_many([Write(b"a", b"f", 0.0001, None), Write(b"b", b"f", 1.2345, None)])
    await store.write_many([Write(b"c", b"f", None, None), Write(b"d", b"f", 1e300, None)])
    assert 1230 < valkey.command("PTTL", "b") <= 1235
    assert valkey.command("PTTL", "c") == -1
    assert valkey.command("PTTL", "d") > 10**14


async def test_now_is_the_servers(valkey: Server, store: RedisStore) -> None:
    before = store.now()
    assert before == pytest.approx(time.time(), abs=1)
    await store.ping()
    seconds, micros = valkey.command("TIME")
    assert store.now() == pytest.approx(int(seconds) + int(micros) / 1e6, abs=0.05)


async def test_info(store: RedisStore) -> None:
    facts = await store.info()
    assert facts["redis_mode"] == "standalone"
    assert facts["server_name"] == "valkey"
    assert isinstance(facts["connected_clients"], int)
    assert {"redis_version", "memory_used_human", "maxmemory_policy"} <= set(facts)


# Lanes and connections


async def test_big_values_get_a_lane_of_their_own(store: RedisStore) -> None:
    big, small = Write(b"big", secrets.token_bytes(BIG + 1), 60.0, None), write(store, b"small")
    await store.write_many([big, small])
    assert (store.lane(b"big"), store.lane(b"small")) == ("bulk", None)
    assert await store.get_many([b"big", b"small"]) == [big.frame, small.frame]
    await store.write_many([small._replace(key=b"big")])
    assert store.lane(b"big") is None
    other = RedisStore(store_url(store))
    await store.write_many([big])
    assert other.lane(b"big") is None
    await other.get_many([b"small", b"big"])
    assert other.lane(b"big") == "bulk"
    await other.aclose()


async def test_big_values_are_received_where_they_stay(store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    value = Inlet.value
    monkeypatch.setattr(Inlet, "value", lambda inlet: received.append(1) or value(inlet))  # type: ignore[func-returns-value]  # to count
    keys = [b"big%d" % number for number in range(3)]
    written = [Write(key, secrets.token_bytes(3_000_000), 60.0, None) for key in keys]
    await store.write_many(written)
    for _ in range(3):
        assert await store.get_many([keys[0], b"gone"]) == [written[0].frame, None]
        assert await store.get_many(keys) == [write.frame for write in written]
    assert len(received) >= 9  # not where a connection's first words came with it


def store_url(store: RedisStore) -> str:
    return f"redis://{store._address.where}/{store._address.db}"


@pytest.mark.parametrize(("limit", "used"), [(1, 1), (2, 2), (3, 3), (5, 5), (50, 5)])
async def test_max_connections(limit: int, used: int) -> None:
    with valkey_server() as server:
        store = RedisStore(server.url, max_connections=limit, timeout=5.0)
        before = server.command("INFO", "clients").count(b"connected_clients:1\r\n")
        await store.write_many([Write(b"big", b"x" * (BIG + 1), None, None), write(store, b"k")])
        await asyncio.gather(store.get_many([b"k"]), store.get_many([b"big"]), store.info(), store.delete_many([b"k"]))
        assert before == 1
        if limit > 1:
            await poll(lambda: store.stamp(b"mcp_hub:k") is not None)
        assert f"connected_clients:{used + 1}\r\n".encode() in server.command("INFO", "clients")
        await store.aclose()


async def test_the_database_number() -> None:
    with valkey_server() as server:
        store = RedisStore(f"redis://127.0.0.1:{server.port}/3")
        await store.write_many([write(store, b"k")])
        assert b"db3:keys=1" in server.command("INFO", "keyspace")
        await store.aclose()
        outside = await refusal(RedisStore(f"redis://127.0.0.1:{server.port}/99"))
        assert outside.kind == "misconfigured"
        assert "REDIS_DB" in outside.cure


# Loops


def test_a_second_asyncio_run_works(valkey: Server) -> None:
    store = RedisStore(valkey.url, timeout=5.0)

    async def use() -> list[Outcome]:
        try:
            return await store.write_many([write(store, b"k")])
        finally:
            await store.aclose()

    assert asyncio.run(use()) == ["done"]
    assert asyncio.run(use()) == ["done"]
    assert b"name=" in valkey.command("CLIENT", "LIST", "TYPE", "normal")
    assert valkey.command("CLIENT", "LIST", "TYPE", "normal").count(b"\n") == 1


async def test_aclose_fails_what_is_pending_and_reopens(valkey: Server, store: RedisStore) -> None:
    await store.ping()
    pending = [store.get_many([b"k"]), store.write_many([write(store, b"k")])]
    await store.aclose()
    for future in pending:
        with pytest.raises(errors.StoreUnreachableError, match="closed"):
            await future
    assert len(asyncio.all_tasks()) == 1
    await store.ping()


async def test_aclose_while_connecting(valkey: Server) -> None:
    store = RedisStore(valkey.url)
    pending = store.get_many([b"k"])
    await asyncio.sleep(0)
    await store.aclose()
    with pytest.raises(errors.StoreUnreachableError):
        await pending
    assert len(asyncio.all_tasks()) == 1


# Saying no


async def test_no_password_and_a_wrong_one() -> None:
    with valkey_server(password=SECRET) as server:
        none = await refusal(RedisStore(server.url))
        wrong = await refusal(RedisStore(server.url, password="not" + SECRET))
        assert (none.kind, wrong.kind) == ("auth", "auth")
        assert "REDIS_PASSWORD" in none.cure
        assert "NOAUTH" in str(none)
        assert not none.outage
        assert (await refusal(RedisStore(f"unix://{server.socket_path}"))).kind == "auth"
        right = RedisStore(server.url, password=SECRET)
        await right.ping()
        await right.aclose()
        quoted = RedisStore(f"redis://:hunter2%3A%40%2F%3F%23%25@127.0.0.1:{server.port}/0")
        await quoted.ping()
        await quoted.aclose()


async def test_a_password_that_nobody_asked_for(valkey: Server) -> None:
    error = await refusal(RedisStore(valkey.url, password=SECRET))
    assert error.kind == "auth"
    assert "Unset REDIS_PASSWORD" in error.cure


async def test_an_acl_that_allows_little() -> None:
    with valkey_server() as server:
        server.command("ACL", "SETUSER", "guest", "on", f">{SECRET}", "~mcp_hub:*", "+mget", "+set", "-info", "-time")
        store = RedisStore(server.url, username="guest", password=SECRET)
        assert await store.get_many([b"mcp_hub:k"]) == [None]
        assert await store.write_many([write(store, b"mcp_hub:k")]) == ["done"]
        assert store.now() == pytest.approx(time.time(), abs=1)  # TIME is denied
        assert await store.info() == {}
        with pytest.raises(errors.StorePermissionError, match="ACL SETUSER"):
            await store.get_many([b"theirs"])
        (outcome,) = await store.write_many([write(store, b"theirs")])
        assert isinstance(outcome, errors.StorePermissionError)
        with pytest.raises(errors.StorePermissionError):
            await store.begin_many([b"mcp_hub:k"], hold=5)
        server.command("ACL", "SETUSER", "guest", "+eval", "-getrange", "+unlink")
        with pytest.raises(errors.StorePermissionError):
            await store.delete_many([b"mcp_hub:k"])
        await store.aclose()


async def test_a_full_server() -> None:
    with valkey_server("--maxmemory", "2mb", "--maxmemory-policy", "noeviction") as server:
        full = RedisStore(server.url, timeout=5.0)
        (begun,) = await full.begin_many([b"k"], hold=60)
        outcomes: list[Outcome] = []
        for n in range(40):
            outcomes += await full.write_many([Write(b"fill%d" % n, b"x" * 100_000, None, None)])
        assert isinstance(outcomes[-1], errors.StoreFullError)
        assert "maxmemory-policy allkeys-lru" in outcomes[-1].cure
        server.command("CONFIG", "SET", "maxmemory", "1mb")
        (fenced,) = await full.write_many([write(full, b"k", fence=begun.fence)])
        assert isinstance(fenced, errors.StoreFullError)
        with pytest.raises(errors.StoreFullError):
            await full.begin_many([b"other"], hold=60)
        assert await full.get_many([b"fill0"]) == [b"x" * 100_000]
        assert await full.delete_many([b"fill0"]) == [b"x" * HEAD_SIZE]
        assert await full.clear(b"") == 0
        server.command("CONFIG", "SET", "maxmemory", "2mb")
        assert await full.write_many([write(full, b"k")]) == ["done"]
        await full.aclose()


async def test_a_replica() -> None:
    with valkey_server() as server:
        store = RedisStore(server.url)
        await store.write_many([write(store, b"k")])
        (begun,) = await store.begin_many([b"k"], hold=5)
        server.command("REPLICAOF", "127.0.0.1", str(free_port()))
        plain, fenced = await store.write_many([write(store, b"k"), write(store, b"k", fence=begun.fence)])
        assert isinstance(plain, errors.StoreReadOnlyError)
        assert isinstance(fenced, errors.StoreReadOnlyError)
        with pytest.raises(errors.StoreReadOnlyError):
            await store.delete_many([b"k"])
        assert (await store.get_many([b"k"]))[0] is not None
        server.command("CONFIG", "SET", "replica-serve-stale-data", "no")
        with pytest.raises(errors.StoreBusyError):
            await store.get_many([b"k"])
        await store.aclose()


async def test_too_many_clients() -> None:
    with valkey_server("--maxclients", "3") as server:
        hogs = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        error = await refusal(RedisStore(server.url))
        assert (error.kind, error.outage) == ("exhausted", False)
        for _, writer in hogs:
            writer.close()
            await writer.wait_closed()


# TLS


async def test_tls(tmp_path: Path) -> None:
    pems = certificates(tmp_path, "localhost")
    with redis_server(tls=pems, password=SECRET) as server:
        url = f"rediss://localhost:{server.tls_port}/0"
        good = RedisStore(url, ca_certs=pems.ca, password=SECRET, timeout=5.0)
        big = Write(b"big", secrets.token_bytes(3_000_000), 60.0, None)
        assert await good.write_many([big]) == ["done"]
        assert await good.get_many([b"big"]) == [big.frame]
        await good.aclose()

        untrusted = await refusal(RedisStore(url, password=SECRET))
        assert untrusted.kind == "tls"
        assert "CERTIFICATE_VERIFY_FAILED" in str(untrusted)
        assert "REDIS_CA_CERTS" in untrusted.cure
        other_name = await refusal(
            RedisStore(f"rediss://127.0.0.1:{server.tls_port}", ca_certs=pems.ca, password=SECRET)
        )
        assert other_name.kind == "tls"
        assert "another name" in str(other_name)
        assert "REDIS_HOST" in other_name.cure

        knowingly = RedisStore(f"rediss://127.0.0.1:{server.tls_port}", password=SECRET, tls_insecure=True, timeout=5.0)
        await knowingly.ping()
        await knowingly.aclose()


async def test_a_client_certificate(tmp_path: Path) -> None:
    pems = certificates(tmp_path, "localhost")
    with redis_server("--tls-auth-clients", "yes", tls=pems) as server:
        url = f"rediss://localhost:{server.tls_port}/0"
        without = await refusal(RedisStore(url, ca_certs=pems.ca, timeout=5.0))
        assert without.kind == "tls"
        assert "client_cert" in without.cure
        store = RedisStore(url, ca_certs=pems.ca, client_cert=pems.cert, client_key=pems.key, timeout=5.0)
        await store.ping()
        await store.aclose()
        ready = RedisCache(url, ca_certs=pems.ca, client_cert=pems.cert, client_key=pems.key, timeout=5.0)
        files = {"redis_ca_certs": pems.ca, "redis_client_cert": pems.cert, "redis_client_key": pems.key}
        by_settings = open_cache(cache_backend="redis", cache_timeout=5.0, redis_url=url, **files)
        for cache in (ready, by_settings):
            assert await cache.health_check()
            await cache.aclose()


async def test_tls_to_a_plain_port_and_back(tmp_path: Path) -> None:
    pems = certificates(tmp_path, "localhost")
    with redis_server(tls=pems) as server:
        started = time.monotonic()
        to_plain = await refusal(RedisStore(f"rediss://localhost:{server.port}", ca_certs=pems.ca))
        to_tls = await refusal(RedisStore(f"redis://localhost:{server.tls_port}"))
        assert time.monotonic() - started < 1.2
        assert (to_plain.kind, to_tls.kind) == ("tls", "tls")
        assert "redis://" in to_plain.cure
        assert "REDIS_SSL=true" in to_tls.cure


# Saying nothing


async def test_a_port_where_nobody_is() -> None:
    port = free_port()
    store = RedisStore(f"redis://localhost:{port}")
    jobs = [store.get_many([b"k%d" % n]) for n in range(50)]
    started = time.monotonic()
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert time.monotonic() - started < 0.5
    assert {type(result) for result in results} == {errors.StoreUnreachableError}
    assert len({id(result) for result in results}) == 50  # one each: a raised exception is written to
    assert f"Redis connection failed: Error connecting to localhost:{port}. Connection refused." in str(results[0])
    assert "redis-cli ping" in str(results[0])
    await store.aclose()


async def test_a_host_that_is_not_known() -> None:
    error = await refusal(RedisStore("redis://no-such-host.invalid", timeout=5.0))
    assert isinstance(error, errors.StoreUnreachableError)
    assert "no-such-host.invalid:6379" in str(error)


async def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    error = await refusal(RedisStore(unix_socket_path=str(tmp_path / "none")))
    assert isinstance(error, errors.StoreUnreachableError)
    assert "No such file" in str(error)


@pytest.mark.parametrize("connected", [True, False])
async def test_a_stopped_server_holds_nobody_beyond_the_deadline(connected: bool) -> None:
    with valkey_server() as server:
        store = RedisStore(server.url, timeout=0.3)
        if connected:
            await store.ping()
        server.pause()
        started = time.monotonic()
        jobs = [store.get_many([b"k%d" % n]) for n in range(50)]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert 0.25 < time.monotonic() - started < 0.5
        assert {type(result) for result in results} == {errors.StoreTimeoutError}
        server.resume()
        await store.ping()
        await store.aclose()


async def test_killed_and_restarted() -> None:
    with valkey_server() as server:
        store = RedisStore(server.url)
        await store.ping()
        server.kill()
        with pytest.raises(errors.StoreUnreachableError):
            await store.get_many([b"k"])
        server.start()
        assert await store.get_many([b"k"]) == [None]
        assert await store.write_many([write(store, b"k")]) == ["done"]
        await store.aclose()


async def test_a_connection_closed_while_idle_is_not_noticed(valkey: Server, store: RedisStore) -> None:
    entry = write(store, b"k")
    await store.write_many([entry])
    await store.get_many([b"k"])
    for settle in (0, 1):
        valkey.kill_clients()
        if settle:
            await asyncio.sleep(0)
        # Without the kill having been seen: the loop has not run since.
        reads = [store.get_many([b"k"]), store.head_many([b"k"])]
        writes = [store.write_many([entry]), store.begin_many([b"k"], hold=5), store.delete_many([b"x"])]
        assert await asyncio.gather(*reads) == [[entry.frame], [entry.frame[:HEAD_SIZE]]]
        done, begun, deleted = await asyncio.gather(*writes)
        assert (done, deleted) == (["done"], [None])
        assert begun[0].frame == entry.frame
        assert await store.clear(b"nothing") == 0


async def test_a_fenced_write_is_not_repeated(valkey: Server, store: RedisStore) -> None:
    (begun,) = await store.begin_many([b"k"], hold=60)
    valkey.kill_clients()
    with pytest.raises(errors.StoreUnreachableError):
        await store.write_many([write(store, b"k", fence=begun.fence)])
    assert await store.write_many([write(store, b"k", fence=begun.fence)]) == ["done"]


async def test_scripts_forgotten_by_the_server_matter_to_nobody(valkey: Server, store: RedisStore) -> None:
    (begun,) = await store.begin_many([b"k"], hold=60)
    valkey.command("SCRIPT", "FLUSH")
    assert await store.write_many([write(store, b"k", fence=begun.fence)]) == ["done"]


# Cancelling


async def test_a_storm_of_cancellations(store: RedisStore) -> None:
    """200 tasks, 30 rounds, some cancelled at a random moment: nobody ever reads what another one wrote."""
    chance = random.Random(1)
    wrong: list[bytes] = []
    finished = 0

    def frame(key: bytes, number: int) -> bytes:
        return pack(
            key, b"%d" % number, token=secrets.token_bytes(8), created=0, fresh_until=9, keep_until=9, kind=Kind.ENTRY
        )  # fmt: skip

    async def caller(task: int, round_: int) -> None:
        nonlocal finished
        key = b"task%d" % task
        mine = frame(key, round_)
        assert await store.write_many([Write(key, mine, 60.0, None)]) == ["done"]
        for _ in range(3):
            (got,) = await store.get_many([key])
            if got != mine:
                wrong.append(key)
        await store.head_many([key])
        finished += 1

    for round_ in range(30):
        tasks = [asyncio.create_task(caller(task, round_)) for task in range(200)]
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
            for task in chance.sample(tasks, 8):
                task.cancel()
                if chance.random() < 0.3:
                    task.cancel()
        done, hung = await asyncio.wait(tasks, timeout=20)
        assert not hung
        assert all(task.cancelled() or task.exception() is None for task in done)
    assert wrong == []
    assert finished > 1000
    assert await store.get_many([b"none"]) == [None]


async def test_a_delete_after_a_cancelled_write_wins(store: RedisStore) -> None:
    for size in (10, BIG * 10):
        writing = store.write_many([Write(b"k", b"x" * size, 60.0, None)])
        writing.cancel()
        await store.delete_many([b"k"])
        assert await store.get_many([b"k"]) == [None]
