"""How a primary is told what it has missed: the journal's deletes and clears, and checks of what it may have lost.

Strategy: deletes go out in batches, the oldest first, and are struck out when they are confirmed. What the primary has
confirmed lately is remembered here; when another server takes its place, deletes are made once more, and what was set
is looked at: what stands there may stay, unless it is older.

Rules:
- Batches are put together and sent under a lock. So none is ever on its way for a key that somebody else has settled
  and written since.
- A clear counts from its beginning: another server may take the primary's place half-way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Final

from .._protocols import Store
from ._failover_journal import Doubts, Journal, Recent, is_older

_BATCH: Final = 256  # keys in one call


class Replay:
    """The way from a journal to its primary.

    Args:
        primary: The store to tell.
        journal: What it has still to be told.
        recent: What it has confirmed lately.
    """

    def __init__(self, primary: Store, journal: Journal, recent: Recent) -> None:
        self.recent = recent
        self._primary = primary
        self._journal = journal

    def has_work(self, among: Callable[[bytes], bool], *, everything: bool) -> bool:
        """Whether there is something for ``run`` to do."""
        return bool(
            self._journal.oldest(1, among)
            or self._journal.unchecked(1, among)
            or (everything and self._journal.prefixes())
        )

    async def run(self, lock: asyncio.Lock, among: Callable[[bytes], bool], *, everything: bool) -> None:
        """Tell the primary what is noted of the keys of which *among* is true; and, if *everything*, of prefixes.

        What is noted meanwhile is for the next time.

        Raises:
            StoreError: It could not be told. What was not confirmed is in the journal still.
        """
        for prefix, serial in self._journal.prefixes().items() if everything else ():
            self.recent.cleared(prefix)
            await self._primary.clear(prefix)
            self.recent.cleared(prefix)
            self._journal.forget_prefix(prefix, serial)
        for _ in range(len(self._journal) // _BATCH + 1):
            async with lock:
                if batch := self._journal.oldest(_BATCH, among):
                    await self._delete(batch, batch)
                if heads := self._journal.unchecked(_BATCH, among):
                    await self._check(heads)

    async def settle(self, doubts: Doubts) -> None:
        """Tell it of these keys, at once. Called under the lock.

        Raises:
            StoreError: As for ``run``.
        """
        if doubts.covered:
            await self._delete(self._journal.serials(doubts.covered), doubts.covered)
        if doubts.heads:
            await self._check(doubts.heads)

    async def _delete(self, serials: Mapping[bytes, int], keys: Collection[bytes]) -> None:
        await self._primary.delete_many(list(keys))
        self._journal.forget(serials)
        self.recent.deleted(keys)

    async def _check(self, heads: Mapping[bytes, bytes]) -> None:
        self.recent.set(heads)  # before anything is awaited: what is deleted meanwhile is newer
        found = await self._primary.head_many(list(heads))
        older = [key for (key, head), there in zip(heads.items(), found, strict=True) if is_older(there, head)]
        if older:
            await self._primary.delete_many(older)
        self._journal.checked(heads)
        self.recent.deleted(older)
