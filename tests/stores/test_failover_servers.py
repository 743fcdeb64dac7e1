"""FailoverStore as it is used: a real server that is killed, stopped and restarted, and a folder."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mcp_hub_cache._exceptions import StoreAuthError, StoreError
from mcp_hub_cache._frame import Kind, unpack, unpack_head
from mcp_hub_cache._lines import Lines
from mcp_hub_cache._protocols import Coherent, Store, Write
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import StoreConformance, entry_frame
from tests.backends import poll
from tests.servers import Server, valkey_server

A, B, C = b"mcp_hub:t:e:a", b"mcp_hub:t:e:b", b"mcp_hub:t:e:c"


@pytest.fixture
def server() -> Iterator[Server]:
    """One whose data outlive a kill -9."""
    with valkey_server("--appendonly", "yes", "--appendfsync", "always", tcp=False) as server:
        yield server


@pytest.fixture
async def store(server: Server, tmp_path: Path) -> AsyncIterator[FailoverStore]:
    store = _store(server, tmp_path / "cache")
    yield store
    await store.aclose()


def _store(server: Server, folder: Path, *, timeout: float = 0.4) -> FailoverStore:
    return FailoverStore(RedisStore(server.url, timeout=timeout), FileStore(folder), probe_after=0.05, probe_max=0.2)


async def _until(store: FailoverStore, state: str) -> None:
    async with asyncio.timeout(20):
        while store.state().state != state:
            await asyncio.sleep(0.005)


async def _set(store: Store, key: bytes, payload: bytes) -> None:
    assert list(await store.write_many([Write(key, entry_frame(store, key, payload), 60.0, None)])) == ["done"]


async def _get(store: Store, key: bytes) -> bytes | None:
    (frame,) = await store.get_many([key])
    return None if frame is None else bytes(unpack(frame, key).payload)


def _files(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x89MHC")


class TestConformance(StoreConformance):
    @asynccontextmanager
    async def open_pair(self) -> AsyncIterator[tuple[Store, Store]]:
        with valkey_server(tcp=False) as server, tempfile.TemporaryDirectory() as folder:
            yield _store(server, Path(folder), timeout=5.0), _store(server, Path(folder), timeout=5.0)

    async def wait_coherent(self, store: Coherent, key: bytes) -> bool:
        await poll(lambda: store.stamp(key) is not None)
        return True


async def test_away_at_the_start_and_back_by_itself(server: Server, store: FailoverStore, tmp_path: Path) -> None:
    server.kill()
    begun = time.monotonic()
    assert await _get(store, A) is None
    assert time.monotonic() - begun < 1.0
    await _set(store, A, b"1")
    assert await _get(store, A) == b"1"
    assert _files(tmp_path) == 2  # the entry, and what the server has still to be told
    with pytest.raises(StoreError):
        await store.ping()
    server.start()
    await _until(store, "healthy")
    assert _files(tmp_path) == 0
    await _set(store, A, b"2")
    assert server.command("EXISTS", A) == 1
    assert await _get(store, A) == b"2"


async def test_killed_at_run_time_and_nothing_deleted_comes_back(server: Server, store: FailoverStore) -> None:
    for key in (A, B, C):
        await _set(store, key, b"old")
    server.kill()
    assert Path(server.folder, "appendonlydir").is_dir()
    for _ in range(5):
        await store.delete_many([A])
        await _set(store, B, b"new")
        assert await _get(store, B) == b"new"
    assert store.state().state == "degraded"
    server.start()
    while server.command("INFO", "persistence").count(b"loading:1"):
        await asyncio.sleep(0.005)
    await _until(store, "healthy")
    assert [await _get(store, A), await _get(store, B), await _get(store, C)] == [None, None, b"old"]


async def test_stopped_and_gone_on_what_was_in_doubt_is_undone(server: Server, store: FailoverStore) -> None:
    """The server executes on waking what it was sent before."""
    for key in (A, B, C):
        await _set(store, key, b"old")
    server.pause()
    try:
        await asyncio.gather(store.delete_many([A]), _set(store, B, b"in doubt"), _get(store, C))
        while store.state().state == "healthy":
            await _get(store, C)
        begun = time.monotonic()
        for _ in range(100):
            await _get(store, B)
        assert time.monotonic() - begun < 1.0
    finally:
        server.resume()
    await _until(store, "healthy")
    assert [await _get(store, A), await _get(store, B), await _get(store, C)] == [None, None, b"old"]
    assert server.command("EXISTS", A, B) == 0


async def test_a_blip_below_the_threshold_is_made_up_for(server: Server, store: FailoverStore) -> None:
    await _set(store, A, b"old")
    server.pause()
    try:
        await store.delete_many([A])
    finally:
        server.resume()
    assert store.state().state == "healthy"
    assert await _get(store, A) is None
    await _set(store, A, b"new")
    async with asyncio.timeout(10):
        while len(store._journal):
            await asyncio.sleep(0.005)
    assert await _get(store, A) == b"new"


async def test_wrong_password_until_it_is_put_right(tmp_path: Path) -> None:
    with valkey_server(password="other") as server:
        store = _store(server, tmp_path)
        for _ in range(3):
            with pytest.raises(StoreAuthError, match="REDIS_PASSWORD"):
                await _get(store, A)
        assert store.state().state == "misconfigured"
        assert _files(tmp_path) == 0
        server.command("CONFIG", "SET", "requirepass", "")
        await _until(store, "healthy")
        server.password = None
        await _set(store, A, b"1")
        assert await _get(store, A) == b"1"
        await store.aclose()


async def test_killed_and_restarted_under_load(server: Server, store: FailoverStore) -> None:
    """Forty workers through the lines, three kills: no error reaches anybody, and no replaced value comes back."""
    lines = Lines(asyncio.get_running_loop(), store.lane, deadline=5.0)
    get, write, delete, over = store.get_many, store.write_many, store.delete_many, False
    done = 0

    async def worker(number: int) -> None:
        nonlocal done
        key, turn = b"mcp_hub:load:e:%d" % number, 0
        while not over:
            turn += 1
            frame = entry_frame(store, key, b"%d" % turn)
            assert await lines.write(write, key, Write(key, frame, 60.0, None), len(frame)) == "done"
            got = await lines.read(get, key, key)
            assert got is None or bytes(unpack(got, key).payload) == b"%d" % turn
            await lines.write(delete, key, key)
            assert await lines.read(get, key, key) is None
            done += 1

    workers = [asyncio.ensure_future(worker(number)) for number in range(40)]
    for _ in range(3):
        await _until(store, "healthy")
        before = done
        async with asyncio.timeout(20):
            while done < before + 100:
                await asyncio.sleep(0.005)
        server.kill()
        await _until(store, "degraded")
        server.start()
    await _until(store, "healthy")
    over = True
    await asyncio.gather(*workers)
    await lines.aclose()
    heads = [head async for page in store.scan(b"mcp_hub:") for _, head in page]
    assert [head for head in heads if unpack_head(head).kind == Kind.ENTRY] == []


def test_a_second_loop_while_it_is_away(server: Server, tmp_path: Path) -> None:
    store = _store(server, tmp_path)

    async def first() -> None:
        await _set(store, A, b"old")
        server.kill()
        for _ in range(3):
            await store.delete_many([A])
        assert store.state().state == "degraded"

    async def second() -> None:
        assert store.state().state == "degraded"
        server.start()
        assert await _get(store, A) is None
        await _until(store, "healthy")
        assert await _get(store, A) is None
        assert server.command("EXISTS", A) == 0
        await store.aclose()

    asyncio.run(first(), debug=True)
    asyncio.run(second(), debug=True)
