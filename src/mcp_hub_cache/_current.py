"""``current_entry()``: what a running loader may see and decide of the entry that it loads.

Strategy: a context variable holds one object per load, made before the loader is called and closed when it has ended.
What the loader decides is for this one entry: no policy is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from typing import Any, Final, Self, TypeVar

from ._async_cache import MISSING, MissingType, Seconds
from ._durations import seconds
from ._tags import check_count, check_tag

T = TypeVar("T")

_current: Final[ContextVar[Decided | None]] = ContextVar("mcp_hub_cache_entry", default=None)


class Tags(set[str]):
    """The tags of one entry. What is added is checked at once."""

    def add(self, tag: str, /) -> None:
        """Mark the entry with *tag*.

        Raises:
            TypeError: It is no text.
            ValueError: It is empty, or longer than 1,024 characters, or there are 1,000 already.
        """
        check_tag(tag)
        check_count(len(self) + 1)
        super().add(tag)

    def update(self, *others: Iterable[str]) -> None:
        """Mark the entry with all tags of *others*; raises as ``add``."""
        for tag in (tag for other in others for tag in other):
            self.add(tag)

    def __ior__(self, other: AbstractSet[str], /) -> Self:  # type: ignore[override,misc]  # of texts alone
        """``update``, spelled ``|=``."""
        self.update(other)
        return self


class Decided:
    """What is decided of one entry while it is loaded.

    Attributes:
        ttl: Seconds it will stay fresh, as the loader said; None: it said nothing.
        planned: As the policy says; None: a function of the result says.
        tags: See ``CurrentEntry``.
        tags_added: The same, None as long as nobody has looked at them.
        skipped: It is not to be stored.
        unchanged: What the loader was given as not modified; ``MISSING``: it did not ask.
        closed: The loader has ended.
    """

    __slots__ = ("_given", "closed", "planned", "read", "skipped", "tags_added", "ttl", "unchanged")

    def __init__(self, planned: float | None, tags: tuple[str, ...], read: Callable[[], Any] | None) -> None:
        self.ttl: float | None = None
        self.planned = planned
        self._given = tags
        self.tags_added: Tags | None = None
        self.read = read
        self.skipped = False
        self.unchanged: Any = MISSING
        self.closed = False

    @property
    def tags(self) -> Tags:
        if self.tags_added is None:
            self.tags_added = Tags(self._given)
        return self.tags_added

    def open(self) -> None:
        """Let ``current_entry`` lead here, in this context."""
        _current.set(self)


class CurrentEntry:
    """The entry that the running loader loads. See ``current_entry``; raises as that does once the loader has ended."""

    __slots__ = ("_of",)

    def __init__(self, decided: Decided) -> None:
        self._of = decided

    @property
    def _decided(self) -> Decided:
        if self._of.closed:
            raise LookupError("the load of this entry has ended: nothing can be decided of it any more")
        return self._of

    @property
    def tags(self) -> set[str]:
        """Marks for ``invalidate``: those of the policy, to which the loader may ``add`` or ``update``.

        Taking one away has no effect. A tag added here is good against every invalidation since the load began.
        Raises as ``Policy`` does for tags.
        """
        return self._decided.tags

    @tags.setter
    def tags(self, tags: AbstractSet[str]) -> None:
        if tags is not self._decided.tags:  # which it is for ``|=``
            raise AttributeError("tags can be added to, not replaced: entry.tags.update(...)")

    @property
    def ttl(self) -> float | None:
        """Seconds that the result will stay fresh; None: a function of the result will say.

        Set it to a duration, more than 0, or ``FOREVER``: it wins over the policy's, a function of the result too.
        """
        return self._decided.planned if self._decided.ttl is None else self._decided.ttl

    @ttl.setter
    def ttl(self, ttl: Seconds) -> None:
        self._decided.ttl = seconds(ttl)

    def skip(self) -> None:
        """Let the result go to those who wait for it, and not be stored."""
        self._decided.skipped = True

    @property
    def stale_value(self) -> Any | MissingType:
        """A copy of what is stored now; ``MISSING``: nothing usable is.

        There is something where a stale entry may stand in (``stale_ttl``), and where a fresh one is refreshed.
        """
        return MISSING if self._decided.read is None else self._decided.read()

    # Not Any: under mypy --strict a function that says what it returns may not return that.
    def not_modified(self) -> T:  # type: ignore[type-var]  # pyright: ignore[reportInvalidTypeVarUse]  # of any type
        """Return what is stored now, for the loader to return; it is kept for another ttl, and not written again.

        For origins that can say "not modified" (RFC 9110, 15.4.5).

        Raises:
            LookupError: Nothing usable is stored: look at ``stale_value`` before asking conditionally.
        """
        value: Any = self.stale_value
        if value is MISSING:
            raise LookupError(
                "nothing is stored that could be unmodified: ask unconditionally where stale_value is MISSING"
            )
        self._decided.unchanged = value
        return value  # type: ignore[no-any-return]  # whatever is stored


def current_entry() -> CurrentEntry:
    """Return what may be decided of the entry that the running loader loads.

    Example:
        >>> @acached(ttl="1h", stale_ttl="1d")
        ... async def page(url: str) -> str:
        ...     entry = current_entry()
        ...     answer = await fetch(url, old=entry.stale_value)
        ...     if answer.status == 304:
        ...         return entry.not_modified()
        ...     entry.ttl = answer.max_age
        ...     entry.tags.add(f"host:{answer.host}")
        ...     return answer.text

    Raises:
        LookupError: No loader of a cache runs in this context, or it has ended.
    """
    decided = _current.get()
    if decided is None or decided.closed:
        raise LookupError(
            "there is no current entry: current_entry() is for functions while a cache loads by them (@acached, "
            "get_or_load), not after, and not for uncached calls"
        )
    return CurrentEntry(decided)
