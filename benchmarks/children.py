"""Sides that run in processes of their own: under another event loop, or beside each other.

The parent writes a number of operations, the child does them and answers with the seconds they took. So slices in two
processes can alternate as those in one do.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mcp_hub_cache import FileCache, RedisCache

from .measure import Side, reads
from .values import result

KEYS = [f"child:{index}" for index in range(2000)]


def cache_of(task: dict[str, Any]) -> FileCache | RedisCache:
    """Return the cache that a task names, near cache off."""
    if "url" in task:
        return RedisCache(task["url"], l1_max_entries=0, timeout=30)
    return FileCache(task["folder"], l1_max_entries=0, timeout=30)


async def fill(task: dict[str, Any]) -> None:
    """Store what children of this task read."""
    async with cache_of(task) as cache:
        for first in range(0, len(KEYS), 500):
            await cache.set_many({KEYS[index]: result(index) for index in range(first, first + 500)}, ttl=3600)


@asynccontextmanager
async def child(task: dict[str, Any]) -> AsyncIterator[Side]:
    """Start a child that reads as *task* says: ``url`` or ``folder``, ``callers``, ``uvloop``."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.children", json.dumps(task)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    async def run(count: int) -> float:
        stdin.write(b"%d\n" % count)
        answer = await stdout.readline()
        if not answer:
            raise RuntimeError("a child of the benchmarks ended early; see its error above")
        return float(answer)

    try:
        yield Side(run, least=2 * task["callers"])
    finally:
        stdin.close()
        await process.wait()


async def _serve(task: dict[str, Any]) -> None:
    async with cache_of(task) as cache:
        side = reads(cache.get, KEYS, task["callers"])
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(await side.run(int(line)), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given.get("uvloop"):
        import uvloop

        uvloop.run(_serve(given))
    else:
        asyncio.run(_serve(given))
