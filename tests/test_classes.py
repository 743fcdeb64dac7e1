"""Which classes an annotation names; what a function says it returns; names that are the same in every process."""

from __future__ import annotations

import collections.abc
import enum
import functools
import subprocess
import sys
import textwrap
import typing
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Optional,
    TypedDict,
    TypeVar,
    Union,
)

import attrs
import msgspec
import pydantic
import pytest

import mcp_hub_cache
from mcp_hub_cache._classes import (
    NOTHING,
    ClassSet,
    as_class_set,
    class_id,
    classes_of,
    module_name,
    return_annotation,
    text_of,
)
from mcp_hub_cache._codec import decode, encode
from mcp_hub_cache._exceptions import UncacheableError
from mcp_hub_cache._shapes import Shape, shape_of

if TYPE_CHECKING:
    from nowhere import Nothing  # type: ignore[import-not-found]

T = TypeVar("T")


class Colour(enum.Enum):
    RED = 1


class Size(enum.IntEnum):
    BIG = 1


class Point(NamedTuple):
    colour: Colour


class Movie(TypedDict):
    point: Point
    size: NotRequired[Size]


@dataclass
class Node:
    children: list[Node]
    movie: Movie | None = None
    hidden: Nothing | None = None
    constant: ClassVar[Lonely | None] = None


@dataclass
class Lonely:
    x: int = 0


@dataclass
class Dated:
    """Its default hides its type for whoever evaluates annotations in the class."""

    Lonely: Lonely | None = None


@dataclass
class SubLonely(Lonely):
    pass


@dataclass
class Box(Generic[T]):
    item: T


@dataclass
class Boxed(Box[Lonely]):
    pass


class Model(pydantic.BaseModel):
    points: dict[str, Point] = {}
    _private: Lonely | None = None


class Record(msgspec.Struct):
    node: Node | msgspec.UnsetType = msgspec.UNSET


@attrs.define
class Drawn:
    point: Point
    size: Any = 0


@attrs.define(slots=False, frozen=True)
class Fixed:
    size: int


class Ordinary:
    pass


Id = NewType("Id", Lonely)

CASES: list[tuple[Any, set[type]]] = [
    (None, set()), (Any, set()), (object, set()), (int, set()), (T, set()), (typing.Self, set()), (Ordinary, set()),
    (list[dict[str, int]], set()), (Lonely, {Lonely}), (Optional[Lonely], {Lonely}), (Lonely | None, {Lonely}),  # noqa: UP045
    (Union[Lonely, Colour], {Lonely, Colour}), (dict[str, list[tuple[Lonely, ...]]], {Lonely}),  # noqa: UP007
    (Annotated[Lonely, "note", []], {Lonely}), (Id, {Lonely}), (Literal[Colour.RED, "a"], {Colour}),
    (Movie, {Point, Colour, Size}),
    (Node, {Node, Point, Colour, Size}), (Point, {Point, Colour}), (Box[Lonely], {Box, Lonely}),
    (Boxed, {Boxed, Lonely, Box}),
    (Model, {Model, Point, Colour, Lonely}), (Record, {Record, Node, Point, Colour, Size}), (Dated, {Dated, Lonely}),
    (list["Lonely"], {Lonely}), ("Lonely", {Lonely}), (AsyncIterator[Lonely], {Lonely}),
    (collections.abc.Sequence[Lonely], {Lonely}),
    (type[Lonely], set()), (Callable[[Lonely], Colour], set()), (SubLonely, {SubLonely}),
    (Drawn, {Drawn, Point, Colour}),
    ("int | Unknown", set()), (list["Lonely"], {Lonely}),
    (typing.ForwardRef("Node"), {Node, Point, Colour, Size}),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "expected"), CASES, ids=range(len(CASES)))
def test_the_closed_set(annotation: Any, expected: set[type]) -> None:
    found = classes_of(annotation, globalns=globals())
    assert set(found.classes) - {Box} == expected - {Box}
    assert (Box in found.classes) == (Box in expected) or annotation is Boxed


def test_aliases_are_followed_where_the_language_has_them() -> None:
    if sys.version_info < (3, 12):
        typing_extensions = pytest.importorskip("typing_extensions")
        made = typing_extensions.TypeAliasType("Json", list["Json"] | Lonely)  # noqa: F821
        spaces = {"Json": made}
    else:
        spaces = {"Lonely": Lonely}
        exec("type Json = list[Json] | Lonely\ntype Of[T] = dict[str, T]\nboth = Of[Json]", spaces)  # type: ignore[arg-type]
        assert classes_of(spaces["both"]).classes == (Lonely,)
    found = classes_of(spaces["Json"], globalns={**spaces, "Lonely": Lonely})
    assert found.classes == (Lonely,) and found.text == "Json"


