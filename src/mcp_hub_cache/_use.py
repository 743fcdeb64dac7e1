"""Telling the store what the near cache serves, so that what is used most does not look unused there.

Strategy: a hit in L1 asks the store nothing, and to a store that drops the least recently used, its entry would look
like one that nobody wants. So once a minute the store is told the keys that were served since, and the tags' marks
that they hang on.

Rules:
- Nothing is told while L1 is empty, and nothing waits for the telling. What goes wrong with it is no trouble: an entry
  that is dropped too early is loaded again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from ._exceptions import StoreError
from ._l1 import L1
from ._marks import Marks
from ._near import Near
from ._protocols import Used

INTERVAL: Final = 60.0
"""Seconds between tellings."""
_CHUNK: Final = 128


class Use:
    """What one event loop's near cache has served.

    Args:
        loop: The running loop.
        store: Who is told.
        l1: The near cache.
        marks: The marks that are known.
        run: Starts a coroutine in a task that ends with the session.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        store: Used,
        l1: L1[Near],
        marks: Marks,
        run: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._loop = loop
        self._store = store
        self._l1 = l1
        self._marks = marks
        self._run = run
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """L1 has something to serve now."""
        if self._timer is None:
            self._timer = self._loop.call_later(INTERVAL, self._tell)

    def _tell(self) -> None:
        self._timer = None
        if not len(self._l1):
            return
        keys = self._l1.served()
        if keys:
            self._run(self._tell_of([*keys, *self._marks.used()]))
        self.begin()

    async def _tell_of(self, keys: list[bytes]) -> None:
        try:
            for start in range(0, len(keys), _CHUNK):
                await self._store.used_many(keys[start : start + _CHUNK])
        except StoreError:
            return

    def end(self) -> None:
        """Tell nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
