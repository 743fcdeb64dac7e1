"""What importing costs, on top of what an async program has imported anyway.

Each pair is one fresh interpreter: it times ``import asyncio, inspect, typing``, and then ``import mcp_hub_cache``.
Without site, whose ``.pth`` files import things of their own.
"""

from __future__ import annotations

import asyncio
import sys

from .bench import Bench
from .measure import Paired

_CHILD = """
import sys, time
sys.path[:0] = sys.argv[1:]
started = time.perf_counter()
import asyncio, inspect, typing
between = time.perf_counter()
import mcp_hub_cache
ended = time.perf_counter()
assert callable(mcp_hub_cache.acached)
print(ended - between, between - started)
"""


async def run(bench: Bench) -> None:
    """Measure the row."""
    if not bench.wants("import."):
        return
    paired = Paired()
    await _once()  # writes the byte code, warms the file system
    for _ in range(bench.method.pairs):
        ours, base = await _once()
        paired.ours.append(ours)
        paired.theirs.append(base)
    bench.paired("import.time", paired)


async def _once() -> tuple[float, float]:
    paths = [path for path in sys.path if path]
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", _CHILD, *paths, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await child.communicate()
    if child.returncode:
        raise RuntimeError("the import failed")
    ours, base = map(float, out.split())
    return ours, base
