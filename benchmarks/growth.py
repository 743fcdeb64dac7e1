"""How cost grows: with keys, callers, the size of values, processes. Curves, with the slope of each line.

A slope is the exponent in cost ~ size^slope, by least squares over the logarithms: 0 is constant, 1 proportional.

It ends: no filling of a store goes on for more than four minutes, and what was reached by then is what is shown. A
million keys take some 15 minutes in all.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

from mcp_hub_cache import Cache, FileCache, MemoryCache, RedisCache

from . import growth_upkeep
from .bench import Bench
from .children import child, fill
from .measure import Method, Side, count_for, pairs, reads, spread
from .servers import folder, room_for_files
from .values import WrongValueError, blob, result, sized, small

_ROUNDS = 9
_FEW = 1000
_FILL_SECONDS = 240
_ON_DISK = 100_000  # keys on a real disk: what grows there is the disk's business
_CALLERS = (1, 10, 100, 1000, 10_000)
_SIZES = (100, 1_000, 10_000, 100_000, 1_000_000, 5_000_000)
_PROCESSES = (1, 2, 4, 8)

Points = list[tuple[float, float]]


async def run(bench: Bench, keys: int) -> None:
    """Measure the curves that are asked for, with up to so many keys."""
    if bench.wants_curve("keys") or bench.wants_curve("upkeep"):
        await _keys(bench, keys)
    if bench.wants_curve("callers"):
        await _callers(bench)
    if bench.wants_curve("sizes"):
        await _sizes(bench)
    if bench.wants_curve("processes"):
        await _processes(bench)
    if bench.wants_curve("memory"):
        await growth_upkeep.memory(bench)


def slope(points: Points) -> float:
    """Return the exponent that fits the points best."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    middle_x, middle_y = (sum(axis) / len(logs) for axis in zip(*logs, strict=True))
    across = sum((x - middle_x) ** 2 for x, _ in logs)
    return sum((x - middle_x) * (y - middle_y) for x, y in logs) / across if across else 0.0


def _curve(bench: Bench, name: str, title: str, axes: tuple[str, str], series: dict[str, Points]) -> None:
    lines = {
        line: {"points": [list(point) for point in points], "slope": slope(points)} for line, points in series.items()
    }
    bench.curves[name] = {"title": title, "x": axes[0], "y": axes[1], "series": lines}
    for line, found in lines.items():
        print(f"  {name}: {line}: slope {found['slope']:+.2f}", flush=True)


async def _costs(sides: list[Side], method: Method) -> list[float]:
    """Median microseconds per operation of each; every side in every round, so that all see the same weather."""
    counts = [await count_for(side, method) for side in sides]
    costs: list[list[float]] = [[] for _ in sides]
    for _ in range(1 if method.quick else _ROUNDS):
        for side, count, found in zip(sides, counts, costs, strict=True):
            found.append(await side.run(count) / count * 1e6)
    return [spread(found)[1] for found in costs]


# Keys


async def _keys(bench: Bench, keys: int) -> None:
    series: dict[str, Points] = {}
    upkeep: dict[str, str] = {}

    async def measure(
        name: str, make: Callable[[int], Cache], limit: int, callers: int, place: Path | None = None
    ) -> None:
        async with make(0) as cache, make(1) as few:
            series[name], filled = await _filled(bench, cache, few, limit, callers)
            if bench.wants_curve("upkeep"):
                upkeep.update(await growth_upkeep.upkeep(cache, name, filled, place))

    def redis(database: int) -> Cache:
        return RedisCache(bench.address.database(database), l1_max_entries=0, timeout=30)

    def near(_: int) -> Cache:
        return MemoryCache(l1_max_entries=2 * keys, l1_max_bytes=1 << 34, timeout=30, max_bytes=None)

    await measure("Redis", redis, keys, 100)
    await measure("memory, all in L1", near, keys, 1)
    for name, in_memory, limit in (("files, tmpfs", True, keys), ("files, disk", False, min(keys, _ON_DISK))):
        with folder(in_memory=in_memory) as place:

            def files(number: int, place: Path = place) -> Cache:
                return FileCache(place / str(number), l1_max_entries=0, timeout=30, max_bytes=None)

            await measure(name, files, min(limit, room_for_files(place)), 100, place / "0")
    _curve(bench, "keys", "Time of a get, by keys in the store", ("keys", "µs per get"), series)
    if upkeep:
        upkeep["nothing at all, for a second"] = await growth_upkeep.nothing()
        title = "Work on all entries, and the longest time that the event loop was held up by it (target: 10 ms)"
        bench.curves["upkeep"] = {"title": title, "figures": upkeep}


