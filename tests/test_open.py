"""Ways to a cache: what the environment asks for is what serves, and Redis away is nobody's trouble."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import AsyncCache, Cache, FileCache, MemoryCache, RedisCache, SettingsError, acached, open_cache
from mcp_hub_cache._settings import load_settings
from mcp_hub_cache.stores.memory import MemoryStore
from tests.backends import poll
from tests.servers import Server, free_port, valkey_server


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


async def test_files_by_default(tmp_path: Path) -> None:
    async with open_cache() as cache:
        await cache.set("k", 1)
        status = await cache.status()
    assert (status.status, status.backend, status.total_files, status.total_keys) == ("healthy", "file", 1, 1)
    assert (status.key_prefix, status.default_ttl_seconds, status.namespace) == ("mcp_hub:", 3600.0, "default")
    assert (tmp_path / "cache" / "mcp_hub_cache" / "default").is_dir()


async def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("CACHE_BACKEND=memory  # for now\nCACHE_DEFAULT_TTL=10m\nCACHE_NAMESPACE=team\n")
    monkeypatch.setenv("CACHE_NAMESPACE", "ours")
    async with open_cache() as cache:
        status = await cache.status()
    assert (status.backend, status.namespace, status.default_ttl_seconds) == ("memory", "ours", 600.0)
    async with open_cache(load_settings(cache_namespace="theirs")) as cache:
        assert cache.namespace == "theirs"


def test_what_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_BACKEND", "postgres")
    with pytest.raises(SettingsError, match="CACHE_BACKEND held 'postgres'"):
        open_cache()
    with pytest.raises(TypeError, match="not both"):
        open_cache(load_settings(cache_backend="file"), cache_dir="elsewhere")
    with pytest.raises(TypeError, match="no such setting: nonsense"):
        open_cache(nonsense=1)


@pytest.mark.parametrize(
    "made",
    [
        lambda: MemoryCache(namespace="n", default_ttl="5m", l1_max_entries=0),
        lambda: FileCache("here", namespace="n", default_ttl="5m", l1_max_entries=0),
        lambda: RedisCache("redis://localhost:1/0", namespace="n", default_ttl="5m", l1_max_entries=0),
    ],
    ids=["memory", "file", "redis"],
)
async def test_the_ready_made_ones_take_the_same_options(made: Any) -> None:
    cache = made()
    assert isinstance(cache, AsyncCache)
    assert isinstance(cache, Cache)
    assert cache.namespace == "n"
    assert (await cache.status()).default_ttl_seconds == 300.0
    await cache.aclose()


async def test_on_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    with valkey_server() as server:
        monkeypatch.setenv("CACHE_BACKEND", "redis")
        monkeypatch.setenv("REDIS_URL", server.url)
        async with open_cache(cache_timeout=10) as cache:
            await cache.set("k", {"n": 1})
            assert await cache.get("k") == {"n": 1}
            status = await cache.status()
            assert await cache.health_check()
        assert (status.status, status.backend, status.total_keys) == ("healthy", "redis", 1)
        assert status.redis_version
        assert status.memory_used_human
        assert status.connected_clients
        assert status.as_dict()["degraded_since"] is None
        assert status.hits == 1


async def test_redis_away_at_the_start_and_at_run_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mcp_hub_cache")
    with valkey_server() as server:
        server.kill()
        monkeypatch.setenv("CACHE_BACKEND", "redis")
        monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
        monkeypatch.setenv("REDIS_PORT", str(server.port))
        async with open_cache(cache_timeout=10) as cache:
            calls = 0

            @acached(cache=cache)
            async def double(x: int) -> int:
                nonlocal calls
                calls += 1
                return 2 * x

            assert await double(1) == await double(1) == 2
            assert calls == 1
            assert double.stats().hits_by_tier == {"file": 1}
            await cache.set("deleted", 1)
            await cache.delete("deleted")
            assert not await cache.health_check()
            status = await cache.status()
            assert status.status == "degraded"
            assert time.time() - 60 < (status.degraded_since or 0) <= time.time()
            assert str(server.port) in (status.problem or "")
            assert "Failed to initialize Redis cache backend" in caplog.text
            assert "Falling back to file-based cache" in caplog.text
            assert (tmp_path / "cache" / "standby").is_dir()

            await _until_it_serves(server, cache)
            assert "Redis is back" in caplog.text
            assert await double(1) == 2
            assert calls == 2  # what the standby had is not carried over
            await cache.set("old", 1)
            await cache.set("kept", 1)

            server.kill()
            assert await cache.get("old", "a miss") == "a miss"
            await cache.delete("old")
            await _until_it_serves(server, cache)
            assert await cache.get("old", "a miss") == "a miss"


async def _until_it_serves(server: Server, cache: Cache) -> None:
    server.start()

    async def healthy() -> bool:
        return (await cache.status()).status == "healthy"

    await poll(healthy)


@pytest.mark.parametrize("fallback", ["none", "memory"])
async def test_other_fallbacks(fallback: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDIS_PORT", str(free_port()))
    async with open_cache(cache_backend="redis", cache_fallback=fallback, cache_timeout=10) as cache:
        await cache.set("k", 1)
        assert await cache.get("k") == (1 if fallback == "memory" else None)
        assert (await cache.status()).status == ("degraded" if fallback == "memory" else "unhealthy")
        assert await cache.get_or_load("l", lambda: asyncio.sleep(0, "loaded")) == "loaded"
    assert list(tmp_path.iterdir()) == []


async def test_a_standby_of_ones_own() -> None:
    standby = MemoryStore()
    async with RedisCache(f"redis://127.0.0.1:{free_port()}/0", fallback=standby, timeout=10) as cache:
        await cache.set("k", 1)
        assert await cache.get("k") == 1
        assert (await standby.info())["total_keys"] == 1
