"""Which classes an annotation names, and what those classes are called in stored bytes.

Strategy: an annotation is walked once, through everything that it can be made of, into a ``ClassSet``: the closed set
of classes that may be revived under it. Stored bytes name a class by its id, which is looked up in that set alone.

Rules:
- Bytes never name a class of their own; a subclass of a listed class is not listed.
- An id covers the class's true name, its kind, its fields and their annotations: a changed class makes what was stored
  under the old one undecodable, which is a miss.
- Of a function only ``return`` is evaluated: a parameter that exists for type checkers only must not matter.
  Nothing here fails: what can't be evaluated is listed as unresolved and names no class.
- Texts hold no ids, no addresses, no ``repr`` of anybody's objects: they are the same in every process.
"""

from __future__ import annotations

import enum
import os
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from inspect import unwrap
from types import MappingProxyType, ModuleType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Final,
    ForwardRef,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from ._blake import blake2b
from ._shapes import Shape, is_pydantic, shape_of

_MAX_STEPS: Final = 20_000
_NAMING_NO_VALUE: Final = (type, Callable, ClassVar)
_SIMPLE: Final = (str, int, float, bool, bytes, type(None))


class Scope(NamedTuple):
    """Where the names in an annotation's text are looked up."""

    globalns: dict[str, Any]
    localns: Mapping[str, object]


class ClassSet:
    """The classes that may be revived under one annotation.

    Attributes:
        text: The annotation, spelled the same way in every process.
        fingerprint: Digest of *text* and of all class ids, for the keys of functions; any change of a class changes it.
        by_type: Id and shape by class.
        by_id: Shape by id.
        unresolved: Names in the annotation itself (not in its classes' fields) that could not be looked up.
    """

    __slots__ = ("by_id", "by_type", "fingerprint", "text", "unresolved")

    def __init__(
        self,
        text: str,
        fingerprint: str,
        by_type: Mapping[type, tuple[str, Shape]],
        unresolved: tuple[str, ...] = (),
    ) -> None:
        self.text = text
        self.fingerprint = fingerprint
        self.by_type = MappingProxyType(by_type)
        self.by_id = MappingProxyType(dict(by_type.values()))
        self.unresolved = unresolved

    def __repr__(self) -> str:
        """What it was made from."""
        return f"ClassSet({self.text!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClassSet):
            return NotImplemented
        return self.fingerprint == other.fingerprint and self.by_type.keys() == other.by_type.keys()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def classes(self) -> tuple[type, ...]:
        """The classes, in the order in which they were found."""
        return tuple(self.by_type)


class Returned(NamedTuple):
    """What a function says it returns. *problem* says why it could not be evaluated; *annotation* is then its text."""

    annotation: object
    scope: Scope
    problem: str | None = None

    def classes(self) -> ClassSet:
        """The classes that the annotation names; none where there was a problem."""
        return classes_of(self.annotation, globalns=self.scope.globalns, localns=self.scope.localns)


def return_annotation(func: Callable[..., object], frame_locals: Mapping[str, object] | None = None) -> Returned:
    """Evaluate the return annotation of *func* and nothing else of it. None where it has none.

    Args:
        func: The function; wrappers made with ``functools.wraps`` are looked through.
        frame_locals: The locals of the frame that decorates it, for classes made inside a function.

    Returns:
        The annotation. Where it could not be evaluated yet (a class defined further down), ask again at the first call.
    """
    inner: Any = unwrap(func)
    inner = getattr(inner, "__func__", inner)
    names: list[Mapping[str, object]] = [closure_of(inner)]
    if frame_locals is not None:
        names.append(frame_locals)
    names.append({item.__name__: item for item in getattr(inner, "__type_params__", ())})
    scope = Scope(getattr(inner, "__globals__", {}), ChainMap(*map(dict, names)))
    annotation = _annotations_of(inner).get("return")
    try:
        return Returned(_evaluate(annotation, scope), scope)
    except Exception as error:  # noqa: BLE001  # evaluating runs whatever the annotation says
        return Returned(annotation, scope, f"{type(error).__name__}: {error}")