async def _filled(bench: Bench, cache: Cache, few: Cache, keys: int, callers: int) -> tuple[Points, int]:
    """Fill *cache* step by step, measuring at each; return the points, and how many keys it has then.

    Each step is measured in pairs with *few*, which stays at 1,000 keys: the steps are minutes apart.
    """
    await few.set_many({f"growth:{number}": small(number) for number in range(_FEW)}, ttl="1d")
    base = reads(few.get, [f"growth:{number}" for number in range(_FEW)], callers, make=small)
    ratios: list[tuple[int, float]] = []
    bases: list[float] = []
    until = time.monotonic() + _FILL_SECONDS
    done = 0
    for size in _decades(keys):
        while done < size and time.monotonic() < until:
            upto = min(done + 1000, size)
            await cache.set_many({f"growth:{number}": small(number) for number in range(done, upto)}, ttl="1d")
            done = upto
        chosen = random.Random(done).sample(range(done), min(done, 2000))  # noqa: S311  # nothing is secret
        names = [f"growth:{number}" for number in chosen]
        await cache.get_many(names)
        side = reads(cache.get, names, callers, numbers=chosen, make=small)
        paired = await pairs(side, base, bench.method)
        ratios.append((done, spread(paired.times)[1]))
        bases += paired.theirs
        if done < size:
            break
    base_cost = spread(bases)[1] * 1e6
    return [(size, ratio * base_cost) for size, ratio in ratios], done


def _decades(keys: int) -> Iterator[int]:
    size = _FEW
    while size < keys:
        yield size
        size *= 10
    yield keys


# Callers


async def _callers(bench: Bench) -> None:
    series: dict[str, Points] = {}
    most = _CALLERS[:3] if bench.method.quick else _CALLERS
    async with AsyncExitStack() as stack:
        for name, cache in (await _both(bench, stack)).items():
            keys = [f"callers:{index}" for index in range(most[-1])]
            for first in range(0, len(keys), 100):
                await cache.set_many({keys[index]: result(index) for index in range(first, first + 100)}, ttl="1h")
            costs = await _costs([reads(cache.get, keys, callers) for callers in most], bench.method)
            series[name] = list(zip(most, costs, strict=True))
    _curve(bench, "callers", "Time per get, by concurrent callers", ("concurrent callers", "µs per get"), series)


async def _both(bench: Bench, stack: AsyncExitStack) -> dict[str, Cache]:
    place = stack.enter_context(folder(in_memory=True))
    return {
        "Redis": await stack.enter_async_context(RedisCache(bench.address.url, l1_max_entries=0, timeout=30)),
        "files, tmpfs": await stack.enter_async_context(FileCache(place, l1_max_entries=0, timeout=30)),
    }


# Sizes


async def _sizes(bench: Bench) -> None:
    series: dict[str, Points] = {}
    sizes = _SIZES[:4] if bench.method.quick else _SIZES
    async with AsyncExitStack() as stack:
        for name, cache in (await _both(bench, stack)).items():
            for kind, make in {"JSON": sized, "bytes": blob}.items():
                sides = []
                for size in sizes:
                    value = make(size, 3)
                    await cache.set(f"sized:{kind}:{size}", value, ttl="1h")
                    sides.append(_sequence(partial(cache.get, f"sized:{kind}:{size}"), value))
                series[f"{name}, {kind}"] = list(zip(sizes, await _costs(sides, bench.method), strict=True))
    _curve(bench, "sizes", "Time of a get, by size of the value, one caller", ("bytes", "µs per get"), series)


def _sequence(get: Callable[[], Awaitable[Any]], expected: Any) -> Side:
    """One caller, one get after the other; whole values compared off the clock."""

    async def run(count: int) -> float:
        took = 0.0
        for _ in range(count):
            started = time.perf_counter()
            value = await get()
            took += time.perf_counter() - started
            if value != expected:
                raise WrongValueError("sized")
        return took

    return Side(run)


# Processes


async def _processes(bench: Bench) -> None:
    series: dict[str, Points] = {}
    numbers = _PROCESSES[:2] if bench.method.quick else _PROCESSES
    with folder(in_memory=True) as place:
        tasks: dict[str, dict[str, Any]] = {
            "one server": {"url": bench.address.url},
            "one folder": {"folder": str(place)},
        }
        for name, task in tasks.items():
            await fill(task)
            async with AsyncExitStack() as stack:
                task["callers"] = 100
                sides = [await stack.enter_async_context(child(task)) for _ in range(numbers[-1])]
                count = 4 * await count_for(sides[0], bench.method)
                rates: dict[int, list[float]] = {number: [] for number in numbers}
                for _ in range(1 if bench.method.quick else _ROUNDS):
                    for number in numbers:
                        times = await asyncio.gather(*(side.run(count) for side in sides[:number]))
                        rates[number].append(sum(count / took for took in times))
            series[name] = [(number, spread(found)[1]) for number, found in rates.items()]
    axes = ("processes", "reads per second, together")
    _curve(bench, "processes", "Reads per second of several processes, 100 callers each", axes, series)
