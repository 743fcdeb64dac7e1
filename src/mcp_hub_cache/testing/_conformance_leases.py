"""The promises about beginning a load: placeholders, the fences that they are, and how long they are kept."""

from __future__ import annotations

import asyncio
import math
import secrets

from .._frame import HEAD_SIZE, TOKEN, Kind, pack, placeholder, unpack, unpack_head
from .._protocols import Fence, Held, Leases, Patch, Write
from ._conformance_setting import Pair, payload_of, write_of


class LeaseConformance(Pair):
    """The part of ``StoreConformance`` about ``begin_many``, fenced writes and ``Leases``."""

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
            write = write_of(one, key, fence=first.fence)
            assert list(await one.write_many([write])) == ["done"]
            assert list(await two.get_many([key])) == [write.frame]
            late = write_of(two, key, b"late", fence=second.fence)
            assert list(await two.write_many([late])) == ["refused"]
            assert list(await one.get_many([key])) == [write.frame]

    async def test_begin_on_an_entry(self) -> None:
        """Beginning where an entry stands answers it with its token; a fenced write then replaces it."""
        async with self._pair() as (one, two):
            key = self.key("entry")
            write = write_of(one, key)
            await one.write_many([write])
            (begun,) = await two.begin_many([key], hold=5.0)
            assert begun.frame == write.frame
            assert not begun.leader
            assert begun.fence.token == write.frame[TOKEN]
            again = write_of(two, key, b"new", fence=begun.fence)
            assert list(await two.write_many([again])) == ["done"]
            assert list(await one.get_many([key])) == [again.frame]

    async def test_begin_of_many_in_order(self) -> None:
        """A batch of begins answers each key by itself; the same key twice has one leader."""
        async with self._pair() as (one, two):
            a, b = self.key("a"), self.key("b")
            await two.write_many([write_of(two, b)])
            first, second, third = await one.begin_many([a, b, a], hold=5.0)
            assert (first.leader, second.leader, third.leader) == (True, False, False)
            assert third.fence == first.fence

    async def test_delete_fences_a_load(self) -> None:
        """A delete between begin and write wins: the loaded value is refused."""
        async with self._pair() as (one, two):
            key = self.key("fenced")
            (begun,) = await one.begin_many([key], hold=5.0)
            await two.delete_many([key])
            assert list(await one.write_many([write_of(one, key, fence=begun.fence)])) == ["refused"]
            assert list(await two.get_many([key])) == [None]

    async def test_set_fences_a_load(self) -> None:
        """So does a set: it stays."""
        async with self._pair() as (one, two):
            key = self.key("fenced")
            (begun,) = await one.begin_many([key], hold=5.0)
            write = write_of(two, key, b"set")
            await two.write_many([write])
            assert list(await one.write_many([write_of(one, key, fence=begun.fence)])) == ["refused"]
            assert list(await one.get_many([key])) == [write.frame]

    async def test_clear_fences_a_load(self) -> None:
        """And a clear: placeholders go with it."""
        async with self._pair() as (one, two):
            key = self.key("fenced")
            (begun,) = await one.begin_many([key], hold=5.0)
            await two.clear(self.prefix)
            assert list(await one.write_many([write_of(one, key, fence=begun.fence)])) == ["refused"]
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
            assert list(await one.write_many([write_of(one, key, b"old", fence=old.fence)])) == ["refused"]
            assert list(await two.write_many([write_of(two, key, b"new", fence=new.fence)])) == ["done"]

    async def test_a_foreign_fence_is_refused(self) -> None:
        """A fence is good only in the store that issued it."""
        async with self._pair() as (one, two):
            key = self.key("foreign")
            (begun,) = await one.begin_many([key], hold=5.0)
            assert list(await two.write_many([write_of(two, key, fence=begun.fence)])) == ["refused"]
            patch = Patch(key, begun.fence, placeholder(key, begun.fence.token, two.now(), 9.0)[:HEAD_SIZE], 9.0)
            assert list(await two.patch_many([patch])) == ["refused"]

    async def test_a_placeholder_expires(self) -> None:
        """After its hold another may lead, and the first one's write is refused."""
        async with self._pair() as (one, two):
            key = self.key("hold")
            (first,) = await one.begin_many([key], hold=0.2)
            await self.wait_expiry(two, two.now() + 0.25)
            assert list(await one.write_many([write_of(one, key, fence=first.fence)])) == ["refused"]
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
            assert list(await one.write_many([write_of(one, a, fence=held[0].fence)])) == ["done"]
            await one.release_many(held)
            assert [frame is None for frame in await two.get_many([a, b, c])] == [False, True, True]

    async def test_renewing_never_shortens(self) -> None:
        """A placeholder that is renewed for less than it has left stays for that long."""
        async with self._pair() as (one, two):
            if not isinstance(one, Leases):
                return
            key = self.key("longer")
            (begun,) = await one.begin_many([key], hold=30.0)
            assert list(await one.renew_many([Held(key, begun.fence)], hold=0.2)) == [True]
            await self.wait_expiry(two, two.now() + 0.25)
            assert list(await one.write_many([write_of(one, key, fence=begun.fence)])) == ["done"]

    async def test_leases_and_marks_are_renewed_too(self) -> None:
        """Whoever knows the token of a lease or a mark keeps it, its payload, and what it says of freshness."""
        async with self._pair() as (one, two):
            if not isinstance(one, Leases):
                return
            for kind, fresh_until in ((Kind.OVER, 0.0), (Kind.OVER, one.now() + 60.0), (Kind.MARK, one.now() + 60.0)):
                key, token, until = self.key(f"{kind.name}{fresh_until}"), secrets.token_bytes(8), one.now() + 0.3
                frame = pack(
                    key, b"all", kind=kind, token=token, created=until, fresh_until=fresh_until, keep_until=until
                )  # fmt: skip
                await two.write_many([Write(key, frame, 0.3, None)])
                assert list(await one.renew_many([Held(key, Fence(one.id, token))], hold=30.0)) == [True]
                await self.wait_expiry(two, two.now() + 0.35)
                (kept,) = await two.get_many([key])
                assert payload_of(kept, key) == b"all"
                assert kept is not None
                assert unpack_head(kept).fresh_until == fresh_until

    async def test_renewing_for_ever(self) -> None:
        """What is renewed for ever has no end, whatever it is renewed for later, and is removed like anything else."""
        async with self._pair() as (one, two):
            if not isinstance(one, Leases):
                return
            a, b = self.key("a"), self.key("b")
            begun = await one.begin_many([a, b], hold=0.3)
            held = [Held(key, item.fence) for key, item in zip((a, b), begun, strict=True)]
            assert list(await one.renew_many(held, hold=math.inf)) == [True, True]
            assert list(await one.renew_many(held, hold=0.2)) == [True, True]
            await self.wait_expiry(two, two.now() + 0.35)
            await one.release_many(held[1:])
            assert [frame is None for frame in await two.get_many([a, b])] == [False, True]
            assert list(await one.write_many([write_of(one, a, fence=held[0].fence)])) == ["done"]

    async def test_beginning_for_ever(self) -> None:
        """A placeholder may have no end from the start; it fences as any other."""
        async with self._pair() as (one, two):
            a, b = self.key("a"), self.key("b")
            begun = await one.begin_many([a, b], hold=math.inf)
            assert [(item.frame, item.leader) for item in begun] == [(None, True)] * 2
            if isinstance(one, Leases):
                held = [Held(key, item.fence) for key, item in zip((a, b), begun, strict=True)]
                assert list(await one.renew_many(held, hold=0.2)) == [True, True]
            await self.wait_expiry(two, two.now() + 0.25)
            (second,) = await two.begin_many([a], hold=5.0)
            assert (second.leader, second.fence.token) == (False, begun[0].fence.token)
            await two.delete_many([b])
            writes = [write_of(one, key, fence=item.fence) for key, item in zip((a, b), begun, strict=True)]
            assert list(await one.write_many(writes)) == ["done", "refused"]

    async def test_only_who_holds_it_renews(self) -> None:
        """Another token, another store's fence and a key that is not there are refused, and nothing changes."""
        async with self._pair() as (one, two):
            if not (isinstance(one, Leases) and isinstance(two, Leases)):
                return
            key, gone = self.key("held"), self.key("gone")
            (begun,) = await one.begin_many([key], hold=0.4)
            wrong = Held(key, Fence(begun.fence.store, b"notthis!"))
            missing = Held(gone, begun.fence)
            for hold in (30.0, math.inf):
                assert list(await one.renew_many([wrong, missing], hold=hold)) == [False, False]
                assert list(await two.renew_many([Held(key, begun.fence)], hold=hold)) == [False]
            await one.release_many([wrong, missing])
            (frame,) = await one.get_many([key])
            assert frame is not None
            assert frame[TOKEN] == begun.fence.token
            await self.wait_expiry(two, two.now() + 0.45)
            assert list(await two.get_many([key, gone])) == [None, None]

    async def test_only_one_of_two_fenced_writes_lands(self) -> None:
        """Compare and write is atomic: of many writers with one fence exactly one is done."""
        async with self._pair() as (one, two):
            for turn in range(10):
                key = self.key(f"race{turn}")
                (mine,) = await one.begin_many([key], hold=5.0)
                (theirs,) = await two.begin_many([key], hold=5.0)
                jobs = [
                    store.write_many([write_of(store, key, str(n).encode(), fence=fence)])
                    for n, (store, fence) in enumerate([(one, mine.fence), (two, theirs.fence)] * 4)
                ]
                outcomes = [outcome for answer in await asyncio.gather(*jobs) for outcome in answer]
                assert sorted(map(str, outcomes)) == ["done"] + ["refused"] * 7
