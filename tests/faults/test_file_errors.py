"""What a disk may do: a set fails soft, a get is a miss, it is counted and told with its cure, and it passes by itself.

By system calls that the kernel is made to fail (strace), folders in which files can't be opened, full disks and limits
at the level of a cache; what the store itself answers then is in ``tests/stores/test_file.py``.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mcp_hub_cache import Cache, FileCache
from mcp_hub_cache.stores._file_places import Places
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.testing import FakeClock
from tests.backends import poll
from tests.faults.children import needs_root, needs_strace, run, temps


def file_of(folder: Path, key: str) -> Path:
    place = Places(b"mcp_hub:").place(b"mcp_hub:default:e:" + key.encode())
    return folder / "mcp_hub_cache" / place.space / place.name[:2] / place.name


INJECTED = """
import asyncio, json, os, sys
from mcp_hub_cache import Cache, FileCache
async def main():
    async with FileCache(sys.argv[1], durable=sys.argv[2] == "durable", l1_max_entries=0, timeout=20) as cache:
        os.path.exists("/begin")
        seen = []
        for turn in range(8):
            if sys.argv[3] == "delete":
                await cache.delete("bad")
            elif sys.argv[3] == "set":
                await cache.set("bad", "new")
            seen.append(await cache.get("bad"))
            assert await cache.get("good") in ("good", None)
        await cache.set_many({"bad": "final", "good": "final"})
        seen.append(await cache.get("bad"))
        print(json.dumps({"seen": seen, "errors": cache.stats.errors}))
