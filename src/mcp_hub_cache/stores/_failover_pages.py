"""The journal, written down in the standby: so that what a primary has still to be told survives this process.

Strategy: notes that have gathered go into a page of their own, under a key that nobody else writes to: pages are
written once and never changed. A page is removed when none of its notes has still to be seen to, and many are made
one. Who starts finds the pages that were left by processes that ended, and makes their notes its own before the primary
is believed; so does who has found the primary again, since a neighbour that shares the standby may have noted more.

Rules:
- Pages stand outside of the prefix of all other keys: what drops the standby's leftovers leaves them alone.
- Of one primary: caches that share a standby, but not the server, must not take each other's notes for theirs.
- Removing a page that another process also has is right: all that it says has been done by then.
- A page that can't be read may have said anything, so it counts as "clear everything".
- Nobody waits for long for a standby that hangs.
- A standby that takes no pages costs the promise and nothing else: what is noted still holds in this process. So does
  one whose pages can't be read: the primary is believed meanwhile, and they are asked for again and again.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Iterable
from contextlib import aclosing
from struct import Struct
from typing import Final, TypeVar

from .._blake import blake2b
from .._exceptions import StoreError, StoreTimeoutError
from .._frame import FrameError, Kind, pack, unpack
from .._protocols import Store, Write
from .._tokens import new_token
from ._failover_journal import Journal, Note

T = TypeVar("T")

_log = logging.getLogger("mcp_hub_cache")

_MANY: Final = 64  # pages, from which on they are made one
_PATIENCE: Final = 1.0  # seconds
_FRONT: Final = Struct("<?H")  # is it a prefix, and how long is it


class Pages:
    """The pages of one primary's journal.

    Args:
        store: The standby.
        journal: What is written down.
        prefix: What all other keys begin with.
        name: The primary, told apart from others that processes on this standby may have.
    """

    def __init__(self, store: Store, journal: Journal, *, prefix: bytes, name: str) -> None:
        self._store = store
        self._journal = journal
        self._prefix = prefix
        self._root = b"~%bjournal:%b:" % (prefix, blake2b(name.encode(), digest_size=8).hexdigest().encode())
        self._saved = 0  # the serial number up to which notes are written down, or could not be
        self._saving: asyncio.Future[None] | None = None
        self._pages: dict[bytes, list[Note]] = {}
        self.works = True
        self.is_unread = False  # what others have left could not be read when it was asked for last

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def is_behind(self) -> bool:
        """Whether there are notes that have still to be written down."""
        return self._saved < self._journal.last

    def begin(self) -> None:
        """Begin to write down what has been noted, if nobody is at it."""
        saving = self._saving
        if saving is None or saving.done() or saving.get_loop() is not asyncio.get_running_loop():
            self._saving = asyncio.ensure_future(self._write_all())

    async def save(self) -> None:
        """Return when all that has been noted so far is written down, or could not be.

        Cancellation:
            The writing goes on.
        """
        wanted = self._journal.last
        while self._saved < wanted:
            self.begin()
            assert self._saving is not None
            await asyncio.shield(self._saving)

    async def _write_all(self) -> None:
        while self.is_behind:
            upto = self._journal.last
            try:
                await self._write()
            except Exception as error:  # noqa: BLE001  # see the last rule
                self._broken(error)
            self._saved = max(self._saved, upto)

    async def _write(self) -> None:
        old = list(self._pages) if len(self._pages) >= _MANY else []
        if notes := self._journal.after(0 if old else self._saved):
            key = self._root + new_token().hex().encode()
            write = Write(key, _page(key, notes, self._store.now()), None, None)
            (outcome,) = await self._in_time(self._store.write_many([write]))
            if isinstance(outcome, StoreError):
                raise outcome
            self.works = True
            self._pages[key] = notes
            await self._remove(old)  # all that they say that still stands is in the new one

    def _broken(self, error: Exception) -> None:
        if self.works:
            _log.warning(
                "the journal can't be kept in the standby, and is lost if this process ends during an outage: %s", error
            )
        self.works = False

    async def load(self) -> int:
        """Note what other processes have written down; returns how many pages of theirs there were."""
        self.is_unread = True
        try:
            keys, frames = await self._in_time(self._others())
        except StoreError as error:
            self._broken(error)
            return 0
        self.is_unread = False
        for key, frame in zip(keys, frames, strict=True):
            if frame is not None:  # else somebody has seen to it meanwhile
                self._take(key, frame)
        return len(keys)

    async def _others(self) -> tuple[list[bytes], list[bytes | None]]:
        keys: list[bytes] = []
        async with aclosing(self._store.scan(self._root)) as found:
            async for page in found:
                keys += [key for key, _ in page if key not in self._pages]
        return keys, await self._store.get_many(keys) if keys else []

    @staticmethod
    async def _in_time(work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(_PATIENCE):  # ``wait_for`` may lose a cancellation (3.11)
                return await work
        except TimeoutError:
            raise StoreTimeoutError(f"the standby did not answer within {_PATIENCE:g} s.") from None

    def _take(self, key: bytes, frame: bytes) -> None:
        before = self._journal.last
        try:
            names, prefixes = _notes_in(frame, key)
        except (FrameError, ValueError):
            names, prefixes = [], [self._prefix]
        is_saved = not self.is_behind
        self._journal.add(names)
        for prefix in prefixes:
            self._journal.add_prefix(prefix)
        notes = self._pages[key] = self._journal.after(before)
        # They are written down already, here; but not what an overflow has made of them.
        if is_saved and len(notes) == len(names):
            self._saved = self._journal.last

    async def prune(self) -> None:
        """Remove the pages that have nothing left to say."""
        await self.save()  # what one of its notes has become by now may be new
        if not self.works:  # and is written down nowhere else
            return
        done = [key for key, notes in self._pages.items() if not any(map(self._journal.stands, notes))]
        await self._remove(done)

    async def _remove(self, keys: list[bytes]) -> None:
        if not keys:
            return
        try:
            await self._in_time(self._store.delete_many(keys))
        except StoreError as error:
            self._broken(error)  # they stay, and will be read again: deleting once more only costs misses
        for key in keys:
            self._pages.pop(key, None)


def _page(key: bytes, notes: Iterable[Note], now: float) -> bytes:
    payload = b"".join([_FRONT.pack(note.is_prefix, len(note.name)) + note.name for note in notes])
    return pack(
        key, payload, kind=Kind.JOURNAL, token=new_token(), created=now, fresh_until=math.inf, keep_until=math.inf
    )


def _notes_in(frame: bytes, key: bytes) -> tuple[list[bytes], list[bytes]]:
    page = unpack(frame, key)
    payload = page.payload
    if page.head.kind != Kind.JOURNAL:
        raise ValueError("no page")
    names: tuple[list[bytes], list[bytes]] = [], []
    at, end = 0, len(payload)
    while at < end:
        if at + _FRONT.size > end:
            raise ValueError("cut off")
        is_prefix, size = _FRONT.unpack_from(payload, at)
        at += _FRONT.size
        if at + size > end:
            raise ValueError("cut off")
        names[is_prefix].append(bytes(payload[at : at + size]))
        at += size
    return names
