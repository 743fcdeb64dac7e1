"""Placeholders: planted, taken over, kept alive, given back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mcp_hub_cache import Cache, StoreError
from mcp_hub_cache import _placeholders as module
from mcp_hub_cache._lines import Lines
from mcp_hub_cache._placeholders import HOLD, Placeholders
from mcp_hub_cache._protocols import Write
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock, FaultyStore, entry_frame
from tests.backends import poll, turns

KEY = b"mcp_hub:default:e:k"


class Setting:
    def __init__(self, store: MemoryStore | FaultyStore | WithoutLeases) -> None:
        self.store = store
        self.errors: list[StoreError] = []
        self.lines = Lines(asyncio.get_running_loop(), store.lane, deadline=30)
        self.placeholders = Placeholders(store, self.lines, self.errors.append)

    async def aclose(self) -> None:
        await self.placeholders.aclose()
        await self.lines.aclose()

    async def frame(self) -> bytes | None:
        (frame,) = await self.store.get_many([KEY])
        return frame


class WithoutLeases:
    """A store whose placeholders can be neither prolonged nor given back."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        for name in ("name", "id", "now", "lane", "get_many", "begin_many", "write_many"):
            setattr(self, name, getattr(store, name))

    lane: Any
    get_many: Any
    write_many: Any


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def here(clock: FakeClock) -> AsyncIterator[Setting]:
    setting = Setting(MemoryStore(clock=clock))
    yield setting
    await setting.aclose()


def entry(setting: Setting, token: Any) -> Write:
    return Write(KEY, entry_frame(setting.store, KEY), 60.0, token)  # type: ignore[arg-type]


async def test_who_leads_holds_and_gives_back(here: Setting) -> None:
    begun = await here.placeholders.begin(KEY)
    assert begun is not None
    assert begun.leader
    held = here.placeholders.hold(KEY, begun)
    assert held is not None
    assert await here.frame() is not None
    here.placeholders.end(held, stored=False)
    await here.lines.settle()
    assert await here.frame() is None


async def test_where_something_was_stored_nothing_is_given_back(here: Setting) -> None:
    begun = await here.placeholders.begin(KEY)
    assert begun is not None
    held = here.placeholders.hold(KEY, begun)
    assert held is not None
    assert list(await here.store.write_many([entry(here, begun.fence)])) == ["done"]
    here.placeholders.end(held, stored=True)
    await here.lines.settle()
    assert await here.frame() is not None


async def test_giving_back_takes_no_others_frame(here: Setting) -> None:
    begun = await here.placeholders.begin(KEY)
    assert begun is not None
    held = here.placeholders.hold(KEY, begun)
    assert held is not None
    await here.store.write_many([entry(here, None)])  # a set came in between
    here.placeholders.end(held, stored=False)
    await here.lines.settle()
    assert await here.frame() is not None


async def test_another_processs_placeholder_is_not_held(here: Setting) -> None:
    await here.store.begin_many([KEY], hold=60)
    begun = await here.placeholders.begin(KEY)
    assert begun is not None
    assert not begun.leader
    assert here.placeholders.hold(KEY, begun) is None


async def test_an_own_one_is_taken_over_from_a_detached_load(here: Setting) -> None:
    first = await here.placeholders.begin(KEY)
    assert first is not None
    old = here.placeholders.hold(KEY, first)
    second = await here.placeholders.begin(KEY)
    assert second is not None
    assert not second.leader
    new = here.placeholders.hold(KEY, second)
    assert old is not None
    assert new is not None
    here.placeholders.end(old, stored=False)  # it has lost its place, and gives nothing back
    await here.lines.settle()
    assert await here.frame() is not None
    here.placeholders.end(new, stored=False)
    await here.lines.settle()
    assert await here.frame() is None


async def test_ending_twice_is_harmless(here: Setting) -> None:
    begun = await here.placeholders.begin(KEY)
    assert begun is not None
    held = here.placeholders.hold(KEY, begun)
    assert held is not None
    here.placeholders.end(held, stored=False)
    here.placeholders.end(held, stored=False)


