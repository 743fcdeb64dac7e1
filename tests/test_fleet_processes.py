"""``coalesce="fleet"`` between real processes, on a real Valkey and in a real folder.

Each process is a ``fleet_child``. Nothing here knows what goes on in one but by what it says.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import Cache, FileCache, Policy, RedisCache
from mcp_hub_cache._placeholders import HOLD
from tests.backends import PATIENT, poll
from tests.servers import Server, valkey_server

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

ROOT = Path(__file__).parents[1]
SHORT = 1.5  # seconds that a placeholder outlives its holder, where a test waits for that
LONG = 30.0  # where none may run out
BUSY = 8.0  # seconds that a busy machine may add
ROUNDS, LISTENERS = 40, 4
FLEET: dict[str, Any] = {"coalesce": "fleet"}


class Child:
    """One process.

    Attributes:
        heard: What it has told of, by name of the event and key.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.heard: Counter[tuple[str, str]] = Counter()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._asked = 0
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            if "number" in said:
                self._answers.pop(said["number"]).set_result(said["answer"])
            else:
                self.heard[said["event"], said.get("key", "")] += 1

    def ask(self, name: str, *args: Any, **how: Any) -> asyncio.Future[Any]:
        """Have it do something; returns what will be its answer."""
        self._asked += 1
        answer = self._answers[self._asked] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([self._asked, name, args, how]).encode() + b"\n")
        return answer

    def load(self, key: str, **how: Any) -> asyncio.Future[Any]:
        return self.ask("load", key, **{**FLEET, **how})

    async def hears(self, event: str, key: str = "", times: int = 1) -> None:
        await poll(lambda: self.heard[event, key] >= times)

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def aclose(self) -> None:
        if self._process.returncode is None:
            self.kill(signal.SIGCONT)
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 20)
            except TimeoutError:
                self.kill(signal.SIGKILL)
        await self._process.wait()
        await self._reading
        for answer in self._answers.values():
            answer.cancel()


class World:
    """A folder or a server, and the processes that share it."""

    def __init__(self, kind: str, where: str, folder: Path) -> None:
        self.kind = kind
        self.where = where
        self._calls = folder / "calls"
        self._calls.touch()
        self.children: list[Child] = []

    def cache(self) -> Cache:
        """This process's own."""
        return (FileCache if self.kind == "file" else RedisCache)(self.where, timeout=PATIENT)

    async def start(self, count: int, *, hold: float = LONG, **options: Any) -> list[Child]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        script, calls = str(ROOT / "tests" / "fleet_child.py"), str(self._calls)
        started = [
            Child(
                await asyncio.create_subprocess_exec(
                    *(sys.executable, script, self.kind, self.where, str(hold), calls, json.dumps(options)),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": path},
                )
            )
            for _ in range(count)
        ]
        self.children += started
        for child in started:
            await child.hears("up")
        return started

    def calls(self, key: str) -> list[int]:
        """The processes that have called the loader of *key*, in order, each as often as it has."""
        lines = [line.split() for line in self._calls.read_text().splitlines()]
        return [int(pid) for pid, name in lines if name == key]

    async def aclose(self) -> None:
        await asyncio.gather(*(child.aclose() for child in self.children))


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@asynccontextmanager
async def opened(kind: str, tmp_path: Path, valkey: Server | None) -> AsyncIterator[World]:
    if valkey is not None:
        valkey.command("FLUSHALL")
    world = World(kind, str(tmp_path / "shared") if valkey is None else valkey.url, tmp_path)
    try:
        yield world
    finally:
        await world.aclose()


