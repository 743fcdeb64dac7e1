"""Worker processes as their parent has them."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_ANSWER_SECONDS = 60.0


class Process:
    """One worker.

    Args:
        name: Of this incarnation.
        options: See ``worker.Worker``.
        log: What it says on stderr.
        violation: Called with what it, or its end, tells.
    """

    def __init__(
        self, name: str, options: dict[str, Any], log: Path, violation: Callable[[dict[str, Any]], None]
    ) -> None:
        self.name = name
        self.samples: list[dict[str, float]] = []
        self.report: dict[str, Any] = {}
        self.since = time.monotonic()
        self._options = options
        self._log = log
        self._violation = violation
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ending = False

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.soak.worker", json.dumps({"process": self.name, **self._options})),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                limit=1 << 24,
            )
        self._reading = asyncio.create_task(self._read())
        async with asyncio.timeout(_ANSWER_SECONDS):
            await self._up

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while line := await self._process.stdout.readline():
            told = json.loads(line)
            if "violation" in told:
                self._violation(told)
            elif "up" in told:
                self._up.set_result(None)
            else:
                self.report = told["report"] or self.report
                future = self._answers.pop(told["number"], None)
                if future is not None and not future.done():
                    future.set_result(told["answer"])
        code = await self._process.wait()
        if not self._ending:
            self._violation({"violation": f"{self.name} ended with {code}: {self._log.read_text()[-2000:]}"})
        for future in (*self._answers.values(), self._up):
            if not future.done():
                future.cancel()

    async def ask(self, name: str, *args: Any) -> Any:
        """Have it do something, and return its answer; None, where it was killed meanwhile."""
        assert self._process is not None and self._process.stdin is not None
        if self._ending:
            return None
        number = next(self._numbers)
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(json.dumps([number, name, *args]).encode() + b"\n")
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await asyncio.wait([future])
        except TimeoutError:
            self._violation({"violation": f"{self.name} has not answered {name!r} for {_ANSWER_SECONDS:g} s"})
            return None
        return None if future.cancelled() else future.result()

    async def sample(self) -> None:
        held = await self.ask("sample")
        if held is not None:
            self.samples.append({"age": round(time.monotonic() - self.since, 1), **held})

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def stop(self) -> None:
        """Let it close its caches under load, and end."""
        await self.ask("stop")
        await self._end()

    async def kill(self) -> None:
        """kill -9."""
        self._ending = True
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._end()

    async def _end(self) -> None:
        self._ending = True
        assert self._process is not None and self._reading is not None
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await asyncio.wait([self._reading])
                await self._process.wait()
        except TimeoutError:
            self._violation({"violation": f"{self.name} has closed its caches and does not end"})
            self._process.kill()
            await self._process.wait()

    def said(self) -> str:
        """What it said on stderr."""
        return self._log.read_text()[-2000:]
