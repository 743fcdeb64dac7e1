"""``Policy``: how results are kept, refreshed and shared. Options, checked together, once.

Rules:
- Durations are seconds as float once they are in.
- What contradicts itself is an error that says what to change, when the policy is made: at decoration.
- A policy never changes: what a loader decides for its one entry (``current_entry``) touches no policy.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, Self

from ._async_cache import Seconds
from ._durations import seconds
from ._failures import check_class
from ._tags import as_tags

Coalesce = Literal["process", "fleet"]
AfterWait = Literal["load", "stale", "error"]

THROTTLE: Final = 30.0
WAIT: Final = 30.0
MAX_EARLY: Final = 100.0

_HOW_TO_STAND_IN: Final = 'give a stale_ttl, such as stale_ttl="1h", for which an entry is kept to stand in'


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How results are kept, refreshed and shared; for ``@acached``, ``get_or_load``, ``set``, and any number of them.

    Every duration is seconds as a number, text with units ("10m", "1h30m", "250ms") or a ``timedelta``; once in the
    policy, it is seconds as float.

    Args:
        ttl: How long a result stays fresh, more than 0; a function that gives it for a result (0 or less: the result
            is not stored; ``set`` raises); None: the cache's default; ``FOREVER``: no end.
        jitter: Up to so much is taken off each entry's ttl by chance, so that what was stored together does not expire
            together; less than *ttl*. Where the ttl is decided for each result, at most half of that.
        stale_ttl: How much longer it may stand in where a load fails (fail-safe) or is slow (*soft_timeout*); 0: not at
            all. ``get`` never returns it.
        throttle: After a load of its that failed, what is stale stands in for so long before anybody's next try, in
            the whole fleet; 0: the next call tries; None: 30 seconds.
        soft_timeout: With something stale at hand, wait only so long for the load, then serve what is stale while
            the load goes on in the background. 0: serve it at once (stale-while-revalidate). None: wait.
        timeout: A loader that takes longer is cancelled, and who waits gets ``LoadTimeoutError``, or what is stale.
            Of callers who share a load, the leader's holds. None: no bound.
        early: Refresh in the background ahead of expiry, at random, the sooner the longer loading takes: the beta of
            XFetch (Vattani and others, VLDB 2015), 0 to 100. 1 is a good value; 0: never.
        cache_if: Called with a loader's result; false: it is returned, not stored. ``set`` does not ask.
        cache_errors: Exceptions that are answers, and how long each is cached: ``{NotFound: "30s"}``. Raised again,
            rebuilt from class, args and attributes, without traceback and cause. Fail-safe does not hide them, and
            ``get`` does not see them.
        tags: Marks for ``invalidate``, each of 1 to 1,024 characters.
        coalesce: "process": one load per key in a process. "fleet": one in all processes that share the store; the
            others wait for its result. None: as the cache is set.
        wait_timeout: How long to wait for other processes' loads, in a fleet; None: 30 seconds.
        on_wait_timeout: Then "load" themselves, serve what is "stale" if there is something and else load, or raise
            "error", a ``LoadTimeoutError``. None: load.

    Raises:
        ValueError: An option is out of range, or contradicts another.
        TypeError: An option is of the wrong type, or *cache_errors* names what can't be rebuilt.

    Example:
        >>> shared = Policy(ttl="10m", stale_ttl="1h", soft_timeout=0)
        >>> shared.replace(ttl="1m").ttl
        60.0
    """

    ttl: Seconds | Callable[[Any], Seconds] | None = None
    jitter: Seconds = 0.0
    stale_ttl: Seconds = 0.0
    throttle: Seconds | None = None
    soft_timeout: Seconds | None = None
    timeout: Seconds | None = None
    early: float = 0.0
    cache_if: Callable[[Any], bool] | None = None
    cache_errors: Mapping[type[Exception], Seconds] | None = None
    tags: Iterable[str] = ()
    coalesce: Coalesce | None = None
    wait_timeout: Seconds | None = None
    on_wait_timeout: AfterWait | None = None

    def __post_init__(self) -> None:
        """Check it, and make seconds of durations."""
        if self.ttl is not None and not callable(self.ttl):
            self._put("ttl", seconds(self.ttl))
        self._put("jitter", seconds(self.jitter, "jitter", zero=True, endless=False))
        self._put("stale_ttl", seconds(self.stale_ttl, "stale_ttl", zero=True))
        for name in ("throttle", "soft_timeout"):
            if (given := getattr(self, name)) is not None:
                self._put(name, seconds(given, name, zero=True, endless=False))
        for name in ("timeout", "wait_timeout"):
            if (given := getattr(self, name)) is not None:
                self._put(name, seconds(given, name, endless=False))
        self._put("early", _early(self.early))
        self._check_functions()
        self._put("cache_errors", _cache_errors(self.cache_errors))
        self._put("tags", as_tags(self.tags))
        if self.coalesce is not None:
            check_coalesce(self.coalesce)
        if self.on_wait_timeout not in {None, "load", "stale", "error"}:
            raise ValueError(f'on_wait_timeout must be "load", "stale" or "error", not {self.on_wait_timeout!r}')
        self._refuse_contradictions()

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_functions(self) -> None:
        if self.cache_if is not None and not callable(self.cache_if):
            raise TypeError(f"cache_if must be a function of the result, not {type(self.cache_if).__name__}")
        for name in ("cache_if", "ttl"):
            if inspect.iscoroutinefunction(getattr(self, name)):
                raise TypeError(f"{name} must be a plain function: nothing is awaited for its answer")

    def _refuse_contradictions(self) -> None:
        if not self.stale_ttl:
            for name in ("soft_timeout", "throttle"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs something stale to serve: {_HOW_TO_STAND_IN}, or leave {name} out")
            if self.on_wait_timeout == "stale":
                raise ValueError(f'on_wait_timeout="stale" needs something stale to serve: {_HOW_TO_STAND_IN}')
        soft, hard = self.soft_timeout, self.timeout
        if isinstance(soft, float) and isinstance(hard, float) and soft >= hard:
            raise ValueError(
                f"soft_timeout ({soft:g} s) must be less than timeout ({hard:g} s), which ends the load: lower the one "
                "or raise the other"
            )
        if self.ttl == math.inf:
            for name in ("jitter", "early", "stale_ttl"):
                if getattr(self, name):
                    raise ValueError(f"{name} means nothing where ttl is FOREVER: leave it out, or give a finite ttl")
        elif isinstance(self.ttl, float) and isinstance(self.jitter, float) and self.jitter >= self.ttl:
            raise ValueError(f"jitter ({self.jitter:g} s) must be less than ttl ({self.ttl:g} s), which it shortens")
        if self.coalesce == "process" and (self.wait_timeout is not None or self.on_wait_timeout is not None):
            raise ValueError(
                'wait_timeout and on_wait_timeout are for waiting on other processes: say coalesce="fleet", or leave '
                "them out"
            )

    def replace(self, **changes: Any) -> Self:
        """Return a policy that differs from this one in *changes*, checked as a whole. None: the option's default."""
        return replace(self, **changes)


def changed(policy: object, changes: Mapping[str, object]) -> Policy:
    """Return *policy*, the default where it is None, with those of *changes* that are not None.

    Raises:
        TypeError: It is no policy, there is no such option, or one is of the wrong type.
        ValueError: An option is out of range, or contradicts another.
    """
    base = DEFAULT if policy is None else policy
    if not isinstance(base, Policy):
        raise TypeError(f'policy must be a Policy, not {type(policy).__name__}: Policy(ttl="10m")')
    if not FIELDS.issuperset(changes):
        unknown = ", ".join(sorted(changes.keys() - FIELDS))
        raise TypeError(f"there is no option {unknown}; a policy has {', '.join(sorted(FIELDS))}")
    given = {name: value for name, value in changes.items() if value is not None}
    return base.replace(**given) if given else base


def check_coalesce(value: object) -> None:
    """Raise ``ValueError`` for what is no way to coalesce."""
    if value not in {"process", "fleet"}:
        raise ValueError(f'coalesce must be "process" or "fleet", not {value!r}')


def _early(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"early must be a number, the beta of XFetch (1 is a good value), not {type(value).__name__}")
    if not 0 <= value <= MAX_EARLY:
        raise ValueError(f"early must be 0 to {MAX_EARLY:g}, not {value!r}; 1 is a good value")
    return float(value)


def _cache_errors(given: object) -> Mapping[type[Exception], float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(
            f"cache_errors must be a mapping of exception classes to durations, not {type(given).__name__}: "
            'cache_errors={NotFound: "30s"}'
        )
    for each in given:
        check_class(each)
    return {each: seconds(ttl, f"cache_errors[{each.__qualname__}]") for each, ttl in given.items()} or None


FIELDS: Final = frozenset(field.name for field in fields(Policy))
DEFAULT: Final = Policy()
