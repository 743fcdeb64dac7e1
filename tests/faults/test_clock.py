"""Row "clock jumps": the wall clock of a running process jumps by a day, there and back (libfaketime).

Memory goes by the monotonic clock, Redis by the server's: they notice nothing. Files go by the host's clock: an entry
may be gone after a jump, and none lives longer for it. ``test_file_errors`` has the same with a clock of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.children import clean, run
from tests.servers import Server, valkey_server


def _library() -> Path | None:
    """Libfaketime: Debian's, or the one that ``pip install libfaketime`` builds."""
    spec = importlib.util.find_spec("libfaketime")
    roots = [Path("/usr/lib"), *map(Path, (spec.submodule_search_locations or []) if spec else [])]
    return next((path for root in roots for path in root.rglob("libfaketime.so.1") if path.is_file()), None)


LIBRARY = _library()
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not here (Debian: apt-get install libfaketime)"),
]

PROGRAM = """
import asyncio, os, sys, time
from pathlib import Path
from mcp_hub_cache import FileCache, MemoryCache, RedisCache
from mcp_hub_cache.stores.file import FileStore
backend, folder, url, offset = sys.argv[1:5]
match backend:
    case "memory": cache = MemoryCache(timeout=20)
    case "file": cache = FileCache(folder, timeout=20)
    case "redis": cache = RedisCache(url, timeout=20)
    case "failover": cache = RedisCache(url, fallback=FileStore(folder), timeout=20)
by_host = backend == "file"

def jump(seconds):
    was, since = time.time(), time.monotonic()
    new = Path(offset + ".new")
    new.write_text(f"{seconds:+d}")
    new.replace(offset)
    while abs(time.time() - was - (seconds - jump.at)) > 3600:
        assert time.monotonic() - since < 10, "the clock does not jump"
    jump.at = seconds
jump.at = 0

async def passes(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await asyncio.sleep(0.01)

async def main():
    calls = 0
    async def load():
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        return calls
    await cache.set("k", "v", ttl=3600)
    for number, seconds in enumerate((86400, 0, -86400, 0, 86400, -86400, 0)):
        assert await cache.set(f"before{number}", "old", ttl=0.5) is None
        jump(seconds)
        found = await cache.get("k")
        assert found in ({None, "v"} if by_host else {"v"}), (seconds, found)
        await cache.set("new", number, ttl=3600, tags=["t"])
        assert [await cache.get("new"), await cache.get("new")] == [number, number], seconds
        was = calls
        assert set(await asyncio.gather(*(cache.get_or_load(f"l{number}", load) for _ in range(5)))) == {was + 1}
        assert await cache.get_or_load(f"l{number}", load) == calls == was + 1, (seconds, calls, was, cache.stats)
        assert await cache.invalidate("t")
        assert await cache.get("new") is None, seconds
        await cache.set("short", number, ttl=0.3)
        await passes(0.55)
        assert await cache.get("short") is None, seconds
        assert await cache.get(f"before{number}") is None, seconds
        assert await cache.delete(f"l{number}")
        assert await cache.get(f"l{number}") is None, seconds
    assert await cache.get("k") in ({None, "v"} if by_host else {"v"})
    await cache.aclose()
    print("done")

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with valkey_server() as running:
        yield running


@pytest.mark.parametrize("backend", ["memory", "file", "redis", "failover"])
def test_the_clock_of_a_running_process_jumps_by_a_day(backend: str, tmp_path: Path, server: Server) -> None:
    server.command("FLUSHALL")
    offset = tmp_path / "offset"
    offset.write_text("+0")
    faked = {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    assert clean(run(PROGRAM, backend, tmp_path / "cache", server.url, offset, env=faked)) == "done\n"
