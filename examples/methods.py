"""Methods, and whose result it is.

    python examples/methods.py

A method's class says by `__cache_key__` how its instances are told apart. `scope` puts the tenant into every key: what
one was answered, another never sees.
"""

import asyncio
from contextvars import ContextVar

from mcp_hub_cache import MemoryCache, acached

tenant: ContextVar[str] = ContextVar("tenant")
cache = MemoryCache()
calls: list[str] = []


class Wiki:
    """A client of some service."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    @property
    def __cache_key__(self) -> str:
        return self.base_url

    @acached(ttl="5m", cache=cache, scope=tenant)
    async def page(self, title: str) -> str:
        """Read a page."""
        calls.append(f"{tenant.get()} read {title} at {self.base_url}")
        return f"{title}, as {tenant.get()} may see it"


async def agent(who: str, wiki: Wiki, title: str) -> str:
    tenant.set(who)  # each task has a context of its own
    return await wiki.page(title)


async def main() -> None:
    async with cache:
        # Two objects, one service: they share results.
        first, same, other = Wiki("wiki.example"), Wiki("wiki.example"), Wiki("other.example")
        pages = await asyncio.gather(
            agent("ada", first, "Cats"),
            agent("ada", same, "Cats"),
            agent("bo", first, "Cats"),
            agent("bo", other, "Cats"),
        )
        assert pages[0] == pages[1] == "Cats, as ada may see it"
        assert pages[2] == "Cats, as bo may see it"
        for call in sorted(calls):
            print(call)
        print(f"4 questions, {len(calls)} calls")

        tenant.set("ada")
        assert await same.page.invalidate("Cats")  # with the method's own arguments
        await first.page("Cats")
        print(f"after invalidate: {len(calls)} calls")


asyncio.run(main())
