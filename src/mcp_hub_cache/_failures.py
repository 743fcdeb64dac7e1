"""Exceptions to bytes and back: a loader's failure that is kept for a while, and raised again for later callers.

Strategy: an exception is its class, its ``args`` and its ``__dict__`` (``__notes__`` among it), in the tagged form:
``["ex", name, args, attributes]``. An ``OSError`` keeps more than that in C; what it would be pickled with stands
for its args then, and at encoding it is tried whether that brings everything back.

Rules:
- A class either has no state besides, or is refused (``check_class``): never rebuilt as something similar.
- No ``__init__`` of anybody's runs, and no ``__new__`` that is not C.
- Bytes never name a class of their own: only the classes that were listed, and what derives from them in this process,
  are revived, and only where one class alone goes by that name.
- Traceback, ``__cause__`` and ``__context__`` are not kept: they belong to the one time that it was raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from struct import calcsize
from types import BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType, WrapperDescriptorType
from typing import Any, Final
from weakref import WeakValueDictionary

from ._classes import NOTHING, ClassSet, spell
from ._codec import FAILURE, DecodeError, unreadable
from ._revive import Reviver
from ._shapes import Refusal
from ._tagged import Json, Tagger, dumps, find_in, loads

_TAG: Final = "ex"
_POINTER: Final = calcsize("P")

# Not what the class itself may have put in the way of these names.
_ARGS: Final[Any] = vars(BaseException)["args"]
_ATTRIBUTES: Final[Any] = vars(BaseException)["__dict__"]
_OS_FIELDS: Final[tuple[Any, ...]] = tuple(
    field for field in vars(OSError).values() if isinstance(field, (MemberDescriptorType, GetSetDescriptorType))
)


def check_class(cls: object) -> None:
    """Make sure that exceptions of this class come back as they were.

    Args:
        cls: What was listed to be cached.

    Raises:
        TypeError: It is no class derived from ``Exception``, it can't leave a coroutine, or its instances have state
            besides ``args`` and ``__dict__``. Says which, and what to do.
    """
    problem = _problem(cls)
    if problem is not None:
        raise TypeError(f"cache_errors: {problem}")


def _problem(cls: object) -> str | None:
    if not isinstance(cls, type):
        return f"needs classes derived from Exception, not an instance of {spell(type(cls))}; name the class itself"
    name = spell(cls)
    if not issubclass(cls, Exception):
        what = "ends tasks and programs and is no answer" if issubclass(cls, BaseException) else "is no exception"
        return f"{name} {what}; name classes derived from Exception"
    if issubclass(cls, (StopIteration, StopAsyncIteration)):
        return f"{name} can't be raised by a coroutine; raise and name a class of your own"
    if issubclass(cls, BaseExceptionGroup):
        return f"{name} holds other exceptions, which can't be rebuilt; raise and name a class of your own"
    if (base := _with_own_new(cls)) is not None:
        return f"{name} can't be rebuilt: {base.__qualname__} has a __new__ of its own; do its work in __init__ instead"
    if (base := _with_slots(cls)) is not None:
        return f"{name} can't be rebuilt: {base.__qualname__} has __slots__; leave them out, there is a __dict__ anyway"
    if issubclass(cls, OSError) and not _is_init_in_c(cls):
        return (
            f"{name} can't be rebuilt: it is an OSError, whose fields are set by its own __init__ here; "
            "derive it from another exception, or leave __init__ out"
        )
    if _size_of(cls) > _size_of(OSError if issubclass(cls, OSError) else BaseException):
        return (
            f"{name} can't be rebuilt: it has fields that are neither in its args nor in its __dict__; "
            "raise and name a class of your own, derived from Exception"
        )
    return None


def _with_own_new(cls: type) -> type | None:
    made = ((base, vars(base).get("__new__")) for base in cls.__mro__)
    return next((base for base, new in made if new is not None and not isinstance(new, BuiltinFunctionType)), None)


def _with_slots(cls: type) -> type | None:
    slotted = (base for base in cls.__mro__ if "__slots__" in vars(base))
    return next(
        (base for base in slotted if any(isinstance(each, MemberDescriptorType) for each in vars(base).values())), None
    )


def _is_init_in_c(cls: Any) -> bool:
    return isinstance(cls.__init__, WrapperDescriptorType)


def _size_of(cls: type) -> int:
    """Bytes of an instance but for the weak references to it, for which every class made in Python adds room."""
    return cls.__basicsize__ - (_POINTER if cls.__weakrefoffset__ > 0 else 0)


class Failures:
    """The exceptions that one policy caches.

    Args:
        ttls: Seconds by class; a class stands for all that derive from it.

    Raises:
        TypeError: See ``check_class``.
    """

    __slots__ = ("_found", "_ttls")

    def __init__(self, ttls: Mapping[type[Exception], float]) -> None:
        for cls in ttls:
            check_class(cls)
        self._ttls = dict(ttls)
        self._found: WeakValueDictionary[str, type[Exception]] = WeakValueDictionary()

    def ttl_of(self, error: BaseException) -> float | None:
        """Return how many seconds *error* is to be kept: those of the nearest class listed; None: not at all."""
        return next((self._ttls[base] for base in type(error).__mro__ if base in self._ttls), None)

    def encode(self, error: Exception, classes: ClassSet = NOTHING) -> bytes:
        """Return the payload to store *error* as, under the codec ``FAILURE``.

        Traceback, ``__cause__`` and ``__context__`` are left out.

        Args:
            error: Not changed, and not kept.
            classes: The classes whose instances may be in its args and attributes.

        Raises:
            UncacheableError: It could not come back with the same class, args and attributes. Names the place, never
                content.
        """
        try:
            cls = type(error)
            name = self._name(cls)
            args, attributes = _given(error), _ATTRIBUTES.__get__(error)
            tagger = Tagger(find_in(classes))
            tagged = [_TAG, name, tagger.attribute("args", args, 1), tagger.attribute("__dict__", attributes, 1)]
            return dumps(tagged)
        except Exception as refused:  # noqa: BLE001  # whatever a user's own class raises when it is looked at
            raise unreadable("error", refused) from None

    def _name(self, cls: type[Exception]) -> str:
        name = spell(cls)
        if not any(base in self._ttls for base in cls.__mro__):
            raise Refusal(f"a {name} is none of the exceptions that are to be cached")
        if (problem := _problem(cls)) is not None:
            raise Refusal(problem)
        try:
            found = self._find(name)
        except LookupError:
            found = None
        if found is not cls:
            raise Refusal(f"more than one class is called {name}; give each a name of its own")
        return name

    def decode(self, payload: bytes | memoryview, classes: ClassSet = NOTHING) -> Exception:
        """Return a new exception that is what *payload* says, without running its ``__init__``.

        It has no traceback, no ``__cause__`` and no ``__context__``.

        Args:
            payload: Bytes of any origin.
            classes: The classes that may be revived in its args and attributes.

        Raises:
            DecodeError: Whatever is wrong; also where its class is not there, or not alone in having its name.
        """
        try:
            return self._revive(loads(payload), Reviver(classes))
        except Exception as error:  # noqa: BLE001  # as in _codec.decode, the chain cut for the same reason
            raise DecodeError(f"codec {FAILURE}: {type(error).__name__}") from None

    def _revive(self, data: Json, reviver: Reviver) -> Exception:
        tag, name, *state = data
        args, attributes = map(reviver.revive, state)
        if tag != _TAG or type(args) is not tuple or type(attributes) is not dict:
            raise TypeError("not the state of an exception")
        made = _make(self._find(name), args)
        _ATTRIBUTES.__set__(made, attributes)
        return made

    def _find(self, name: str) -> type[Exception]:
        """The class that *name* stands for. A listed one goes before those that only derive from one.

        Raises:
            LookupError: No class, several, or one that can't be rebuilt.
        """
        known = self._found.get(name)
        if known is not None:
            return known
        listed = [cls for cls in self._ttls if spell(cls) == name]
        found = listed or [cls for cls in _family(self._ttls) if spell(cls) == name]
        if len(found) != 1 or _problem(found[0]) is not None:
            raise LookupError("no class that may be revived")
        self._found[name] = found[0]
        return found[0]


def _family(roots: Iterable[type[Exception]]) -> Iterator[type[Exception]]:
    """Yield each of *roots* and everything that derives from them, once."""
    seen: set[type[Exception]] = set()
    waiting = list(roots)
    while waiting:
        cls = waiting.pop()
        if cls not in seen:
            seen.add(cls)
            yield cls
            waiting += type.__subclasses__(cls)


def _given(error: Exception) -> tuple[object, ...]:
    """What ``_make`` needs to make *error* again.

    Raises:
        Refusal: Nothing would.
    """
    args: tuple[object, ...] = _ARGS.__get__(error)
    if not isinstance(error, OSError):
        return args
    # Its args lose the file names, and fields can be set that args know nothing of. So it is tried out.
    given: tuple[object, ...] = OSError.__reduce__(error)[1]  # type: ignore[assignment]  # typeshed: str | tuple
    made = _make(type(error), given)
    if not _alike((*_ARGS.__get__(made), *_os_fields(made)), (*args, *_os_fields(error))):
        raise Refusal("the fields of this OSError are not those that its args make")
    return given


def _alike(left: tuple[object, ...], right: tuple[object, ...]) -> bool:
    """Whether both hold the very same objects, or equal numbers: nobody's own ``__eq__`` is asked."""
    return len(left) == len(right) and all(
        one is two or (type(one) is type(two) is int and one == two) for one, two in zip(left, right, strict=True)
    )


def _os_fields(error: Exception) -> tuple[object, ...]:
    found: list[object] = []
    for field in _OS_FIELDS:
        try:
            found.append(field.__get__(error))
        except AttributeError:  # characters_written, where it is not said
            found.append(None)
    return tuple(found)


def _make(cls: type[Exception], given: tuple[Any, ...]) -> Exception:
    if issubclass(cls, OSError):
        made: Exception = cls.__new__(cls, *given)
        if type(made) is not cls:  # OSError itself becomes what its errno stands for
            raise Refusal(f"its errno stands for another class, {type(made).__qualname__}")
        return made
    made = cls.__new__(cls)
    _ARGS.__set__(made, given)
    return made
