"""Managed servers that deny a command: the feature that needs it is lost, and it says what to grant."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from mcp_hub_cache import RedisCache
from mcp_hub_cache import _exceptions as errors
from mcp_hub_cache._protocols import Fence, Held, Patch, Write
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import entry_frame
from tests.backends import PATIENT, poll
from tests.clusters import cluster, watched
from tests.servers import Server, valkey_server

K = b"mcp_hub:ns:e:k"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with valkey_server() as made:
        yield made


def guest(server: Server, *denied: str) -> None:
    server.command("ACL", "SETUSER", "guest", "reset", "on", ">pw", "~*", "&*", "+@all", *denied)


def features(store: RedisStore) -> dict[str, Callable[[], Awaitable[object]]]:
    """What may be lost, by name."""
    write = Write(K, entry_frame(store, K, b"1", ttl=60), 60.0, None)
    fence = Fence(store.id, b"x" * 8)

    async def listed() -> object:
        return [page async for page in store.scan(b"mcp_hub:")]

    async def told() -> object:
        if not (await store.info()).get("redis_version"):
            raise errors.StorePermissionError("nothing is told.")
        return None

    async def near() -> object:
        state: str | None = None

        async def known() -> bool:
            nonlocal state
            store.stamp(K)
            state = str((await store.info()).get("l1_feed"))
            return store.stamp(K) is not None or state.startswith("off: Redis")

        await poll(known)
        if state is not None and state.startswith("off"):
            assert "+client|tracking" in state
            raise errors.StorePermissionError(state)
        return None

    async def wrote() -> object:
        return first(await store.write_many([write]))

    async def patched() -> object:
        return first(await store.patch_many([Patch(K, fence, write.frame[:64], 60.0)]))

    def first(outcomes: list[object]) -> object:
        (outcome,) = outcomes
        if isinstance(outcome, errors.StoreError):
            raise outcome
        return outcome

    return {
        "get": lambda: store.get_many([K]),
        "head": lambda: store.head_many([K]),
        "set": wrote,
        "begin": lambda: store.begin_many([b"new"], hold=1.0),
        "patch": patched,
        "delete": lambda: store.delete_many([b"gone"]),
        "renew": lambda: store.renew_many([Held(K, fence)], hold=60.0),
        "used": lambda: store.used_many([K]),
        "list": listed,
        "clear": lambda: store.clear(b"other:"),
        "info": told,
        "near": near,
        "ping": store.ping,
    }


@pytest.mark.parametrize(
    ("denied", "lost"),
    [
        (["-info"], {"info"}),
        (["-scan"], {"list", "clear"}),
        (["-client|tracking"], {"near"}),
        (["-client|id"], {"near"}),
        (["-subscribe"], {"near"}),
        (["-time"], set()),
        (["-role"], set()),
        (["-client|setinfo"], set()),
        (["-touch"], {"used"}),
        (["-mget"], {"get"}),
        (["-set"], {"set", "begin"}),
        (["-unlink"], {"delete"}),
        (["-getrange"], {"head", "list", "patch", "delete", "renew"}),
        (["-eval"], {"begin", "patch", "delete", "renew"}),
        (["-info", "-scan", "-client|tracking", "-time"], {"info", "list", "clear", "near"}),
    ],
    ids=" ".join,
)
async def test_what_is_denied_is_lost_alone(server: Server, denied: list[str], lost: set[str]) -> None:
    server.command("FLUSHALL")
    guest(server, *denied)
    store = RedisStore(server.url, username="guest", password="pw", timeout=PATIENT)
    missing: set[str] = set()
    said: list[str] = []
    for name, ask in features(store).items():
        try:
            await ask()
        except errors.StorePermissionError as error:
            missing.add(name)
            said.append(str(error))
    await store.aclose()
    assert missing == lost
    assert all("ACL SETUSER" in each or each == "nothing is told." for each in said)


async def test_a_cache_without_its_extras(server: Server) -> None:
    """What callers notice: nothing, but for what they ask for by name."""
    guest(server, "-info", "-scan", "-client|tracking", "-time", "-touch")
    async with RedisCache(server.url, username="guest", password="pw", timeout=PATIENT) as cache:
        await cache.set("k", {"a": 1}, ttl="10m", tags=["t"])
        assert await cache.get("k") == {"a": 1}
        await cache.invalidate("t")
        assert await cache.get("k") is None
        assert await cache.get_or_load("k", _two, ttl="10m") == 2
        await cache.delete("k")
        status = await cache.status()
        assert (status.status, status.redis_version) == ("healthy", None)
        assert await cache.clear() == 0


async def _two() -> int:
    return 2


async def test_a_cluster_that_tells_little() -> None:
    with cluster(replicas=0) as nodes:
        for node in nodes.nodes:
            guest(node, "-cluster|info", "-info", "-time", "-scan")
        store = RedisStore(nodes.url, cluster=True, username="guest", password="pw", timeout=PATIENT)
        assert await store.get_many([b"a", b"b", b"c"]) == [None] * 3
        assert (await store.info())["cluster_primaries"] == 3
        with pytest.raises(errors.StorePermissionError, match="scan"):
            await store.clear(b"mcp_hub:")
        await store.aclose()
        for node in nodes.nodes:
            guest(node, "-cluster")
        store = RedisStore(nodes.url, cluster=True, username="guest", password="pw", timeout=PATIENT)
        with pytest.raises(errors.StorePermissionError, match="cluster"):
            await store.get_many([b"a"])
        await store.aclose()


async def test_a_primary_that_does_not_tell_its_role() -> None:
    """Then Sentinel's word is enough."""
    with watched() as fleet:
        guest(fleet.primary(), "-role", "-info")
        store = RedisStore(sentinels=fleet.hosts, username="guest", password="pw", timeout=PATIENT)
        assert await asyncio.wait_for(store.get_many([b"a"]), PATIENT) == [None]
        await store.aclose()
