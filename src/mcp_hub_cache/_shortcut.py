"""Shortcuts: from a call's arguments to an entry of the near cache, with next to nothing in between.

Strategy: a decorated function has a table from its arguments to entries of L1 (aliases, see ``_l1``), and a wrapper
that is generated with the function's own signature. Python binds the arguments; one look into the table by their types
and values finds the entry; what it says of itself decides (``_near``). Nothing is bound, hashed or awaited besides.
Everything else takes the full path, which makes the alias when it meets an entry for the second time.

Rules:
- Only exact str, int, bool, bytes and None are names: their equality is that of keys, once their types are told apart.
  They stand behind the types, so that two values of different types are never compared.
- An alias leads to what L1 holds *now*: it goes with the entry, which goes with every own write, delete or clear.
- Where what is asked depends on more than arguments and a context variable (a method's instance, a key or scope
  function, a cache chosen at the call), there is no shortcut.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Hashable
from contextvars import ContextVar
from inspect import Parameter
from typing import TYPE_CHECKING, Any, Final

from ._bind import define, parameters_of
from ._classes import ClassSet
from ._l1 import NOT_SHARED
from ._stats import Tap

if TYPE_CHECKING:
    from ._flight import Flight
    from ._near import Near

AGAIN: Final = object()
"""What joining a load answers where it is not for that caller, who is to look for himself."""

_NAMES: Final = frozenset((str, int, bool, bytes, type(None)))
_FIXED: Final = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


class Shortcut(Tap):
    """A table from names to entries of L1, and the hits that were had by it.

    Attributes:
        table: The aliases of entries.
        flights: Those of loads in progress.
        cache: Whose entries they are; None: nobody's yet.
    """

    __slots__ = ("cache", "flights", "table")

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[Hashable, Near] = {}
        self.flights: dict[Hashable, Flight] = {}
        self.cache: object = None

    def lead_to(self, cache: object) -> None:
        """Start anew, with the entries of *cache*."""
        self.table.clear()
        self.flights.clear()
        self.cache = cache

    def add(self, name: Hashable, near: Near, classes: ClassSet, *, share: bool) -> None:
        """Let *name* lead to *near*. *share*: one object for all will be handed out, made with *classes*."""
        if not share or near.share(classes) is near.shared:
            near.alias(self.table, name)


class Current:
    """Says which cache is meant where none is named; None: it depends on who asks."""

    __slots__ = ("cache",)

    def __init__(self) -> None:
        self.cache: object = None


CURRENT: Final = Current()
"""The default cache, as long as one loop alone has one (``_open``)."""


def name_of(values: tuple[object, ...]) -> Hashable | None:
    """Return the name of a call with these arguments; None: it has none."""
    types = tuple(map(type, values))
    return (*types, *values) if _NAMES.issuperset(types) else None


_HIT: Final = """
    try:
      _near = _get(({types}{values}))
    except _Exception:
      _near = None
    if _near is not None{condition}:
      _changes = _near.changes
      if (
        _changes.words[_near.at] == _near.word
        and (_now := _changes.clock()) < _near.until
        and _now < _changes.until
      ):
        _value = _near.{value}
        if _value is _NOT_SHARED:
          _value = _near.{read}(_classes())
        if _value is not _NOT_SHARED:
          _near.visited = True
          _shortcut.hits += 1
          _shortcut.saved += _near.cost
          return _value
    return await _call(({positional}), {{{keywords}}})
"""


def generate(
    func: Callable[..., Any],
    call: Callable[[tuple[Any, ...], dict[str, Any]], Awaitable[Any]],
    shortcut: Shortcut,
    *,
    ignore: Collection[str],
    scope: ContextVar[Any] | None,
    classes: Callable[[], ClassSet],
    share: bool,
    default: bool,
) -> Callable[..., Any] | None:
    """Return an async function like *func* that takes the shortcut where it can and awaits *call* where not.

    Args:
        func: The function to be like.
        call: The full path: takes args and kwargs.
        shortcut: The table.
        ignore: Parameters that are no part of a name.
        scope: A context variable whose value is the first part of a name.
        classes: Returns what may be revived.
        share: Hand out one object for all.
        default: The shortcut is good while its cache is the ``CURRENT`` one.

    Returns:
        None where its signature has stars, or names that the generated source needs for itself.
    """
    parameters = parameters_of(func)
    if any(parameter.kind not in _FIXED or parameter.name.startswith("_") for parameter in parameters):
        return None
    means: dict[str, object] = {
        "_get": shortcut.table.get,
        "_NOT_SHARED": NOT_SHARED,
        "_shortcut": shortcut,
        "_classes": classes,
        "_call": call,
        # Of the builtins, since the function's module may have others by these names.
        "_type": type,
        "_Exception": Exception,
    }
    names = [parameter.name for parameter in parameters if parameter.name not in ignore]
    if scope is not None:
        means["_scope"], means["_unset"] = scope.get, object()
        names.insert(0, "_owner")
    if default:
        means["_current"] = CURRENT
    body = _HIT.format(
        types="".join(f"_type({name}), " for name in names),
        values="".join(f"{name}, " for name in names),
        condition=" and _shortcut.cache is _current.cache" if default else "",
        value="shared" if share else "value",
        read="share" if share else "read",
        positional="".join(f"{each.name}, " for each in parameters if each.kind is not Parameter.KEYWORD_ONLY),
        keywords="".join(f"'{each.name}': {each.name}, " for each in parameters if each.kind is Parameter.KEYWORD_ONLY),
    )
    if scope is not None:
        body = "    _owner = _scope(_unset)\n" + body
    function: Callable[..., Any] = define(func, body, means, asynchronous=True)
    return function
