"""Callers that are cancelled at each step of each operation, on each backend; rows 1 and 2 of FAULTS.md.

A sweep lets an operation run for n turns of the event loop and then cancels its caller, for n = 0, 1, 2, ... until it
ends by itself before that. Whatever n is: the caller ends at once, what it asked for has happened or has not, nothing
of it is left behind, and whoever comes next finds the cache as good as before.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from mcp_hub_cache import Cache, FileCache, Policy, RedisCache
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.memory import MemoryStore
from tests.backends import PATIENT, poll, turns
from tests.clusters import SERVICE, Cluster, Watched, cluster, watched
from tests.servers import Server, free_port, valkey_server

OLD, NEW, LOADED, LATER = ["old"], ["new"], ["loaded"], ["later"]
EVERY_STEP: Final = 24  # so many steps one by one; beyond, in growing strides
EVERY_WAY: Final = 3  # so many steps in all ways; beyond, in turns
# What a session keeps running while it has something to look after; it ends by itself, or with the cache.
LASTING: Final = frozenset(("mcp-hub-cache placeholders", "mcp_hub_cache failover", "mcp_hub_cache sweep"))

Place = Callable[[], Cache]


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(replicas=0) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def sentinels() -> Iterator[Watched]:
    with watched() as servers:
        yield servers


def _place(name: str, folder: Path, request: pytest.FixtureRequest) -> Place:
    """What opens caches on one backend, all on the same."""
    if name == "memory":
        store = MemoryStore()
        return lambda: Cache(store, timeout=PATIENT)
    if name == "file":
        return lambda: FileCache(folder, timeout=PATIENT)
    if name == "cluster":
        nodes: Cluster = request.getfixturevalue("nodes")
        return lambda: RedisCache(nodes.url, cluster=True, timeout=PATIENT)
    if name == "sentinel":
        hosts: str = request.getfixturevalue("sentinels").hosts
        return lambda: RedisCache(f"sentinel://{hosts}/{SERVICE}", timeout=PATIENT)
    is_gone = name == "server gone"
    url = f"redis://127.0.0.1:{free_port()}/0" if is_gone else request.getfixturevalue("valkey").url
    return lambda: RedisCache(url, fallback=None if name == "redis" else FileStore(folder), timeout=PATIENT)


PLACES: Final = (
    "memory",
    "file",
    "redis",
    "failover",
    "server gone",
    pytest.param("cluster", marks=pytest.mark.long),
    pytest.param("sentinel", marks=pytest.mark.long),
)


# What is cancelled


class Case(NamedTuple):
    """An operation on the key "k", where OLD stands.

    Attributes:
        call: What is cancelled.
        leaves: What may stand under "k" afterwards, None for nothing, where the caller was cancelled in the middle.
        does: What must stand there once it has had a turn: what was asked for is done whether anybody waits or not.
        first: What comes before it.
    """

    call: Callable[[Cache], Awaitable[Any]]
    leaves: tuple[Any, ...] = (OLD,)
    does: tuple[Any, ...] | None = None
    first: Callable[[Cache], Awaitable[Any]] | None = None


async def _load() -> list[str]:
    await asyncio.sleep(0)
    return LOADED


async def _listed(cache: Cache) -> list[str]:
    return [key async for key in cache.keys()]  # noqa: SIM118  # it is no dict


async def _nothing_there(cache: Cache) -> None:
    await cache.delete("k")


async def _stale_there(cache: Cache) -> None:
    await cache.set("k", OLD, policy=Policy(ttl=0.001, stale_ttl=600))
    await poll(lambda: _is_gone(cache))


async def _is_gone(cache: Cache) -> bool:
    return await cache.get("k") is None


async def _tagged_there(cache: Cache) -> None:
    await cache.set("k", OLD, tags=["t"])


MANY: Final = {"k": NEW, **{f"k{number}": NEW for number in range(5)}}

CASES: Final = {
    "get": Case(lambda cache: cache.get("k")),
    "get_entry": Case(lambda cache: cache.get_entry("k")),
    "get_many": Case(lambda cache: cache.get_many(MANY)),
    "exists": Case(lambda cache: cache.exists("k")),
    "ttl": Case(lambda cache: cache.ttl("k")),
    "keys": Case(_listed),
    "status": Case(lambda cache: cache.status()),
    "set": Case(lambda cache: cache.set("k", NEW), (NEW,), (NEW,)),
    "set with tags": Case(lambda cache: cache.set("k", NEW, tags=["t"]), (NEW,), (NEW,)),
    "set_many": Case(lambda cache: cache.set_many(MANY), (NEW,), (NEW,)),
    "add": Case(lambda cache: cache.add("k", NEW), (None, NEW), first=_nothing_there),
    "touch": Case(lambda cache: cache.touch("k", 1000)),
    "delete": Case(lambda cache: cache.delete("k"), (None,), (None,)),
    "delete_many": Case(lambda cache: cache.delete_many(MANY), (None,), (None,)),
    "invalidate": Case(lambda cache: cache.invalidate("t"), (None,), (None,), first=_tagged_there),
    "clear": Case(lambda cache: cache.clear(), (OLD, None)),
    "load": Case(lambda cache: cache.get_or_load("k", _load), (None, LOADED), first=_nothing_there),
    "load with tags": Case(
        lambda cache: cache.get_or_load("k", _load, policy=Policy(tags=("t",), stale_ttl=600)),
        (None, LOADED),
        first=_nothing_there,
    ),
    "load what is stale": Case(
        lambda cache: cache.get_or_load("k", _load, policy=Policy(stale_ttl=600)), (None, LOADED), first=_stale_there
    ),
    "load behind what is stale": Case(
        lambda cache: cache.get_or_load("k", _load, policy=Policy(stale_ttl=600, soft_timeout=0)),
        (None, LOADED),
        first=_stale_there,
    ),
    "load in a fleet": Case(
        lambda cache: cache.get_or_load("k", _load, coalesce="fleet"), (None, LOADED), first=_nothing_there
    ),
    "load what is stale in a fleet": Case(
        lambda cache: cache.get_or_load("k", _load, policy=Policy(stale_ttl=600, coalesce="fleet")),
        (None, LOADED),
        first=_stale_there,
    ),
    "load anew": Case(lambda cache: cache.get_or_load("k", _load, refresh=True), (OLD, LOADED)),
}


# How it is cancelled


async def _cancel(task: asyncio.Task[Any], _: asyncio.Timeout | None) -> None:
    task.cancel()


async def _cancel_twice(task: asyncio.Task[Any], _: asyncio.Timeout | None) -> None:
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()


async def _cancel_again_and_again(task: asyncio.Task[Any], _: asyncio.Timeout | None) -> None:
    """As a scope of anyio does, which cancels at each await."""
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)


async def _time_out(task: asyncio.Task[Any], timeout: asyncio.Timeout | None) -> None:
    if timeout is not None:
        timeout.reschedule(asyncio.get_running_loop().time())


Way = Callable[[asyncio.Task[Any], "asyncio.Timeout | None"], Coroutine[Any, Any, None]]
WAYS: Final[tuple[Way, ...]] = (_cancel, _cancel_twice, _cancel_again_and_again, _time_out)


class Cut:
    """One call that is to be cut off."""

    def __init__(self) -> None:
        self._timeout: asyncio.Timeout | None = None

    async def _run(self, call: Callable[[], Awaitable[Any]]) -> Any:
        async with asyncio.timeout(None) as self._timeout:
            return await call()

    async def off(self, call: Callable[[], Awaitable[Any]], steps: int, way: Way) -> bool:
        """Cut *call* off after so many turns of the loop; False: it had ended by itself."""
        task = asyncio.create_task(self._run(call))
        await turns(steps)
        if task.done():
            task.result()
            return False
        await way(task, self._timeout)
        done, _ = await asyncio.wait([task], timeout=PATIENT)
        assert done, f"it hangs when it is cancelled after {steps} steps"
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, TimeoutError):
            raise error
        return True


def _steps() -> Iterator[int]:
    steps = 0
    while True:
        yield steps
        steps += 1 + (max(0, steps - EVERY_STEP) // 4)


@asynccontextmanager
async def _undisturbed() -> AsyncIterator[None]:
    """Nothing is left pending, and nobody's exception is left unretrieved."""
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    yield
    await poll(lambda: len(asyncio.all_tasks()) == 1)
    gc.collect()
    await turns()
    assert complaints == []


