"""The journal that survives its process, and the deletes that a server's successor may not have."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from mcp_hub_cache._exceptions import StoreFullError, StoreUnreachableError
from mcp_hub_cache._protocols import Outcome, Write
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.memory import MemoryStore
from tests.stores.failing import A, B, C, Make, World, worlds


@pytest_asyncio.fixture
async def world() -> AsyncIterator[Make]:
    async with worlds() as make:
        yield make


def _restart(w: World, **options: Any) -> None:
    """Let the process end without a word, and another one begin on the same server and standby."""
    w.store._keeper._sessions.get()
    options = {"clock": w.clock, "on_state": w._heard, "probe_after": 3600.0, "probe_max": 3600.0} | options
    w.store = FailoverStore(w.primary, w.files, **options)


def _pages(w: World) -> list[bytes]:
    return [key for key in w.files._entries if key.startswith(b"~")]


async def _end(store: FailoverStore) -> None:
    """What a process that is killed does not do; the tests' own tasks must end."""
    await store._keeper._sessions.aclose()


async def test_a_delete_made_while_the_primary_was_away_survives_the_process(world: Make) -> None:
    w = world()
    await w.set(A, b"old")
    await w.set(B, b"kept")
    await w.go_down()
    await w.store.delete_many([A])
    await _end(w.store)
    w.primary.repair()
    _restart(w)
    assert await w.get(A) is None  # the very first read
    assert await w.get(B) == b"kept"
    await w.caught_up()
    assert await w.on_server(A) is None
    assert _pages(w) == []


async def test_so_do_a_failed_set_and_a_clear(world: Make) -> None:
    w = world()
    await w.set(A, b"old")
    await w.set(B, b"old")
    w.primary.break_down(StoreFullError("on command."))
    with pytest.raises(StoreFullError):
        await w.set(A, b"new")
    w.primary.repair()
    await w.go_down()
    await w.store.clear(b"mcp_hub:t:e:b")
    await _end(w.store)
    w.primary.repair()
    _restart(w)
    assert await w.store.get_many([A, B]) == [None, None]
    await w.caught_up()
    assert (await w.on_server(A), await w.on_server(B)) == (None, None)


async def test_a_set_that_failed_but_was_not_waited_for_is_written_down_too(world: Make) -> None:
    w = world()
    await w.contact()
    w.primary.break_down()
    await w.store.delete_many([A])  # below the threshold
    assert len(_pages(w)) == 1


async def test_overflow_survives_as_one_note(world: Make) -> None:
    w = world(max_journal=3)
    for key in (A, B, C):
        await w.set(key, b"old")
    await w.go_down()
    for number in range(5):
        await w.store.delete_many([b"mcp_hub:t:e:%d" % number])
    await _end(w.store)
    w.primary.repair()
    _restart(w)
    assert await w.store.get_many([A, B, C]) == [None, None, None]
    await w.caught_up()
    assert await w.on_server(C) is None
    assert _pages(w) == []


async def test_many_pages_become_one(world: Make) -> None:
    w = world()
    await w.go_down()
    for number in range(200):
        await w.store.delete_many([b"mcp_hub:t:e:%d" % number])
        assert len(_pages(w)) <= 65
    await _end(w.store)
    _restart(w)
    await w.store._keeper.get_ready()
    assert len(w.store._journal) == 200


async def test_a_neighbours_notes_are_read_before_the_primary_is_believed_again(world: Make) -> None:
    """Two processes on one standby: what one deleted while both were cut off, the other does not see again."""
    w = world()
    await w.set(A, b"old")
    other = FailoverStore(w.primary, w.files, clock=w.clock, probe_after=3600.0, probe_max=3600.0)
    assert await other.get_many([A]) != [None]
    await w.go_down()
    for _ in range(3):
        await other.get_many([A])
    await w.store.delete_many([A])
    w.primary.repair()
    await other.ping()
    async with asyncio.timeout(5):
        while other.state().state != "healthy":
            await asyncio.sleep(0)
    assert await other.get_many([A]) == [None]
    assert await w.on_server(A) is None
    await other.aclose()


async def test_caches_on_another_server_leave_the_pages_alone(world: Make) -> None:
    w = world(journal="one:6379/0")
    await w.set(A, b"old")
    await w.go_down()
    await w.store.delete_many([A])
    await _end(w.store)
    w.primary.repair()
    other = FailoverStore(MemoryStore(clock=w.clock), w.files, clock=w.clock, journal="another:6379/0")
    await other.get_many([A])
    await other.aclose()
    assert len(_pages(w)) == 1
    _restart(w, journal="one:6379/0")
    assert await w.get(A) is None


async def test_a_damaged_page_may_have_said_anything(world: Make) -> None:
    w = world()
    await w.set(A, b"old")
    await w.set(B, b"old")
    await w.go_down()
    await w.store.delete_many([A])
    await _end(w.store)
    (page,) = _pages(w)
    frame, until = w.files._entries[page]
    w.files._entries[page] = (frame[:-1] + bytes([frame[-1] ^ 1]), until)
    w.primary.repair()
    _restart(w)
    assert await w.store.get_many([A, B]) == [None, None]
    await w.caught_up()
    assert await w.on_server(A) is None


async def test_a_standby_that_takes_no_pages_costs_the_promise_and_nothing_else(
    world: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()
    await w.set(A, b"old")
    await w.go_down()
    write_many = w.files.write_many

    async def full(writes: Sequence[Write]) -> list[Outcome]:
        if writes[0].key.startswith(b"~"):
            return [StoreFullError("no room.")] * len(writes)
        return list(await write_many(writes))

    monkeypatch.setattr(w.files, "write_many", full)
    for _ in range(3):
        await w.store.delete_many([A])
    assert [record.levelno for record in caplog.records if "journal" in record.getMessage()] == [logging.WARNING]
    assert await w.get(A) is None
    await w.come_back()
    assert await w.on_server(A) is None


async def test_a_standby_that_fails_at_the_start_keeps_nobody_waiting(
    world: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()

    async def broken(_: bytes) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        raise StoreUnreachableError("there is no disk.")
        yield []

    monkeypatch.setattr(w.files, "scan", broken)
    await w.set(A, b"there")
    assert await w.get(A) == b"there"
    assert "journal" in caplog.text


# A server that takes the place of another


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
    (frame,) = await w.server.get_many([A])
    assert frame is not None
    await w.store.clear(b"mcp_hub:t:")
    await w.server.write_many([Write(A, frame, None, None)])
    w.store._keeper.replaced()
    assert await w.get(A) is None
    await w.caught_up()
    assert A not in w.server._entries


async def test_what_is_remembered_is_bounded(world: Make) -> None:
    w = world(max_journal=3)
    await w.store.delete_many([b"mcp_hub:t:e:%d" % number for number in range(3)])
    await w.store.delete_many([A])
    assert w.store._keeper._recent.take() == ([A], [])


async def test_the_primary_is_asked_to_say_that_it_is_another_one() -> None:
    class Told(MemoryStore):
        on_replaced = None

    primary = Told()
    store = FailoverStore(primary, None)
    assert primary.on_replaced == store._keeper.replaced
