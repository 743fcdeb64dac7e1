"""An exception comes back as it was raised: class, args, attributes and notes; or it is refused."""

from __future__ import annotations

import asyncio
import decimal
import gc
import json
import os
import ssl
import types
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_hub_cache._classes import NOTHING, ClassSet, classes_of
from mcp_hub_cache._codec import FAILURE, RICH, DecodeError, decode
from mcp_hub_cache._exceptions import UncacheableError
from mcp_hub_cache._failures import Failures, check_class
from tests.samples import ALL, Child, MyStr, Plain, anything, deep, json_like, same

T = TypeVar("T")
HERE = __name__


class AppError(Exception):
    """What an application derives its own from."""


class NotFound(AppError):
    def __init__(self, kind: str, *, number: int, advice: str = "") -> None:
        super().__init__(f"no {kind} {number}")
        self.kind = kind
        self.number = number
        if number < 0:
            raise RuntimeError("an __init__ ran")


class Silent(AppError):
    def __init__(self, code: int) -> None:
        self.code = code


@dataclass
class Detailed(AppError):
    plain: Plain
    where: tuple[str, ...] = ()


class Wrapped(AppError, Generic[T]):
    """Says nothing of its own."""


class Mixed(AppError, KeyError):
    """Of two families."""


class Gone(OSError):
    """An OSError that leaves all to it."""


class Overriding(AppError):
    """Stands in the way of its own state."""

    args = property(lambda _: ("lies",))  # type: ignore[assignment]

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return {"lies": True}

    def __setattr__(self, name: str, value: object) -> None:
        raise RuntimeError("a __setattr__ ran")


class ByNew(AppError):
    def __new__(cls, *args: object) -> Self:
        return super().__new__(cls, *args)


class UnderNew(ByNew):
    pass


class WithSlots(AppError):
    __slots__ = ("code",)


class UnderSlots(WithSlots):
    pass


class EmptySlots(AppError):
    __slots__ = ()


class OwnInit(OSError):
    def __init__(self, number: int) -> None:
        super().__init__(number, "text")


class Raising(msgspec.Struct):
    x: int

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("secret")


class Ending(BaseException):
    pass


class Lookups(UnicodeDecodeError):
    pass


def noted(error: Exception, *notes: str) -> Exception:
    for note in notes:
        error.add_note(note)
    return error


def state(error: BaseException) -> tuple[Any, ...]:
    fields = ("errno", "strerror", "filename", "filename2", "characters_written")
    attributes = BaseException.__dict__["__dict__"].__get__(error)
    args = BaseException.__dict__["args"].__get__(error)
    return (args, attributes, *(getattr(error, name, None) for name in fields))


def there_and_back(error: Exception, listed: type[Exception] | None = None, classes: ClassSet = NOTHING) -> Exception:
    failures = Failures({type(error) if listed is None else listed: 1.0})
    payload = failures.encode(error, classes)
    made = failures.decode(payload, classes)
    assert type(made) is type(error) and made is not error
    assert same(state(made), state(error))
    assert same(state(Failures({type(error): 1.0}).decode(memoryview(payload), classes)), state(error))  # elsewhere
    return made


BUILTIN: list[Callable[[], Exception]] = [
    Exception, lambda: ValueError("a", 2), lambda: KeyError("key"), lambda: KeyError(("a", 1)), IndexError,
    lambda: TypeError(None), lambda: RuntimeError("a" * 5000), TimeoutError, asyncio.TimeoutError, asyncio.QueueEmpty,
    lambda: TimeoutError(110, "timed out"), lambda: ConnectionResetError(104, "reset"), lambda: ConnectionError("lost"),
    lambda: OSError("only text"), lambda: OSError(99_999, "unknown"), lambda: OSError(2, "becomes another"),
    lambda: OSError(2, None), lambda: OSError(1, 2, 3), lambda: OSError(1, 2, 3, 4, 5), lambda: OSError(*range(7)),
    lambda: FileNotFoundError(2, "No such file", "/a/b"), lambda: FileNotFoundError("no number"), FileExistsError,
    lambda: PermissionError(13, "Permission denied", b"/bytes", None, "/to"), lambda: BlockingIOError(11, "busy", 300),
    lambda: FileNotFoundError(2, "mov", "from", None, "to"), lambda: Gone(2, "gone", "/x"), lambda: Gone("gone"),
    lambda: ssl.SSLError(1, "[SSL] wrong"), lambda: ssl.SSLCertVerificationError(1, "verify"), lambda: zlib.error("x"),
    lambda: decimal.InvalidOperation("x"), MemoryError, RecursionError, NotImplementedError, ZeroDivisionError,
    lambda: noted(ValueError("a"), "first", "second"), lambda: noted(FileNotFoundError(2, "x", "f"), "why"),
]  # fmt: skip


