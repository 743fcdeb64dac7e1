"""Values that are hard to keep, classes of every kind, and the equality that caching must preserve."""

from __future__ import annotations

import enum
import functools
import math
import struct
import sys
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID, uuid1, uuid4
from zoneinfo import ZoneInfo

import msgspec
import pydantic
from hypothesis import strategies as st

from mcp_hub_cache._classes import classes_of

T = TypeVar("T")


def same(left: Any, right: Any) -> bool:
    """Equal, of the same types all the way down, in the same order; NaN is the same as NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack(">d", left) == struct.pack(">d", right)
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, enum.Enum):
        return left is right
    if isinstance(left, dict):
        if not same(getattr(left, "__dict__", None), getattr(right, "__dict__", None)):
            return False
        return len(left) == len(right) and all(
            same(one, two) for one, two in zip(left.items(), right.items(), strict=True)
        )
    if isinstance(left, (list, tuple, deque)):
        if isinstance(left, deque) and left.maxlen != right.maxlen:
            return False
        return len(left) == len(right) and all(same(one, two) for one, two in zip(left, right, strict=True))
    if isinstance(left, (set, frozenset)):
        return len(left) == len(right) and all(any(same(one, two) for two in right) for one in left)
    if isinstance(left, (Decimal, Path, PurePosixPath, PureWindowsPath)):
        return str(left) == str(right)
    if isinstance(left, datetime):
        return (
            left.replace(tzinfo=None) == right.replace(tzinfo=None)
            and left.fold == right.fold
            and (same(left.tzinfo, right.tzinfo))
        )
    if isinstance(left, timezone):
        return left == right and str(left) == str(right)
    if isinstance(left, ZoneInfo):
        return left.key == right.key
    if isinstance(left, UUID):
        return left == right and left.is_safe is right.is_safe
    if hasattr(type(left), "__pydantic_fields_set__") or isinstance(left, pydantic.BaseModel):
        names = ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
        return all(same(getattr(left, name), getattr(right, name)) for name in names)
    names = getattr(left, "__struct_fields__", getattr(left, "__match_args__", ()))
    if names and not hasattr(left, "__dict__"):
        return all(same(getattr(left, name), getattr(right, name)) for name in names)
    if hasattr(left, "__dict__"):
        return same(vars(left), vars(right))
    return bool(left == right)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Text(enum.StrEnum):
    A = "a"


class Level(enum.IntEnum):
    LOW = 1
    ALSO_LOW = 1


class Access(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


class Point(NamedTuple):
    x: int
    y: int = 0


Pair = namedtuple("Pair", "a b")  # noqa: PYI024  # the untyped kind is what is tested


@dataclass
class Plain:
    number: int
    names: list[str] = field(default_factory=list)
    colour: Colour | None = None


@dataclass(frozen=True, slots=True)
class Slotted:
    number: int
    point: Point | None = None


@dataclass(kw_only=True)
class Careful:
    """Has all that must not run, and all that makes up its own mind about attributes."""

    size: int
    seed: InitVar[int] = 3
    derived: int = field(init=False)
    hidden: int = field(default=0, repr=False, compare=False)

    def __post_init__(self, seed: int) -> None:
        self.derived = self.size * seed
        if self.size < 0:
            raise ValueError("a validator ran")

    @functools.cached_property
    def double(self) -> int:
        return self.size * 2


@dataclass
class Child(Plain):
    extra: bytes = b""


@dataclass
class Box(Generic[T]):
    item: T


@dataclass
class Holder:
    what: Any


@dataclass
class OnDict(dict[str, int]):
    number: int = 0


@dataclass
class Failure(Exception):
    number: int = 0


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    name: str
    when: datetime | None = None
    hidden: int = pydantic.Field(default=0, exclude=True)
    _private: dict[str, int] = pydantic.PrivateAttr(default_factory=dict)

    @pydantic.field_validator("name")
    @classmethod
    def _check(cls, value: str) -> str:
        assert value != "invalid"
        return value

    @functools.cached_property
    def loud(self) -> str:
        return self.name.upper()


class SubModel(Model):
    more: int = 0


class Tree(pydantic.BaseModel):
    children: list[Tree] = []
    leaf: Point | None = None


class Numbers(pydantic.RootModel[list[int]]):
    pass


class Page(pydantic.BaseModel, Generic[T]):
    items: list[T]


class Secret(pydantic.BaseModel):
    password: pydantic.SecretStr


@pydantic.dataclasses.dataclass
class Checked:
    number: int


class Record(msgspec.Struct):
    name: str
    note: str | msgspec.UnsetType = msgspec.UNSET
    tags: list[str] = []


class Frozen(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    number: int
    parent: Frozen | None = None


class Guarded(msgspec.Struct, dict=True):
    number: int

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError("a validator ran")


def model(**more: Any) -> Model:
    made = Model(name="a", **more)
    made._private["n"] = 1
    return made


UTC2 = timezone(timedelta(hours=2, microseconds=1), "odd")
BERLIN = ZoneInfo("Europe/Berlin")

EXACT: list[Any] = [
    None, True, False, 0, -1, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0, 1.0, 1e300, 5e-324, "", "text", "\x00\x1f\x7f",
    "é漢😀",
    [], {}, [[]], {"": None}, {"a": [1, 1.0, True, None, {"b": []}]}, [{"a": 1}, {"a": 2}],
    2**64, -(2**63) - 1, 10**5000, -(10**5000), math.nan, -math.nan, math.inf, -math.inf, [math.nan], {"a": math.inf},
    struct.unpack(">d", bytes.fromhex("7ff8000000000001"))[0],
    "\ud800", "a\udc80b", "\ud800\udc00", {"\ud800": 1}, {"a": "\udfff"},
    (), (1,), [(1, [2])], ((), ((),)), {1, 2}, set(), frozenset({(1, "a")}), {frozenset({1})},
    {1, "1", None, 2.5, b"x"},
    b"", b"\x00\xff", [b"a"], bytearray(b"xy"), {"a": bytearray()},
    {1: 2}, {None: 1, True: 2, "a": 3, 2.5: 4, (1, 2): 5, b"k": 6, frozenset({1}): 7}, {1: {2: {3: [4]}}},
    {"a": {1: "b"}},
    {"l": ["l"], "t": ["t", 1]}, ["l", "t", ["c", "x", {}]], [["c", "Plain#0", {}]], ({"c": 1},),
    datetime(2024, 2, 29), datetime(2024, 1, 1, 12, 30, 15, 123456), datetime.min, datetime.max,
    datetime(2024, 10, 27, 2, 30, fold=1), datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN),
    datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=timezone(timedelta(0), "UTC")),
    datetime(2024, 1, 1, tzinfo=UTC2), datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC")), BERLIN, UTC2, UTC,
    date(1, 1, 1), date.max, time(), time(1, 2, 3, 4, fold=1), time(1, tzinfo=UTC2), timedelta(), timedelta.max,
    timedelta.min,
    timedelta(days=-1, microseconds=1), UUID(int=0), uuid4(), uuid1(),
    UUID(int=1, is_safe=__import__("uuid").SafeUUID.safe),
    Decimal(0), Decimal("-0.00"), Decimal("1.10"), Decimal("1E+400"), Decimal("NaN"), Decimal("-sNaN123"),
    Decimal("-Infinity"),
    Decimal("1." + "1" * 5000), Fraction(1, 3), Fraction(-(10**5000), 7), Fraction(0),
    Path(), Path("/a/../b"), Path("a\udc80"), PurePosixPath("//x"), PureWindowsPath("C:\\a"), PureWindowsPath("c:"),
    ip_address("1.2.3.4"), ip_address("fe80::1%eth0"), ip_network("10.0.0.0/8"), ip_network("::/0"),
    ip_interface("1.2.3.4/24"),
    ip_interface("fe80::1/64"), deque(), deque([1, (2,)]), deque([1, 2], maxlen=2), deque(maxlen=0),
    OrderedDict(b=1, a=2),
    OrderedDict({1: 2}), Counter("hello"), Counter({"a": -1, (1,): 2.5}), 1j, complex(-0.0, math.nan), range(5),
    range(10**30, -(10**40), -3), ..., [..., {"a": ...}],
    [0.5] * 100, [0.5] * 99 + [math.nan], list(range(100)), [{"a": 1}] * 50, ["x"] * 40 + [(1,)],
    [1, 0.5, True, None] * 20,
]  # fmt: skip

WITH_CLASSES: list[tuple[Any, Any]] = [
    (Colour.RED, Colour), ([Text.A, "a"], Text), ({"l": Level.LOW, "i": 1}, Level), (Level.ALSO_LOW, Level),
    (Access.READ, Access), (Access.READ | Access.WRITE, Access), (Access(0), Access), ({Colour.RED: 1}, Colour),
    (Point(1), Point), ([Point(1, 2), (1, 2)], Point), (Pair([1], None), Pair),
    (Plain(1), Plain), (Plain("not an int", None, Colour.BLUE), Plain), ([Plain(1, ["a"])] * 2, list[Plain]),
    # type: ignore[arg-type]
    (Slotted(1), Slotted), ({Slotted(1): Slotted(2, Point(3))}, dict[Slotted, Slotted]),
    (Careful(size=2), Careful), (Careful(size=2, seed=9, hidden=4), Careful), (Child(1, extra=b"x"), Child),
    (Box(Box(Colour.RED)), Box[Box[Colour]]), (Holder({1: (2,)}), Holder),
    (model(), Model), (model(when=datetime(2024, 1, 1, tzinfo=BERLIN)), Model), (model(surplus=(1, 2)), Model),
    (Model.model_construct(name=3), Model), (SubModel(name="a", more=1), SubModel),
    (Tree(children=[Tree(), Tree(leaf=Point(1))]), Tree), (Numbers([1]), Numbers), (Page[int](items=[1]), Page[int]),
    (Page[Tree](items=[Tree()]), Page[Tree]), (Checked(1), Checked),
    (Record("a"), Record), (Record("a", "b", ["c"]), Record), (Record("a", None), Record),  # type: ignore[arg-type]
    (Frozen(number=1, parent=Frozen(number=2)), Frozen), (Guarded(1), Guarded),
]  # fmt: skip


def surplus() -> Plain:
    made = Plain(1)
    made.more = 1  # type: ignore[attr-defined]
    return made


def from_file() -> ZoneInfo:
    path = next(Path(root) / "UTC" for root in (*sys.path, "/usr/share/zoneinfo") if (Path(root) / "UTC").is_file())
    with path.open("rb") as file:
        return ZoneInfo.from_file(file)


class MyStr(str):
    __slots__ = ()


class MyZone(tzinfo):
    pass


class Unhashable(type):
    def __eq__(cls, other: object) -> bool:
        return cls is other

    __hash__ = None  # type: ignore[assignment]


class Odd(metaclass=Unhashable):
    pass


def attributed() -> Counter[str]:
    made = Counter("a")
    made.note = 1  # type: ignore[attr-defined]
    return made


def endless() -> list[Any]:
    made: list[Any] = []
    made.extend([made, made])
    return made


def endless_dict() -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    made[1] = made
    return made


def endless_model() -> Holder:
    made = Holder(None)
    made.what = (made,)
    return made


def deep(levels: int, wrap: Callable[[Any], Any] = lambda inner: [inner]) -> Any:
    value: Any = None
    for _ in range(levels):
        value = wrap(value)
    return value


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
hashable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.binary(max_size=4) | st.floats(allow_nan=False)
    | st.dates() | st.uuids() | st.sampled_from([*Colour, *Text, *Access, Point(1)]) | st.fractions() | st.timedeltas(),
    lambda inner: st.tuples(inner) | st.tuples(inner, inner) | st.frozensets(inner, max_size=3) | st.builds(Slotted,
    inner),
    max_leaves=5,
)  # fmt: skip
anything = st.recursive(
    hashable
    | st.floats()
    | st.text(st.characters(categories=["Cs", "L"]), max_size=3)
    | st.datetimes(timezones=st.none() | st.timezones() | st.just(UTC2), allow_imaginary=True)
    | st.times()
    | st.decimals()
    | st.ip_addresses()
    | st.complex_numbers()
    | st.integers(-(2**70), 2**70),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sets(hashable, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(deque, st.lists(inner, max_size=3), st.none() | st.just(3))
        | st.builds(OrderedDict, st.dictionaries(hashable, inner, max_size=3))
        | st.builds(Holder, inner)
        | st.builds(Plain, inner, inner, inner)
        | st.builds(Record, inner, inner, inner)
        | st.builds(lambda a, b: Model.model_construct(name=a, hidden=b), inner, inner)
    ),
    max_leaves=10,
)
ALL = classes_of(Colour | Text | Access | Point | Slotted | Holder | Plain | Record | Model)
