"""What is done to the server, the network, the folders, the workers and their clocks: each breaks, lasts, and mends.

Faults of one group touch the same thing and exclude each other; two of different groups may go on at once.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hiredis

from mcp_hub_cache.testing import FaultProxy
from tests.servers import Server
from tests.soak.processes import Process

_DISK_MIB = 32
_SNAPSHOT = "dump.rdb"
_ENTRY = re.compile("[0-9a-f]{32}")


@dataclass
class Stage:
    """What can be broken."""

    server: Server
    proxy: FaultProxy
    disk: Path  # where ``files``, shared, and ``standby`` are
    bounded: bool  # whether the disk is one of our own, which can be filled
    rng: random.Random
    workers: list[Process]
    replace: Callable[[Process], Awaitable[None]]  # kill a worker, and start another

    def lasting(self, least: float, most: float) -> Awaitable[None]:
        return asyncio.sleep(self.rng.uniform(least, most))

    async def tell(self, *command: str | int) -> Any:
        """Ask the server, until it answers; None: it says no."""
        until = time.monotonic() + 30
        while True:
            try:
                return await asyncio.to_thread(self.server.command, *command)
            except hiredis.ReplyError:
                return None
            except OSError:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.05)

    def entries(self) -> list[Path]:
        """Files of entries, of both folders."""
        found = []
        for folder, _, names in os.walk(self.disk):
            found += [Path(folder, name) for name in names if _ENTRY.fullmatch(name)]
        return found


Fault = Callable[[Stage], AbstractAsyncContextManager[None]]
FAULTS: dict[str, tuple[str, Fault]] = {}


def fault(group: str) -> Callable[[Callable[[Stage], AsyncIterator[None]]], Fault]:
    def noted(work: Callable[[Stage], AsyncIterator[None]]) -> Fault:
        made = asynccontextmanager(work)
        FAULTS[work.__name__.replace("_", " ")] = group, made
        return made

    return noted


# The server


@fault("server")
async def server_stopped(stage: Stage) -> AsyncIterator[None]:
    stage.server.pause()
    try:
        await stage.lasting(0.2, 3.0)
        yield
    finally:
        stage.server.resume()


@fault("server")
async def server_killed(stage: Stage) -> AsyncIterator[None]:
    """It comes back empty."""
    stage.server.kill()
    (stage.server.folder / _SNAPSHOT).unlink(missing_ok=True)
    try:
        await stage.lasting(0.0, 3.0)
        yield
    finally:
        await asyncio.to_thread(stage.server.start)


@fault("server")
async def server_set_back(stage: Stage) -> AsyncIterator[None]:
    """It comes back with what it held some seconds ago."""
    await stage.tell("SAVE")
    await stage.lasting(0.5, 5.0)
    stage.server.kill()
    try:
        await stage.lasting(0.0, 1.0)
        yield
    finally:
        await asyncio.to_thread(stage.server.start)


@fault("server")
async def clients_killed(stage: Stage) -> AsyncIterator[None]:
    for kind in ("normal", "pubsub"):
        await stage.tell("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
    yield


@fault("server")
async def clients_paused(stage: Stage) -> AsyncIterator[None]:
    seconds = stage.rng.uniform(0.1, 2.0)
    await stage.tell("CLIENT", "PAUSE", int(seconds * 1000), stage.rng.choice(["ALL", "WRITE"]))
    await asyncio.sleep(seconds)
    yield


@fault("server")
async def server_busy(stage: Stage) -> AsyncIterator[None]:
    await stage.tell("DEBUG", "SLEEP", f"{stage.rng.uniform(0.1, 1.5):.2f}")
    yield


@fault("server")
async def flushed(stage: Stage) -> AsyncIterator[None]:
    await stage.tell("FLUSHALL")
    yield


@fault("server")
async def reloaded(stage: Stage) -> AsyncIterator[None]:
    await stage.tell("DEBUG", "RELOAD")
    yield


@fault("server")
async def scripts_forgotten(stage: Stage) -> AsyncIterator[None]:
    await stage.tell("SCRIPT", "FLUSH")
    yield


@fault("server")
async def memory_full(stage: Stage) -> AsyncIterator[None]:
    await stage.tell("CONFIG", "SET", "maxmemory", "1mb")
    try:
        await stage.lasting(0.2, 3.0)
        yield
    finally:
        await stage.tell("CONFIG", "SET", "maxmemory", "0")


@fault("server")
async def evicting(stage: Stage) -> AsyncIterator[None]:
    await stage.tell("CONFIG", "SET", "maxmemory-policy", "allkeys-random")
    await stage.tell("CONFIG", "SET", "maxmemory", "3mb")
    try:
        await stage.lasting(0.2, 3.0)
        yield
    finally:
        await stage.tell("CONFIG", "SET", "maxmemory", "0")
        await stage.tell("CONFIG", "SET", "maxmemory-policy", "noeviction")


@fault("server")
async def password_set(stage: Stage) -> AsyncIterator[None]:
    await stage.tell("CONFIG", "SET", "requirepass", "another")
    stage.server.password = "another"
    await stage.tell("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    try:
        await stage.lasting(0.2, 3.0)
        yield
    finally:
        await stage.tell("CONFIG", "SET", "requirepass", "")
        stage.server.password = None


@fault("server")
async def read_only(stage: Stage) -> AsyncIterator[None]:
    await stage.tell("REPLICAOF", "127.0.0.1", 1)
    try:
        await stage.lasting(0.2, 3.0)
        yield
    finally:
        await stage.tell("REPLICAOF", "NO", "ONE")


# The network


@fault("network")
async def black_hole(stage: Stage) -> AsyncIterator[None]:
    with stage.proxy.black_hole():
        await stage.lasting(0.2, 3.0)
        yield


@fault("network")
async def held_back(stage: Stage) -> AsyncIterator[None]:
    """And passed on later, as by a cable that was pulled."""
    with stage.proxy.hold():
        await stage.lasting(0.2, 3.0)
        yield


@fault("network")
async def slow_network(stage: Stage) -> AsyncIterator[None]:
    with stage.proxy.delay((0.0, stage.rng.choice([0.02, 0.2, 1.0]))):
        await stage.lasting(0.2, 3.0)
        yield


@fault("network")
async def refused(stage: Stage) -> AsyncIterator[None]:
    with stage.proxy.refuse():
        stage.proxy.cut()
        await stage.lasting(0.2, 3.0)
        yield


@fault("network")
async def cut_off(stage: Stage) -> AsyncIterator[None]:
    with stage.proxy.cut_after(stage.rng.randrange(5000)):
        await stage.lasting(0.2, 2.0)
        yield


@fault("network")
async def garbled(stage: Stage) -> AsyncIterator[None]:
    with stage.proxy.garble(probability=0.1):
        await stage.lasting(0.2, 2.0)
        yield


# The workers


@fault("process")
async def worker_killed(stage: Stage) -> AsyncIterator[None]:
    await stage.replace(stage.rng.choice(stage.workers))
    yield


@fault("process")
async def worker_stopped(stage: Stage) -> AsyncIterator[None]:
    worker = stage.rng.choice(stage.workers)
    worker.signal(signal.SIGSTOP)
    try:
        await stage.lasting(0.1, 2.5)
        yield
    finally:
        with suppress(ProcessLookupError):
            worker.signal(signal.SIGCONT)


@fault("process")
async def clock_set(stage: Stage) -> AsyncIterator[None]:
    """Of file and memory stores; nobody's call is under way while it is set."""

    async def jump(by: float) -> None:
        workers = list(stage.workers)
        await asyncio.gather(*(worker.ask("rest") for worker in workers))
        await asyncio.gather(*(worker.ask("jump", by) for worker in workers))
        await asyncio.gather(*(worker.ask("go") for worker in workers))

    by = stage.rng.choice([-3600.0, -3.0, 3.0, 3600.0])
    await jump(by)
    try:
        await stage.lasting(0.2, 2.0)
        yield
    finally:
        await jump(-by)