@pytest.mark.parametrize("make", BUILTIN, ids=range(len(BUILTIN)))
def test_exceptions_of_python_come_back(make: Callable[[], Exception]) -> None:
    error = make()
    made = there_and_back(error)
    assert str(made) == str(error) and repr(made) == repr(error)
    assert getattr(made, "__notes__", None) == getattr(error, "__notes__", None)


def test_errors_as_the_system_raises_them_come_back(tmp_path: Path) -> None:
    fails: list[Callable[[], object]] = [(tmp_path / "none").read_bytes, lambda: os.rename(tmp_path / "none", "other")]  # noqa: PTH104
    for fail in fails:
        with pytest.raises(FileNotFoundError) as caught:
            fail()
        made = there_and_back(caught.value, OSError)
        assert isinstance(made, FileNotFoundError) and str(made) == str(caught.value)


def test_classes_of_ones_own_come_back_without_their_init() -> None:
    missing = NotFound("user", number=7)
    missing.number = -1
    for error in (
        missing, Silent(404), Detailed(Plain(1, ["a"]), ("x",)), Mixed("k"), Wrapped("w"), EmptySlots(1),
        noted(Silent(1), "note"),
    ):  # fmt: skip
        made = there_and_back(error, AppError, classes_of(Plain))
        assert str(made) == str(error)
    assert there_and_back(json.JSONDecodeError("bad", "doc", 2)).pos == 2  # type: ignore[attr-defined]


def test_what_a_class_puts_in_front_of_its_state_is_passed_by() -> None:
    error = Overriding("true")
    BaseException.__dict__["__dict__"].__get__(error)["code"] = 5
    there_and_back(error, AppError)


@given(st.lists(json_like, max_size=3), st.dictionaries(st.text(max_size=5), json_like, max_size=3))
def test_any_plain_state_comes_back(args: list[Any], attributes: dict[str, Any]) -> None:
    error = NotFound.__new__(NotFound, *args)
    vars(error).update(attributes)
    there_and_back(error, AppError)


@settings(max_examples=200)
@given(st.lists(anything, max_size=3), st.dictionaries(st.text(max_size=5), anything, max_size=3))
def test_any_rich_state_comes_back(args: list[Any], attributes: dict[str, Any]) -> None:
    error = Silent.__new__(Silent, *args)
    vars(error).update(attributes)
    there_and_back(error, AppError, ALL)


os_part = st.none() | st.integers() | st.text(max_size=3) | st.binary(max_size=3)


@given(st.sampled_from([OSError, BlockingIOError, PermissionError, Gone]), st.lists(os_part, max_size=6))
def test_an_os_error_comes_back_or_is_refused(cls: type[OSError], args: list[Any]) -> None:
    try:
        error = cls(*args)
    except (TypeError, OverflowError):
        return
    assert str(there_and_back(error, OSError)) == str(error)


@given(st.tuples(os_part, os_part, os_part, os_part))
def test_an_os_error_whose_fields_were_set_comes_back_or_is_refused(fields: tuple[Any, ...]) -> None:
    error = OSError(1, "a", "b")
    error.errno, error.strerror, error.filename, error.filename2 = fields
    try:
        there_and_back(error)
    except UncacheableError:
        assert fields != (1, "a", "b", None)


def test_an_os_error_that_its_args_do_not_make_is_refused() -> None:
    late, blocking = OSError(), BlockingIOError(11, "busy", 300)
    late.errno = 2
    blocking.characters_written = 5
    misnamed = PermissionError(13, "denied")
    misnamed.args = (2, "other")
    bare = OSError(99_999, "unknown")
    bare.args, bare.errno = (2, "unknown"), 2
    for error in (late, blocking, misnamed, bare):
        with pytest.raises(UncacheableError, match=r"^error: .*(OSError|another class)"):
            Failures({OSError: 1.0}).encode(error)


