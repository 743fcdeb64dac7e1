"""Caches over every backend for which time moves only when told to, and loaders that do as they are told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import Cache
from mcp_hub_cache._frame import Kind, peek
from mcp_hub_cache._leases import beside
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import FakeClock
from tests.backends import PATIENT, Backend, poll
from tests.servers import Server


class Shifted(Backend):
    """As a backend; ``advance`` moves the time.

    A server has a clock of its own, which drops what is kept no longer. What decides on freshness is the store's idea
    of it, and that is ahead by as much as it was advanced here. The near cache has no part in that: there is none, and
    no feed, so that what one cache changes is known to the others at once.
    """

    def __init__(self, name: str, folder: Path, server: Server | None = None) -> None:
        super().__init__(name, folder, server)
        self._shift = FakeClock(0.0)

    def open(self, **options: Any) -> Cache:
        if self.name != "redis":
            return self.open_timed(**options)
        assert self._server is not None
        store = RedisStore(self._server.url, timeout=PATIENT, max_connections=1)
        now = store.now
        store.now = lambda: now() + self._shift.time
        options = {"timeout": PATIENT, "l1_max_entries": 0} | options
        self.opened.append(Cache(store, **options))
        return self.opened[-1]

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self._shift.advance(seconds)


class Source:
    """A loader: counts its calls and returns the number of each in a list, or raises ``error``.

    While ``go`` is cleared, calls wait for it.
    """

    def __init__(self, error: Exception | None = None, *, held: bool = False) -> None:
        self.error = error
        self.calls = 0
        self.cancelled = 0
        self.started = asyncio.Event()
        self.go = asyncio.Event()
        if not held:
            self.go.set()

    async def __call__(self) -> list[int]:
        self.calls += 1
        number = self.calls
        self.started.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return [number]


class Boom(Exception):
    pass


async def idle(*caches: Cache) -> None:
    """Return when no load is in progress any more, and all that it had to say is said."""
    for cache in caches:
        session = cache._engine.session()
        await poll(lambda session=session: not session.flights._flights and session.behind == 0)
        await session.lines.settle()


async def beside_kind(cache: Cache, key: str) -> int | None:
    """What stands beside the entry of *key*, where the lease on its refresh has its place."""
    store_key = cache._key(key)
    (data,) = await cache.store.get_many([beside(cache._engine.root(store_key), store_key)])
    head = None if data is None else peek(data)
    return None if head is None else head.kind


async def rests_everywhere(cache: Cache, key: str) -> None:
    """Return when the store says that the entry's refresh rests."""

    async def says() -> bool:
        return await beside_kind(cache, key) == Kind.OVER

    await poll(says)


def shifted(request: pytest.FixtureRequest, folder: Path) -> Shifted:
    server = request.getfixturevalue("valkey") if request.param == "redis" else None
    return Shifted(request.param, folder, server)
