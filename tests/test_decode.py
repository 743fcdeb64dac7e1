"""Bytes of any origin: a value, or a DecodeError; never another exception, never a bomb."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_hub_cache._classes import classes_of
from mcp_hub_cache._codec import PLAIN, RICH, DecodeError, decode
from mcp_hub_cache._revive import _READERS
from tests.samples import ALL, Access, Colour, Plain, Point, Record, model

HOSTILE: list[Any] = [
    [], ["?"], [1], [None], [[]], [{}], ["c"], ["c", "x", {}], ["c", "Plain#0", {"a": 1}], ["c", ["l"], {}],
    ["s", ["l"]], ["s", 1, 1],
    ["f", {}], ["d", 1], ["d", ["l"], 1], ["d", 1, 2, 1, 3], ["d", {}, 1], ["b"], ["b", 1], ["b", "%"],
    ["b", "YQ=", 2], ["b", "YQ"],
    ["B", None], ["i"], ["i", "zz"], ["i", "0x1"], ["i", 12], ["i", " 0x1_0000_0000_0000_0000"], ["n"], ["n", "00"],
    ["n", 1.0], ["u", "/w=="],
    ["dt"], ["dt", "nonsense", 0, None], ["dt", "2024-01-01T00:00:00", 2, None], ["dt", "2024-01-01T00:00:00", 0, 5],
    ["dt", "2024-01-01T00:00:00", 0, ["t"]], ["da", "2024-13-01"], ["da", 1], ["ti", "25:00", 0, None], ["td", 1],
    ["td", 1.5, 0, 0],
    ["td", 10**18, 0, 0], ["tz"], ["tz", 1], ["tz", ["td", 5, 0, 0]], ["zi", "../../etc/passwd", True],
    ["zi", "No/Where", True], ["zi", 1, True],
    ["uu", "12"], ["uu", 1], ["uu", "0" * 32, "surely"], ["de", "x"], ["de", 1], ["de", "1E+9999999999999999999999"],
    ["fr", 1, 0], ["fr", 1, -1],
    ["fr", 1.5, 2], ["fr", True, 1], ["pa", "Path", "a"], ["pa", "PosixPath", 1], ["ip", "IPv4Address", "x"],
    ["ip", "str", "x"], ["ip", "IPv4Address", 1],
    ["dq"], ["dq", -1], ["dq", 1, 1, 2], ["dq", "a"], ["co", 1], ["od", "a"], ["cx", 1, 2], ["cx", 1.5], ["ra", 1, 2],
    ["ra", 1, 2, 0], ["ra", 1.5, 2, 1],
    ["...", 1], ["l", ["?"]], {"a": ["?"]}, ["c", "Plain", {}, None, None],
]  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_forms_are_decode_errors(data: Any) -> None:
    with pytest.raises(DecodeError):
        decode(RICH, orjson.dumps(data), classes_of(Plain))


@pytest.mark.parametrize(
    ("value", "state"),
    [
        (Plain(1), [{"nope": 1}]), (Plain(1), [{}, {}]), (Plain(1), [[]]), (Plain(1), [None]), (Point(1), [{"x": 1}]),
        (Point(1), [{"y": 1, "x": 2}]),
        (Colour.RED, [{}, "GREEN"]), (Colour.RED, [{}, 1]), (Colour.RED, [{"a": 1}, "RED"]), (Colour.RED, [{}]),
        (Access.READ, [{}, 64]),
        (Access.READ, [{}, True]), (model(), [{"name": "a"}]),
        (model(), [{"x": 1}, {"set": None, "extra": None, "private": None}]),
        (Record("a"), [{}]), (Record("a"), [{"x": 1, "note": 1, "tags": 2}]),
        (Record("a"), [{"name": 1}, ["t", "name", "note"]]),
        (Record("a"), [{"name": 1}, "ab"]), (Record("a"), [{"name": 1}, ["t", ["l"], 1]]),
    ],
)  # fmt: skip
def test_hostile_state_is_a_decode_error(value: Any, state: list[Any]) -> None:
    classes = classes_of(type(value))
    name = next(iter(classes.by_id))
    with pytest.raises(DecodeError):
        decode(RICH, orjson.dumps(["c", name, *state]), classes)


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"nan", b"[1] x", b"\xff", b'"\\ud800"', b"[" * 5000, b'["l",' * 5000 + b"1" + b"]" * 5000]
)
@pytest.mark.parametrize("codec", [PLAIN, RICH])
def test_bytes_that_are_no_json_are_decode_errors(payload: bytes, codec: int) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(codec, payload)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_nesting_deeper_than_the_stack_is_a_decode_error() -> None:
    with pytest.raises(DecodeError):
        decode(RICH, b'["l",' * 1000 + b"1" + b"]" * 1000)


def test_an_unknown_codec_is_a_decode_error() -> None:
    for codec in (0, 4, 255):
        with pytest.raises(DecodeError):
            decode(codec, b"1")


def test_bombs_are_not_carried_out() -> None:
    assert decode(RICH, orjson.dumps(["ra", 0, ["i", hex(10**400)], 1])) == range(10**400)
    assert decode(RICH, orjson.dumps(["de", "1E+999999999"])) == Decimal("1E+999999999")
    wide = hex(3**400_000)
    made: Any = decode(RICH, orjson.dumps(["fr", ["i", wide], ["i", wide]]))
    assert made.denominator == 3**400_000


tagged_noise = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=4) | st.floats(allow_nan=False,
    allow_infinity=False),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3)
    | st.builds(
        lambda tag, items: [tag, *items],
        st.sampled_from(sorted(_READERS)),
        st.lists(inner | st.sampled_from(list(ALL.by_id)), max_size=4),
    ),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=400)
@given(tagged_noise)
def test_noise_is_a_value_or_a_decode_error(data: Any) -> None:
    try:
        decode(RICH, orjson.dumps(data), ALL)
    except DecodeError:
        pass


@given(st.binary(max_size=60), st.integers(0, 4))
def test_random_bytes_are_a_value_or_a_decode_error(payload: bytes, codec: int) -> None:
    try:
        decode(codec, payload, ALL)
    except DecodeError:
        pass
