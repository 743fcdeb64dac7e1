"""Reads on the event loop: only where nothing has to be waited for, and never otherwise."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mcp_hub_cache._exceptions import StoreError
from mcp_hub_cache._protocols import Write
from mcp_hub_cache.stores import _file_memory
from mcp_hub_cache.stores._file_memory import Memory, NotHereError
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.testing import FakeClock, StoreConformance, entry_frame

KEY = b"mcp_hub:tests:e:k"
SHM = Path("/dev/shm")  # a folder made in it


def served(folder: Path) -> bool:
    file = folder / "probe"
    file.write_bytes(b"x")
    return Memory(str(file)).serves


@pytest.fixture(params=["disk", "tmpfs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "tmpfs" and not SHM.is_dir():
        pytest.skip("no tmpfs here")
    with TemporaryDirectory(dir=SHM if request.param == "tmpfs" else tmp_path) as made:
        if not served(Path(made)):
            pytest.skip("this system or file system can't be asked")
        yield Path(made)


class Counted(FileStore):
    """Counts the jobs that its threads get."""

    jobs = 0

    def _job(self, work: object, *args: object) -> asyncio.Future[object]:  # type: ignore[override]
        self.jobs += 1
        return super()._job(work, *args)  # type: ignore[arg-type]


@asynccontextmanager
async def filled(folder: Path, payload: bytes = b"1", clock: FakeClock | None = None) -> AsyncIterator[Counted]:
    """A store with one entry that has been read before, so that its use is noted."""
    store = Counted(folder) if clock is None else Counted(folder, clock=clock)
    try:
        frame = entry_frame(store, KEY, payload, ttl=60.0)
        assert await store.write_many([Write(KEY, frame, 60.0, None)]) == ["done"]
        assert await store.get_many([KEY]) == [frame]
        store.jobs = 0
        yield store
    finally:
        await store.aclose()


async def test_a_lone_read_of_what_is_in_memory_needs_no_thread(folder: Path) -> None:
    async with filled(folder) as store:
        for _ in range(3):
            assert await store.get_many([KEY]) != [None]
        assert store.jobs <= 1  # a second may have ended meanwhile
        await store.get_many([KEY, KEY])
        assert store.jobs >= 1


async def test_use_is_noted_once_a_second_and_on_a_disk_by_a_thread(folder: Path) -> None:
    async with filled(folder) as store:
        place = store._folder.place(KEY)
        file = store._folder.file(place)
        os.utime(file, ns=(0, os.stat(file).st_mtime_ns))  # noqa: PTH116
        store._batches._reads._since = -1.0
        await store.get_many([KEY])
        assert os.stat(file).st_atime_ns > 0  # noqa: PTH116
        table = store._folder.open_table(place.space)
        assert table is not None
        assert store.jobs == (0 if table.memory.holds_all else 1)


async def test_others_have_their_turn_between_reads(folder: Path) -> None:
    async with filled(folder) as store:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        for _ in range(20):
            await store.get_many([KEY])
        counting.cancel()
        assert turns >= 20


async def test_beside_a_thread_that_works_a_lone_read_goes_there_too(folder: Path) -> None:
    async with filled(folder) as store:
        going = threading.Event()
        waiting = store._job(going.wait)
        reading = asyncio.ensure_future(store.get_many([KEY]))
        await asyncio.sleep(0)
        assert store.jobs == 2
        going.set()
        await asyncio.gather(waiting, reading)


async def test_what_would_have_to_be_waited_for_is_read_by_a_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> int:
        raise BlockingIOError

    async with filled(folder) as store:
        monkeypatch.setattr(os, "preadv", busy)
        assert await store.get_many([KEY]) != [None]
        assert store.jobs == 1


async def test_a_large_file_is_read_by_a_thread(folder: Path) -> None:
    async with filled(folder, bytes(100_000)) as store:
        (frame,) = await store.get_many([KEY])
        assert frame is not None
        assert len(frame) > 100_000
        assert store.jobs == 1


async def test_an_expired_file_is_none(folder: Path) -> None:
    clock = FakeClock()
    async with filled(folder, clock=clock) as store:
        clock.advance(61.0)
        assert await store.get_many([KEY]) == [None]


async def test_a_damaged_file_comes_as_it_is(folder: Path) -> None:
    async with filled(folder) as store:
        Path(store._folder.file(store._folder.place(KEY))).write_bytes(b"nonsense")
        assert await store.get_many([KEY]) == [b"nonsense"]


async def test_a_link_is_not_followed(folder: Path) -> None:
    async with filled(folder) as store:
        file = Path(store._folder.file(store._folder.place(KEY)))
        file.rename(folder / "elsewhere")
        file.symlink_to(folder / "elsewhere")
        assert await store.get_many([KEY]) == [None]


async def test_a_reader_who_left_is_not_read_for(folder: Path) -> None:
    async with filled(folder) as store:
        reading = asyncio.ensure_future(store.get_many([KEY]))
        reading.cancel()
        await asyncio.sleep(0)
        assert store.jobs == 0


async def test_a_store_that_is_closed_meanwhile_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(memory: Memory, path: str) -> int:
        raise NotHereError

    async with filled(folder) as store:
        monkeypatch.setattr(Memory, "open", elsewhere)
        reading = asyncio.ensure_future(store.get_many([KEY]))
        await store.aclose()
        with pytest.raises(StoreError, match="closed"):
            await reading


def test_a_system_that_cannot_be_asked_is_not_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_file_memory, "_opener", lambda: lambda _: -38)  # ENOSYS
    memory = Memory(str(folder / "probe"))
    assert not memory.serves
    with pytest.raises(NotHereError):
        memory.open(str(folder / "probe"))


class TestByThreadsAlone(StoreConformance):
    """On a system that can't be asked, all is as it is elsewhere."""

    @pytest.fixture(autouse=True)
    def never(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_file_memory, "_opener", lambda: None)

    @asynccontextmanager
    async def open_pair(self) -> AsyncIterator[tuple[FileStore, FileStore]]:
        with TemporaryDirectory() as folder:
            one, two = FileStore(folder), FileStore(folder)
            for store in (one, two):
                await store.write_many([Write(self.key("warm"), b"", 1.0, None)])
                await store.delete_many([self.key("warm")])
            yield one, two
