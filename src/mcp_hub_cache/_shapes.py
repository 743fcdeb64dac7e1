"""How an instance of a structured class is taken apart, and rebuilt from that state alone.

Strategy: one ``Shape`` per class, of the first kind that fits: enum, named tuple, msgspec Struct, pydantic model,
dataclass, attrs class. ``take`` gives the instance's state, ``make`` builds an instance with exactly that state.

Rules:
- No ``__init__``, ``__post_init__``, ``__new__`` or validator of the user's runs: a value comes back as it was, even
  one that its own class would no longer accept.
- State is complete or there is none. Whatever an instance holds besides its declared fields is a ``Refusal``, but for
  values of ``functools.cached_property``, which are computed again. What was unset stays unset.
- A class whose instances hold data of a builtin (dict, list, str, Exception, …) has no shape: that data would be lost.
- pydantic, msgspec and attrs are recognised by the marks they leave on a class, never imported to find out.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cached_property, lru_cache
from inspect import getattr_static
from types import BuiltinFunctionType, MemberDescriptorType
from typing import Any, Final, Generic, Literal, NamedTuple, cast

Kind = Literal["enum", "namedtuple", "msgspec", "pydantic", "dataclass", "attrs"]
State = tuple[Mapping[str, object], object]
"""The values by field name, and what else there is to say about the instance (None: nothing)."""

_get: Final = object.__getattribute__
_set: Final = object.__setattr__
_PYDANTIC_SLOTS: Final = ("__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")


class Refusal(Exception):  # noqa: N818  # control flow between modules, never seen by users
    """Why something can't be stored exactly. ``path`` grows from the inside out while the walk unwinds."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path: list[str] = []


class Shape(NamedTuple):
    """What is to know about one class.

    Attributes:
        cls: The class itself; its subclasses have shapes of their own.
        kind: What sort of class it is.
        names: Its fields, in their order; for an enum its members.
        take: The state of an instance. Raises ``Refusal``.
        make: An instance with that state. Raises whatever it likes where the state is not one that ``take`` gives.
    """

    cls: type
    kind: Kind
    names: tuple[str, ...]
    take: Callable[[Any], State]
    make: Callable[[dict[str, object], object], object]


@lru_cache(maxsize=1024)
def shape_of(cls: type) -> Shape | str:
    """Return the shape of *cls*, or the reason why it has none."""
    try:
        if isinstance(cls, enum.EnumMeta):
            return _enum(cls)
        if issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple):
            return _named_tuple(cls)
        if is_msgspec(cls):
            return _struct(cls)
        if is_pydantic(cls):
            return _model(cls)
        if hasattr(cls, "__dataclass_fields__"):
            return _by_fields(cls, "dataclass", tuple(field.name for field in fields(cast("Any", cls))))
        if isinstance(attributes := getattr(cls, "__attrs_attrs__", None), tuple):
            return _by_fields(cls, "attrs", tuple(attribute.name for attribute in attributes))
    except Refusal as refusal:
        return refusal.reason
    return "it is no dataclass, model, Struct, NamedTuple or Enum"


def is_pydantic(cls: type) -> bool:
    """Whether *cls* is a pydantic (v2) model."""
    return any(base.__module__ == "pydantic.main" and base.__name__ == "BaseModel" for base in cls.__mro__[:-1])


def is_msgspec(cls: type) -> bool:
    """Whether *cls* is a msgspec Struct."""
    return any(base.__module__ == "msgspec" and base.__name__ == "Struct" for base in cls.__mro__[:-1])


def _refuse_builtin_bases(cls: type) -> None:
    for base in cls.__mro__:
        if base is not object and base is not Generic and isinstance(vars(base).get("__new__"), BuiltinFunctionType):
            raise Refusal(f"it extends {base.__name__}, whose own data would be lost")


