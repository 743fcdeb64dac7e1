"""Keys: injective, stable, safe to show; binders that bind as Python binds."""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import math
import re
import subprocess
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pydantic
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mcp_hub_cache
from mcp_hub_cache._exceptions import InvalidKeyError, UncacheableError
from mcp_hub_cache._keys import (
    KeySpace,
    argument_bytes,
    bind,
    bound_names,
    digest,
    function_name,
    join,
    namer,
    template,
)
from tests.golden import GOLDEN, golden_cases, written
from tests.samples import (
    ALL,
    Colour,
    Holder,
    Model,
    MyStr,
    Plain,
    Text,
    anything,
    deep,
    endless,
    endless_dict,
    model,
    same,
)


def spelled(*values: object) -> bytes:
    return argument_bytes([f"a{index}" for index in range(len(values))], values)


# KeySpace


def test_entry_keys_and_back() -> None:
    space = KeySpace("mcp_hub:", "team-1")
    assert space.root == b"mcp_hub:team-1:" and space.entries == b"mcp_hub:team-1:e:"
    for name in ("plan:42", "é漢😀", " ", "\0\n", "e:", "x" * 1024):
        key = space.entry(name)
        assert key == b"mcp_hub:team-1:e:" + name.encode() and space.name_of(key) == name
    assert space.entry(Text.A) == b"mcp_hub:team-1:e:a"
    assert KeySpace("", "x").entry("a") == b"x:e:a"
    assert repr(space) == "KeySpace(prefix='mcp_hub:', namespace='team-1')"


@pytest.mark.parametrize(
    "key", [b"", b"mcp_hub:default:t:a", b"mcp_hub:other:e:a", b"mcp_hub:default:e:", b"mcp_hub:default:e:\xff", b"e:a"]
)
def test_what_is_no_entry_has_no_name(key: bytes) -> None:
    assert KeySpace().name_of(key) is None


@pytest.mark.parametrize("namespace", ["", ".", "..", "a:b", "a b", "a/b", "é", "x" * 65, "a\n", "*"])
def test_namespaces_are_checked(namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        KeySpace("p:", namespace)


@pytest.mark.parametrize(
    "prefix", ["a b", "a*", "a?", "[a", "a]", "a\\", "é:", "a\n", "\x00", 'a"', "a'", "a`", "x" * 65, "\x7f"]
)
def test_prefixes_are_checked(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        KeySpace(prefix)


@pytest.mark.parametrize("prefix", ["", "mcp_hub:", "a/b-c.d{tag}:", "x" * 64, "~!@#$%^&()_+=,;<>|"])
def test_good_prefixes(prefix: str) -> None:
    assert KeySpace(prefix).root.startswith(prefix.encode())


def test_prefix_and_namespace_must_be_text() -> None:
    for prefix, namespace in ((None, "a"), ("a", 1), (b"a", "a")):
        with pytest.raises(TypeError, match="is a str"):
            KeySpace(prefix, namespace)  # type: ignore[arg-type]


def test_bad_keys_are_refused_without_showing_much_of_them() -> None:
    space = KeySpace()
    for bad in (1, None, b"a", ["a"]):
        with pytest.raises(TypeError, match="is a str, not " + type(bad).__name__):
            space.entry(bad)  # type: ignore[arg-type]
    for text in ("", "x" * 1025, "a\ud800", "\n" * 2000):
        with pytest.raises(InvalidKeyError) as caught:
            space.entry(text)
        assert len(str(caught.value)) < 270 and "\n" not in str(caught.value) and str(caught.value).isascii()
    space = KeySpace(max_key_length=3).other(namespace="n").other(scope="s")
    with pytest.raises(InvalidKeyError, match="at most 3 characters"):
        space.entry("abcd")
    assert space.entry("abc") == b"mcp_hub:n:s:s:abc"


# Arguments

APART: list[Any] = [
    1, 1.0, True, "1", None, "", "None", 0, 0.0, -0.0, False, math.nan, math.inf, 2**64, 1 << 63, -1, b"1", b"",
    bytearray(b"1"), 1 + 0j,
    [], (), {}, set(), frozenset(), [1, 2], (1, 2), [1, [2]], [[1, 2]], ["1", 2], {1, 2}, frozenset({1, 2}), {"a": 1},
    {"a": 1.0}, {1: "a"},
    {"1": "a"}, {"a": None}, {"a": {}}, [{"a": 1}], ["a", 1], OrderedDict(a=1, b=2), OrderedDict(b=2, a=1),
    {"a": 1, "b": 2}, Counter(a=1, b=2),
    deque([1, 2]), deque([1, 2], 5), Decimal(1), Decimal("1.0"), UUID(int=1), str(UUID(int=1)), Path("a"), "a",
    "\ud800", "\\ud800",
    datetime(2024, 1, 1), datetime(2024, 1, 1, tzinfo=UTC),
    datetime(2024, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))),
    datetime(2024, 1, 1, fold=1), "2024-01-01T00:00:00", timedelta(1), ..., "...", ["..."], Colour.RED, "RED", "red",
    Text.A, range(3), [0, 1, 2],
    Holder(1), Holder("1"), Holder([1]), Holder((1,)), {"what": 1}, ["c", "tests.test_codec.Holder", {"what": 1}],
    Model(name="a"),
    Model(name="a", hidden=0), Model(name="a", more=1), Plain(1), ["l", 1], ["t", 1, 2], [2**70], ["\ud800"],
]  # fmt: skip


