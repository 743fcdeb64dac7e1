"""``Policy``: what each option takes, what it refuses in which words, and where policies come from."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from dataclasses import FrozenInstanceError, fields
from datetime import timedelta
from typing import Any

import pytest

from mcp_hub_cache import FOREVER, Cache, Policy, acached
from mcp_hub_cache._policy import DEFAULT, MAX_EARLY, THROTTLE, WAIT, changed
from mcp_hub_cache._rules import Rules, rules_of
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock
from tests.backends import Plain

HOUR = {"stale_ttl": "1h"}
FLEET = {"coalesce": "fleet"}


class NotFound(Exception):
    pass


class Slotted(Exception):
    __slots__ = ("field",)


def plain(value: object) -> Any:
    return value


async def awaited(value: object) -> Any:
    return value


# What each option takes. (option, given, kept, what else it needs)

TAKEN: list[tuple[str, Any, Any, dict[str, Any]]] = [
    *(("ttl", given, kept, {}) for given, kept in ((5, 5.0), ("10m", 600.0), (timedelta(hours=1), 3600.0))),
    *(("ttl", given, given, {}) for given in (None, FOREVER, plain, 0.001)),
    *(("jitter", given, kept, {"ttl": "1h"}) for given, kept in ((0, 0.0), (5, 5.0), ("10m", 600.0))),
    ("jitter", timedelta(minutes=1), 60.0, {"ttl": plain}),
    ("jitter", 1e6, 1e6, {}),  # the cache's ttl is not known yet
    *(("stale_ttl", given, kept, {}) for given, kept in ((0, 0.0), ("1d", 86_400.0), (timedelta(days=1), 86_400.0))),
    ("stale_ttl", FOREVER, FOREVER, {}),
    *(("throttle", given, kept, HOUR) for given, kept in ((0, 0.0), (1, 1.0), ("250ms", 0.25), (None, None))),
    *(("soft_timeout", given, kept, HOUR) for given, kept in ((0, 0.0), (1, 1.0), ("250ms", 0.25), (None, None))),
    *(("timeout", given, kept, {}) for given, kept in ((1, 1.0), ("2m", 120.0), (timedelta(seconds=2), 2.0))),
    ("timeout", None, None, {}),
    *(("early", given, kept, {}) for given, kept in ((0, 0.0), (1, 1.0), (0.5, 0.5), (MAX_EARLY, 100.0))),
    *(("cache_if", given, given, {}) for given in (None, plain, bool)),
    ("cache_errors", None, None, {}),
    ("cache_errors", {}, None, {}),
    ("cache_errors", {NotFound: "30s", LookupError: 5}, {NotFound: 30.0, LookupError: 5.0}, {}),
    ("cache_errors", {NotFound: FOREVER}, {NotFound: math.inf}, {}),
    ("tags", (), (), {}),
    ("tags", ["a", "b", "a"], ("a", "b"), {}),
    ("tags", iter(["a"]), ("a",), {}),
    *(("coalesce", given, given, {}) for given in (None, "process", "fleet")),
    *(("wait_timeout", given, kept, FLEET) for given, kept in ((1, 1.0), ("2m", 120.0), (None, None))),
    ("wait_timeout", 1, 1.0, {}),  # the cache may be a fleet's
    *(("on_wait_timeout", given, given, FLEET) for given in (None, "load", "error")),
    ("on_wait_timeout", "stale", "stale", FLEET | HOUR),
]


@pytest.mark.parametrize(("option", "given", "kept", "more"), TAKEN, ids=lambda item: repr(item)[:30])
def test_what_an_option_takes(option: str, given: Any, kept: Any, more: dict[str, Any]) -> None:
    policy = Policy(**{option: given}, **more)
    found = getattr(policy, option)
    assert found == kept
    assert type(found) is type(kept)


def test_every_option_is_tried() -> None:
    names = {field.name for field in fields(Policy)}
    assert {option for option, *_ in TAKEN} == names
    assert {option for option, *_ in REFUSED} == names


# What it refuses, and in which words

DURATIONS = ("ttl", "jitter", "stale_ttl", "throttle", "soft_timeout", "timeout", "wait_timeout")
MAY_BE_0 = ("jitter", "stale_ttl", "throttle", "soft_timeout")
ENDLESS = ("ttl", "stale_ttl")

REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    *((option, -1, ValueError, f"{option} must be .*not -1") for option in DURATIONS),
    *((option, math.nan, ValueError, f"{option} must be .*nan") for option in DURATIONS),
    *((option, True, ValueError, f"{option} must be .*the bool True") for option in DURATIONS),
    *((option, "soon", ValueError, f"{option} must be .*'soon'") for option in DURATIONS),
    *((option, b"5s", TypeError, f"{option} must be .*bytes") for option in DURATIONS),
    *((option, 1e12, ValueError, f"{option} must be at most a hundred years") for option in DURATIONS),
    *((option, 0, ValueError, f"{option} must be more than 0") for option in DURATIONS if option not in MAY_BE_0),
    *((option, FOREVER, ValueError, f"{option} must be .*inf") for option in DURATIONS if option not in ENDLESS),
    *((option, None, TypeError, f"{option} must be .*NoneType") for option in ("jitter", "stale_ttl")),
    ("ttl", awaited, TypeError, "ttl must be a plain function: nothing is awaited"),
    ("cache_if", awaited, TypeError, "cache_if must be a plain function: nothing is awaited"),
    ("cache_if", True, TypeError, "cache_if must be a function of the result, not bool"),
    *(("early", value, ValueError, "early must be 0 to 100, .*1 is a good value") for value in (-0.1, 100.1, math.nan)),
    *(("early", value, TypeError, "early must be a number, the beta of XFetch") for value in (True, "1", None)),
    ("cache_errors", NotFound, TypeError, r'cache_errors must be a mapping .*cache_errors=\{NotFound: "30s"\}'),
    ("cache_errors", [NotFound], TypeError, "cache_errors must be a mapping .*not list"),
    ("cache_errors", {NotFound: 0}, ValueError, r"cache_errors\[NotFound\] must be more than 0"),
    ("cache_errors", {NotFound: "soon"}, ValueError, r"cache_errors\[NotFound\] must be .*'soon'"),
    ("cache_errors", {NotFound(): 1}, TypeError, "cache_errors: .*name the class itself"),
    ("cache_errors", {int: 1}, TypeError, "cache_errors: builtins.int is no exception"),
    ("cache_errors", {KeyboardInterrupt: 1}, TypeError, "cache_errors: .*is no answer"),
    ("cache_errors", {StopIteration: 1}, TypeError, "cache_errors: .*can't be raised by a coroutine"),
    ("cache_errors", {ExceptionGroup: 1}, TypeError, "cache_errors: .*can't be rebuilt"),
    ("cache_errors", {Slotted: 1}, TypeError, "cache_errors: .*Slotted can't be rebuilt: .*__slots__"),
    ("cache_errors", {UnicodeDecodeError: 1}, TypeError, "cache_errors: builtins.UnicodeDecodeError can't be rebuilt"),
    ("tags", "user:42", TypeError, 'tags must be several texts, such as tags=\\["user:42"\\], not str'),
    ("tags", 42, TypeError, "tags must be several texts"),
    ("tags", None, TypeError, "tags must be several texts"),
    ("tags", [42], TypeError, 'a tag must be text, such as "user:42", not int'),
    ("tags", [""], ValueError, "a tag has 1 to 1,024 characters, not 0"),
    ("tags", ["x" * 1025], ValueError, "a tag has 1 to 1,024 characters, not 1,025"),
    ("coalesce", "Fleet", ValueError, 'coalesce must be "process" or "fleet", not \'Fleet\''),
    ("coalesce", True, ValueError, 'coalesce must be "process" or "fleet", not True'),
    ("on_wait_timeout", "wait", ValueError, 'on_wait_timeout must be "load", "stale" or "error", not \'wait\''),
]

NEEDS_STALE = 'needs something stale to serve: give a stale_ttl, such as stale_ttl="1h"'
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"soft_timeout": 0}, f"soft_timeout {NEEDS_STALE}.* or leave soft_timeout out"),
    ({"soft_timeout": "1s", "stale_ttl": 0}, f"soft_timeout {NEEDS_STALE}"),
    ({"throttle": "5s"}, f"throttle {NEEDS_STALE}.* or leave throttle out"),
    ({"throttle": 0}, f"throttle {NEEDS_STALE}"),
    ({"on_wait_timeout": "stale", "coalesce": "fleet"}, f'on_wait_timeout="stale" {NEEDS_STALE}'),
    (
        {"soft_timeout": 5, "timeout": "5s", **HOUR},
        r"soft_timeout \(5 s\) must be less than timeout \(5 s\).* lower the one or raise the other",
    ),
    ({"soft_timeout": "1m", "timeout": "5s", **HOUR}, r"soft_timeout \(60 s\) must be less than timeout \(5 s\)"),
    ({"ttl": 60, "jitter": 60}, r"jitter \(60 s\) must be less than ttl \(60 s\), which it shortens"),
    ({"ttl": 60, "jitter": "1h"}, r"jitter \(3600 s\) must be less than ttl \(60 s\)"),
    ({"ttl": FOREVER, "jitter": 1}, "jitter means nothing where ttl is FOREVER: leave it out, or give a finite ttl"),
    ({"ttl": FOREVER, "early": 1}, "early means nothing where ttl is FOREVER"),
    ({"ttl": FOREVER, "stale_ttl": 1}, "stale_ttl means nothing where ttl is FOREVER"),
    ({"coalesce": "process", "wait_timeout": 1}, 'on other processes: say coalesce="fleet", or leave them out'),
    ({"coalesce": "process", "on_wait_timeout": "load"}, 'on other processes: say coalesce="fleet"'),
    # Only together with what the cache is set to, which is an hour:
    ({"jitter": "1h"}, r"jitter \(3600 s\) must be less than ttl \(3600 s\)"),
]
OF_THE_POLICY = CONTRADICTIONS[:-1]


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    async with Cache(MemoryStore(clock=FakeClock())) as cache:
        yield cache


@pytest.mark.parametrize(("option", "given", "error", "text"), REFUSED, ids=lambda item: repr(item)[:30])
def test_what_an_option_refuses(option: str, given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Policy(**{option: given}, **({} if option == "stale_ttl" else HOUR))


@pytest.mark.parametrize(("options", "text"), OF_THE_POLICY, ids=lambda item: repr(item)[:50])
def test_what_contradicts_itself(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Policy(**options)
    with pytest.raises(ValueError, match=text):
        Policy(ttl=120).replace(**options)


@pytest.mark.parametrize(("options", "text"), CONTRADICTIONS, ids=lambda item: repr(item)[:50])
async def test_contradictions_are_said_at_decoration_and_before_anything_is_asked(
    cache: Cache, options: dict[str, Any], text: str
) -> None:
    calls = 0

    async def load() -> int:
        nonlocal calls
        calls += 1
        return 1

    with pytest.raises(ValueError, match=text):
        acached(cache=cache, **options)(load)
    with pytest.raises(ValueError, match=text):
        await cache.get_or_load("k", load, **options)
    with pytest.raises(ValueError, match=text):
        acached(cache=cache)(load).with_policy(**options)
    assert (calls, cache.stats.misses) == (0, 0)


@pytest.mark.parametrize(("options", "text"), OF_THE_POLICY, ids=lambda item: repr(item)[:50])
def test_contradictions_are_said_at_decoration_where_no_cache_is_known(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        acached(**options)
    with pytest.raises(ValueError, match=text):
        acached(cache=lambda: Cache(MemoryStore()), **options)


@pytest.mark.parametrize("given", [True, None])
async def test_an_unknown_option_is_named_with_those_there_are(cache: Cache, given: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: acached(cache=cache, soft_ttl=given),
        lambda: acached(soft_ttl=given),
        lambda: changed(None, {"soft_ttl": given}),
        lambda: cache.rules(soft_ttl=given),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"there is no option soft_ttl; a policy has .*soft_timeout, stale_ttl, "):
            call()
    with pytest.raises(TypeError, match="there is no option soft_ttl"):
        await cache.get_or_load("k", lambda: awaited(1), soft_ttl=given)  # type: ignore[call-arg]


@pytest.mark.parametrize("given", [{"ttl": 5}, "10m", 600, Policy])
async def test_what_is_no_policy(cache: Cache, given: Any) -> None:
    async def load() -> int:
        return 1

    with pytest.raises(TypeError, match="policy must be a Policy, not "):
        acached(policy=given)
    with pytest.raises(TypeError, match="policy must be a Policy, not "):
        acached(policy=given, cache=cache)
    with pytest.raises(TypeError, match="policy must be a Policy, not "):
        Cache(MemoryStore(), policy=given)
    with pytest.raises(TypeError, match="policy must be a Policy, not "):
        await cache.get_or_load("k", load, policy=given)
    with pytest.raises(TypeError, match="policy must be a Policy, not "):
        await cache.set("k", 1, policy=given)


async def test_fleet_needs_leases() -> None:
    async def load() -> int:
        return 1

    text = 'coalesce="fleet" needs a store with leases, which memory has not: use Redis or files'
    store = Plain(MemoryStore())
    async with Cache(store) as cache:
        with pytest.raises(ValueError, match=text):
            acached(cache=cache, coalesce="fleet")
        with pytest.raises(ValueError, match=text):
            await cache.get_or_load("k", load, policy=Policy(coalesce="fleet"))
        assert store.calls == {}
        assert await cache.get_or_load("k", load, coalesce="process") == 1
    with pytest.raises(ValueError, match=text):
        Cache(Plain(MemoryStore()), coalesce="fleet")
    Cache(MemoryStore(), coalesce="fleet")  # which has them


@pytest.mark.parametrize("given", ["Fleet", "", True, 1])
def test_a_caches_own_coalesce_is_checked(given: Any) -> None:
    with pytest.raises(ValueError, match='coalesce must be "process" or "fleet", not '):
        Cache(MemoryStore(), coalesce=given)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_max_refreshes_is_a_number_of_refreshes(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_refreshes must be "):
        Cache(MemoryStore(), max_refreshes=value)


# Policies as objects


def test_a_policy_never_changes() -> None:
    policy = Policy(ttl="10m", tags=["a"], cache_errors={NotFound: 1})
    with pytest.raises(FrozenInstanceError):
        policy.ttl = 5  # type: ignore[misc]
    assert policy == Policy(ttl=600, tags=("a",), cache_errors={NotFound: 1.0})


def test_a_mapping_of_errors_is_copied() -> None:
    given: dict[type[Exception], Any] = {NotFound: 1}
    policy = Policy(cache_errors=given)
    given[LookupError] = 5
    assert policy.cache_errors == {NotFound: 1.0}


def test_replace() -> None:
    policy = Policy(ttl="10m", stale_ttl="1h", soft_timeout=0, tags=["a"])
    other = policy.replace(ttl="1m", tags=["b"])
    assert (other.ttl, other.stale_ttl, other.soft_timeout, other.tags) == (60.0, 3600.0, 0.0, ("b",))
    assert (policy.ttl, policy.tags) == (600.0, ("a",))
    assert policy.replace(ttl=None).ttl is None
    assert policy.replace(soft_timeout=None, stale_ttl=0) == Policy(ttl="10m", tags=["a"])
    with pytest.raises(ValueError, match="soft_timeout needs something stale"):
        policy.replace(stale_ttl=0)
    with pytest.raises(TypeError, match="bogus"):
        policy.replace(bogus=1)


def test_what_is_left_open_is_as_the_cache_is_set() -> None:
    rules = rules_of(DEFAULT, default_ttl=99.0, coalesce="fleet")
    assert (rules.ttl, rules.fleet, rules.throttle, rules.wait_timeout) == (99.0, True, THROTTLE, WAIT)
    assert rules.on_wait_timeout == "load"
    rules = rules_of(Policy(ttl=5, coalesce="process"), default_ttl=99.0, coalesce="fleet")
    assert (rules.ttl, rules.fleet) == (5.0, False)
    rules = rules_of(Policy(stale_ttl=5, throttle=0, soft_timeout=0), default_ttl=99.0, coalesce="process")
    assert (rules.throttle, rules.soft_timeout, rules.stale_ttl) == (0.0, 0.0, 5.0)
    assert set(Rules._fields) - {"failures", "fleet"} == {field.name for field in fields(Policy)} - {
        "cache_errors",
        "coalesce",
    }


@pytest.mark.parametrize("option", ["jitter", "early", "stale_ttl"])
def test_a_policy_is_checked_with_the_caches_default(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} means nothing where ttl is FOREVER"):
        Cache(MemoryStore(), default_ttl=FOREVER, policy=Policy(**{option: 1}))
    Cache(MemoryStore(), default_ttl=FOREVER, policy=Policy(ttl=60, **{option: 1}))
