"""What concerns all entries: how long it takes, how long the event loop is held up by it, and what an entry weighs."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mcp_hub_cache import Cache, FileCache
from mcp_hub_cache.stores.file import FileStore

from .bench import Bench
from .measure import heartbeat
from .servers import folder
from .values import WrongValueError, blob

_ENTRIES = 20_000
_SIZES = (100, 1_400, 10_000)


async def upkeep(cache: Cache, name: str, keys: int, place: Path | None) -> dict[str, str]:
    """``status()``, a sweep where there is one, and ``clear()``, with so many entries there."""
    found: dict[str, str] = {}

    async def watched(work: str, call: Callable[[], Awaitable[Any]]) -> Any:
        answer, said = await _watched(call)
        found[f"{work}, {name}, {keys:,} entries"] = said
        print(f"  upkeep: {work}, {name}: {said}", flush=True)
        return answer

    status = await watched("status()", cache.status)
    if status.total_keys not in {None, keys}:
        raise WrongValueError(f"status() counts {status.total_keys} of {keys} entries")
    if place is not None:
        store = FileStore(place, max_bytes=None)
        try:
            if await watched("sweep()", store.sweep):
                raise WrongValueError("the sweep removed entries that had not expired")
        finally:
            await store.aclose()
    cleared = await watched("clear()", cache.clear)
    if cleared != keys:
        raise WrongValueError(f"clear() removed {cleared} of {keys} entries")
    return found


async def nothing() -> str:
    """How late the machine itself makes a loop that has nothing to do."""
    return (await _watched(lambda: asyncio.sleep(1)))[1]


async def _watched(call: Callable[[], Awaitable[Any]]) -> tuple[Any, str]:
    async with heartbeat() as stall:
        started = time.perf_counter()
        answer = await call()
        took = time.perf_counter() - started
    return answer, f"{took:.2f} s; held up {stall.wall * 1e3:.1f} ms, computing {stall.computed * 1e3:.1f} ms at a time"


async def memory(bench: Bench) -> None:
    """Bytes that an entry of the near cache takes, by tracemalloc: with it less without it, over files."""
    entries = 500 if bench.method.quick else _ENTRIES
    figures: dict[str, str] = {}
    for size in _SIZES:
        without, _ = await _traced(0, entries, size)
        with_it, held = await _traced(2 * entries, entries, size)
        if held != entries:
            raise WrongValueError(f"the near cache holds {held} of {entries} entries")
        weight = (with_it - without) / entries
        figures[f"values of {size:,} bytes"] = f"{weight:,.0f} bytes per entry, {weight - size:+,.0f} besides the value"
    bench.curves["memory"] = {"title": f"Memory of an entry in L1 ({entries:,} entries)", "figures": figures}


async def _traced(l1_max_entries: int, entries: int, size: int) -> tuple[int, int]:
    with folder(in_memory=True) as place:
        async with FileCache(
            place, l1_max_entries=l1_max_entries, l1_max_bytes=1 << 34, timeout=30, max_bytes=None
        ) as cache:
            await cache.get("nothing")
            gc.collect()
            tracemalloc.start()
            try:
                for first in range(0, entries, 500):
                    keys = [f"memory:{number}" for number in range(first, min(first + 500, entries))]
                    await cache.set_many({key: blob(size, number) for number, key in enumerate(keys)}, ttl="1h")
                    await cache.get_many(keys)
                del keys
                gc.collect()
                return tracemalloc.get_traced_memory()[0], (await cache.status()).l1_entries
            finally:
                tracemalloc.stop()