def test_different_typed_values_have_different_bytes() -> None:
    seen: dict[bytes, Any] = {}
    for value in APART:
        for wrapped in (value, [value], {"a": value}, (value,)):
            key = spelled(wrapped)
            assert key not in seen or same(seen[key], wrapped), f"{wrapped!r} and {seen[key]!r} have one key"
            seen[key] = wrapped
    assert len({spelled(value) for value in APART}) == len(APART)


@pytest.mark.parametrize(
    ("one", "two"),
    [(("a:b", "c"), ("a", "b:c")), (("a", "b"), (["a", "b"],)), ((1, 2), (12,)), ((), ((),)),
    (('a","b',), ("a", "b")), ((None,), ())],
)  # fmt: skip
def test_arguments_do_not_run_into_each_other(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    assert spelled(*one) != spelled(*two)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": 1, "b": [2]}, {"b": [2], "a": 1}), ({1: "a", "1": "b", None: "c"}, {None: "c", "1": "b", 1: "a"}),
        ({("a", 1), ("b", 2)}, {("b", 2), ("a", 1)}), (frozenset("abcdef"), frozenset("fedcba")),
        (Counter("ab"), Counter("ba")),
        ([({"x": (1,), "y": 2},)], [({"y": 2, "x": (1,)},)]),
        (Holder({"x": 1, "y": (2,)}), Holder({"y": (2,), "x": 1})),
        ({frozenset({1, 2}): {3, 4}}, {frozenset({2, 1}): {4, 3}}), (model(a=(1,), b=2), model(b=2, a=(1,))),
        ({(1, 2): {"p": 1, "q": b""}, 3: 4}, {3: 4, (1, 2): {"q": b"", "p": 1}}),
        ([OrderedDict(a={"x": b"", "y": 1})], [OrderedDict(a={"y": 1, "x": b""})]),
    ],
)  # fmt: skip
def test_order_that_is_no_part_of_a_value_is_no_part_of_its_key(one: Any, two: Any) -> None:
    assert spelled(one) == spelled(two)
    assert spelled([one]) == spelled([two])


@settings(max_examples=300)
@given(anything, anything)
def test_keys_are_equal_exactly_where_typed_values_are(one: Any, two: Any) -> None:
    assert (spelled(one) == spelled(two)) == same_unordered(one, two)


@settings(max_examples=300)
@given(anything)
def test_what_comes_back_from_the_store_has_the_same_key(value: Any) -> None:
    from mcp_hub_cache._codec import decode, encode

    assert spelled(decode(*encode(value, ALL), ALL)) == spelled(value)


@given(
    st.lists(st.text() | st.integers() | st.booleans() | st.none(), max_size=4),
    st.lists(st.text() | st.integers(), max_size=4),
)
def test_simple_arguments_have_equal_keys_exactly_where_they_are_equal(one: list[Any], two: list[Any]) -> None:
    assert (spelled(*one) == spelled(*two)) == same(one, two)


