"""Durations: what is one, what is none, and what is said of it."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_hub_cache import FOREVER
from mcp_hub_cache._durations import MAX_SECONDS, seconds


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (0.001, 0.001),
        (5e-324, 5e-324),
        (FOREVER, math.inf),
        (MAX_SECONDS, MAX_SECONDS),
        ("90s", 90.0),
        ("10m", 600.0),
        ("1h30m", 5400.0),
        ("1h 30m 5s", 5405.0),
        ("250ms", 0.25),
        ("1.5h", 5400.0),
        ("2d", 172_800.0),
        ("1w", 604_800.0),
        ("\t5 s\n", 5.0),
        ("1m1m", 120.0),
        (timedelta(hours=1, milliseconds=5), 3600.005),
        (timedelta(microseconds=1), 1e-6),
    ],
)
def test_durations(value: Any, expected: float) -> None:
    result = seconds(value)
    assert result == pytest.approx(expected)
    assert type(result) is float


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 0.0, -0.0, math.nan, -math.inf, True, False, MAX_SECONDS + 1, 10**400, -(10**400)),
        *("", "  ", "junk", "5", "5x", "s", "1.s", ".5s", "5 sm", "0s", "0h0m", "-1s", "+1s", "1e3s", "5s junk"),
        *("junk 5s", "٣s", "5m\x00", "NaN", "inf", "forever", "36501d", "9" * 300 + "s"),
        *(timedelta(0), timedelta(days=-1), timedelta.max, timedelta.min),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_duration(value: Any) -> None:
    with pytest.raises(ValueError, match="the option must be"):
        seconds(value, "the option")


def test_text_is_never_forever_by_overflow() -> None:
    with pytest.raises(ValueError, match="ttl must be"):
        seconds("9" * 400 + "s")


@pytest.mark.parametrize("value", [None, [], b"5s", object(), 1j, (1,)])
def test_what_is_of_another_type(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"the option must be .*, not {type(value).__name__}"):
        seconds(value, "the option")


def test_an_error_says_what_is_taken() -> None:
    with pytest.raises(ValueError, match=r"1h30m.*FOREVER.*'next week'"):
        seconds("next week")
    with pytest.raises(ValueError, match="must be") as caught:
        seconds("x" * 100_000)
    assert len(str(caught.value)) < 300


@given(st.floats())
def test_any_number_is_a_duration_or_a_value_error(value: float) -> None:
    if value == math.inf or 0 < value <= MAX_SECONDS:
        assert seconds(value) == value
    else:
        with pytest.raises(ValueError, match="must be"):
            seconds(value)


@given(st.text())
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    try:
        assert 0 < seconds(text) <= MAX_SECONDS
    except ValueError as error:
        assert "must be" in str(error)  # noqa: PT017
