"""What takes milliseconds with a large value, in steps with turns for others in between.

Summing 5 MB takes one to two milliseconds, copying them two to five, most of which is the first touch of new memory:
small reads beside it would wait for that long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from io import BytesIO
from typing import Final

LARGE: Final = 512 * 1024
"""Bytes from which on it is worth it."""
STEP: Final = 128 * 1024
"""Bytes of a step: a tenth of a millisecond."""


async def last(steps: Iterable[int]) -> int | None:
    """Return the last of *steps*, taking one at a time; None of none."""
    result = None
    for result in steps:  # noqa: B007
        await asyncio.sleep(0)
    return result


async def copied(data: bytes | memoryview) -> bytes:
    """Return *data* as bytes of their own."""
    # A BytesIO that nobody looks into hands out the very bytes that it has written to: without a copy.
    copy, view = BytesIO(bytes(len(data))), memoryview(data)
    for start in range(0, len(view), STEP):
        copy.write(view[start : start + STEP])
        await asyncio.sleep(0)
    return copy.getvalue()
