"""A hit equals a miss: equal, and of exactly the same types, whatever the type; or refused."""

from __future__ import annotations

import array
import enum
import json
import math
import subprocess
import sys
import threading
import types
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, NamedTuple

import msgspec
import orjson
import pytest
from hypothesis import given, settings

from mcp_hub_cache._classes import NOTHING, ClassSet, classes_of
from mcp_hub_cache._codec import BYTES, PLAIN, RICH, DecodeError, decode, encode, is_immutable, is_plain
from mcp_hub_cache._exceptions import UncacheableError
from tests.golden import GOLDEN, golden_cases, written
from tests.samples import (
    ALL,
    EXACT,
    WITH_CLASSES,
    Careful,
    Child,
    Colour,
    Failure,
    Guarded,
    Holder,
    Model,
    MyStr,
    MyZone,
    Odd,
    OnDict,
    Plain,
    Point,
    Secret,
    Slotted,
    anything,
    attributed,
    deep,
    endless,
    endless_dict,
    endless_model,
    from_file,
    json_like,
    model,
    same,
    surplus,
)

LATE = """
from mcp_hub_cache._codec import RICH, decode, encode, is_immutable

# Looking at what it does not know imports nothing; a class that only says it is the library's is not taken for it.
class Decimal:
    __module__ = "decimal"

for stranger in (Decimal(), object(), Decimal):
    assert not is_immutable(stranger)
    try:
        encode(stranger)
    except TypeError:
        pass
    else:
        raise AssertionError(stranger)

# Read where nobody has imported the type's module, then written.
for payload in (
    b'["de","1.50"]', b'["fr",1,3]', b'["ip","IPv6Network","::/64"]', b'["pa","PurePosixPath","/a"]',
    b'["uu","00000000000000000000000000000001"]', b'["dt","2024-01-01T00:00:00",0,["zi","UTC",true]]',
):
    value = decode(RICH, payload)
    assert encode(value) == (RICH, payload), payload

import decimal
assert is_immutable(decimal.Decimal(1)) and encode((decimal.Decimal(1),)) == (RICH, b'["t",["de","1"]]')
"""


def test_types_of_modules_that_are_not_imported_yet() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def there_and_back(value: Any, classes: ClassSet = NOTHING) -> Any:
    codec, payload = encode(value, classes)
    return decode(codec, memoryview(payload), classes)


@pytest.mark.parametrize("value", EXACT, ids=range(len(EXACT)))
def test_comes_back_exactly(value: Any) -> None:
    assert same(there_and_back(value), value)


@pytest.mark.parametrize("value", EXACT, ids=range(len(EXACT)))
def test_comes_back_exactly_from_anywhere_inside(value: Any) -> None:
    for wrapped in ([value], {"a": value}, (value,), {1: value}, OrderedDict(a=value), deque([value])):
        assert same(there_and_back(wrapped), wrapped)


@pytest.mark.parametrize(("value", "annotation"), WITH_CLASSES, ids=range(len(WITH_CLASSES)))
def test_instances_of_annotated_classes_come_back_exactly(value: Any, annotation: Any) -> None:
    classes = classes_of(annotation)
    for wrapped in (value, [value], {"a": (value,)}, {1: value}):
        assert same(there_and_back(wrapped, classes), wrapped)


@pytest.mark.parametrize(("value", "annotation"), WITH_CLASSES, ids=range(len(WITH_CLASSES)))
def test_instances_of_other_classes_are_refused(value: Any, annotation: Any) -> None:
    with pytest.raises(UncacheableError, match="annotate the return type, or pass as_type="):
        encode(value)


def test_no_initialiser_and_no_validator_runs() -> None:
    careful = Careful(size=2)
    careful.size = -1
    guarded = Guarded(1)
    guarded.number = -1
    made = model()
    made.__dict__["name"] = "invalid"
    classes = classes_of(Careful | Guarded | Model)
    back, guarded_back, model_back = there_and_back([careful, guarded, made], classes)
    assert (back.size, back.derived) == (-1, 6)
    assert guarded_back.number == -1 and type(guarded_back) is Guarded
    assert model_back.name == "invalid" and model_back._private == {"n": 1} and model_back.model_fields_set == {"name"}


