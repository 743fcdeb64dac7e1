"""Power cuts: what ``durable=True`` syncs, in which order, by the kernel's word; nothing is synced without it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mcp_hub_cache import FileCache, open_cache
from mcp_hub_cache._exceptions import StoreError
from mcp_hub_cache._protocols import Write
from mcp_hub_cache.stores import _file_durable, file
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.testing import entry_frame
from tests.faults.children import clean, needs_strace, run

DOES = """
import asyncio, os, sys
from pathlib import Path
from mcp_hub_cache import FileCache
def evict():
    (file,) = Path(sys.argv[1]).rglob("?" * 32)
    file.unlink()
async def main():
    async with FileCache(sys.argv[1], durable=sys.argv[2] == "durable", l1_max_entries=0, timeout=20) as cache:
        await cache.set("old", "before", tags={tags})
        {first}
        os.path.exists("/begin")
        await cache.{does}
        os.path.exists("/end")
        assert cache.stats.errors == {{}}
asyncio.run(main())
"""

LASTING = {
    "set": "set('new', 1)",
    "set over another": "set('old', 'after')",
    "set_many": "set_many({str(n): n for n in range(30)})",
    "touch": "touch('old', 1000)",
    "delete": "delete('old')",
    "invalidate": "invalidate('t')",
    "clear": "clear()",
    "load": "get_or_load('loaded', lambda: asyncio.sleep(0, 5))",
}
FOLDERS_ABOVE = 3 * 4  # namespace, root and the folder it is in, for each part of a batch


class Call(NamedTuple):
    name: str
    paths: list[str]


def calls(tmp_path: Path, does: str, how: str, first: str = "pass") -> list[Call]:
    """The calls between the marks that name something in our folder, in the order in which they ended."""
    log = tmp_path / "log"
    options = ("-yy", "-s", "50", "-o", str(log), "-e", "trace=fsync,fdatasync,write,/rename,/unlink,/stat")
    code = DOES.format(does=does, first=first, tags=["t"] if "invalidate" in does else [])
    clean(run(code, tmp_path / "cache", how, strace=options, python=("-W", "error")))
    found: list[Call] = []
    begun: dict[str, str] = {}
    on = False
    for line in log.read_text(errors="replace").splitlines():
        pid, _, text = line.partition(" ")
        if text.endswith("<unfinished ...>"):
            begun[pid] = text.removesuffix("<unfinished ...>")
            continue
        if "resumed>" in text:
            text = begun.pop(pid) + text.partition("resumed>")[2]
        if '"/begin"' in text or '"/end"' in text:
            on = "begin" in text
        if on and (call := re.match(r" *(fsync|fdatasync|write|rename|unlink)\w*\((.*)\) += \d", text)):
            names = re.findall(r"<(/[^>]*)>(?:, \"([0-9a-f.tmp]{32,37})\")?", call[2])
            paths = [f"{path}/{name}" if name else path for path, name in names]
            if any("mcp_hub_cache" in path for path in paths):
                found.append(Call(call[1], paths))
    return found


@needs_strace
@pytest.mark.parametrize("work", LASTING)
def test_what_lasts_is_synced_in_order(tmp_path: Path, work: str) -> None:
    """A file before it takes its name, its folder after it has, both before the caller goes on."""
    made = calls(tmp_path, LASTING[work], "durable")
    folders, waiting = set(), 0
    for at, call in enumerate(made):
        if call.name in ("rename", "unlink"):
            file = call.paths[0]
            before = max((n for n in range(at) if file in made[n].paths and made[n].name == call.name), default=-1)
            steps = [earlier.name for earlier in made[before + 1 : at] if earlier.paths == [file]]
            if call.name == "rename" and steps != ["write", "fsync"]:
                assert steps == ["write"]
                waiting += 1  # what stands for a load need not outlive it; the tags' marks must
                continue
            folders.add(file.rpartition("/")[0])
            assert Call("fsync", [file.rpartition("/")[0]]) in made[at:]
    assert folders
    assert waiting == (work == "load"), made
    if work == "set_many":
        syncs = sum(call.name == "fsync" for call in made)
        assert syncs <= 30 + len(folders) + FOLDERS_ABOVE  # each file, and each folder once


@needs_strace
def test_a_delete_is_synced_though_an_eviction_came_first(tmp_path: Path) -> None:
    """What was dropped for room may be back after a power cut; what was deleted may not."""
    made = calls(tmp_path, LASTING["delete"], "durable", first="evict()")
    assert [call.name for call in made if call.name in ("unlink", "fsync")] == ["fsync"]


@needs_strace
def test_without_it_nothing_is_waited_for(tmp_path: Path) -> None:
    for does in LASTING.values():
        made = calls(tmp_path, does, "default")
        assert made
        assert not [call for call in made if call.name in ("fsync", "fdatasync")]


async def test_a_folder_that_can_not_be_synced_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not known to be on disk: told as a failure, though it is there for now. Later calls don't suffer."""
    store, key = FileStore(tmp_path, durable=True), b"mcp_hub:tests:e:k"
    write = Write(key, entry_frame(store, key), 60.0, None)
    assert await store.write_many([write]) == ["done"]

    def fails(path: str) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(_file_durable, "sync_folder", fails)
        (outcome,) = await store.write_many([write])
        assert isinstance(outcome, StoreError) and "EIO" in str(outcome)
        with pytest.raises(StoreError, match="EIO"):
            await store.delete_many([key])
        with pytest.raises(StoreError, match="EIO"):
            await store.clear(b"")
    assert await store.write_many([write]) == ["done"]
    await store.aclose()


async def test_the_folder_is_deleted_while_it_is_used_durably(tmp_path: Path) -> None:
    """A tree that is made anew is synced from its root on, like the first."""
    async with FileCache(tmp_path, durable=True, l1_max_entries=0, timeout=30) as cache:
        for turn in range(3):
            await cache.set("k", turn)
            assert await cache.get("k") == turn
            shutil.rmtree(tmp_path / "mcp_hub_cache")
            assert await cache.get("k") is None
        assert cache.stats.errors == {}


@pytest.mark.parametrize("backend", ["file", "redis"])
@pytest.mark.parametrize("durable", [True, False])
def test_the_setting(backend: str, durable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``CACHE_DURABLE`` is for the standby's files as well: they hold what must not be forgotten."""
    made: list[FileStore] = []

    class Noted(FileStore):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(file, "FileStore", Noted)
    monkeypatch.setenv("CACHE_DURABLE", str(durable))
    open_cache(cache_backend=backend)
    assert [store._folder.ground is not None for store in made] == [durable]
