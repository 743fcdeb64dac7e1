"""The promises of ``Store`` as a suite of tests, to be run on the real thing, in pytest's asyncio mode."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from .._frame import HEAD_SIZE, TOKEN, Kind, Mark, pack, patch_head, placeholder, unpack, unpack_head
from .._freshness import span
from .._protocols import Coherent, Fence, Held, Leases, Patch, Store, Write


def entry_frame(
    store: Store,
    key: bytes,
    payload: bytes = b'{"n":1}',
    *,
    ttl: float = 60.0,
    token: bytes | None = None,
    marks: tuple[Mark, ...] = (),
) -> bytes:
    """Return an entry's frame for *key* as the engine would write it to *store* now."""
    now = store.now()
    until = span(now, ttl)
    return pack(
        key,
        payload,
        codec=1,
        token=token if token is not None else secrets.token_bytes(8),
        created=now,
        fresh_until=until.fresh_until,
        keep_until=until.keep_until,
        marks=marks,
    )


def _write(
    store: Store, key: bytes, payload: bytes = b'{"n":1}', *, ttl: float = 60.0, fence: Fence | None = None
) -> Write:
    return Write(key, entry_frame(store, key, payload, ttl=ttl), None if ttl == math.inf else ttl, fence)


def _payload(frame: bytes | None, key: bytes) -> bytes | None:
    return None if frame is None else bytes(unpack(frame, key).payload)


