"""What a worker knows of itself: how late its own loop and threads were, what it holds, what it said."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_BEAT = 0.02
_NOTED = 0.005
_AFTERMATH = 20.0  # seconds for which what is logged may be a fault's doing: probes come every 15 at the latest


class Heartbeat:
    """How late this process was, so that nobody else is blamed for it."""

    def __init__(self) -> None:
        self._late: deque[tuple[float, float]] = deque(maxlen=20_000)  # from, to: the machine gave us no time
        self._threads = ThreadPoolExecutor(1, "heartbeat")
        self.total = 0.0
        self.beats = 0

    async def beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            start = time.monotonic()
            await asyncio.sleep(_BEAT)
            self._note(start, _BEAT)
            if self.beats % 5 == 0:  # those threads in which files are read wait for the machine, too
                start = time.monotonic()
                await loop.run_in_executor(self._threads, int)
                self._note(start, 0.0)
            self.beats += 1

    def _note(self, start: float, meant: float) -> None:
        now = time.monotonic()
        if (late := now - start - meant) > _NOTED:
            self._late.append((now - late, now))
            self.total += late

    async def judged(self) -> None:
        """Wait until what has just been is noted."""
        until = self.beats + 6
        while self.beats < until:
            await asyncio.sleep(_BEAT)

    def late(self, start: float, end: float) -> float:
        """Return for how many seconds of that time this process was not served."""
        return sum(min(to, end) - max(since, start) for since, to in self._late if since < end and to > start)

    def close(self) -> None:
        self._threads.shutdown()


class Faults:
    """Which faults go on, as the parent tells; what they may excuse."""

    def __init__(self) -> None:
        self._on: dict[str, int] = {}
        self._last = -1e9
        self.begun = 0

    def begin(self, name: str) -> None:
        self._on[name] = self._on.get(name, 0) + 1
        self.begun += 1

    def end(self, name: str) -> None:
        self._on[name] -= 1
        if not self._on[name]:
            del self._on[name]
        self._last = time.monotonic()

    def names(self) -> list[str]:
        return sorted(self._on)

    def within(self, seconds: float) -> bool:
        """Whether there is one, or was so many seconds ago."""
        return bool(self._on) or time.monotonic() - self._last < seconds


class Ears(logging.Handler):
    """Hears every log record and every warning, and knows which have no place here."""

    def __init__(self, faults: Faults, violation: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._faults = faults
        self._violation = violation
        self.heard: dict[str, int] = {}

    def listen(self) -> None:
        logging.getLogger().addHandler(self)
        warnings.simplefilter("default")
        warnings.showwarning = self._warned  # type: ignore[assignment]  # the parameters it is called with
        sys.unraisablehook = lambda args: self._violation(f"unraisable: {args.exc_value!r} in {args.object!r}")

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        kind = f"{record.levelname} {record.msg}"[:100]
        self.heard[kind] = self.heard.get(kind, 0) + 1
        if record.exc_info:
            text += f": {record.exc_info[1]!r}"
            self._violation(f"a trace was logged: {text}")
        elif record.name == "asyncio":
            self._violation(f"asyncio complains: {text}")
        elif record.levelno >= logging.ERROR and not self._faults.within(_AFTERMATH):
            self._violation(f"logged with no fault about: {text}")

    def _warned(self, message: Any, category: type[Warning], *args: Any, **rest: Any) -> None:
        self._violation(f"{category.__name__}: {message}")


def resources() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_kib": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        "handles": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
    }