GOLDEN: list[tuple[Exception, bytes]] = [
    (
        noted(NotFound("user", number=7), "note"),
        b'["ex","tests.test_failures.NotFound",["t","no user 7"],{"kind":"user","number":7,"__notes__":["l","note"]}]',
    ),
    (FileNotFoundError(2, "gone", "/a"), b'["ex","builtins.FileNotFoundError",["t",2,"gone","/a"],{}]'),
]


@pytest.mark.parametrize(("error", "payload"), GOLDEN, ids=range(len(GOLDEN)))
def test_golden_payloads_are_read_for_ever(error: Exception, payload: bytes) -> None:
    failures = Failures({AppError: 1.0, OSError: 1.0})
    assert failures.encode(error) == payload
    assert same(state(failures.decode(payload)), state(error))


def test_each_time_it_is_a_new_one_without_a_past() -> None:
    try:
        try:
            {}["secret"]
        except KeyError as cause:
            raise Silent(1) from cause
    except Silent as raised:
        error = raised
    failures = Failures({Silent: 1.0})
    payload = failures.encode(error)
    one, two = failures.decode(payload), failures.decode(payload)
    assert one is not two and vars(one) is not vars(two)
    assert (one.__traceback__, one.__cause__, one.__context__, one.__suppress_context__) == (None, None, None, False)
    assert b"secret" not in payload
    assert (error.__cause__ is not None, error.__traceback__ is not None) == (True, True)


def test_the_nearest_class_says_how_long() -> None:
    failures = Failures({AppError: 1.0, LookupError: 2.0, NotFound: 3.0, OSError: 4.0})
    assert failures.ttl_of(NotFound("x", number=1)) == 3.0
    assert failures.ttl_of(Silent(1)) == 1.0
    assert failures.ttl_of(Mixed()) == 1.0
    assert failures.ttl_of(KeyError()) == 2.0
    assert failures.ttl_of(FileNotFoundError()) == 4.0
    assert failures.ttl_of(ValueError()) is None
    assert failures.ttl_of(asyncio.CancelledError()) is None


REFUSED: list[tuple[object, str]] = [
    ("NotFound", "cache_errors: needs classes derived from Exception, not an instance of builtins.str; name the class"),
    (ValueError("x"), "not an instance of builtins.ValueError"),
    (None, "not an instance of builtins.NoneType"),
    (Wrapped[int], "derived from Exception, not an instance of"),
    (int, "builtins.int is no exception; name classes derived from Exception"),
    (BaseException, "builtins.BaseException ends tasks and programs"),
    (asyncio.CancelledError, "asyncio.exceptions.CancelledError ends tasks and programs"),
    (KeyboardInterrupt, "builtins.KeyboardInterrupt ends tasks and programs"),
    (SystemExit, "builtins.SystemExit ends tasks and programs"),
    (GeneratorExit, "builtins.GeneratorExit ends tasks and programs"),
    (Ending, f"{HERE}.Ending ends tasks and programs and is no answer"),
    (StopIteration, "builtins.StopIteration can't be raised by a coroutine; raise and name a class of your own"),
    (StopAsyncIteration, "builtins.StopAsyncIteration can't be raised by a coroutine"),
    (ExceptionGroup, "builtins.ExceptionGroup holds other exceptions, which can't be rebuilt"),
    (BaseExceptionGroup, "BaseExceptionGroup ends tasks and programs"),
    (ByNew, f"{HERE}.ByNew can't be rebuilt: ByNew has a __new__ of its own; do its work in __init__ instead"),
    (UnderNew, f"{HERE}.UnderNew can't be rebuilt: ByNew has a __new__ of its own"),
    (WithSlots, f"{HERE}.WithSlots can't be rebuilt: WithSlots has __slots__; leave them out"),
    (UnderSlots, f"{HERE}.UnderSlots can't be rebuilt: WithSlots has __slots__"),
    (OwnInit, f"{HERE}.OwnInit can't be rebuilt: it is an OSError, whose fields are set by its own __init__ here"),
    (UnicodeDecodeError, "builtins.UnicodeDecodeError can't be rebuilt: it has fields that are neither in its args"),
    (Lookups, f"{HERE}.Lookups can't be rebuilt: it has fields"),
    (ImportError, "builtins.ImportError can't be rebuilt: it has fields"),
    (AttributeError, "builtins.AttributeError can't be rebuilt: it has fields"),
    (NameError, "builtins.NameError can't be rebuilt: it has fields"),
    (SyntaxError, "builtins.SyntaxError can't be rebuilt: it has fields"),
]