def same_unordered(one: Any, two: Any) -> bool:
    """Typed equality, where the order of dicts does not count: ``same`` of both, put in one order."""
    if type(one) is not type(two):
        return False
    if type(one) is dict or type(one) is Counter:
        return len(one) == len(two) and all(
            any(same_unordered(key, other) and same_unordered(item, two[other]) for other in two)
            for key, item in one.items()
        )
    if isinstance(one, (set, frozenset)):
        return len(one) == len(two) and all(any(same_unordered(item, other) for other in two) for item in one)
    if isinstance(one, (list, tuple, deque)):
        limits = getattr(one, "maxlen", 0) == getattr(two, "maxlen", 0)
        return limits and len(one) == len(two) and all(map(same_unordered, one, two))
    if isinstance(one, (Holder, Plain)):
        return same_unordered(vars(one), vars(two))
    if hasattr(one, "__struct_fields__") or (hasattr(one, "__match_args__") and not hasattr(one, "__dict__")):
        names = getattr(one, "__struct_fields__", None) or one.__match_args__
        return all(same_unordered(getattr(one, name), getattr(two, name)) for name in names)
    if isinstance(one, pydantic.BaseModel):
        return same_unordered(vars(one), vars(two)) and one.model_fields_set == two.model_fields_set
    return same(one, two)


def a_function() -> None:
    raise NotImplementedError


@pytest.mark.parametrize(
    "make",
    [
        object, lambda: int, lambda: a_function, lambda: Holder(a_function), lambda: MyStr("secret"),
        lambda: {MyStr("secret"): 1},
        lambda: (n for n in ()), endless, endless_dict, lambda: deep(101), lambda: deep(101, lambda inner: (inner,)),
        lambda: deep(100_000), lambda: sys, lambda: print, lambda: functools.partial(print), lambda: memoryview(b""),
    ],
)  # fmt: skip
def test_arguments_without_a_stable_form_are_named(make: Callable[[], Any]) -> None:
    with pytest.raises(UncacheableError, match=r"^argument query") as caught:
        argument_bytes(("limit", "query"), (1, make()))
    assert caught.value.where.startswith("argument query") and "ignore=" in str(caught.value)
    assert "secret" not in str(caught.value) and " at 0x" not in str(caught.value)


def test_depth() -> None:
    assert spelled(deep(100)) and spelled(deep(100, lambda inner: (inner,)))
    assert spelled(deep(99)) != spelled(deep(100))


def test_places_inside_arguments_are_named() -> None:
    with pytest.raises(UncacheableError) as caught:
        argument_bytes(("q",), ({"a": [1, Holder(object())]},))
    assert caught.value.where == "argument q[key 0][1].what"


@given(st.lists(st.binary(max_size=5), max_size=4), st.lists(st.binary(max_size=5), max_size=4))
def test_digests_keep_parts_apart(one: list[bytes], two: list[bytes]) -> None:
    assert (join(*one) == join(*two)) == (one == two) == (digest(*one) == digest(*two))
    assert re.fullmatch("[0-9a-f]{32}", digest(*one))


@pytest.mark.parametrize("name", sorted(golden_cases("keys")))
def test_golden_keys_are_the_same_for_ever(name: str) -> None:
    assert written("keys", golden_cases("keys")[name]) == (GOLDEN / "keys" / name).read_bytes()


