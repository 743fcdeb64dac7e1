"""A process of a fleet, for ``test_fleet_processes``: one cache, and a loader that says when it is called.

Reads one command per line (JSON, with a number), does each in a task of its own and answers with one line that bears
the number. What happens meanwhile, a loader's call or the wait for another process's load, is told by lines without.
It ends when its input does.

    python tests/fleet_child.py (file | redis) WHERE HOLD CALLS OPTIONS

CALLS is a file that gets a line for every call of a loader, OPTIONS the cache's, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from mcp_hub_cache import Cache, FileCache, RedisCache, _placeholders, current_entry
from mcp_hub_cache._leases import Rivals


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


class Child:
    def __init__(self, cache: Cache, calls: str) -> None:
        self.cache = cache
        self.go = asyncio.Event()
        self._calls = os.open(calls, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def load(
        self, key: str, *, callers: int = 1, then: str = "value", takes: float | None = None, **how: Any
    ) -> Any:
        """Ask for *key* by so many callers at once.

        *takes*: the loader's seconds, None: until "release". *then*: what it does in the end.
        """
        landed = 0.0

        async def loader() -> str:
            nonlocal landed
            os.write(self._calls, b"%d %s\n" % (os.getpid(), key.encode()))
            say(event="loads", key=key)
            await (self.go.wait() if takes is None else asyncio.sleep(takes))
            if then == "fail":
                raise LookupError("no such thing")
            if then == "skip":
                current_entry().skip()
            landed = time.monotonic()
            return f"of {os.getpid()}"

        if then == "refuse":
            how["cache_if"] = lambda _: False

        async def ask() -> tuple[Any, float]:
            try:
                value: Any = await self.cache.get_or_load(key, loader, **how)
            except Exception as error:  # told
                value = type(error).__name__
            return value, time.monotonic()

        begun = time.monotonic()
        answers = await asyncio.gather(*(ask() for _ in range(callers)))
        ends = sorted(end for _, end in answers)
        values = [value for value, _ in answers]
        return {
            "values": sorted(set(values)),
            "count": len(values),
            "seconds": ends[-1] - begun,
            "first": ends[0],
            "landed": landed,
        }

    async def do(self, name: str, *args: Any, **how: Any) -> Any:
        if name == "load":
            return await self.load(*args, **how)
        if name == "release":
            return self.go.set()
        if name == "hold":
            return self.go.clear()
        return await getattr(self.cache, name)(*args, **how)

    async def answer(self, number: int, name: str, args: list[Any], how: dict[str, Any]) -> None:
        say(number=number, answer=await self.do(name, *args, **how))


def tell_of_waiting() -> None:
    over = Rivals.over

    async def told(self: Rivals, key: bytes, token: bytes, deadline: float) -> bool:
        say(event="waits", key=key.rpartition(b":")[2].decode())
        return await over(self, key, token, deadline)

    Rivals.over = told  # type: ignore[method-assign]


async def main() -> None:
    kind, where, hold, calls, options = sys.argv[1:]
    _placeholders.HOLD = float(hold)  # type: ignore[misc]
    tell_of_waiting()
    given = {"timeout": 30.0, **json.loads(options)}
    async with (FileCache if kind == "file" else RedisCache)(where, **given) as cache:
        await cache.get("whatever")  # connected
        child, loop = Child(cache, calls), asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        say(event="up", pid=os.getpid())
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            number, name, args, how = json.loads(line)
            task = asyncio.create_task(child.answer(number, name, args, how))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
