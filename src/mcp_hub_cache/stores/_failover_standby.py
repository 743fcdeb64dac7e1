"""The store that serves while the primary is away, and what of it may be believed.

Rules:
- What is in it from before this outage counts as absent. It may have been left by an earlier outage, by a process that
  was killed, or by a neighbour that shares the folder, and have been deleted in the primary since. An entry is told by
  its ``created``, on this store's clock, against the moment of the first failure. So nothing has to be cleared before
  it may serve.
- So does what stood under a key that could not be changed there, or nobody knows whether it was.
- An outage begins anew with each part of the primary that goes away, and with each that is back before the others.
- Nothing lives in it for longer than its ttl: what other processes delete is not known here.
- A frame may have been made by another clock, the primary's. One that looks older than the outage, or newer than now,
  is taken for made now.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from typing import Final

from .._exceptions import StoreError
from .._frame import HEAD_SIZE, FrameError, peek, retimed
from .._protocols import Begun, Held, Leases, Outcome, Patch, Retimed, Store, Used, Write

_PATIENCE: Final = 10.0  # seconds
_MOST_FAILED: Final = 10_000  # keys, remembered one by one


class Standby:
    """Another store, seen from the beginning of an outage.

    Args:
        store: Where the bytes go.
        ttl: Seconds that anything may stay in it; ``math.inf``: as long as its writer said.
        retiming: Returns what gives a frame other times; see ``Retiming``.
    """

    def __init__(self, store: Store, ttl: float, retiming: Callable[[], Retimed] = lambda: retimed) -> None:
        if not ttl > 0:
            raise ValueError(f"standby_ttl must be more than 0 seconds, not {ttl!r}")
        self.store = store
        self._ttl = ttl
        self._since = math.inf
        self._failed: dict[bytes, float] = {}  # keys that could not be changed, and when
        self._retiming = retiming

    def begin_outage(self) -> None:
        """Believe what is written from now on."""
        self._since = self.store.now()
        self._failed.clear()

    def _is_leftover(self, key: bytes, frame: bytes | None) -> bool:
        head = None if frame is None else peek(frame)
        return head is not None and head.created < self._failed.get(key, self._since)

    def _mine(self, keys: Sequence[bytes], frames: Sequence[bytes | None]) -> list[bytes | None]:
        return [None if self._is_leftover(key, frame) else frame for key, frame in zip(keys, frames, strict=True)]

    def distrust(self, keys: Iterable[bytes]) -> None:
        """Believe nothing that stands under *keys* now."""
        now = self.store.now()
        self._failed |= dict.fromkeys(keys, now)
        if len(self._failed) > _MOST_FAILED:
            self.begin_outage()

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See ``Store``; so for all that follow."""
        return self._mine(keys, await self.store.get_many(keys))

    async def head_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See ``Store``."""
        return self._mine(keys, await self.store.head_many(keys))

    async def delete_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See ``Store``."""
        try:
            return self._mine(keys, await self.store.delete_many(keys))
        except BaseException:
            self.distrust(keys)
            raise

    async def clear(self, prefix: bytes) -> int:
        """See ``Store``."""
        try:
            return await self.store.clear(prefix)
        except BaseException:
            self.begin_outage()
            raise

    async def begin_many(self, keys: Sequence[bytes], *, hold: float) -> list[Begun]:
        """See ``Store``. A leftover in the way is removed first."""
        hold = self._hold(hold)
        begun = list(await self.store.begin_many(keys, hold=hold))
        places = [at for at, one in enumerate(begun) if self._is_leftover(keys[at], one.frame)]
        if places:
            await self.store.delete_many([keys[at] for at in places])
            again = await self.store.begin_many([keys[at] for at in places], hold=hold)
            for at, one in zip(places, again, strict=True):
                begun[at] = one
        return begun

    async def write_many(self, writes: Sequence[Write]) -> list[Outcome]:
        """See ``Store``."""
        now = self.store.now()
        cut = [
            write._replace(frame=self._cut(write.key, write.frame, now, self._since), keep=self._keep(write.keep))
            for write in writes
        ]
        try:
            outcomes = await self.store.write_many(cut)
        except BaseException:
            self.distrust(write.key for write in writes if write.is_change)
            raise
        self.distrust(
            write.key
            for write, outcome in zip(writes, outcomes, strict=True)
            if write.is_change and isinstance(outcome, StoreError)
        )
        return outcomes

    async def patch_many(self, patches: Sequence[Patch]) -> list[Outcome]:
        """See ``Store``."""
        now = self.store.now()
        return await self.store.patch_many(
            # A leftover stays one.
            [
                patch._replace(head=self._cut(patch.key, patch.head, now, -math.inf), keep=self._keep(patch.keep))
                for patch in patches
            ]
        )

    def _hold(self, hold: float) -> float:
        return self._ttl if hold == math.inf else hold

    def _keep(self, keep: float | None) -> float | None:
        kept = min(math.inf if keep is None else keep, self._ttl)
        return None if kept == math.inf else kept

    def _cut(self, key: bytes, frame: bytes, now: float, since: float) -> bytes:
        """*frame*, or a head alone, with its times brought to what the standby allows."""
        head = peek(frame)
        if head is None:
            return frame
        until = now + self._ttl
        fresh, keep = min(head.fresh_until, until), min(head.keep_until, until)
        created = head.created if since <= head.created <= now else now
        if (created, fresh, keep) == (head.created, head.fresh_until, head.keep_until):
            return frame
        try:
            cut = self._retiming()(frame[:HEAD_SIZE], key, created=created, fresh_until=fresh, keep_until=keep)
        except FrameError:  # sealed by somebody else: nobody here can read it either
            return frame
        return cut + frame[HEAD_SIZE:]

    async def scan(self, prefix: bytes) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        """See ``Store``."""
        async with aclosing(self.store.scan(prefix)) as pages:
            async for page in pages:
                yield [item for item in page if not self._is_leftover(*item)]

    async def renew_many(self, held: Sequence[Held], *, hold: float) -> list[bool]:
        """See ``Leases``."""
        assert isinstance(self.store, Leases)
        return await self.store.renew_many(held, hold=self._hold(hold))

    async def release_many(self, held: Sequence[Held]) -> None:
        """See ``Leases``."""
        assert isinstance(self.store, Leases)
        await self.store.release_many(held)

    async def used_many(self, keys: Sequence[bytes]) -> None:
        """See ``Used``; nothing where the store is none."""
        if isinstance(self.store, Used):
            await self.store.used_many(keys)

    async def drop(self, prefix: bytes) -> None:
        """Give back the room. No promise hangs on it, so a failure is passed over, and one that hangs is given up."""
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self.store.clear(prefix)
