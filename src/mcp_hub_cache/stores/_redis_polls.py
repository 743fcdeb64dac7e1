"""Asking several servers the same thing, of which some may be away, and some behind the times."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from .._exceptions import StoreError, StoreMisconfiguredError

T = TypeVar("T")

_PATIENCE: Final = 0.25  # of the timeout: how long the first answer waits for others


class Poll(NamedTuple, Generic[T]):
    """The answers that came in time, in no order, and the errors."""

    answers: list[T]
    errors: list[StoreError]

    def trouble(self) -> StoreError | None:
        """The error that a person can do something about, or any."""
        told = [error for error in self.errors if isinstance(error, StoreMisconfiguredError)]
        return next(iter(told or self.errors), None)


async def poll(asked: Sequence[Coroutine[Any, Any, T | None]], timeout: float) -> Poll[T]:
    """Return what was answered when more than half have answered, or soon after the first.

    A None counts as having answered, and is left out.

    Args:
        asked: The questions, asked at once.
        timeout: Seconds that all of it may take.

    Cancellation:
        The questions are cancelled, too.
    """
    loop = asyncio.get_running_loop()
    tasks = {loop.create_task(one, name="mcp_hub_cache: ask a Redis server") for one in asked}
    pending, heard = set(tasks), 0
    answers: list[T] = []
    errors: list[StoreError] = []
    until = loop.time() + timeout
    try:
        while pending and 2 * heard <= len(tasks) and (left := until - loop.time()) > 0:
            done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is not None:
                    errors.append(StoreError.of(error))
                    continue
                heard += 1
                if (answer := task.result()) is not None:
                    answers.append(answer)
            if answers:
                until = min(until, loop.time() + _PATIENCE * timeout)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return Poll(answers, errors)
