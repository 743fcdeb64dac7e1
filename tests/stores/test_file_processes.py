"""The file store between processes: kills, races, and who hears of whose writes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mcp_hub_cache._frame import unpack
from mcp_hub_cache._protocols import Write
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.testing import entry_frame

KEYS = [b"mcp_hub:tests:e:%d" % n for n in range(6)]

PRELUDE = """
import asyncio, os, sys
from mcp_hub_cache._frame import unpack
from mcp_hub_cache._protocols import Fence, Write
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.testing import entry_frame
KEYS = [b"mcp_hub:tests:e:%d" % n for n in range(6)]
def frame(store, key, payload, token=None):
    return entry_frame(store, key, payload, token=token)
"""

# Forks a writer per line read, says its pid, and reaps it: a kill costs no new interpreter.
WRITERS = (
    PRELUDE
    + """
async def write_for_ever():
    store = FileStore(sys.argv[1])
    turn = 0
    while True:
        turn += 1
        payload = b"%d" % ((os.getpid() + turn) % 10) * (40_000 if turn % 2 else 90_000)
        await store.write_many([Write(key, frame(store, key, payload), 60.0, None) for key in KEYS])
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        asyncio.run(write_for_ever())
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""
)

INCREMENTS = (
    PRELUDE
    + """
async def main():
    store, key, refused = FileStore(sys.argv[1]), KEYS[0], 0
    for _ in range(int(sys.argv[2])):
        while True:
            (begun,) = await store.begin_many([key], hold=5.0)
            # Another's placeholder has no payload, and a token as good as any: nobody has counted yet.
            count = int(bytes(unpack(begun.frame, key).payload) or b"0") if begun.frame is not None else 0
            new = Write(key, frame(store, key, b"%d" % (count + 1)), 60.0, begun.fence)
            if await store.write_many([new]) == ["done"]:
                break
            refused += 1
    print(refused)
    await store.aclose()
asyncio.run(main())
"""
)

ON_COMMAND = (
    PRELUDE
    + """
async def main():
    store = FileStore(sys.argv[1])
    for line in sys.stdin:
        match line.split():
            case ["write", n]:
                await store.write_many([Write(KEYS[int(n)], frame(store, KEYS[int(n)], b"other"), 60.0, None)])
            case ["delete", n]:
                await store.delete_many([KEYS[int(n)]])
            case ["clear"]:
                await store.clear(b"mcp_hub:tests:")
        print("done", flush=True)
    await store.aclose()
asyncio.run(main())
"""
)


