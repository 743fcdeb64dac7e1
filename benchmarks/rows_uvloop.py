"""Our own reads over Redis on uvloop, beside the same on asyncio: for reference; the loop is the user's choice."""

from __future__ import annotations

from .bench import Bench
from .children import child, fill
from .clients import MissingError, require


async def run(bench: Bench) -> None:
    """Measure the section."""
    if not bench.wants("uvloop."):
        return
    try:
        require("uvloop")
    except MissingError as error:
        bench.skip("uvloop.get1", str(error))
        bench.skip("uvloop.get100", str(error))
        return
    task = {"url": bench.address.url}
    await fill(task)
    for callers in (1, 100):
        async with (
            child({**task, "callers": callers, "uvloop": True}) as ours,
            child({**task, "callers": callers}) as plain,
        ):
            await bench.compare(f"uvloop.get{callers}", ours, plain)
