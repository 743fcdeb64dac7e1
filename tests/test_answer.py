"""Futures that tell at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mcp_hub_cache._answer import Answer, when_done

ENDS: list[Callable[[asyncio.Future[Any]], Any]] = [
    lambda future: future.set_result(1),
    lambda future: future.set_exception(ValueError("on command")),
    lambda future: future.cancel(),
]


@pytest.fixture
async def answer() -> Answer[int]:
    return Answer(loop=asyncio.get_running_loop())


@pytest.mark.parametrize("end", ENDS)
async def test_the_listener_is_told_in_the_step_that_ends_it_and_once(
    answer: Answer[int], end: Callable[[Answer[int]], Any]
) -> None:
    told: list[object] = []
    answer.listen(told.append)
    end(answer)
    assert told == [answer]
    assert not answer.cancel()
    assert told == [answer]
    await asyncio.wait([answer])
    assert answer.cancelled() or answer.exception() or answer.result()


@pytest.mark.parametrize("end", ENDS)
async def test_who_listens_afterwards_is_told_now(answer: Answer[int], end: Callable[[Answer[int]], Any]) -> None:
    told: list[object] = []
    end(answer)
    when_done(answer, told.append)
    assert told == [answer]
    assert answer.cancelled() or answer.exception() or answer.result()


async def test_it_is_awaited_like_any_future(answer: Answer[int]) -> None:
    order: list[str] = []
    answer.listen(lambda _: order.append("listener"))

    async def wait() -> None:
        assert await answer == 1
        order.append("waiter")

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    answer.set_result(1)
    order.append("setter")
    await waiting
    assert order == ["listener", "setter", "waiter"]


async def test_a_plain_future_tells_when_it_can() -> None:
    told: list[object] = []
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    when_done(future, told.append)
    future.set_result(1)
    await asyncio.sleep(0)
    when_done(future, told.append)
    assert told == [future, future]
