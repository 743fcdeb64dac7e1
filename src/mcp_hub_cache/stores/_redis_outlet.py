"""Writing to a connection so that large values don't hold up the loop.

``transport.write`` hands the system as much as it takes, and copies the rest: milliseconds for 5 MB, in which nobody
else gets a turn. Here large data goes out in slices, one in an iteration of the loop, and none while the system has
still to take what it was given. What is written behind it waits, so that the order is kept.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Final

BIG: Final = 64 * 1024
"""Bytes from which on a value is big: read over a wire of its own, and written without being copied."""
SLICE: Final = 256 * 1024


def in_parts(command: Sequence[bytes]) -> list[bytes]:
    """Make a command's bytes as ``pack`` does, with what is large left as it is: packing 5 MB takes 9 ms."""
    parts: list[bytes] = []
    front = b"*%d\r\n" % len(command)
    for part in command:
        front += b"$%d\r\n" % len(part)
        if len(part) > BIG:
            parts += (front, part)
            front = b"\r\n"
        else:
            front += part + b"\r\n"
    return [*parts, front]


class Outlet:
    """The way out of one connection. Its protocol passes on ``pause_writing`` and ``resume_writing``."""

    __slots__ = ("_is_due", "_is_paused", "_loop", "_rest", "_transport")

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.WriteTransport) -> None:
        self._loop = loop
        self._transport = transport
        self._rest: deque[bytes | memoryview] = deque()
        self._is_due = False
        self._is_paused = False

    def write(self, data: bytes | Sequence[bytes]) -> None:
        """Write *data*, or its parts one after another: parts save joining what is large."""
        if isinstance(data, bytes) and len(data) <= SLICE and not self._rest:
            self._transport.write(data)
            return
        for part in (data,) if isinstance(data, bytes) else data:
            view = memoryview(part)
            self._rest += [view[at : at + SLICE] for at in range(0, len(part), SLICE)]
        self._pour()

    def _pour(self) -> None:
        if self._is_due or self._is_paused or self._transport.is_closing():
            return
        size = 0
        while self._rest and (not size or size + len(self._rest[0]) <= SLICE):
            part = self._rest.popleft()
            size += len(part)
            self._transport.write(part)
        if self._rest:
            self._is_due = True
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        self._is_due = False
        self._pour()

    def pause(self) -> None:
        """The system has enough for now."""
        self._is_paused = True

    def resume(self) -> None:
        """It takes more."""
        self._is_paused = False
        self._pour()
