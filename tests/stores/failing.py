"""A failover store over two memories that a test can break, and everything that it told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mcp_hub_cache._changes import Changes
from mcp_hub_cache._exceptions import StoreError
from mcp_hub_cache._frame import unpack_head
from mcp_hub_cache._protocols import Fence, Held, Outcome, Write
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock, FaultyStore, entry_frame

A, B, C = b"mcp_hub:t:e:a", b"mcp_hub:t:e:b", b"mcp_hub:t:e:c"
SECRET = b"a value that no log may show"


class View(MemoryStore):
    """A second instance over the same dict."""

    def __init__(self, other: MemoryStore) -> None:
        super().__init__(clock=other.now)
        self._entries = other._entries
        self._planted = other._planted
        self._buckets = other._buckets
        self._words = other._words
        self._changes = Changes(self._words, other.now)
        self._waiters = other._waiters


class Primary(FaultyStore):
    """A faulty one that can do all that a memory store can."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.slot = store.slot
        self.stamp = store.stamp
        self.distrust = store.distrust
        self.changed = store.changed
        self._memory = store

    def get_many(self, keys: Sequence[bytes], /) -> asyncio.Future[list[bytes | None]]:  # type: ignore[override]
        return asyncio.ensure_future(super().get_many(keys))  # as a store that needs no task for it

    def write_many(self, writes: Sequence[Write], /) -> asyncio.Future[list[Outcome]]:  # type: ignore[override]
        return asyncio.ensure_future(super().write_many(writes))

    async def renew_many(self, held: Sequence[Held], /, *, hold: float) -> list[bool]:
        result: list[bool] = await self._guarded("renew_many", lambda: self._memory.renew_many(held, hold=hold))
        return result

    async def release_many(self, held: Sequence[Held], /) -> None:
        await self._guarded("release_many", lambda: self._memory.release_many(held))

    async def used_many(self, keys: Sequence[bytes], /) -> None:
        await self._guarded("used_many", lambda: self._memory.used_many(keys))


class World:
    """A failover store over two memories, and everything that it told."""

    def __init__(self, *, standby: bool = True, kind: type[Primary] = Primary, **options: Any) -> None:
        self.clock = FakeClock()
        self.server = MemoryStore(clock=self.clock)
        self.server.name = "redis"
        self.primary: Any = kind(self.server)
        self.files = MemoryStore(clock=self.clock)
        self.files.name = "file"
        self.states: list[tuple[str, str]] = []
        self._changed = asyncio.Event()
        options.setdefault("probe_after", 3600.0)
        options.setdefault("probe_max", 3600.0)
        self.store = FailoverStore(
            self.primary,
            self.files if standby else None,
            clock=self.clock,
            rng=random.Random(1).random,
            on_state=self._heard,
            **options,
        )

    def _heard(self, old: str, new: str) -> None:
        self.states.append((old, new))
        self._changed.set()

    def asked(self) -> int:
        """How often the primary was asked for anything."""
        return sum(self.primary.calls.values())

    async def contact(self) -> None:
        await self.store.ping()

    async def go_down(self, error: StoreError | None = None) -> None:
        """Let the primary go away, noticed."""
        self.primary.break_down(error)
        while self.store.state().state == "healthy":
            with pytest.raises(StoreError):
                await self.store.ping()

    async def until(self, state: str) -> None:
        async with asyncio.timeout(5):
            while self.store.state().state != state:
                self._changed.clear()
                await self._changed.wait()

    async def come_back(self) -> None:
        """Let the primary serve again; a ping by whoever has it looked at at once."""
        self.primary.repair()
        await self.store.ping()
        await self.until("healthy")

    async def caught_up(self) -> None:
        """Wait until the journal has been replayed."""
        async with asyncio.timeout(5):
            while len(self.store._journal):
                await asyncio.sleep(0)

    async def set(
        self, key: bytes, payload: bytes = SECRET, *, fence: Fence | None = None, ttl: float = 600.0
    ) -> Outcome:
        (outcome,) = await self.store.write_many([Write(key, self.frame(key, payload, ttl=ttl), ttl, fence)])
        return outcome

    def frame(self, key: bytes, payload: bytes = SECRET, *, ttl: float = 600.0) -> bytes:
        return entry_frame(self.store, key, payload, ttl=ttl)

    async def get(self, key: bytes) -> bytes | None:
        """The payload that the failover store has under *key*."""
        return payload_of((await self.store.get_many([key]))[0])

    async def on_server(self, key: bytes) -> bytes | None:
        return payload_of((await self.server.get_many([key]))[0])

    def kept(self) -> list[bytes]:
        """The keys in the standby, the least recently used first; the journal's pages aside."""
        return [key for key in self.files._entries if not key.startswith(b"~")]

    async def in_files(self, key: bytes) -> bytes | None:
        return payload_of((await self.files.get_many([key]))[0])


def payload_of(frame: bytes | None) -> bytes | None:
    return None if frame is None else frame[len(frame) - unpack_head(frame).payload_length :]


Make = Callable[..., World]


@asynccontextmanager
async def worlds() -> AsyncIterator[Make]:
    """What makes worlds; closes them, and sees that no task is left."""
    made: list[World] = []

    def make(**options: Any) -> World:
        made.append(World(**options))
        return made[-1]

    yield make
    for each in made:
        await each.store.aclose()
    assert len(asyncio.all_tasks()) == 1
