"""What others have put into the folder, or made of it: never followed, never deleted, never trusted.

Entries' places taken by links, folders and pipes, and a root of another kind or user: ``tests/stores/test_file.py``.
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from mcp_hub_cache import FileCache
from mcp_hub_cache.stores._file_places import Places
from mcp_hub_cache.stores.file import FileStore
from tests.backends import poll
from tests.faults.children import clean, needs_root, run


def opened(folder: Path) -> FileCache:
    return FileCache(folder, l1_max_entries=0, timeout=30)


def file_of(folder: Path, key: str) -> Path:
    place = Places(b"mcp_hub:").place(b"mcp_hub:default:e:" + key.encode())
    return folder / "mcp_hub_cache" / place.space / place.name[:2] / place.name


async def fails_soft(cache: FileCache, kind: str) -> None:
    """Nothing is stored, nothing is raised, loads go on; each is counted."""
    before = cache.stats.errors.get(kind, 0)
    await cache.set("k", "new")
    assert await cache.get("k") is None
    assert cache.stats.errors[kind] > before
    assert await cache.delete("k") is False

    async def load() -> str:
        return "loaded"

    assert await cache.get_or_load("k", load) == "loaded"


async def works(cache: FileCache) -> None:
    await cache.set("k", "again")
    assert await cache.get("k") == "again"
    assert await cache.delete("k") is True


async def test_a_root_that_anybody_may_write_is_refused(tmp_path: Path) -> None:
    """Others could have planted anything in it; with the group's rights it is ours to tighten."""
    async with opened(tmp_path) as cache:
        await cache.set("k", "old")
    root = tmp_path / "mcp_hub_cache"
    root.chmod(0o777)
    async with opened(tmp_path) as cache:
        assert await cache.get("k") is None
        await fails_soft(cache, "permission")
        status = await cache.status()
        assert status.status == "misconfigured"
        assert status.problem is not None and "777" in status.problem and "Remove it" in status.problem
        assert stat.S_IMODE(root.stat().st_mode) == 0o777
        root.chmod(0o750)
        await works(cache)
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        assert (await cache.status()).status == "healthy"


@needs_root
async def test_a_root_that_becomes_another_users_is_noticed(tmp_path: Path) -> None:
    """It is looked at again where it is another one, not only when it is first used."""
    async with opened(tmp_path) as cache:
        await cache.set("k", "old")
        root = tmp_path / "mcp_hub_cache"
        root.rename(tmp_path / "moved away")
        root.mkdir()
        os.chown(root, 65534, 65534)
        await fails_soft(cache, "permission")
        assert list(root.iterdir()) == []
        problem = (await cache.status()).problem
        assert problem is not None and "belongs to user 65534" in problem and "CACHE_DIR" in problem
        root.rmdir()
        (tmp_path / "moved away").rename(root)
        assert await cache.get("k") == "old"
        await works(cache)


@pytest.mark.parametrize("what", ["namespace", "shelf"])
@pytest.mark.parametrize("kind", ["link", "file", "pipe"])
async def test_a_folder_of_ours_replaced(tmp_path: Path, what: str, kind: str) -> None:
    """By a link to a whole cache of somebody else's, for instance, which must not be written, nor taken away."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    async with opened(theirs) as cache:
        await cache.set_many({"k": "theirs", **{str(n): n for n in range(20)}})
    async with opened(ours) as cache:
        await cache.set("k", "ours")
        there = file_of(ours, "k").parent if what == "shelf" else file_of(ours, "k").parents[1]
        aside = tmp_path / "aside"
        there.rename(aside)
        match kind:
            case "link":
                target = file_of(theirs, "k")
                there.symlink_to(target.parent if what == "shelf" else target.parents[1])
                target.unlink()  # a read would look there: links in a folder of mode 0700 are this user's own
            case "file":
                there.write_bytes(b"precious")
            case "pipe":
                os.mkfifo(there)
        before = {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()}
        assert await cache.get("k") is None
        await fails_soft(cache, "misconfigured")
        await cache.clear()
        assert os.path.lexists(there) and there.is_symlink() == (kind == "link")
        there.unlink()
        aside.rename(there)
        await works(cache)
    assert before == {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["socket", "hard link", "folder", "link into the cache"])
async def test_an_entrys_place_taken(tmp_path: Path, kind: str) -> None:
    """A hard link is given up, so what it is of is never written."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious" * 100)
    async with opened(tmp_path / "cache") as cache:
        await cache.set("k", "old")
        await cache.set("other", "somebody's")
        place = file_of(tmp_path / "cache", "k")
        place.unlink()
        match kind:
            case "socket":
                with socket.socket(socket.AF_UNIX) as listener:
                    os.chdir(place.parent)
                    listener.bind(place.name)
            case "hard link":
                os.link(outside, place)
            case "folder":
                (place / "mine").mkdir(parents=True)
            case "link into the cache":
                place.symlink_to(file_of(tmp_path / "cache", "other"))
        assert await cache.get("k") is None
        if kind == "hard link":
            await works(cache)
        else:
            await fails_soft(cache, "misconfigured")
            assert os.path.lexists(place)
            if kind == "folder":
                (place / "mine").rmdir()
                place.rmdir()
            else:
                place.unlink()
            await works(cache)
        assert await cache.get("other") == "somebody's"
    assert outside.read_bytes() == b"precious" * 100


