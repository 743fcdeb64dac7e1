"""Names: where a cache's keys stand in a store, and how a function's arguments become a key.

Strategy: a store key is ``prefix + namespace + ":" + kind letter + ":" + name``. A function's key is a readable name
and a digest over the function's identity and its bound arguments, spelled in the first of three forms that fits:

    1   all exact str, int, bool or None: JSON by orjson
    2   plain JSON by the codec's check: JSON with sorted keys
    3   anything else that has a stable form: the tagged form, ordered

Rules:
- Injective: two calls have one key exactly where their arguments are equal and of the same types (1, 1.0, True and
  "1" are four keys; 0.0 and -0.0 two). The form is part of the bytes; what is joined is length-prefixed.
- Stable: the same key in every process on every machine. Never ``repr``, never ``id``; what has no stable form is an
  error that names the argument.
- Arguments are digested, never shown: no key made here holds one (``template`` in ``_bind`` does, and says so).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from inspect import unwrap
from typing import Any, Final, NamedTuple

from ._bind import Binder, bind, bound_names, template
from ._blake import blake2b
from ._classes import module_name
from ._codec import is_plain, uncacheable
from ._exceptions import InvalidKeyError, UncacheableError
from ._shapes import Refusal
from ._tagged import Tagger, canonical, dumps, find_any

__all__ = [
    "Binder",
    "FunctionName",
    "KeySpace",
    "argument_bytes",
    "bind",
    "bound_names",
    "digest",
    "function_name",
    "join",
    "namer",
    "scope_of",
    "template",
    "true_name",
]

MAX_KEY_LENGTH: Final = 1024
MAX_ARGUMENT_DEPTH: Final = 100

_NAMESPACE: Final = r"[A-Za-z0-9_.-]{1,64}"
_PREFIX: Final = r"""(?:(?![*?"'`\[\]\\])[!-~]){0,64}"""
_SCALARS: Final = frozenset((str, int, bool, type(None)))
_DIGEST_SIZE: Final = 16
_READABLE_LENGTH: Final = 100
_SHOWN: Final = 40
_ADVICE: Final = "; leave it out with ignore=, or say with key= what stands for it"


class KeySpace:
    """The part of a store that is one cache's: everything under one prefix and namespace.

    Args:
        prefix: Stands before all keys: up to 64 printable ASCII characters without spaces, quotes, backslash or any of
            ``*?[]``; may be empty.
        namespace: 1 to 64 of ``A-Z a-z 0-9 _ . -``, not "." or "..". Holding no colon, no two namespaces share a key.
        scope: Digest of whose entries they are; empty: nobody's in particular.
        max_key_length: Characters of a name; at least 1.

    Attributes:
        root: Everything of this namespace starts with it.
        entries: All entries start with it; of this scope, where there is one.
        scope: As given.

    Raises:
        ValueError: Prefix or namespace is not as above.
    """

    __slots__ = ("_max_key_length", "entries", "namespace", "prefix", "root", "scope")

    def __init__(
        self,
        prefix: str = "mcp_hub:",
        namespace: str = "default",
        scope: str = "",
        *,
        max_key_length: int = MAX_KEY_LENGTH,
    ) -> None:
        for part in (prefix, namespace):
            _as_str(part)
        if not re.fullmatch(_NAMESPACE, namespace) or namespace in {".", ".."}:
            raise ValueError(f"a namespace is 1 to 64 of A-Z a-z 0-9 _ . - (not . or ..), not {_show(namespace)}")
        if not re.fullmatch(_PREFIX, prefix):
            raise ValueError(
                "a key prefix is at most 64 printable ASCII characters without spaces, quotes, backslash or any of "
                f"*?[], not {_show(prefix)}"
            )
        self.prefix = prefix
        self.namespace = namespace
        self.root = f"{prefix}{namespace}:".encode("ascii")
        self.entries = self.root + (b"s:%s:" % scope.encode("ascii") if scope else b"e:")
        self.scope = scope
        self._max_key_length = max_key_length

    def other(self, *, namespace: str | None = None, scope: str | None = None) -> KeySpace:
        """Return the same with another namespace or scope; None: the same one."""
        return KeySpace(
            self.prefix,
            self.namespace if namespace is None else namespace,
            self.scope if scope is None else scope,
            max_key_length=self._max_key_length,
        )

    def __repr__(self) -> str:
        """How to make it again."""
        return f"KeySpace(prefix={self.prefix!r}, namespace={self.namespace!r})"

    def entry(self, name: str) -> bytes:
        """Return the store key of the entry *name*.

        Raises:
            TypeError: *name* is no str.
            InvalidKeyError: It is empty, too long, or not encodable as UTF-8.
        """
        text = name if type(name) is str else _as_str(name)
        if not 0 < len(text) <= self._max_key_length:
            if not text:
                raise InvalidKeyError("a key has at least one character")
            # Without a word of it: by a template, a key holds arguments.
            raise InvalidKeyError(f"a key has at most {self._max_key_length:,} characters; this one has {len(text):,}")
        try:
            return self.entries + text.encode()
        except UnicodeEncodeError as error:
            place = error.start + 1
        # Out here, since that error holds the text, and would be this one's context.
        raise InvalidKeyError(f"the key's character {place:,} is a lone surrogate, which UTF-8 can't hold")

    def name_of(self, key: bytes) -> str | None:
        """Return the name that *key* is the entry of; None where it is no entry of this namespace."""
        if not key.startswith(self.entries) or len(key) == len(self.entries):
            return None
        try:
            return key[len(self.entries) :].decode()
        except UnicodeDecodeError:
            return None


def _as_str(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a key, prefix or namespace is a str, not {type(name).__name__}")
    return str.__str__(name)


def _show(text: str) -> str:
    return ascii(text) if len(text) <= _SHOWN else ascii(text[:_SHOWN]) + "..."


def argument_bytes(names: Sequence[str], values: tuple[object, ...]) -> bytes:
    """Return bytes that are equal exactly where *values* are equal and of the same types.

    Args:
        names: The parameters' names, for errors.
        values: What was bound to them, defaults applied.

    Raises:
        UncacheableError: An argument has no stable form; names it and the type, never the content.
    """
    try:
        if _SCALARS.issuperset(map(type, values)):
            try:
                return b"1" + dumps(values)
            except TypeError:  # an integer beyond 64 bits, a lone surrogate
                pass
        elif is_plain(plain := list(values), MAX_ARGUMENT_DEPTH):
            try:
                return b"2" + canonical(plain)
            except TypeError:
                pass
    except Exception:  # noqa: BLE001, S110  # a type that can't be hashed: the walk below names it
        pass
    tagger = Tagger(find_any, ordered=True, max_depth=MAX_ARGUMENT_DEPTH)
    tagged = []
    for name, value in zip(names, values, strict=True):
        where = f"argument {name}"
        try:
            tagged.append(tagger.tag(value))
        except Refusal as refusal:
            raise uncacheable(where, refusal, _ADVICE) from None
        except RecursionError:
            raise UncacheableError(f"{where}: there is no stack left to walk through it", where=where) from None
        except Exception as error:  # noqa: BLE001  # whatever a user's own class raises when it is looked at
            raise UncacheableError(f"{where}: reading it raised {type(error).__name__}", where=where) from None
    return b"3" + canonical(tagged)


def scope_of(scope: object) -> object:
    """Return the value that *scope* is, or that the context variable holds.

    Raises:
        LookupError: The variable is not set.
    """
    if not isinstance(scope, ContextVar):
        return scope
    try:
        return scope.get()
    except LookupError:
        raise LookupError(f"the scope variable {scope.name} is not set") from None


def digest(*parts: bytes) -> str:
    """Return 32 hex digits over *parts*; ``digest(b"a", b"bc")`` is another than ``digest(b"ab", b"c")``."""
    return blake2b(join(*parts), digest_size=_DIGEST_SIZE).hexdigest()


def join(*parts: bytes) -> bytes:
    """Return *parts*, each behind its length in 8 bytes: no two lists of parts give the same bytes."""
    return b"".join([piece for part in parts for piece in (len(part).to_bytes(8, "little"), part)])


class FunctionName(NamedTuple):
    """A function's names.

    Attributes:
        readable: For people: ``A-Z a-z 0-9 _ . -`` alone, safe in a shell and in a glob, at most 100 characters.
        identity: What tells it from every other function: true module and qualified name.
    """

    readable: str
    identity: str


def function_name(func: Callable[..., object]) -> FunctionName:
    """Return the names of *func*.

    Raises:
        TypeError: It is no function: it has no qualified name.
    """
    true_module, qualname = _true_names(func)
    # A script's true module is its path: for people, the file's name will do.
    shown = re.split(r"[/\\]", true_module)[-1].removesuffix(".py")
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{shown}.{qualname.replace('.<locals>', '')}").strip("_.")
    return FunctionName(readable[-_READABLE_LENGTH:].lstrip("_.-"), f"{true_module}:{qualname}")


def true_name(func: Callable[..., object]) -> str:
    """Return ``FunctionName.identity`` of *func* alone, which is what every call of a method asks for.

    Raises:
        TypeError: It is no function: it has no qualified name.
    """
    return ":".join(_true_names(func))


def _true_names(func: Callable[..., object]) -> tuple[str, str]:
    inner: Any = unwrap(func)
    qualname, module = getattr(inner, "__qualname__", None), getattr(inner, "__module__", None)
    if not isinstance(qualname, str):
        raise TypeError(f"a {type(func).__name__} is no function: it has no qualified name to make keys of")
    return module_name(module) if isinstance(module, str) else "", qualname


def namer(readable: str, identity: Sequence[bytes], names: Sequence[str]) -> Callable[[tuple[object, ...]], str]:
    """Return the function that makes a key's name, ``readable:digest``, from bound arguments.

    Args:
        readable: Stands before the digest.
        identity: All that tells these keys from others: the function's identity, version, fingerprint of its classes.
        names: The parameters' names, for errors. What else must tell calls apart (a scope) is one more argument.
    """
    # No form begins with a zero byte: the empty part behind the identity is where it ends. Digested once, and then
    # copied: two thirds of the time of beginning anew.
    begun = blake2b(join(*identity, b""), digest_size=_DIGEST_SIZE)
    scalars = _SCALARS

    def name(values: tuple[object, ...]) -> str:
        try:
            spelled = b"1" + dumps(values) if scalars.issuperset(map(type, values)) else b""
        except TypeError:
            spelled = b""
        digested = begun.copy()
        digested.update(spelled or argument_bytes(names, values))
        return f"{readable}:{digested.hexdigest()}"

    return name
