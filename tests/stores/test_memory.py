"""MemoryStore: the conformance suite, and what is its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mcp_hub_cache._changes import Changes
from mcp_hub_cache._protocols import Store, Write
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock, StoreConformance, entry_frame


class _View(MemoryStore):
    """A second instance over the same dict, as two caches of one process have it."""

    def __init__(self, other: MemoryStore) -> None:
        super().__init__(clock=other.now)
        self._entries = other._entries
        self._buckets = other._buckets
        self._words = other._words
        self._changes = Changes(self._words, other.now)
        self._waiters = other._waiters


class TestMemoryStore(StoreConformance):
    clock: FakeClock

    @asynccontextmanager
    async def open_pair(self) -> AsyncIterator[tuple[Store, Store]]:
        self.clock = FakeClock()
        store = MemoryStore(clock=self.clock)
        yield store, _View(store)

    async def wait_expiry(self, store: Store, until: float) -> None:
        self.clock.advance(max(0.0, until - self.clock()) + 0.001)


def _write(store: MemoryStore, key: bytes, size: int, ttl: float = 60.0) -> Write:
    return Write(key, entry_frame(store, key, b"x" * size, ttl=ttl), ttl, None)


async def test_least_recently_used_goes_first() -> None:
    evicted: list[int] = []
    store = MemoryStore(max_bytes=4000, on_evict=evicted.append)
    for name in (b"a", b"b", b"c"):
        await store.write_many([_write(store, name, 1000)])
    await store.get_many([b"a"])
    await store.write_many([_write(store, b"d", 1000)])
    assert [frame is not None for frame in await store.get_many([b"a", b"b", b"c", b"d"])] == [True, False, True, True]
    assert evicted == [1]


async def test_an_entry_that_can_never_fit_is_full_and_replaces_nothing_else() -> None:
    store = MemoryStore(max_bytes=4000)
    await store.write_many([_write(store, b"a", 1000)])
    (outcome,) = await store.write_many([_write(store, b"b", 5000)])
    assert getattr(outcome, "kind", None) == "full"
    assert (await store.get_many([b"a"]))[0] is not None


async def test_expired_entries_make_room_without_being_read() -> None:
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    for n in range(100):
        await store.write_many([_write(store, b"old%d" % n, 10, ttl=1.0)])
    clock.advance(2.0)
    for n in range(100):
        await store.write_many([_write(store, b"new%d" % n, 10)])
    assert (await store.info())["expired_keys"] == 0