class StoreConformance:
    """Every promise of ``Store``, checked on two instances that share what a real deployment shares.

    Subclass it in a test module, name the subclass ``Test…`` and give it ``open_pair``, an async context manager over
    two stores on one folder, one server or one dict::

        class TestMyStore(StoreConformance):
            @asynccontextmanager
            async def open_pair(self):
                yield MyStore(url), MyStore(url)

    Attributes:
        prefix: What the keys of the suite begin with.
        wait_expiry: Awaited to let a number of seconds pass on the stores' clock; the default polls the real one.
    """

    prefix: bytes = b"mcp_hub:conformance:e:"

    def open_pair(self) -> AbstractAsyncContextManager[tuple[Store, Store]]:
        """Open two instances of the store; the subclass says how."""
        raise NotImplementedError

    async def wait_expiry(self, store: Store, until: float) -> None:
        """Return when *store*'s clock has passed *until*."""
        while store.now() <= until:  # noqa: ASYNC110  # the store's clock has no event to wait for
            await asyncio.sleep(0.005)

    async def wait_coherent(self, store: Coherent, key: bytes) -> bool:
        """Return whether *store* has stamps for *key*. For a store that comes to have them later: wait until it has."""
        return store.stamp(key) is not None

    @asynccontextmanager
    async def _pair(self) -> AsyncIterator[tuple[Store, Store]]:
        async with self.open_pair() as (one, two):
            try:
                yield one, two
            finally:
                await one.clear(b"")
                await one.aclose()
                await two.aclose()

    def key(self, name: str) -> bytes:
        """A key of the suite's own."""
        return self.prefix + name.encode()

    async def test_is_a_store(self) -> None:
        """Both instances have what the protocol names, and ids of their own."""
        async with self._pair() as (one, two):
            assert isinstance(one, Store)
            assert one.id != two.id
            assert one.name == two.name
            await one.ping()
            await two.ping()

    async def test_read_what_the_other_wrote(self) -> None:
        """A frame comes back byte for byte, in the order asked, None for what is not there."""
        async with self._pair() as (one, two):
            a, b, c = self.key("a"), self.key("b"), self.key("ö:weird *?[x]\n\0")
            writes = [_write(one, a, b"1"), _write(one, c, bytes(range(256)) * 40, ttl=math.inf)]
            assert list(await one.write_many(writes)) == ["done", "done"]
            got = list(await two.get_many([c, b, a, a]))
            assert got == [writes[1].frame, None, writes[0].frame, writes[0].frame]
            heads = list(await two.head_many([a, b, c]))
            assert heads == [writes[0].frame[:HEAD_SIZE], None, writes[1].frame[:HEAD_SIZE]]

    async def test_empty_batches(self) -> None:
        """Nothing asked, nothing answered."""
        async with self._pair() as (one, _):
            assert list(await one.get_many([])) == []
            assert list(await one.head_many([])) == []
            assert list(await one.begin_many([], hold=1.0)) == []
            assert list(await one.write_many([])) == []
            assert list(await one.patch_many([])) == []
            assert list(await one.delete_many([])) == []

    async def test_same_key_twice_in_a_batch(self) -> None:
        """Writes to one key in one batch are applied in order."""
        async with self._pair() as (one, two):
            key = self.key("twice")
            first, second = _write(one, key, b"1"), _write(one, key, b"2")
            assert list(await one.write_many([first, second])) == ["done", "done"]
            assert list(await two.get_many([key])) == [second.frame]

    async def test_overwrite(self) -> None:
        """An unconditional write replaces whatever stands there, shorter or longer."""
        async with self._pair() as (one, two):
            key = self.key("over")
            for size in (10, 5000, 1, 70_000, 3):
                write = _write(two, key, b"x" * size)
                assert list(await two.write_many([write])) == ["done"]
                assert list(await one.get_many([key])) == [write.frame]

    async def test_big(self) -> None:
        """Eight MiB come back whole."""
        async with self._pair() as (one, two):
            write = _write(one, self.key("big"), secrets.token_bytes(8 * 1024 * 1024))
            outcome, got = await one.write_many([write]), None
            if list(outcome) == ["done"]:
                (got,) = await two.get_many([write.key])
            assert got == write.frame

    async def test_expiry(self) -> None:
        """After its keep a frame is gone for reads, heads, deletes and begins."""
        async with self._pair() as (one, two):
            keys = [self.key(f"short{n}") for n in range(4)]
            stay = self.key("stay")
            await one.write_many([*(_write(one, key, ttl=0.3) for key in keys), _write(one, stay, ttl=math.inf)])
            await self.wait_expiry(one, one.now() + 0.35)
            await self.wait_expiry(two, two.now())
            assert (await two.get_many([keys[0], stay]))[0] is None
            assert list(await two.head_many([keys[1]])) == [None]
            assert list(await two.delete_many([keys[2]])) == [None]
            (begun,) = await two.begin_many([keys[3]], hold=5.0)
            assert begun.frame is None
            assert begun.leader
            assert (await one.get_many([stay]))[0] is not None

    async def test_delete(self) -> None:
        """Deletes answer the heads of what was there, and a second one finds nothing."""
        async with self._pair() as (one, two):
            a, b = self.key("a"), self.key("b")
            write = _write(one, a)
            await one.write_many([write])
            assert list(await two.delete_many([a, b, a])) == [write.frame[:HEAD_SIZE], None, None]
            assert list(await one.get_many([a])) == [None]

    async def test_begin_plants_a_placeholder(self) -> None:
        """The first to begin leads; the other sees its placeholder; a fenced write of the leader's lands."""
        async with self._pair() as (one, two):
            key = self.key("begin")
            (first,) = await one.begin_many([key], hold=5.0)
            assert (first.frame, first.leader) == (None, True)
            (second,) = await two.begin_many([key], hold=5.0)
            assert not second.leader
            assert second.frame is not None
            assert unpack_head(second.frame).kind == Kind.PLACEHOLDER
            assert unpack(second.frame, key).head.token == first.fence.token == second.fence.token
            write = _write(one, key, fence=first.fence)
            assert list(await one.write_many([write])) == ["done"]
            assert list(await two.get_many([key])) == [write.frame]
            late = _write(two, key, b"late", fence=second.fence)
            assert list(await two.write_many([late])) == ["refused"]
            assert list(await one.get_many([key])) == [write.frame]

    async def test_begin_on_an_entry(self) -> None:
        """Beginning where an entry stands answers it with its token; a fenced write then replaces it."""
        async with self._pair() as (one, two):
            key = self.key("entry")
            write = _write(one, key)
            await one.write_many([write])
            (begun,) = await two.begin_many([key], hold=5.0)
            assert begun.frame == write.frame
            assert not begun.leader
            assert begun.fence.token == write.frame[TOKEN]
            again = _write(two, key, b"new", fence=begun.fence)
            assert list(await two.write_many([again])) == ["done"]
            assert list(await one.get_many([key])) == [again.frame]

    async def test_begin_of_many_in_order(self) -> None:
        """A batch of begins answers each key by itself; the same key twice has one leader."""
        async with self._pair() as (one, two):
            a, b = self.key("a"), self.key("b")
            await two.write_many([_write(two, b)])
            first, second, third = await one.begin_many([a, b, a], hold=5.0)
            assert (first.leader, second.leader, third.leader) == (True, False, False)
            assert third.fence == first.fence

    async def test_delete_fences_a_load(self) -> None:
        """A delete between begin and write wins: the loaded value is refused."""
        async with self._pair() as (one, two):
            key = self.key("fenced")
            (begun,) = await one.begin_many([key], hold=5.0)
            await two.delete_many([key])
            assert list(await one.write_many([_write(one, key, fence=begun.fence)])) == ["refused"]
            assert list(await two.get_many([key])) == [None]

    async def test_set_fences_a_load(self) -> None:
        """So does a set: it stays."""
        async with self._pair() as (one, two):
            key = self.key("fenced")
            (begun,) = await one.begin_many([key], hold=5.0)
            write = _write(two, key, b"set")
            await two.write_many([write])
            assert list(await one.write_many([_write(one, key, fence=begun.fence)])) == ["refused"]
            assert list(await one.get_many([key])) == [write.frame]

    async def test_clear_fences_a_load(self) -> None:
        """And a clear: placeholders go with it."""
        async with self._pair() as (one, two):
            key = self.key("fenced")
            (begun,) = await one.begin_many([key], hold=5.0)
            await two.clear(self.prefix)
            assert list(await one.write_many([_write(one, key, fence=begun.fence)])) == ["refused"]
            assert list(await two.get_many([key])) == [None]

    async def test_a_new_load_has_a_new_fence(self) -> None:
        """Begin, delete, begin: the first fence is worthless, the second good."""
        async with self._pair() as (one, two):
            key = self.key("again")
            (old,) = await one.begin_many([key], hold=5.0)
            await two.delete_many([key])
            (new,) = await two.begin_many([key], hold=5.0)
            assert new.leader
            assert new.fence.token != old.fence.token
            assert list(await one.write_many([_write(one, key, b"old", fence=old.fence)])) == ["refused"]
            assert list(await two.write_many([_write(two, key, b"new", fence=new.fence)])) == ["done"]

    async def test_a_foreign_fence_is_refused(self) -> None:
        """A fence is good only in the store that issued it."""
        async with self._pair() as (one, two):
            key = self.key("foreign")
            (begun,) = await one.begin_many([key], hold=5.0)
            assert list(await two.write_many([_write(two, key, fence=begun.fence)])) == ["refused"]
            patch = Patch(key, begun.fence, placeholder(key, begun.fence.token, two.now(), 9.0)[:HEAD_SIZE], 9.0)
            assert list(await two.patch_many([patch])) == ["refused"]

    async def test_a_placeholder_expires(self) -> None:
        """After its hold another may lead, and the first one's write is refused."""
        async with self._pair() as (one, two):
            key = self.key("hold")
            (first,) = await one.begin_many([key], hold=0.2)
            await self.wait_expiry(two, two.now() + 0.25)
            assert list(await one.write_many([_write(one, key, fence=first.fence)])) == ["refused"]
            (second,) = await two.begin_many([key], hold=5.0)
            assert second.leader

    async def test_leases(self) -> None:
        """A renewed placeholder outlives its hold, a lost one says so, a released one is gone."""
        async with self._pair() as (one, two):
            if not isinstance(one, Leases):
                return
            a, b, c = self.key("a"), self.key("b"), self.key("c")
            begun = await one.begin_many([a, b, c], hold=0.4)
            held = [Held(key, item.fence) for key, item in zip((a, b, c), begun, strict=True)]
            await two.delete_many([b])
            assert list(await one.renew_many(held, hold=30.0)) == [True, False, True]
            await self.wait_expiry(two, two.now() + 0.45)
            assert list(await one.write_many([_write(one, a, fence=held[0].fence)])) == ["done"]
            await one.release_many(held)
            assert [frame is None for frame in await two.get_many([a, b, c])] == [False, True, True]

    async def test_patch(self) -> None:
        """A new head over the same payload, where the token is the same, prolongs or shortens the life."""
        async with self._pair() as (one, two):
            key = self.key("patch")
            write = _write(one, key, b"payload", ttl=0.3)
            await one.write_many([write])
            head = unpack_head(write.frame)
            fence = Fence(two.id, head.token)
            longer = patch_head(head, fresh_until=two.now() + 60, keep_until=two.now() + 60)
            assert list(await two.patch_many([Patch(key, fence, longer, 60.0)])) == ["done"]
            await self.wait_expiry(one, one.now() + 0.35)
            assert list(await one.get_many([key])) == [longer + write.frame[HEAD_SIZE:]]
            wrong = Fence(two.id, b"notthis!")
            assert list(await two.patch_many([Patch(key, wrong, longer, 60.0)])) == ["refused"]
            assert list(await two.patch_many([Patch(self.key("none"), fence, longer, 60.0)])) == ["refused"]
            forever = patch_head(head, fresh_until=math.inf, keep_until=math.inf)
            assert list(await two.patch_many([Patch(key, fence, forever, None)])) == ["done"]
            assert list(await one.head_many([key])) == [forever]
            brief = patch_head(head, fresh_until=one.now() + 0.2, keep_until=one.now() + 0.2)
            assert list(await one.patch_many([Patch(key, Fence(one.id, head.token), brief, 0.2)])) == ["done"]
            await self.wait_expiry(two, two.now() + 0.25)
            assert list(await two.get_many([key])) == [None]

    async def test_only_one_of_two_fenced_writes_lands(self) -> None:
        """Compare and write is atomic: of many writers with one fence exactly one is done."""
        async with self._pair() as (one, two):
            for turn in range(10):
                key = self.key(f"race{turn}")
                (mine,) = await one.begin_many([key], hold=5.0)
                (theirs,) = await two.begin_many([key], hold=5.0)
                jobs = [
                    store.write_many([_write(store, key, str(n).encode(), fence=fence)])
                    for n, (store, fence) in enumerate([(one, mine.fence), (two, theirs.fence)] * 4)
                ]
                outcomes = [outcome for answer in await asyncio.gather(*jobs) for outcome in answer]
                assert sorted(map(str, outcomes)) == ["done"] + ["refused"] * 7

    async def test_scan(self) -> None:
        """Every page comes; keys under other prefixes do not, however like a pattern the prefix is."""
        async with self._pair() as (one, two):
            odd = self.prefix + b"o[d]*?:"
            keys = {odd + str(n).encode() for n in range(1200)}
            others = {self.prefix + b"od:1", self.prefix + b"odd:2", self.prefix + b"o"}
            writes = [_write(one, key) for key in keys | others]
            for start in range(0, len(writes), 200):
                await one.write_many(writes[start : start + 200])
            heads = {write.key: write.frame[:HEAD_SIZE] for write in writes}
            seen = [item async for page in two.scan(odd) for item in page]
            assert {key for key, _ in seen} == keys
            assert all(heads[key] == head for key, head in seen)

    async def test_clear(self) -> None:
        """Clears what begins with the prefix and nothing else, and counts the entries."""
        async with self._pair() as (one, two):
            mine, theirs = self.prefix + b"c[l]*:", self.prefix + b"cl:"
            await one.write_many([_write(one, mine + str(n).encode()) for n in range(700)])
            await one.write_many([_write(one, theirs + b"1")])
            await one.begin_many([mine + b"loading"], hold=5.0)
            assert await two.clear(mine) == 700
            assert await two.clear(mine) == 0
            assert list(await one.get_many([mine + b"1", mine + b"loading"])) == [None, None]
            assert (await one.get_many([theirs + b"1"]))[0] is not None

    async def test_clear_takes_namespaces_whole(self) -> None:
        """One namespace's clear leaves its neighbours alone, prefixes of one another among them."""
        async with self._pair() as (one, _):
            names = [b"mcp_hub:conf:e:k", b"mcp_hub:conf2:e:k", b"mcp_hub:con:e:k"]
            await one.write_many([_write(one, name) for name in names])
            assert await one.clear(b"mcp_hub:conf:") == 1
            assert [frame is None for frame in await one.get_many(names)] == [True, False, False]

    async def test_foreign_bytes(self) -> None:
        """What is no frame can be read, replaced and deleted like anything else; nothing raises."""
        async with self._pair() as (one, two):
            key = self.key("junk")
            for junk in (b"", b"x", b"\x89MHC", b"not a frame at all" * 30):
                await one.write_many([Write(key, junk, 60.0, None)])
                await two.get_many([key])
                await two.head_many([key])
                (begun,) = await two.begin_many([key], hold=5.0)
                assert list(await two.write_many([_write(two, key, b"ok", fence=begun.fence)])) == ["done"]
                assert _payload((await one.get_many([key]))[0], key) == b"ok"
                await one.delete_many([key])

    async def test_clock(self) -> None:
        """Both instances tell the same time, near enough."""
        async with self._pair() as (one, two):
            await one.ping()
            await two.ping()
            assert abs(one.now() - two.now()) < 1.0

    async def test_stamps(self) -> None:
        """A stamp taken before a change by anybody is another one after it; ``changed`` then returns."""
        async with self._pair() as (one, two):
            if not isinstance(one, Coherent):
                return
            key = self.key("stamp")
            for store in (one, two):  # whatever a store needs before it can tell
                await store.write_many([_write(store, key)])
                await store.get_many([key])
            if not await self.wait_coherent(one, key):  # it has the methods, and what stands behind it can't tell
                return
            for change in (
                lambda: two.write_many([_write(two, key)]),
                lambda: two.delete_many([key]),
                lambda: one.write_many([_write(one, key)]),
                lambda: two.clear(self.prefix),
            ):
                assert await self.wait_coherent(one, key)
                before = one.stamp(key)
                assert before is not None
                waiter = asyncio.ensure_future(one.changed(key, before))
                await change()
                await asyncio.wait_for(waiter, 5)
                assert one.stamp(key) != before

    async def test_info(self) -> None:
        """Facts are plain."""
        async with self._pair() as (one, _):
            facts = await one.info()
            assert all(isinstance(value, str | int | float) for value in facts.values())

    async def test_reopens(self) -> None:
        """After ``aclose`` a store serves again."""
        async with self._pair() as (one, two):
            write = _write(one, self.key("re"))
            await one.write_many([write])
            await one.aclose()
            await one.aclose()
            assert list(await one.get_many([write.key])) == [write.frame]
            assert list(await two.get_many([write.key])) == [write.frame]

    async def test_concurrent_calls(self) -> None:
        """Hundreds of calls at once, each answered with its own."""
        async with self._pair() as (one, two):

            async def one_caller(n: int) -> None:
                key, store = self.key(f"many{n}"), (one, two)[n % 2]
                write = _write(store, key, str(n).encode())
                assert list(await store.write_many([write])) == ["done"]
                assert list(await store.get_many([key])) == [write.frame]

            await asyncio.gather(*(one_caller(n) for n in range(300)))

    async def test_cancelled_callers_hurt_nobody(self) -> None:
        """Callers that leave in the middle leave the store whole, and nobody gets another's bytes."""
        async with self._pair() as (one, _):
            writes = {self.key(f"c{n}"): _write(one, self.key(f"c{n}"), str(n).encode()) for n in range(50)}
            await one.write_many(list(writes.values()))

            async def reader(key: bytes) -> None:
                (frame,) = await one.get_many([key])
                assert frame == writes[key].frame

            for turn in range(20):
                tasks = [asyncio.ensure_future(reader(key)) for key in writes]
                for _ in range(turn % 4):
                    await asyncio.sleep(0)
                for task in tasks[turn % 3 :: 2]:
                    task.cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert result is None or isinstance(result, asyncio.CancelledError)
            assert list(await one.get_many(list(writes))) == [write.frame for write in writes.values()]