@pytest.mark.parametrize(("cls", "text"), REFUSED, ids=range(len(REFUSED)))
def test_what_can_not_be_rebuilt_is_refused_at_decoration(cls: Any, text: str) -> None:
    for refuse in (check_class, lambda each: Failures({each: 1.0})):
        with pytest.raises(TypeError) as caught:
            refuse(cls)
        assert text in str(caught.value) and str(caught.value).startswith("cache_errors: ")
        assert not isinstance(caught.value, UncacheableError)


@pytest.mark.parametrize("error", [ByNew(), UnderSlots(), ExceptionGroup("g", [ValueError()])])
def test_a_class_that_only_derives_from_a_listed_one_is_refused_when_it_comes(error: Exception) -> None:
    with pytest.raises(UncacheableError, match=r"^error: .*(can't be rebuilt|which can't)"):
        Failures({AppError: 1.0, Exception: 1.0}).encode(error)


def with_attribute(name: str, value: object) -> Exception:
    error = Silent(1)
    vars(error)[name] = value
    return error


class OwnDict(dict[str, object]):
    pass


def with_own_dict() -> Exception:
    error = Silent(1)
    error.__dict__ = OwnDict(code=1)
    return error


@pytest.mark.parametrize(
    ("error", "where", "what"),
    [
        (Silent.__new__(Silent, 1, object()), "error.args[1]", "object"),
        (Silent.__new__(Silent, {"a": [MyStr("secret")]}), "error.args[0][key 0][0]", "MyStr"),
        (with_attribute("request", object()), "error.__dict__[key 1]", "object"),
        (with_attribute("sk-secret", MyStr("s")), "error.__dict__[key 1]", "MyStr"),
        (with_attribute("inner", ValueError("secret")), "error.__dict__[key 1]", "ValueError"),
        (with_attribute("child", Child(1)), "error.__dict__[key 1]", "only a subclass of the Plain"),
        (with_attribute("deep", deep(250)), None, "nested deeper than 200"),
        (with_own_dict(), "error.__dict__", "OwnDict"),
        (Wrapped[int]("x"), "error.__dict__[key 0]", "_GenericAlias"),
        (ValueError("x"), "error", "none of the exceptions that are to be cached"),
    ],
    ids=range(10),
)
def test_a_refusal_names_the_place_and_never_content(error: Exception, where: str | None, what: str) -> None:
    with pytest.raises(UncacheableError) as caught:
        Failures({AppError: 1.0}).encode(error, classes_of(Plain))
    assert where is None or (caught.value.where == where and str(caught.value).startswith(f"{where}: "))
    assert what in str(caught.value) and "secret" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def make_class(module: str = HERE) -> type[Exception]:
    made = types.new_class("Made", (AppError,))
    made.__module__ = module
    return made


@pytest.fixture
def _forget_made_classes() -> Iterator[None]:
    gc.collect()  # classes hold themselves; one left over shares its name with the next test's
    yield
    gc.collect()


@pytest.mark.usefixtures("_forget_made_classes")
def test_a_class_of_the_same_name_in_another_module_is_another() -> None:
    mine, theirs = make_class(), make_class(module="elsewhere")
    failures = Failures({AppError: 1.0})
    for cls in (mine, theirs):
        assert type(failures.decode(failures.encode(cls("x")))) is cls


@pytest.mark.usefixtures("_forget_made_classes")
def test_two_classes_of_one_name_are_not_taken_for_each_other() -> None:
    one, two = make_class(), make_class()
    for cls in (one, two):
        with pytest.raises(UncacheableError, match=r"more than one class is called .*Made; give each a name"):
            Failures({AppError: 1.0}).encode(cls("x"))
    failures = Failures({one: 1.0, AppError: 2.0})  # the listed one goes first
    payload = failures.encode(one("x"))
    assert type(failures.decode(payload)) is one
    with pytest.raises(UncacheableError, match="more than one"):
        failures.encode(two("x"))
    with pytest.raises(DecodeError):
        Failures({AppError: 1.0}).decode(payload)


def test_only_what_derives_from_the_listed_is_revived() -> None:
    payload = Failures({AppError: 1.0}).encode(NotFound("user", number=1))
    assert type(Failures({AppError: 1.0}).decode(payload)) is NotFound
    assert type(Failures({NotFound: 1.0}).decode(payload)) is NotFound
    assert type(Failures({Exception: 1.0}).decode(payload)) is NotFound
    for other in (Silent, OSError, LookupError):
        with pytest.raises(DecodeError):
            Failures({other: 1.0}).decode(payload)