@pytest.fixture(params=["file", "redis"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    server = request.getfixturevalue("valkey") if request.param == "redis" else None
    async with opened(request.param, tmp_path, server) as world:
        yield world


def of(child: Child) -> str:
    return f"of {child.pid}"


# A cold key


async def test_eight_processes_with_200_callers_each_are_one_call(world: World) -> None:
    children = await world.start(8)
    answers = await asyncio.gather(*(child.load("k", callers=200, takes=0.5) for child in children))
    (caller,) = world.calls("k")
    for answer in answers:
        assert (answer["values"], answer["count"]) == ([f"of {caller}"], 200)
    # Again, with everybody knowing everybody: whoever is first, it is one.
    for turn in range(3):
        key = f"k{turn}"
        answers = await asyncio.gather(*(child.load(key, callers=200, takes=0.05) for child in children))
        (caller,) = world.calls(key)
        assert {value for answer in answers for value in answer["values"]} == {f"of {caller}"}


async def test_a_slow_holder_is_not_replaced(world: World) -> None:
    children = await world.start(3, hold=SHORT)
    answers = await asyncio.gather(*(child.load("k", callers=5, takes=2.5 * SHORT) for child in children))
    (caller,) = world.calls("k")
    assert {value for answer in answers for value in answer["values"]} == {f"of {caller}"}


# Holders that are gone


async def holder_and_waiters(children: list[Child], key: str = "k", **how: Any) -> list[asyncio.Future[Any]]:
    """Let the first one load until "release", and all others wait for it."""
    loads = [children[0].load(key, callers=5, **how)]
    await children[0].hears("loads", key)
    loads += [child.load(key, callers=20, takes=0.3, **how) for child in children[1:]]
    for child in children[1:]:
        await child.hears("waits", key)
    return loads


async def replaced(world: World, hold: float) -> None:
    children = await world.start(5, hold=hold)
    loads = await holder_and_waiters(children)
    children[0].kill(signal.SIGKILL)
    killed = time.monotonic()
    answers = await asyncio.gather(*loads[1:])
    dead, caller = world.calls("k")
    assert dead == children[0].pid
    assert caller in {child.pid for child in children[1:]}
    for answer in answers:
        assert (answer["values"], answer["count"]) == ([f"of {caller}"], 20)
    last = max(answer["first"] for answer in answers) - killed
    print(f"{world.kind}: replaced and loaded {last:.2f} s after the kill, with placeholders of {hold:g} s")
    assert last < hold + 1.0 + 0.3 + BUSY


async def test_a_killed_holder_is_replaced_by_one(world: World) -> None:
    await replaced(world, SHORT)


async def test_a_killed_holder_is_replaced_by_one_in_real_time(world: World) -> None:
    await replaced(world, HOLD)


async def test_a_killed_refresher_is_replaced_by_one(world: World) -> None:
    """The lease beside a stale entry, and not its own."""
    children = await world.start(4, hold=SHORT)
    async with world.cache() as cache:
        await cache.set("k", "old", policy=Policy(ttl=0.05, stale_ttl="1h"))
        until = cache.store.now() + 0.05
        await poll(lambda: cache.store.now() > until)
    loads = await holder_and_waiters(children, stale_ttl="1h")
    children[0].kill(signal.SIGKILL)
    answers = await asyncio.gather(*loads[1:])
    _, caller = world.calls("k")
    for answer in answers:
        assert answer["values"] == [f"of {caller}"]


async def test_a_stopped_holder_is_replaced_and_its_late_write_refused(world: World) -> None:
    children = await world.start(4, hold=SHORT)
    loads = await holder_and_waiters(children)
    children[0].kill(signal.SIGSTOP)
    answers = await asyncio.gather(*loads[1:])
    stopped, caller = world.calls("k")
    assert stopped == children[0].pid
    assert {value for answer in answers for value in answer["values"]} == {f"of {caller}"}
    children[0].kill(signal.SIGCONT)
    children[0].ask("release")
    # Its own callers have what it has loaded; what is stored is the other's.
    assert (await loads[0])["values"] == [of(children[0])]
    for child in children:
        assert await child.ask("get", "k") == f"of {caller}"
    assert len(world.calls("k")) == 2


async def test_a_holder_that_ends_is_replaced_at_once(world: World) -> None:
    """As a deploy does: the process is told to end, and closes its cache."""
    children = await world.start(3)
    loads = await holder_and_waiters(children)
    begun = time.monotonic()
    await children[0].aclose()
    answers = await asyncio.gather(*loads[1:])
    assert time.monotonic() - begun < min(BUSY, LONG)
    _, caller = world.calls("k")
    assert {value for answer in answers for value in answer["values"]} == {f"of {caller}"}


# Loads without a value


@pytest.mark.parametrize("then", ["fail", "skip", "refuse"])
async def test_nobody_stands_in_line_for_what_is_not_stored(world: World, then: str) -> None:
    """One after another, six would take 1.8 s; the others wait for the first, and load at once."""
    children = await world.start(6)
    await asyncio.gather(*(child.load("warm", takes=0.0) for child in children))
    answers = await asyncio.gather(*(child.load("k", callers=20, takes=0.3, then=then) for child in children))
    seconds = max(answer["seconds"] for answer in answers)
    print(f"{world.kind}, {then}: six processes were done after {seconds:.2f} s")
    assert seconds < 1.7  # two loads take 0.6; in line, it is 1.8 at least
    for child, answer in zip(children, answers, strict=True):
        assert answer["count"] == 20
        if then == "fail":
            assert answer["values"] == ["LookupError"]
        else:
            assert answer["values"] == [of(child)]
    assert sorted(world.calls("k")) == sorted(child.pid for child in children)


# What happens meanwhile


@pytest.mark.parametrize("change", ["delete", "clear"])
async def test_after_a_change_those_who_waited_load_anew(world: World, change: str) -> None:
    children = await world.start(4)
    *others, changer = children
    loads = await holder_and_waiters(others)
    await changer.ask(change, *(["k"] if change == "delete" else []))
    late = changer.load("k", takes=0.3)
    answers = await asyncio.gather(*loads[1:], late)
    old, caller = world.calls("k")
    assert old == children[0].pid
    assert {value for answer in answers for value in answer["values"]} == {f"of {caller}"}
    children[0].ask("release")
    assert (await loads[0])["values"] == [of(children[0])]
    for child in children:
        assert await child.ask("get", "k") == f"of {caller}"


async def test_a_set_is_what_those_who_waited_get(world: World) -> None:
    children = await world.start(4)
    *others, changer = children
    loads = await holder_and_waiters(others)
    await changer.ask("set", "k", "set")
    assert {value for answer in await asyncio.gather(*loads[1:]) for value in answer["values"]} == {"set"}
    children[0].ask("release")
    assert (await loads[0])["values"] == [of(children[0])]
    for child in children:
        assert await child.ask("get", "k") == "set"
    assert len(world.calls("k")) == 1


async def test_a_killed_server_lets_every_process_load(tmp_path: Path) -> None:
    with valkey_server() as server:
        async with opened("redis", tmp_path, server) as world:
            children = await world.start(4, timeout=0.5)
            loads = await holder_and_waiters(children)
            killed = time.monotonic()
            server.kill()
            answers = await asyncio.gather(*loads[1:])
            assert max(answer["first"] for answer in answers) - killed < 1.0 + 0.3 + BUSY  # and not wait_timeout's 30
            for child, answer in zip(children[1:], answers, strict=True):
                assert answer["values"] == [of(child)]
            children[0].ask("release")
            assert (await loads[0])["values"] == [of(children[0])]


# How soon


async def latencies(world: World, rounds: int, takes: float | None, **options: Any) -> list[float]:
    """Seconds from the end of the loader, just before the storing, to each waiting process's having the value.

    *takes*: the loader's seconds; None: it ends when all others wait for it.
    """
    children = await world.start(LISTENERS + 1, **options)
    measured: list[float] = []
    for turn in range(rounds):
        key = f"k{turn}"
        holder, *listeners = [*children[turn % len(children) :], *children[: turn % len(children)]]
        await holder.ask("hold")
        load = holder.load(key, takes=takes and takes + 0.03 * turn)
        await holder.hears("loads", key)
        waits = [child.load(key, takes=0.0) for child in listeners]
        for child in listeners:
            await child.hears("waits", key)
        holder.ask("release")
        landed = (await load)["landed"]
        measured += [answer["first"] - landed for answer in await asyncio.gather(*waits)]
        assert world.calls(key) == [holder.pid]
    assert len(measured) == rounds * LISTENERS
    return sorted(measured)


async def measured(
    name: str, world: World, *, rounds: int = ROUNDS, takes: float | None = None, **options: Any
) -> float:
    taken = await latencies(world, rounds, takes, **options)
    median = statistics.median(taken)
    tenth = taken[len(taken) * 9 // 10]
    print(f"{name}: {median * 1000:.2f} ms (median), {tenth * 1000:.2f} ms (9 of 10), {taken[-1] * 1000:.2f} ms (all)")
    return median


async def test_over_redis_each_process_has_the_value_at_once(tmp_path: Path, valkey: Server) -> None:
    async with opened("redis", tmp_path, valkey) as world:
        assert await measured("redis", world) < 0.05


async def test_over_redis_without_the_feed_it_is_looked_for(tmp_path: Path, valkey: Server) -> None:
    async with opened("redis", tmp_path, valkey) as world:
        assert await measured("redis, max_connections=1", world, max_connections=1) < 0.5


async def test_over_redis_without_the_feed_a_long_load_is_looked_for_at_times(tmp_path: Path, valkey: Server) -> None:
    """The looks become rarer, down to four a second."""
    async with opened("redis", tmp_path, valkey) as world:
        name = "redis, max_connections=1, loads of 1 s or more"
        assert await measured(name, world, rounds=10, takes=1.0, max_connections=1) < 0.5


async def test_over_files_each_process_has_the_value_soon(tmp_path: Path) -> None:
    async with opened("file", tmp_path, None) as world:
        assert await measured("file", world) < 0.2
