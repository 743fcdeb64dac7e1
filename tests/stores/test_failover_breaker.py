"""When a store is left alone, and when it is looked at again: with numbers, without an event loop."""

from __future__ import annotations

import pytest

from mcp_hub_cache.stores._failover_breaker import Backoff, Breaker
from mcp_hub_cache.testing import FakeClock


class _Rng:
    """Chance, as the test wants it: just below 1 is no jitter at all."""

    def __init__(self) -> None:
        self.value = 1.0

    def __call__(self) -> float:
        return self.value


def _breaker(clock: FakeClock, rng: _Rng | None = None, *, failures: int = 3) -> Breaker:
    return Breaker(failures=failures, probe_after=0.5, probe_max=4.0, clock=clock, rng=rng or _Rng())


def test_waits_double_up_to_the_bound_and_shrink_by_half_at_most() -> None:
    rng = _Rng()
    backoff = Backoff(0.5, 4.0, rng)
    assert [backoff.next() for _ in range(6)] == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    backoff.reset()
    rng.value = 0.0
    assert [backoff.next() for _ in range(5)] == [0.25, 0.5, 1.0, 2.0, 2.0]


def test_a_year_of_probes_does_not_overflow() -> None:
    backoff = Backoff(0.5, 15.0, _Rng())
    assert {backoff.next() for _ in range(5000)} == {0.5, 1.0, 2.0, 4.0, 8.0, 15.0}


def test_opens_after_failures_in_a_row() -> None:
    breaker = _breaker(FakeClock())
    breaker.answered()
    assert [breaker.failed(), breaker.failed()] == [False, False]
    breaker.answered()
    assert [breaker.failed(), breaker.failed(), breaker.failed()] == [False, False, True]
    assert breaker.state == "open"


def test_a_store_that_never_answered_has_no_credit() -> None:
    breaker = _breaker(FakeClock())
    assert breaker.failed()
    assert breaker.state == "open"


def test_what_comes_late_changes_nothing() -> None:
    breaker = _breaker(FakeClock())
    breaker.trip()
    breaker.answered()
    assert not breaker.failed()
    assert breaker.state == "open"
    assert breaker.failed_in_a_row == 0


def test_only_a_probe_closes_it() -> None:
    clock = FakeClock()
    breaker = _breaker(clock)
    breaker.trip()
    assert breaker.until_probe() == 0.5
    clock.advance(0.2)
    assert breaker.until_probe() == pytest.approx(0.3)
    clock.advance(5.0)
    assert breaker.until_probe() == 0.0
    breaker.probe()
    assert breaker.state == "half-open"
    breaker.probe_failed()
    assert breaker.state == "open"
    assert breaker.until_probe() == 1.0
    breaker.probe()
    breaker.close()
    assert breaker.state == "closed"
    assert [breaker.failed(), breaker.failed(), breaker.failed()] == [False, False, True]
    assert breaker.until_probe() == 0.5  # a new outage begins with the first wait


def test_a_clock_that_is_set_back_does_not_put_off_the_probe() -> None:
    clock = FakeClock()
    breaker = _breaker(clock)
    breaker.trip()
    clock.advance(-3600.0)
    assert breaker.until_probe() == 0.5


@pytest.mark.parametrize("wrong", [{"failures": 0}, {"probe_after": 0.0}, {"probe_after": 5.0}])
def test_wrong_numbers(wrong: dict[str, float]) -> None:
    numbers = {"failures": 3, "probe_after": 0.5, "probe_max": 4.0} | wrong
    with pytest.raises(ValueError, match="must be"):
        Breaker(
            failures=int(numbers["failures"]),
            probe_after=numbers["probe_after"],
            probe_max=numbers["probe_max"],
            clock=FakeClock(),
            rng=_Rng(),
        )