def closure_of(func: Any) -> dict[str, object]:
    """The values of *func*'s free variables, as far as they are assigned."""
    found: dict[str, object] = {}
    code = getattr(func, "__code__", None)
    for name, cell in zip(getattr(code, "co_freevars", ()), getattr(func, "__closure__", None) or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return found


def _annotations_of(owner: Any) -> Mapping[str, object]:
    """The annotations that *owner* itself has, as far as they can be had without evaluating a text."""
    if sys.version_info >= (3, 14):
        import annotationlib  # noqa: PLC0415  # not there on 3.13

        try:
            return annotationlib.get_annotations(owner, format=annotationlib.Format.FORWARDREF)
        except Exception:  # noqa: BLE001
            return {}
    found = vars(owner).get("__annotations__") if isinstance(owner, type) else getattr(owner, "__annotations__", None)
    return found if isinstance(found, dict) else {}


def _evaluate(annotation: object, scope: Scope) -> object:
    for _ in range(8):
        if isinstance(annotation, ForwardRef):
            module: object = getattr(annotation, "__forward_module__", None)
            module = sys.modules.get(module) if isinstance(module, str) else module
            if isinstance(module, ModuleType):
                scope = Scope(vars(module), scope.localns)
            if sys.version_info >= (3, 14):
                with suppress(Exception):
                    annotation = annotation.evaluate()
                    continue
            annotation = annotation.__forward_arg__
        if not isinstance(annotation, str):
            return annotation
        annotation = eval(annotation, scope.globalns, scope.localns)  # noqa: S307  # the program's own source
    raise NameError("an annotation that names itself")


@lru_cache(maxsize=512)
def class_set(annotation: object) -> ClassSet:
    """Like ``classes_of`` for an annotation without texts (``as_type=``), and remembered."""
    return classes_of(annotation)


def as_class_set(annotation: object) -> ClassSet:
    """The classes that *annotation* (an ``as_type=``) names; ``NOTHING`` for None."""
    if annotation is None:
        return NOTHING
    try:
        return class_set(annotation)
    except TypeError:  # unhashable, such as Annotated[..., []]
        return classes_of(annotation)


def classes_of(
    annotation: object,
    *,
    globalns: dict[str, Any] | None = None,
    localns: Mapping[str, object] | None = None,
) -> ClassSet:
    """Walk *annotation* and return the closed set of classes that may be revived under it.

    Args:
        annotation: Any type annotation. Texts in it are evaluated in the names given; a class's own, in its module.
        globalns: Global names for texts.
        localns: Local names for texts.
    """
    outer = Scope(globalns if globalns is not None else {}, localns if localns is not None else {})
    shapes: dict[type, Shape] = {}
    unresolved: list[str] = []
    seen: dict[int, object] = {}
    waiting: list[tuple[object, Scope, bool]] = [(annotation, outer, True)]
    for _ in range(_MAX_STEPS):
        if not waiting:
            break
        item, scope, is_own = waiting.pop()
        if isinstance(item, (str, ForwardRef)):
            text = item if isinstance(item, str) else item.__forward_arg__
            try:
                item = _evaluate(item, scope)
            except Exception:  # noqa: BLE001
                if is_own:
                    unresolved.append(text)
                continue
        if id(item) in seen:
            continue
        seen[id(item)] = item  # the reference keeps the id from being used again
        waiting.extend((part, scope, is_own) for part in _parts(item))
        if isinstance(item, type) and get_origin(item) is None:
            shape = shape_of(item)
            if isinstance(shape, Shape):
                shapes[item] = shape
            if isinstance(shape, Shape) or _is_typed_dict(item):
                waiting.extend((part, inside, False) for part, inside in _field_annotations(item, outer))
    return _close(text_of(annotation), shapes, tuple(unresolved))


def _parts(item: object) -> Iterable[object]:
    origin = get_origin(item)
    if origin is None:
        if (supertype := getattr(item, "__supertype__", None)) is not None:  # NewType
            return (supertype,)
        if is_alias(item):
            return (item.__value__,)  # type: ignore[attr-defined]  # is_alias has seen it
        return ()
    if origin in _NAMING_NO_VALUE:
        return ()
    arguments = get_args(item)
    if origin is Annotated:
        return arguments[:1]
    if origin is Literal:
        return {type(value) for value in arguments if isinstance(value, enum.Enum)}
    return (origin, *arguments)


def is_alias(item: object) -> bool:
    """Whether *item* is a ``type X = ...`` (PEP 695), from ``typing`` or ``typing_extensions``."""
    return type(item).__name__ == "TypeAliasType" and hasattr(item, "__value__")


def _is_typed_dict(cls: type) -> bool:
    return issubclass(cls, dict) and hasattr(cls, "__required_keys__")


def _field_annotations(cls: type, outer: Scope) -> Iterable[tuple[object, Scope]]:
    for base in cls.__mro__[:-1]:
        module = sys.modules.get(base.__module__)
        globalns = vars(module) if module is not None else {}
        outside: list[dict[str, Any]] = [globalns, dict(outer.localns), outer.globalns]
        for annotation in _annotations_of(base).values():
            yield annotation, Scope(globalns, ChainMap({base.__name__: base}, dict(vars(base)), *outside))
            # In the text "date | None" of a field ``date``, the class's own ``date`` is the default, not the type.
            yield annotation, Scope(globalns, ChainMap(*outside))
        for generic in vars(base).get("__orig_bases__", ()):
            yield generic, outer
    if is_pydantic(cls):  # pydantic has put a generic model's arguments in place
        declared: Mapping[str, Any] = getattr(cls, "__pydantic_fields__", None) or {}
        for info in declared.values():
            yield info.annotation, outer


def _close(text: str, shapes: Mapping[type, Shape], unresolved: tuple[str, ...]) -> ClassSet:
    by_type = {cls: (class_id(shape), shape) for cls, shape in shapes.items()}
    names = [name for name, _ in by_type.values()]
    # Two classes that nothing tells apart (made by one function, called twice): neither may be revived as the other.
    by_type = {cls: entry for cls, entry in by_type.items() if names.count(entry[0]) == 1}
    digest = blake2b("\0".join((text, *sorted(names))).encode("utf-8", "surrogatepass"), digest_size=16)
    return ClassSet(text, digest.hexdigest(), by_type, unresolved)


@lru_cache(maxsize=64)
def _main_name(spec_name: str | None, path: str | None) -> str:
    return spec_name or (os.path.realpath(path) if path else "__main__")


def module_name(module: str) -> str:
    """Return what tells *module* from every other: for ``__main__`` what was run, by ``-m`` name or resolved path."""
    if module not in ("__main__", "__mp_main__"):
        return module
    main = sys.modules.get(module) or sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    return _main_name(getattr(spec, "name", None), getattr(main, "__file__", None))


def spell(cls: type) -> str:
    """Return the true name of *cls*: module, qualified name, and the arguments of a pydantic generic."""
    generic: Mapping[str, Any] = getattr(cls, "__pydantic_generic_metadata__", None) or {}
    if generic.get("origin") is not None:
        return f"{spell(generic['origin'])}[{_spell_all(generic['args'])}]"
    return f"{module_name(cls.__module__)}.{cls.__qualname__}"


def class_id(shape: Shape) -> str:
    """Return what stands for a class in stored bytes: its qualified name, and a digest over what must be unchanged."""
    cls: Any = shape.cls
    texts: dict[str, str] = {}
    if isinstance(cls, enum.EnumMeta):
        members: Mapping[str, enum.Enum] = shape.cls.__dict__["_member_map_"]
        texts = {name: _value_text(member.value) for name, member in members.items()}
    else:
        for base in reversed(cls.__mro__):
            texts.update((name, text_of(annotation)) for name, annotation in _annotations_of(base).items())
        texts = {name: texts.get(name, "") for name in shape.names}
    parts = (spell(cls), shape.kind, *(part for item in texts.items() for part in item))
    digest = blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8)
    return f"{cls.__qualname__}#{digest.hexdigest()}"