async def _is_at_rest(cache: Cache) -> bool:
    session = cache._engine.session()
    tasks = [task for task in asyncio.all_tasks() if task.get_name() not in LASTING]
    return not (len(tasks) > 1 or len(session.flights) or session.tasks or session.behind or session.placeholders._held)


async def _is_as_good_as_before(cache: Cache) -> None:
    """Whoever comes next is served, at once and rightly."""
    async with asyncio.timeout(5):  # a placeholder that nobody looks after would stand for 10 s
        assert await cache.get_or_load("k", _load, coalesce="fleet") in (OLD, NEW, LOADED)
    await cache.set("k", LATER)
    assert await cache.get("k") == LATER
    assert await cache.delete("k") is True
    assert await cache.get("k") is None
    assert await cache.get_or_load("k", _load) == LOADED
    assert await cache.get("k") == LOADED


async def _cut_once(opened: Cache, name: str, steps: int, way: Way) -> bool:
    """Cut an operation off in a namespace of its own, and see that all is well; False: it had ended before."""
    case = CASES[name]
    cache = opened.with_namespace(f"{name.replace(' ', '-')}.{steps}.{way.__name__}")
    await cache.set("k", OLD)
    if case.first is not None:
        await case.first(cache)
    cut = await Cut().off(lambda: case.call(cache), steps, way)
    await poll(lambda: _is_at_rest(cache))
    if cut:
        found = await cache.get("k")
        expected = case.does if case.does is not None and steps else (*case.leaves, OLD)
        assert found in expected, f"{found} after {steps} steps"
    await _is_as_good_as_before(cache)
    assert await opened.get("other") == OLD
    return cut


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at", PLACES)
async def test_a_caller_is_cancelled_at_any_step(
    at: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Nobody else sees it, nothing is torn, undone or left behind; connections in use back to the start."""
    asyncio.get_running_loop().set_debug(at == "memory")  # elsewhere it takes too long
    async with _undisturbed(), _place(at, tmp_path, request)() as opened:
        await opened.set("other", OLD)
        assert await opened.get("other") == OLD
        await opened.status()
        before = _connections(at, request)
        for turn, steps in enumerate(_steps()):
            ways = WAYS if steps < EVERY_WAY else (WAYS[turn % len(WAYS)],)
            if not any([await _cut_once(opened, name, steps, way) for way in ways]):
                break
        assert _connections(at, request) <= before + 1  # the bulk wire is opened when first needed
        assert opened.stats.errors.keys() <= {"unreachable"}
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize("then", ["delete", "set", "clear"])
@pytest.mark.parametrize("name", ["with tags", "large", "many with tags"])
@pytest.mark.parametrize("at", ["memory", "file", "redis", "failover"])
async def test_what_comes_after_a_cancelled_set_wins(
    at: str, name: str, then: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A set that takes something before it can be handed on goes on by itself, and is overtaken."""
    large = ["x" * 600_000]

    async def store(cache: Cache, tag: str) -> None:
        match name:
            case "with tags":
                await cache.set("k", NEW, tags=[tag])
            case "large":
                await cache.set("k", large)
            case _:
                await cache.set_many(MANY, tags=[tag])

    async with _undisturbed(), _place(at, tmp_path, request)() as cache:
        for steps in range(12):
            await cache.set("k", OLD)
            cut = await Cut().off(lambda steps=steps: store(cache, f"t{steps}"), steps, _cancel)  # type: ignore[misc]  # bound now
            match then:
                case "delete":
                    await cache.delete("k")
                case "set":
                    await cache.set("k", LATER)
                case _:
                    await cache.clear()
            await poll(lambda: _is_at_rest(cache))
            assert await cache.get("k") == (LATER if then == "set" else None), (steps, cut)


@pytest.mark.parametrize("victim", ["leader", "waiter"])
@pytest.mark.parametrize("at", PLACES)
async def test_the_others_keep_the_load(at: str, victim: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    loads = 0

    async def load() -> list[str]:
        nonlocal loads
        loads += 1
        return await _load()

    async def share(cache: Cache, steps: int, way: Way) -> bool:
        nonlocal loads
        loads = 0
        others = [] if victim == "leader" else [asyncio.create_task(cache.get_or_load("k", load))]
        cut = asyncio.create_task(Cut().off(lambda: cache.get_or_load("k", load), steps, way))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # now its own task has begun
        others += [asyncio.create_task(cache.get_or_load("k", load)) for _ in range(3)]
        assert await asyncio.wait_for(asyncio.gather(*others), PATIENT) == [LOADED] * len(others)
        assert loads <= 1 + (victim == "leader")
        assert await cache.get("k") == LOADED
        return await cut

    async with _undisturbed(), _place(at, tmp_path, request)() as opened:
        await opened.set("other", OLD)
        for steps in _steps():
            ended = True
            for way in WAYS[:2]:
                ended &= not await share(opened.with_namespace(f"{steps}.{way.__name__}"), steps, way)
            if ended:
                break


@pytest.mark.parametrize("at", PLACES)
async def test_closing_is_cancelled_at_any_step(at: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What was begun is carried through; whoever closes again waits for it, and whoever goes on has a cache."""
    place = _place(at, tmp_path, request)

    async def close(steps: int, way: Way, *, again: bool) -> bool:
        cache = place()
        await cache.set("k", OLD)
        busy = [asyncio.create_task(cache.get_or_load("k", _load, refresh=True)) for _ in range(3)]
        busy.append(asyncio.create_task(cache.delete("gone")))
        cut = await Cut().off(cache.aclose, steps, way)
        if again:
            await cache.aclose()
            ours = {asyncio.current_task(), *busy}
            await poll(lambda: asyncio.all_tasks() <= ours)
        await asyncio.wait_for(asyncio.gather(*busy, return_exceptions=True), PATIENT)
        if cut and steps:  # else nobody has begun to close it
            await poll(lambda: len(asyncio.all_tasks()) == 1)
        assert await cache.get("k") in (OLD, LOADED, None)
        await cache.aclose()
        return cut

    async with _undisturbed():
        for turn, steps in enumerate(_steps()):
            way = WAYS[turn % len(WAYS)]
            if not any([await close(steps, way, again=again) for again in (True, False)]):
                break


# Storms


@pytest.mark.parametrize("at", ["redis", "failover"])
async def test_a_storm_through_the_whole_cache(at: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """100 tasks, 15 rounds, random cancels, connections killed: nobody reads another's value, or one that is gone."""
    chance, server = random.Random(2), request.getfixturevalue("valkey")
    wrong: list[str] = []
    finished = 0

    async def caller(cache: Cache, task: int, round_: int) -> None:
        nonlocal finished
        key, mine = f"task{task}", [task, round_]

        async def load() -> list[int]:
            await asyncio.sleep(0)
            return mine

        await cache.set(key, mine)
        read = [await cache.get(key) for _ in range(3)]
        wrong.extend(f"{key} is {value}" for value in read if value not in (mine, None))
        await cache.delete(key)
        if await cache.get(key) is not None:
            wrong.append(f"{key} is back")
        if await cache.get_or_load(key, load) != mine:
            wrong.append(f"{key} loaded")
        finished += 1

    async with _undisturbed(), _place(at, tmp_path, request)() as cache:
        for round_ in range(15):
            tasks = [asyncio.create_task(caller(cache, task, round_)) for task in range(100)]
            for turn in range(chance.randrange(30)):
                await asyncio.sleep(0)
                for task in chance.sample(tasks, 3):
                    task.cancel()
                    if chance.random() < 0.3:
                        task.cancel()
                if turn == 9 and round_ % 3 == 0:
                    server.kill_clients()
            done, hung = await asyncio.wait(tasks, timeout=PATIENT)
            assert not hung
            assert all(task.cancelled() or task.exception() is None for task in done)
        assert wrong == []
        assert finished > 300
        await poll(lambda: _is_at_rest(cache))


async def test_a_loader_that_raises_while_it_is_cancelled_is_heard_by_nobody() -> None:
    started = asyncio.Event()

    async def stubborn() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("not now") from None

    async with _undisturbed(), Cache(MemoryStore()) as cache:
        for coalesce in ("process", "fleet"):
            started.clear()
            callers = [asyncio.create_task(cache.get_or_load("k", stubborn, coalesce=coalesce)) for _ in range(3)]
            await started.wait()
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            assert all(caller.cancelled() for caller in callers)
            await poll(lambda: _is_at_rest(cache))
            assert await cache.get_or_load("k", _load, coalesce=coalesce) == LOADED
            await cache.delete("k")


@pytest.mark.parametrize("position", range(0, 21, 4))
async def test_of_21_callers_of_a_fleet_one_is_cancelled(
    position: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Ten here, eleven in what is another process to them; the load is one, and it goes on."""
    place = _place("redis", tmp_path, request)
    loads, go = 0, asyncio.Event()

    async def load() -> list[str]:
        nonlocal loads
        loads += 1
        await go.wait()
        return LOADED

    async with _undisturbed(), place() as here, place() as there:
        key = f"fleet of 21, {position}"
        caches = [here if number < 10 else there for number in range(21)]
        callers = [asyncio.create_task(cache.get_or_load(key, load, coalesce="fleet")) for cache in caches]
        await poll(lambda: loads == 1)
        callers[position].cancel()
        await asyncio.wait([callers[position]], timeout=PATIENT)
        assert callers[position].cancelled()
        go.set()
        rest = [caller for caller in callers if caller is not callers[position]]
        assert await asyncio.wait_for(asyncio.gather(*rest), PATIENT) == [LOADED] * 20
        assert loads == 1


def _connections(at: str, request: pytest.FixtureRequest) -> int:
    if at not in ("redis", "failover"):
        return 0
    clients: bytes = request.getfixturevalue("valkey").command("CLIENT", "LIST")
    return clients.count(b"\n")
