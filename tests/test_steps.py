"""Large values in steps."""

from __future__ import annotations

import asyncio

import pytest

from mcp_hub_cache._frame import pack, sums
from mcp_hub_cache._steps import LARGE, copied, last


@pytest.mark.parametrize("size", [0, 1, LARGE, 3 * LARGE + 7])
async def test_a_copy_is_the_same_and_leaves_turns_to_others(size: int) -> None:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    turns = 0

    async def beside() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(beside())
    copy = await copied(memoryview(data))
    other.cancel()
    assert type(copy) is bytes
    assert copy == data
    assert turns >= size // LARGE


async def test_the_last_step_counts() -> None:
    frame = pack(b"k", bytes(5000), token=bytes(8), created=0.0, fresh_until=1.0, keep_until=1.0)
    *_, whole = sums(frame, len(frame))
    assert await last(sums(frame, 1000)) == whole
    assert await last(()) is None