def test_what_was_computed_is_computed_again_and_what_was_unset_stays_unset() -> None:
    careful, made = Careful(size=2), model()
    assert (careful.double, made.loud) == (4, "A")
    careful.__delattr__("hidden")
    back, model_back = there_and_back([careful, made], classes_of(Careful | Model))
    assert "double" not in vars(back) and "hidden" not in vars(back) and back.double == 4
    assert "loud" not in vars(model_back) and model_back.loud == "A"
    slotted = object.__new__(Slotted)
    object.__setattr__(slotted, "number", 1)
    assert not hasattr(there_and_back(slotted, classes_of(Slotted)), "point")


def test_two_instances_do_not_share_state_after_reading() -> None:
    classes = classes_of(Plain)
    codec, payload = encode(Plain(1, ["a"]), classes)
    first: Any = decode(codec, payload, classes)
    first.names.append("b")
    assert decode(codec, payload, classes) == Plain(1, ["a"])


REFUSED: list[Callable[[], Any]] = [
    object, lambda: object, lambda: len, lambda: test_comes_back_exactly, lambda: (lambda: 1), lambda: MyStr("a"),
    lambda: {MyStr("a"): 1},
    lambda: [MyStr("a")], lambda: defaultdict(list), ChainMap, UserDict,
    lambda: types.MappingProxyType({}),
    lambda: memoryview(b"a"), lambda: array.array("i"), lambda: slice(1), lambda: (n for n in ()), threading.Lock,
    lambda: NotImplemented,
    lambda: datetime(2024, 1, 1, tzinfo=MyZone()), from_file, lambda: json, lambda: Holder(lambda: 1),
    lambda: Holder(MyStr("a")), surplus,
    lambda: Secret(password="s"), OnDict, Failure, Odd, lambda: [Odd()], attributed, endless, endless_dict,
    endless_model, lambda: deep(201),
    lambda: deep(100_000), lambda: deep(201, lambda inner: (inner,)), lambda: deep(100_000, lambda inner: {"a": inner}),
    lambda: deep(300, Holder), lambda: types.SimpleNamespace(a=1), lambda: Exception("a"), lambda: {"a": Child},
    lambda: {1: {2: [MyStr()]}},
]  # fmt: skip


@pytest.mark.parametrize("make", REFUSED, ids=range(len(REFUSED)))
def test_what_can_not_come_back_exactly_is_refused(make: Callable[[], Any]) -> None:
    classes = classes_of(Plain | Holder | Secret | OnDict | Failure)
    for value in (make(), [make()], {"a": make()}):
        with pytest.raises(UncacheableError):
            encode(value, classes)


@pytest.mark.parametrize(
    ("value", "where", "what"),
    [
        ({"items": [0, 1, 2, Holder(object())]}, "value[key 0][3].what", "object"),
        ({"sk-12 3": object()}, "value[key 0]", "object"),
        ({"x" * 41: {1, MyStr("s")}}, "value[key 0][item]", "MyStr"),
        ([{1: (0, deque([MyStr("s")]))}], "value[0][key 0][1][0]", "MyStr"),
        ({MyStr("secret"): 1}, "value[key 0]", "MyStr"),
        (datetime(2024, 1, 1, tzinfo=MyZone()), "value.tzinfo", "MyZone"),
        (model(surplus=MyStr("s")), "value[key 1][key 0]", "MyStr"),
        (Child(1), "value", "only a subclass of the Plain"),
        (Colour.RED, "value", "Colour is not among the annotated classes; annotate the return type, or pass as_type="),
    ],
)
def test_a_refusal_names_place_and_type_and_never_content(value: Any, where: str, what: str) -> None:
    with pytest.raises(UncacheableError) as caught:
        encode(value, classes_of(tuple[Holder, Model, Plain]) if not isinstance(value, Colour) else NOTHING)
    assert caught.value.where == where
    assert str(caught.value).startswith(where + ": ")
    assert what in str(caught.value)
    assert "secret" not in str(caught.value) and "sk-12" not in str(caught.value)


def test_depth_has_a_stated_limit() -> None:
    for wrap in (lambda inner: [inner], lambda inner: (inner,), lambda inner: {"a": inner}, lambda inner: {1: inner}):
        assert there_and_back(deep(200, wrap)) == deep(200, wrap)
        with pytest.raises(UncacheableError, match="nested deeper than 200"):
            encode(deep(201, wrap))


def test_near_the_end_of_the_stack_it_is_refused_not_a_recursion_error() -> None:
    def dive() -> None:
        try:
            dive()
        except RecursionError:
            with pytest.raises((UncacheableError, RecursionError)) as caught:
                encode(deep(150, lambda inner: (inner,)))
            outcomes.append(caught.type)

    outcomes: list[type] = []
    dive()
    assert UncacheableError in outcomes


