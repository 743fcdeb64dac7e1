"""``coalesce="fleet"``: one load in all processes. Caches over one store stand for the processes here.

What takes real processes, killed, stopped and slow, is in ``test_fleet_processes``.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import Cache, FileCache, LoadTimeoutError, Policy, RedisCache, current_entry
from mcp_hub_cache import _placeholders as placeholders
from mcp_hub_cache._leases import Rivals
from mcp_hub_cache._open import open_cache
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FaultProxy
from tests.backends import NAMES, Backend, Plain, poll, stored, turns
from tests.servers import Server, valkey_server

FLEET: dict[str, Any] = {"coalesce": "fleet"}
STALE = Policy(coalesce="fleet", ttl=0.05, stale_ttl="1h")
BUSY = 5.0  # seconds that a busy machine may add


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


class Fleet:
    """Opens caches that share a store, and counts how often each key's loads are waited for.

    Attributes:
        waits: By store key, of entries and of leases beside them.
    """

    def __init__(self, backend: Backend, *, standby: bool) -> None:
        self.backend = backend
        self.waits: Counter[bytes] = Counter()
        self._standby = standby

    def open(self, **options: Any) -> Cache:
        if self._standby:
            options["fallback"] = MemoryStore()
        return self.backend.open(**options)

    def several(self, count: int = 3) -> list[Cache]:
        return [self.open() for _ in range(count)]

    async def waiting(self, count: int = 1) -> None:
        """Return when that many waits for another's load have begun."""
        await poll(lambda: self.waits.total() >= count, 8)


@pytest.fixture(params=[*NAMES, "failover"])
async def fleet(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Fleet]:
    name = "redis" if request.param == "failover" else request.param
    server = request.getfixturevalue("valkey") if name == "redis" else None
    fleet = Fleet(Backend(name, tmp_path, server), standby=request.param == "failover")
    over = Rivals.over

    async def counted(self: Rivals, key: bytes, token: bytes, deadline: float) -> bool:
        fleet.waits[key] += 1
        return await over(self, key, token, deadline)

    monkeypatch.setattr(Rivals, "over", counted)
    yield fleet
    await fleet.backend.aclose()


class Source:
    """A loader for any number of caches: counts its calls; each waits until it is let go, and returns its number."""

    def __init__(self, *, going: bool = False, takes: float = 0.0) -> None:
        self.calls = 0
        self.cancelled = 0
        self.most = 0  # at once
        self._now = 0
        self.takes = takes
        self.go = asyncio.Event()
        self.error: Exception | None = None
        self.skip = False
        if going:
            self.go.set()

    async def __call__(self) -> list[int]:
        self.calls += 1
        number = self.calls
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            await self.go.wait()
            await asyncio.sleep(self.takes)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self._now -= 1
        if self.error is not None:
            raise self.error
        if self.skip:
            current_entry().skip()
        return [number]

    async def called(self, times: int = 1) -> None:
        await poll(lambda: self.calls >= times, 8)


def start(call: Awaitable[Any]) -> asyncio.Future[Any]:
    return asyncio.ensure_future(call)


async def held_up(
    one: Cache, other: Cache, source: Source, count: int
) -> tuple[asyncio.Future[Any], list[asyncio.Future[Any]]]:
    """A load of *one*, and so many callers of *other* who wait for it."""
    holder = start(one.get_or_load("k", source, **FLEET))
    await source.called()
    waiters = [start(other.get_or_load("k", source, **FLEET)) for _ in range(count)]
    await poll(lambda: len(other._engine.session().flights) == 1 and other.stats.misses == count)
    return holder, waiters


async def make_stale(cache: Cache, key: str = "k", policy: Policy = STALE) -> None:
    """Leave an entry under *key*, ``[0]``, that is not fresh any more and may stand in."""
    await cache.set(key, [0], policy=policy)
    until = cache.store.now() + 0.05
    await poll(lambda: cache.store.now() > until)


# A cold key


async def test_one_load_for_all_callers_of_all_processes(fleet: Fleet) -> None:
    caches, source = fleet.several(4), Source()
    first = start(caches[0].get_or_load("k", source, **FLEET))
    await source.called()
    tasks = [start(cache.get_or_load("k", source, **FLEET)) for cache in caches for _ in range(100)]
    await fleet.waiting(3)
    source.go.set()
    assert await asyncio.gather(first, *tasks) == [[1]] * 401
    assert source.calls == 1
    assert sum(cache.stats.loads for cache in caches) == 1
    # Each process waited once, however many its callers.
    assert fleet.waits.total() == 3