@contextmanager
def process(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", code, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def tell(running: subprocess.Popen[str], line: str) -> None:
    assert running.stdin is not None
    running.stdin.write(line + "\n")
    running.stdin.flush()


async def hear(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return (await asyncio.to_thread(running.stdout.readline)).strip()


async def test_killed_writers_never_tear_an_entry(tmp_path: Path) -> None:
    store = FileStore(tmp_path, sweep_interval=3600)
    reads = 0
    seen: set[bytes] = set()
    stop = asyncio.Event()

    async def reader() -> None:
        nonlocal reads
        while not stop.is_set():
            for key, frame in zip(KEYS, await store.get_many(KEYS), strict=True):
                if frame is not None:
                    payload = bytes(unpack(frame, key).payload)
                    assert payload in (payload[:1] * 40_000, payload[:1] * 90_000)
                    seen.add(payload[:1])
                    reads += 1

    reading = asyncio.ensure_future(reader())
    orphans = odd = 0
    with process(WRITERS, str(tmp_path)) as one, process(WRITERS, str(tmp_path)) as other:
        pids = {}
        for round_ in range(25):
            for writers in (one, other):
                if writers not in pids:
                    tell(writers, "go")
                    pids[writers] = int(await hear(writers))
            before, goal = [store.stamp(key) for key in KEYS], reads + 60
            async with asyncio.timeout(20):
                # Killed at no particular moment, but not before it has written everything once.
                while (
                    reads < goal or any(store.stamp(key) == was for key, was in zip(KEYS, before, strict=True))
                ) and not reading.done():
                    await asyncio.sleep(0.001)
            killed = (one, other)[round_ % 2]  # while the other goes on
            os.kill(pids.pop(killed), signal.SIGKILL)
            assert await hear(killed) == "dead"
            orphans += len(list(tmp_path.rglob("*.tmp")))
            odd += sum(store.stamp(key) is None for key in KEYS)
            assert not reading.done(), reading.exception()
        for writers, pid in pids.items():
            os.kill(pid, signal.SIGKILL)
            assert await hear(writers) == "dead"
    stop.set()
    await reading
    assert len(seen) > 1
    await store.sweep()
    assert not list(tmp_path.rglob("*.tmp"))
    assert None not in [store.stamp(key) for key in KEYS]
    assert None not in await store.get_many(KEYS)
    usage = sum(-(-path.stat().st_size // 4096) * 4096 for path in tmp_path.rglob("*") if len(path.name) == 32)
    assert store._folder.usage() == usage
    print(f"{reads} whole reads under 25 kills; {orphans} temporary files and {odd} odd counters left on the way")
    await store.aclose()


async def test_no_update_is_lost_between_processes(tmp_path: Path) -> None:
    times, many = 40, 4
    running = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", INCREMENTS, str(tmp_path), str(times), stdout=asyncio.subprocess.PIPE
        )
        for _ in range(many)
    ]
    outputs = await asyncio.wait_for(asyncio.gather(*(one.communicate() for one in running)), 60)
    assert [one.returncode for one in running] == [0] * many
    store = FileStore(tmp_path)
    (frame,) = await store.get_many([KEYS[0]])
    assert frame is not None
    assert bytes(unpack(frame, KEYS[0]).payload) == b"%d" % (times * many)
    print("refused on the way:", [int(out) for out, _ in outputs])
    await store.aclose()


@pytest.mark.parametrize("command", ["write 1", "delete 1", "clear"])
async def test_another_processs_change_is_a_new_stamp_and_wakes(tmp_path: Path, command: str) -> None:
    store, key = FileStore(tmp_path), KEYS[1]
    await store.write_many([Write(key, entry_frame(store, key), 60.0, None)])
    with process(ON_COMMAND, str(tmp_path)) as other:
        before = store.stamp(key)
        assert before is not None
        waiting = asyncio.ensure_future(store.changed(key, before))
        tell(other, command)
        assert await hear(other) == "done"
        assert store.stamp(key) != before
        await asyncio.wait_for(waiting, 5)
        # And none without a change.
        quiet = store.stamp(key)
        await store.get_many([key])
        tell(other, "nothing")
        assert await hear(other) == "done"
        assert store.stamp(key) == quiet
    await store.aclose()


async def until_stopped(pid: int) -> None:
    """A signal takes its time, and each thread stops for itself."""
    threads = Path(f"/proc/{pid}/task")
    while not all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in threads.glob("*/stat")):
        await asyncio.sleep(0)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to see that a process has stopped")
async def test_a_stopped_process_stops_only_its_shelf(tmp_path: Path) -> None:
    """SIGSTOP in the middle of a write, as often as it takes to catch it there."""
    store = FileStore(tmp_path)
    with process(WRITERS, str(tmp_path)) as writers:
        tell(writers, "go")
        pid = int(await hear(writers))
        async with asyncio.timeout(20):
            while store.stamp(KEYS[0]) is None:
                await store.get_many(KEYS)
            while True:
                os.kill(pid, signal.SIGSTOP)
                await until_stopped(pid)
                held = [key for key in KEYS if store.stamp(key) is None]
                if held:
                    break
                os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(0.001)
        outcomes = await store.write_many([Write(key, entry_frame(store, key, b"1"), 60.0, None) for key in KEYS])
        assert [outcome == "done" for outcome in outcomes] == [key not in held for key in KEYS]
        for key, frame in zip(KEYS, await store.get_many(KEYS), strict=True):
            assert frame is None or unpack(frame, key)
        os.kill(pid, signal.SIGKILL)
        assert await hear(writers) == "dead"
        again = await store.write_many([Write(key, entry_frame(store, key, b"2"), 60.0, None) for key in KEYS])
        assert again == ["done"] * len(KEYS)
        assert not list(tmp_path.rglob("*.tmp"))
    await store.aclose()
