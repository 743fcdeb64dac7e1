"""A primary of parts that fail alone: a breaker for each lane."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from typing import Any

import pytest
import pytest_asyncio

from mcp_hub_cache._exceptions import StoreUnreachableError
from mcp_hub_cache._protocols import Begun, Fence, Outcome, Write
from tests.stores.failing import SECRET, Make, Primary, World, payload_of, worlds

A, B = b"mcp_hub:t:e:a", b"mcp_hub:t:e:b"


@pytest_asyncio.fixture
async def world() -> AsyncIterator[Make]:
    async with worlds() as make:

        def parted(**options: Any) -> World:
            made: World = make(kind=Parted, **options)
            return made

        yield parted


class Parted(Primary):
    """One that has a node for each last letter of a key; each can be away."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dead: set[Hashable] = set()
        self.pinged: list[Hashable] = []
        self.moved: dict[bytes, Hashable] = {}

    def lane(self, key: bytes, /) -> Hashable:
        return self.moved.get(key, key[-1:])

    def _look(self, keys: Sequence[bytes]) -> None:
        if self.dead & {self.lane(key) for key in keys}:
            raise StoreUnreachableError("a node is away.")

    def get_many(self, keys: Sequence[bytes], /) -> asyncio.Future[list[bytes | None]]:  # type: ignore[override]
        async def get() -> list[bytes | None]:
            self._look(keys)
            return await super(Parted, self).get_many(keys)

        return asyncio.ensure_future(get())

    async def begin_many(self, keys: Sequence[bytes], /, *, hold: float) -> list[Begun]:
        self._look(keys)
        return await super().begin_many(keys, hold=hold)

    def write_many(self, writes: Sequence[Write], /) -> asyncio.Future[list[Outcome]]:  # type: ignore[override]
        async def write() -> list[Outcome]:
            self._look([write.key for write in writes])
            return await super(Parted, self).write_many(writes)

        return asyncio.ensure_future(write())

    async def delete_many(self, keys: Sequence[bytes], /) -> list[bytes | None]:
        self._look(keys)
        return await super().delete_many(keys)

    async def clear(self, prefix: bytes, /) -> int:
        if self.dead:
            raise StoreUnreachableError("a node is away.")
        return await super().clear(prefix)

    async def ping(self, lane: Hashable = None, /) -> None:
        self.pinged.append(lane)
        if lane in self.dead or (lane is None and self.dead):
            raise StoreUnreachableError("a node is away.")
        await super().ping(lane)


async def _lose(w: World, key: bytes) -> None:
    w.primary.dead.add(key[-1:])
    await w.store.get_many([key])
    await w.noticed()


async def _back(w: World) -> None:
    w.primary.dead.clear()
    w.store._keeper.wake()
    await w.until("healthy")


async def test_a_dead_node_takes_its_own_keys_with_it_and_no_others(world: Make) -> None:
    w = world()
    await w.set(A, b"a")
    await w.set(B, b"b")
    await _lose(w, A)
    assert await w.get(A) is None
    assert await w.get(B) == b"b"
    assert await w.set(A, b"a2") == "done"
    assert await w.set(B, b"b2") == "done"
    assert (await w.get(A), await w.in_files(A), await w.on_server(A)) == (b"a2", b"a2", b"a")
    assert (await w.get(B), await w.in_files(B), await w.on_server(B)) == (b"b2", None, b"b2")
    info = await w.store.info()
    assert (info["breaker"], info["parts_away"]) == ("open", 1)


async def test_a_key_that_comes_to_be_of_a_part_still_away_is_not_what_stood_in_for_it_before(world: Make) -> None:
    """Keys change parts: with a value's size, or when a slot moves."""
    w = world()
    await w.set(A, b"old")
    await _lose(w, A)
    await _lose(w, B)
    await w.set(A, b"of the outage")
    w.clock.advance(1)
    w.primary.dead = {B[-1:]}
    w.store._keeper.wake()
    async with asyncio.timeout(5):
        while A[-1:] in w.store._health.away:
            await asyncio.sleep(0)
    assert await w.set(A, b"later") == "done"
    assert (await w.get(A), await w.on_server(A)) == (b"later", b"later")
    w.primary.moved[A] = B[-1:]
    assert await w.get(A) is None
    await _back(w)
    assert await w.get(A) == b"later"


