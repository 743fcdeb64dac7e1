"""Decisions about time, with numbers: spans, freshness, and when to refresh ahead."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mcp_hub_cache import FOREVER
from mcp_hub_cache._durations import MAX_SECONDS
from mcp_hub_cache._frame import Head, pack, unpack_head
from mcp_hub_cache._freshness import SKEW, Freshness, freshness, is_fresh, lead, span, stands_in
from mcp_hub_cache._tokens import draw

NOW = 1_700_000_000.0
DRAWS = st.floats(2.0**-53, 1.0)
COSTS = st.floats(1e-3, 1e3)
BETAS = st.floats(1e-2, 100.0)


def head(created: float, fresh_until: float, keep_until: float, *, cost: float = 0.0) -> Head:
    frame = pack(b"k", b"", token=bytes(8), created=created, fresh_until=fresh_until, keep_until=keep_until, cost=cost)
    return unpack_head(frame)


# Spans


def test_a_span_is_absolute() -> None:
    until = span(NOW, 60.0, 30.0)
    assert (until.fresh_until, until.keep_until) == (NOW + 60, NOW + 90)
    assert until.keep(NOW) == 90
    assert until.keep(NOW + 10) == 80


def test_forever_is_kept_forever() -> None:
    until = span(NOW, FOREVER)
    assert until.fresh_until == until.keep_until == math.inf
    assert until.keep(NOW) is None
    assert span(NOW, FOREVER, 5.0).keep(NOW) is None
    assert span(NOW, 5.0, FOREVER).keep(NOW) is None


@pytest.mark.parametrize(("drawn", "fresh"), [(0.0, 60.0), (0.5, 55.0), (1.0, 50.0)])
def test_jitter_takes_away(drawn: float, fresh: float) -> None:
    until = span(NOW, 60.0, 30.0, 10.0, drawn)
    assert (until.fresh_until, until.keep_until) == (NOW + fresh, NOW + fresh + 30)


@given(st.floats(1e-3, 1e9), st.floats(0, 1e6), st.floats(0, 0.999), st.floats(0, 1))
def test_jitter_never_lets_anything_outlive_its_ttl(ttl: float, stale: float, part: float, drawn: float) -> None:
    until = span(NOW, ttl, stale, ttl * part, drawn)
    assert NOW <= until.fresh_until <= NOW + ttl
    assert until.keep_until == until.fresh_until + stale


# Freshness


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (0.0, Freshness.FRESH),
        (59.999, Freshness.FRESH),
        (60.0, Freshness.STALE),
        (89.999, Freshness.STALE),
        (90.0, Freshness.EXPIRED),
        (1e9, Freshness.EXPIRED),
        (-SKEW, Freshness.FRESH),  # another host's clock may be a little ahead
        (-SKEW - 0.001, Freshness.EXPIRED),  # the clock was set back
        (-1e9, Freshness.EXPIRED),
    ],
)
def test_freshness(at: float, expected: Freshness) -> None:
    assert freshness(head(NOW, NOW + 60, NOW + 90), NOW + at) is expected


@pytest.mark.parametrize(
    ("at", "asked", "expected"),
    [
        (60.0, 0.0, Freshness.EXPIRED),
        (69.999, 10.0, Freshness.STALE),
        (70.0, 10.0, Freshness.EXPIRED),
        (89.999, 1000.0, Freshness.STALE),
        (90.0, 1000.0, Freshness.EXPIRED),  # it is kept no longer, whatever is asked
        (59.999, 0.0, Freshness.FRESH),
    ],
)
def test_both_must_allow_what_is_stale(at: float, asked: float, expected: Freshness) -> None:
    assert freshness(head(NOW, NOW + 60, NOW + 90), NOW + at, stale_ttl=asked) is expected


@pytest.mark.parametrize(
    ("at", "early", "drawn", "expected"),
    [
        (53.0, 1.0, math.exp(-3), Freshness.FRESH),  # 2 s times 1 times 3 ahead
        (54.1, 1.0, math.exp(-3), Freshness.EARLY),
        (48.1, 2.0, math.exp(-3), Freshness.EARLY),
        (59.999, 0.0, 1e-15, Freshness.FRESH),
        (59.999, 1.0, 1.0, Freshness.FRESH),
        (60.0, 1.0, 1e-15, Freshness.STALE),
        (90.0, 1.0, 1e-15, Freshness.EXPIRED),
    ],
)
def test_early(at: float, early: float, drawn: float, expected: Freshness) -> None:
    entry = head(NOW, NOW + 60, NOW + 90, cost=2.0)
    assert freshness(entry, NOW + at, early=early, draw=drawn) is expected


def test_forever_is_fresh_forever() -> None:
    assert freshness(head(NOW, math.inf, math.inf), NOW + 1e12) is Freshness.FRESH
    assert freshness(head(NOW, math.inf, math.inf, cost=1e6), NOW, early=100.0, draw=1e-15) is Freshness.FRESH


def test_nonsense_times_are_never_fresh() -> None:
    nan = math.nan
    assert freshness(head(NOW, nan, NOW + 90), NOW) is not Freshness.FRESH
    assert freshness(head(NOW, NOW + 90, NOW + 60), NOW + 70) is Freshness.EXPIRED
    assert freshness(head(NOW, nan, nan), NOW) is Freshness.EXPIRED
    assert freshness(head(nan, NOW + 60, NOW + 90), NOW) is Freshness.EXPIRED


@given(st.floats(1e-3, MAX_SECONDS), st.floats(0, 1e6), st.floats(0, 1e10))
def test_nothing_outlives_its_ttl(ttl: float, stale: float, later: float) -> None:
    until = span(NOW, ttl, stale)
    state = freshness(head(NOW, *until), NOW + later)
    if NOW + later >= until.fresh_until:
        assert state is not Freshness.FRESH
    else:
        assert state is Freshness.FRESH


@given(st.floats(1, 1e4), st.floats(0, 1e4), st.floats(-20, 3e4), st.floats(0, 2e4), st.floats(0, 100), COSTS, DRAWS)
def test_the_four_are_told_apart_as_reads_do(  # noqa: PLR0917  # what is drawn
    ttl: float, stale: float, later: float, asked: float, early: float, cost: float, drawn: float
) -> None:
    entry, now = head(NOW, *span(NOW, ttl, stale), cost=cost), NOW + later
    state = freshness(entry, now, stale_ttl=asked, early=early, draw=drawn)
    assert (state in {Freshness.FRESH, Freshness.EARLY}) is is_fresh(entry, now)
    assert (state is Freshness.STALE) is (not is_fresh(entry, now) and stands_in(entry, now, asked))


# XFetch


@given(COSTS, BETAS, DRAWS, st.floats(0, 1e5))
def test_lead_is_the_papers_rule(cost: float, beta: float, drawn: float, remaining: float) -> None:
    """Refresh when time() - delta * beta * log(rand()) >= expiry (figure 1 there; expiry at *remaining*)."""
    ahead = lead(cost, beta, drawn)
    assume(not math.isclose(ahead, remaining, rel_tol=1e-9))
    assert (ahead >= remaining) is (0 - cost * beta * math.log(drawn) >= remaining)


@given(COSTS, BETAS, DRAWS, st.floats(1.0, 10.0))
def test_the_lead_grows_with_cost_and_beta_and_luck(cost: float, beta: float, drawn: float, more: float) -> None:
    ahead = lead(cost, beta, drawn)
    assert ahead >= 0
    assert lead(cost * more, beta, drawn) >= ahead
    assert lead(cost, beta * more, drawn) >= ahead
    assert lead(cost, beta, drawn / more) >= ahead


@given(COSTS, BETAS, st.floats(0.0, 5.0))
def test_an_entry_is_refreshed_ahead_with_the_papers_probability(cost: float, beta: float, away: float) -> None:
    """P(lead >= remaining) = exp(-remaining / (beta * delta)): it grows with cost, and falls with remaining time."""
    remaining = away * cost * beta
    rng = random.Random(1)
    draws = [1.0 - rng.random() for _ in range(2000)]
    share = sum(lead(cost, beta, each) >= remaining for each in draws) / len(draws)
    assert share == pytest.approx(math.exp(-away), abs=0.06)


@given(COSTS, st.floats(0.0, 100.0), st.floats(1.0, 10.0))
def test_of_the_same_draws_more_refresh_the_longer_it_takes_and_the_less_is_left(
    cost: float, remaining: float, more: float
) -> None:
    rng = random.Random(2)
    draws = [1.0 - rng.random() for _ in range(200)]

    def refreshed(cost: float, remaining: float) -> int:
        entry = head(NOW, NOW + 200, NOW + 200, cost=cost)
        now = NOW + 200 - remaining
        return sum(freshness(entry, now, early=1.0, draw=each) is Freshness.EARLY for each in draws)

    assume(remaining > 0.001)
    assert refreshed(cost * more, remaining) >= refreshed(cost, remaining)
    assert refreshed(cost, remaining / more) >= refreshed(cost, remaining)


def test_draws_are_spread_over_what_lead_takes() -> None:
    draws = [draw() for _ in range(20_000)]
    assert all(0 < each <= 1 for each in draws)
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.02)
    assert sum(each < 0.1 for each in draws) / len(draws) == pytest.approx(0.1, abs=0.02)
