"""However a program ends, it ends soon, well, and without a word: asyncio debug mode, ``-X dev``, warnings as errors.

Over memory, files, Redis, and Redis with files to fall back on. What ends with its loop shares a process: the next
scenario is the proof that nothing was left over. What ends with the interpreter has a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.children import run, temps
from tests.servers import Server, valkey_server

# Asyncio's debug mode tells of steps that took long, which on a busy machine says nothing of us. And a delete that was
# cut off in the middle may not have reached the server.
MAY_SAY = ("Executing <", "Redis is still to be told of")
BACKENDS = ("memory", "file", "redis", "failover")

PRELUDE = """
import asyncio, gc, os, signal, sys, threading, time
from mcp_hub_cache import Cache, FileCache, MemoryCache, Policy, RedisCache, acached
from mcp_hub_cache.stores.file import FileStore
backend, folder, url = sys.argv[1:4]
def make(**options):
    options.setdefault("timeout", 20)
    match backend:
        case "memory": return MemoryCache(**options)
        case "file": return FileCache(folder, **options)
        case "redis": return RedisCache(url, **options)
        case "failover": return RedisCache(url, fallback=FileStore(folder), **options)
asyncio.get_event_loop_policy  # imported before anything is timed
async def slow(value="slow"):
    await asyncio.sleep(3600)
    return value
async def quick(value="quick"):
    await asyncio.sleep(0)
    return value
async def use(cache, key="k"):
    await cache.set(key, "value", tags=["t"])
    assert await cache.get(key) == "value"
    assert await cache.get_or_load(key + " loaded", quick) == "quick"
async def asks(cache, waiting=lambda: True):
    \"\"\"Tasks in the middle of whatever can be asked for.\"\"\"
    tasks = [asyncio.create_task(work) for n in range(20) for work in (
        cache.set(f"s{n}", "x" * 10_000), cache.get(f"s{n}"), cache.delete(f"s{n}"), cache.invalidate(f"t{n}"),
        cache.get_or_load(f"l{n}", slow), cache.get_or_load(f"l{n}", slow), cache.exists(f"s{n}"),
        cache.get_many([f"s{n}", f"l{n}"]), cache.touch(f"s{n}", 50), cache.clear(prefix=f"c{n}"),
        cache.add(f"a{n}", 1),
    )]
    await asyncio.sleep(0.01)
    return tasks
async def refreshing(cache):
    \"\"\"A stale value was served, and its refresh runs in the background for ever.\"\"\"
    policy = Policy(ttl=0.001, stale_ttl=600, soft_timeout=0)
    assert await cache.get_or_load("stale", quick, policy=policy) == "quick"
    await asyncio.sleep(0.01)
    loads = cache.stats.loads
    assert await cache.get_or_load("stale", slow, policy=policy) == "quick"
"""

AT_EXIT = {
    "without aclose": """
cache = make()
asyncio.run(use(cache))
""",
    "with work in flight": """
async def main():
    global tasks, cache
    cache = make()
    await use(cache)
    tasks = await asks(cache)
asyncio.run(main())
assert all(task.done() for task in tasks)
""",
    "with a refresh in the background": """
async def main():
    cache = make()
    await refreshing(cache)
asyncio.run(main())
""",
    "in a daemon thread": """
def thread():
    async def main():
        cache = make()
        await use(cache)
        await refreshing(cache)
        tasks = await asks(cache)
        ready.set()
        await asyncio.gather(*tasks)
    asyncio.run(main())
ready = threading.Event()
threading.Thread(target=thread, daemon=True).start()
assert ready.wait(30)
""",
}
IN_TURN = {
    "with aclose": """
async def main():
    async with make() as cache:
        await use(cache)
asyncio.run(main())
""",
    "with work in flight and aclose": """
async def main():
    global tasks
    async with make() as cache:
        await use(cache)
        tasks = await asks(cache)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
asyncio.run(main())
""",
    "with a refresh in the background and aclose": """
async def main():
    async with make() as cache:
        await refreshing(cache)
asyncio.run(main())
""",
    "again and again": """
cache = make()
async def main(turn):
    await use(cache, f"k{turn}")
    if turn % 2:
        await refreshing(cache)
    if turn % 3 == 0:
        await cache.aclose()
    if turn == 5:
        await asks(cache)
for turn in range(7):
    asyncio.run(main(turn))
""",
    "after aclose it is used again": """
async def main():
    cache = make()
    for turn in range(3):
        await use(cache, f"k{turn}")
        await cache.aclose()
        await cache.aclose()
        await use(cache, f"again{turn}")
