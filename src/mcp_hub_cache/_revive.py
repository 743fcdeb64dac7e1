"""Reads the tagged form (``_tagged`` describes it).

Rules:
- Nothing is trusted: only what stands in ``_READERS`` and the classes of a ``ClassSet`` are ever built, and those from
  their state alone.
- No arithmetic whose cost outgrows the input: no range is walked, no gcd taken, no power raised.
- Anything may be raised; ``_codec.decode`` makes one error of it.
"""

from __future__ import annotations

from binascii import a2b_base64
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, SafeUUID

from ._classes import ClassSet
from ._tagged import DOUBLE, IPS, MAX_INT, MIN_INT, PATHS, Json, late

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo


class Reviver:
    """Builds the value again that a tagged form stands for. Raises whatever hostile input makes it raise."""

    __slots__ = ("_by_id",)

    def __init__(self, classes: ClassSet) -> None:
        self._by_id = classes.by_id

    def revive(self, data: Json) -> Any:
        """Return the value that *data* stands for."""
        kind = type(data)
        if kind is dict:
            return {key: self.revive(item) for key, item in data.items()}
        if kind is list:
            return _READERS[data[0]](self, data)
        return data

    def items(self, data: list[Json]) -> list[Any]:
        """Revive everything behind the tag."""
        revive = self.revive
        return [revive(item) for item in data[1:]]

    def pairs(self, data: list[Json]) -> dict[Any, Any]:
        """Revive keys and values by turns; no key may come twice."""
        items = self.items(data)
        found = dict(zip(items[::2], items[1::2], strict=True))
        if len(found) * 2 != len(items):
            raise ValueError("a key that comes twice")
        return found

    def unique(self, data: list[Json]) -> list[Any]:
        """Revive the items of a set; none may come twice."""
        items = self.items(data)
        if len(frozenset(items)) != len(items):
            raise ValueError("an item that comes twice")
        return items

    def instance(self, data: list[Json]) -> object:
        """Rebuild an instance of a class of the set."""
        _, name, fields, *rest = data
        if type(fields) is not dict or len(rest) > 1:
            raise ValueError("not the state of an instance")
        return self._by_id[name].make(self.revive(fields), self.revive(rest[0]) if rest else None)


def _exactly(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError("a part of another type than the tag says")
    return value


def _read_int(_: Reviver, data: list[Json]) -> int:
    _, text = data
    number = int(text, 16)
    if MIN_INT <= number <= MAX_INT or hex(number) != text:
        raise ValueError("an integer that is spelled in another way")
    return number


def _read_float(_: Reviver, data: list[Json]) -> float:
    _, text = data
    number: float = DOUBLE.unpack(bytes.fromhex(text))[0]
    return number


def _bytes(data: list[Json]) -> bytes:
    _, text = data
    return a2b_base64(text, strict_mode=True)


def _read_counter(reviver: Reviver, data: list[Json]) -> Counter[Any]:
    counter: Counter[Any] = Counter()
    dict.update(counter, reviver.pairs(data))  # Counter.update would add
    return counter


def _read_deque(reviver: Reviver, data: list[Json]) -> deque[Any]:
    items = reviver.items(data[1:])
    made = deque(items, data[1])
    if len(made) != len(items):
        raise ValueError("more items than the deque takes")
    return made


def _zone(reviver: Reviver, data: Json) -> Any:
    zone = reviver.revive(data)
    if zone is not None and type(zone) is not timezone and type(zone) is not late("zoneinfo.ZoneInfo"):
        raise TypeError("a time zone that is none")
    return zone


def _read_datetime(reviver: Reviver, data: list[Json]) -> datetime:
    _, text, fold, zone = data
    return datetime.fromisoformat(text).replace(fold=fold, tzinfo=_zone(reviver, zone))


def _read_time(reviver: Reviver, data: list[Json]) -> time:
    _, text, fold, zone = data
    return time.fromisoformat(text).replace(fold=fold, tzinfo=_zone(reviver, zone))


def _read_timedelta(_: Reviver, data: list[Json]) -> timedelta:
    _, days, seconds, microseconds = data
    return timedelta(_exactly(days, int), _exactly(seconds, int), _exactly(microseconds, int))


def _read_zone(_: Reviver, data: list[Json]) -> ZoneInfo:
    _, key, from_cache = data
    kind: type[ZoneInfo] = late("zoneinfo.ZoneInfo")
    return kind(key) if from_cache else kind.no_cache(key)


def _read_uuid(_: Reviver, data: list[Json]) -> UUID:
    _, text, *safety = data
    return UUID(text, is_safe=SafeUUID[safety[0]]) if safety else UUID(text)


def _read_fraction(reviver: Reviver, data: list[Json]) -> object:
    numerator, denominator = reviver.items(data)
    if type(numerator) is not int or type(denominator) is not int or denominator < 1:
        raise ValueError("not the parts of a fraction")
    # Fraction() would take the gcd, which for two integers of 4 MB takes minutes.
    made: Any = object.__new__(late("fractions.Fraction"))
    made._numerator, made._denominator = numerator, denominator  # noqa: SLF001  # see above
    return made


def _read_complex(reviver: Reviver, data: list[Json]) -> complex:
    real, imag = reviver.items(data)
    return complex(_exactly(real, float), _exactly(imag, float))


def _read_range(reviver: Reviver, data: list[Json]) -> range:
    start, stop, step = reviver.items(data)
    return range(_exactly(start, int), _exactly(stop, int), _exactly(step, int))


def _read_ellipsis(_: Reviver, data: list[Json]) -> Any:
    [_] = data
    return ...


def _one_of(kinds: tuple[str, ...], name: Any) -> str:
    if name not in kinds:
        raise ValueError("a class that the tag does not stand for")
    checked: str = name
    return checked


def _read_path(reviver: Reviver, data: list[Json]) -> object:
    _, name, text = data
    return late(f"pathlib.{_one_of(PATHS, name)}")(_exactly(reviver.revive(text), str))


def _read_ip(_: Reviver, data: list[Json]) -> object:
    _, name, text = data
    return late(f"ipaddress.{_one_of(IPS, name)}")(_exactly(text, str))


_Reader = Callable[[Reviver, list[Json]], Any]
_READERS: Final[dict[str, _Reader]] = {
    "l": Reviver.items,
    "t": lambda reviver, data: tuple(reviver.items(data)),
    "d": Reviver.pairs,
    "s": lambda reviver, data: set(reviver.unique(data)),
    "f": lambda reviver, data: frozenset(reviver.unique(data)),
    "od": lambda reviver, data: OrderedDict(reviver.pairs(data)),
    "co": _read_counter,
    "dq": _read_deque,
    "b": lambda _, data: _bytes(data),
    "B": lambda _, data: bytearray(_bytes(data)),
    "i": _read_int,
    "n": _read_float,
    "u": lambda _, data: _bytes(data).decode("utf-8", "surrogatepass"),
    "cx": _read_complex,
    "ra": _read_range,
    "...": _read_ellipsis,
    "dt": _read_datetime,
    "da": lambda _, data: date.fromisoformat(_only_part(data)),
    "ti": _read_time,
    "td": _read_timedelta,
    "tz": lambda reviver, data: timezone(*reviver.items(data)),
    "zi": _read_zone,
    "uu": _read_uuid,
    "de": lambda _, data: late("decimal.Decimal")(_only_part(data)),
    "fr": _read_fraction,
    "pa": _read_path,
    "ip": _read_ip,
    "c": Reviver.instance,
}


def _only_part(data: list[Json]) -> str:
    _, text = data
    checked: str = _exactly(text, str)
    return checked