def _slots_of(cls: type) -> dict[str, MemberDescriptorType]:
    members = (item for base in reversed(cls.__mro__) for item in vars(base).items())
    return {name: member for name, member in members if isinstance(member, MemberDescriptorType)}


def _computed(cls: type) -> frozenset[str]:
    """Names under which a ``cached_property`` keeps its value in the instance."""
    members = (item for base in cls.__mro__ for item in vars(base).items())
    return frozenset(member.attrname or name for name, member in members if isinstance(member, cached_property))


def _only(state: Mapping[str, object], names: frozenset[str], computed: frozenset[str]) -> Mapping[str, object]:
    if state.keys() <= names:
        return state
    for name in state:
        if name not in names and name not in computed:
            raise Refusal(f"its attribute {name!r} is not one of its fields")
    return {name: value for name, value in state.items() if name in names}


def _read_slots(value: object, slots: Mapping[str, MemberDescriptorType]) -> dict[str, object]:
    state = {}
    for name, slot in slots.items():
        try:
            state[name] = slot.__get__(value)
        except AttributeError:
            continue
    return state


def _check_names(fields: Mapping[str, object], names: frozenset[str]) -> None:
    if not fields.keys() <= names:
        raise ValueError("state with a field that the class does not have")


def _by_fields(cls: type, kind: Kind, field_names: tuple[str, ...]) -> Shape:
    _refuse_builtin_bases(cls)
    names, computed, slots = frozenset(field_names), _computed(cls), _slots_of(cls)
    has_dict = bool(cls.__dictoffset__)
    for name in names - slots.keys():
        member = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
        if hasattr(type(member), "__set__"):
            raise Refusal(f"its field {name!r} is a {type(member).__name__}")

    def take(value: object) -> State:
        state: Mapping[str, object] = _get(value, "__dict__") if has_dict else {}
        if slots:
            state = {**_read_slots(value, slots), **state}
        return _only(state, names, computed), None

    def make(fields: dict[str, object], rest: object) -> object:
        _check_names(fields, names)
        if rest is not None:
            raise ValueError("more state than fields")
        made: object = object.__new__(cls)
        for name, value in fields.items():
            _set(made, name, value)
        return made

    return Shape(cls, kind, field_names, take, make)


def _enum(cls: enum.EnumMeta) -> Shape:
    members: Mapping[str, enum.Enum] = cls._member_map_
    is_flag = issubclass(cls, enum.Flag)

    def take(value: enum.Enum) -> State:
        name = value._name_
        if type(name) is str and members.get(name) is value:
            return {}, name
        number = value._value_
        if is_flag and type(number) is int and cls._value2member_map_.get(number) is value:
            return {}, number
        raise Refusal("it is a member that its enum does not list")

    def make(fields: dict[str, object], rest: object) -> object:
        if fields:
            raise ValueError("an enum member has no fields")
        if type(rest) is str:
            return members[rest]
        if not is_flag or type(rest) is not int:
            raise ValueError("neither the name of a member nor a combination of flags")
        flags: Any = cls(rest)
        if type(flags) is not cls or flags._value_ != rest:
            raise ValueError("not a combination of these flags")
        return flags

    return Shape(cls, "enum", tuple(members), take, make)


def _named_tuple(cls: type) -> Shape:
    field_names: tuple[str, ...] = cls._fields  # type: ignore[attr-defined]  # seen by shape_of
    if not all(type(name) is str for name in field_names):
        raise Refusal("its _fields are no names")

    def take(value: tuple[object, ...]) -> State:
        if len(value) != len(field_names) or getattr(value, "__dict__", None):
            raise Refusal("it holds more or less than its fields")
        return dict(zip(field_names, tuple.__iter__(value), strict=True)), None

    def make(fields: dict[str, object], rest: object) -> object:
        if tuple(fields) != field_names or rest is not None:
            raise ValueError("not the fields of this named tuple")
        return tuple.__new__(cls, fields.values())

    return Shape(cls, "namedtuple", field_names, take, make)