def test_unresolved_names_of_the_annotation_itself_are_listed_and_those_of_fields_are_not() -> None:
    assert classes_of(list["Nothing"], globalns=globals()).unresolved == ("Nothing",)  # type: ignore[type-arg]
    assert classes_of(Node, globalns=globals()).unresolved == ()


def test_a_class_that_nothing_tells_from_another_is_not_revived() -> None:
    def make() -> type:
        @dataclass
        class Local:
            x: int

        return Local

    one, two = make(), make()
    assert classes_of(tuple[one, two, Lonely]).classes == (Lonely,)  # type: ignore[valid-type]
    with pytest.raises(UncacheableError):
        encode(one(1), classes_of(one | two))


def local_classes() -> tuple[Any, Any, dict[str, Any]]:
    @dataclass
    class Local:
        x: int
        other: Other | None = None

    @dataclass
    class Other:
        y: int

    async def with_frame(hidden: Nothing) -> list[Local]:
        raise NotImplementedError

    async def with_closure(hidden: Nothing) -> Local:
        return Local(1, Other(2))

    return with_frame, with_closure, dict(locals())


def test_local_classes_resolve_through_frame_or_closure() -> None:
    with_frame, with_closure, names = local_classes()
    local, other = names["Local"], names["Other"]
    found = return_annotation(with_frame, names)
    assert found.problem is None and found.annotation == list[local]
    assert set(found.classes().classes) == {local, other}
    assert set(return_annotation(with_closure).classes().classes) == {local, other}
    lost = return_annotation(with_frame)
    assert lost.problem is not None and "Local" in lost.problem and lost.classes().classes == ()


def test_only_return_is_evaluated() -> None:
    async def unresolvable(hidden: Nothing, *, other: 1 / 0) -> Lonely:  # type: ignore[valid-type]
        raise NotImplementedError

    def silent(x: int):  # type: ignore[no-untyped-def]
        return x

    async def broken() -> Nothing:
        raise NotImplementedError

    @functools.wraps(unresolvable)
    def wrapper(*args: Any) -> Any:
        raise NotImplementedError

    assert return_annotation(unresolvable).annotation is Lonely
    assert return_annotation(wrapper).annotation is Lonely
    assert return_annotation(silent).annotation is None
    problem = return_annotation(broken)
    assert problem.problem == "NameError: name 'Nothing' is not defined" and problem.classes().unresolved == (
        "Nothing",
    )


def test_a_class_defined_later_resolves_later() -> None:
    space: dict[str, Any] = {}
    exec("from __future__ import annotations\nasync def f() -> Late: ...", space)
    assert return_annotation(space["f"]).problem is not None
    space["Late"] = Lonely
    assert return_annotation(space["f"]).classes().classes == (Lonely,)


def test_fingerprints_follow_the_classes() -> None:
    one, again, changed = (make_dataclass("Item", [("a", kind)]) for kind in (int, int, str))
    assert classes_of(one) != classes_of(again)
    assert classes_of(list[one]).fingerprint == classes_of(list[again]).fingerprint  # type: ignore[valid-type]
    assert len({classes_of(each).fingerprint for each in (one, changed, list[one], None, int)}) == 5  # type: ignore[valid-type]
    assert classes_of(None).fingerprint != classes_of("None | int").fingerprint


def test_ids_tell_enums_apart_by_their_members() -> None:
    def identity(**members: Any) -> str:
        shape = shape_of(enum.Enum("E", members, module="app"))
        assert isinstance(shape, Shape)
        return class_id(shape)

    assert identity(A=1) == identity(A=1)
    assert len({identity(A=1), identity(A=2), identity(A="1"), identity(A=1, B=2), identity(B=1)}) == 5


def test_texts_are_spelled_one_way() -> None:
    assert text_of(Optional[int]) == text_of(int | None) == "builtins.int | None"  # noqa: UP045
    assert text_of(Annotated[int, object()]) == "builtins.int"
    assert text_of(Literal[1, "a", Colour.RED]) == f"Literal[1, 'a', {__name__}.Colour.RED]"
    assert text_of(Callable[[int], str]) == "collections.abc.Callable[[builtins.int], builtins.str]"
    assert text_of(T) == "~T" and text_of(Any) == "typing.Any" and text_of(...) == "..."
    for annotation, _ in CASES:
        assert " at 0x" not in text_of(annotation)