asyncio.run(main())
"""

# What does: which calls fail on which of the entry's paths, how, and what is then counted and said.
FAULTS = {
    "a read that fails": ("get", "openat,openat2", "file", "EIO", "other", "Check that disk"),
    "a stale handle": ("get", "openat,openat2", "file", "ESTALE", "other", "mount"),
    "no handles": ("get", "openat,openat2", "file", "EMFILE", "exhausted", "ulimit -n"),
    "no room for the bytes": ("set", "write", "temp", "ENOSPC", "full", "CACHE_MAX_BYTES"),
    "a quota": ("set", "write", "temp", "EDQUOT", "full", "Free room"),
    "bytes that can't be written": ("set", "write", "temp", "EIO", "other", "Check that disk"),
    "bytes that can't be synced": ("set", "fsync", "temp", "EIO", "other", "Check that disk"),
    "a name that can't be taken": ("set", "rename,renameat,renameat2", "shelf", "EIO", "other", "Check that disk"),
    "a shelf on a stale handle": ("set", "openat", "shelf", "ESTALE", "other", "mount"),
    "no locks": ("set", "flock", "shelf", "ENOLCK", "misconfigured", "no locks"),
    "a delete that fails": ("delete", "unlink,unlinkat", "shelf", "EIO", "other", "Check that disk"),
    "a read-only mount": ("delete", "unlink,unlinkat", "shelf", "EROFS", "readonly", "Mount it writable"),
    "counters that can't be read": ("set", "pread64", "counters", "EIO", "other", "Check that disk"),
    "counters that can't be written": ("set", "pwrite64", "counters", "ENOSPC", "full", "Free room"),
}


def inject(tmp_path: Path, calls: str, path: str, how: str, does: str) -> tuple[dict[str, object], str]:
    """What a child reports whose *calls* on that *path* of an entry go wrong, and what it logs."""
    place = file_of(tmp_path, "bad")
    paths = {
        "file": [place],
        "temp": [place.with_name(f".{place.name}.tmp")],
        "shelf": [place.parent],
        "counters": [place.parents[1] / "counters"],
    }[path]
    options = [option for each in paths for option in ("-P", str(each))]
    options += ["-o", str(tmp_path / "log"), "-e", f"trace={calls}", "-e", f"inject={calls}:{how}"]
    done = run(INJECTED, tmp_path, "durable" if calls == "fsync" else "default", does, strace=options, python=())
    assert done.returncode == 0, done.stderr
    assert re.search(r"\((INJECTED|DELAYED)\)", (tmp_path / "log").read_text()), "nothing went wrong"
    return json.loads(done.stdout), done.stderr


async def store_old(folder: Path) -> None:
    async with FileCache(folder, timeout=30) as cache:
        await cache.set_many({"bad": "old", "good": "good"})


@needs_strace
@pytest.mark.parametrize("fault", FAULTS)
async def test_calls_that_fail(tmp_path: Path, fault: str) -> None:
    """Row: I/O error, no file handles, read-only, stale handle. They pass after three of them."""
    does, calls, path, error, kind, cure = FAULTS[fault]
    await store_old(tmp_path)
    report, said = await asyncio.to_thread(inject, tmp_path, calls, path, f"error={error}:when=1..3", does)
    seen, errors = report["seen"], report["errors"]
    assert isinstance(seen, list) and isinstance(errors, dict)
    assert seen[-1] == "final"
    assert seen[-2] == {"get": "old", "set": "new", "delete": None}[does]
    assert set(seen) <= {"old", "new", "final", None}
    assert set(errors) == {kind}
    assert error in said and cure in said
    assert said.count("\n") <= 3  # once, not per call
    assert not temps(tmp_path)


@needs_strace
@pytest.mark.parametrize(("calls", "path"), [("openat,flock", "shelf"), ("write", "temp"), ("openat", "file")])
async def test_calls_that_are_interrupted_or_slow(tmp_path: Path, calls: str, path: str) -> None:
    """Row: I/O error. A signal in a call, or a disk that takes its time, is no trouble at all."""
    for how in ("error=EINTR:when=1+2", "delay_enter=30000"):
        await store_old(tmp_path)
        report, said = await asyncio.to_thread(inject, tmp_path, calls, path, how, "set")
        assert (report, said) == ({"seen": ["new"] * 8 + ["final"], "errors": {}}, "")
        assert not temps(tmp_path)


def at_once(work: Callable[[], object]) -> float:
    """Seconds that *work* takes in a thread."""
    began = time.monotonic()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return time.monotonic() - began


async def test_a_folder_that_hangs_stalls_nothing_else(tmp_path: Path) -> None:
    """Row: default thread pool stuck. Opens that never return, more than there are threads, as on a dead mount."""
    go_on = threading.Event()
    async with FileCache(tmp_path, l1_max_entries=0, timeout=0.5) as cache:
        await cache.set("k", "v")
        hang = [cache.store._job(go_on.wait) for _ in range(12)]  # type: ignore[attr-defined]
        try:
            loop = asyncio.get_running_loop()
            # What DNS and everybody's to_thread go through.
            async with asyncio.timeout(20):
                await loop.getaddrinfo("localhost", 80)
                assert await asyncio.gather(*(asyncio.to_thread(int, "1") for _ in range(40))) == [1] * 40
                began = time.monotonic()
                await asyncio.gather(*(cache.set(f"k{n}", n) for n in range(50)))
                assert await cache.get_many([f"k{n}" for n in range(50)]) == {}
                assert await cache.get_or_load("loaded", lambda: asyncio.sleep(0, "value")) == "value"
                assert time.monotonic() - began < 15  # a few deadlines, not one for each
            assert cache.stats.errors["timeout"] >= 3
            status = await cache.status()
            assert status.status == "unhealthy" and status.problem is not None
        finally:
            go_on.set()
        await asyncio.wait(hang)

        async def again() -> bool:
            await cache.set("k", "again")
            return bool(await cache.get("k") == "again")

        await poll(again)


async def test_pipes_in_the_place_of_entries(tmp_path: Path) -> None:
    """Row: default thread pool stuck. Nobody ever writes into them, and an open that waits for that would for ever."""
    keys = [f"k{n}" for n in range(40)]
    async with FileCache(tmp_path, l1_max_entries=0, timeout=30) as cache:
        await cache.set_many(dict.fromkeys(keys, "value"))
        for key in keys:
            file_of(tmp_path, key).unlink()
            os.mkfifo(file_of(tmp_path, key))
        async with asyncio.timeout(25):
            assert await cache.get_many(keys) == {}
            assert [await cache.get(key) for key in keys] == [None] * 40
            await cache.set_many(dict.fromkeys(keys, "again"))
            assert await cache.get_many(keys) == {}
            await cache.clear()
        assert cache.stats.errors == {"misconfigured": 40}
        assert all(file_of(tmp_path, key).is_fifo() for key in keys)
        for key in keys:
            file_of(tmp_path, key).unlink()
        await cache.set_many(dict.fromkeys(keys, "again"))
        assert await cache.get_many(keys) == dict.fromkeys(keys, "again")


@contextmanager
def mounted(disk: Path, options: str) -> Iterator[Path]:
    disk.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fill(fillers: Path, lack: str) -> None:
    """Leave no room on that disk."""
    fillers.mkdir(exist_ok=True)
    with pytest.raises(OSError, match="No space"):
        _fill(fillers, lack)


def _fill(fillers: Path, lack: str) -> None:
    for _ in range(1000):
        with (fillers / os.urandom(8).hex()).open("wb", buffering=0) as file:
            while lack == "bytes":
                file.write(bytes(4096))


@pytest.mark.parametrize("lack", ["bytes", "inodes"])
async def test_a_full_disk(tmp_path: Path, lack: str) -> None:
    """Row: disk full. What is there is served, what is new is dropped, deletes go on; a state, and what to do."""
    with mounted(tmp_path / "disk", "size=1m,nr_inodes=120,mode=0700") as disk:
        async with FileCache(disk, l1_max_entries=0, timeout=30) as cache:
            await cache.set_many({f"k{n}": n for n in range(10)})
            fill(disk / "fillers", lack)
            await cache.set_many({f"n{n}": "x" * 20_000 for n in range(10)})
            await cache.set("k1", "x" * 50_000)
            assert await cache.get_or_load("loaded", lambda: asyncio.sleep(0, "value")) == "value"
            assert await cache.get("k1") is None  # nor what was there before it was to be replaced
            assert set(cache.stats.errors) == {"full"}
            assert cache.stats.errors["full"] >= 11
            assert not temps(disk)
            rest = {f"k{n}": n for n in range(10) if n != 1}
            assert await cache.get_many(rest) == rest
            fill(disk / "fillers", lack)
            assert await cache.health_check() is False
            problem = (await cache.status()).problem
            assert problem is not None and "ENOSPC" in problem and "Free room" in problem
            assert await cache.delete("k0")
            shutil.rmtree(disk / "fillers")
            await cache.set("k1", "x" * 50_000)
            assert await cache.get("k1") == "x" * 50_000
            assert await cache.health_check() is True


@needs_root
@pytest.mark.skipif(shutil.which("chattr") is None, reason="chattr is not here")
async def test_a_folder_that_is_made_immutable(tmp_path: Path) -> None:
    """Row: read-only. Root's rights don't matter; what is there is served."""
    async with FileCache(tmp_path, l1_max_entries=0, timeout=30) as cache:
        await cache.set("k", "old")
        shelf = file_of(tmp_path, "k").parent
        if subprocess.run(["chattr", "+i", shelf], check=False, capture_output=True).returncode:
            pytest.skip("this file system has no immutable folders")
        try:
            await cache.set("k", "new")
            assert await cache.delete("k") is False
            assert await cache.get("k") == "old"
            assert set(cache.stats.errors) == {"permission"}
        finally:
            subprocess.run(["chattr", "-i", shelf], check=True)
        assert not temps(tmp_path)
        assert await cache.delete("k") is True


def counted() -> tuple[int, int]:
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count handles")
async def test_handles_and_threads_stay_as_many_with_faults(tmp_path: Path) -> None:
    """Thousands of operations, half of them with trouble: no handles, strangers, a tree that is deleted, timeouts."""
    keys = [f"k{n}" for n in range(20)]
    async with FileCache(tmp_path, l1_max_entries=0, timeout=30) as cache:

        async def round_of_faults(turn: int) -> None:
            await cache.set_many(dict.fromkeys(keys, turn))
            await cache.get_many(keys)
            match turn % 5:
                case 0:
                    before = resource.getrlimit(resource.RLIMIT_NOFILE)
                    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
                    try:
                        await asyncio.gather(*(cache.set(key, 1) for key in keys), *(cache.get(key) for key in keys))
                        await cache.delete_many(keys)
                        await cache.clear()
                    finally:
                        resource.setrlimit(resource.RLIMIT_NOFILE, before)
                case 1:
                    for key in keys[:5]:
                        file_of(tmp_path, key).unlink()
                        file_of(tmp_path, key).mkdir()
                    await cache.set_many(dict.fromkeys(keys, turn))
                    await cache.status()
                    for key in keys[:5]:
                        file_of(tmp_path, key).rmdir()
                case 2:
                    (tmp_path / "mcp_hub_cache").rename(tmp_path / "deleted")  # at once: writers may still be at it
                    await cache.get_many(keys)
                    shutil.rmtree(tmp_path / "deleted", ignore_errors=True)
                case 3:
                    calls = [asyncio.create_task(cache.set(key, "x" * 9_000)) for key in keys]
                    await asyncio.sleep(0)
                    for call in calls:
                        call.cancel()
                    await asyncio.gather(*calls, return_exceptions=True)
                    await cache.get_many(keys)
                case 4:
                    os.truncate(tmp_path / "mcp_hub_cache" / "default" / "counters", turn)
                    await cache.delete_many(keys)

        for turn in range(10):
            await round_of_faults(turn)
        files, threads = counted()
        for turn in range(60):
            await round_of_faults(turn)

        def no_more() -> bool:
            now = counted()
            return now[0] <= files + 4 and now[1] <= threads + 4  # threads come with a slow disk, and go again

        await poll(no_more)
        assert sum(cache.stats.errors.values()) > 500
    assert not temps(tmp_path)


async def test_a_clock_that_jumps(tmp_path: Path) -> None:
    """Row: clock jumps. Never beyond the time of the write plus ttl, whatever other clocks said meanwhile."""
    clock = FakeClock()
    async with Cache(FileStore(tmp_path, clock=clock), timeout=30) as cache:
        store = cache.store
        assert isinstance(store, FileStore)
        written = clock()
        await cache.set("k", "v", ttl=100)
        for after, there in ((-50_000, {None, "v"}), (50, {"v"}), (-1, {None, "v"}), (99, {"v"}), (100, {None})):
            clock.time = written + after
            assert await cache.get("k") in there, after
            await store.sweep()
        clock.time = written + 50
        assert await cache.get("k") is None  # swept is gone
