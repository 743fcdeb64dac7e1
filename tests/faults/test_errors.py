"""Each way in which a server refuses, told apart: FAULTS.md, the rows from "credentials or certificate" to "WRONGTYPE".

Per state, on a real server that is brought into it and out again: what calls get, what is counted, what the log says
and how loudly, what ``status()`` and ``health_check()`` say, what is on disk, and that it mends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import Cache, RedisCache, StoreMisconfiguredError, open_cache
from mcp_hub_cache._exceptions import StoreUnreachableError
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.redis import RedisStore
from tests.backends import poll
from tests.faults import refusals
from tests.faults.refusals import QUICK, Arranged, Scene
from tests.servers import valkey_server

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

_PREFIX = b"mcp_hub:"
_SECONDS = 60  # for a machine that has much else to do


@dataclass
class Case:
    """A state, and what is promised in it.

    Attributes:
        scene: Arranges a server.
        kind: What errors are counted under.
        says: What the text says is wrong.
        cure: What it says to do.
        state: Of a cache without a fallback.
        reads: What was stored before is still served.
        also: Kinds that may be counted besides.
    """

    scene: Callable[[Path], Arranged]
    kind: str
    says: str
    cure: str
    state: str
    reads: bool = False
    also: frozenset[str] = frozenset()

    @property
    def is_outage(self) -> bool:
        return self.kind in {"unreachable", "timeout"}

    @property
    def level(self) -> int:
        return logging.ERROR if self.is_outage or self.state == "misconfigured" else logging.WARNING


CASES = {
    "refused": Case(refusals.gone, "unreachable", "Connection refused", "redis-cli ping", "unhealthy"),
    "timed out": Case(refusals.stopped, "timeout", "did not answer", "network between", "unhealthy"),
    "no password": Case(
        partial(refusals.password, before="", after="x"),
        "auth",
        "NOAUTH Authentication required",
        "Set REDIS_PASSWORD",
        "misconfigured",
    ),
    "wrong password": Case(
        partial(refusals.password, before="y", after="x"), "auth", "WRONGPASS", "Set REDIS_PASSWORD", "misconfigured"
    ),
    "ACL": Case(refusals.acl, "permission", "NOPERM", "ACL SETUSER", "misconfigured"),
    "TLS, untrusted": Case(
        partial(refusals.certificate, ca="other", name="localhost"),
        "tls",
        "CERTIFICATE_VERIFY_FAILED",
        "Set REDIS_CA_CERTS",
        "misconfigured",
    ),
    "TLS, wrong name": Case(
        partial(refusals.certificate, ca="trusted", name="elsewhere"),
        "tls",
        "for another name",
        "Name the server in REDIS_HOST or REDIS_URL as its certificate does",
        "misconfigured",
    ),
    "TLS to a plain port": Case(
        partial(refusals.ports_change_places, asks_for_tls=True),
        "tls",
        "does not speak TLS",
        "Use REDIS_SSL=false",
        "misconfigured",
    ),
    "plain to a TLS port": Case(
        partial(refusals.ports_change_places, asks_for_tls=False),
        "tls",
        "speaks TLS",
        "Set REDIS_SSL=true",
        "misconfigured",
    ),
    "out of clients": Case(refusals.too_many_clients, "exhausted", "limit on clients", "Raise maxclients", "unhealthy"),
    "OOM": Case(
        partial(refusals.by_config, name="maxmemory", bad=1, good=0),
        "full",
        "(OOM)",
        "CONFIG SET maxmemory-policy allkeys-lru",
        "healthy",
        reads=True,
    ),
    "READONLY": Case(
        partial(refusals.replica, serves_stale=True),
        "readonly",
        "(READONLY)",
        "Name the primary",
        "healthy",
        reads=True,
    ),
    "MISCONF": Case(refusals.cannot_save, "readonly", "(MISCONF)", "disk may be full", "unhealthy", reads=True),
    "NOREPLICAS": Case(
        partial(refusals.by_config, name="min-replicas-to-write", bad=1, good=0),
        "busy",
        "(NOREPLICAS)",
        "Check its replicas",
        "healthy",
        reads=True,
    ),
    "MASTERDOWN": Case(
        partial(refusals.replica, serves_stale=False),
        "busy",
        "(MASTERDOWN)",
        "Check the primary",
        "unhealthy",
        also=frozenset({"readonly"}),
    ),
    "LOADING": Case(refusals.loading, "busy", "(LOADING)", "Wait", "unhealthy"),
    "BUSY": Case(refusals.busy, "busy", "(BUSY)", "SCRIPT KILL", "unhealthy"),
    "CLUSTERDOWN": Case(
        refusals.cluster_without_slots, "busy", "(CLUSTERDOWN)", "redis-cli --cluster check", "healthy"
    ),
    "protocol": Case(
        refusals.web_server,
        "protocol",
        "not what a Redis server says",
        "Check that REDIS_HOST and REDIS_PORT name one",
        "unhealthy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
async def test_told_apart(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a fallback, with one, and opened from settings when it is in that state already."""
    caplog.set_level(logging.INFO, "mcp_hub_cache")
    case = CASES[name]
    async with case.scene(tmp_path) as scene:
        alone = opened(scene, namespace="alone")
        covered = opened(scene, namespace="covered", fallback=FileStore(tmp_path / "standby"))
        strict = opened(scene, namespace="strict", on_misconfigured="raise")
        for cache in (alone, covered, strict):
            await stores(cache)
        await asyncio.to_thread(scene.breaks)
        try:
            late = by_settings(scene, tmp_path)
            for cache in (alone, covered, late):
                caplog.clear()
                falls_back = case.is_outage and cache is not alone
                await serves_what_it_can(cache, case, stored=cache is not late, falls_back=falls_back)
                # What has failed once is suspected, and away when probes have failed, too.
                await poll(lambda: any(case.says in record.getMessage() for record in caplog.records))
                is_told_in_the_log(caplog.records, case, falls_back=falls_back)
                await is_told_by_status(cache, "degraded" if falls_back else case.state, case)
            await says_so(strict, case)
            for folder in (tmp_path / "standby", tmp_path / "late" / "standby"):
                assert (await entries(folder) > 0) is case.is_outage  # nothing falls back in silence
        finally:
            await asyncio.to_thread(scene.mends)
        for cache in (alone, covered, late, strict):
            await mends_itself(cache)
            await cache.aclose()


