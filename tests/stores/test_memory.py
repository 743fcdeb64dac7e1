"""MemoryStore: the conformance suite, and what is its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

from mcp_hub_cache._changes import Changes
from mcp_hub_cache._protocols import Fence, Store, Write
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock, StoreConformance, entry_frame


class _View(MemoryStore):
    """A second instance over the same dict, as two caches of one process have it."""

    def __init__(self, other: MemoryStore) -> None:
        super().__init__(clock=other.now)
        self._entries = other._entries
        self._planted = other._planted
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


async def test_what_was_used_elsewhere_is_not_the_oldest() -> None:
    clock = FakeClock()
    store = MemoryStore(max_bytes=4000, clock=clock)
    for name in (b"a", b"b", b"c"):
        await store.write_many([_write(store, name, 1000)])
    await store.used_many([b"a", b"none"])
    await store.write_many([_write(store, b"d", 1000)])
    assert [frame is not None for frame in await store.get_many([b"a", b"b", b"c", b"d"])] == [True, False, True, True]
    clock.advance(61.0)
    stamp = store.stamp(b"a")
    await store.used_many([b"a"])  # not there any more
    assert store.stamp(b"a") == stamp
    assert await store.get_many([b"a"]) == [None]


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


async def test_placeholders_take_no_room_and_are_no_entries() -> None:
    store = MemoryStore(max_bytes=1000)
    begun = [store.begin(b"loading%d" % n, 10.0) for n in range(100)]
    assert (await store.info())["total_keys"] == 0
    await store.write_many([_write(store, b"other", 500)])
    assert store.write(_write(store, b"loading0", 10)._replace(fence=begun[0].fence)) == "done"
    assert (await store.info())["total_keys"] == 2
    assert {key async for page in store.scan(b"loading") for key, _ in page} == {b"loading%d" % n for n in range(100)}


async def test_expired_placeholders_do_not_heap_up() -> None:
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    for n in range(100):
        store.begin(b"old%d" % n, 10.0)
    clock.advance(11.0)
    for n in range(100):
        assert store.begin(b"new%d" % n, 10.0).leader
    assert len([key async for page in store.scan(b"") for key, _ in page]) == 100
    assert not store._holds(b"old0", Fence(store.id, b"x"))
    assert len(store._planted) == 100


async def _filled(count: int) -> MemoryStore:
    store = MemoryStore()
    for n in range(count):
        await store.write_many([_write(store, b"k%d" % n, 10)])
    return store


async def _turns(work: Awaitable[object]) -> tuple[object, int]:
    """What *work* comes to, and how many turns of the loop others had meanwhile."""
    task = asyncio.ensure_future(work)
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    return task.result(), turns


async def test_what_goes_over_all_entries_leaves_the_loop_its_turns() -> None:
    store = await _filled(1000)
    facts, turns = await _turns(store.info())
    assert isinstance(facts, dict)
    assert facts["total_keys"] == 1000
    assert turns >= 9
    count, turns = await _turns(store.clear(b"k"))
    assert count == 1000
    assert turns >= 9
    assert await store.info() == {"total_keys": 0, "expired_keys": 0, "total_bytes": 0}


async def test_a_clear_takes_what_was_there_whatever_is_written_meanwhile() -> None:
    store = await _filled(1000)
    clearing = asyncio.ensure_future(store.clear(b"k"))
    written = 0
    while not clearing.done():
        await store.write_many([_write(store, b"new%d" % written, 10), _write(store, b"other%d" % written, 10)])
        written += 1
        await asyncio.sleep(0)
    assert await clearing == 1000
    assert await store.get_many([b"k%d" % n for n in range(1000)]) == [None] * 1000
    assert (await store.info())["total_keys"] == 2 * written


async def test_a_listing_has_what_is_there_throughout() -> None:
    store = await _filled(1000)
    found: list[bytes] = []
    turn = 0
    async for page in store.scan(b"k"):
        assert len(page) <= 100
        found += [key for key, _ in page]
        await store.delete_many([b"k%d" % n for n in range(turn * 10, turn * 10 + 5)])
        await store.write_many([_write(store, b"k%d" % n, 20) for n in range(500, 600)])  # replaced, and moved
        await store.write_many([_write(store, b"later%d.%d" % (turn, n), 10) for n in range(100)])
        turn += 1
    assert {b"k%d" % n for n in range(500, 1000)} <= set(found)
    assert len(found) == len(set(found))
