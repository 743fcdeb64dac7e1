"""Arguments to values: binders made from a function's signature, and key templates over them.

Strategy: a binder is a function with the very signature of the one it binds for, compiled once, whose body returns its
parameters. Python itself then applies defaults, keywords and stars, and raises its own TypeError for a wrong call:
some ten times faster than ``inspect.Signature.bind``.

Rules:
- Text goes into the compiled source from names of parameters alone; defaults are passed by reference.
- A template puts arguments into keys readably, where people and logs see them; without one they are only digested.
- Templates are injective, too: no two calls whose shown arguments differ in value or type have one key.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from keyword import iskeyword
from string import Formatter
from types import FunctionType, MappingProxyType
from typing import Any, Final
from uuid import UUID

from ._exceptions import UncacheableError

Binder = Callable[..., tuple[object, ...]]

_SEPARATORS: Final = ":/|,;#=&"
_ESCAPED: Final = re.compile(rf"[%\s\x00-\x1f\x7f\ud800-\udfff{_SEPARATORS}]")
_LOOKS_LIKE_ANOTHER: Final = re.compile(r"-?[0-9]+|True|False|None", re.ASCII)
_FIELD: Final = re.compile(r"([^\W\d]\w*)((?:\.[^\W\d_]\w*|\[\w+\])*)")
_STEP: Final = re.compile(r"\.(\w+)|\[(\w+)\]")


def parameters_of(func: Callable[..., object]) -> tuple[Parameter, ...]:
    """Return the parameters of *func*, without evaluating an annotation."""
    if sys.version_info >= (3, 14):
        import annotationlib  # noqa: PLC0415  # not there on 3.13

        signature = inspect.signature(func, annotation_format=annotationlib.Format.FORWARDREF)
    else:
        signature = inspect.signature(func)
    return tuple(signature.parameters.values())


def bound_names(
    func: Callable[..., object], *, ignore: Iterable[str] = (), skip_first: bool = False
) -> tuple[str, ...]:
    """Return the names of what ``bind`` with the same options returns the values of.

    Raises:
        ValueError: *ignore* names something that is no parameter.
    """
    names = [parameter.name for parameter in parameters_of(func)]
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    for name in ignored:
        if name not in names:
            raise ValueError(f"ignore names {name!r}, which {_name(func)} does not take; it takes {', '.join(names)}")
    kept = names[1:] if skip_first else names
    return tuple(name for name in kept if name not in ignored)


def bind(func: Callable[..., object], *, ignore: Iterable[str] = (), skip_first: bool = False) -> Binder:
    """Return a function that takes what *func* takes and returns the values of its parameters, in their order.

    Args:
        func: A function; ``*args`` count as one tuple, ``**kwargs`` as one dict.
        ignore: Parameters whose values are left out.
        skip_first: Leave out the first parameter's value, which must still be passed: ``self``.

    Raises:
        ValueError: *ignore* names something that is no parameter.
    """
    names = bound_names(func, ignore=ignore, skip_first=skip_first)
    binder: Binder = define(func, f"    return ({''.join(f'{name}, ' for name in names)})")
    return binder


def define(
    func: Callable[..., object],
    body: str,
    means: Mapping[str, object] = MappingProxyType({}),
    *,
    asynchronous: bool = False,
) -> Any:
    """Return a new function of *body* that has the name, the globals and the signature of *func*.

    Args:
        func: The function to be like. Its defaults are taken by reference.
        body: Source, indented by four spaces. May name the parameters, and what *means* names.
        means: What names in *body* stand for; no parameter may have one of them.
        asynchronous: Make it ``async def``.
    """
    parameters = parameters_of(func)
    name = getattr(func, "__name__", "")
    name = name if name.isidentifier() and not iskeyword(name) and name not in means else "call"
    lines = [
        f"def make({', '.join(means)}):",
        f"  {'async ' if asynchronous else ''}def {name}({_head(parameters)}):",
        *body.splitlines(),
        f"  return {name}",
    ]
    made: dict[str, Any] = {}
    source = compile("\n".join(lines), "<mcp_hub_cache>", "exec")
    exec(source, getattr(func, "__globals__", {}), made)  # noqa: S102  # of names of parameters and our own text
    function: FunctionType = made["make"](**means)
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    given = [parameter for parameter in parameters if parameter.default is not Parameter.empty]
    function.__defaults__ = tuple(parameter.default for parameter in given if parameter.kind in positional) or None
    function.__kwdefaults__ = {each.name: each.default for each in given if each.kind is Parameter.KEYWORD_ONLY}
    # A wrong call is reported in the function's name.
    function.__name__, function.__qualname__ = getattr(func, "__name__", "function"), _name(func)
    return function


def _name(func: Callable[..., object]) -> str:
    name = getattr(func, "__qualname__", None)
    return name if isinstance(name, str) else type(func).__name__


def _head(parameters: tuple[Parameter, ...]) -> str:
    parts: list[str] = []
    previous: Any = None
    for parameter in parameters:
        kind, text = parameter.kind, parameter.name
        if previous is Parameter.POSITIONAL_ONLY and kind is not Parameter.POSITIONAL_ONLY:
            parts.append("/")
        if kind is Parameter.KEYWORD_ONLY and previous not in (Parameter.KEYWORD_ONLY, Parameter.VAR_POSITIONAL):
            parts.append("*")
        if kind is Parameter.VAR_POSITIONAL:
            text = f"*{text}"
        elif kind is Parameter.VAR_KEYWORD:
            text = f"**{text}"
        elif parameter.default is not Parameter.empty:
            text = f"{text}=None"  # the place of a default; its value is set on the compiled function
        parts.append(text)
        previous = kind
    if previous is Parameter.POSITIONAL_ONLY:
        parts.append("/")
    return ", ".join(parts)


def template(
    text: str, func: Callable[..., object], *, skip_first: bool = False, tag: bool = False
) -> Callable[..., str]:
    """Return the function that makes a key, or a tag, from *text* and the arguments of a call to *func*.

    A field is ``{name}``, ``{name.attribute}`` or ``{name[item]}``, of a parameter. What it shows must be exactly an
    int, str, bool, None or UUID:

    - an int as it is: ``user:{user_id}`` gives ``user:42``; True, False and None by their names;
    - a UUID as ``%u`` and its text;
    - a str as it is, except that ``% : / | , ; # = &``, white space, control characters and lone surrogates are
      percent-encoded, and so is the first character of one that reads like an int, True, False or None
      (``"42"`` becomes ``%342``).

    Between two fields there must be one of ``: / | , ; # = &``, so that it is always plain where one ends.

    In a tag every value stands as ``str`` shows it, and nothing need be between fields: it must be the very text that
    somebody else writes to invalidate it, and tags that look alike only cost misses.

    Args:
        text: The template; literal braces are doubled, as in ``str.format``.
        func: Whose parameters may be used, and whose signature the answer has.
        skip_first: The first parameter, ``self``, may not be used.
        tag: It is a tag's.

    Raises:
        ValueError: A field is no parameter of *func*, or has a conversion or format, or follows another without one of
            the separators between them.
        UncacheableError: On a call: a field's value is of another type, or is not there.
    """
    what = "tag" if tag else "key"
    names = bound_names(func, skip_first=skip_first)
    fields: list[tuple[str, int, str, tuple[tuple[str, str], ...]]] = []
    tail = ""
    for literal, name, spec, conversion in Formatter().parse(text):
        if name is None:
            tail += literal
            continue
        if spec or conversion:
            raise ValueError(f"the {what} template's field {{{name}}} takes no conversion and no format")
        match = _FIELD.fullmatch(name)
        if match is None or match[1] not in names:
            takes = ", ".join(names)
            raise ValueError(f"the {what} template's field {{{name}}} is no parameter of {_name(func)}: {takes}")
        before = tail + literal
        if not tag and fields and not any(separator in before for separator in _SEPARATORS):
            raise ValueError(f"the {what} template needs one of {' '.join(_SEPARATORS)} before its field {{{name}}}")
        where = f"{what} template field {{{name}}}"
        fields.append((before, names.index(match[1]), where, tuple(_STEP.findall(match[2]))))
        tail = ""
    binder = bind(func, skip_first=skip_first)

    def render(*args: Any, **kwargs: Any) -> str:
        values = binder(*args, **kwargs)
        parts: list[str] = []
        for literal, index, where, steps in fields:
            value = values[index]
            if steps:
                value = _follow(value, where, steps)
            parts += (literal, _shown(value, where, plain=tag))
        return "".join(parts) + tail

    return render


def _follow(value: Any, where: str, steps: tuple[tuple[str, str], ...]) -> Any:
    for attribute, item in steps:
        try:
            value = getattr(value, attribute) if attribute else value[int(item) if item.isdecimal() else item]
        except Exception as error:  # noqa: BLE001  # attributes and items are computed by the user's own classes
            raise UncacheableError(f"{where}: {type(error).__name__}", where=where) from None
    return value


def _shown(value: Any, where: str, *, plain: bool) -> str:
    kind = type(value)
    if plain and kind in {str, UUID}:
        return str(value)
    if kind is str:
        shown = _ESCAPED.sub(_escape, value)
        return _escape(shown[0]) + shown[1:] if _LOOKS_LIKE_ANOTHER.fullmatch(shown) else shown
    if kind is int and value.bit_length() <= 4096:
        return str(value)
    if kind is bool or value is None:
        return str(value)
    if kind is UUID:
        return f"%u{value}"
    raise UncacheableError(
        f"{where}: a {kind.__qualname__} can't be shown there; a str, int, bool, None or UUID can", where=where
    )


def _escape(found: re.Match[str] | str) -> str:
    character = found if isinstance(found, str) else found[0]
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
