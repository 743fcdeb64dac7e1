"""The three backends as tests use them: caches that share one dict, one folder, one real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

from mcp_hub_cache import Cache, FileCache, RedisCache
from mcp_hub_cache._protocols import Store, Write
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import FakeClock, FaultyStore
from tests.servers import Server

NAMES = ("memory", "file", "redis")
WITH_FAILOVER = (*NAMES, *(f"{name} with failover" for name in NAMES))
# Deadlines are other tests' business: these share two cores with whoever else runs.
PATIENT = 30.0


class Backend:
    """Opens caches that share what is stored, as processes would."""

    def __init__(self, name: str, folder: Path, server: Server | None = None) -> None:
        self.name = name
        self.opened: list[Cache] = []
        self.clock = FakeClock()
        self._folder = folder / "cache"
        self._server = server
        self._memory = MemoryStore()
        self._timed_memory = MemoryStore(clock=self.clock)
        if server is not None:
            server.command("FLUSHALL")

    def open(self, **options: Any) -> Cache:
        options.setdefault("timeout", PATIENT)
        cache: Cache
        if self.name.endswith(" with failover"):
            cache = Cache(FailoverStore(self._store(), MemoryStore()), **options)
        elif self.name == "memory":
            cache = Cache(self._memory, **options)
        elif self.name == "file":
            cache = FileCache(self._folder, **options)
        else:
            assert self._server is not None
            cache = RedisCache(self._server.url, **options)
        self.opened.append(cache)
        return cache

    def _store(self) -> Store:
        if self.name.startswith("memory"):
            return self._memory
        if self.name.startswith("file"):
            return FileStore(self._folder)
        assert self._server is not None
        return RedisStore(self._server.url, timeout=PATIENT)

    @property
    def is_told_later(self) -> bool:
        """Whether a cache hears of others' changes only when the server's word of them arrives."""
        return self.name.startswith("redis")

    def open_timed(self, **options: Any) -> Cache:
        """A cache for which ``let_pass`` moves the time; a server's own goes on by itself."""
        options.setdefault("timeout", PATIENT)
        if self.name == "redis":
            return self.open(**options)
        store = self._timed_memory if self.name == "memory" else FileStore(self._folder, clock=self.clock)
        cache = Cache(store, **options)
        self.opened.append(cache)
        return cache

    async def let_pass(self, cache: Cache, seconds: float) -> None:
        if self.name != "redis":
            self.clock.advance(seconds)
            return
        until = cache.store.now() + seconds
        await poll(lambda: cache.store.now() > until)

    async def aclose(self) -> None:
        for cache in self.opened:
            await cache.aclose()


class Plain(FaultyStore):
    """Can do what every store can, and no more, whatever it wraps."""

    def __new__(cls, store: Store, *, seed: int = 0) -> Self:
        return object.__new__(cls)


async def poll(holds: Callable[[], bool | Awaitable[bool]], seconds: float = 20.0) -> None:
    """Return when *holds*; fail after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        answer = holds()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert time.monotonic() < until, "it never came to that"
        await asyncio.sleep(0.002)


async def stored(cache: Cache, key: str) -> bytes | None:
    """The bytes that stand under *key*."""
    (frame,) = await cache.store.get_many([cache._key(key)])
    return frame


async def store_raw(cache: Cache, key: str, frame: bytes) -> None:
    """Put *frame* under *key*, as a foreign writer or a failing disk would."""
    assert list(await cache.store.write_many([Write(cache._key(key), frame, 600.0, None)])) == ["done"]


async def turns(count: int = 10) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)