async def test_all_at_once_are_one_load(fleet: Fleet) -> None:
    caches, source = fleet.several(4), Source(takes=0.05, going=True)
    for round_ in range(5):
        asked = [cache.get_or_load(f"k{round_}", source, **FLEET) for cache in caches for _ in range(20)]
        assert await asyncio.gather(*asked) == [[round_ + 1]] * 80


async def test_process_is_the_default_and_waits_for_nobody_elsewhere(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    tasks = [start(one.get_or_load("k", source)), start(other.get_or_load("k", source))]
    await source.called(2)
    source.go.set()
    assert sorted(await asyncio.gather(*tasks)) == [[1], [2]]
    assert fleet.waits.total() == 0


async def test_who_waits_gets_a_copy_of_what_was_stored(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    tasks = [start(one.get_or_load("k", source, **FLEET))]
    await source.called()
    tasks += [start(other.get_or_load("k", source, **FLEET)) for _ in range(2)]
    await fleet.waiting()
    source.go.set()
    values = await asyncio.gather(*tasks)
    values[1].append("mine")
    assert (values[0], values[2], await one.get("k"), await other.get("k")) == ([1], [1], [1], [1])


async def test_a_refresh_waits_for_nobody(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    task = start(one.get_or_load("k", source, **FLEET))
    await source.called()
    refresh = start(other.get_or_load("k", source, refresh=True, **FLEET))
    await source.called(2)
    source.go.set()
    assert sorted([await task, await refresh]) == [[1], [2]]
    assert fleet.waits.total() == 0


async def test_a_cached_failure_is_one_call_too(fleet: Fleet) -> None:
    caches, source = fleet.several(3), Source()
    source.error = LookupError("gone")
    how = {**FLEET, "cache_errors": {LookupError: "1h"}}
    tasks = [start(caches[0].get_or_load("k", source, **how))]
    await source.called()
    tasks += [start(cache.get_or_load("k", source, **how)) for cache in caches for _ in range(10)]
    await fleet.waiting(2)
    source.go.set()
    for answer in await asyncio.gather(*tasks, return_exceptions=True):
        assert (type(answer), answer.args) == (LookupError, ("gone",))
    assert source.calls == 1


# An entry that is of no use to anybody


async def test_one_load_after_an_invalidation(fleet: Fleet) -> None:
    """The entry still stands, and none will take it."""
    caches, source = fleet.several(3), Source()
    await caches[0].set("k", "old", tags=["t"])
    assert await caches[0].invalidate("t")
    how = {**FLEET, "tags": ["t"]}
    tasks = [start(caches[0].get_or_load("k", source, **how))]
    await source.called()
    tasks += [start(cache.get_or_load("k", source, **how)) for cache in caches for _ in range(10)]
    await fleet.waiting(2)
    source.go.set()
    assert await asyncio.gather(*tasks) == [[1]] * 31
    assert source.calls == 1


async def test_one_load_where_what_stands_is_too_old_for_those_who_ask(fleet: Fleet) -> None:
    caches, source = fleet.several(3), Source()
    await make_stale(caches[0])
    tasks = [start(caches[0].get_or_load("k", source, **FLEET))]
    await source.called()
    tasks += [start(cache.get_or_load("k", source, **FLEET)) for cache in caches for _ in range(10)]
    await fleet.waiting(2)
    source.go.set()
    assert await asyncio.gather(*tasks) == [[1]] * 31
    assert source.calls == 1


@pytest.mark.parametrize("outcome", ["fails", "is skipped"])
async def test_what_is_of_no_use_holds_nobody_up_where_the_load_stores_nothing(fleet: Fleet, outcome: str) -> None:
    caches, source = fleet.several(4), Source()
    await caches[0].set("k", "old", tags=["t"])
    assert await caches[0].invalidate("t")
    how = {**FLEET, "tags": ["t"]}
    await nothing_is_stored(fleet, caches, source, outcome, how)


# A load without a value


async def nothing_is_stored(
    fleet: Fleet, caches: list[Cache], source: Source, outcome: str, how: dict[str, Any]
) -> list[Any]:
    """Let one load, and all others wait for it; its load stores nothing. They must load side by side, then."""
    if outcome == "fails":
        source.error = LookupError("gone")
    elif outcome == "is skipped":
        source.skip = True
    else:
        how = {**how, "cache_if": lambda _: False}
    tasks = [start(caches[0].get_or_load("k", source, **how))]
    await source.called()
    tasks += [start(cache.get_or_load("k", source, **how)) for cache in caches[1:]]
    await fleet.waiting(len(caches) - 1)
    gate, source.go = source.go, asyncio.Event()
    gate.set()
    await source.called(len(caches))  # all are in the loader at once: the second has not ended
    source.go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert source.calls == len(caches)
    if outcome == "fails":
        assert {type(answer) for answer in answers} == {LookupError}
    else:
        assert sorted(answers) == [[n + 1] for n in range(len(caches))]
    return answers


@pytest.mark.parametrize("outcome", ["fails", "is skipped", "is refused"])
async def test_where_nothing_is_stored_the_others_load_side_by_side(fleet: Fleet, outcome: str) -> None:
    await nothing_is_stored(fleet, fleet.several(4), Source(), outcome, FLEET)


async def test_who_comes_right_after_such_a_load_need_not_wait_either(fleet: Fleet) -> None:
    caches, source = fleet.several(3), Source(going=True)
    source.skip = True
    await caches[0].get_or_load("k", source, **FLEET)
    source.go.clear()
    tasks = [start(cache.get_or_load("k", source, **FLEET)) for cache in caches]
    await source.called(4)
    source.go.set()
    assert sorted(await asyncio.gather(*tasks)) == [[2], [3], [4]]


async def test_what_says_that_there_is_no_value_is_no_entry(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source(going=True)
    source.error = LookupError("gone")
    with pytest.raises(LookupError):
        await one.get_or_load("k", source, **FLEET)
    assert await stored(one, "k") is not None
    assert not await other.exists("k")
    assert await other.get("k") is None
    assert await other.get_many(["k"]) == {}
    assert await other.ttl("k") is None
    assert [key async for key in other.keys("")] == []
    assert not await other.delete("k")
    source.error = None
    assert await other.get_or_load("k", source, **FLEET) == [2]
    assert await one.get("k") == [2]


# What is stale


async def test_without_waiting_what_is_stale_is_served_and_refreshed_once(fleet: Fleet) -> None:
    caches, source = fleet.several(4), Source()
    how = STALE.replace(soft_timeout=0, ttl="1h")
    await make_stale(caches[0])
    asked = [cache.get_or_load("k", source, policy=how) for cache in caches for _ in range(10)]
    assert await asyncio.gather(*asked) == [[0]] * 40
    await source.called()
    # Again while it goes on: still nobody waits, and nobody else begins.
    asked = [cache.get_or_load("k", source, policy=how) for cache in caches for _ in range(10)]
    assert await asyncio.gather(*asked) == [[0]] * 40
    await turns(50)
    source.go.set()
    for cache in caches:
        await poll(lambda cache=cache: is_now(cache, "k", [1]))  # type: ignore[misc]
    assert source.calls == 1
    assert fleet.waits.total() == 0
    assert sum(cache.stats.stale_hits for cache in caches) == 80


async def is_now(cache: Cache, key: str, value: object) -> bool:
    return bool(await cache.get(key) == value)


async def test_who_waits_for_a_refresh_waits_for_the_one_there_is(fleet: Fleet) -> None:
    caches, source = fleet.several(4), Source()
    how = STALE.replace(ttl="1h")
    await make_stale(caches[0])
    tasks = [start(caches[0].get_or_load("k", source, policy=how))]
    await source.called()
    tasks += [start(cache.get_or_load("k", source, policy=how)) for cache in caches for _ in range(10)]
    await fleet.waiting(3)
    source.go.set()
    assert await asyncio.gather(*tasks) == [[1]] * 41
    assert source.calls == 1


async def test_who_waits_only_so_long_gets_what_is_stale(fleet: Fleet) -> None:
    caches, source = fleet.several(3), Source()
    how = STALE.replace(ttl="1h", soft_timeout=0.02)
    await make_stale(caches[0])
    asked = [cache.get_or_load("k", source, policy=how) for cache in caches]
    assert await asyncio.gather(*asked) == [[0]] * 3
    await source.called()
    source.go.set()
    for cache in caches:
        await poll(lambda cache=cache: is_now(cache, "k", [1]))  # type: ignore[misc]
    assert source.calls == 1


async def test_after_a_failed_refresh_the_whole_fleet_rests(fleet: Fleet) -> None:
    caches, source = fleet.several(4), Source()
    how = STALE.replace(ttl="1h", throttle="1h")
    await make_stale(caches[0])
    source.error = LookupError("gone")
    tasks = [start(caches[0].get_or_load("k", source, policy=how))]
    await source.called()
    tasks += [start(cache.get_or_load("k", source, policy=how)) for cache in caches[1:3]]
    await fleet.waiting(2)
    source.go.set()
    assert await asyncio.gather(*tasks) == [[0]] * 3
    for cache in caches:  # the last one hears of it only now
        assert await cache.get_or_load("k", source, policy=how) == [0]
    assert source.calls == 1
    # What ends the rest: something new.
    await caches[1].set("k", "new")
    for cache in caches:
        await poll(lambda cache=cache: is_now(cache, "k", "new"))  # type: ignore[misc]
        assert await cache.get_or_load("k", source, policy=how) == "new"


@pytest.mark.parametrize("throttle", [0, None])
async def test_a_refresh_that_stores_nothing_holds_nobody_up(fleet: Fleet, throttle: float | None) -> None:
    """It was called, and gave a value that was not to be kept: those who waited load, all at once."""
    caches = fleet.several(4)
    await make_stale(caches[0])
    how = {"policy": STALE.replace(ttl="1h", throttle=throttle)}
    answers = await nothing_is_stored(fleet, caches, Source(), "is skipped", how)
    assert [0] not in answers


async def test_failing_refreshes_without_a_throttle_fail_side_by_side(fleet: Fleet) -> None:
    caches, source = fleet.several(4), Source()
    how = STALE.replace(ttl="1h", throttle=0)
    await make_stale(caches[0])
    source.error = LookupError("gone")
    tasks = [start(caches[0].get_or_load("k", source, policy=how))]
    await source.called()
    tasks += [start(cache.get_or_load("k", source, policy=how)) for cache in caches[1:]]
    await fleet.waiting(3)
    gate, source.go = source.go, asyncio.Event()
    gate.set()
    await source.called(4)
    source.go.set()
    assert await asyncio.gather(*tasks) == [[0]] * 4


@pytest.mark.parametrize("change", ["delete", "set", "invalidate"])
async def test_what_is_stale_stands_in_for_nobody_who_comes_after_a_change(fleet: Fleet, change: str) -> None:
    """One process refreshes, another waits for it with something stale at hand, a third makes the change."""
    (one, other, third), source = fleet.several(3), Source()
    how = STALE.replace(ttl="1h", tags=("t",), soft_timeout=0.01)
    await make_stale(one, policy=STALE.replace(tags=("t",)))
    refreshes = start(one.get_or_load("k", source, policy=how))
    await source.called()
    mine = Source(going=True)
    assert await other.get_or_load("k", mine, policy=how) == [0]
    assert mine.calls == 0
    if change == "delete":
        await third.delete("k")
    elif change == "set":
        await third.set("k", ["set"], ttl="1h")
    else:
        assert await third.invalidate("t")
    answers = asyncio.gather(*(other.get_or_load("k", mine, policy=how) for _ in range(3)))
    await asyncio.wait([answers], timeout=0.1)  # ten times as long as who has something stale at hand waits for better
    source.go.set()
    assert [0] not in await answers
    await refreshes


async def test_what_was_stale_and_is_deleted_before_the_lease_is_still_one_load(fleet: Fleet) -> None:
    """One has found it stale; before it asks for the lease, it is deleted, and another begins."""
    (one, other), source = fleet.several(2), Source()
    await make_stale(one)
    begin = other._engine.session().placeholders.begin
    between = asyncio.Event()

    async def late(key: bytes) -> Any:
        await between.wait()
        return await begin(key)

    other._engine.session().placeholders.begin = late  # type: ignore[method-assign]
    how = STALE.replace(ttl="1h")
    task = start(other.get_or_load("k", source, policy=how))
    await poll(lambda: "k" in str(other._engine.session().flights._live))
    await one.delete("k")
    tasks = [task, start(one.get_or_load("k", source, policy=how))]
    await source.called()
    between.set()
    await fleet.waiting()
    source.go.set()
    assert await asyncio.gather(*tasks) == [[1]] * 2
    assert source.calls == 1


@pytest.mark.parametrize("soft_timeout", [0, None])
async def test_who_gets_the_lease_after_the_refresh_has_nothing_left_to_do(
    fleet: Fleet, soft_timeout: float | None
) -> None:
    """One has looked at what is stale, and asks for the lease when the other has stored and given it back."""
    (one, other), source = fleet.several(2), Source(going=True)
    how = STALE.replace(ttl="1h", soft_timeout=soft_timeout)
    await make_stale(one)
    begin = other._engine.session().placeholders.begin
    asks, between = asyncio.Event(), asyncio.Event()

    async def late(key: bytes) -> Any:
        if b":r:" in key:
            asks.set()
            await between.wait()
        return await begin(key)

    other._engine.session().placeholders.begin = late  # type: ignore[method-assign]
    task = start(other.get_or_load("k", source, policy=how))
    await asks.wait()
    assert await one.get_or_load("k", source, policy=STALE.replace(ttl="1h")) == [1]
    between.set()
    assert await task == ([0] if soft_timeout == 0 else [1])
    await poll(lambda: not other._engine.session().flights._flights)
    assert source.calls == 1
    assert await other.get("k") == [1]


# The waiters' deadline


async def test_who_has_waited_long_enough_loads(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    holder = start(one.get_or_load("k", source, **FLEET))
    await source.called()
    begun = time.monotonic()
    waiter = start(other.get_or_load("k", source, wait_timeout=0.2, **FLEET))
    await source.called(2)
    assert 0.2 <= time.monotonic() - begun < 0.2 + BUSY
    source.go.set()
    assert sorted(await asyncio.gather(holder, waiter)) == [[1], [2]]
    # What is kept is one of the two, whole.
    assert await one.get("k") in ([1], [2])


async def test_who_has_waited_long_enough_raises(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    holder = start(one.get_or_load("k", source, **FLEET))
    await source.called()
    how = {**FLEET, "wait_timeout": "150ms", "on_wait_timeout": "error"}
    waiters = [start(other.get_or_load("k", source, label="find", **how)) for _ in range(10)]
    for answer in await asyncio.gather(*waiters, return_exceptions=True):
        assert isinstance(answer, LoadTimeoutError)
        assert "another process has been loading find for more than 0.15 s" in str(answer)
    source.go.set()
    assert await holder == [1]
    assert source.calls == 1
    assert await other.get_or_load("k", source, **how) == [1]


async def test_who_has_waited_long_enough_raises_though_something_stale_is_there(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    await make_stale(one)
    holder = start(one.get_or_load("k", source, policy=STALE.replace(ttl="1h")))
    await source.called()
    how = STALE.replace(wait_timeout=0.1, on_wait_timeout="error")
    with pytest.raises(LoadTimeoutError):
        await other.get_or_load("k", source, policy=how)
    source.go.set()
    assert await holder == [1]


async def test_who_has_waited_long_enough_takes_what_is_stale(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    await make_stale(one)
    holder = start(one.get_or_load("k", source, policy=STALE.replace(ttl="1h")))
    await source.called()
    how = STALE.replace(wait_timeout=0.1, on_wait_timeout="stale")
    assert await asyncio.gather(*(other.get_or_load("k", source, policy=how) for _ in range(10))) == [[0]] * 10
    assert source.calls == 1
    source.go.set()
    assert await holder == [1]


async def test_who_has_waited_long_enough_loads_where_nothing_is_stale(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    holder = start(one.get_or_load("k", source, **FLEET))
    await source.called()
    how = STALE.replace(wait_timeout=0.1, on_wait_timeout="stale")
    waiter = start(other.get_or_load("k", source, policy=how))
    await source.called(2)
    source.go.set()
    assert sorted(await asyncio.gather(holder, waiter)) == [[1], [2]]


def test_the_wait_ends_by_default() -> None:
    rules = Cache(MemoryStore()).rules(coalesce="fleet")
    assert (rules.wait_timeout, rules.on_wait_timeout) == (30.0, "load")


# Who leaves


async def test_a_cancelled_waiter_leaves_the_others_waiting(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    holder = start(one.get_or_load("k", source, **FLEET))
    await source.called()
    waiters = [start(other.get_or_load("k", source, **FLEET)) for _ in range(10)]
    await fleet.waiting()
    for waiter in waiters[:9]:
        waiter.cancel()
    await turns()
    source.go.set()
    assert [await holder, await waiters[9]] == [[1], [1]]
    assert source.calls == 1


async def test_when_all_waiters_of_a_process_leave_nothing_stays_and_the_holder_goes_on(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    holder = start(one.get_or_load("k", source, **FLEET))
    await source.called()
    before = asyncio.all_tasks()
    waiters = [start(other.get_or_load("k", source, **FLEET)) for _ in range(5)]
    await fleet.waiting()
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    await poll(lambda: not [task for task in asyncio.all_tasks() - before if "load" in task.get_name()])
    source.go.set()
    assert await holder == [1]
    assert (source.calls, source.cancelled) == (1, 0)
    assert await other.get_or_load("k", source, **FLEET) == [1]


async def test_a_cancelled_holder_is_replaced_at_once(fleet: Fleet) -> None:
    caches, source = fleet.several(3), Source()
    holder = start(caches[0].get_or_load("k", source, **FLEET))
    await source.called()
    waiters = [start(cache.get_or_load("k", source, **FLEET)) for cache in caches[1:]]
    await fleet.waiting(2)
    begun = time.monotonic()
    holder.cancel()
    await source.called(2)
    assert time.monotonic() - begun < min(BUSY, placeholders.HOLD)  # it gave its place back
    source.go.set()
    assert await asyncio.gather(*waiters) == [[2], [2]]
    assert (source.calls, source.cancelled) == (2, 1)


async def test_a_holder_that_is_closed_is_replaced_at_once(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    holder = start(one.get_or_load("k", source, **FLEET))
    await source.called()
    waiter = start(other.get_or_load("k", source, **FLEET))
    await fleet.waiting()
    begun = time.monotonic()
    await one.aclose()
    await source.called(2)
    assert time.monotonic() - begun < min(BUSY, placeholders.HOLD)
    source.go.set()
    assert await waiter == [2]
    await asyncio.gather(holder, return_exceptions=True)


async def test_a_waiting_cache_can_be_closed(fleet: Fleet) -> None:
    (one, other), source = fleet.several(2), Source()
    holder = start(one.get_or_load("k", source, **FLEET))
    await source.called()
    waiter = start(other.get_or_load("k", source, **FLEET))
    await fleet.waiting()
    await other.aclose()
    (answer,) = await asyncio.gather(waiter, return_exceptions=True)
    assert "was closed" in str(answer)
    source.go.set()
    assert await holder == [1]


# What happens to the key meanwhile

CHANGES: dict[str, Callable[[Cache], Awaitable[Any]]] = {
    "delete": lambda cache: cache.delete("k"),
    "clear": lambda cache: cache.clear(),
    "invalidate": lambda cache: cache.invalidate("t"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", ["nothing", "stale"])
async def test_a_change_during_the_load_lets_the_others_load_anew(fleet: Fleet, change: str, before: str) -> None:
    caches, source = fleet.several(3), Source()
    how = {"policy": STALE.replace(ttl="1h", tags=["t"])}
    if before == "stale":
        await make_stale(caches[0], policy=STALE.replace(tags=["t"]))
    holder = start(caches[0].get_or_load("k", source, **how))
    await source.called()
    waiter = start(caches[1].get_or_load("k", source, **how))
    await fleet.waiting()
    await CHANGES[change](caches[2])
    gate, source.go = source.go, asyncio.Event()
    # Who comes after it: as in ``test_joining``. And who waited may not be content with the old load either.
    late = start(caches[2].get_or_load("k", source, **how))
    if change == "invalidate":
        gate.set()  # the old load's placeholder stands on: who waited is told when it has ended
    await source.called(2)
    gate.set()
    assert await holder == [1]
    source.go.set()
    assert (await waiter, await late) == ([2], [2])
    assert source.calls == 2
    for cache in caches:
        await poll(lambda cache=cache: is_now(cache, "k", [2]))  # type: ignore[misc]


async def test_a_set_during_the_load_is_what_the_others_get(fleet: Fleet) -> None:
    caches, source = fleet.several(3), Source()
    holder = start(caches[0].get_or_load("k", source, **FLEET))
    await source.called()
    waiter = start(caches[1].get_or_load("k", source, **FLEET))
    await fleet.waiting()
    await caches[2].set("k", "set")
    assert await waiter == "set"
    source.go.set()
    assert await holder == [1]
    for cache in caches:
        assert await cache.get("k") == "set"
    assert source.calls == 1


async def test_a_set_while_a_stale_entry_is_refreshed_is_what_the_others_get(fleet: Fleet) -> None:
    caches, source = fleet.several(3), Source()
    how = STALE.replace(ttl="1h")
    await make_stale(caches[0])
    holder = start(caches[0].get_or_load("k", source, policy=how))
    await source.called()
    waiter = start(caches[1].get_or_load("k", source, policy=how))
    await fleet.waiting()
    await caches[2].set("k", "set")
    source.go.set()
    assert await holder == [1]
    assert await waiter == "set"
    for cache in caches:
        assert await cache.get("k") == "set"
    assert source.calls == 1


# Holders that do not answer


async def test_a_slow_holder_keeps_its_place(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placeholders, "HOLD", 1.5)
    caches, source = fleet.several(3), Source(takes=2.5, going=True)
    assert await asyncio.gather(*(cache.get_or_load("k", source, **FLEET) for cache in caches)) == [[1]] * 3
    assert source.calls == 1


async def test_a_slow_refresh_keeps_its_place(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placeholders, "HOLD", 1.5)
    caches, source = fleet.several(3), Source(takes=2.5, going=True)
    await make_stale(caches[0])
    how = STALE.replace(ttl="1h")
    assert await asyncio.gather(*(cache.get_or_load("k", source, policy=how) for cache in caches)) == [[1]] * 3
    assert source.calls == 1


async def test_a_dead_holder_is_replaced_by_one(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placeholders, "HOLD", 0.5)
    caches, source = fleet.several(4), Source()
    dead = caches[0]
    holder = start(dead.get_or_load("k", source, **FLEET))
    await source.called()
    dead._engine.session().placeholders._held.clear()  # nothing is renewed, nothing given back
    begun = time.monotonic()
    waiters = [start(cache.get_or_load("k", source, **FLEET)) for cache in caches[1:]]
    await source.called(2)
    assert time.monotonic() - begun < 0.5 + 1.0 + BUSY
    await turns(20)
    source.go.set()
    assert await asyncio.gather(*waiters) == [[2]] * 3
    assert await holder == [1]
    assert source.calls == 2


# A store that is lost


async def test_a_lost_server_lets_everybody_load_uncached(tmp_path: Path) -> None:
    source = Source()
    with valkey_server() as server:
        async with RedisCache(server.url) as one, RedisCache(server.url) as other:
            holder, waiters = await held_up(one, other, source, 10)
            begun = time.monotonic()
            server.kill()
            await source.called(2)
            assert time.monotonic() - begun < BUSY  # and not wait_timeout, which is 30
            source.go.set()
            assert await holder == [1]
            assert await asyncio.gather(*waiters) == [[2]] * 10
            assert await other.get_or_load("k", source, **FLEET) == [3]


@pytest.mark.parametrize("kind", ["cut", "held"])
async def test_a_cable_that_is_pulled_holds_nobody_longer_than_the_wait(valkey: Server, kind: str) -> None:
    """The next connection is good: whether the wait goes on or the load is tried uncached, it takes no time."""
    valkey.command("FLUSHALL")
    source = Source()
    async with FaultProxy(valkey.url) as cable, RedisCache(valkey.url) as one, RedisCache(cable.url) as other:
        holder = start(one.get_or_load("k", source, **FLEET))
        await source.called()
        waiter = start(other.get_or_load("k", source, wait_timeout=20, **FLEET))
        await poll(lambda: len(other._engine.session().flights) == 1 and other.stats.misses == 1)
        begun = time.monotonic()
        if kind == "held":
            cable.hold(cable.of(b""))
        else:
            assert cable.cut()
        source.go.set()
        assert await waiter in ([1], [2])
        assert time.monotonic() - begun < 20
        assert await holder == [1]
        assert await one.get("k") == [1]


async def test_what_was_planted_while_its_answer_was_lost_holds_nobody_up(valkey: Server) -> None:
    """It has no holder, and nobody knows of it: it goes with the first thing that the server is told again."""
    valkey.command("FLUSHALL")
    source = Source(going=True)
    async with (
        FaultProxy(valkey.url) as proxy,
        RedisCache(proxy.url, failover={"probe_max": 0.5}) as one,
        RedisCache(valkey.url) as other,
    ):
        await one.get("other")
        with proxy.black_hole(b"EVAL", to="client"):
            assert await one.get_or_load("k", source, **FLEET) == [1]
        assert valkey.command("KEYS", "*:e:k") != []
        await poll(lambda: one.store.state().state == "healthy" and valkey.command("KEYS", "*:e:k") == [], 7)
        begun = time.monotonic()
        tasks = [start(cache.get_or_load("k", source, **FLEET)) for cache in (one, other)]
        assert await asyncio.gather(*tasks) in ([[2], [2]], [[2], [3]])  # it may be removed once more, with another's
        assert time.monotonic() - begun < BUSY


async def test_a_server_that_is_full_by_the_end_of_a_load_lets_the_others_load() -> None:
    source = Source()
    with valkey_server() as server:
        async with RedisCache(server.url) as one, RedisCache(server.url) as other:
            holder, (waiter,) = await held_up(one, other, source, 1)
            server.command("CONFIG", "SET", "maxmemory", "1")
            begun = time.monotonic()
            source.go.set()
            assert await holder == [1]
            assert await waiter == [2]
            assert time.monotonic() - begun < BUSY


async def test_a_server_that_hangs_holds_nobody_longer_than_the_store_may_take() -> None:
    source = Source()
    with valkey_server() as server:
        async with RedisCache(server.url) as one, RedisCache(server.url) as other:
            holder, waiters = await held_up(one, other, source, 10)
            begun = time.monotonic()
            server.pause()
            await source.called(2)
            assert time.monotonic() - begun < 1.0 + 0.5 + BUSY  # a look, and the deadline of asking
            source.go.set()
            assert await holder == [1]
            assert await asyncio.gather(*waiters) == [[2]] * 10
            server.resume()


# Asking for it


async def test_it_is_asked_for_in_every_way(fleet: Fleet) -> None:
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"coalesce": "fleet"}, {}),
        ({"policy": Policy(coalesce="fleet")}, {}),
        ({}, {"policy": Policy(coalesce="fleet")}),
        ({}, {"coalesce": "fleet"}),
        ({"coalesce": "process"}, {"coalesce": "fleet"}),
    ]
    for turn, (options, how) in enumerate(ways):
        caches, source, before = [fleet.open(**options) for _ in range(2)], Source(), fleet.waits.total()
        tasks = [start(caches[0].get_or_load(f"k{turn}", source, **how))]
        await source.called()
        tasks.append(start(caches[1].get_or_load(f"k{turn}", source, **how)))
        await fleet.waiting(before + 1)
        source.go.set()
        assert await asyncio.gather(*tasks) == [[1], [1]]
        assert source.calls == 1


async def test_a_call_may_go_back_to_its_process(fleet: Fleet) -> None:
    caches, source = [fleet.open(coalesce="fleet") for _ in range(2)], Source()
    tasks = [start(cache.get_or_load("k", source, coalesce="process")) for cache in caches]
    await source.called(2)
    source.go.set()
    assert sorted(await asyncio.gather(*tasks)) == [[1], [2]]


@pytest.mark.parametrize("value", ["fleet", "FLEET"])
async def test_it_is_asked_for_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CACHE_BACKEND", "file")
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "shared"))
    monkeypatch.setenv("CACHE_COALESCE", value)
    source = Source()
    async with open_cache() as one, open_cache() as other:
        assert isinstance(one.store, type(FileCache(tmp_path).store))
        tasks = [start(one.get_or_load("k", source))]
        await source.called()
        tasks.append(start(other.get_or_load("k", source)))
        await turns(50)
        source.go.set()
        assert await asyncio.gather(*tasks) == [[1], [1]]
    assert source.calls == 1


def test_a_store_without_leases_refuses_it() -> None:
    refused = 'coalesce="fleet" needs a store with leases, which .* has not: use Redis or files'
    store = Plain(MemoryStore())
    with pytest.raises(ValueError, match=refused):
        Cache(store, coalesce="fleet")
    with pytest.raises(ValueError, match=refused):
        Cache(store, policy=Policy(coalesce="fleet"))
    cache = Cache(store)
    with pytest.raises(ValueError, match=refused):
        cache.rules(Policy(coalesce="fleet"))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
async def test_it_is_the_same_under_eager_tasks(fleet: Fleet) -> None:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]  # not on 3.11
    try:
        caches, source = fleet.several(3), Source()
        tasks = [start(cache.get_or_load("k", source, **FLEET)) for cache in caches for _ in range(50)]
        await fleet.waiting(2)
        source.go.set()
        assert await asyncio.gather(*tasks) == [[1]] * 150
        await make_stale(caches[0], "l")
        source.go.clear()
        how = STALE.replace(ttl="1h")
        tasks = [start(cache.get_or_load("l", source, policy=how)) for cache in caches for _ in range(50)]
        await fleet.waiting(4)
        source.go.set()
        assert await asyncio.gather(*tasks) == [[2]] * 150
        for cache in caches:
            assert await cache.get_or_load("at once", answer, **FLEET) == 1
        assert source.calls == 2
    finally:
        loop.set_task_factory(None)


async def answer() -> int:
    return 1