def _value_text(value: object) -> str:
    return repr(value) if type(value) in _SIMPLE else type(value).__qualname__


def _spell_all(items: Iterable[object]) -> str:
    return ", ".join(text_of(item) for item in items)


def text_of(annotation: object) -> str:
    """Spell *annotation* the same way in every process, however it was written down."""
    if isinstance(annotation, str):
        return annotation
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is ...:
        return "..."
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    if isinstance(annotation, TypeVar):
        return f"~{annotation.__name__}"
    if isinstance(annotation, (list, tuple)):
        return f"[{_spell_all(annotation)}]"
    origin = get_origin(annotation)
    if origin is None:
        if isinstance(annotation, type):
            return spell(annotation)
        name = getattr(annotation, "__qualname__", None) or getattr(annotation, "__name__", None)
        if not isinstance(name, str):
            name = getattr(annotation, "_name", None)  # Any, Self, and others of typing's own on 3.11
        if not isinstance(name, str):
            return spell(type(annotation))
        supertype = getattr(annotation, "__supertype__", None)
        return name if supertype is None else f"{name}({text_of(supertype)})"
    arguments = get_args(annotation)
    if origin is Annotated:
        return text_of(arguments[0])
    if origin is Literal:
        return f"Literal[{', '.join(_literal_text(value) for value in arguments)}]"
    if origin is Union or origin is UnionType:
        return " | ".join(text_of(argument) for argument in arguments)
    return f"{text_of(origin)}[{_spell_all(arguments)}]"


def _literal_text(value: object) -> str:
    return f"{spell(type(value))}.{value.name}" if isinstance(value, enum.Enum) else _value_text(value)


NOTHING: Final = _close("", {}, ())
"""The set of no classes."""