def _model(cls: type) -> Shape:
    _refuse_builtin_bases(cls)
    declared: Mapping[str, object] = getattr(cls, "__pydantic_fields__", None) or getattr(cls, "model_fields", {})
    names, computed = frozenset(declared), _computed(cls)
    slots = {name: slot for name, slot in _slots_of(cls).items() if name not in _PYDANTIC_SLOTS}
    # A RootModel has no extra and no private state: there, plain class attributes hide these slots.
    kept = frozenset(name for name in _PYDANTIC_SLOTS if isinstance(getattr_static(cls, name), MemberDescriptorType))

    def take(value: object) -> State:
        if slots and _read_slots(value, slots):
            raise Refusal("it holds values in slots of its own")
        fields_set, extra, private = (_get(value, name) for name in _PYDANTIC_SLOTS)
        fields = _only(_get(value, "__dict__"), names, computed)
        return fields, {"set": fields_set, "extra": extra, "private": private}

    def make(fields: dict[str, object], rest: object) -> object:
        _check_names(fields, names)
        if not isinstance(rest, dict) or tuple(rest) != ("set", "extra", "private"):
            raise ValueError("not the state of a model")
        made: object = object.__new__(cls)
        _set(made, "__dict__", fields)
        for name, value in zip(_PYDANTIC_SLOTS, rest.values(), strict=True):
            if name in kept:
                _set(made, name, value)
        return made

    return Shape(cls, "pydantic", tuple(declared), take, make)


def _struct(cls: type) -> Shape:
    UNSET: object = sys.modules["msgspec"].UNSET  # noqa: N806  # cls being a Struct, it is imported
    field_names: tuple[str, ...] = cls.__struct_fields__  # type: ignore[attr-defined]  # every Struct has it
    names, computed = frozenset(field_names), _computed(cls)
    has_dict = bool(cls.__dictoffset__)
    maker: Callable[..., object] = cls
    if hasattr(cls, "__post_init__"):
        maker = _without_post_init(cls)

    def take(value: object) -> State:
        try:
            state = {name: getattr(value, name) for name in field_names}
        except AttributeError:
            raise Refusal("one of its fields is unset") from None
        if has_dict:
            _only(_get(value, "__dict__"), frozenset(), computed)
        unset = tuple(name for name, item in state.items() if item is UNSET)
        if not unset:
            return state, None
        return {name: item for name, item in state.items() if item is not UNSET}, unset

    def make(fields: dict[str, object], rest: object) -> object:
        unset = () if rest is None else rest
        if not isinstance(unset, tuple) or len(fields) + len(unset) != len(names):
            raise ValueError("not the state of this Struct")
        state = {**fields, **dict.fromkeys(unset, UNSET)}
        if state.keys() != names:
            raise ValueError("state with a field that the Struct does not have")
        return maker(**state)

    return Shape(cls, "msgspec", field_names, take, make)


def _do_nothing(_self: object) -> None:
    pass


def _without_post_init(cls: type) -> Callable[..., object]:
    """Return a maker of *cls* instances that leaves ``__post_init__`` out.

    Structs can't be made empty and msgspec calls ``__post_init__`` from C, so an instance of a subclass is made whose
    ``__post_init__`` does nothing, and then given its real class: Python itself checks that both are laid out alike.
    """
    owner = next(base for base in cls.__mro__ if "__init_subclass__" in vars(base))
    if owner not in (object, Generic) and owner.__module__.partition(".")[0] != "msgspec":
        raise Refusal("it has both a __post_init__ and an __init_subclass__")
    silent = type(cls)(cls.__name__, (cls,), {"__post_init__": _do_nothing, "__module__": cls.__module__})
    set_class: Callable[[object, type], None] = object.__dict__["__class__"].__set__

    def make(**state: object) -> object:
        made = silent(**state)
        set_class(made, cls)
        return made

    return make
