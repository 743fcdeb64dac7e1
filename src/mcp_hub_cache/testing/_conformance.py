"""The promises of ``Store`` as a suite of tests, to be run on the real thing, in pytest's asyncio mode."""

from __future__ import annotations

import asyncio
import math
import secrets

from .._frame import HEAD_SIZE, patch_head, unpack_head
from .._protocols import Coherent, Fence, Patch, Store, Used, Write
from ._conformance_leases import LeaseConformance
from ._conformance_setting import payload_of, write_of


class StoreConformance(LeaseConformance):
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
            writes = [write_of(one, a, b"1"), write_of(one, c, bytes(range(256)) * 40, ttl=math.inf)]
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
            first, second = write_of(one, key, b"1"), write_of(one, key, b"2")
            assert list(await one.write_many([first, second])) == ["done", "done"]
            assert list(await two.get_many([key])) == [second.frame]

    async def test_overwrite(self) -> None:
        """An unconditional write replaces whatever stands there, shorter or longer."""
        async with self._pair() as (one, two):
            key = self.key("over")
            for size in (10, 5000, 1, 70_000, 3):
                write = write_of(two, key, b"x" * size)
                assert list(await two.write_many([write])) == ["done"]
                assert list(await one.get_many([key])) == [write.frame]

    async def test_big(self) -> None:
        """Eight MiB come back whole."""
        async with self._pair() as (one, two):
            write = write_of(one, self.key("big"), secrets.token_bytes(8 * 1024 * 1024))
            outcome, got = await one.write_many([write]), None
            if list(outcome) == ["done"]:
                (got,) = await two.get_many([write.key])
            assert got == write.frame

    async def test_expiry(self) -> None:
        """After its keep a frame is gone for reads, heads, deletes and begins."""
        async with self._pair() as (one, two):
            keys = [self.key(f"short{n}") for n in range(4)]
            stay = self.key("stay")
            await one.write_many([*(write_of(one, key, ttl=0.3) for key in keys), write_of(one, stay, ttl=math.inf)])
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
            write = write_of(one, a)
            await one.write_many([write])
            assert list(await two.delete_many([a, b, a])) == [write.frame[:HEAD_SIZE], None, None]
            assert list(await one.get_many([a])) == [None]

    async def test_patch(self) -> None:
        """A new head over the same payload, where the token is the same, prolongs or shortens the life."""
        async with self._pair() as (one, two):
            key = self.key("patch")
            write = write_of(one, key, b"payload", ttl=0.3)
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

    async def test_scan(self) -> None:
        """Every page comes; keys under other prefixes do not, however like a pattern the prefix is."""
        async with self._pair() as (one, two):
            odd = self.prefix + b"o[d]*?:"
            keys = {odd + str(n).encode() for n in range(1200)}
            others = {self.prefix + b"od:1", self.prefix + b"odd:2", self.prefix + b"o"}
            writes = [write_of(one, key) for key in keys | others]
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
            await one.write_many([write_of(one, mine + str(n).encode()) for n in range(700)])
            await one.write_many([write_of(one, theirs + b"1")])
            await one.begin_many([mine + b"loading"], hold=5.0)
            assert await two.clear(mine) == 700
            assert await two.clear(mine) == 0
            assert list(await one.get_many([mine + b"1", mine + b"loading"])) == [None, None]
            assert (await one.get_many([theirs + b"1"]))[0] is not None

    async def test_clear_takes_namespaces_whole(self) -> None:
        """One namespace's clear leaves its neighbours alone, prefixes of one another among them."""
        async with self._pair() as (one, _):
            names = [b"mcp_hub:conf:e:k", b"mcp_hub:conf2:e:k", b"mcp_hub:con:e:k"]
            await one.write_many([write_of(one, name) for name in names])
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
                assert list(await two.write_many([write_of(two, key, b"ok", fence=begun.fence)])) == ["done"]
                assert payload_of((await one.get_many([key]))[0], key) == b"ok"
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
                await store.write_many([write_of(store, key)])
                await store.get_many([key])
            if not await self.wait_coherent(one, key):  # it has the methods, and what stands behind it can't tell
                return
            for change in (
                lambda: two.write_many([write_of(two, key)]),
                lambda: two.delete_many([key]),
                lambda: one.write_many([write_of(one, key)]),
                lambda: two.clear(self.prefix),
            ):
                assert await self.wait_coherent(one, key)
                before = one.stamp(key)
                assert before is not None
                waiter = asyncio.ensure_future(one.changed(key, before))
                await change()
                await asyncio.wait_for(waiter, 5)
                assert one.stamp(key) != before

    async def test_used(self) -> None:
        """Told of uses, a store answers as before and has no other stamps."""
        async with self._pair() as (one, two):
            if not isinstance(one, Used):
                return
            keys = [self.key(f"used{n}") for n in range(300)]
            writes = [write_of(two, key) for key in keys]
            await two.write_many(writes)
            told = [self.key("none"), *keys, keys[0]]
            await one.used_many([])
            await one.used_many(told)
            assert list(await two.get_many(told)) == [None, *(write.frame for write in [*writes, writes[0]])]
            if not isinstance(one, Coherent) or not await self.wait_coherent(one, keys[0]):
                return

            async def catch_up(name: str) -> None:
                """Wait until *one* has heard of all that happened so far."""
                key = self.key(name)
                stamp = one.stamp(key)
                await two.write_many([write_of(two, key)])
                if stamp is not None:
                    await asyncio.wait_for(one.changed(key, stamp), 5)

            await catch_up("before")
            before = [one.stamp(key) for key in keys[:3]]
            await one.used_many(told)
            await catch_up("after")
            after = [one.stamp(key) for key in keys[:3]]
            assert before == after or None in after  # None: it can't tell now

    async def test_info(self) -> None:
        """Facts are plain."""
        async with self._pair() as (one, _):
            facts = await one.info()
            assert all(isinstance(value, str | int | float) for value in facts.values())

    async def test_reopens(self) -> None:
        """After ``aclose`` a store serves again."""
        async with self._pair() as (one, two):
            write = write_of(one, self.key("re"))
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
                write = write_of(store, key, str(n).encode())
                assert list(await store.write_many([write])) == ["done"]
                assert list(await store.get_many([key])) == [write.frame]

            await asyncio.gather(*(one_caller(n) for n in range(300)))

    async def test_cancelled_callers_hurt_nobody(self) -> None:
        """Callers that leave in the middle leave the store whole, and nobody gets another's bytes."""
        async with self._pair() as (one, _):
            writes = {self.key(f"c{n}"): write_of(one, self.key(f"c{n}"), str(n).encode()) for n in range(50)}
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