async def test_what_is_held_is_kept_alive_by_one_task(
    here: Setting, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()
    real_sleep = asyncio.sleep

    async def nap(seconds: float) -> None:
        if seconds == 0:
            return await real_sleep(0)
        assert seconds <= HOLD / 2
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await naps.put(future)
        return await future

    monkeypatch.setattr(module.asyncio, "sleep", nap)
    before = asyncio.all_tasks()
    held = []
    for n in range(5):
        key = b"%s%d" % (KEY, n)
        begun = await here.placeholders.begin(key)
        assert begun is not None
        held.append(here.placeholders.hold(key, begun))
    assert len(asyncio.all_tasks() - before) == 1
    for _ in range(10):
        clock.advance(HOLD / 3)
        (await naps.get()).set_result(None)
        await turns()
    for each in held:
        assert each is not None
        (frame,) = await here.store.get_many([each.key])
        assert frame is not None, "it had 33 seconds, and a hold of 10"
        here.placeholders.end(each, stored=True)
    # With nothing held there is nothing to renew, and no task.
    (await naps.get()).set_result(None)
    await turns()
    assert asyncio.all_tasks() == before


async def test_what_is_not_renewed_is_gone_after_its_hold(here: Setting, clock: FakeClock) -> None:
    await here.placeholders.begin(KEY)
    clock.advance(HOLD - 0.1)
    assert await here.frame() is not None
    clock.advance(0.2)
    assert await here.frame() is None


async def test_a_store_that_fails_is_told_of_and_nothing_is_begun(clock: FakeClock) -> None:
    store = FaultyStore(MemoryStore(clock=clock))
    setting = Setting(store)
    store.break_down()
    assert await setting.placeholders.begin(KEY) is None
    assert [error.kind for error in setting.errors] == ["unreachable"]
    await setting.aclose()


async def test_giving_back_to_a_store_that_fails_raises_nothing(clock: FakeClock) -> None:
    class Fails(MemoryStore):
        async def release_many(self, held: Any, /) -> None:  # type: ignore[override]
            raise StoreError("no.")

    setting = Setting(Fails(clock=clock))
    begun = await setting.placeholders.begin(KEY)
    assert begun is not None
    held = setting.placeholders.hold(KEY, begun)
    assert held is not None
    setting.placeholders.end(held, stored=False)
    await turns()
    await setting.aclose()


async def test_a_store_without_leases_does(clock: FakeClock) -> None:
    setting = Setting(WithoutLeases(MemoryStore(clock=clock)))
    before = asyncio.all_tasks()
    begun = await setting.placeholders.begin(KEY)
    assert begun is not None
    held = setting.placeholders.hold(KEY, begun)
    assert held is not None
    assert asyncio.all_tasks() == before
    setting.placeholders.end(held, stored=False)
    clock.advance(HOLD + 0.1)
    assert await setting.frame() is None
    await setting.aclose()


async def test_closing_ends_the_renewing(here: Setting) -> None:
    before = asyncio.all_tasks()
    begun = await here.placeholders.begin(KEY)
    assert begun is not None
    here.placeholders.hold(KEY, begun)
    assert asyncio.all_tasks() != before
    await here.placeholders.aclose()
    assert asyncio.all_tasks() == before


async def test_a_closed_cache_gives_its_placeholders_back(clock: FakeClock) -> None:
    store = MemoryStore(clock=clock)
    started = asyncio.Event()

    async def load() -> None:
        started.set()
        await asyncio.Event().wait()

    async with Cache(store) as cache:
        task = asyncio.create_task(cache.get_or_load("k", load))
        await started.wait()
        (frame,) = await store.get_many([cache._key("k")])
        assert frame is not None
    await asyncio.gather(task, return_exceptions=True)
    await poll(lambda: cache._key("k") not in store._entries)


@pytest.mark.parametrize("steps", range(1, 6))
async def test_what_was_planted_for_a_caller_that_has_left_is_given_back(here: Setting, steps: int) -> None:
    planting = asyncio.create_task(here.placeholders.begin(KEY))
    await turns(steps)
    planting.cancel()
    (begun,) = await asyncio.gather(planting, return_exceptions=True)
    if isinstance(begun, asyncio.CancelledError):
        await here.lines.settle()
        await turns()
        await here.lines.settle()
        assert await here.frame() is None
    else:
        assert steps > 1


async def test_what_another_has_planted_is_not(here: Setting) -> None:
    (other,) = await here.store.begin_many([KEY], hold=60)
    planting = asyncio.create_task(here.placeholders.begin(KEY))
    await turns(1)
    planting.cancel()
    await turns()
    await here.lines.settle()
    (again,) = await here.store.begin_many([KEY], hold=60)
    assert again.fence == other.fence


async def test_a_load_that_is_cancelled_while_it_begins_leaves_nothing_for_long(clock: FakeClock) -> None:
    """The beginning was handed on already, and the store takes nothing back; nobody renews what it planted."""
    store = FaultyStore(MemoryStore(clock=clock))
    async with Cache(store, timeout=30) as cache:

        async def load() -> int:
            return 1

        await cache.exists("warm up")
        store.hang.clear()
        task = asyncio.create_task(cache.get_or_load("k", load, refresh=True))
        await turns()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        store.hang.set()
        await turns()
        assert await cache.get_or_load("k", load) == 1
        clock.advance(HOLD + 0.1)
        assert await cache.get_or_load("k", load) == 1
        assert await cache.get("k") == 1
