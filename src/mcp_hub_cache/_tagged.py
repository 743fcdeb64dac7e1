"""The tagged form: every value that can be stored exactly, as JSON that orjson writes and reads.

Strategy: str, int of 64 bits, bool, None, finite float and dicts with str keys stand for themselves. A JSON array is
never a value: it is ``[tag, ...]``, and the tag says what of.

    l t s f        list, tuple, set, frozenset: the items
    d od co        dict with other keys than str, OrderedDict, Counter: key, value, key, value, ...
    dq             deque: maxlen, the items
    b B            bytes, bytearray: base64
    i n            int beyond 64 bits: hex; float that is not finite: its 8 bytes in hex
    u              str with lone surrogates: base64
    cx ra ...      complex, range, Ellipsis
    dt da ti td    datetime, time: ISO text, fold, tzinfo; date: ISO text; timedelta: days, seconds, microseconds
    tz zi          timezone: its arguments; ZoneInfo: key, whether from the cache
    uu de fr pa ip UUID, Decimal, Fraction, pathlib and ipaddress types: their exact texts or parts
    c              an instance: the class's name, {field: value}, and what else there is to its state
    ex             an exception (``_failures``): never in a value

Rules:
- Types are exact. A subclass of a builtin never passes as the builtin: it has a shape, or it is refused.
- ``ordered`` is for keys: sets and dicts with odd keys are sorted by their encoded items, so that equal values have
  equal bytes.
- A refusal names the place and the type, never the content.
- Tags are part of the stored format: they are never given another meaning.
"""

from __future__ import annotations

import struct
import sys
from base64 import b64encode
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta, timezone
from functools import cache
from importlib import import_module
from itertools import chain
from typing import Any, Final
from uuid import UUID, SafeUUID  # orjson imports it, as it does datetime

import orjson

from ._classes import ClassSet, spell
from ._shapes import Refusal, Shape, shape_of

Json = Any
"""What orjson writes: None, bool, int, float, str, list of Json, dict of str to Json."""

# The way to JSON for the codec and the keys too: the library is known here alone.
dumps: Final = orjson.dumps
loads: Final = orjson.loads
Finder = Callable[[type], tuple[str, Shape]]
"""The name and shape of a class; raises ``Refusal`` where instances of it are not wanted."""

MAX_DEPTH: Final = 200
MAX_CONTAINERS: Final = 3_000_000
MIN_INT: Final = -(2**63)
MAX_INT: Final = 2**64 - 1
INF: Final = float("inf")

_STR: Final = frozenset((str,))
DOUBLE: Final = struct.Struct(">d")
PATHS: Final = ("PurePosixPath", "PureWindowsPath", "PosixPath", "WindowsPath")
IPS: Final = ("IPv4Address", "IPv6Address", "IPv4Network", "IPv6Network", "IPv4Interface", "IPv6Interface")