@pytest.mark.usefixtures("_forget_made_classes")
def test_a_class_that_is_gone_is_not_revived() -> None:
    failures = Failures({AppError: 1.0})
    made = make_class()
    payload = failures.encode(made("x"))
    assert type(failures.decode(payload)) is made
    del made
    gc.collect()
    with pytest.raises(DecodeError):
        failures.decode(payload)
    again = make_class()
    assert type(failures.decode(payload)) is again


def test_attributes_of_classes_not_given_are_not_revived() -> None:
    failures = Failures({AppError: 1.0})
    payload = failures.encode(Detailed(Plain(1)), classes_of(Plain))
    with pytest.raises(DecodeError):
        failures.decode(payload)


def test_it_is_no_value() -> None:
    payload = Failures({AppError: 1.0}).encode(Silent(1))
    for codec in (FAILURE, RICH):
        with pytest.raises(DecodeError):
            decode(codec, payload)


SILENT = f"{HERE}.Silent"
HOSTILE: list[Any] = [
    None, 1, "ex", [], {}, ["ex"], ["ex", SILENT], ["ex", SILENT, ["t"]], ["ex", SILENT, ["t"], {}, {}],
    ["ex", SILENT, ["l"], {}], ["ex", SILENT, ["t"], ["l"]], ["ex", SILENT, ["t"], ["od"]], ["ex", SILENT, {}, ["t"]],
    ["ex", SILENT, "ab", {}], ["ex", SILENT, None, None], ["c", SILENT, ["t"], {}], [SILENT, ["t"], {}],
    ["ex", "os.system", ["t", "true"], {}], ["ex", "posix.system", ["t", "true"], {}],
    ["ex", "builtins.eval", ["t"], {}],
    ["ex", "builtins.ValueError", ["t"], {}], ["ex", "builtins.Exception", ["t"], {}], ["ex", "Silent", ["t"], {}],
    ["ex", f"{HERE}.ByNew", ["t"], {}], ["ex", f"{HERE}.WithSlots", ["t"], {}], ["ex", "", ["t"], {}],
    ["ex", None, ["t"], {}], ["ex", ["l"], ["t"], {}], ["ex", {}, ["t"], {}], ["ex", SILENT, ["t", ["?"]], {}],
    ["ex", SILENT, ["t", ["ex", SILENT, ["t"], {}]], {}], ["ex", SILENT, ["t"], {"a": ["c", "Plain#0", {}]}],
    ["ex", "builtins.OSError", ["t", 2, "x"], {}], ["ex", "builtins.OSError", ["t"], {}],
    ["ex", "builtins.BlockingIOError", ["t", 11, "x", ["i", hex(2**70)]], {}],
]  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_forms_are_decode_errors(data: Any) -> None:
    listed: dict[type[Exception], float] = {AppError: 1.0}
    if data != ["ex", "builtins.OSError", ["t"], {}]:
        listed[OSError] = 1.0
    with pytest.raises(DecodeError) as caught:
        Failures(listed).decode(orjson.dumps(data), ALL)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"{", b"\xff", b"nan", b"[" * 5000,
        b'["ex","%b",["t",' % SILENT.encode() + b'["l",' * 900 + b"1" + b"]" * 901 + b",{}]",
        b'["ex","%b",' % SILENT.encode() + b'["t",' * 5000 + b"]" * 5000 + b",{}]",
    ],
)  # fmt: skip
def test_bytes_that_are_no_exception_are_decode_errors(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        Failures({AppError: 1.0}).decode(payload)


@given(st.binary(max_size=60))
def test_random_bytes_are_decode_errors(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        Failures({Exception: 1.0}).decode(payload)


@settings(max_examples=300)
@given(st.data())
def test_damaged_payloads_are_an_exception_of_the_listed_or_a_decode_error(data: st.DataObject) -> None:
    payload = bytearray(Failures({AppError: 1.0}).encode(NotFound("user", number=1)))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        made = Failures({AppError: 1.0}).decode(bytes(payload))
    except DecodeError:
        return
    assert isinstance(made, AppError)


def test_errors_of_its_own_are_wrapped_without_their_words() -> None:
    with pytest.raises(UncacheableError, match=r"^error: reading it raised RuntimeError$"):
        Failures({AppError: 1.0}).encode(Silent.__new__(Silent, Raising(1)), classes_of(Raising))
