"""Lines to a store: every request goes to its key's lane (``_lane``), where it is batched with others.

Rule: a key whose lane changes stays in the old one until its last write there is over, so that the order of what is
asked of it is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from ._batches import Call
from ._lane import Lane


class _Lanes(dict[Hashable, Lane]):
    def __init__(self, make: Callable[[], Lane]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: Hashable) -> Lane:
        lane = self[name] = self._make()
        return lane


class Lines:
    """Lanes, made as keys need them."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, lane_of: Callable[[bytes], Hashable], *, deadline: float
    ) -> None:  # fmt: skip
        self._lane_of = lane_of
        self._deadline = deadline
        self._home: dict[bytes, Lane] = {}
        self._lanes = _Lanes(lambda: Lane(loop, deadline=deadline, home=self._home))

    def lane(self, key: bytes) -> Lane:
        """Return the lane that *key* belongs to now."""
        return self._home.get(key) or self._lanes[self._lane_of(key)]

    def read(self, call: Call, key: bytes, item: Any) -> asyncio.Future[Any]:
        """See ``Lane.read``."""
        return (self._home.get(key) or self._lanes[self._lane_of(key)]).read(call, key, item)

    def write(self, call: Call, key: bytes, item: Any, size: int = 0) -> asyncio.Future[Any]:
        """See ``Lane.write``."""
        return (self._home.get(key) or self._lanes[self._lane_of(key)]).write(call, key, item, size)

    def read_groups(self, call: Call, keys: Sequence[bytes]) -> list[tuple[Sequence[bytes], asyncio.Future[Any]]]:
        """Split *keys* by lane and ask for each part; the parts with the futures of their lists of answers."""
        names = {*map(self._lane_of, keys)}
        if len(names) == 1 and self._home.keys().isdisjoint(keys):  # as most often, and told at a fraction of the cost
            return [(keys, self._lanes[names.pop()].read_group(call, keys))]
        parts: dict[Lane, list[bytes]] = {}
        for key in keys:
            parts.setdefault(self._home.get(key) or self._lanes[self._lane_of(key)], []).append(key)
        return [(part, lane.read_group(call, part)) for lane, part in parts.items()]

    async def settle(self) -> None:
        """Return when all writes asked for are over, or the deadline has passed."""
        if self._lanes:
            await asyncio.wait([lane.settled() for lane in self._lanes.values()], timeout=self._deadline)

    async def aclose(self) -> None:
        """Let writes end within the deadline, then close all lanes."""
        await self.settle()
        for lane in list(self._lanes.values()):
            await lane.aclose()
