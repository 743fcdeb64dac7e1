"""Misses: what loading through the cache adds to the load, alone and with 1,000 waiters on it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from mcp_hub_cache import MemoryCache, acached

from .bench import Bench
from .clients import MissingError, require
from .measure import Side
from .values import WrongValueError, compare, result

_ENTRIES = 1024
_WAITERS = 1000
_VALUE = result(7)  # always the same: the function itself is to cost nothing


async def run(bench: Bench) -> None:
    """Measure the section."""
    if not bench.wants("load."):
        return
    # As many entries as async-lru keeps: both evict at every miss.
    async with MemoryCache(timeout=30, l1_max_entries=0, max_bytes=_ENTRIES * 1800) as cache:
        await _miss(bench, cache)
        await _waiters(bench, cache)


async def _miss(bench: Bench, cache: MemoryCache) -> None:
    @acached(ttl="1h", cache=cache)
    async def ours(number: int) -> dict[str, Any]:  # noqa: ARG001  # the key
        return _VALUE

    try:
        require("async-lru")
    except MissingError as error:
        bench.skip("load.miss.async-lru", str(error))
        return
    from async_lru import alru_cache

    @alru_cache(maxsize=_ENTRIES)
    async def theirs(number: int) -> Any:  # noqa: ARG001  # the key
        return orjson.loads(orjson.dumps(_VALUE))

    await bench.compare("load.miss.async-lru", _misses(ours), _misses(theirs))


def _misses(call: Callable[[int], Awaitable[Any]]) -> Side:
    numbers = itertools.count()

    async def run(count: int) -> float:
        first = next(numbers)
        started = time.perf_counter()
        for number in itertools.islice(numbers, count):
            if (found := await call(number))["number"] != 7:
                raise WrongValueError(call)
        took = time.perf_counter() - started
        compare(found, 7)
        compare(await call(number), 7)  # now a hit: it had been stored
        if first >= number:
            raise WrongValueError("a number was asked for twice")
        return took

    return Side(run)


async def _waiters(bench: Bench, cache: MemoryCache) -> None:
    calls: list[tuple[str, int]] = []
    gates: dict[int, asyncio.Event] = {}

    async def load(number: int, who: str) -> str:
        calls.append((who, number))
        await gates[number].wait()
        return f"value {number}"

    @acached(ttl="1h", cache=cache)
    async def ours(number: int) -> str:
        return await load(number, "ours")

    try:
        require("async-lru")
    except MissingError as error:
        bench.skip("load.waiters.async-lru", str(error))
        return
    from async_lru import alru_cache

    @alru_cache(maxsize=_ENTRIES)
    async def theirs(number: int) -> str:
        return await load(number, "theirs")

    numbers = itertools.count()

    def side(call: Callable[[int], Awaitable[str]]) -> Side:
        async def run(count: int) -> float:
            took = 0.0
            for number in itertools.islice(numbers, count):
                gate = gates[number] = asyncio.Event()
                calls.clear()
                started = time.perf_counter()
                waiters = [asyncio.ensure_future(call(number)) for _ in range(_WAITERS)]
                for _ in range(10):  # turns of the loop, until everybody waits for the flight
                    await asyncio.sleep(0)
                gate.set()
                found = await asyncio.gather(*waiters)
                took += time.perf_counter() - started
                if set(found) != {f"value {number}"} or len(calls) != 1:
                    raise WrongValueError(f"{len(calls)} calls for {_WAITERS} waiters, {set(found)}")
                del gates[number]
            return took

        return Side(run)

    await bench.compare("load.waiters.async-lru", side(ours), side(theirs))
