"""One future's answer as another's, without a task while all is well."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from types import CoroutineType
from typing import Any, TypeVar

from .._answer import Answer, when_done

T = TypeVar("T")


def relay(
    asked: Awaitable[T], take: Callable[[asyncio.Future[T]], T | Coroutine[Any, Any, T]]
) -> Answer[T]:  # fmt: skip
    """Return a future of what *take* makes of *asked*.

    Args:
        asked: What was asked.
        take: Called with the future of *asked* when it is done, whether or not anybody still waits. What it returns or
            raises is the answer; a coroutine is awaited for it, in a task.

    Cancellation:
        Cancelling the result leaves *asked* alone, and ends what *take* began.
    """
    future = asked if isinstance(asked, asyncio.Future) else asyncio.ensure_future(asked)
    answer: Answer[T] = Answer(loop=future.get_loop())
    when_done(future, partial(_take, take, answer))
    return answer


def _take(
    take: Callable[[asyncio.Future[T]], T | Coroutine[Any, Any, T]], answer: Answer[T], asked: asyncio.Future[T]
) -> None:
    try:
        taken = take(asked)
    except asyncio.CancelledError:
        answer.cancel()
    except Exception as error:  # noqa: BLE001  # it is the answer
        if not answer.done():
            answer.set_exception(error)
    else:
        if not isinstance(taken, CoroutineType):  # ``asyncio.iscoroutine`` takes long
            if not answer.done():
                answer.set_result(taken)  # type: ignore[arg-type]  # of all coroutines, *take* makes this type alone
        elif answer.done():
            taken.close()
        else:
            task = answer.get_loop().create_task(taken)
            task.add_done_callback(partial(_pass_on, answer))
            answer.add_done_callback(lambda _: task.cancel())


def _pass_on(answer: Answer[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        answer.cancel()
    elif (error := task.exception()) is not None:
        if not answer.done():
            answer.set_exception(error)
    elif not answer.done():
        answer.set_result(task.result())
