"""The primary that Sentinel names: the conformance suite, and what there is to say when it names none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mcp_hub_cache import _exceptions as errors
from mcp_hub_cache._protocols import Coherent, Store, Write
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import StoreConformance, entry_frame
from tests.backends import poll
from tests.clusters import SERVICE, Watched, watched
from tests.servers import certificates, free_port, redis_server, valkey_server

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

SECRET = "s3cr3t"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Watched]:
    with watched() as made:
        yield made


def write(store: Store, key: bytes, payload: bytes = b"1") -> Write:
    return Write(key, entry_frame(store, key, payload, ttl=60), 60.0, None)


class TestOverSentinel(StoreConformance):
    @pytest.fixture(autouse=True)
    def _serve(self, fleet: Watched) -> None:
        self.fleet = fleet

    @asynccontextmanager
    async def open_pair(self) -> AsyncIterator[tuple[Store, Store]]:
        one = RedisStore(f"sentinel://{self.fleet.hosts}/{SERVICE}/0", timeout=5.0)
        two = RedisStore(sentinels=self.fleet.hosts.split(","), timeout=5.0, max_connections=1)
        yield one, two
        await one.aclose()
        await two.aclose()

    async def wait_coherent(self, store: Coherent, key: bytes) -> bool:
        await poll(lambda: store.stamp(key) is not None)
        return True


async def refusal(store: RedisStore) -> errors.StoreError:
    with pytest.raises(errors.StoreError) as caught:
        await store.get_many([b"k"])
    await store.aclose()
    assert SECRET not in f"{caught.value!r} {store!r}"
    return caught.value


async def test_a_sentinel_that_is_away_is_done_without(fleet: Watched) -> None:
    hosts = f"127.0.0.1:{free_port()},{fleet.hosts.partition(',')[0]}"
    store = RedisStore(sentinels=hosts, timeout=5.0)
    assert await store.get_many([b"k"]) == [None]
    await store.aclose()


async def test_sentinels_that_are_all_away() -> None:
    error = await refusal(RedisStore(sentinels=f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}", timeout=5.0))
    assert isinstance(error, errors.StoreUnreachableError)
    assert "REDIS_SENTINELS" in error.cure


async def test_a_service_that_nobody_knows(fleet: Watched) -> None:
    error = await refusal(RedisStore(sentinels=fleet.hosts, sentinel_service="other", timeout=5.0))
    assert error.kind == "misconfigured"
    assert "'other'" in str(error)
    assert "REDIS_SENTINEL_SERVICE" in error.cure


async def test_what_is_no_sentinel(fleet: Watched) -> None:
    error = await refusal(RedisStore(sentinels=f"127.0.0.1:{fleet.primary().port}", timeout=5.0))
    assert not isinstance(error, errors.StoreTimeoutError)


async def test_credentials_of_the_sentinels_and_of_the_servers() -> None:
    """Each has its own; a wrong one of the sentinels is told as theirs."""
    servers = ("--user", "default", "off", "--user", "agent", "on", f">{SECRET}", "~*", "&*", "+@all")
    with valkey_server(*servers) as primary, valkey_server(start=False) as sentinel:
        config = sentinel.folder / "sentinel.conf"
        lines = [
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} 1",
            "user default off",
            f"user watcher on >{SECRET}2 ~* &* +@all",
        ]
        config.write_text("\n".join([*lines, ""]))
        sentinel.config = (str(config), "--sentinel")
        sentinel.start()
        url = f"sentinel://agent:{SECRET}@127.0.0.1:{sentinel.port}/{SERVICE}/3"
        store = RedisStore(url, sentinel_username="watcher", sentinel_password=f"{SECRET}2", timeout=5.0)
        one = write(store, b"k")
        assert await store.write_many([one]) == ["done"]
        assert await store.get_many([b"k"]) == [one.frame]
        assert SECRET not in repr(store)
        await store.aclose()
        error = await refusal(RedisStore(url, sentinel_username="watcher", sentinel_password=SECRET, timeout=5.0))
        assert error.kind == "auth"
        assert "REDIS_SENTINEL_PASSWORD" in error.cure
        error = await refusal(
            RedisStore(
                sentinels=f"127.0.0.1:{sentinel.port}",
                sentinel_username="watcher",
                sentinel_password=f"{SECRET}2",
                username="agent",
                password="no",
                timeout=5.0,
            )
        )
        assert error.kind == "auth"
        assert "REDIS_PASSWORD" in error.cure


async def test_tls(tmp_path: Path) -> None:
    """For sentinels and servers alike, and both are verified."""
    pems = certificates(tmp_path, "localhost", "127.0.0.1")
    with redis_server(tls=pems) as primary, redis_server(tls=pems, start=False) as sentinel:
        config = sentinel.folder / "sentinel.conf"
        config.write_text(f"tls-replication yes\nsentinel monitor {SERVICE} 127.0.0.1 {primary.tls_port} 1\n")
        sentinel.config = (str(config), "--sentinel")
        sentinel.start()
        url = f"sentinels://localhost:{sentinel.tls_port}/{SERVICE}"
        store = RedisStore(url, ca_certs=pems.ca, timeout=5.0)
        one = write(store, b"k")
        assert await store.write_many([one]) == ["done"]
        assert await store.get_many([b"k"]) == [one.frame]
        await store.aclose()
        error = await refusal(RedisStore(url, timeout=5.0))
        assert error.kind == "tls"
        assert "REDIS_CA_CERTS" in error.cure
        error = await refusal(RedisStore(f"sentinel://localhost:{sentinel.tls_port}/{SERVICE}", timeout=5.0))
        assert error.kind == "tls"
        error = await refusal(RedisStore(f"sentinels://localhost:{sentinel.port}/{SERVICE}", timeout=5.0))
        assert error.kind == "tls"


async def test_a_replica_that_is_named_is_never_used(fleet: Watched) -> None:
    """Sentinel may be behind: the server itself must say that it is a primary."""
    with valkey_server(start=False) as sentinel:
        config = sentinel.folder / "sentinel.conf"
        config.write_text(f"sentinel monitor {SERVICE} 127.0.0.1 {fleet.primary().port} 1\n")
        sentinel.config = (str(config), "--sentinel")
        with valkey_server("--replicaof", f"127.0.0.1 {fleet.primary().port}") as replica:
            config.write_text(f"sentinel monitor {SERVICE} 127.0.0.1 {replica.port} 1\n")
            sentinel.start()
            store = RedisStore(sentinels=f"127.0.0.1:{sentinel.port}", timeout=5.0)
            try:
                await store.get_many([b"k"])
            except errors.StoreUnreachableError as error:
                assert "replica" in str(error)  # noqa: PT017  # or it has found the primary by itself
            await store.aclose()
            assert replica.command("INFO", "commandstats").count(b"cmdstat_mget") == 0