@pytest.mark.parametrize("kind", ["file", "link to a folder", "link to nothing"])
async def test_a_shelfs_place_taken(tmp_path: Path, kind: str) -> None:
    """Its entries can't be had; all others can be listed, swept, evicted and cleared."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ("0" * 32)).write_bytes(b"precious")
    async with FileCache(tmp_path / "cache", l1_max_entries=0, timeout=30, max_bytes=200 * 4096) as cache:
        await cache.set("k", "old")
        shelf = file_of(tmp_path / "cache", "k").parent
        shelf.rename(tmp_path / "aside")
        if kind == "file":
            shelf.write_text("mine")
        else:
            shelf.symlink_to(outside if kind == "link to a folder" else tmp_path / "nowhere")
        await fails_soft(cache, "misconfigured")
        status = await cache.status()
        others = [f"k{number}" for number in range(60) if file_of(tmp_path / "cache", f"k{number}").parent != shelf]
        await cache.set_many(dict.fromkeys(others, 1), ttl=60)
        assert {*others} == {key async for key in cache.keys()}  # noqa: SIM118  # it is no dict
        status = await cache.status()
        assert status.total_keys == len(others)
        store = cache.store
        assert isinstance(store, FileStore)
        await cache.set(others[0], 1, ttl=0.001)
        await poll(lambda: _swept(store))
        for number in range(600):
            await cache.set(f"more{number}", 1)
        await poll(lambda: len(list((tmp_path / "cache").rglob("?" * 32))) <= 200)
        assert await cache.clear() > 0
        assert not [key async for key in cache.keys()]  # noqa: SIM118
        assert os.path.lexists(shelf)
    assert [path.read_bytes() for path in outside.iterdir()] == [b"precious"]


async def _swept(store: FileStore) -> bool:
    return await store.sweep() == 1


COUNTERS = """
import asyncio, os, sys
from pathlib import Path
from mcp_hub_cache import FileCache
table = Path(sys.argv[1]) / "mcp_hub_cache/default/counters"
def spoil(how):
    match how:
        case "truncated" | "cut short" | "lengthened":
            os.truncate(table, {"truncated": 0, "cut short": 3000, "lengthened": 1 << 20}[how])
        case "overwritten":
            table.write_bytes(b"precious" * 10)
        case "removed":
            table.unlink()
        case "a link":
            table.unlink()
            table.symlink_to(sys.argv[2])
        case "a folder":
            table.unlink()
            table.mkdir()
        case "a pipe":
            table.unlink()
            os.mkfifo(table)
async def main():
    async with FileCache(sys.argv[1], timeout=20) as cache, FileCache(sys.argv[1], timeout=20) as other:
        for how in sys.argv[3:]:
            await cache.set("k", how)
            assert await cache.get("k") == await cache.get("k") == how  # the second from memory
            spoil(how)
            await cache.get("k")
            if how.startswith("a "):
                await cache.set("k", "lost")
                assert cache.stats.errors["misconfigured"]
                table.rmdir() if how == "a folder" else table.unlink()
            await other.set("k", "new")
            async with asyncio.timeout(20):  # within a second, as where the whole folder is deleted
                while await cache.get("k") != "new":
                    await asyncio.sleep(0.01)
            await other.delete("k")
            assert await cache.get("k") is None, how
            assert table.stat().st_size == 4096 + 65536 * 4
    print("alive")
asyncio.run(main())
"""


def test_the_counters_file_spoilt_while_it_is_in_use(tmp_path: Path) -> None:
    """Truncated ones ended the process by SIGBUS while it was mapped. Nothing old is served from memory."""
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(4096 + 65536 * 4))
    ways = ("truncated", "cut short", "lengthened", "overwritten", "removed", "a link", "a folder", "a pipe")
    done = run(COUNTERS, tmp_path / "cache", outside, *ways)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
    assert outside.read_bytes() == bytes(4096 + 65536 * 4)


DAMAGE = """
import asyncio, os, random, sys
from pathlib import Path
from mcp_hub_cache import FileCache
keys = {f"k{n}": [n] * 50 for n in range(40)}
rng = random.Random(5)
async def main():
    async with FileCache(sys.argv[1], timeout=20) as cache:
        for turn in range(30):
            await cache.set_many(keys)
            for path in Path(sys.argv[1]).rglob("*"):
                if path.is_file() and rng.random() < 0.5:
                    size = path.stat().st_size
                    match rng.randrange(4):
                        case 0: os.truncate(path, 0)
                        case 1: os.truncate(path, rng.randrange(size + 1))
                        case 2: path.write_bytes(rng.randbytes(size))
                        case 3:
                            with path.open("r+b") as file:
                                file.seek(rng.randrange(size or 1))
                                file.write(rng.randbytes(3))
            got = await cache.get_many(keys)
            assert all(keys[key] == value for key, value in got.items())
        await cache.set_many(keys)
        await cache.clear()
        await cache.set_many(keys)
        assert await cache.get_many(keys) == keys
    print("alive")
asyncio.run(main())
"""


def test_every_file_damaged_while_it_is_in_use(tmp_path: Path) -> None:
    """Foreign, truncated, bit-flipped bytes: a miss or the value, whatever they stand in."""
    done = run(DAMAGE, tmp_path, env={"PYTHONASYNCIODEBUG": "0"})
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_a_folder_of_whoever_planted_it_first(tmp_path: Path) -> None:
    """The folder above may be a link: it is the application's own, and leads where its owner wants."""
    (tmp_path / "real").mkdir()
    (tmp_path / "led").symlink_to(tmp_path / "real")
    code = """
import asyncio, sys
from mcp_hub_cache import FileCache
async def main():
    async with FileCache(sys.argv[1], timeout=20) as cache:
        await cache.set("k", 1)
        print(await cache.get("k"))
asyncio.run(main())
"""
    assert clean(run(code, tmp_path / "led")) == "1\n"
    assert (tmp_path / "real" / "mcp_hub_cache" / "CACHEDIR.TAG").is_file()