asyncio.run(main())
""",
    "loop by hand": """
loop = asyncio.new_event_loop()
cache = make()
loop.run_until_complete(use(cache))
loop.run_until_complete(use(cache, "other"))
loop.run_until_complete(loop.shutdown_asyncgens())
loop.close()
asyncio.run(use(cache))
""",
    "two threads": """
def thread(name):
    async def main():
        async with make(namespace="shared") as cache:
            for turn in range(20):
                await use(cache, f"{name} {turn}")
                await cache.set("both", name * 100)
                assert (await cache.get("both"))[:1] in ("a", "b")
    try:
        asyncio.run(main())
    except BaseException as error:
        failed.append(error)
        raise
failed = []
threads = [threading.Thread(target=thread, args=(name,)) for name in "ab"]
for each in threads: each.start()
for each in threads: each.join()
assert not failed
""",
    "dropped while its loop runs on": """
async def main():
    for turn in range(10):
        cache = make()
        await use(cache)
        del cache
        gc.collect()
        await asyncio.sleep(0.001)
    # Loops close what is collected in tasks of their own: one that its loop's end meets before its first step is lost.
    await asyncio.sleep(0.2)
asyncio.run(main())
""",
    "interrupted in a load": """
async def main():
    cache = make()
    await use(cache)
    async def load():
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(3600)
    await asyncio.gather(*(cache.get_or_load("interrupted", load) for _ in range(5)))
try:
    asyncio.run(main())
except KeyboardInterrupt:
    asyncio.run(use(make()))
else:
    raise AssertionError("not interrupted")
""",
    "interrupted in a write": """
cache = make()
async def main():
    await use(cache)
    while True:
        writes = [asyncio.create_task(cache.set(f"w{n}", "x" * 50_000)) for n in range(30)]
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.gather(*writes)
try:
    asyncio.run(main())
except KeyboardInterrupt:
    async def look():
        await use(cache)
        for value in (await cache.get_many([f"w{n}" for n in range(30)])).values():
            assert value == "x" * 50_000
    asyncio.run(look())
else:
    raise AssertionError("not interrupted")
""",
    "sys.exit in a task": """
async def main():
    cache = make()
    await use(cache)
    await refreshing(cache)
    sys.exit(0)
try:
    asyncio.run(main())
except SystemExit:
    pass
""",
    "decorated, with the default cache": """
os.environ["CACHE_BACKEND"] = "redis" if backend in ("redis", "failover") else backend
os.environ.update(REDIS_URL=url, CACHE_DIR=folder, CACHE_FALLBACK="file" if backend == "failover" else "none")
@acached(ttl="10m")
async def function(n: int) -> int:
    await asyncio.sleep(0)
    return n + 1
async def main():
    assert await asyncio.gather(*(function(n % 3) for n in range(9))) == [n % 3 + 1 for n in range(9)]
for _ in range(3):
    asyncio.run(main())
def thread():
    asyncio.run(main())
both = [threading.Thread(target=thread) for _ in range(2)]
for each in both: each.start()
for each in both: each.join()
""",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with valkey_server() as running:
        yield running


def end(code: str, backend: str, folder: Path, server: Server) -> None:
    began = time.monotonic()
    done = run(PRELUDE + code, backend, folder, server.url, env={"PYTHONASYNCIODEBUG": "1"})
    said = [line for line in done.stderr.splitlines() if not line.startswith(MAY_SAY) or "Error" in line]
    assert (done.returncode, done.stdout.rpartition("\n")[0].rpartition("\n")[2]) == (0, "done"), done.stderr
    assert said == [], done.stdout
    assert time.monotonic() - began < 60
    assert not temps(folder)


@pytest.mark.parametrize("backend", ["file", "failover"])  # who have threads and connections to leave behind
@pytest.mark.parametrize("scenario", AT_EXIT)
def test_a_program_ends(scenario: str, backend: str, tmp_path: Path, server: Server) -> None:
    """Rows: loop closed; temp files left behind. Nobody has closed anything."""
    server.command("FLUSHALL")
    end(AT_EXIT[scenario] + "\nprint('done')", backend, tmp_path, server)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loop_ends(backend: str, tmp_path: Path, server: Server) -> None:
    """Rows: second event loop, loop closed; leader or waiter cancelled. One scenario after another in one process."""
    server.command("FLUSHALL")
    code = "".join(
        f"print({name!r}, flush=True)\nexec({work!r}, dict(globals()))\ngc.collect()\n"
        for name, work in IN_TURN.items()
    )
    end(code + "print('done')", backend, tmp_path, server)
