"""``AsyncCache``: what agents type against. Every cache of this library is one.

The docstrings here are the contract; ``Cache`` inherits them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from datetime import timedelta
from enum import Enum
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    Protocol,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
    runtime_checkable,
)

if TYPE_CHECKING:
    from ._figures import CacheStatus, Entry
    from ._policy import Policy
    from ._protocols import Observer

T = TypeVar("T")
D = TypeVar("D")

Seconds = float | str | timedelta
"""A duration: seconds as a number, text with units ("10m", "1h30m", "250ms"), or a ``timedelta``."""
Loader = Callable[[], Awaitable[T]]
Scope = str | int | ContextVar[Any]
"""Whose entries they are: a tenant, a user, an agent run; itself or in a context variable."""


class PolicyOptions(TypedDict, total=False):
    """The options of a ``Policy``, which see, to be given one by one."""

    ttl: Seconds | Callable[[Any], Seconds] | None
    jitter: Seconds | None
    stale_ttl: Seconds | None
    throttle: Seconds | None
    soft_timeout: Seconds | None
    timeout: Seconds | None
    early: float | None
    cache_if: Callable[[Any], bool] | None
    cache_errors: Mapping[type[Exception], Seconds] | None
    tags: Iterable[str] | None
    coalesce: Literal["process", "fleet"] | None
    wait_timeout: Seconds | None
    on_wait_timeout: Literal["load", "stale", "error"] | None


class MissingType(Enum):
    """The type of ``MISSING``; an Enum, so that ``is MISSING`` narrows for type checkers."""

    MISSING = "MISSING"

    def __repr__(self) -> str:
        """Its name."""
        return "MISSING"

    __str__ = __repr__

    def __bool__(self) -> Literal[False]:
        """Nothing is there."""
        return False


MISSING: Final = MissingType.MISSING
"""Says "nothing is there" where None is a value: pass it as ``default`` to tell a cached None from a miss."""


@runtime_checkable
class AsyncCache(Protocol):
    """What agents type against: every cache of this library is one, and everything that takes a cache takes any.

    Keys are text of 1 to 1,024 characters, within the cache's namespace. A cached None is a hit. Trouble with the
    store is never the caller's: reads that fail are misses, writes that fail are counted. Misuse raises
    ``ValueError`` or ``TypeError`` at once.

    Cancellation: a cancelled call stops waiting. A read has no effect; a write that was handed on is carried out all
        the same.
    """

    @overload
    async def get(self, key: str, default: None = None, *, as_type: type[T]) -> T | None: ...
    @overload
    async def get(self, key: str, default: D, *, as_type: type[T]) -> T | D: ...
    @overload
    async def get(self, key: str, default: object = None, *, as_type: object = Any) -> Any: ...
    async def get(self, key: str, default: object = None, *, as_type: object = Any) -> Any:
        """Return the fresh value under *key*, or *default*.

        Args:
            key: 1 to 1,024 characters.
            default: What a miss answers; pass ``MISSING`` to tell it from a cached None.
            as_type: The type or annotation whose classes may be rebuilt, as it was given to ``set``. Plain data needs
                none.

        Returns:
            The value, which is the caller's own to change.

        Raises:
            InvalidKeyError: *key* is empty, too long, or not encodable.
        """
        ...

    async def get_many(self, keys: Iterable[str], *, as_type: object = Any) -> dict[str, Any]:
        """Return the hits among *keys*, in their order; misses are left out. One trip to the store."""
        ...

    async def get_entry(self, key: str, *, as_type: object = Any) -> Entry[Any] | None:
        """Return the fresh value under *key* with its times, or None."""
        ...

    async def set(
        self,
        key: str,
        value: object,
        *,
        ttl: Seconds | None = None,
        tags: Iterable[str] = (),
        policy: Policy | None = None,
        as_type: object = Any,
    ) -> None:
        """Store *value*. It wins over every load of *key* in progress, here and in other processes.

        Args:
            key: 1 to 1,024 characters.
            value: Plain data, the standard library's value types, or instances of classes that *as_type* names.
            ttl: Seconds it stays fresh, more than 0; None: the default; ``FOREVER``: no end.
            tags: Marks for ``invalidate``, besides those of the policy.
            policy: Says how long it lives (``ttl``, ``jitter``, ``stale_ttl``) and its ``tags``; the rest is about
                loads. None: the cache's own.
            as_type: The type or annotation whose classes *value* may hold.

        Raises:
            UncacheableError: *value* can't be stored so that a hit equals a miss; says where inside it and what to do.
            ValueTooLargeError: Its stored form is larger than the cache takes, 8 MiB unless set otherwise.
            ValueError: *ttl* is out of range or no duration, or a tag is empty or too long.
        """
        ...

    async def set_many(
        self,
        mapping: Mapping[str, object],
        *,
        ttl: Seconds | None = None,
        tags: Iterable[str] = (),
        policy: Policy | None = None,
        as_type: object = Any,
    ) -> None:
        """Store every pair of *mapping*. Raises as ``set``, before anything is stored."""
        ...

    async def add(
        self,
        key: str,
        value: object,
        *,
        ttl: Seconds | None = None,
        tags: Iterable[str] = (),
        policy: Policy | None = None,
        as_type: object = Any,
    ) -> bool:
        """Store *value* only if there is nothing fresh, atomically among all processes; answer whether it was.

        Raises as ``set``.
        """
        ...

    async def delete(self, key: str) -> bool:
        """Remove the entry; answer whether there was a fresh one. A load of *key* in progress stores nothing.

        One whose tags were invalidated may count as fresh here.
        """
        ...

    async def delete_many(self, keys: Iterable[str]) -> int:
        """Remove entries; answer how many fresh ones there were."""
        ...

    async def exists(self, key: str) -> bool:
        """Whether there is a fresh entry."""
        ...

    async def ttl(self, key: str) -> float | None:
        """Seconds the entry stays fresh; ``math.inf``: for ever; None: there is no fresh entry."""
        ...

    async def touch(self, key: str, ttl: Seconds) -> bool:
        """Let a fresh entry live for *ttl* from now; answer whether there was one. The value is not sent again."""
        ...

    async def get_or_load(
        self,
        key: str,
        loader: Loader[T],
        *,
        policy: Policy | None = None,
        scope: Scope | None = None,
        as_type: object = Any,
        refresh: bool = False,
        share: bool = False,
        label: str | None = None,
        owner: str | None = None,
        observer: Observer | None = None,
        **changes: Unpack[PolicyOptions],
    ) -> T:
        """Return the value under *key*, awaiting *loader* where there is none.

        Concurrent calls for one key share a single load (single flight, after Go's groupcache); with
        ``coalesce="fleet"``, in all processes. A ``delete``, ``set``, ``invalidate`` or ``clear`` during the load wins:
        the loaded value goes to those who wait for it and is not stored, and who calls afterwards gets a new load.

        Args:
            key: 1 to 1,024 characters.
            loader: Called without arguments by the leader only, in a copy of its context; must not ask for *key*
                itself. What it may decide for its entry, see ``current_entry``.
            policy: How the result is kept, refreshed and shared; None: as the cache is set.
            scope: Whose entry it is: part of the key. See ``with_scope``; an unset variable means uncached, with one
                warning in the log.
            as_type: The type or annotation whose classes the value may hold. A result that it can't revive is
                returned, not stored.
            refresh: Load even if there is a fresh value, and let nothing stale stand in. Shares only loads whose loader
                was not called yet.
            share: Every caller who says so promises not to change the value, and may be handed the same object as
                others: hits in the near cache and joined loads then cost no decoding.
            label: What errors, logs and task names call this load; None: the key.
            owner: Marks the entry, so that ``clear(owner=…)`` finds it.
            observer: Hears of this call too.
            **changes: Options of ``Policy`` (``ttl``, ``stale_ttl``, ``tags``, …), for this call, in place of the
                policy's; None: as there.

        Returns:
            The value; a stale one where the policy allows it. The leader gets what *loader* returned; the others get
            copies of their own, unless it is immutable, shared, or can't be stored.

        Raises:
            CircularLoadError: This call is made inside a load that the wanted one waits for.
            LoadTimeoutError: The load took longer than ``timeout``, or another process's longer than ``wait_timeout``,
                and nothing stale could stand in.
            TypeError: There is no such option, or it is of the wrong type.
            ValueError: An option is out of range, or contradicts another.
            BaseException: Whatever *loader* raised, unchanged, in every waiter; not stored, unless ``cache_errors``
                says so.

        Cancellation:
            The other waiters keep the load. The last to leave cancels it, and nothing is stored.
        """
        ...

    def keys(self, prefix: str = "") -> AsyncIterator[str]:
        """Iterate over the keys of fresh entries that begin with *prefix*, in no order, page by page.

        What is there throughout comes at least once; what comes and goes meanwhile may or may not.
        """
        ...

    async def clear(self, *, prefix: str = "", owner: str | None = None) -> int:
        """Remove the entries of this namespace, with the loads in progress; answer how many entries.

        Args:
            prefix: Only keys that begin with it.
            owner: Only entries that were loaded with it; looks into every entry.
        """
        ...

    async def invalidate(self, *tags: str) -> bool:
        """Invalidate every entry of this namespace that has one of *tags*, however many, in every process.

        Costs the same for one entry as for a million. Loads of such entries in progress store nothing, and who calls
        afterwards gets a new load.

        Returns:
            Whether the store has taken note; False, if it can't be reached: entries there may still be served, by this
            process and others, until they expire.

        Raises:
            TypeError: A tag is no text.
            ValueError: A tag is empty, or longer than 1,024 characters.

        Cancellation: the invalidation is carried out all the same.
        """
        ...

    def with_scope(self, scope: Scope) -> AsyncCache:
        """Return this cache for one tenant, user or agent run: the same store, lines and bounds, keys of its own.

        Its ``keys`` and ``clear`` know no others' entries, those of scopes within it neither. ``clear`` of the whole
        cache clears every scope's; tags are the namespace's. A scope of a scoped cache lies within that one's, in
        whichever namespace.

        Raises:
            LookupError: *scope* is a context variable that is not set.
            UncacheableError: *scope* has no stable form.
        """
        ...

    def with_namespace(self, namespace: str) -> AsyncCache:
        """Return this cache under another namespace: the same store, lines, bounds and scope, other keys."""
        ...

    async def health_check(self) -> bool:
        """Whether the store, or the primary where there is a standby, answers now."""
        ...

    async def status(self) -> CacheStatus:
        """Return a picture of the cache: state, figures, and what the store tells. Walks the namespace's keys."""
        ...

    async def aclose(self) -> None:
        """End every task and connection of the running loop. The cache opens again when it is next used.

        Loads in progress are cancelled, and a loader that does not end by that is left alone after 5 seconds.

        Cancellation: it is closed all the same, in the background.
        """
        ...

    async def __aenter__(self) -> Self:
        """Return the cache."""
        ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        ...
