"""Operations of a cache that take a trip to the store, or several: for who measures what one costs.

They find "k", "tagged" (by "a") and "stale" there, and no "new".
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from mcp_hub_cache import Cache, Policy

DEADLINE = 1.0  # seconds, for a cache that is measured
LOAD = 0.05  # seconds that a loader takes


async def load() -> int:
    await asyncio.sleep(LOAD)
    return 1


OPERATIONS: dict[str, Callable[[Cache], Awaitable[Any]]] = {
    "set": lambda cache: cache.set("k", 2),
    "set with tags": lambda cache: cache.set("k", 2, tags=["a"]),
    "get with tags": lambda cache: cache.get("tagged"),
    "add": lambda cache: cache.add("new", 1, tags=["a"]),
    "touch": lambda cache: cache.touch("k", 60),
    "delete": lambda cache: cache.delete("k"),
    "get of many": lambda cache: cache.get_many(["k", "tagged", "stale"]),
    "invalidate": lambda cache: cache.invalidate("a", "b"),
    "load": lambda cache: cache.get_or_load("new", load),
    "load with tags": lambda cache: cache.get_or_load("new", load, tags=["x"]),
    "load over a stale one": lambda cache: cache.get_or_load("stale", load, stale_ttl=60),
    "load for a fleet": lambda cache: cache.get_or_load("new", load, coalesce="fleet"),
    "refresh": lambda cache: cache.get_or_load("k", load, refresh=True),
}


async def fill(cache: Cache) -> None:
    """Store what they find."""
    await cache.set("k", 1)
    await cache.set("tagged", 1, tags=["a"])
    await cache.set("stale", 1, policy=Policy(ttl=0.001, stale_ttl=60))
