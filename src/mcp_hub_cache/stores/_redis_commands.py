"""Pieces of commands, and what INFO says: bytes in, bytes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from .._frame import MAGIC, Kind
from .._protocols import Write
from ._redis_link import pack

_TOUCHED: Final = 128  # keys of one command
_ENTRY: Final = bytes([Kind.ENTRY])
_MAX_MS: Final = 10**15  # 31,000 years; the server refuses what would overflow its clock


def px(keep: float | None) -> bytes:
    """Milliseconds for PX, rounded up; empty: for ever."""
    if keep is None or keep == math.inf:
        return b""
    ms = math.ceil(keep * 1000)
    return b"%d" % (ms if 0 < ms < _MAX_MS else 1 if ms < 1 else _MAX_MS)


def set_all(writes: Sequence[Write]) -> bytes:
    """One SET for each of *writes*, fences not looked at.

    By hand, each frame copied once: half the time of packing them one by one.
    """
    parts: list[bytes] = []
    last: float | None = math.nan
    args, end = 3, b""
    for key, frame, keep, _, _ in writes:
        if keep != last:
            last, ms = keep, px(keep)
            args, end = (5, b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(ms), ms)) if ms else (3, b"\r\n")
        parts += (b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (args, len(key), key, len(frame)), frame, end)
    return b"".join(parts)


def get_range(key: bytes, last: bytes) -> bytes:
    """GETRANGE of *key*, from the first byte to the one numbered *last*."""
    return pack((b"GETRANGE", key, b"0", last))


def is_entry(start: bytes) -> bool:
    """Whether a frame's first six bytes say that it is an entry, of whichever version."""
    return start[:4] == MAGIC and start[5:] == _ENTRY


def touches(keys: Sequence[bytes]) -> list[bytes]:
    """TOUCH for *keys*, in commands that hold the server up for no longer than a read does."""
    return [pack((b"TOUCH", *keys[start : start + _TOUCHED])) for start in range(0, len(keys), _TOUCHED)]


def escape(prefix: bytes) -> bytes:
    """Make *prefix* stand for itself in a glob."""
    for special in (b"\\", b"*", b"?", b"[", b"]"):
        prefix = prefix.replace(special, b"\\" + special)
    return prefix


_INFO: Final[dict[bytes, tuple[str, Callable[[str], str | int]]]] = {
    b"redis_version": ("redis_version", str),
    b"valkey_version": ("valkey_version", str),
    b"server_name": ("server_name", str),
    b"redis_mode": ("redis_mode", str),
    b"server_mode": ("redis_mode", str),  # Valkey's word for it
    b"connected_clients": ("connected_clients", int),
    b"used_memory_human": ("memory_used_human", str),
    b"maxmemory_policy": ("maxmemory_policy", str),
}


def facts_of(replies: list[Any]) -> dict[str, str | int | float]:
    """What INFO tells; nothing where it was refused."""
    facts: dict[str, str | int | float] = {}
    for line in replies[0].splitlines() if isinstance(replies[0], bytes) else ():
        name, _, value = line.partition(b":")
        if name in _INFO:
            shown, kind = _INFO[name]
            try:
                facts[shown] = kind(value.decode("utf-8", "replace"))
            except ValueError:
                continue
    return facts
