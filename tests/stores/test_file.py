"""The file store on real folders: the shared suite, then what only a folder can go wrong with."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import math
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import pytest

from mcp_hub_cache._exceptions import (
    StoreError,
    StoreExhaustedError,
    StoreFullError,
    StoreMisconfiguredError,
    StorePermissionError,
    StoreReadOnlyError,
    StoreTimeoutError,
)
from mcp_hub_cache._frame import HEAD_SIZE, Kind, pack, unpack, unpack_head
from mcp_hub_cache._protocols import Coherent, Fence, Held, Leases, Write
from mcp_hub_cache.stores import _file_upkeep
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.testing import FakeClock, StoreConformance, entry_frame

ROOT = os.geteuid() == 0
SPACE = b"mcp_hub:tests:e:"


def key(name: str | int) -> bytes:
    return SPACE + str(name).encode()


def write(store: FileStore, name: str | int, payload: bytes = b"1", *, ttl: float = 60.0) -> Write:
    return Write(key(name), entry_frame(store, key(name), payload, ttl=ttl), ttl, None)


def file_of(store: FileStore, name: str | int) -> Path:
    place = store._folder.place(key(name))
    return Path(store._folder.path(place.space, place.shelf)) / place.name


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def frames_in(folder: Path) -> list[Path]:
    return [path for path in all_files(folder) if len(path.name) == 32]


def in_one_shelf(store: FileStore, count: int) -> list[str]:
    """Names whose files stand in one shelf."""
    names = (str(n) for n in range(100_000))
    return [name for name in names if store._folder.place(key(name)).shelf == 7][:count]


@asynccontextmanager
async def opened(folder: Path | str, **options: object) -> AsyncIterator[FileStore]:
    store = FileStore(folder, **options)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.aclose()


async def room_made(*stores: FileStore) -> None:
    """Return when no eviction runs: on a busy machine one may take longer than its write waits for it."""
    for store in stores:
        state = store._local.peek()
        if state is not None and state.room is not None:
            await state.room


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def limit(what: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


class TestFileStore(StoreConformance):
    @asynccontextmanager
    async def open_pair(self) -> AsyncIterator[tuple[FileStore, FileStore]]:
        with TemporaryDirectory() as folder:
            one, two = FileStore(folder), FileStore(folder)
            for store in (one, two):  # so that there are stamps from the start
                await store.write_many([Write(self.key("warm"), b"", 1.0, None)])
                await store.delete_many([self.key("warm")])
            yield one, two


# What stands where, and how


async def test_nothing_is_touched_before_the_first_use_nor_made_by_reading(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    async with opened(folder) as store:
        assert isinstance(store, Coherent)
        assert isinstance(store, Leases)
        assert store.stamp(key("a")) is None
        assert await store.get_many([key("a")]) == [None]
        assert await store.delete_many([key("a")]) == [None]
        assert await store.clear(b"") == 0
        assert await store.sweep() == 0
        assert [page async for page in store.scan(b"")] == []
        assert (await store.info())["total_files"] == 0
        assert not folder.exists()
        await store.write_many([write(store, "a")])
        assert folder.exists()


async def test_layout(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write_many([write(store, "a")])
        (file,) = frames_in(tmp_path)
        assert file.parent.parent == tmp_path / "mcp_hub_cache" / "tests"
        assert file.name.startswith(file.parent.name)
        tag = tmp_path / "mcp_hub_cache" / "CACHEDIR.TAG"
        assert tag.read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
async def test_modes_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    folder = tmp_path / "not" / "there"
    with umask(mask):
        async with opened(folder) as store:
            assert await store.write_many([write(store, n) for n in range(20)]) == ["done"] * 20
            await store.begin_many([key("loading")], hold=5.0)
            assert None not in await store.get_many([key(n) for n in range(20)])
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_the_applications_own_folder_keeps_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    folder.mkdir()
    folder.chmod(0o755)
    async with opened(folder) as store:
        await store.write_many([write(store, "a")])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    ours = folder / "mcp_hub_cache"
    ours.chmod(0o775)  # as a volume's fsGroup leaves it
    async with opened(folder) as store:
        await store.get_many([key("a")])
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "odd",
    [b"..", b".", b"CACHEDIR.TAG", b"cachedir.tag", b"a/b", b"", b"x" * 65, b"n\0l", "ä".encode(), b"../../etc"],
)
async def test_no_path_comes_from_a_key(tmp_path: Path, odd: bytes) -> None:
    async with opened(tmp_path) as store:
        name = b"mcp_hub:" + odd + b":e:key"
        assert await store.write_many([Write(name, entry_frame(store, name), 60.0, None)]) == ["done"]
        (file,) = frames_in(tmp_path)
        assert file.parent.parent.name == "_other"
        assert [k async for page in store.scan(b"mcp_hub:" + odd + b":") for k, _ in page] == [name]
        assert [k async for page in store.scan(b"mcp_hub:" + odd) for k, _ in page] == [name]
        assert await store.clear(b"mcp_hub:" + odd + b":") == 1


async def test_keys_of_other_prefixes_are_kept_apart(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        names = [b"elsewhere:1", b"mcp_hub:a:e:1", b"mcp_hub:ab:e:1", b"mcp_hub:_other:e:1"]
        await store.write_many([Write(name, entry_frame(store, name), 60.0, None) for name in names])

        async def keys(prefix: bytes) -> list[bytes]:
            return sorted([found async for page in store.scan(prefix) for found, _ in page])

        assert await keys(b"") == sorted(names)
        assert await keys(b"m") == sorted(names)[1:]
        assert await keys(b"mcp_hub:a") == names[1:3]
        assert await keys(b"mcp_hub:a:") == names[1:2]
        assert await keys(b"else") == names[:1]
        assert await store.clear(b"mcp_hub:_other:") == 1
        assert await store.clear(b"mcp_hub:") == 2
        assert await keys(b"") == names[:1]


# Strangers in the folder


async def test_links_and_foreign_files_are_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    async with opened(tmp_path / "cache", max_bytes=200_000) as store:
        await store.write_many([write(store, n) for n in range(5)])
        linked, folder, pipe = file_of(store, 0), file_of(store, 1), file_of(store, 2)
        linked.unlink()
        linked.symlink_to(outside)
        folder.unlink()
        folder.mkdir()
        pipe.unlink()
        os.mkfifo(pipe)
        foreign = linked.parent / "README"
        foreign.write_text("mine")
        temp = linked.parent / f".{linked.name}.tmp"
        temp.symlink_to(outside)
        names = [key(n) for n in range(3)]
        assert await store.get_many(names) == [None] * 3
        assert await store.head_many(names) == [None] * 3
        assert await store.delete_many(names) == [None] * 3
        for outcome in await store.write_many([write(store, n) for n in range(3)]):
            assert isinstance(outcome, StoreMisconfiguredError)
        with pytest.raises(StoreMisconfiguredError):
            await store.begin_many([key(4), key(0), key("new")], hold=30.0)
        # What that call had planted beside the failure is not left for others to wait for.
        assert await store.get_many([key("new")]) == [None]
        await store.sweep()
        await store.write_many([write(store, f"big{n}", bytes(20_000)) for n in range(20)])
        await store.clear(b"")
        assert linked.is_symlink()
        assert temp.is_symlink()
        assert folder.is_dir()
        assert pipe.is_fifo()
        assert foreign.read_text() == "mine"
        assert outside.read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["link", "file"])
async def test_a_root_that_is_no_folder_of_ours(tmp_path: Path, kind: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = tmp_path / "mcp_hub_cache"
    root.symlink_to(elsewhere) if kind == "link" else root.write_bytes(b"")
    async with opened(tmp_path) as store:
        for call in (store.get_many([key(1)]), store.write_many([write(store, 1)]), store.ping(), store.info()):
            with pytest.raises(StorePermissionError, match="CACHE_DIR"):
                await call
        assert list(elsewhere.iterdir()) == []


@pytest.mark.skipif(not ROOT, reason="giving a folder to another user takes root")
async def test_a_root_of_another_user(tmp_path: Path) -> None:
    root = tmp_path / "mcp_hub_cache"
    root.mkdir()
    os.chown(root, 65534, 65534)
    async with opened(tmp_path) as store:
        with pytest.raises(StorePermissionError, match="belongs to user 65534"):
            await store.get_many([key(1)])
        with pytest.raises(StorePermissionError):
            await store.ping()


async def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    blocked = tmp_path / "cache"
    blocked.write_bytes(b"")
    async with opened(blocked) as store:
        with pytest.raises(StoreMisconfiguredError):
            await store.get_many([key(1)])
        with pytest.raises(StoreMisconfiguredError):
            await store.ping()


async def test_a_huge_stranger_does_not_fill_the_memory(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write_many([write(store, "a")])
        os.truncate(file_of(store, "a"), 1 << 40)
        (got,) = await store.get_many([key("a")])
        assert got is not None
        assert len(got) == HEAD_SIZE


# Damage and age


async def test_the_sweep_takes_what_has_expired(tmp_path: Path) -> None:
    clock = FakeClock()
    async with opened(tmp_path, clock=clock) as store:
        await store.write_many([write(store, f"short{n}", ttl=10) for n in range(30)])
        await store.write_many([write(store, f"long{n}", ttl=1000) for n in range(20)])
        await store.write_many([write(store, "ever", ttl=math.inf)])
        await store.begin_many([key("loading")], hold=2000.0)
        facts = await store.info()
        assert {k: facts[k] for k in ("total_files", "expired_files", "total_keys")} == {
            "total_files": 52,
            "expired_files": 0,
            "total_keys": 51,
        }
        assert facts["cache_dir"] == str(tmp_path)
        assert facts["total_bytes"] == sum(path.stat().st_size for path in frames_in(tmp_path))
        clock.advance(11)
        facts = await store.info()
        assert (facts["expired_files"], facts["total_keys"]) == (30, 21)
        before = store.stamp(key("short1"))
        assert await store.sweep() == 30
        assert store.stamp(key("short1")) != before
        assert len(frames_in(tmp_path)) == 22
        assert await store.sweep() == 0
        assert store._folder.usage() == 22 * 4096


async def test_the_background_sweeps_by_itself(tmp_path: Path) -> None:
    clock = FakeClock()
    async with opened(tmp_path, clock=clock, sweep_interval=0.05) as store:
        await store.write_many([write(store, n, ttl=10) for n in range(10)])
        clock.advance(11)
        async with asyncio.timeout(10):
            while frames_in(tmp_path):
                await asyncio.sleep(0.02)


async def test_hints_alone_delete_nothing(tmp_path: Path) -> None:
    """A copied or touched folder has other times; what the heads say stands."""
    async with opened(tmp_path) as store:
        await store.write_many([write(store, n) for n in range(5)])
        for file in frames_in(tmp_path):
            os.utime(file, (1, 1))
        assert await store.sweep() == 0
        assert (await store.info())["total_keys"] == 5
        assert None not in await store.get_many([key(n) for n in range(5)])


async def test_damaged_files_go_after_a_day_newer_ones_stay(tmp_path: Path) -> None:
    clock = FakeClock()
    async with opened(tmp_path, clock=clock) as store:
        await store.write_many([write(store, name, ttl=10) for name in ("bits", "cut", "newer", "empty")])
        bits = bytearray(file_of(store, "bits").read_bytes())
        bits[20] ^= 1
        newer = bytearray(pack(key("newer"), b"", token=bytes(8), created=0.0, fresh_until=1.0, keep_until=1.0))
        newer[4] = 99
        newer[60:64] = crc32(newer[:60]).to_bytes(4, "little")
        for name, data in (("bits", bits), ("cut", bits[:30]), ("newer", newer), ("empty", b"")):
            facts = file_of(store, name).stat()
            file_of(store, name).write_bytes(data)
            os.utime(file_of(store, name), ns=(facts.st_atime_ns, facts.st_mtime_ns))
        got = await store.get_many([key(name) for name in ("bits", "cut", "newer", "empty")])
        assert got == [bytes(bits), bytes(bits[:30]), bytes(newer), b""]
        clock.advance(80_000)
        assert await store.sweep() == 0
        clock.advance(10_000)
        assert await store.sweep() == 3
        assert frames_in(tmp_path) == [file_of(store, "newer")]
        # A clear of the namespace takes what can't be read as well, and counts it as no entry.
        assert await store.clear(b"mcp_hub:tests:") == 0
        assert frames_in(tmp_path) == []


async def test_a_dead_writers_leftovers_are_found_by_the_next_writer(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        a, b, c = in_one_shelf(store, 3)
        await store.write_many([write(store, a), write(store, b)])
        await other.get_many([key(a)])
        table = store._folder.open_table("tests")
        assert table is not None
        # As a writer leaves it that dies between its first step and its last:
        bucket = int(file_of(store, a).name[:4], 16)
        table.begin(bucket)
        orphan = file_of(store, a).with_name(f".{file_of(store, a).name}.tmp")
        orphan.write_bytes(b"half")
        table.set_usage(7, 12345)
        assert other.stamp(key(a)) is None  # nobody trusts what was read meanwhile
        await other.write_many([write(other, c)])
        assert not orphan.exists()
        assert other.stamp(key(a)) is not None
        assert other._folder.usage() == 3 * 4096


async def test_a_dead_writers_leftovers_are_found_by_the_sweep(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write_many([write(store, "a")])
        orphan = file_of(store, "a").with_name(f".{'0' * 32}.tmp")
        orphan.write_bytes(b"half")
        await store.sweep()
        assert not orphan.exists()
        assert (await store.get_many([key("a")]))[0] is not None


@pytest.mark.parametrize("damage", ["gone", "short", "foreign", "empty"])
async def test_a_damaged_table_is_made_anew(tmp_path: Path, damage: str) -> None:
    async with opened(tmp_path) as store:
        await store.write_many([write(store, "a")])
    table = tmp_path / "mcp_hub_cache" / "tests" / "counters"
    whole = table.read_bytes()
    match damage:
        case "gone":
            table.unlink()
        case "short":
            os.truncate(table, 1000)
        case "foreign":
            table.write_bytes(b"\0" * len(whole))
        case "empty":
            table.write_bytes(b"")
    async with opened(tmp_path) as store:
        assert (await store.get_many([key("a")]))[0] is not None
        assert store.stamp(key("a")) is None
        assert await store.write_many([write(store, "b")]) == ["done"]
        assert store.stamp(key("a")) is not None
        assert len(table.read_bytes()) == len(whole)
        await store.sweep()
        assert store._folder.usage() == 2 * 4096


async def test_a_table_made_anew_repeats_no_stamp(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write_many([write(store, "b")])
        before = store.stamp(key("never written"))
        (tmp_path / "mcp_hub_cache" / "tests" / "counters").unlink()
        await store.write_many([write(store, "b")])
        assert before is not None
        assert store.stamp(key("never written")) not in (None, before)


async def test_no_stamp_outlives_a_reopening(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write_many([write(store, "a")])
        before = store.stamp(key("a"))
        await store.aclose()
        assert store.stamp(key("a")) is None
        await store.get_many([key("a")])
        assert store.stamp(key("a")) not in (None, before)


async def test_the_folder_is_deleted_by_hand_while_open(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    async with opened(folder) as store, opened(folder) as other:
        await store.write_many([write(store, n) for n in range(10)])
        await other.get_many([key(1)])
        before = other.stamp(key(1))
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        assert await store.get_many([key(1)]) == [None]
        assert await store.delete_many([key(1)]) == [None]
        assert await store.write_many([write(store, 1, b"new")]) == ["done"]
        (begun,) = await store.begin_many([key(2)], hold=5.0)
        assert begun.leader
        (got,) = await other.get_many([key(1)])
        assert got is not None
        assert bytes(unpack(got, key(1)).payload) == b"new"
        assert other.stamp(key(1)) not in (None, before)


async def test_a_deleted_folder_is_noticed_without_any_call(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    async with opened(folder) as store:
        await store.write_many([write(store, 1)])
        before = store.stamp(key(1))
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        assert before is not None
        async with asyncio.timeout(10):
            await store.changed(key(1), before)


async def test_the_folder_is_deleted_again_and_again_under_writers(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    stop = threading.Event()

    def deleter() -> None:
        while not stop.is_set():
            subprocess.run(["rm", "-rf", str(folder)], check=False, stderr=subprocess.DEVNULL)

    thread = threading.Thread(target=deleter)
    async with opened(folder) as store:
        thread.start()
        try:
            for turn in range(100):
                for outcome in await store.write_many([write(store, n, b"%d" % turn) for n in range(4)]):
                    assert outcome == "done" or isinstance(outcome, StoreError)
                for n, frame in enumerate(await store.get_many([key(n) for n in range(4)])):
                    assert frame is None or unpack(frame, key(n))
        finally:
            stop.set()
            thread.join()
        assert await store.write_many([write(store, 1)]) == ["done"]


# Room


async def test_the_least_recently_used_go_first_in_exact_order(tmp_path: Path) -> None:
    dropped: list[tuple[int, int]] = []
    loop_thread = threading.get_ident()
    async with opened(
        tmp_path, max_bytes=20 * 4096, on_evict=lambda n: dropped.append((n, threading.get_ident()))
    ) as store:
        for n in range(20):
            await store.write_many([write(store, n)])
        used = [3, 0, 11]
        for n in used:
            await store.get_many([key(n)])
        await store.head_many([key(1)])  # looking at a head is no use
        assert dropped == []
        expected = [n for n in range(20) if n not in used] + used
        await store.write_many([write(store, "over")])
        await room_made(store)
        # 21 blocks where 20 are allowed: down to nine tenths, 18.
        left = await store.get_many([key(n) for n in range(20)])
        assert [n for n, frame in enumerate(left) if frame is None] == sorted(expected[:3])
        assert (await store.get_many([key("over")]))[0] is not None
        assert dropped == [(3, loop_thread)]
        assert store._folder.usage() == 18 * 4096


async def test_what_was_used_elsewhere_is_not_the_oldest(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=20 * 4096) as store:
        for n in range(20):
            await store.write_many([write(store, n)])
        facts = file_of(store, 3).stat()
        await store.used_many([key(n) for n in (3, 0, 11)] + [key("none")])
        assert file_of(store, 3).stat().st_mtime_ns == facts.st_mtime_ns  # says when it ends
        await store.write_many([write(store, "over")])
        await room_made(store)
        left = await store.head_many([key(n) for n in range(20)])
        assert [n for n, head in enumerate(left) if head is None] == [1, 2, 4]


async def test_uses_are_noted_once_a_second_and_only_of_files(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write_many([write(store, "a"), write(store, "b"), write(store, "c")])
        os.utime(file_of(store, "a"), ns=(0, 0))
        await store.used_many([key("a")])
        first = file_of(store, "a").stat().st_atime_ns
        assert first > 0
        await store.used_many([key("a")])
        assert file_of(store, "a").stat().st_atime_ns == first
        file_of(store, "b").unlink()
        file_of(store, "b").symlink_to(file_of(store, "a"))
        file_of(store, "c").unlink()
        file_of(store, "c").mkdir()
        await store.used_many([key("b"), key("c")])


async def test_uses_that_can_not_be_noted_for_want_of_files_are_an_error(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write_many([write(store, "a")])
        await store.used_many([key("b")])
        with limit(resource.RLIMIT_NOFILE, 1), pytest.raises(StoreExhaustedError):
            await store.used_many([key("a")])


async def test_placeholders_are_not_evicted_and_expired_ones_go_first(tmp_path: Path) -> None:
    clock = FakeClock()
    dropped: list[int] = []
    async with opened(tmp_path, max_bytes=20 * 4096, clock=clock, on_evict=dropped.append) as store:
        (begun,) = await store.begin_many([key("loading")], hold=600.0)
        await store.write_many([write(store, n, ttl=1000) for n in range(15)])
        await store.write_many([write(store, f"short{n}", ttl=10) for n in range(4)])
        clock.advance(20)
        await store.write_many([write(store, "over", ttl=1000)])
        await room_made(store)
        assert None not in await store.get_many([key(n) for n in range(15)])
        assert dropped == []
        fenced = write(store, "loading")._replace(fence=begun.fence)
        assert await store.write_many([fenced]) == ["done"]


async def test_placeholders_without_an_end_are_evicted_like_entries(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=20 * 4096) as store:
        begun = await store.begin_many([key(f"mark{n}") for n in range(10)], hold=math.inf)
        await store.renew_many([Held(key("mark0"), begun[0].fence)], hold=math.inf)
        await store.write_many([write(store, n) for n in range(20)])
        await room_made(store)
        assert await store.head_many([key(f"mark{n}") for n in range(10)]) == [None] * 10
        assert (await store.get_many([key(19)]))[0] is not None


async def test_an_entry_larger_than_the_bound(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=40_000) as store:
        await store.write_many([write(store, "a", b"old")])
        (full, done) = await store.write_many([write(store, "a", bytes(50_000)), write(store, "b")])
        assert isinstance(full, StoreFullError)
        assert done == "done"
        assert [frame is None for frame in await store.get_many([key("a"), key("b")])] == [True, False]


async def test_two_instances_and_two_namespaces_keep_one_bound(tmp_path: Path) -> None:
    bound = 500_000
    async with opened(tmp_path, max_bytes=bound) as one, opened(tmp_path, max_bytes=bound) as two:

        async def writer(store: FileStore, space: str) -> None:
            for turn in range(100):
                names = [f"mcp_hub:{space}:e:{turn}.{n}".encode() for n in range(4)]
                await store.write_many(
                    [Write(name, entry_frame(store, name, bytes(5000)), 60.0, None) for name in names]
                )

        await asyncio.gather(writer(one, "red"), writer(two, "blue"), writer(two, "red"))
        await one.write_many([write(one, "last")])
        await two.write_many([write(two, "last")])
        await room_made(one, two)
        sizes = [path.stat().st_size for path in frames_in(tmp_path)]
        assert sum(sizes) <= bound
        assert sum(-(-size // 4096) * 4096 for size in sizes) <= bound
        assert len(sizes) > 0.8 * bound / 8192
        usage = one._folder.usage()
        await one.sweep()
        assert one._folder.usage() == usage  # the tables had it right


async def test_many_namespaces_take_few_file_handles(tmp_path: Path) -> None:
    names = [f"mcp_hub:space{n}:e:1".encode() for n in range(150)]
    async with opened(tmp_path, max_bytes=1_000_000) as store, opened(tmp_path, max_bytes=1_000_000) as other:
        for name in names:
            await store.write_many([Write(name, entry_frame(store, name), 60.0, None)])
        await other.get_many(names)
        await other.sweep()
        await other.write_many([write(other, "one more")])
        for each in (store, other):
            each._folder.refresh()  # as the background does every second; exact for all but what is open here
            assert each._folder.usage() == 151 * 4096
        if Path("/proc/self/fd").exists():
            assert len(list(Path("/proc/self/fd").iterdir())) < 300
        await other.write_many([write(other, "large", bytes(500_000))])
        await room_made(store, other)
        assert sum(path.stat().st_size for path in frames_in(tmp_path)) <= 1_000_000
        assert len(frames_in(tmp_path)) < 150


async def test_a_wrong_count_is_put_right_instead_of_evicting(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=1_000_000) as store:
        await store.write_many([write(store, n) for n in range(10)])
        table = store._folder.open_table("tests")
        assert table is not None
        table.set_usage(255, 50_000_000)
        await store.write_many([write(store, "more")])
        await room_made(store)
        assert None not in await store.get_many([key(n) for n in range(10)])
        assert store._folder.usage() == 11 * 4096


# Reading and writing many


@pytest.mark.parametrize("size", [0, 1, 64 * 1024 - 200, 64 * 1024, 300_000])
async def test_frames_of_any_size_are_read_whole(tmp_path: Path, size: int) -> None:
    async with opened(tmp_path) as store:
        await store.write_many([write(store, "a", bytes(size))])
        (got,) = await store.get_many([key("a")])
        assert got is not None
        assert bytes(unpack(got, key("a")).payload) == bytes(size)
        os.truncate(file_of(store, "a"), HEAD_SIZE + 5)
        (cut,) = await store.get_many([key("a")])
        assert cut == got[: HEAD_SIZE + 5]  # the engine's to see, and to count


async def test_use_is_noted_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[object] = []
    utime = os.utime

    def count(file: int, *, ns: tuple[int, int]) -> None:
        noted.append(file)
        utime(file, ns=ns)

    async with opened(tmp_path) as store:
        await store.write_many([write(store, n) for n in range(3)])
        before = file_of(store, 1).stat()
        monkeypatch.setattr(os, "utime", count)
        store._batches._reads._since = math.inf  # that second never ends
        for _ in range(5):
            await store.get_many([key(n) for n in range(3)])
        assert len(noted) == 3
        after = file_of(store, 1).stat()
        assert after.st_atime_ns > before.st_atime_ns
        assert after.st_mtime_ns == before.st_mtime_ns
        store._batches._reads._since = 0.0
        await store.get_many([key(1)])
        assert len(noted) == 4


async def test_writes_to_a_slow_disk_go_in_parts_and_keep_their_order(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        store._batches.pace = 1.0
        names = [str(n % 50) for n in range(130)]
        frames = [write(store, name, b"%d" % n) for n, name in enumerate(names)]
        outcomes = await store.write_many([*frames, write(store, "odd")._replace(fence=Fence(store.id, bytes(8)))])
        assert outcomes == ["done"] * 130 + ["refused"]
        last = {name: b"%d" % n for n, name in enumerate(names)}
        for name, frame in zip(last, await store.get_many([key(name) for name in last]), strict=True):
            assert frame is not None
            assert bytes(unpack(frame, key(name)).payload) == last[name]
        assert store._folder.usage() == 50 * 4096


async def test_a_listing_leaves_the_loop_its_turns(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        names = in_one_shelf(store, 250)
        await store.write_many([write(store, name) for name in names])
        pages = [page async for page in store.scan(b"")]
        assert max(len(page) for page in pages) <= 100
        assert sorted(found for page in pages for found, _ in page) == sorted(map(key, names))


async def test_upkeep_is_left_off_after_each_file_or_locked_shelf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_file_upkeep, "_STEP", 0.0)

    def steps(work: _file_upkeep.Steps[Any]) -> tuple[int, Any]:
        for count in itertools.count(1):
            if (result := _file_upkeep.step(work)) is not None:
                return count, result
        raise AssertionError

    async with opened(tmp_path) as store:
        names = in_one_shelf(store, 50)
        await store.write_many([write(store, name) for name in [*names, "elsewhere"]])
        folder = store._folder
        found = _file_upkeep.scan(folder, b"")
        assert [len(_file_upkeep.page(found) or ()) for _ in range(52)] == [1] * 51 + [0]
        assert steps(_file_upkeep.sweep(folder)) == (3, 0)
        count, facts = steps(_file_upkeep.count(folder))
        assert (count, facts["total_keys"], facts["total_files"]) == (52, 51, 51)
        assert steps(_file_upkeep.evict(folder, 0, 0, 1.0)) == (51 + 2 + 1, 51)
        await store.write_many([write(store, name) for name in [*names, "elsewhere"]])
        assert steps(_file_upkeep.clear(folder, b"")) == (3, (51, None))


async def test_room_is_made_ahead_of_a_large_bound(tmp_path: Path) -> None:
    bound = 1 << 26
    async with opened(tmp_path, max_bytes=bound) as store:
        await store.write_many([write(store, n) for n in range(20)])
        table = store._folder.open_table("tests")
        assert table is not None
        table.set_usage(255, bound - bound // 64)  # not over the bound, but near: counted again, and put right
        await store.write_many([write(store, "more")])
        await room_made(store)
        assert store._folder.usage() == 21 * 4096


# Trouble


async def test_a_locked_shelf_times_out_for_its_own_items_only(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        stuck, free = in_one_shelf(store, 1)[0], "free"
        await store.write_many([write(store, stuck, b"old"), write(store, free)])
        holder = os.open(file_of(store, stuck).parent, os.O_RDONLY)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX)
            async with asyncio.timeout(3):
                late, done = await store.write_many([write(store, stuck), write(store, free, b"new")])
                assert isinstance(late, StoreTimeoutError)
                assert done == "done"
                with pytest.raises(StoreTimeoutError):
                    await store.delete_many([key(stuck), key(free)])
                assert await store.get_many([key(free)]) == [None]
                (old,) = await store.get_many([key(stuck)])  # reading takes no lock
                assert old is not None
                assert [k async for page in store.scan(SPACE) for k, _ in page] == [key(stuck)]
                with pytest.raises(StoreTimeoutError):
                    await store.clear(b"")
        finally:
            os.close(holder)
        assert await store.write_many([write(store, stuck)]) == ["done"]


async def test_no_room_on_the_disk(tmp_path: Path) -> None:
    """What a set was to replace goes, in the same job, for nobody may wait for it; what a load was to, stays."""
    async with opened(tmp_path) as store:
        await store.write_many([write(store, "a", b"old"), write(store, "b"), write(store, "c", b"old")])
        (begun,) = await store.begin_many([key("c")], hold=5.0)
        with limit(resource.RLIMIT_FSIZE, 300_000):  # as a full disk does: the file can be made, its bytes don't fit
            writes = [write(store, "a", bytes(400_000)), write(store, "b", b"new"), write(store, "c", bytes(400_000))]
            full, done, refused = await store.write_many([*writes[:2], writes[2]._replace(fence=begun.fence)])
        assert isinstance(full, StoreFullError)
        assert isinstance(refused, StoreFullError)
        assert "old" not in str(full)
        assert done == "done"
        assert len(frames_in(tmp_path)) == 2
        assert not list(tmp_path.rglob("*.tmp"))
        keys = [key(name) for name in "abc"]
        found = await store.get_many(keys)
        assert [f and bytes(unpack(f, k).payload) for f, k in zip(found, keys, strict=True)] == [None, b"new", b"old"]
        assert store.stamp(key("a")) is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=200,mode=0755", "tmpfs", str(disk)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


async def test_a_full_file_system(small_disk: Path) -> None:
    async with opened(small_disk) as store:
        outcomes = [(await store.write_many([write(store, n, bytes(60_000))]))[0] for n in range(20)]
        assert outcomes[0] == "done"
        assert isinstance(outcomes[-1], StoreFullError)
        assert not list(small_disk.rglob("*.tmp"))
        kept = [n for n, outcome in enumerate(outcomes) if outcome == "done"]
        assert None not in await store.get_many([key(n) for n in kept])
        assert await store.clear(b"") == len(kept)
        assert await store.write_many([write(store, 1)]) == ["done"]


async def test_no_inodes_left(small_disk: Path) -> None:
    async with opened(small_disk) as store:
        outcomes = [(await store.write_many([write(store, n)]))[0] for n in range(200)]
        assert isinstance(outcomes[-1], StoreFullError)
        with pytest.raises(StoreFullError):
            await store.begin_many([key(n) for n in range(200, 260)], hold=5.0)
        await store.clear(b"")
        assert await store.write_many([write(store, 1)]) == ["done"]


async def test_a_file_system_too_full_for_the_table(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(1_000_000))
    async with opened(small_disk) as store:
        (outcome,) = await store.write_many([write(store, 1)])
        assert isinstance(outcome, StoreFullError)
        assert store.stamp(key(1)) is None
        (small_disk / "filler").unlink()
        assert await store.write_many([write(store, 1)]) == ["done"]
        assert store.stamp(key(1)) is not None


async def test_a_read_only_file_system_still_serves(small_disk: Path) -> None:
    async with opened(small_disk) as store:
        await store.write_many([write(store, 1)])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    async with opened(small_disk, sweep_interval=0.05) as store:
        assert (await store.get_many([key(1)]))[0] is not None
        assert store.stamp(key(1)) is not None
        (outcome,) = await store.write_many([write(store, 1)])
        assert isinstance(outcome, StoreReadOnlyError)
        with pytest.raises(StoreReadOnlyError):
            await store.ping()
        with pytest.raises(StoreReadOnlyError):
            await store.delete_many([key(1)])
        with pytest.raises(StoreReadOnlyError):
            await store.begin_many([key(2)], hold=1.0)
        assert [k async for page in store.scan(b"") for k, _ in page] == [key(1)]
        assert (await store.info())["total_keys"] == 1


async def test_no_file_handles_left(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write_many([write(store, n) for n in range(3)])
        await store.get_many([key(1)])
        with limit(resource.RLIMIT_NOFILE, 3):
            with pytest.raises(StoreExhaustedError, match="ulimit"):
                await store.get_many([key(1)])
            (outcome,) = await store.write_many([write(store, 1, b"new")])
            assert isinstance(outcome, StoreExhaustedError)
        assert None not in await store.get_many([key(n) for n in range(3)])


AS_NOBODY = """
import asyncio, concurrent.futures.thread, os, sys
from mcp_hub_cache._exceptions import StorePermissionError
from mcp_hub_cache._protocols import Write
from mcp_hub_cache.stores import _file_upkeep
from mcp_hub_cache.stores.file import FileStore
async def main():
    store = FileStore(sys.argv[1])
    os.setegid(65534)
    os.seteuid(65534)
    outcome, = await store.write_many([Write(b"k", b"f", 1.0, None)])
    assert isinstance(outcome, StorePermissionError), outcome
    try:
        await store.ping()
    except StorePermissionError:
        print("refused")
    await store.aclose()
