"""One future's answer as another's, without a task while all is well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from .._answer import Answer, when_done

T = TypeVar("T")


def relay(
    asked: asyncio.Future[T], well: Callable[[], bool], otherwise: Callable[[asyncio.Future[T]], Coroutine[Any, Any, T]]
) -> asyncio.Future[T]:
    """Return a future of the answer to what was *asked*.

    Args:
        asked: What was asked.
        well: Called with an answer that is no error; False: it needs looking at.
        otherwise: Awaited, in a task, for the answer where *asked* failed or needs looking at; is given *asked*, done.

    Cancellation:
        Cancelling the result leaves *asked* alone, and ends what *otherwise* began.
    """
    loop = asyncio.get_running_loop()
    answer: Answer[T] = Answer(loop=loop)

    def take(done: asyncio.Future[T]) -> None:
        if done.cancelled():
            answer.cancel()
        elif done.exception() is None and well():
            if not answer.done():
                answer.set_result(done.result())
        elif not answer.done():
            task = loop.create_task(otherwise(done))
            task.add_done_callback(pass_on)
            answer.add_done_callback(lambda _: task.cancel())

    def pass_on(task: asyncio.Task[T]) -> None:
        if task.cancelled():
            answer.cancel()
        elif (error := task.exception()) is not None:
            if not answer.done():
                answer.set_exception(error)
        elif not answer.done():
            answer.set_result(task.result())

    when_done(asked, take)
    return answer
