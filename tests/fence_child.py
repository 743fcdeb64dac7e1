"""A process that changes what others load, or reads it, for ``test_fence_processes``. Ends by itself; then reports.

What is cached stands for an origin, of which every key has a version: two numbers on a board that all processes map.
A changer counts the version up, makes the cache forget or hold the new one, and when that call has returned without
trouble publishes the version as the key's floor. A reader notes the floor, then asks: whatever it gets, by whatever
policy, is not below.

    python tests/fence_child.py (change | read) (file | redis) WHERE BOARD SECONDS SEED (COALESCE | MINE)

MINE: which of the keys it changes.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import random
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from mcp_hub_cache import MISSING, Cache, FileCache, RedisCache, current_entry

KEYS: Final = 24
_CHANGERS: Final = 2
_TASKS: Final = 6  # of a reader
_PAIR: Final = struct.Struct("=qq")  # version, floor


class Board:
    """The versions and floors of all keys, shared by processes. Each key has one who changes it."""

    SIZE: Final = KEYS * _PAIR.size

    def __init__(self, path: str) -> None:
        with Path(path).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.SIZE)

    def version(self, key: int) -> int:
        return int(_PAIR.unpack_from(self._map, key * _PAIR.size)[0])

    def floor(self, key: int) -> int:
        return int(_PAIR.unpack_from(self._map, key * _PAIR.size)[1])

    def count_up(self, key: int) -> int:
        version = self.version(key) + 1
        struct.pack_into("=q", self._map, key * _PAIR.size, version)
        return version

    def publish(self, key: int, floor: int) -> None:
        struct.pack_into("=q", self._map, key * _PAIR.size + 8, floor)


def value(key: int, version: int, size: int = 1) -> dict[str, Any]:
    """A value that shows when it is torn, or another key's."""
    return {"key": key, "version": version, "text": f"{key}-{version};" * size}


def fault(found: Any, key: int, floor: int) -> str | None:
    """What is wrong with what was *found*."""
    if found["key"] != key or set(found["text"].split(";")) != {f"{key}-{found['version']}", ""}:
        return f"key {key} got {str(found)[:80]}"
    if found["version"] < floor:
        return f"key {key} got version {found['version']} when {floor} was the least"
    return None


class Changer:
    """Changes one key after the other of those that are its own."""

    def __init__(self, cache: Cache, board: Board, rng: random.Random, mine: int) -> None:
        self._cache = cache
        self._board = board
        self._rng = rng
        self._keys = [key for key in range(KEYS) if key % _CHANGERS == mine]

    async def run(self, until: float) -> dict[str, Any]:
        changes = 0
        while time.monotonic() < until:
            key = self._rng.choice(self._keys)
            version = self._board.count_up(key)
            troubles = sum(self._cache.stats.errors.values())
            await self._change(key, version)
            if sum(self._cache.stats.errors.values()) == troubles:
                self._board.publish(key, version)
            changes += 1
            await asyncio.sleep(self._rng.choice([0, 0.001, 0.01]))
        return {"changes": changes, "faults": []}

    async def _change(self, key: int, version: int) -> None:
        cache, name = self._cache, f"k{key}"
        how = self._rng.choices(["set", "delete", "delete_many", "invalidate", "clear"], [30, 25, 15, 30, 0.5])[0]
        if how == "set":
            await cache.set(name, value(key, version), ttl=100, tags=[f"t{key}"])
        elif how == "delete":
            await cache.delete(name)
        elif how == "delete_many":
            await cache.delete_many([name, "another"])
        elif how == "invalidate":
            await cache.invalidate(f"t{key}")
        else:
            await cache.clear()


class Reader:
    """Asks in all ways, by policies that change with each call."""

    def __init__(self, cache: Cache, board: Board, rng: random.Random, coalesce: str) -> None:
        self._cache = cache
        self._board = board
        self._rng = rng
        self._coalesce = coalesce
        self._reads = 0
        self._faults: list[str] = []

    async def run(self, until: float) -> dict[str, Any]:
        await asyncio.gather(*(self._ask(until) for _ in range(_TASKS)))
        return {"reads": self._reads, "loads": self._cache.stats.loads, "faults": self._faults[:5]}

    async def _ask(self, until: float) -> None:
        while time.monotonic() < until:
            await self._rng.choices([self._get, self._get_many, self._load], [2, 2, 6])[0]()
            await asyncio.sleep(self._rng.choice([0, 0, 0.001]))

    def _look(self, found: Any, key: int, floor: int, how: str) -> None:
        self._reads += 1
        if (wrong := fault(found, key, floor)) is not None:
            self._faults.append(f"{how}: {wrong}")

    async def _get(self) -> None:
        key = self._rng.randrange(KEYS)
        floor = self._board.floor(key)
        if (found := await self._cache.get(f"k{key}")) is not None:
            self._look(found, key, floor, "get")

    async def _get_many(self) -> None:
        floors = {key: self._board.floor(key) for key in self._rng.sample(range(KEYS), 5)}
        found = await self._cache.get_many([f"k{key}" for key in floors])
        for key, floor in floors.items():
            if f"k{key}" in found:
                self._look(found[f"k{key}"], key, floor, "get_many")

    async def _load(self) -> None:
        rng, key = self._rng, self._rng.randrange(KEYS)
        floor = self._board.floor(key)
        tagged_late, end, takes = rng.random() < 0.3, rng.random(), rng.choice([0, 0, 0.001, 0.02])

        async def load() -> Any:
            version = self._board.version(key)
            await asyncio.sleep(takes)
            entry = current_entry()
            if tagged_late:
                entry.tags.add(f"t{key}")
            if end < 0.15:
                raise ValueError
            if end < 0.25:
                raise KeyError(version)
            if end < 0.35:
                entry.skip()
            old: Any = entry.stale_value
            if end > 0.6 and old is not MISSING and old["version"] == version:
                return entry.not_modified()
            return value(key, version, rng.choice([1, 50, 3000]))

        policy: dict[str, Any] = {
            "ttl": rng.choice([0.005, 0.03, 0.2, 100]),
            "coalesce": self._coalesce,
            "tags": [] if tagged_late else [f"t{key}"],
            "refresh": rng.random() < 0.05,
        }
        if rng.random() < 0.7:
            policy |= {"stale_ttl": 100, "throttle": rng.choice([0, 0.05, 1]), "soft_timeout": rng.choice([0, 0.002])}
        if rng.random() < 0.2:
            policy["early"] = 1
        if rng.random() < 0.3:
            policy["cache_errors"] = {KeyError: 0.05}
        asked = asyncio.ensure_future(self._cache.get_or_load(f"k{key}", load, **policy))
        if rng.random() < 0.1:
            await asyncio.sleep(rng.random() * 0.005)
            asked.cancel()
        with suppress(asyncio.CancelledError, ValueError, KeyError):
            self._look(await asked, key, floor, f"get_or_load by {policy}")


async def main(arguments: list[str]) -> None:
    role, kind, where, board, seconds, seed, rest = arguments
    rng = random.Random(int(seed))
    # Over Redis, a near cache hears of a change a moment after it was made. Without one, nothing is below the floor.
    cache: Cache = FileCache(where, timeout=10) if kind == "file" else RedisCache(where, timeout=10, l1_max_entries=0)
    until = time.monotonic() + float(seconds)
    async with cache:
        if role == "change":
            said = await Changer(cache, Board(board), rng, int(rest)).run(until)
        else:
            said = await Reader(cache, Board(board), rng, rest).run(until)
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
