"""Stale after an outage: what was deleted while the server was away stays deleted, whoever was killed meanwhile."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcp_hub_cache import RedisCache
from mcp_hub_cache.stores.file import FileStore
from tests.backends import poll
from tests.servers import Server, valkey_server

_CHILD = """
import asyncio, os, signal, sys
from mcp_hub_cache import RedisCache
from mcp_hub_cache.stores.file import FileStore

async def main() -> None:
    cache = RedisCache(sys.argv[1], fallback=FileStore(sys.argv[2]))
    for _ in range(2):
        await cache.delete("gone")
        await cache.invalidate("tagged")
        await cache.set("replaced", "new")
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


def _cache(server: Server, folder: Path) -> RedisCache:
    return RedisCache(server.url, fallback=FileStore(folder), l1_max_entries=0)


async def test_deletes_of_a_process_that_was_killed_during_an_outage_are_made_up_for(
    server: Server, tmp_path: Path
) -> None:
    async with _cache(server, tmp_path) as cache:
        await cache.set("gone", "old")
        await cache.set("replaced", "old")
        await cache.set("marked", "old", tags=["tagged"])
        await cache.set("kept", "there")
        assert await cache.get("marked") == "old"
    server.pause()  # with all that it has
    try:
        child = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", _CHILD, server.url, str(tmp_path)], timeout=60, check=False
        )
        assert child.returncode == -signal.SIGKILL
    finally:
        server.resume()
    async with _cache(server, tmp_path) as cache:
        found = await cache.get_many(["gone", "replaced", "marked", "kept"])
        assert found.get("gone") is None
        assert found.get("replaced") != "old"
        assert found.get("marked") is None
        assert found["kept"] == "there"

        async def told() -> bool:
            return (await cache.status()).facts["journal"] == 0

        async with asyncio.timeout(20):
            while not await told():
                await asyncio.sleep(0.01)
        assert await cache.get("kept") == "there"


async def test_a_server_that_restarts_without_the_last_changes_serves_nothing_from_before_them(
    server: Server, tmp_path: Path
) -> None:
    """As a replica does that is promoted: it has what the old one had a moment before."""
    async with _cache(server, tmp_path) as cache:
        await cache.set_many({"gone": "old", "replaced": "old", "kept": "new"})
        keys = server.command("KEYS", "*")
        dumps = [server.command("DUMP", key) for key in keys]
        assert len(keys) == 3
        assert await cache.delete("gone") is True
        await cache.set("replaced", "new")
        server.kill()
        server.start()
        for key, dump in zip(keys, dumps, strict=True):
            server.command("RESTORE", key, 0, dump)

        await poll(cache.health_check)
        assert await cache.get_many(["gone", "replaced"]) == {}
        await poll(lambda: server.command("EXISTS", *keys) == 1)

        async def checked() -> bool:
            return await cache.get("kept") == "new"

        await poll(checked)