def opened(scene: Scene, **options: Any) -> RedisCache:
    return RedisCache(**{"timeout": 10.0, "l1_max_entries": 0, "failover": QUICK, **scene.options, **options})


def by_settings(scene: Scene, folder: Path) -> Cache:
    return open_cache(
        cache_backend="redis",
        cache_namespace="late",
        cache_dir=folder / "late",
        cache_timeout=scene.options.get("timeout", 10.0),
        redis_url=scene.options["url"],
        **{f"cache_{option}": seconds for option, seconds in QUICK.items()},
        **scene.settings,
    )


async def stores(cache: Cache) -> None:
    """All is well, also where the machine is so busy that a deadline is missed."""
    await mends_itself(cache)
    async with asyncio.timeout(_SECONDS):
        while await cache.get("old") is None:
            await cache.set("old", "old")


async def serves_what_it_can(cache: Cache, case: Case, *, stored: bool, falls_back: bool) -> None:
    assert await cache.get("old") == ("old" if stored and case.reads else None)
    await cache.set("new", 1)
    assert await cache.get("new") == (1 if falls_back else None)
    calls = 0

    async def load() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)  # for the others to come
        return 2

    assert await asyncio.gather(*(cache.get_or_load("loaded", load) for _ in range(10))) == [2] * 10
    assert calls == 1
    counted = cache.stats.errors
    if falls_back:
        assert counted == {}
    else:
        assert counted[case.kind] >= 2
        assert counted.keys() <= {case.kind, *case.also}


def is_told_in_the_log(records: list[logging.LogRecord], case: Case, *, falls_back: bool) -> None:
    told = [record for record in records if case.says in record.getMessage() and record.levelno >= logging.WARNING]
    assert [record.levelno for record in told] == [case.level]
    assert case.cure in told[0].getMessage()
    said = [record.getMessage() for record in records]
    assert ("Falling back to file-based cache" in said) is falls_back


async def is_told_by_status(cache: Cache, state: str, case: Case) -> None:
    assert await cache.health_check() is (state == "healthy")
    status = await cache.status()
    assert status.status == state
    assert status.problem is not None and case.says in status.problem and case.cure in status.problem
    assert (status.degraded_since is not None) is (state == "degraded")


async def says_so(cache: Cache, case: Case) -> None:
    """A cache with ``on_misconfigured="raise"`` raises what a person must put right, and nothing else."""
    if case.state != "misconfigured":
        assert await cache.get("old") == ("old" if case.reads else None)
        return
    with pytest.raises(StoreMisconfiguredError) as caught:
        await cache.get("old")
    assert (caught.value.kind, case.cure in caught.value.cure) == (case.kind, True)


async def entries(folder: Path) -> int:
    store = FileStore(folder)
    try:
        return sum([len(page) async for page in store.scan(_PREFIX)])
    finally:
        await store.aclose()


async def mends_itself(cache: Cache) -> None:
    """Soon it is as if nothing had been."""
    async with asyncio.timeout(_SECONDS):
        while not await is_mended(cache):
            await asyncio.sleep(0.01)


async def is_mended(cache: Cache) -> bool:
    async def load() -> int:
        return 4

    try:
        await cache.set("after", 3)
        if await cache.get("after") != 3 or not await cache.delete("after"):
            return False
        if await cache.get_or_load("after", load) != 4 or not await cache.delete("after"):
            return False
    except StoreMisconfiguredError:
        return False
    status = await cache.status()
    return (status.status, status.problem) == ("healthy", None) and await cache.health_check()


async def test_a_key_of_another_type_is_a_miss_and_makes_room() -> None:
    """WRONGTYPE: somebody else's list under a key of this cache. Reads miss; what is stored next takes its place."""
    with valkey_server() as server:
        cache = opened(Scene({"url": server.url}, lambda: None, lambda: None))
        for key in (b"set", b"load", b"delete"):
            server.command("RPUSH", _PREFIX + b"default:e:" + key, "theirs")

        async def load() -> int:
            return 1

        assert await cache.get("set") is None
        await cache.set("set", 1)
        assert await cache.get("set") == 1
        assert await cache.get_or_load("load", load) == 1
        assert await cache.delete("delete") is False
        assert server.command("EXISTS", _PREFIX + b"default:e:delete") == 0
        assert [await cache.get("load"), await cache.get("delete")] == [1, None]
        assert cache.stats.errors.keys() == {"foreign"}
        assert (await cache.status()).status == "healthy"
        await cache.aclose()


async def test_a_connection_cut_while_connecting_is_no_timeout() -> None:
    """A server that hangs up once and is sound after that is asked why, and that does not take the whole deadline.

    It says nothing to who only listens, and waits for the end of what a TLS client greets it with.
    """
    accepted = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        first = accepted == 1
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if first:
                    break
                if data.startswith(b"PING"):
                    writer.write(b"-NOAUTH Authentication required.\r\n")
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    store = RedisStore(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", timeout=10.0)
    with pytest.raises(StoreUnreachableError):
        await store.ping()
    await store.aclose()
    server.close()
    await server.wait_closed()
