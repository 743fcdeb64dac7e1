"""Each section runs in a process of its own: the threads and the garbage of one are not to burden the next."""

from __future__ import annotations

import asyncio
import sys
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection

from .bench import Bench


def measure(module: str, bench: Bench, keys: int) -> None:
    """Measure one section, and add what it found to *bench*."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    empty = Bench(bench.method, bench.address, bench.only)
    process = spawn.Process(target=_section, args=(module, empty, keys, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        rows, curves = ours.recv()
    except EOFError:
        sys.exit(f"benchmarks: {module} failed; its error is above")
    process.join()
    bench.rows += rows
    bench.curves |= curves


def _section(module: str, bench: Bench, keys: int, answer: Connection) -> None:
    section = import_module(f".{module}", __package__)
    asyncio.run(section.run(bench, keys) if keys else section.run(bench))
    answer.send((bench.rows, bench.curves))