async def test_many_keys_of_several_nodes_are_asked_of_whoever_serves_each(world: Make) -> None:
    w = world()
    await w.set(A, b"a")
    await w.set(B, b"b")
    await _lose(w, A)
    await w.set(A, b"a2")
    assert list(map(payload_of, await w.store.get_many([A, B, A]))) == [b"a2", b"b", b"a2"]
    begun = await w.store.begin_many([B + b"x", A + b"y"], hold=5)
    assert [one.leader for one in begun] == [True, True]
    await w.store.delete_many([B, A])
    assert await w.store.get_many([A, B]) == [None, None]
    assert await w.on_server(A) == b"a"
    await _back(w)
    assert await w.on_server(A) is None
    assert await w.get(A) is None


async def test_a_fence_is_good_at_its_own_node_alone(world: Make) -> None:
    w = world()
    await w.set(B, b"b")
    await _lose(w, A)
    ours, theirs = await w.store.begin_many([A + b"xa", b"mcp_hub:t:e:x-b"], hold=5)
    assert await w.set(A + b"xa", b"1", fence=ours.fence) == "done"
    assert await w.set(b"mcp_hub:t:e:x-b", b"1", fence=theirs.fence) == "done"
    assert await w.in_files(A + b"xa") == b"1"
    assert await w.on_server(b"mcp_hub:t:e:x-b") == b"1"
    assert await w.set(B, b"2", fence=Fence(w.files.id, ours.fence.token)) == "refused"


async def test_while_one_node_is_away_the_first_failure_of_another_is_enough(world: Make) -> None:
    w = world()
    await w.set(A, b"a")
    await w.set(B, b"b")
    await _lose(w, A)
    w.primary.dead.add(B[-1:])
    assert await w.get(B) is None
    asked = w.asked()
    assert await w.get(B) is None
    assert w.asked() == asked
    assert "parts_away" in await w.store.info()  # lane None was asked for the state, too


async def test_each_is_probed_by_itself_and_comes_back_by_itself(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mcp_hub_cache")
    w = world()
    await w.set(A, b"a")
    await w.set(B, b"b")
    await _lose(w, A)
    await _lose_too(w, B)
    await w.store.delete_many([A, B])
    w.primary.pinged.clear()
    w.primary.dead.discard(A[-1:])
    w.store._keeper.wake()
    async with asyncio.timeout(5):
        while A[-1:] in w.store._health.away:
            await asyncio.sleep(0)
    assert A[-1:] in w.primary.pinged
    assert w.store.state().state == "degraded"
    assert await w.on_server(A) is None
    assert await w.on_server(B) == b"b"
    await _back(w)
    assert await w.on_server(B) is None
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "Redis connection failed: a node is away."
    ]


async def _lose_too(w: World, key: bytes) -> None:
    w.primary.dead.add(key[-1:])
    await w.store.get_many([key])
    assert key[-1:] in w.store._health.away


async def test_a_clear_holds_where_a_node_is_away_and_is_made_up_for_when_all_are_back(world: Make) -> None:
    w = world()
    await w.set(A, b"a")
    await w.set(B, b"b")
    await _lose(w, A)
    await w.store.clear(b"mcp_hub:t:")
    assert await w.get(A) is None
    assert await w.get(B) is None
    await _back(w)
    await w.caught_up()
    assert await w.on_server(A) is None
    assert await w.on_server(B) is None


async def test_what_the_standby_had_under_a_key_does_not_outlive_the_nodes_return(world: Make) -> None:
    w = world()
    await w.set(A, b"a")
    await w.set(B, b"b")
    await _lose(w, A)
    await _lose_too(w, B)
    await w.set(A, b"in the standby")
    w.clock.advance(1)
    w.primary.dead.discard(A[-1:])
    w.store._keeper.wake()
    async with asyncio.timeout(5):
        while A[-1:] in w.store._health.away:
            await asyncio.sleep(0)
    await w.set(A, b"newer")
    w.clock.advance(1)
    await _lose_too(w, A)
    assert await w.get(A) is None  # not what stood in the standby before


Work = Callable[[World], Awaitable[object]]


@pytest.mark.parametrize(
    "work",
    [
        lambda w: w.store.get_many([A, B]),
        lambda w: w.store.begin_many([A, B], hold=5),
        lambda w: w.store.delete_many([A, B]),
        lambda w: w.store.write_many([Write(key, w.frame(key), 60.0, None) for key in (A, B)]),
    ],
)
async def test_without_a_standby_the_error_is_that_of_the_part_that_is_away(world: Make, work: Work) -> None:
    w = world(standby=False)
    await w.set(A, SECRET)
    await w.set(B, SECRET)
    w.primary.dead.add(A[-1:])
    with pytest.raises(StoreUnreachableError):
        await w.store.get_many([A])
    await w.noticed()
    with pytest.raises(StoreUnreachableError, match="a node is away"):
        await work(w)
