"""Fifty agents ask the same at once: one call.

    python examples/tool_cache.py

The results are kept where the environment says (CACHE_BACKEND, CACHE_DIR, REDIS_URL, …); else in a folder `cache`.
"""

import asyncio

from mcp_hub_cache import acached

calls = 0


@acached(ttl="10m")
async def search(query: str, limit: int = 10) -> list[str]:
    """A tool: slow, or dear, or limited in how often it may be called."""
    global calls  # noqa: PLW0603 (counted, to show it)
    calls += 1
    await asyncio.sleep(0.2)
    return [f"{query}, result {number}" for number in range(limit)]


def show(what: str) -> None:
    print(f"{what}: {calls} {'call' if calls == 1 else 'calls'}")


async def main() -> None:
    await search.clear()  # what an earlier run of this example has left

    results = await asyncio.gather(*(search("async caching", limit=3) for _ in range(50)))
    assert all(result == results[0] for result in results)
    show("50 agents asked")

    # Written otherwise, the same call.
    await search(query="async caching", limit=3)
    show("asked again")

    await search.invalidate("async caching", limit=3)
    await search("async caching", limit=3)
    show("asked after invalidate")
    print(f"{search.stats().hits} hit, {search.stats().coalesced} coalesced")


asyncio.run(main())
