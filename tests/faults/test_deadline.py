"""Row "Redis stopped, cable pulled": one deadline covers an operation, however many trips it takes and whoever answers.

A standby answers for a server that doesn't, so that no trip fails: each by itself may take nearly the whole deadline,
and the breaker is told not to open. Measured by the operation that takes one trip, in the same moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from mcp_hub_cache import Cache, RedisCache
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FaultProxy
from tests.operations import DEADLINE, LOAD, OPERATIONS, fill
from tests.servers import valkey_server


@pytest.mark.parametrize("covered", [False, True], ids=["alone", "with a fallback"])
async def test_an_operation_costs_one_deadline_whatever_it_takes(tmp_path: Path, covered: bool) -> None:
    with valkey_server() as server:
        async with AsyncExitStack() as stack:

            async def opened(name: str) -> tuple[FaultProxy, Cache]:
                proxy = await stack.enter_async_context(FaultProxy(server.url))
                cache = RedisCache(
                    proxy.url,
                    namespace=name.replace(" ", "-"),
                    timeout=DEADLINE,
                    l1_max_entries=0,
                    fallback=MemoryStore() if covered else None,
                    failover={"failures": 1000, "slow_after": 100.0},
                )
                await stack.enter_async_context(cache)
                await fill(cache)
                assert await cache.get("tagged") == 1
                return proxy, cache

            async def took(cache: Cache, operation: Callable[[Cache], Awaitable[Any]]) -> float:
                begun = perf_counter()
                await operation(cache)
                return perf_counter() - begun

            proxies, caches = zip(*[await opened(name) for name in ("get", *OPERATIONS)], strict=True)
            for proxy in proxies:
                proxy.black_hole()
            operations = (lambda cache: cache.get("k"), *OPERATIONS.values())
            alone, *times = await asyncio.gather(*map(took, caches, operations))
            assert alone > DEADLINE * 0.7
            assert not {name: t for name, t in zip(OPERATIONS, times, strict=True) if t > alone * 1.8 + LOAD}
            for proxy in proxies:
                proxy.heal()
                proxy.cut()
