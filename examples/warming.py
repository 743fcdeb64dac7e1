"""Warming: common questions are answered before anybody asks them, at most four at a time.

    python examples/warming.py

Run it when a fleet is deployed, with the environment of the fleet: who asks then finds the answers there.
"""

import asyncio

from mcp_hub_cache import MISSING, acached

COMMON = ["python list", "async await", "docker basics", "git rebase", "redis eviction"]


@acached(ttl="1h")
async def web_search(query: str) -> list[str]:
    await asyncio.sleep(0.05)  # in place of a slow service
    return [f"{query}: result {number}" for number in range(3)]


async def warm(queries: list[str], *, at_once: int = 4) -> int:
    """Ask what is not there yet; answer how many that were. A service that fails now is asked again when needed."""
    slots = asyncio.Semaphore(at_once)

    async def one(query: str) -> bool:
        async with slots:
            # Looking never calls; what is there already stays as it is.
            if await web_search.peek(query) is not MISSING:
                return False
            await web_search(query)
            return True

    done = await asyncio.gather(*map(one, queries), return_exceptions=True)
    return sum(each is True for each in done)


async def main() -> None:
    await web_search.clear()  # what an earlier run of this example has left
    print(f"warmed {await warm(COMMON)} of {len(COMMON)}")
    print(f"warmed {await warm(COMMON)} of {len(COMMON)} the second time")
    before = web_search.stats()
    await asyncio.gather(*map(web_search, COMMON))
    after = web_search.stats()
    print(f"then {after.hits - before.hits} hits, {after.loads - before.loads} calls")


asyncio.run(main())