def test_sets_are_remembered_and_compare() -> None:
    assert as_class_set(list[Lonely]) is as_class_set(list[Lonely])
    assert as_class_set(None) is NOTHING
    assert as_class_set(Annotated[Lonely, []]).classes == (Lonely,)
    assert classes_of(Lonely) == classes_of(Lonely) and hash(classes_of(Lonely)) == hash(classes_of(Lonely))
    assert classes_of(Lonely) != classes_of(Colour) and classes_of(Lonely) != 1
    assert isinstance(NOTHING, ClassSet) and NOTHING.classes == ()


def test_attrs_classes_come_back_exactly() -> None:
    classes = classes_of(Drawn | Fixed)
    for value in (Drawn(Point(Colour.RED)), Fixed(1), [Drawn(Point(Colour.RED), (1,))]):
        assert decode(*encode(value, classes), classes) == value
    with pytest.raises(UncacheableError):
        encode(attrs.make_class("Cached", ["x"], frozen=True, cache_hash=True)(1), classes)


def test_hooks_of_the_user_are_not_run_to_find_a_shape() -> None:
    runs: list[str] = []

    class Base(msgspec.Struct):
        x: int

        def __init_subclass__(cls, **kwargs: Any) -> None:
            runs.append(cls.__name__)

    class Child(Base):
        def __post_init__(self) -> None:
            runs.append("post")

    class Noisy:
        def __del__(self) -> None:
            runs.append("del")

    noisy = dataclass(Noisy)
    assert isinstance(shape_of(Base), Shape) and isinstance(shape_of(noisy), Shape)
    assert shape_of(Child) == "it has both a __post_init__ and an __init_subclass__"
    assert runs == ["Child"]


def test_slots_of_all_kinds() -> None:
    @dataclass
    class Base:
        __slots__ = ("__hidden", "x")
        x: int

    @dataclass(slots=True)
    class Child(Base):
        y: list[int] = field(default_factory=list)

    classes = classes_of(Child)
    back: Any = decode(*encode(Child(1, [2]), classes), classes)
    assert (back.x, back.y) == (1, [2])
    strange = Child(1)
    strange._Base__hidden = 1  # type: ignore[attr-defined]
    with pytest.raises(UncacheableError, match="_Base__hidden"):
        encode(strange, classes)


def test_fields_behind_descriptors_are_refused() -> None:
    @dataclass
    class Virtual:
        x: int

    Virtual.x = property(lambda self: 1, lambda self, value: None)  # type: ignore[assignment, method-assign]
    assert shape_of(Virtual) == "its field 'x' is a property"


PROGRAM = """
from __future__ import annotations
import sys
from dataclasses import dataclass
from mcp_hub_cache._classes import module_name, return_annotation
from mcp_hub_cache._keys import function_name

@dataclass
class Item:
    tags: set[str]
    other: Item | None = None

async def load() -> dict[str, Item]: ...

classes = return_annotation(load).classes()
print(module_name("__main__"), *function_name(load), classes.fingerprint, *classes.by_id, sep="\\n")
"""


def run(*arguments: str, cwd: Path, seed: str) -> list[str]:
    source = str(Path(mcp_hub_cache.__file__).parents[1])
    environment = {"PYTHONPATH": source, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_names_are_the_same_in_every_process_and_main_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").touch()
    (tmp_path / "app" / "job.py").write_text(PROGRAM)
    script = tmp_path / "other.py"
    script.write_text(textwrap.dedent(PROGRAM))
    by_name = run("-m", "app.job", cwd=tmp_path, seed="1")
    assert by_name == run("-m", "app.job", cwd=tmp_path, seed="2")
    assert by_name[1:] == run("-c", "import app.job", cwd=tmp_path, seed="3")[1:]
    assert by_name[:3] == ["app.job", "app.job.load", "app.job:load"]
    by_path = run("other.py", cwd=tmp_path, seed="1")
    assert by_path == run(str(script), cwd=Path("/"), seed="2")
    assert by_path[:3] == [str(script.resolve()), "other.load", f"{script.resolve()}:load"]
    assert by_path[3:] != by_name[3:]
    assert module_name("json") == "json"


def test_neither_pydantic_nor_msgspec_is_imported(tmp_path: Path) -> None:
    code = "import mcp_hub_cache._codec, mcp_hub_cache._keys, sys; print({'pydantic', 'msgspec'} & set(sys.modules))"
    assert run("-c", code, cwd=tmp_path, seed="0") == ["set()"]
