"""A Redis server's time, without asking it each time."""

from __future__ import annotations

import time

from .._steady import steady


class Clock:
    """The server's time, as its TIME command told it, carried on by a steady clock."""

    __slots__ = ("_offset",)

    def __init__(self) -> None:
        self._offset: float | None = None

    def now(self) -> float:
        """Seconds since the epoch; this machine's until a server has told its own."""
        return time.time() if self._offset is None else steady() + self._offset

    def learn(self, told: float, asked: float, heard: float) -> None:
        """Take *told*, the server's time somewhere between *asked* and *heard* (``steady``)."""
        offset, doubt = told - (asked + heard) / 2, (heard - asked) / 2
        # A slow answer that does not contradict what is known says nothing new.
        if self._offset is None or abs(offset - self._offset) > doubt:
            self._offset = offset
