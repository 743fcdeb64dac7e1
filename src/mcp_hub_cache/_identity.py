"""What tells a decorated function from all others: its true name, and what it closes over.

Strategy: functions that a factory makes share module and name and differ in their free variables. What of those has a
stable form is part of the identity, functions and their own free variables included. It is looked at when the function
is first called: by then, what is defined further down is there.

Rules:
- What the function assigns or changes itself (``nonlocal``, ``calls.append(...)``, ``calls["n"] += 1``) is state, not
  meaning.
- What has no stable form (clients, locks) is not part of it either. Where a function of the same identity turns up with
  another object of a user's own class, that is said in the log, once.
- Never ``repr``, never ``id``: an identity is the same in every process.
"""

from __future__ import annotations

import dis
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType, MethodType
from typing import Any, Final

from ._classes import closure_of
from ._exceptions import UncacheableError
from ._keys import argument_bytes, digest, function_name, true_name

log = logging.getLogger("mcp_hub_cache")

_CONTAINERS: Final = (list, dict, set, bytearray)
_MUTATORS: Final = frozenset(
    name for kind in _CONTAINERS for name in dir(kind) if not name.startswith("_") and not hasattr(tuple, name)
) - {"copy", "get", "items", "keys", "values"}
_MAX_REMEMBERED: Final = 10_000

_seen: dict[str, dict[str, int]] = {}
"""The objects without a stable form that the functions of an identity close over. Decides nothing but a warning."""


def identify(func: Callable[..., Any]) -> str:
    """Return the identity of *func*; wrappers made with ``functools.wraps`` are looked through."""
    inner = inspect.unwrap(func)
    unknown: dict[str, int] = {}
    text = _text(inner, unknown, set())
    before = _seen.get(text)
    if before is None:
        if len(_seen) < _MAX_REMEMBERED:
            _seen[text] = unknown
    elif other := sorted(name for name, place in unknown.items() if before.get(name, place) != place):
        before.clear()
        log.warning(
            "%s exists more than once, each with another %s, which can't be part of its keys: all share their entries. "
            "Tell them apart with version=, scope= or key=",
            function_name(inner).readable,
            ", ".join(other),
        )
    return text


def own_key(instance: Any) -> tuple[str, object]:
    """Return what tells *instance* from others: its class's true name, and what its ``__cache_key__`` says."""
    material = instance.__cache_key__  # an attribute, a property or a method
    return true_name(type(instance)), material() if callable(material) else material


def _text(func: Any, unknown: dict[str, int], within: set[int]) -> str:
    """The true name of *func* with the forms of its free variables; notes in *unknown* which have none."""
    text = true_name(func)
    code = getattr(func, "__code__", None)
    if not isinstance(code, CodeType) or id(func) in within:
        return text
    within.add(id(func))
    if func.__name__ == "<lambda>":
        constants = [item for item in code.co_consts if not isinstance(item, CodeType)]
        text += f" {digest(code.co_code, *(name.encode() for name in code.co_names), _form(constants).encode())}"
    state, writes_items = _state(code)
    for name, value in sorted(closure_of(func).items()):
        if name in state or (writes_items and type(value) in _CONTAINERS):
            continue
        form = _captured(value, unknown, within)
        if form:
            text += f" {name}={digest(form.encode())}"
        elif _may_mean_something(value):
            unknown[name] = id(value)
    return text


def _captured(value: object, unknown: dict[str, int], within: set[int]) -> str:
    """A text for *value*; empty where it has no stable form."""
    if isinstance(value, FunctionType):
        return "function " + _text(value, unknown, within)
    if isinstance(value, MethodType):
        own = _captured(value.__self__, unknown, within)
        return f"method {_text(value.__func__, unknown, within)} of {own}" if own else ""
    if isinstance(value, functools.partial):
        parts = [_captured(part, unknown, within) for part in (value.func, *value.args, *value.keywords.values())]
        return f"partial {_form(parts)} {_form(list(value.keywords))}" if all(parts) else ""
    if inspect.isclass(value) or inspect.isbuiltin(value):
        return "name " + true_name(value)
    if hasattr(type(value), "__cache_key__"):
        return _form(list(own_key(value)))
    return _form(value)


def _form(value: object) -> str:
    try:
        return argument_bytes(("value",), (value,)).decode("latin-1")
    except UncacheableError:
        return ""


def _state(code: CodeType) -> tuple[set[str], bool]:
    """The free variables that *code*, or a function in it, assigns or changes; and whether it writes items at all."""
    names: set[str] = set()
    writes_items = False
    steps: Iterable[dis.Instruction] = dis.get_instructions(code)
    loaded: str | None = None
    for step in steps:
        if step.opname in {"STORE_DEREF", "DELETE_DEREF"}:
            names.add(str(step.argval))
        if loaded is not None and step.opname in {"LOAD_ATTR", "LOAD_METHOD"} and step.argval in _MUTATORS:
            names.add(loaded)
        writes_items |= step.opname in {"STORE_SUBSCR", "DELETE_SUBSCR"}
        loaded = str(step.argval) if step.opname in {"LOAD_DEREF", "LOAD_CLASSDEREF"} else None
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more, writes = _state(inner)
            names |= more
            writes_items |= writes
    return names, writes_items


def _may_mean_something(value: object) -> bool:
    """Whether *value* may say what about, not just how: no lock, no counter, no cache."""
    home = type(value).__module__.partition(".")[0]
    return home not in sys.stdlib_module_names and home != __package__
