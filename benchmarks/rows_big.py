"""What a value of 5 MB costs the small reads beside it, and the event loop.

The p99 of small reads is taken twice in a pair: alone, and while one task does nothing but read (or write) the big
value. A stall is how late a heartbeat comes: with bytes nothing is decoded, with JSON ``orjson.loads`` holds the loop
for as long as it takes, and no client can help that but by not asking for it.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from .bench import Bench
from .clients import Ours
from .measure import Get, Paired, Stall, heartbeat
from .values import WrongValueError, blob, compare, result, sized

_SIZE = 5_000_000
_CALLERS = 10
_SECONDS = 0.15  # a slice, or longer
_LEAST = 200  # reads that a p99 is taken of
_STALLS = 9


async def run(bench: Bench) -> None:
    """Measure the section."""
    if not bench.wants("big."):
        return
    ours = Ours()
    await ours.open(bench.address)
    try:
        keys = [f"small:{index}" for index in range(_CALLERS)]
        await ours.fill((key, result(index)) for index, key in enumerate(keys))
        values: dict[str, Any] = {"bytes": blob(_SIZE, 1), "json": sized(_SIZE, 1)}
        for kind, value in values.items():
            await ours.set(f"big:{kind}", value)
            await _beside(bench, ours, keys, kind, value)
            await _stalls(bench, ours, kind, value)
    finally:
        await ours.close()


async def _beside(bench: Bench, ours: Ours, keys: list[str], kind: str, value: Any) -> None:
    async def read() -> None:
        found = await ours.get(f"big:{kind}")
        if type(found) is not type(value) or len(found) != len(value) or _number(found) != 1:
            raise WrongValueError(f"big {kind}")

    async def write() -> None:
        await ours.set(f"big:{kind}", value)

    for name, work in (("read", read), ("written", write)):
        row = f"big.{kind}.{name}"
        if not bench.wants(row):
            continue
        paired, done = Paired(), 0
        for turn in range(bench.method.pairs):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                if which == 0:
                    p99, times = await _p99(ours.get, keys, work, bench.method.quick)
                    done += times
                else:
                    p99, _ = await _p99(ours.get, keys, None, bench.method.quick)
                (paired.ours, paired.theirs)[which].append(p99)
        if await ours.get(f"big:{kind}") != value:
            raise WrongValueError(f"big {kind}")
        bench.paired(row, paired, note=f"which was {name} {done / bench.method.pairs:.0f} times in a slice")


def _number(value: Any) -> int:
    number: int = value["number"] if isinstance(value, dict) else int.from_bytes(value[:8], "big")
    return number


async def _p99(get: Get, keys: list[str], work: Callable[[], Awaitable[None]] | None, quick: bool) -> tuple[float, int]:
    """Return the p99 of small reads over a slice, and how often *work* was done beside them."""
    latencies: list[float] = []
    working, done, enough, times = True, asyncio.Event(), asyncio.Event(), 0
    least = 10 if quick else _LEAST

    async def reader(number: int, key: str) -> None:
        value = None
        while working:
            asked = time.perf_counter()
            value = await get(key)
            latencies.append(time.perf_counter() - asked)
            if len(latencies) >= least:
                enough.set()
            if value["number"] != number:
                raise WrongValueError(key)
        compare(value, number)

    async def beside() -> None:
        nonlocal times
        for _ in itertools.count():
            if not working or work is None:
                return
            await work()
            times += 1
            done.set()

    async with asyncio.TaskGroup() as group:
        for number, key in enumerate(keys):
            group.create_task(reader(number, key))
        group.create_task(beside())
        if work is not None:  # from the second on: its own wire is open then
            await done.wait()
        latencies.clear()
        enough.clear()
        await asyncio.sleep(0 if quick else _SECONDS)
        await enough.wait()
        taken = list(latencies)
        working = False
    return statistics.quantiles(taken, n=100)[98], times


async def _stalls(bench: Bench, ours: Ours, kind: str, value: Any) -> None:
    if not bench.wants(f"big.stall.{kind}"):
        return
    stalls: list[Stall] = []
    loads: list[tuple[float, float]] = []
    data = orjson.dumps(value) if kind == "json" else b"0"
    for _ in range(1 if bench.method.quick else _STALLS):
        async with heartbeat() as stall:
            found = await ours.get(f"big:{kind}")
        if found != value:
            raise WrongValueError(f"big {kind}")
        del found
        stalls.append(stall)
        gc.collect()  # as the heartbeat does
        started, computed = time.perf_counter(), time.thread_time()
        found = orjson.loads(data)
        loads.append((time.perf_counter() - started, time.thread_time() - computed))
        del found
    computed = statistics.median(stall.computed for stall in stalls)
    bench.single(
        f"big.stall.{kind}",
        [stall.wall * 1e3 for stall in stalls],
        note=f"of which the loop computed {computed * 1e3:.1f} ms",
    )
    if kind == "json":  # what decoding alone takes, which is the least that such a value can stall a loop
        computed = statistics.median(computed for _, computed in loads)
        bench.single(
            "big.stall.loads", [took * 1e3 for took, _ in loads], note=f"of which it computed {computed * 1e3:.1f} ms"
        )
