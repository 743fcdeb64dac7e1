"""State that belongs to one event loop at a time.

Futures, tasks and transports are bound to the loop that made them; caches and stores are not. Everything loop-bound
therefore stands in one state object, made at first use and replaced when the loop is another one:

- the loop is the same: the state goes on;
- the old loop has ended, or belongs to the parent of this forked process: the state is abandoned without touching it
  (its transports died with the loop, and a child must write nothing to what it inherited);
- the old loop still runs in this process: that is a mistake, and said so.

Closing is carried through, even where who asked for it is cancelled: a task goes on with it, and who closes again, or
the end of the loop, does so too. Closers therefore take up what another one has left half done.

The state is also closed when ``asyncio.run`` ends: an async generator that the loop holds does it, since loops finalise
those (PEP 525) after they have cancelled their tasks. Only the outermost owner asks for that; it closes its parts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar

from ._exceptions import WrongLoopError

T = TypeVar("T")

# What tells a forked child from its parent. Counted, because asking for the process id is a system call: 0.1 to 0.3 µs
# on the way of every hit.
_forks = 0


def _count_fork() -> None:
    global _forks  # noqa: PLW0603  # a fork happens to the whole process
    _forks += 1


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_count_fork)


class PerLoop(Generic[T]):
    """Holds a ``T`` for the running loop.

    Args:
        make: Called with the running loop when there is no state for it.
        owner: What to call the owner in an error.
        close: Awaited with the state by ``aclose``, and at the end of ``asyncio.run`` where *at_loop_end* says so; once
            more where it was cancelled.
        at_loop_end: False for what is part of something else that closes it: a loop closes all at once, in no order.
    """

    __slots__ = (
        "_abandoned",
        "_at_loop_end",
        "_close",
        "_forks",
        "_guard",
        "_loop",
        "_make",
        "_owner",
        "_state",
        "_unclosed",
    )

    def __init__(
        self,
        make: Callable[[asyncio.AbstractEventLoop], T],
        *,
        owner: str,
        close: Callable[[T], Awaitable[None]] | None = None,
        at_loop_end: bool = True,
    ) -> None:
        self._at_loop_end = at_loop_end and close is not None
        self._make = make
        self._owner = owner
        self._close = close
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = _forks
        self._state: T | None = None
        self._guard: AsyncGenerator[None, None] | None = None
        self._abandoned: list[T] = []
        self._unclosed: dict[asyncio.Task[None], T] = {}  # cut off while they were closed, by who goes on with it

    def get(self) -> T:
        """Return the running loop's state, made now if there is none.

        Raises:
            WrongLoopError: Another loop that still runs holds it.
            RuntimeError: No loop runs.
        """
        loop = asyncio.get_running_loop()
        if loop is self._loop and self._state is not None and self._forks == _forks:
            return self._state
        return self._renew(loop)

    def peek(self) -> T | None:
        """Return the state if it is the running loop's, else None."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return None
        return self._state if loop is self._loop and self._forks == _forks else None

    def _renew(self, loop: asyncio.AbstractEventLoop) -> T:
        old = self._loop
        forked = self._forks != _forks
        if self._state is not None and old is not None and old is not loop and old.is_running() and not forked:
            raise WrongLoopError(
                f"{self._owner} is in use by another event loop that is still running. Give each running loop a cache "
                "of its own, or use the default cache (one per loop)."
            )
        if forked and self._state is not None:
            # Kept for the life of the process: finalising an inherited transport would touch the parent's connection.
            self._abandoned.append(self._state)
        self._forks = _forks
        self._loop = loop
        self._state = state = self._make(loop)
        if self._at_loop_end:
            self._guard = self._watch(state)
            # One step by hand: it runs up to its yield, which is what registers it with the loop.
            try:
                self._guard.__anext__().send(None)
            except StopIteration:
                pass
        return state

    async def _watch(self, state: T) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            if self._state is state or state in self._unclosed.values():
                await self._end(state)

    async def _end(self, state: T) -> None:
        if self._state is state:
            self._state = self._loop = None
        try:
            await self._go_on(state)
        except asyncio.CancelledError:
            if state not in self._unclosed.values():
                # In the first place it is closed by its caller's task, which may be one of those that are to be ended.
                task = asyncio.get_running_loop().create_task(self._go_on(state), name="mcp_hub_cache closing")
                self._unclosed[task] = state
            raise

    async def _go_on(self, state: T) -> None:
        if self._close is not None:
            await self._close(state)
        self._unclosed = {task: other for task, other in self._unclosed.items() if other is not state}

    async def aclose(self) -> None:
        """Close the running loop's state, if there is one. Another loop's is left alone.

        Cancellation: it is closed all the same, in the background; who calls this again waits for that.
        """
        loop = asyncio.get_running_loop()
        for task, cut_off in list(self._unclosed.items()):
            if task.get_loop() is loop:
                await self._go_on(cut_off)
        state = self.peek()
        if state is None:
            return
        guard = self._guard
        await self._end(state)
        if self._guard is guard:
            self._guard = None
        # Only now, when it has nothing left to await: the loop may be closing it at the same time.
        if guard is not None:
            await guard.aclose()