asyncio.run(main())
"""


@pytest.mark.skipif(not ROOT, reason="acting as another user takes root; without it the next test does")
def test_a_folder_that_another_user_may_not_write() -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        done = subprocess.run([sys.executable, "-c", AS_NOBODY, folder], capture_output=True, text=True, check=False)
        assert done.stdout == "refused\n", done.stderr


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
async def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        async with opened(tmp_path) as store:
            (outcome,) = await store.write_many([write(store, 1)])
            assert isinstance(outcome, StorePermissionError)
            with pytest.raises(StorePermissionError):
                await store.ping()
    finally:
        tmp_path.chmod(0o700)


async def test_ping_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.ping()
        assert [path.name for path in all_files(tmp_path)] == ["CACHEDIR.TAG"]


# Event loops, threads, processes


def test_a_second_event_loop_and_no_thread_left(tmp_path: Path) -> None:
    store = FileStore(tmp_path)

    async def first() -> None:
        assert await store.write_many([write(store, 1)]) == ["done"]
        await store.aclose()

    async def second() -> None:
        assert (await store.get_many([key(1)]))[0] is not None
        assert store.stamp(key(1)) is not None
        await store.aclose()

    asyncio.run(first())
    assert store.stamp(key(1)) is None
    asyncio.run(second())
    asyncio.run(second())
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("mcp_hub_cache")]
    for thread in ours:
        thread.join(5)
    assert not any(thread.is_alive() for thread in ours)


async def test_aclose_lets_running_calls_end(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        calls = [asyncio.ensure_future(store.write_many([write(store, n, bytes(10_000))])) for n in range(50)]
        await asyncio.sleep(0)
        await store.aclose()
        assert await asyncio.gather(*calls) == [["done"]] * 50
        assert None not in await store.get_many([key(n) for n in range(50)])


async def test_cancelled_callers_leave_whole_files(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write_many([write(store, n, b"0" * 20_000) for n in range(8)])
        for turn in range(60):
            tasks = [
                asyncio.ensure_future(store.write_many([write(store, n, b"%d" % (turn % 10) * 20_000)]))
                for n in range(8)
            ]
            for _ in range(turn % 7):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for n, frame in enumerate(await store.get_many([key(n) for n in range(8)])):
                assert frame is not None
                assert len(set(bytes(unpack(frame, key(n)).payload))) == 1
        await store.aclose()
        assert not list(tmp_path.rglob("*.tmp"))


async def test_placeholders_are_frames_of_their_key(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.begin_many([key("a")], hold=5.0)
        (head,) = await store.head_many([key("a")])
        assert head is not None
        assert unpack_head(head).kind == Kind.PLACEHOLDER


FORKED = """
import asyncio, os, sys
from mcp_hub_cache._protocols import Write
from mcp_hub_cache.stores import _file_upkeep
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.testing import entry_frame
store = FileStore(sys.argv[1])
async def use(n):
    key = b"mcp_hub:tests:e:%d" % n
    assert await store.write_many([Write(key, entry_frame(store, key), 60.0, None)]) == ["done"]
    assert (await store.get_many([b"mcp_hub:tests:e:0"]))[0]
async def main():
    busy = [asyncio.ensure_future(use(0)) for _ in range(20)]
    await busy[0]
    child = os.fork()
    if not child:
        try:
            asyncio._set_running_loop(None)
            asyncio.run(asyncio.wait_for(use(1), 10))
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    await asyncio.gather(*busy)
    for n in range(50):
        await use(n + 2)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    await store.aclose()
for _ in range(3):
    asyncio.run(main())
"""


def test_a_forked_child_opens_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["0", "0", "0"], done.stderr


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"threads": 0}, {"sweep_interval": 0}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        FileStore(**options)  # type: ignore[arg-type]
