"""The cache as a place to put things: set, get, several at once, only if absent, and what is known of an entry.

    python examples/get_set.py

`open_cache()` reads CACHE_BACKEND, CACHE_DIR, REDIS_URL and so on, and `.env`; without any it keeps a folder `cache`.
"""

import asyncio
from dataclasses import dataclass
from datetime import date

from mcp_hub_cache import MISSING, open_cache


@dataclass
class Plan:
    """Anything of your own: a dataclass here, a pydantic model as well."""

    goal: str
    due: date
    steps: list[str]


async def main() -> None:
    async with open_cache() as shared:
        cache = shared.with_namespace("example-get-set")
        await cache.clear()

        plan = Plan("ship it", date(2030, 1, 31), ["write", "test"])
        await cache.set("plan:42", plan, ttl="10m", as_type=Plan)
        found = await cache.get("plan:42", as_type=Plan)
        assert found == plan
        print(f"a hit equals what was set: {found}")
        print(f"fresh for {await cache.ttl('plan:42'):.0f} seconds")

        # None is a value like any other; MISSING tells it from a miss.
        await cache.set("nothing known", None)
        print(f"a cached None: {await cache.get('nothing known', MISSING)}")
        print(f"a miss: {await cache.get('never set', MISSING)}")

        await cache.set_many({"a": 1, "b": 2.5, "c": ["x", ("y", b"z")]})
        print(f"several at once: {await cache.get_many(['a', 'b', 'c', 'd'])}")

        # Atomically among all processes: one of them gets to be the first.
        print(f"the first: {await cache.add('leader', 'me')}, the second: {await cache.add('leader', 'you')}")

        names = [name async for name in cache.keys()]  # noqa: SIM118 (a cache is no dict: this walks the store)
        print(f"keys: {sorted(names)}")
        print(f"deleted: {await cache.delete('leader')}, and the rest: {await cache.clear()}")


asyncio.run(main())
