"""Placeholders: what a load plants before it calls its loader, keeps while it runs, gives back if it stores nothing.

Strategy: one frame is at once the re-check, the fence and the lease (Facebook's memcache leases, NSDI 2013; here with
a random token in place of a counter). One task renews all that this process holds; nothing is renewed while nothing
is held.

Rules:
- What is held is known by the identity of its ``Held``: a load that has lost its place to a later one of the same key
  gives nothing back.
- A process that dies loses its placeholders after ``HOLD`` seconds, and with them the right to write.
- Giving back never waits: a cancelled load does it too, and one that was cancelled before it knew what it had planted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from ._direct import Direct
from ._exceptions import StoreError
from ._frame import Kind, frame_of_kind
from ._lines import Lines
from ._protocols import Begun, Fence, Held, Leases, Outcome, Store, Write

HOLD: Final = 10.0
"""Seconds that a placeholder outlives its holder."""


class Over(NamedTuple):
    """What is left in place of a placeholder: "there is no value", for so many seconds, under that token.

    ``rests``: and nobody need try again so long. Stored as the frame's freshness.
    """

    seconds: float
    token: bytes
    rests: bool


class Placeholders:
    """Those of one event loop.

    Args:
        store: Where they are planted.
        lines: The way there.
        trouble: Told of the store's errors.
    """

    def __init__(self, store: Store, lines: Lines | Direct, trouble: Callable[[StoreError], None]) -> None:
        self._store = store
        self._lines = lines
        self._trouble = trouble
        self._held: dict[bytes, Held] = {}
        self._asked: dict[bytes, asyncio.Future[Begun]] = {}  # by key, the last beginning that is under way
        self._orphans: dict[bytes, Fence] = {}  # planted for who has left, and found by who has asked since
        self._renewer: asyncio.Task[None] | None = None
        self._leases = store if isinstance(store, Leases) else None
        # Bound once: a line tells kinds of requests apart by the identity of their call.
        self._begin = partial(store.begin_many, hold=HOLD)
        self._write = store.write_many
        self._begin_at_once = lines.begin if isinstance(lines, Direct) else None
        self._release = self._release_many
        if self._leases is not None:
            self._renew = partial(self._leases.renew_many, hold=HOLD)

    async def begin(self, key: bytes) -> Begun | None:
        """See ``Store.begin_many``; None if the store could not be told.

        Cancellation: what is planted all the same is given back when the store has told of it.
        """
        if self._begin_at_once is not None:
            return self._begin_at_once(key, HOLD)
        asked: asyncio.Future[Begun] = self._lines.write(self._begin, key, key)
        self._asked[key] = asked
        try:
            return await asyncio.shield(asked)
        except StoreError as error:
            self._orphans.pop(key, None)
            self._trouble(error)
            return None
        except asyncio.CancelledError:
            if asked.done():  # now, before who has asked since is told
                self._give_back(key, asked)
            else:
                asked.add_done_callback(partial(self._give_back, key))
            raise
        finally:
            if asked.done() and self._asked.get(key) is asked:
                del self._asked[key]

    def _give_back(self, key: bytes, asked: asyncio.Future[Begun]) -> None:
        """Nobody has taken what was begun: it would stand in everybody's way for ``HOLD`` seconds."""
        is_last = self._asked.get(key) is asked
        if is_last:
            del self._asked[key]
        if asked.cancelled() or asked.exception() is not None or self._leases is None:
            return
        begun = asked.result()
        if not begun.leader and self._orphans.get(key) != begun.fence:
            return
        if is_last:
            self._orphans.pop(key, None)
            self._lines.write(self._release, key, Held(key, begun.fence)).add_done_callback(heed)
        else:  # who has asked since finds it there, and it is his
            self._orphans[key] = begun.fence

    async def begin_over(self, key: bytes, begun: Begun) -> Begun | None:
        """Begin again, in place of what was found and is of no use any more."""
        if self._leases is not None:
            try:
                await self._lines.write(self._release, key, Held(key, begun.fence))
            except StoreError as error:
                self._trouble(error)
                return None
        return await self.begin(key)

    def hold(self, key: bytes, begun: Begun) -> Held | None:
        """Keep what *begun* planted alive; None if it is another process's.

        A placeholder of this process's own, of a load that was detached, is taken over from it.
        """
        before = self._held.get(key)
        is_orphan = self._orphans.pop(key, None) == begun.fence
        if not (begun.leader or is_orphan) and (before is None or before.fence != begun.fence):
            return None
        return self._hold(key, begun)

    def _hold(self, key: bytes, begun: Begun) -> Held:
        held = self._held[key] = Held(key, begun.fence)
        if self._leases is not None and (self._renewer is None or self._renewer.done()):
            self._renewer = asyncio.create_task(self._renew_all(), name="mcp-hub-cache placeholders")
        return held

    def share(self, key: bytes, begun: Begun) -> Held:
        """Keep what was found alive, which several loads have for their fence: ``Kind.OVER`` under an entry's key."""
        held = self._hold(key, begun)
        if self._leases is not None:  # at once: it may not live for as long as the renewer takes to come round
            self._lines.write(self._renew, key, held).add_done_callback(heed)
        return held

    def end(self, held: Held, *, stored: bool, over: Over | None = None) -> None:
        """Stop keeping *held* alive; where nothing was stored in its place, remove it, or leave *over* there."""
        key = held.key
        if self._held.get(key) is not held:
            return
        del self._held[key]
        if over is not None and not stored:
            frame = frame_of_kind(Kind.OVER, key, over.token, self._store.now(), over.seconds, fresh=over.rests)
            written = self._lines.write(self._write, key, Write(key, frame, over.seconds, held.fence))
            written.add_done_callback(partial(self._left, held))
        elif not stored and self._leases is not None:
            self._lines.write(self._release, key, held).add_done_callback(heed)

    def _left(self, held: Held, written: asyncio.Future[Outcome]) -> None:
        """Remove at least what was to be replaced: a server that is full or so takes nothing, but gives it back."""
        outcome = None if written.cancelled() else written.exception() or written.result()
        if outcome != "done" and self._leases is not None:
            self._lines.write(self._release, held.key, held).add_done_callback(heed)

    async def _release_many(self, held: Sequence[Held]) -> list[None]:
        assert self._leases is not None
        await self._leases.release_many(held)
        return [None] * len(held)

    async def _renew_all(self) -> None:
        while True:
            await asyncio.sleep(HOLD / 3)
            if not self._held:
                return
            futures = [self._lines.write(self._renew, key, held) for key, held in self._held.items()]
            await asyncio.gather(*futures, return_exceptions=True)

    async def aclose(self) -> None:
        """End the renewing."""
        if self._renewer is not None:
            self._renewer.cancel()
            await asyncio.gather(self._renewer, return_exceptions=True)


def heed(future: asyncio.Future[Any]) -> None:
    """Take note of a result that nobody waits for."""
    if not future.cancelled():
        future.exception()