# The folders


@fault("disk")
async def files_damaged(stage: Stage) -> AsyncIterator[None]:
    entries = stage.entries()
    for path in stage.rng.sample(entries, min(len(entries), 40)):
        with suppress(OSError), path.open("r+b") as file:
            size = path.stat().st_size
            if not size or stage.rng.random() < 0.3:
                file.truncate(stage.rng.randrange(size + 1))
                continue
            at = stage.rng.randrange(size)
            file.seek(at)
            (byte,) = file.read(1) or b"\0"
            file.seek(at)
            file.write(bytes([byte ^ 1 << stage.rng.randrange(8)]))
    yield


@fault("disk")
async def folder_removed(stage: Stage) -> AsyncIterator[None]:
    with suppress(OSError):
        (stage.disk / "files").rename(stage.disk / f"gone{time.monotonic_ns()}")
    await stage.lasting(0.0, 0.5)
    for gone in stage.disk.glob("gone*"):
        await asyncio.to_thread(subprocess.run, ["rm", "-rf", str(gone)], check=False)
    yield


@fault("disk")
async def disk_full(stage: Stage) -> AsyncIterator[None]:
    ballast = stage.disk / "ballast"
    if stage.bounded:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(65536)):
                pass
    try:
        await stage.lasting(0.2, 3.0)
        yield
    finally:
        ballast.unlink(missing_ok=True)


@asynccontextmanager
async def small_disk(folder: Path) -> AsyncIterator[bool]:
    """Mount a disk of its own on *folder*; False: that takes root."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
