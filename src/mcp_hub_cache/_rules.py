"""``Rules``: what a policy means for one cache, as the engine takes it.

Strategy: a policy is resolved once and known from then on, by its identity and the changes that a call makes to
it: ``get_or_load`` may say them anew with every call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final, NamedTuple

from ._async_cache import Seconds
from ._durations import seconds
from ._failures import Failures
from ._freshness import Life
from ._policy import THROTTLE, WAIT, AfterWait, Coalesce, Policy, changed, check_coalesce
from ._tags import as_tags

_MOST_KNOWN: Final = 256


class Rules(NamedTuple):
    """A policy as the engine takes it: nothing left open, durations as seconds. Fields are named as ``Policy``'s.

    Attributes:
        failures: Of ``cache_errors``; None: no exception is an answer.
        fleet: Coalesce in the whole fleet.
    """

    ttl: float | Callable[[Any], Seconds]
    jitter: float
    stale_ttl: float
    throttle: float
    soft_timeout: float | None
    timeout: float | None
    early: float
    cache_if: Callable[[Any], bool] | None
    failures: Failures | None
    tags: tuple[str, ...]
    fleet: bool
    wait_timeout: float
    on_wait_timeout: AfterWait


def rules_of(policy: Policy, *, default_ttl: float, coalesce: Coalesce) -> Rules:
    """Return what *policy* means for a cache with these defaults.

    Raises:
        ValueError: It contradicts them.
    """
    given: Any = policy  # its fields are seconds by now
    ttl = default_ttl if given.ttl is None else given.ttl
    if ttl is default_ttl:
        policy.replace(ttl=default_ttl)  # whether they go together
    return Rules(
        ttl=ttl,
        jitter=given.jitter,
        stale_ttl=given.stale_ttl,
        throttle=THROTTLE if given.throttle is None else given.throttle,
        soft_timeout=given.soft_timeout,
        timeout=given.timeout,
        early=given.early,
        cache_if=given.cache_if,
        failures=None if given.cache_errors is None else Failures(given.cache_errors),
        tags=given.tags,
        fleet=(given.coalesce or coalesce) == "fleet",
        wait_timeout=WAIT if given.wait_timeout is None else given.wait_timeout,
        on_wait_timeout=given.on_wait_timeout or "load",
    )


class Rulebook:
    """What policies mean for one cache.

    Args:
        policy: The cache's own; None: the default one.
        default_ttl: Seconds, where no policy says.
        coalesce: Where no policy says.
        no_fleet: Why loads can't be shared in a fleet; None: they can.

    Raises:
        TypeError: *policy* is none.
        ValueError: They contradict each other.
    """

    def __init__(self, policy: Policy | None, default_ttl: float, coalesce: Coalesce, no_fleet: str | None) -> None:
        check_coalesce(coalesce)
        self._policy = changed(policy, {})
        self._default_ttl = default_ttl
        self._coalesce: Coalesce = coalesce
        self._no_fleet = no_fleet
        self._known: dict[Hashable, tuple[Policy, Rules]] = {}
        own = self.rules(None, {})
        self._own = _life_of(own), own.tags

    def rules(self, policy: Policy | None, changes: dict[str, Any]) -> Rules:
        """Return what *policy*, with *changes* of its options, means; a change to None is none.

        Raises:
            TypeError: There is no such option, or it is of the wrong type.
            ValueError: An option is out of range, contradicts another, or is nothing that the store can do.
        """
        base = self._policy if policy is None else policy
        name: Hashable = (id(base), *((option, type(value), value) for option, value in changes.items()))
        try:
            known = self._known.get(name)
        except TypeError:  # an option that can't be hashed
            name = known = None
        if known is not None and known[0] is base:
            return known[1]
        rules = rules_of(changed(base, changes), default_ttl=self._default_ttl, coalesce=self._coalesce)
        if rules.fleet and self._no_fleet is not None:
            raise ValueError(self._no_fleet)
        if name is not None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[name] = base, rules
        return rules

    def life(
        self, ttl: Seconds | None, policy: Policy | None, tags: Iterable[str]
    ) -> tuple[Callable[[object], Life], tuple[str, ...]]:
        """Return what says how long a value lives that is set so, and its tags. Raises as ``rules``."""
        if ttl is None and policy is None and not tags:
            return self._own
        rules = self.rules(policy, {"ttl": ttl})
        return _life_of(rules), (*rules.tags, *as_tags(tags)) if tags else rules.tags


def _life_of(rules: Rules) -> Callable[[object], Life]:
    ttl = rules.ttl
    if callable(ttl):
        what = "what the function for the ttl returns"
        return lambda value: Life(given := seconds(ttl(value), what), rules.stale_ttl, min(rules.jitter, given / 2))
    life = Life(ttl, rules.stale_ttl, rules.jitter)
    return lambda _: life
