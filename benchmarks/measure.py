"""How things are compared.

Shared machines change their speed within a second. So two sides are measured back to back, for about 40 ms each, the
order alternating from pair to pair; a row is the median of the pairs' ratios, with their quartiles. Absolute figures
are medians too, and stand beside the ratio.

Rules:
- The clock starts when every caller has had its first value: connections are open, tasks run, caches are filled.
- A side's number of operations is found once, so that its slice takes about 40 ms, and stays.
- The garbage collector is on, as in a program; between pairs it is run, so that no side pays for the other's.
- A wrong value ends the run.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from .values import Make, WrongValueError, compare, result

Get = Callable[[str], Awaitable[Any]]


@dataclass(frozen=True)
class Method:
    """How long and how often.

    Attributes:
        pairs: Pairs of slices per row; odd, so that the median is one of them.
        slice: Seconds that one side's slice is to take.
        quick: Only to see that everything works: few and short slices, and counts that tell nothing about speed.
    """

    pairs: int = 31
    slice: float = 0.04
    quick: bool = False


@dataclass(frozen=True)
class Side:
    """One side of a pair.

    Attributes:
        run: Does so many operations, and returns the seconds they took.
        least: At least so many operations in a slice: each caller should have several turns.
    """

    run: Callable[[int], Awaitable[float]]
    least: int = 1


@dataclass
class Paired:
    """What the pairs gave: seconds per operation, pair by pair."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def times(self) -> list[float]:
        """Our time over theirs, in each pair."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def rates(self) -> list[float]:
        """Our rate over theirs, in each pair."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


async def count_for(side: Side, method: Method) -> int:
    """Find how many operations of *side* take a slice."""
    count = side.least
    if method.quick:
        return count
    while (took := await side.run(count)) < method.slice / 4:
        count *= 4 if took < method.slice / 16 else 2
    return max(side.least, round(count * method.slice / took))


async def pairs(ours: Side, theirs: Side, method: Method, number: int | None = None) -> Paired:
    """Measure both sides back to back, so many times, in alternating order."""
    counts = await count_for(ours, method), await count_for(theirs, method)
    paired = Paired()
    for turn in range(method.pairs if number is None else min(number, method.pairs)):
        gc.collect()
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            took = await (ours, theirs)[which].run(counts[which]) / counts[which]
            (paired.ours, paired.theirs)[which].append(took)
    return paired


def reads(
    get: Get, keys: Sequence[str], callers: int, *, numbers: Sequence[int] | None = None, make: Make = result
) -> Side:
    """So many long-lived tasks, each asking for one key after the other.

    The first key must hold the value that *make* makes of the first number, and so on; without *numbers*: of 0, 1, ….
    No two callers ask for the same key, so that nobody gains by merging equal reads.
    """
    numbered = list(zip(keys, range(len(keys)) if numbers is None else numbers, strict=True))
    shares = [numbered[first::callers][:16] for first in range(callers)]

    async def run(count: int) -> float:
        waiting, left = callers, count
        started = stopped = 0.0
        go = asyncio.Event()

        async def caller(share: list[tuple[str, int]]) -> None:
            nonlocal waiting, left, started, stopped
            key, number = share[0]
            compare(await get(key), number, make)
            waiting -= 1
            if not waiting:
                started = time.perf_counter()
                go.set()
            await go.wait()  # a pool may starve the others as long as the first go on asking
            for key, number in itertools.cycle(share):
                value = await get(key)
                if value["number"] != number:
                    raise WrongValueError(f"{key} answered {str(value)[:80]}")
                left -= 1
                if left <= 0:
                    if left == 0:
                        stopped = time.perf_counter()
                    compare(value, number, make)
                    return

        await _all(caller(share) for share in shares)
        return stopped - started

    return Side(run, least=2 * callers)


def writes(
    put: Callable[[str, Any], Awaitable[Any]],
    get: Get,
    keys: Sequence[str],
    values: Sequence[Any],
    callers: int,
) -> Side:
    """So many long-lived tasks, each storing changing values under keys of its own; read back off the clock.

    Key i is given ``values[i]`` or the value of another key, in turns, so that what is read back has to be the last.
    """
    shares = [list(range(first, len(keys), callers))[:16] for first in range(callers)]
    turns = itertools.count()

    async def run(count: int) -> float:
        shift = next(turns)
        waiting, left = callers, count
        started = stopped = 0.0
        last: dict[int, int] = {}
        go = asyncio.Event()

        async def caller(share: list[int]) -> None:
            nonlocal waiting, left, started, stopped
            for place, index in enumerate(itertools.cycle(share)):
                written = (index + shift + place) % len(values)
                await put(keys[index], values[written])
                last[index] = written
                if place == 0:
                    waiting -= 1
                    if not waiting:
                        started = time.perf_counter()
                        go.set()
                    await go.wait()
                    continue
                left -= 1
                if left <= 0:
                    if left == 0:
                        stopped = time.perf_counter()
                    return

        await _all(caller(share) for share in shares)
        for index, written in list(last.items())[:: max(1, len(last) // 100)]:
            if await get(keys[index]) != values[written]:
                raise WrongValueError(f"{keys[index]} does not hold what was stored last")
        return stopped - started

    return Side(run, least=2 * callers)


async def _all(coroutines: Any) -> None:
    """Run all of them; the first error ends the others, and is raised bare."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


@dataclass
class Stall:
    """The longest time that the event loop left a heartbeat waiting.

    Attributes:
        wall: Seconds late, whatever the reason: on a busy machine also other programs.
        computed: The most CPU seconds that the loop's thread used between two beats.
    """

    wall: float = 0.0
    computed: float = 0.0
    beats: int = 0


@asynccontextmanager
async def heartbeat(every: float = 0.001) -> Any:
    """Watch the event loop for the length of the block; gives the ``Stall``."""
    stall = Stall()

    async def beat() -> None:
        while True:
            asked, computed = time.perf_counter(), time.thread_time()
            await asyncio.sleep(every)
            stall.wall = max(stall.wall, time.perf_counter() - asked - every)
            stall.computed = max(stall.computed, time.thread_time() - computed)
            stall.beats += 1

    gc.collect()
    task = asyncio.create_task(beat())
    await asyncio.sleep(5 * every)
    stall.wall = stall.computed = 0.0
    try:
        yield stall
        await asyncio.sleep(2 * every)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