def test_keys_are_the_same_in_every_process() -> None:
    root = Path(mcp_hub_cache.__file__).parents[2]
    code = (
        "from tests.golden import golden_cases, written\n"
        "for case in golden_cases('keys').values(): print(written('keys', case).hex())"
    )
    outputs = set()
    for seed in ("0", "1", "2"):
        environment = {"PYTHONPATH": f"{root / 'src'}:{root}", "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1


# Functions


class Owner:
    def method(self, a: int, /, b: str = "x", *rest: int, c: float, d: object = None, **more: Any) -> None: ...

    class Inner:
        @staticmethod
        def static() -> None:
            raise NotImplementedError


def test_function_names_are_readable_safe_and_tell_functions_apart() -> None:
    def local() -> None:
        raise NotImplementedError

    names = function_name(Owner.Inner.static)
    assert names == (f"{__name__}.Owner.Inner.static", f"{__name__}:Owner.Inner.static")
    assert (
        function_name(local).readable
        == f"{__name__}.{test_function_names_are_readable_safe_and_tell_functions_apart.__name__}.local"[-100:]
    )
    long: Any = lambda: None  # noqa: E731
    long.__qualname__ = "Schlüssel.<lambda> " + "x" * 200
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", function_name(long).readable)
    assert function_name(long).identity.endswith("x" * 200)
    with pytest.raises(TypeError, match="partial is no function"):
        function_name(functools.partial(local))


def test_names_made_from_arguments() -> None:
    name = namer("app.search", [b"app:search", b"1"], ("query", "limit"))
    assert re.fullmatch(r"app\.search:[0-9a-f]{32}", name(("a", 1)))
    assert name(("a", 1)) == name(("a", 1)) != name(("a", True))
    assert name((["a"], 1)) != name((("a",), 1)) and name(("\ud800", 2**70))
    assert name(("a", 1)) != namer("app.search", [b"app:search", b"2"], ("query", "limit"))(("a", 1))
    with pytest.raises(UncacheableError, match="argument limit"):
        name(("a", object()))


SENTINEL = object()


def everything(a: int, b: object = SENTINEL, /, c: int = 3, *rest: int, d: int, e: int = 5, **more: int) -> None: ...
def keywords(*, a: int, b: int = 2) -> None: ...
def nothing() -> None: ...
def positional(a: int, /) -> None: ...
def simple(query: str, limit: int = 10) -> None: ...
def stars(*args: int, **kwargs: int) -> None: ...
def mixed(a: int, /, b: int, *, c: int) -> None: ...
def strange(bound: int, __builtins__: int = 1, größe: int = 2) -> None: ...  # noqa: PLC2401


FUNCTIONS: list[Any] = [
    everything,
    keywords,
    nothing,
    positional,
    simple,
    stars,
    mixed,
    strange,
    Owner.method,
    lambda x, y=1: None,
]
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}), ((1,), {}), ((1, 2), {}), ((1, 2, 3, 4), {}), ((1, 2, 3, 4, 5, 6), {"d": 1}), ((1,), {"d": 1, "z": 2}),
    ((), {"a": 1}), ((1,), {"a": 1}),
    ((), {"query": "x"}), (("x",), {"limit": 1}), (("x",), {"query": 1}), ((1,), {"b": 2, "c": 3}), ((), {"nope": 1}),
    ((1, 2), {"c": 3}),
    ((Owner(), 1), {"c": 1.0, "q": 2}), ((1, 2), {"d": 3, "e": 4, "c": 5}), ((), {"a": 1, "b": 2, "c": 3}),
    ((), {"bound": 1, "größe": 3}),
]  # fmt: skip


