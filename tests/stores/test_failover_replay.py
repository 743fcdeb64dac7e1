"""A server that takes the place of another: what is made up for on it, and what may stay."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
import pytest_asyncio

from mcp_hub_cache._protocols import Write
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.memory import MemoryStore
from tests.stores.failing import A, B, C, Make, payload_of, worlds

D = b"mcp_hub:t:e:d"


@pytest_asyncio.fixture
async def world() -> AsyncIterator[Make]:
    async with worlds() as make:
        yield make


async def test_deletes_of_the_last_minute_are_made_again_on_another_server(world: Make) -> None:
    w = world(recent=60.0)
    w.store._keeper.stopwatch  # noqa: B018  # what belongs to this loop
    await w.set(A, b"1")
    frame = w.server._entries[A]
    await w.set(B, b"1")
    await w.store.delete_many([B])
    w.clock.advance(61)
    await w.store.delete_many([A])
    w.server._entries[A] = w.server._entries[B] = frame  # a replica that had not heard of the deletes is promoted
    w.store._keeper.replaced()
    assert await w.get(A) is None
    await w.caught_up()
    assert A not in w.server._entries
    assert B in w.server._entries  # older than that


async def test_so_are_clears(world: Make) -> None:
    w = world()
    await w.set(A, b"1")
    w.clock.advance(61)
    (frame,) = await w.server.get_many([A])
    assert frame is not None
    await w.store.clear(b"mcp_hub:t:")
    for _ in range(2):  # the next one may not have heard of what was made up for either
        await w.server.write_many([Write(A, frame, None, None)])
        w.store._keeper.replaced()
        assert await w.get(A) is None
        await w.caught_up()
        assert A not in w.server._entries


@pytest.mark.parametrize("replayed", [False, True])
async def test_nor_does_what_was_cleared_on_two_servers_by_halves(
    world: Make, monkeypatch: pytest.MonkeyPatch, *, replayed: bool
) -> None:
    w = world()
    await w.set(A, b"1")
    w.clock.advance(61)
    (frame,) = await w.server.get_many([A])
    assert frame is not None
    clear = w.server.clear

    async def half_way(prefix: bytes) -> int:
        monkeypatch.setattr(w.server, "clear", clear)
        count = await clear(prefix)
        await w.server.write_many([Write(A, frame, None, None)])  # another has it still, and clears the rest
        w.store._keeper.replaced()
        return count

    if replayed:
        await w.go_down()
        await w.store.clear(b"mcp_hub:t:")
    monkeypatch.setattr(w.server, "clear", half_way)
    if replayed:
        await w.come_back()
    else:
        await w.store.clear(b"mcp_hub:t:")
    assert await w.get(A) is None
    await w.caught_up()
    assert A not in w.server._entries


async def _got(store: FailoverStore) -> set[bytes]:
    frames = await store.get_many([A, B, C, D])
    return {key for key, frame in zip([A, B, C, D], frames, strict=True) if frame is not None}


async def _heads(store: FailoverStore) -> set[bytes]:
    heads = await store.head_many([A, B, C, D])
    return {key for key, head in zip([A, B, C, D], heads, strict=True) if head is not None}


async def _listed(store: FailoverStore) -> set[bytes]:
    return {key async for page in store.scan(b"mcp_hub:") for key, _ in page}


@pytest.mark.parametrize("found", [_got, _heads, _listed])
async def test_what_was_there_before_a_set_does_not_come_back_either(
    world: Make, found: Callable[[FailoverStore], Awaitable[set[bytes]]]
) -> None:
    """The set itself is lost with the former server; what a load has stored says nothing of what was there before."""
    w = world()
    w.store._keeper.stopwatch  # noqa: B018  # what belongs to this loop
    for key in (A, B, C, D):
        await w.set(key, b"old")
    w.clock.advance(61)
    before = dict(w.server._entries)
    for key in (A, C, D):
        await w.set(key, b"new")
    (begun,) = await w.store.begin_many([B], hold=10)
    assert await w.set(B, b"loaded", fence=begun.fence) == "done"
    w.clock.advance(1)
    newer = Write(D, w.frame(D, b"newer"), None, None)
    for _ in range(2):  # another server, and another
        w.server._entries |= {key: before[key] for key in (A, B) if key in w.server._entries}
        assert await w.server.write_many([newer]) == ["done"]  # by somebody else
        w.store._keeper.replaced()
        assert await found(w.store) == {B, C, D}
        await w.caught_up()
        assert [await w.get(key) for key in (A, B, C, D)] == [None, b"old", b"new", b"newer"]
        assert A not in w.server._entries


async def test_what_is_to_be_checked_is_checked_for_who_wants_to_begin_or_write_it(world: Make) -> None:
    w = world()
    w.store._keeper.stopwatch  # noqa: B018  # what belongs to this loop
    for key in (A, B, C):
        await w.set(key, b"old")
    before = dict(w.server._entries)
    for key in (A, B):
        await w.set(key, b"new")
    w.server._entries[A] = before[A]
    w.store._keeper.replaced()
    begun = await w.store.begin_many([A, B, C], hold=10)
    assert [payload_of(one.frame) for one in begun] == [None, b"new", b"old"]
    assert [one.leader for one in begun] == [True, False, False]
    assert await w.set(A, b"loaded", fence=begun[0].fence) == "done"
    await w.caught_up()
    assert [await w.get(key) for key in (A, B, C)] == [b"loaded", b"new", b"old"]


@pytest.mark.parametrize("half_way", [False, True])
async def test_what_is_deleted_while_it_is_checked_stays_so(
    world: Make, monkeypatch: pytest.MonkeyPatch, *, half_way: bool
) -> None:
    """On the next server, too."""
    w = world()
    w.store._keeper.stopwatch  # noqa: B018  # what belongs to this loop
    await w.set(A, b"new")
    before = dict(w.server._entries)
    head_many = w.server.head_many

    async def found(keys: Sequence[bytes]) -> list[bytes | None]:
        monkeypatch.setattr(w.server, "head_many", head_many)
        heads = await head_many(keys)
        await w.store.delete_many([A])
        return heads

    if half_way:
        monkeypatch.setattr(w.server, "head_many", found)
    w.store._keeper.replaced()
    if not half_way:
        await w.store.delete_many([A])
    await w.caught_up()
    w.server._entries |= before
    w.store._keeper.replaced()
    assert await w.get(A) is None
    await w.caught_up()
    assert w.server._entries == {}


async def test_what_must_go_is_not_checked(world: Make) -> None:
    w = world()
    w.store._keeper.stopwatch  # noqa: B018  # what belongs to this loop
    await w.set(A, b"new")
    await w.set(B, b"new")
    w.primary.break_down()
    w.store._keeper.note([A])
    w.store._keeper.replaced()
    w.store._keeper.note([B])
    assert w.store._journal.doubts([A, B]).heads == {}
    await w.come_back()
    await w.caught_up()
    assert w.server._entries == {}


async def test_what_is_remembered_is_bounded(world: Make) -> None:
    w = world(max_journal=3)
    recent = w.store._keeper._replay.recent
    three = [b"mcp_hub:t:e:%d" % number for number in range(3)]
    for more in (0, 10):
        await w.store.delete_many([b"mcp_hub:t:e:more%d" % number for number in range(more)])
        assert len(recent._keys) <= 6
        await w.store.delete_many(three)
        await w.store.delete_many([A, three[0]])
        await w.set(A)
        deleted, heads, _ = recent.take()
        assert (deleted, list(heads)) == ([three[2], three[0]], [A])
        assert recent.take() == ([], {}, [])
    for number in range(300):
        await w.store.clear(b"mcp_hub:%d:" % number)
    assert len(recent.take()[2]) == 256
    w.store._journal.check({b"%d" % number: b"head" for number in range(5)})
    assert list(w.store._journal.unchecked(10, lambda _: True)) == [b"2", b"3", b"4"]


async def test_the_primary_is_asked_to_say_that_it_is_another_one() -> None:
    class Told(MemoryStore):
        on_replaced = None

    primary = Told()
    store = FailoverStore(primary, None)
    assert primary.on_replaced == store._keeper.replaced
