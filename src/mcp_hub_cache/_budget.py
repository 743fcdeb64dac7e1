"""What one operation may spend on the store: its deadline, over all the trips that it takes.

Strategy: each trip has the deadline of its line (``_lane``). What takes several in a row makes them within a budget,
which runs while it waits for them and stands still while it does anything else, such as calling a loader.

Rules:
- What was asked for when the budget is used up goes on by itself; only nobody waits for it any more.
- A timer that ran late proves only that this process was busy, and grants a moment, as everywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from ._exceptions import StoreTimeoutError
from ._lane import LATE

T = TypeVar("T")


class Unbounded:
    """The budget over a store whose calls are over when they return: there is nothing to wait for."""

    is_spent: Final = False

    def within(self, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Return *work* as it is."""
        return work


UNBOUNDED: Final = Unbounded()


class Budget:
    """The budget of one operation.

    Args:
        loop: The running one.
        seconds: What may be spent altogether.
        spent: What was spent before.
    """

    __slots__ = ("_left", "_loop", "_seconds", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, spent: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._left = seconds - spent

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left of it."""
        return self._left <= 0

    async def within(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what *work* returns; it must not use this budget itself.

        Raises:
            StoreTimeoutError: The budget was used up; *work* was cancelled.
        """
        scope = asyncio.timeout(None)
        begun = self._loop.time()
        due = begun + max(self._left, 0.0)  # what it asks for at once, it asks for in any case
        self._timer = self._loop.call_at(due, self._watch, scope, due, True)
        try:
            async with scope:
                return await work
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            self._timer.cancel()
            self._left -= self._loop.time() - begun
        raise StoreTimeoutError(f"no answer from the store within {self._seconds:g} s.", cure="Is it overloaded?")

    def _watch(self, scope: asyncio.Timeout, due: float, grants: bool) -> None:
        now = self._loop.time()
        if grants and now - due > LATE:
            self._timer = self._loop.call_at(now + LATE, self._watch, scope, now + LATE, False)
        else:
            scope.reschedule(now)