@pytest.mark.parametrize("func", FUNCTIONS)
@pytest.mark.parametrize(("args", "kwargs"), CALLS)
def test_binding_is_what_python_does(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    binder = bind(func)
    with contextlib.suppress(TypeError):
        func(*args, **kwargs)
        expected = inspect.signature(func).bind(*args, **kwargs)
        expected.apply_defaults()
        assert binder(*args, **kwargs) == tuple(expected.arguments.values())
        return
    with pytest.raises(TypeError) as theirs:
        func(*args, **kwargs)
    with pytest.raises(TypeError) as ours:
        binder(*args, **kwargs)
    assert str(ours.value) == str(theirs.value)


def test_defaults_are_the_very_objects() -> None:
    assert bind(everything)(1, d=2)[1] is SENTINEL
    assert bind(nothing)() == ()


def test_parameters_can_be_left_out() -> None:
    assert bind(simple, ignore="limit")("a") == ("a",)
    assert bind(everything, ignore=["rest", "b"])(1, 2, 3, 4, d=5) == (1, 3, 5, 5, {})
    assert bind(Owner.method, skip_first=True)(object(), 1, c=2.0) == (1, "x", (), 2.0, None, {})
    assert bound_names(Owner.method, skip_first=True, ignore=["rest"]) == ("a", "b", "c", "d", "more")
    with pytest.raises(ValueError, match="'limti', which simple does not take; it takes query, limit"):
        bind(simple, ignore=["limti"])


def test_wrapped_functions_are_bound_by_their_own_signature() -> None:
    @functools.wraps(simple)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    assert bind(wrapper)("a") == bind(wrapper)(query="a") == ("a", 10)


# Templates


def user(user_id: Any, page: Any = 1, *, flag: Any = None) -> None: ...


@pytest.mark.parametrize(
    ("text", "args", "expected"),
    [
        ("user:{user_id}", (42,), "user:42"), ("user:{user_id}", ("42",), "user:%342"),
        ("user:{user_id}", ("-1",), "user:%2D1"),
        ("user:{user_id}", ("alice",), "user:alice"), ("user:{user_id}", ("a:b%",), "user:a%3Ab%25"),
        ("{user_id}:{page}", ("", 2), ":2"),
        ("u:{user_id}", (None,), "u:None"), ("u:{user_id}", ("None",), "u:%4Eone"), ("u:{user_id}", (True,), "u:True"),
        ("u:{user_id}", (UUID(int=1),), "u:%u00000000-0000-0000-0000-000000000001"),
        ("u:{user_id}/x", ("é a\n",), "u:é%20a%0A/x"),
        ("u:{user_id}", ("\ud800",), "u:%ED%A0%80"), ("{{u}}:{user_id}}}", (1,), "{u}:1}"), ("all", (1,), "all"),
        ("u:{user_id.number}:{page[0]}:{page[1]}", (Plain(3), ["x", 5]), "u:3:x:5"),
        ("{user_id[name]}", ({"name": "n"},), "n"),
    ],
)  # fmt: skip
def test_templates(text: str, args: tuple[Any, ...], expected: str) -> None:
    assert template(text, user)(*args) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{nobody}",
        "{}",
        "{0}",
        "{user_id!r}",
        "{user_id:>3}",
        "{user_id}{page}",
        "{user_id}-{page}",
        "{user_id._x}",
        "{user_id",
        "{user_id.}",
        "{flag[a.b]}",
    ],
)
def test_templates_are_checked_at_once(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # each has its own words; string's own parser raises two of them
        template(text, user)


@pytest.mark.parametrize(
    "value", [1.0, b"a", [], Colour.RED, MyStr("secret"), Text.A, object(), 10**5000, (1,)], ids=range(9)
)
def test_templates_show_simple_values_alone(value: Any) -> None:
    with pytest.raises(UncacheableError, match=r"key template field \{user_id\}") as caught:
        template("u:{user_id}", user)(value)
    assert "secret" not in str(caught.value)


def test_plain_templates_show_text_as_it_is() -> None:
    render = template("user:{user_id}{page}", user, what="tag", plain=True)
    for value in ("42", 42, "a:b %", UUID(int=1), True, None):
        assert render(value, "x") == f"user:{value}x"
    with pytest.raises(UncacheableError, match=r"tag template field \{user_id\}"):
        render(1.5)
    with pytest.raises(ValueError, match=r"tag template 'a\{'"):
        template("a{", user, what="tag")


def test_templates_name_what_is_not_there() -> None:
    for text in ("{user_id.nothing}", "{user_id[nothing]}", "{user_id[3]}"):
        with pytest.raises(UncacheableError, match=re.escape(text)):
            template(text, user)({"a": 1})
    with pytest.raises(TypeError, match=r"^user\(\) missing 1 required positional argument"):
        template("{user_id}", user)()
    with pytest.raises(ValueError, match="self"):
        template("{self}", Owner.method, skip_first=True)


pieces = st.sampled_from(["", "a", ":", "%", "1", "-", "-1", "True", "None", "%3A", "/", "é", "\ud800", " ", "%u"])
shown = st.lists(pieces, max_size=4).map("".join) | st.integers(-20, 20) | st.booleans() | st.none() | st.uuids()


@settings(max_examples=500)
@given(st.tuples(shown, shown), st.tuples(shown, shown))
def test_templates_are_injective(one: tuple[Any, Any], two: tuple[Any, Any]) -> None:
    assume(not same(one, two))
    for text in ("{user_id}:{page}", "x{page}/y{user_id}z"):
        render = template(text, user)
        assert render(*one) != render(*two)


class Marked(enum.Enum):
    A = "a"


def test_enums_of_one_name_in_two_places_have_two_keys() -> None:
    assert spelled(Marked.A) != spelled(Text.A)
