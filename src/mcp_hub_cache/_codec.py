"""Values to bytes and back, so that a hit equals a miss, whatever the type.

Strategy: the value decides the form, on write, once.

    1 PLAIN   JSON by orjson, for what JSON says exactly: str, int of 64 bits, bool, None, finite float, list,
              dict with str keys
    2 RICH    the tagged form (``_tagged``), for everything else that can be stored exactly
    3 BYTES   a value that is bytes: itself
    4 FAILURE an exception (``_failures``): no value, and nothing that is decoded here

Rules:
- The check of exact types comes before orjson, which writes NaN as null, lets str-Enums, tuples and UUIDs pass as
  something else, and (3.12, 3.13) corrupts the heap on deeply nested tuples.
- What can't come back equal and of exactly the same types is an ``UncacheableError``, never something similar.
- Decoding raises ``DecodeError`` and nothing else, without a word of the content.
- Codec ids are part of the stored format: they are never given another meaning.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, datetime, time, timedelta
from math import isfinite
from typing import Any, Final, NamedTuple
from uuid import UUID

from ._classes import NOTHING, ClassSet
from ._exceptions import UncacheableError
from ._revive import Reviver
from ._shapes import Refusal
from ._tagged import INF, MAX_CONTAINERS, MAX_DEPTH, Tagger, dumps, find_in, late, loads

PLAIN: Final = 1
RICH: Final = 2
BYTES: Final = 3
FAILURE: Final = 4  # an exception (``_failures``)

_SCALARS: Final = frozenset((str, int, bool, type(None)))
_FLOAT: Final = frozenset((float,))
_COUNTED: Final = 65536  # bytes of a slice
_LONG: Final = 32  # items of a list from which on they are looked at by their set of types first
_IMMUTABLE: Final = frozenset(
    (str, int, bool, type(None), float, bytes, complex, date, datetime, time, timedelta, UUID, range)
)


class DecodeError(ValueError):
    """Bytes that no value can be made of, or not with the classes given. ``reason`` never holds content."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Limits(NamedTuple):
    """How large a value's stored form may be: of values that are written, and of what is read, before it is unfolded.

    Attributes:
        value_bytes: Its bytes.
        value_items: The items and containers in it, at all levels; of values that are bytes, nothing.
    """

    value_bytes: int
    value_items: int

    def excess(self, codec: int, payload: bytes | memoryview) -> str:
        """Say which of these *payload* goes beyond, and what to raise; empty: none."""
        if len(payload) > self.value_bytes:
            return (
                f"takes {len(payload):,} bytes; this cache stores at most {self.value_bytes:,}. "
                "Store less, or raise max_value_bytes (CACHE_MAX_VALUE_BYTES)."
            )
        if len(payload) > self.value_items and codec != BYTES and has_more_items(bytes(payload), self.value_items):
            return (
                f"holds more than {self.value_items:,} items, which is the most that this cache stores. "
                "Store less, or raise max_value_items (CACHE_MAX_VALUE_ITEMS)."
            )
        return ""


def has_more_items(payload: bytes, most: int) -> bool:
    """Whether the JSON *payload* is of more than *most* items and containers, without making any of them."""
    if _marked(payload) <= most:
        return False
    # Texts may hold such bytes, too: what stands between quotes doesn't count. In slices, since a flood of small texts
    # takes as much room in pieces as it would unfolded.
    bare, total, within = payload.replace(b"\\\\", b"").replace(b'\\"', b""), 0, 0
    for start in range(0, len(bare), _COUNTED):
        pieces = bare[start : start + _COUNTED].split(b'"')
        total += _marked(b"".join(pieces[within::2]))
        if total > most:
            return True
        within ^= len(pieces) - 1 & 1
    return False


