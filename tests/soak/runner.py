"""The run: starts everything, breaks it by and by, lets it rest now and then, and gathers what was seen."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from mcp_hub_cache.testing import FaultProxy
from tests.servers import valkey_server
from tests.soak.faults import FAULTS, Stage, small_disk
from tests.soak.processes import Process

_WARM_UP = 5.0
_CALM = 30.0  # seconds of faults between two rests
_RECOVERY = 30.0  # probes come every 15 s at the latest
_LATE = 6.0  # a worker that was stopped half-way through a set goes on as much later
_TOGETHER = 0.25  # the share of faults that come with another
# What may grow: pools fill up to their bounds, connections too, and Python keeps some memory.
_GROWTH = {"handles": 16, "threads": 8, "tasks": 8}
_GROWTH_KIB = 48 * 1024
_AGED = 20.0  # seconds that a worker's first sample needs to be one to compare with


class Violation(Exception):
    """A promise was broken."""

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__(facts["violation"])
        self.facts = facts


class Run:
    """One soak.

    Args:
        minutes: How long to break things.
        seed: Of all that is random here; what the machine does in between is not.
        processes: How many workers.
        agents: In each of them.
        only: Names of the faults to inject; none: all.
    """

    def __init__(
        self, *, minutes: float, seed: int, processes: int = 2, agents: int = 10, only: Sequence[str] = ()
    ) -> None:
        self.report: dict[str, Any] = {"seed": seed, "minutes": minutes, "processes": processes, "agents": agents}
        self.injected: Counter[str] = Counter()
        self._seconds = minutes * 60
        self._seed = seed
        self._rng = random.Random(seed)
        self._workers: list[Process] = []
        self._gone: list[Process] = []
        self._numbers = Counter[int]()
        self._active: Counter[str] = Counter()
        self._agents = agents
        self._processes = processes
        self._only = only or sorted(FAULTS)
        self._violated: asyncio.Future[None] | None = None
        self._options: dict[str, Any] = {}
        self._folder = Path()

    async def run(self) -> dict[str, Any]:
        """Return the report; ``violation`` in it is None where every promise held."""
        self._violated = asyncio.get_running_loop().create_future()
        self._folder = Path(tempfile.mkdtemp(prefix="soak"))
        started = time.monotonic()
        try:
            async with AsyncExitStack() as stack:
                server = stack.enter_context(valkey_server("--enable-debug-command", "local"))
                front = await stack.enter_async_context(FaultProxy(server.url, seed=self._seed))
                bounded = await stack.enter_async_context(small_disk(self._folder / "disk"))
                disk = self._folder / "disk"
                self._options = {
                    "url": front.url, "folder": str(disk / "files"), "standby": str(disk / "standby"),
                    "seed": self._seed, "late": _LATE, "agents": self._agents,
                }  # fmt: skip
                stage = Stage(server, front, disk, bounded, self._rng, self._workers, self._replace)
                stack.push_async_callback(self._kill)
                work = asyncio.create_task(self._work(stage))
                await asyncio.wait([work, self._violated], return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    work.cancel()
                    await asyncio.wait([work])
                if not work.cancelled() and not self._violated.done():
                    work.result()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        error = self._violated.exception() if self._violated.done() else None
        workers = [*self._gone, *self._workers]
        return self.report | {
            "violation": error.facts if isinstance(error, Violation) else None,
            "seconds": round(time.monotonic() - started, 1),
            "disk full was": "possible" if bounded else "left out: no disk of our own could be mounted",
            "faults": dict(self.injected),
            "workers": {worker.name: {"samples": worker.samples, **worker.report} for worker in workers},
        }

    def _heard(self, facts: dict[str, Any]) -> None:
        assert self._violated is not None
        if not self._violated.done():
            self._violated.set_exception(Violation(facts))

    async def _work(self, stage: Stage) -> None:
        await asyncio.gather(*(self._start(at) for at in range(self._processes)))
        await asyncio.sleep(_WARM_UP)
        await self._calm()
        until = time.monotonic() + self._seconds
        while (left := until - time.monotonic()) > 0:
            await self._break(stage, min(left, _CALM))
            await self._calm()
        self._compare()
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    # Workers

    async def _start(self, at: int) -> None:
        self._numbers[at] += 1
        name = f"{at}.{self._numbers[at]}"
        options = self._options | {"faults": list(self._active.elements())}
        worker = Process(name, options, self._folder / f"{name}.log", self._heard)
        await worker.start()
        # What began or ended while it started, it has not been told.
        now = Counter(self._active)
        for fault in (now - Counter(options["faults"])).elements():
            await worker.ask("begin", fault)
        for fault in (Counter(options["faults"]) - now).elements():
            await worker.ask("end", fault)
        self._workers.append(worker)

    async def _replace(self, worker: Process) -> None:
        self._workers.remove(worker)
        self._gone.append(worker)
        await worker.kill()
        await self._start(int(worker.name.split(".", maxsplit=1)[0]))

    async def _kill(self) -> None:
        for worker in self._workers:
            await worker.kill()

    async def _tell(self, *command: Any) -> None:
        await asyncio.gather(*(worker.ask(*command) for worker in list(self._workers)))

    # Breaking

    async def _break(self, stage: Stage, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            names = [self._rng.choice(self._only)]
            other = self._rng.choice(self._only)
            if self._rng.random() < _TOGETHER and FAULTS[other][0] != FAULTS[names[0]][0]:
                names.append(other)
            await asyncio.gather(*(self._inject(stage, name) for name in names))
            await asyncio.sleep(self._rng.expovariate(1.5))

    async def _inject(self, stage: Stage, name: str) -> None:
        await self._tell("begin", name)
        self._active[name] += 1
        try:
            async with FAULTS[name][1](stage):
                pass
        finally:
            self._active[name] -= 1
            self._active += Counter()
        self.injected[name] += 1
        await self._tell("end", name)

    async def _calm(self) -> None:
        """Let everything come back by itself, and see what everybody holds while nothing goes on."""
        started = time.monotonic()
        while not all([all(await worker.ask("healthy") or ()) for worker in self._workers]):
            if time.monotonic() - started > _RECOVERY:
                self._heard({"violation": f"not healthy {_RECOVERY:g} s after the last fault"})
                return
            await asyncio.sleep(0.2)
        self.report["slowest recovery"] = max(
            self.report.get("slowest recovery", 0.0), round(time.monotonic() - started, 2)
        )
        await self._tell("rest")
        await asyncio.sleep(0.5)
        await asyncio.gather(*(worker.sample() for worker in self._workers))
        await self._tell("go")
        for worker in self._workers:
            if said := worker.said():
                self._heard({"violation": f"{worker.name} said on stderr: {said}"})

    def _compare(self) -> None:
        for worker in self._workers:
            samples = [sample for sample in worker.samples if sample["age"] > _AGED]
            if len(samples) < 2:
                continue
            first, last = samples[0], samples[-1]
            for what, most in (*_GROWTH.items(), ("rss_kib", _GROWTH_KIB)):
                if last[what] > first[what] + most:
                    self._heard({"violation": f"{worker.name}: {what} grew from {first[what]} to {last[what]}"})
