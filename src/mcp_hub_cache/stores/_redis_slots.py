"""Which node of a cluster has which keys: slots, maps of them, and redirections. No I/O.

Rule: a node whose host nobody knows (empty, or "?") is at the host that was asked.
"""

from __future__ import annotations

from binascii import crc_hqx
from typing import Any, Final, NamedTuple

from ._redis_link import ReplyError

SLOTS: Final = 16384
_UNKNOWN: Final = frozenset({"", "?"})


class Spot(NamedTuple):
    """Where a node listens."""

    host: str
    port: int


class Redirection(NamedTuple):
    """A node's word that a key is elsewhere: for good, or for this one request (``once``)."""

    slot: int
    spot: Spot
    once: bool


def slot_of(key: bytes) -> int:
    """Return the slot of *key*: the CRC16 of what stands in its first pair of braces, or of all of it."""
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key, 0) % SLOTS


def spots_of(reply: Any, asked: Spot) -> list[Spot | None]:
    """Return the primary of each slot, as CLUSTER SLOTS tells it; None: the slot has none.

    Raises:
        ValueError: The reply is of another shape.
    """
    spots: list[Spot | None] = [None] * SLOTS
    if not isinstance(reply, list):
        raise ValueError("no list")  # noqa: TRY004  # one error for all shapes
    try:
        for first, last, (host, port, *_), *_ in reply:
            name = (host or b"").decode()
            spot = Spot(asked.host if name in _UNKNOWN else name, int(port) or asked.port)
            spots[first : last + 1] = [spot] * (last + 1 - first)
    except (AttributeError, TypeError) as error:
        raise ValueError("no ranges of slots") from error
    if len(spots) != SLOTS:
        raise ValueError("slots out of range")
    return spots


def redirection(reply: Any, asked: Spot) -> Redirection | None:
    """Return where *reply* says that the key is; None: it does not."""
    if not isinstance(reply, ReplyError):
        return None
    word, *rest = str(reply).split()
    if word not in {"MOVED", "ASK"} or len(rest) < 2 or not rest[0].isdecimal():
        return None
    host, _, port = rest[1].rpartition(":")
    if not port.isdecimal() or int(rest[0]) >= SLOTS:
        return None
    return Redirection(int(rest[0]), Spot(asked.host if host in _UNKNOWN else host, int(port)), word == "ASK")
