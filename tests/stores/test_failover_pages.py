"""The journal that survives its process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from mcp_hub_cache._exceptions import StoreFullError, StoreUnreachableError
from mcp_hub_cache._protocols import Outcome, Write
from mcp_hub_cache.stores import _failover_pages, _failover_standby
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.memory import MemoryStore
from tests.stores.failing import A, B, C, Make, Primary, World, worlds


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


async def _delete_and_end(w: World) -> None:
    """Delete A, and leave B, while the primary is away, and end without a word; then the primary is there again."""
    await w.set(A, b"old")
    await w.set(B, b"kept")
    await w.go_down()
    await w.store.delete_many([A])
    await _end(w.store)
    w.primary.repair()


async def test_a_delete_made_while_the_primary_was_away_survives_the_process(world: Make) -> None:
    w = world()
    await _delete_and_end(w)
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
    await other.get_many([A])
    await w.noticed(other)
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


async def test_pages_that_could_not_be_read_are_asked_for_until_they_can(
    world: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    w = world()
    await _delete_and_end(w)
    _restart(w, probe_after=0.001, probe_max=0.004)
    errors: list[Exception] = [
        StoreUnreachableError("no."),
        RuntimeError("a defect of it"),
        StoreUnreachableError("no."),
    ]
    scan = w.files.scan

    def broken(prefix: bytes) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        if errors:
            raise errors.pop(0)
        return scan(prefix)

    monkeypatch.setattr(w.files, "scan", broken)
    stamp = w.store.stamp(A)
    assert await w.get(A) == b"old"  # who can't know has to believe
    async with asyncio.timeout(10):
        while await w.get(A) is not None:
            await asyncio.sleep(0.001)
    assert w.store.stamp(A) != stamp or stamp is None
    await w.caught_up()
    assert (errors, await w.on_server(A), await w.get(B)) == ([], None, b"kept")
    assert caplog.text.count("unexpected error while reading the journal") == 1
    assert not w.store._keeper._is_needed()
    # It stays, since a standby that has failed may not take what its notes have become, and goes with the next process.
    assert len(_pages(w)) == 1
    await _end(w.store)
    _restart(w)
    assert await w.get(B) == b"kept"
    await w.caught_up()
    assert _pages(w) == []


async def test_closing_ends_the_reading_whatever_it_is_at(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """``asyncio.wait_for`` loses a cancellation that meets its end on 3.11: it was asked for without end."""

    async def broken(_: bytes) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        await asyncio.sleep(0)
        raise StoreUnreachableError("there is no disk.")
        yield []

    for turns in range(40):
        w = world()
        monkeypatch.setattr(w.files, "scan", broken)
        _restart(w, probe_after=1e-9, probe_max=1e-9)
        assert await w.get(A) is None
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await w.store.aclose()


# Cut off, or in doubt


async def _page_is_written(w: World) -> None:
    async with asyncio.timeout(5):
        while not _pages(w):
            await asyncio.sleep(0)


async def test_a_note_of_a_call_that_was_cancelled_is_written_down(world: Make) -> None:
    """Nobody is left who could wait for it, and the next look at the primary is an hour away."""
    w = world()
    assert await w.get(A) is None
    w.primary.hang.clear()
    deleting = asyncio.ensure_future(w.store.delete_many([A]))
    for _ in range(3):
        await asyncio.sleep(0)
    deleting.cancel()
    await asyncio.gather(deleting, return_exceptions=True)
    await _page_is_written(w)
    w.primary.repair()


async def test_so_is_that_of_a_write_whose_failure_nobody_hears_of(world: Make) -> None:
    w = world()
    await w.contact()
    assert await w.store.get_many([A]) == [None]
    w.primary.hang.clear()
    writing = asyncio.ensure_future(w.store.write_many([Write(A, w.frame(A), 600.0, None)]))
    for _ in range(3):
        await asyncio.sleep(0)
    writing.cancel()
    w.primary.break_down()
    w.primary.hang.set()
    await _page_is_written(w)


async def test_so_is_that_of_a_server_that_is_full(world: Make) -> None:
    w = world()
    await w.contact()
    w.primary.break_down(StoreFullError("on command."))
    with pytest.raises(StoreFullError):
        await w.set(A, b"new")
    await _page_is_written(w)


async def test_so_is_what_fails_because_the_store_is_closed(world: Make) -> None:
    class Closing(Primary):
        async def aclose(self) -> None:
            self.break_down()
            self.hang.set()
            for _ in range(5):
                await asyncio.sleep(0)

    w = world(kind=Closing)
    await w.contact()
    assert await w.store.get_many([A]) == [None]
    w.primary.hang.clear()
    writing = asyncio.ensure_future(w.store.write_many([Write(A, w.frame(A), 600.0, None)]))
    for _ in range(3):
        await asyncio.sleep(0)
    await w.store.aclose()
    await asyncio.gather(writing, return_exceptions=True)
    assert len(_pages(w)) == 1
    assert len(asyncio.all_tasks()) == 1


async def test_a_standby_that_hangs_keeps_no_primary_away(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_failover_pages, "_PATIENCE", 0.05)
    monkeypatch.setattr(_failover_standby, "_PATIENCE", 0.05)
    w = world()
    await w.contact()

    async def hang(*_: Any) -> Any:
        await asyncio.Event().wait()

    write_many = w.files.write_many

    async def write(writes: Sequence[Write]) -> list[Outcome]:
        return list(await (hang() if writes[0].key.startswith(b"~") else write_many(writes)))

    monkeypatch.setattr(w.files, "write_many", write)
    monkeypatch.setattr(w.files, "clear", hang)
    await w.go_down()
    await w.store.delete_many([A])
    await w.come_back()


async def test_a_standby_that_fails_unexpectedly_is_read_again(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    w = world()

    def broken(_: bytes) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        raise RuntimeError("a defect of it")

    with monkeypatch.context() as patched:
        patched.setattr(w.files, "scan", broken)
        with pytest.raises(RuntimeError):
            await w.get(A)
    assert await w.get(A) is None


async def test_a_caller_at_the_first_contact_is_cancelled_alone(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    w = world()
    gate, scan = asyncio.Event(), w.files.scan

    async def slow(prefix: bytes) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        await gate.wait()
        async for page in scan(prefix):
            yield page

    monkeypatch.setattr(w.files, "scan", slow)
    callers = [asyncio.create_task(w.get(A)) for _ in range(5)]
    await asyncio.sleep(0)
    callers[0].cancel()
    callers[3].cancel()
    await asyncio.sleep(0)
    gate.set()
    answers = await asyncio.gather(*callers, return_exceptions=True)
    assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [True, False, False, True, False]


async def test_a_caller_at_the_first_contact_hears_that_the_store_is_closed(
    world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an error: he was not cancelled himself."""
    w = world()

    async def hang(_: bytes) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        await asyncio.Event().wait()
        yield []

    monkeypatch.setattr(w.files, "scan", hang)
    caller = asyncio.create_task(w.get(A))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await w.store.aclose()
    with pytest.raises(StoreUnreachableError):
        await caller
