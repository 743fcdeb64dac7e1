"""A fleet that shares one cache: three processes, ten questions, ten calls in all.

    CACHE_BACKEND=redis REDIS_URL=redis://localhost:6379/0 python examples/redis_fleet.py

The same program runs without a server: the processes then share a folder, as long as they are on one machine.
"""

import asyncio
import os
import sys

from mcp_hub_cache import acached, default_cache

WORKERS = 3
calls = 0


@acached(ttl="1m", namespace="example-fleet")
async def summarize(document: int, run: str) -> str:
    """What a model would be asked. ``run`` keeps one run of this example from finding the results of another."""
    global calls  # noqa: PLW0603 (counted, to show it)
    calls += 1
    await asyncio.sleep(0.05)
    return f"summary of {document} by process {os.getpid()} ({run})"


async def work(run: str) -> None:
    cache = await default_cache()
    await asyncio.gather(*(summarize(document, run) for document in range(10)))
    print(f"process {os.getpid()} on {cache.store.name}: {calls} calls, {summarize.stats().hits} hits", flush=True)


async def fleet() -> None:
    if os.environ.get("CACHE_BACKEND") != "redis":
        print("No server is configured (CACHE_BACKEND=redis, REDIS_URL=…): the processes share a folder.", flush=True)
    status = await (await default_cache()).status()
    if status.status != "healthy":
        print(f"{status.backend} is {status.status}, and a standby serves: {status.problem}", flush=True)
    run = str(os.getpid())
    # One after the other: within a process, those who ask for the same at the same time share one call; across
    # processes, whoever comes when a result is there.
    for _ in range(WORKERS):
        worker = await asyncio.create_subprocess_exec(sys.executable, __file__, run)
        if await worker.wait():
            sys.exit("a worker failed")
    removed = await (await default_cache()).with_namespace("example-fleet").clear()
    print(f"{WORKERS} processes asked {10 * WORKERS} questions; {removed} results were stored")


asyncio.run(work(sys.argv[1]) if len(sys.argv) > 1 else fleet())
