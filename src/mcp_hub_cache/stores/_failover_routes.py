"""Who is asked: the primary, or the standby in its place, by the lane of what is asked about.

Rule: what concerns several lanes is split where they may differ in who serves them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import TypeVar

from .._exceptions import StoreError
from .._protocols import Store
from ._failover_health import Health
from ._failover_keeper import Keeper
from ._failover_primary import Primary
from ._failover_standby import Standby

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741  # an item
A = TypeVar("A")


class Routes:
    """The ways to a primary and to what stands in for it.

    Args:
        primary: The way to the one.
        health: Which parts of it are away, and what may stand in.
        keeper: Sees to it that they are looked after.
    """

    def __init__(self, primary: Primary, health: Health, keeper: Keeper) -> None:
        self._primary = primary
        self._store: Store = primary.store
        self._health = health
        self._keeper = keeper

    def serving(self) -> Store:
        """The store whose clock counts now."""
        if self._health.all_away and (standby := self._health.stand_in(next(iter(self._health.away)))) is not None:
            return standby.store
        return self._store

    def side(self, lane: Hashable) -> Store:
        """The store whose fences count now, for the keys of *lane*."""
        if lane in self._health.away and (standby := self._health.stand_in(lane)) is not None:
            return standby.store
        return self._store

    def away(self, lane: Hashable) -> Standby:
        """The standby, where the breaker of *lane* is open.

        Raises:
            StoreError: Nothing may stand in.
        """
        self._keeper.watch()
        standby = self._health.stand_in(lane)
        if standby is None:
            raise self._health.problem(lane)
        return standby

    def instead(self, error: StoreError, lane: Hashable) -> Standby:
        """The standby, for a call that failed just now.

        Raises:
            StoreError: *error* itself, where it is no outage or nothing may stand in.
        """
        standby = self._health.stand_in(lane) if error.outage else None
        if standby is None:
            raise error
        return standby

    async def either(
        self, ask: Callable[[Primary], Awaitable[T]], instead: Callable[[Standby], Awaitable[T]], lane: Hashable = None
    ) -> T:
        """What *ask* gets from the primary, or *instead* from the standby, where the part for *lane* is away.

        Raises:
            StoreError: Neither could be had.
        """
        if not self._keeper.is_ready:
            await self._keeper.get_ready()
        if lane not in self._health.away:
            try:
                return await ask(self._primary)
            except StoreError as error:
                standby = self.instead(error, lane)
        else:
            standby = self.away(lane)
        return await instead(standby)

    async def each(
        self,
        items: Sequence[I],
        key_of: Callable[[I], bytes],
        one: Callable[[Sequence[I], Hashable], Awaitable[list[A]]],
    ) -> list[A]:
        """Do *one* for the items of each lane by themselves, and return the answers in the order of *items*."""
        lanes: dict[Hashable, list[int]] = {}
        for at, item in enumerate(items):
            lanes.setdefault(self._store.lane(key_of(item)), []).append(at)
        if len(lanes) <= 1:
            return await one(items, next(iter(lanes), None))
        works = [one([items[at] for at in places], lane) for lane, places in lanes.items()]
        answers: dict[int, A] = {}
        for places, part in zip(lanes.values(), await asyncio.gather(*works, return_exceptions=True), strict=True):
            if isinstance(part, BaseException):
                raise part
            answers.update(zip(places, part, strict=True))
        return [answers[at] for at in range(len(items))]