def _marked(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def is_plain(value: Any, max_depth: int = MAX_DEPTH) -> bool:
    """Whether *value* is made of JSON's own types exactly, in at most *max_depth* levels of lists and dicts.

    What orjson refuses by itself (keys that are not exactly str, wide integers, lone surrogates) is left to orjson.
    """
    # Level by level, since a call for each container takes as long as looking into it: 40 % less than a recursion.
    scalars, room = _SCALARS, MAX_CONTAINERS
    level: list[Iterable[Any]] = [(value,)]
    for _ in range(max_depth + 1):
        below: list[Iterable[Any]] = []
        for items in level:
            for item in items:
                kind = type(item)
                if kind is str or kind in scalars:
                    continue
                if kind is float:
                    if not -INF < item < INF:
                        return False
                elif kind is dict:
                    below.append(item.values())
                elif kind is not list:
                    return False
                elif len(item) <= _LONG or not _is_flat(item):
                    below.append(item)
            # Ends values that share their parts so often that they would be endless when written out.
            if len(below) > room:
                return False
        if not below:
            return True
        room -= len(below)
        level = below
    return False


def _is_flat(items: list[Any]) -> bool:
    """Whether *items*, of which there are many (an embedding, say), hold nothing that must be looked into."""
    kinds = set(map(type, items))
    return kinds <= _SCALARS or (kinds == _FLOAT and all(map(isfinite, items)))


def encode(value: object, classes: ClassSet = NOTHING) -> tuple[int, bytes]:
    """Return the codec and payload to store *value* as.

    Args:
        value: Anything; not changed, and not kept.
        classes: The classes whose instances may be in it.

    Raises:
        UncacheableError: It could not come back equal and of the same types; names the place and the type.
    """
    if type(value) is bytes:
        return BYTES, value
    try:
        if is_plain(value):
            try:
                return PLAIN, dumps(value)
            except TypeError:  # an integer beyond 64 bits, a lone surrogate
                pass
        return RICH, dumps(Tagger(find_in(classes)).tag(value))
    except Exception as error:  # noqa: BLE001  # whatever a user's own class or metaclass raises when it is looked at
        raise unreadable("value", error) from None


def unreadable(root: str, error: Exception) -> UncacheableError:
    """Return the error that says why the walk over *root* ended with *error*, without that one's own words."""
    if isinstance(error, Refusal):
        return uncacheable(root, error)
    if isinstance(error, RecursionError):
        return UncacheableError(f"{root}: there is no stack left to walk through it", where=root)
    return UncacheableError(f"{root}: reading it raised {type(error).__name__}", where=root)


def uncacheable(root: str, refusal: Refusal, advice: str = "") -> UncacheableError:
    """Return the error that says where under *root* something was refused."""
    where = root + "".join(reversed(refusal.path))
    return UncacheableError(f"{where}: {refusal.reason}{advice}", where=where)


def decode(codec: int, payload: bytes | memoryview, classes: ClassSet = NOTHING) -> object:
    """Return the value that *payload* holds.

    Args:
        codec: What ``encode`` answered.
        payload: Bytes of any origin.
        classes: The classes that may be revived.

    Raises:
        DecodeError: Whatever is wrong.
    """
    try:
        if codec == PLAIN:
            return loads(payload)
        if codec == RICH:
            return Reviver(classes).revive(loads(payload))
        if codec == BYTES:
            return bytes(payload)
    except Exception as error:  # noqa: BLE001  # hostile bytes raise anything, RecursionError and MemoryError too
        # The chain is cut: these errors carry parts of the content.
        raise DecodeError(f"codec {codec}: {type(error).__name__}") from None
    raise DecodeError("an exception, not a value" if codec == FAILURE else f"codec {codec} is unknown")


def is_immutable(value: Any, depth: int = 4) -> bool:
    """Whether *value* may be handed to many callers; tuples are looked into *depth* levels deep."""
    kind = type(value)
    if kind in _IMMUTABLE:
        return True
    if kind is tuple or kind is frozenset:
        return depth > 0 and all(is_immutable(item, depth - 1) for item in value)
    return kind.__name__ == "Decimal" and kind is late("decimal.Decimal")
