"""Reading from a connection so that a large value doesn't hold up the loop.

hiredis gathers a reply in a buffer that grows, and copies it out whole: milliseconds for 5 MB, in which nobody else
gets a turn. Here a reply that is one large value (``*1``, ``$`` and its length) is received where it is to stay, a
slice in an iteration of the loop; no byte of it is copied. Everything else is the parser's.
"""

from __future__ import annotations

import re
from io import BytesIO
from typing import Final

from ._redis_outlet import BIG

_LARGEST: Final = 512 * 1024 * 1024  # bytes, as with servers: memory for it is asked for at once
_HEADER: Final = re.compile(rb"\*1\r\n\$([1-9][0-9]{4,8})\r\n")
_HEADER_SIZE: Final = 4 + 1 + 9 + 2
_END: Final = b"\r\n"
# More would take longer than a turn of the loop should: each page of new memory costs at its first touch.
_SLICE: Final = 64 * 1024


class Inlet:
    """One large value that is being received.

    Args:
        size: Its bytes, without the line's end behind it.
    """

    __slots__ = ("_at", "_bytes", "_size", "_view")

    def __init__(self, size: int) -> None:
        self._size = size
        self._at = 0
        # A BytesIO that nobody else looks into hands out the very bytes that it was made of, without a copy; and what
        # calloc has given is not touched before it is written to.
        self._bytes = BytesIO(bytes(size + len(_END)))
        self._view = self._bytes.getbuffer()

    @classmethod
    def of(cls, data: memoryview) -> Inlet | None:
        """Return the one whose value *data* begins with, filled with what there is of it; None: begins otherwise."""
        header = _HEADER.match(bytes(data[:_HEADER_SIZE]))
        if header is None or not max(BIG, len(data)) < (size := int(header[1])) <= _LARGEST:
            return None
        made = cls(size)
        begun = data[header.end() :]
        made._view[: len(begun)] = begun
        made._at = len(begun)
        return made

    def rest(self) -> memoryview:
        """Where to put the next bytes."""
        return self._view[self._at : self._at + _SLICE]

    def filled(self, count: int) -> None:
        """Take note of *count* bytes more."""
        self._at += count

    @property
    def is_full(self) -> bool:
        """Whether all of it is here."""
        return self._at == len(self._view)

    def value(self) -> bytes:
        """Return it, when it is full and nobody has hold of the ``rest`` any more.

        Raises:
            ValueError: It ends otherwise than it should.
        """
        if bytes(self._view[self._size :]) != _END:
            raise ValueError("no end of line behind a value")
        self._view.release()
        self._bytes.truncate(self._size)
        return self._bytes.getvalue()
