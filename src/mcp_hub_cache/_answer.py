"""A future that tells who listens at once, where asyncio's own callbacks wait for the loop's next iteration.

Between a connection and a caller stand a wire, a failover and a lane. With a plain future for each, an answer spends
two more iterations of the loop on its way: a lone read takes 7 % longer, 100 concurrent ones 3 % more processor time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Answer(asyncio.Future[T]):
    """A future with at most one listener, which is told in the very step that ends it, before anybody who awaits it."""

    __slots__ = ("_listener",)

    def __init__(self, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._listener: Callable[[asyncio.Future[T]], object] | None = None

    def listen(self, listener: Callable[[asyncio.Future[T]], object]) -> None:
        """Have *listener* called with this future when it is done, now if it is. Must be quick, and must not raise."""
        if self.done():
            listener(self)
        else:
            assert self._listener is None
            self._listener = listener

    def _tell(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener(self)

    def set_result(self, result: T, /) -> None:
        """See ``asyncio.Future``; so for those that follow."""
        super().set_result(result)
        if (listener := self._listener) is not None:  # ``_tell`` spelled out, on the way of every read
            self._listener = None
            listener(self)

    def set_exception(self, exception: type | BaseException, /) -> None:
        """See ``asyncio.Future``."""
        super().set_exception(exception)
        self._tell()

    def cancel(self, msg: Any | None = None) -> bool:
        """See ``asyncio.Future``."""
        cancelled = super().cancel(msg)
        if cancelled:
            self._tell()
        return cancelled


def when_done(future: asyncio.Future[T], listener: Callable[[asyncio.Future[T]], object]) -> None:
    """Have *listener* called with *future* when it is done: as soon as this kind of future can tell."""
    if isinstance(future, Answer):
        future.listen(listener)
    elif future.done():
        listener(future)
    else:
        future.add_done_callback(listener)


def pass_on(future: asyncio.Future[T], done: asyncio.Future[T]) -> None:
    """Let *future* end as *done* has, unless it has ended itself."""
    if future.done():
        return
    error = done.exception()
    if error is None:
        future.set_result(done.result())
    else:
        future.set_exception(error)
