"""Tags between real processes, on a real folder and a real Valkey: what one invalidates, the other never serves."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import MISSING, Cache, FileCache, RedisCache
from mcp_hub_cache._current import current_entry
from tests.backends import PATIENT, poll
from tests.servers import Server, valkey_server

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

ROOT = str(Path(__file__).parents[1])
TURNS = 30

# Does what it reads, [name, arguments, options] a line, and answers with a line each.
OTHER = """
import asyncio, json, sys
from mcp_hub_cache import FileCache, RedisCache
from tests.test_tags_processes import race
async def main():
    kind, where = sys.argv[1:]
    async with (FileCache if kind == "file" else RedisCache)(where, timeout=30) as cache:
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            name, arguments, options = json.loads(line)
            made = race(cache, *arguments) if name == "race" else getattr(cache, name)(*arguments, **options)
            print(json.dumps(await made), flush=True)
asyncio.run(main())
"""


class Other:
    """The other process."""

    def __init__(self, kind: str, where: str) -> None:
        path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-c", OTHER, kind, where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def tell(self, name: str, *arguments: Any, **options: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, arguments, options]) + "\n")
        self._process.stdin.flush()

    async def hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(await asyncio.to_thread(self._process.stdout.readline))

    async def ask(self, name: str, *arguments: Any, **options: Any) -> Any:
        self.tell(name, *arguments, **options)
        return await self.hear()

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture(params=["file", "redis"])
async def world(request: pytest.FixtureRequest, tmp_path: Path, valkey: Server) -> AsyncIterator[tuple[Cache, Other]]:
    valkey.command("FLUSHALL")
    where = valkey.url if request.param == "redis" else str(tmp_path / "shared")
    other = Other(request.param, where)
    async with (FileCache if request.param == "file" else RedisCache)(where, timeout=PATIENT) as cache:
        yield cache, other
    other.close()


async def is_gone(cache: Cache, key: str) -> bool:
    return await cache.get(key, MISSING) is MISSING


async def is_near(cache: Cache, key: str) -> bool:
    await cache.get(key)
    entry = await cache.get_entry(key)
    return entry is not None and entry.tier == "l1"


async def test_what_another_process_invalidates_is_gone(world: tuple[Cache, Other]) -> None:
    cache, other = world
    for turn in range(10):
        await cache.set("mine", turn, tags=["t"])
        await other.ask("set", "theirs", turn, tags=["t"])
        await other.ask("set", "free", turn, tags=["u"])
        for key in ("mine", "theirs", "free"):
            await poll(lambda key=key: is_near(cache, key))  # type: ignore[misc]
            assert await other.ask("get", key) == turn
        if turn % 2:
            await other.ask("invalidate", "t")
        else:
            await cache.invalidate("t")
            assert await is_gone(cache, "mine")
            assert await is_gone(cache, "theirs")
        for key in ("mine", "theirs"):
            if cache.store.name == "file":
                assert await is_gone(cache, key)
                assert not await other.ask("exists", key)
            else:
                await poll(lambda key=key: is_gone(cache, key))  # type: ignore[misc]
            while await other.ask("get", key) is not None:
                assert cache.store.name == "redis"
        assert await cache.get("free") == turn


async def test_a_load_here_and_an_invalidation_there(world: tuple[Cache, Other]) -> None:
    cache, other = world
    for added in (False, True):
        for turn in range(5):

            async def loader(turn: int = turn, *, added: bool = added) -> list[int]:
                if added:
                    current_entry().tags.add("t")
                assert await other.ask("invalidate", "t") is True
                return [turn]

            assert await cache.get_or_load("k", loader, tags=() if added else ["t"]) == [turn]
            await poll(lambda: is_gone(cache, "k"))
            assert await other.ask("get", "k") is None


async def race(cache: Cache, folder: str, name: str) -> list[int]:
    """Raise the version behind the cache and invalidate, in turn with loads; versions that were too old."""
    path, old = Path(folder), []

    async def load() -> int:
        current_entry().tags.add("added")
        return int(path.read_text())

    for turn in range(TURNS):
        for key, tags in (("static", ["tag"]), ("dynamic", [])):
            before = int(path.read_text())
            value = await cache.get_or_load(key, load, tags=tags)
            # A server's word of another process's invalidation may be a moment late; one's own is not.
            if value < before and cache.store.name == "file":
                old.append(value - before)
        if turn % 3 == 0 and name == "writer":
            version = int(path.read_text()) + 1
            path.with_suffix(".new").write_text(str(version))
            path.with_suffix(".new").replace(path)
            await cache.invalidate("tag", "added")
            for key, tags in (("static", ["tag"]), ("dynamic", [])):
                value = await cache.get_or_load(key, load, tags=tags)
                if value < version:
                    old.append(value - version)
    return old


async def test_a_race_of_loads_and_invalidations(world: tuple[Cache, Other], tmp_path: Path) -> None:
    """Who has invalidated never gets what was loaded before, and at rest nobody does."""
    cache, other = world
    path = tmp_path / "version"
    path.write_text("0")
    other.tell("race", str(path), "writer")
    mine = await race(cache, str(path), "reader")
    theirs = await other.hear()
    assert theirs == []
    assert all(late == -1 for late in mine)  # the version may be raised a moment before it is invalidated
    for key in ("static", "dynamic"):

        async def is_new(key: str = key) -> bool:
            return await cache.get(key, MISSING) in (MISSING, int(path.read_text()))

        await poll(is_new)
        assert await other.ask("get", key) in (None, int(path.read_text()))