def test_parts_shared_without_end_are_refused_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_hub_cache._tagged.MAX_CONTAINERS", 1000)
    monkeypatch.setattr("mcp_hub_cache._codec.MAX_CONTAINERS", 1000)
    with pytest.raises(UncacheableError, match="more than 1,000 containers"):
        encode(deep(100, lambda inner: [inner, inner]))


def test_the_form_follows_the_value() -> None:
    assert encode(b"\x00raw") == (BYTES, b"\x00raw")
    assert encode({"a": [1, 2.5, None]}) == (PLAIN, b'{"a":[1,2.5,null]}')
    assert encode((1,)) == (RICH, b'["t",1]')
    assert encode(2**64)[0] == encode("\ud800")[0] == encode(math.nan)[0] == encode({1: 1})[0] == RICH
    assert type(decode(BYTES, memoryview(b"x"))) is bytes


def test_a_subclass_of_an_annotated_class_is_not_revived() -> None:
    classes = classes_of(Plain)
    codec, payload = encode(Child(1), classes_of(Child))
    with pytest.raises(DecodeError):
        decode(codec, payload, classes)


def test_bytes_of_a_changed_class_are_undecodable() -> None:
    def version(annotations: dict[str, Any]) -> type:
        made = types.new_class("Versioned", (), {}, lambda space: space.update(__annotations__=annotations))
        made.__module__, made.__qualname__ = "app.models", "Versioned"
        return dataclass(made)

    first, again, other = version({"a": int}), version({"a": int}), version({"a": str})
    codec, payload = encode(first(1), classes_of(first))
    assert type(decode(codec, payload, classes_of(again))) is again
    for newer in (other, version({"b": int}), version({"a": int, "b": int})):
        with pytest.raises(DecodeError):
            decode(codec, payload, classes_of(newer))


@given(json_like)
def test_json_values_come_back_exactly(value: Any) -> None:
    assert same(there_and_back(value), value)


@settings(max_examples=400)
@given(anything)
def test_any_value_comes_back_exactly(value: Any) -> None:
    assert same(there_and_back(value, ALL), value)


@given(json_like)
def test_plain_means_that_json_says_it_exactly(value: Any) -> None:
    if is_plain(value):
        try:
            text = orjson.dumps(value)
        except TypeError:
            return
        assert same(orjson.loads(text), value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", True), (1, True), (None, True), (1.5, True), (b"a", True), ((1, ("a",)), True),
        (frozenset({(1,)}), True), (date(2024, 1, 1), True),
        ([], False), ((1, []), False), ({}, False), (bytearray(), False), (Point(1), False), (MyStr("a"), False),
        ((((((1,),),),),), False),
    ],
)  # fmt: skip
def test_only_what_nobody_can_change_is_immutable(value: Any, expected: bool) -> None:
    assert is_immutable(value) is expected


@pytest.mark.parametrize("name", sorted(golden_cases("codec")))
def test_golden_payloads_are_read_for_ever(name: str) -> None:
    value, annotation = golden_cases("codec")[name]
    classes = classes_of(annotation)
    stored = (GOLDEN / "codec" / name).read_bytes()
    assert same(decode(stored[0], stored[1:], classes), value)
    assert written("codec", (value, annotation)) == stored


class Open(enum.Enum):
    """Makes up members for values that it does not know."""

    KNOWN = 1

    @classmethod
    def _missing_(cls, value: object) -> Open:
        made = object.__new__(cls)
        made._name_, made._value_ = "UNKNOWN", value
        return made


class Extended(NamedTuple("Extended", [("x", int)])):  # noqa: SLOT002
    """Has a __dict__, unlike the named tuple itself."""


class Raising(msgspec.Struct):
    x: int

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("secret")


def test_instances_that_hold_more_than_their_class_says_are_refused() -> None:
    extended = Extended(1)
    classes = classes_of(Open | Extended | Raising)
    assert there_and_back([extended, Open.KNOWN], classes) == [extended, Open.KNOWN]
    extended.more = 1  # type: ignore[attr-defined]
    for value in (Open(5), extended, tuple.__new__(Extended, (1, 2))):
        with pytest.raises(UncacheableError):
            encode(value, classes)


def test_errors_of_the_values_own_are_wrapped_without_their_words() -> None:
    with pytest.raises(UncacheableError, match="raised RuntimeError") as caught:
        encode(Raising(1), classes_of(Raising))
    assert "secret" not in str(caught.value) and caught.value.__cause__ is None
