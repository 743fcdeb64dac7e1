"""A process under load. Reads one command a line (JSON, numbered) and answers each with a line of that number.

    python -m tests.soak.worker '{"process": "w0.1", "url": "redis://…", "folder": "…", "standby": "…", "seed": 1, …}'

Lines without a number tell of a violation. It ends when it is told to, or its input ends.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mcp_hub_cache import Cache, RedisCache
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.memory import MemoryStore
from tests.soak.load import Load, Place
from tests.soak.watch import Ears, Faults, Heartbeat, resources

_REST_SECONDS = 30.0  # longer than any deadline, loader, or wait for another process's


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class Worker:
    def __init__(
        self,
        *,
        process: str,
        url: str,
        folder: str,
        standby: str,
        seed: int,
        late: float,
        agents: int,
        faults: Sequence[str] = (),
    ) -> None:
        self.faults = Faults()
        for fault in faults:
            self.faults.begin(fault)
        self.heartbeat = Heartbeat()
        self.ears = Ears(self.faults, self.violation)
        self.offset = 0.0
        self.states: Counter[str] = Counter()
        self.places = [
            Place("redis", RedisCache(url, fallback=FileStore(standby)), time.time),
            Place("file", Cache(FileStore(folder, clock=self.clock)), self.clock),
            Place("memory", Cache(MemoryStore(clock=self.clock, max_bytes=4_000_000)), self.clock),
        ]
        self.load = Load(
            process,
            self.places,
            late=late,
            rng=random.Random(f"{seed} {process}"),
            heartbeat=self.heartbeat,
            faults=self.faults,
            violation=self.violation,
        )
        self._agents = agents
        self._process = process

    def clock(self) -> float:
        return time.time() + self.offset

    def violation(self, reason: str, **facts: Any) -> None:
        say(violation=reason, process=self._process, faults=self.faults.names(), **facts)

    async def note_states(self) -> None:
        store: Any = self.places[0].cache.store
        while True:
            self.states[store.state().state] += 1
            await asyncio.sleep(0.1)

    async def do(self, name: str, *args: Any) -> Any:
        match name:
            case "begin":
                return self.faults.begin(*args)
            case "end":
                return self.faults.end(*args)
            case "jump":
                self.offset += args[0]
                return None
            case "rest":
                return await self.rest()
            case "go":
                return self.load.going.set()
            case "healthy":
                return [await place.cache.health_check() for place in self.places]
            case "sample":
                return resources()
        raise ValueError(name)

    async def rest(self) -> None:
        """Let nothing go on."""
        self.load.going.clear()
        try:
            async with asyncio.timeout(_REST_SECONDS):
                await self._rested()
        except TimeoutError:
            own = asyncio.current_task()
            stacks = [f"{task.get_name()}: {task.get_stack()}" for task in asyncio.all_tasks() if task is not own]
            flights = [list(place.cache._engine.session().flights._flights) for place in self.places]
            self.violation(
                f"{self._agents - self.load.resting} calls have not ended for {_REST_SECONDS:g} s",
                history=[*stacks, str(flights)],
            )

    async def _rested(self) -> None:
        while self.load.resting < self._agents:
            await asyncio.sleep(0.01)
        for place in self.places:
            session = place.cache._engine._sessions.peek()
            while session is not None and (session.flights._flights or session.behind):
                await asyncio.sleep(0.01)
        await self.load.settle()

    def report(self) -> dict[str, Any]:
        return {
            "counts": dict(self.load.counts),
            "worst": self.load.worst,
            "states": {state: ticks / 10 for state, ticks in self.states.items()},
            "heard": self.ears.heard,
            "late": self.heartbeat.total,
            "errors": {place.name: dict(place.cache.stats.errors) for place in self.places},
        }

    async def answer(self, number: int, name: str, args: list[Any]) -> None:
        answer = await self.do(name, *args)
        say(number=number, answer=answer, report=self.report() if name in ("sample", "rest") else None)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.violation(f"unhandled in the loop: {context}"))
        self.ears.listen()
        own = [asyncio.create_task(self.heartbeat.beat()), asyncio.create_task(self.note_states())]
        agents = [asyncio.create_task(self.load.play()) for _ in range(self._agents)]
        for agent in agents:
            agent.add_done_callback(self._agent_ended)
        reader = asyncio.StreamReader()
        pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        answers: set[asyncio.Task[None]] = set()
        say(up=True)
        while line := await reader.readline():
            number, name, *args = json.loads(line)
            if name == "stop":
                break
            task = asyncio.create_task(self.answer(number, name, args))
            answers.add(task)
            task.add_done_callback(answers.discard)
        else:
            return  # the parent is gone
        pipe.close()
        await self.end(agents, own)
        say(number=number, answer=None, report=self.report())

    def _agent_ended(self, agent: asyncio.Task[None]) -> None:
        if not agent.cancelled():
            self.violation(f"the load itself failed: {agent.exception()!r}")

    async def end(self, agents: list[asyncio.Task[None]], own: list[asyncio.Task[None]]) -> None:
        """Close everything in the middle of the load, and look whether anything is left."""
        for agent in agents:
            agent.cancel()
        await asyncio.gather(*agents, return_exceptions=True)
        await self.load.settle()
        for place in self.places:
            await place.cache.aclose()
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)
        self.heartbeat.close()
        if left := asyncio.all_tasks() - {asyncio.current_task()}:
            self.violation(f"left after closing: {left}")


if __name__ == "__main__":
    asyncio.run(Worker(**json.loads(sys.argv[1])).run())
