"""Leases of a fleet: who loads, who waits for whom, and how long nobody need try again.

Strategy: whoever begins a load plants a placeholder (``_placeholders``): under the entry's own key where there is no
entry, which is at once the fence; under a key beside it (kind letter r) where an entry stands, be it stale or of no
use, which keeps its token. Others find it there. A load that ends without a value leaves a frame that says so
(``Kind.OVER``) in place of its placeholder: that nobody need queue for what is not going to be stored; beside the
entry also, as long as that frame is fresh, that the next try rests (fail-safe's throttle). It then bears the token of
the entry that was to be refreshed, and says nothing of one that has taken its place.

Rules:
- A lease limits work and decides nothing: whether a result is stored is decided by the entry's token alone.
- Waiters are woken by the store's changes, and look by themselves once in a while: a wake-up that is lost costs that
  while, no more. Where the store tells of no changes, they look more often.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from ._direct import Direct
from ._frame import TOKEN, Head, peek
from ._lines import Lines
from ._protocols import Begun, Coherent, Store

_POLL: Final = 1.0  # seconds between looks where changes are told
_FIRST_LOOK: Final = 0.01  # where none are: the first pause, its growth, the longest
_LOOKS: Final = 1.5
_LONGEST_LOOK: Final = 0.25
OVER: Final = 5.0  # seconds that "there is no value" is said: several looks long, so that no lost wake-up misses it
_MOST_RESTING: Final = 10_000


def beside(root: bytes, key: bytes) -> bytes:
    """Return the key of the lease on refreshing *key*. *root*: what all keys of its namespace begin with."""
    return root + b"r:" + key[len(root) :]


def head_of(begun: Begun) -> Head | None:
    """The head of what was found; None: nothing, or nothing that can be read."""
    return None if begun.frame is None else peek(begun.frame)


class Rests:
    """The entries whose next refresh rests, as this process knows.

    Args:
        now: The store's time.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._resting: dict[bytes, tuple[bytes, float, float]] = {}  # token, since, until

    def note(self, key: bytes, token: bytes, seconds: float) -> None:
        """Let the entry under *key* that has *token* rest for *seconds* from now."""
        now = self._now()
        self._resting.pop(key, None)
        self._resting[key] = token, now, now + seconds
        if len(self._resting) > _MOST_RESTING:
            del self._resting[next(iter(self._resting))]

    def has(self, key: bytes, token: bytes) -> bool:
        """Whether the entry under *key* rests, which has *token*."""
        resting = self._resting.get(key)
        if resting is None:
            return False
        whose, since, until = resting
        if whose == token and since <= self._now() < until:  # a clock that was set back makes no rest longer
            return True
        del self._resting[key]
        return False


class Rivals:
    """Waiting for the loads of others.

    Args:
        store: Where their placeholders stand.
        lines: The way there.
    """

    def __init__(self, store: Store, lines: Lines | Direct) -> None:
        self._lines = lines
        self._get = store.get_many
        self._coherent = store if isinstance(store, Coherent) else None

    async def over(self, key: bytes, token: bytes, deadline: float) -> bool:
        """Return True when *token* no longer stands under *key*; False at *deadline*, on the monotonic clock.

        Raises:
            StoreError: The store can't be asked.
        """
        pause = _FIRST_LOOK
        while True:
            stamp = None if self._coherent is None else self._coherent.stamp(key)  # from before the look
            data: bytes | None = await self._lines.read(self._get, key, key)
            if data is None or data[TOKEN] != token:
                return True
            left = deadline - monotonic()
            if left <= 0:
                return False
            if stamp is None or self._coherent is None:
                await asyncio.sleep(min(pause, left))
                pause = min(pause * _LOOKS, _LONGEST_LOOK)
            else:
                changed: Any = self._coherent.changed(key, stamp)
                try:
                    async with asyncio.timeout(min(_POLL, left)):
                        await changed
                except TimeoutError:
                    pass