class Tagger:
    """One walk over one value.

    Args:
        find: Which classes' instances are taken, and under what name.
        ordered: Sort what has no order of its own.
        max_depth: Levels of nesting allowed.
    """

    __slots__ = ("_containers", "_find", "_max_depth", "_ordered")

    def __init__(self, find: Finder, *, ordered: bool = False, max_depth: int = MAX_DEPTH) -> None:
        self._find = find
        self._ordered = ordered
        self._max_depth = max_depth
        self._containers = 0

    def tag(self, value: Any, depth: int = 0) -> Json:
        """Return the tagged form of *value*, which stands under *depth* containers. Raises ``Refusal``."""
        kind = type(value)
        if kind is str:
            return value if is_text(value) else ["u", _base64(_encode_any(value))]
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if MIN_INT <= value <= MAX_INT else ["i", hex(value)]
        if kind is float:
            return value if -INF < value < INF else ["n", DOUBLE.pack(value).hex()]
        write = _WRITERS.get(kind)
        return self._instance(value, kind, depth) if write is None else write(self, value, depth)

    def enter(self, depth: int) -> int:
        """Count a container; return the depth of what is in it."""
        self._containers += 1
        if depth >= self._max_depth:
            raise Refusal(f"it is nested deeper than {self._max_depth} levels, or contains itself")
        if self._containers > MAX_CONTAINERS:
            raise Refusal(f"it holds more than {MAX_CONTAINERS:,} containers")
        return depth + 1

    def items(self, name: str, values: Iterable[object], depth: int) -> list[Json]:
        """Tag a sequence under *name*."""
        depth = self.enter(depth)
        tagged: list[Json] = [name]
        try:
            for item in values:
                tagged.append(self.tag(item, depth))  # noqa: PERF401  # its length says which item was refused
        except Refusal as refusal:
            refusal.path.append(f"[{len(tagged) - 1}]")
            raise
        return tagged

    def unordered(self, name: str, values: Iterable[object], depth: int) -> list[Json]:
        """Tag a set: refusals name no index, since a set has none."""
        depth = self.enter(depth)
        try:
            tagged = [self.tag(item, depth) for item in values]
        except Refusal as refusal:
            refusal.path.append("[item]")
            raise
        if self._ordered:
            tagged.sort(key=canonical)
        return [name, *tagged]

    def pairs(self, name: str, mapping: Mapping[Any, object], depth: int, *, has_order: bool = False) -> list[Json]:
        """Tag a mapping as keys and values by turns; *has_order*: its order is part of its value."""
        depth = self.enter(depth)
        tagged: list[tuple[Json, Json]] = []
        try:
            for key, item in mapping.items():
                tagged.append((self.tag(key, depth), self.tag(item, depth)))
        except Refusal as refusal:
            refusal.path.append(place_of(len(tagged)))
            raise
        if self._ordered and not has_order:
            tagged.sort(key=canonical)
        return [name, *chain.from_iterable(tagged)]

    def mapping(self, mapping: dict[Any, object], depth: int) -> Json:
        """Tag a dict: an object where all keys are plain text, else pairs."""
        if not (_STR.issuperset(map(type, mapping)) and is_text("".join(mapping))):
            return self.pairs("d", mapping, depth)
        depth = self.enter(depth)
        tagged: dict[str, Json] = {}
        try:
            for key, item in mapping.items():
                tagged[key] = self.tag(item, depth)
        except Refusal as refusal:
            refusal.path.append(place_of(len(tagged)))
            raise
        return tagged

    def attribute(self, name: str, value: object, depth: int) -> Json:
        """Tag one part of *value*, by the name it has there."""
        try:
            return self.tag(value, depth)
        except Refusal as refusal:
            refusal.path.append(f".{name}")
            raise

    def _instance(self, value: object, kind: type, depth: int) -> Json:
        try:
            name, shape = self._find(kind)
        except Refusal:
            write = _late_writer(kind)
            if write is None:
                raise
            return write(self, value, depth)
        fields, rest = shape.take(value)
        depth = self.enter(self.enter(depth))
        tagged: list[Json] = ["c", name, {field: self.attribute(field, item, depth) for field, item in fields.items()}]
        if rest is not None:
            tagged.append(self.tag(rest, depth))
        return tagged


def place_of(index: int) -> str:
    """Spell a subscript for people: which key it is, and not the key, which is content and has no place in a log."""
    return f"[key {index}]"


def canonical(data: Json) -> bytes:
    """Return bytes that are equal for equal *data*, whatever the order of its keys."""
    return dumps(data, option=orjson.OPT_SORT_KEYS)


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold *text*: it has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encode_any(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _base64(data: bytes | bytearray) -> str:
    return b64encode(data).decode("ascii")


def _no_attributes(value: object) -> None:
    if vars(value):
        raise Refusal(f"this {type(value).__name__} has attributes of its own")


def _write_ordered(tagger: Tagger, value: Any, depth: int) -> Json:
    _no_attributes(value)
    return tagger.pairs("od", value, depth, has_order=True)


def _write_counter(tagger: Tagger, value: Any, depth: int) -> Json:
    _no_attributes(value)
    return tagger.pairs("co", value, depth)


def _write_deque(tagger: Tagger, value: Any, depth: int) -> Json:
    return ["dq", value.maxlen, *tagger.items("", value, depth)[1:]]


def _write_datetime(tagger: Tagger, value: Any, depth: int) -> Json:
    zone = tagger.attribute("tzinfo", value.tzinfo, depth)
    return ["dt", value.replace(tzinfo=None).isoformat(), value.fold, zone]


def _write_time(tagger: Tagger, value: Any, depth: int) -> Json:
    zone = tagger.attribute("tzinfo", value.tzinfo, depth)
    return ["ti", value.replace(tzinfo=None).isoformat(), value.fold, zone]


def _write_timedelta(_: Tagger, value: Any, __: int) -> Json:
    return ["td", value.days, value.seconds, value.microseconds]


def _write_timezone(tagger: Tagger, value: Any, depth: int) -> Json:
    return ["tz", *(tagger.tag(argument, depth) for argument in value.__getinitargs__())]


def _write_zone(_: Tagger, value: Any, __: int) -> Json:
    try:
        key, from_cache = value.__reduce__()[1]
    except Exception:  # noqa: BLE001  # one read from a file refuses to be pickled, and has no name to find it by
        raise Refusal("this ZoneInfo was made from a file and has no key") from None
    return ["zi", key, bool(from_cache)]


def _write_uuid(_: Tagger, value: Any, __: int) -> Json:
    safety = value.is_safe
    return ["uu", value.hex] if safety is SafeUUID.unknown else ["uu", value.hex, safety.name]


def _write_fraction(tagger: Tagger, value: Any, depth: int) -> Json:
    return ["fr", tagger.tag(value.numerator, depth), tagger.tag(value.denominator, depth)]


def _write_complex(tagger: Tagger, value: Any, depth: int) -> Json:
    return ["cx", tagger.tag(value.real, depth), tagger.tag(value.imag, depth)]


def _write_range(tagger: Tagger, value: Any, depth: int) -> Json:
    return ["ra", *(tagger.tag(part, depth) for part in (value.start, value.stop, value.step))]


_Writer = Callable[[Tagger, Any, int], Json]
_WRITERS: Final[dict[type, _Writer]] = {
    list: lambda tagger, value, depth: tagger.items("l", value, depth),
    tuple: lambda tagger, value, depth: tagger.items("t", value, depth),
    dict: Tagger.mapping,
    set: lambda tagger, value, depth: tagger.unordered("s", value, depth),
    frozenset: lambda tagger, value, depth: tagger.unordered("f", value, depth),
    OrderedDict: _write_ordered,
    Counter: _write_counter,
    deque: _write_deque,
    bytes: lambda _, value, __: ["b", _base64(value)],
    bytearray: lambda _, value, __: ["B", _base64(value)],
    complex: _write_complex,
    range: _write_range,
    type(...): lambda _, __, ___: ["..."],
    datetime: _write_datetime,
    date: lambda _, value, __: ["da", value.isoformat()],
    time: _write_time,
    timedelta: _write_timedelta,
    timezone: _write_timezone,
    UUID: _write_uuid,
}
_LATE_WRITERS: Final[dict[str, dict[str, _Writer]]] = {
    "decimal": {"Decimal": lambda _, value, __: ["de", str(value)]},
    "fractions": {"Fraction": _write_fraction},
    "ipaddress": dict.fromkeys(IPS, lambda _, value, __: ["ip", type(value).__name__, str(value)]),
    "pathlib": dict.fromkeys(
        PATHS, lambda tagger, value, depth: ["pa", type(value).__name__, tagger.tag(str(value), depth)]
    ),
    "zoneinfo": {"ZoneInfo": _write_zone},
}
"""By module and class, for modules that were not there yet: what is there moves to ``_WRITERS``."""


@cache
def late(path: str) -> Any:
    """Return a class of the standard library that few values hold; its module is imported now if it was not yet.

    Importing them all beforehand took as long as all the rest of this package does.
    """
    module, _, name = path.partition(".")
    return getattr(import_module(module), name)


def _late_writer(kind: type) -> _Writer | None:
    # Where there is an instance, its class's module is there: what nobody has imported need not be looked at.
    for module in tuple(_LATE_WRITERS):
        if module in sys.modules and (writers := _LATE_WRITERS.get(module)) is not None:
            _WRITERS.update({late(f"{module}.{name}"): write for name, write in writers.items()})
            # Only now: a thread that no longer finds them here must find them there.
            _LATE_WRITERS.pop(module, None)
    return _WRITERS.get(kind)


def find_any(cls: type) -> tuple[str, Shape]:
    """Find the class of an argument, for keys: any that has a shape, by its true name."""
    shape = shape_of(cls)
    if isinstance(shape, str):
        raise Refusal(f"a {spell(cls)} has no stable form ({shape})")
    return spell(cls), shape


def find_in(classes: ClassSet) -> Finder:
    """Return the finder for values: the classes of the set, and no others."""

    def find(cls: type) -> tuple[str, Shape]:
        found = classes.by_type.get(cls)
        if found is not None:
            return found
        shape = shape_of(cls)
        if isinstance(shape, str):
            raise Refusal(f"a {spell(cls)} can't be stored exactly ({shape})")
        base = next((base for base in cls.__mro__ if base in classes.by_type), None)
        if base is not None:
            raise Refusal(f"a {spell(cls)} is only a subclass of the {base.__qualname__} that is annotated; name both")
        raise Refusal(f"a {spell(cls)} is not among the annotated classes; annotate the return type, or pass as_type=")

    return find
