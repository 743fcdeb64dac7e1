"""A store that fails, hangs and dawdles on command, and caches over one.

Strategy: each call asks the faults in force, then the wrapped store, then those faults that come after the effect. The
class is put together per instance from what the wrapped store can do, since the engine asks by ``isinstance``: what
wraps a store without leases claims none.

``Immediate`` alone is never claimed: a call that may wait is not over when it returns.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Hashable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack

from .._cache import Cache
from .._exceptions import StoreUnreachableError
from .._open import CacheOptions, replaced_default
from .._protocols import (
    Begun,
    Coherent,
    Evicting,
    Held,
    Leases,
    Monitored,
    Outcome,
    Patch,
    Replaceable,
    Retiming,
    Store,
    StoreState,
    Switching,
    Used,
    Write,
)
from ..stores.memory import MemoryStore
from ._faults import Fault, Seconds, checked, wait

if TYPE_CHECKING:
    from .._changes import Slot

T = TypeVar("T")

_METHODS: Final = frozenset({
    "get_many", "head_many", "begin_many", "write_many", "patch_many", "delete_many", "scan", "clear", "ping", "info",
    "changed", "renew_many", "release_many", "used_many",
})  # fmt: skip


class _StoreFault(Fault):
    """Of some methods, before or after their effect."""

    def __init__(
        self,
        rng: random.Random,
        act: Callable[[Fault], Coroutine[Any, Any, None]],
        methods: Sequence[str],
        *,
        times: int | None,
        probability: float,
        after: bool,
    ) -> None:
        super().__init__(rng, times=times, probability=probability)
        if unknown := set(methods) - _METHODS:
            known = ", ".join(sorted(_METHODS))
            raise ValueError(f"no method of stores: {', '.join(sorted(unknown))}; there are {known}")
        self.act = act
        self.methods = frozenset(methods) or _METHODS
        self.after = after


class FaultyStore:
    """A store in front of another one that misbehaves on command; for trying an agent against a broken cache.

    It can do what the wrapped store can (``Leases``, ``Coherent`` and the others), and no more. Without a fault in
    force, calls go straight through.

    Args:
        store: The real one.
        seed: Of what is left to chance.

    Attributes:
        calls: How often each method was called.
        hang: While cleared, every call waits for it to be set.
    """

    def __new__(cls, store: Store, *, seed: int = 0) -> Self:  # noqa: ARG004  # it is for __init__
        """Make one of a class that can do what *store* can."""
        able = tuple(mixin for protocol, mixin in _ABLE if isinstance(store, protocol))
        made: Any = type(cls.__name__, (cls, *able), {"__module__": cls.__module__})
        made_for_it: Self = object.__new__(made)
        return made_for_it

    def __init__(self, store: Store, *, seed: int = 0) -> None:
        self._store: Any = store  # a Store, and whatever its class was put together for
        self._rng = random.Random(seed)  # noqa: S311  # chance, no secret
        self._faults: list[_StoreFault] = []
        self.hang = asyncio.Event()
        self.hang.set()
        self.calls: dict[str, int] = {}

    # Faults

    def break_down(
        self,
        error: Exception | None = None,
        *methods: str,
        times: int | None = None,
        probability: float = 1.0,
        after: bool = False,
    ) -> Fault:
        """Fail calls from now on.

        Args:
            error: What they raise; None: what an unreachable server does.
            *methods: Of these alone, by their names in ``Store`` and its capabilities; none: of all.
            times: So many calls, and no more; None: all.
            probability: Of each call, more than 0, at most 1.
            after: Raise it when the call has had its effect, so that its caller can't know whether it had.
        """
        raised = StoreUnreachableError("the store was broken by the test.") if error is None else error

        async def fail(_: Fault) -> None:
            raise copy.copy(raised)  # raising writes to an exception

        return self._begin(_StoreFault(self._rng, fail, methods, times=times, probability=probability, after=after))

    def slow_down(
        self,
        seconds: Seconds,
        *methods: str,
        times: int | None = None,
        probability: float = 1.0,
        after: bool = False,
    ) -> Fault:
        """Let calls take so many seconds longer, or a random number between two; the rest as in ``break_down``."""
        checked(seconds)

        async def dawdle(_: Fault) -> None:
            await wait(self._rng, seconds)

        return self._begin(_StoreFault(self._rng, dawdle, methods, times=times, probability=probability, after=after))

    def stall(self, *methods: str, times: int | None = None, probability: float = 1.0, after: bool = False) -> Fault:
        """Let calls wait until the fault is ended, and then go on; the rest as in ``break_down``."""

        async def hold(fault: Fault) -> None:
            await fault.over.wait()

        return self._begin(_StoreFault(self._rng, hold, methods, times=times, probability=probability, after=after))

    def _begin(self, fault: _StoreFault) -> Fault:
        self._faults = [each for each in self._faults if not each.over.is_set()]
        self._faults.append(fault)
        return fault

    def repair(self) -> None:
        """End all faults: serve again."""
        for fault in self._faults:
            fault.end()
        self._faults = []
        self.hang.set()

    def _guarded(self, name: str, call: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        self.calls[name] = self.calls.get(name, 0) + 1
        if self._faults or not self.hang.is_set():
            return self._through(name, call)
        return call()

    async def _through(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        await self.hang.wait()
        await self._strike(name, after=False)
        result = await call()
        await self._strike(name, after=True)
        return result

    async def _strike(self, name: str, *, after: bool) -> None:
        for fault in reversed(self._faults):  # of two that fail, the later word counts
            if fault.after is after and name in fault.methods and fault.strikes():
                await fault.act(fault)

    # What every store does

    @property
    def name(self) -> str:
        """The wrapped store's."""
        name: str = self._store.name
        return name

    @property
    def id(self) -> int:
        """The wrapped store's."""
        number: int = self._store.id
        return number

    def now(self) -> float:
        """The wrapped store's; never fails."""
        now: float = self._store.now()
        return now

    def lane(self, key: bytes, /) -> Hashable:
        """The wrapped store's; never fails."""
        lane: Hashable = self._store.lane(key)
        return lane

    def get_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """See ``Store``; so for all that follow."""
        return self._guarded("get_many", lambda: self._store.get_many(keys))

    def head_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """See ``Store``."""
        return self._guarded("head_many", lambda: self._store.head_many(keys))

    def begin_many(self, keys: Sequence[bytes], /, *, hold: float) -> Awaitable[list[Begun]]:
        """See ``Store``."""
        return self._guarded("begin_many", lambda: self._store.begin_many(keys, hold=hold))

    def write_many(self, writes: Sequence[Write], /) -> Awaitable[list[Outcome]]:
        """See ``Store``."""
        return self._guarded("write_many", lambda: self._store.write_many(writes))

    def patch_many(self, patches: Sequence[Patch], /) -> Awaitable[list[Outcome]]:
        """See ``Store``."""
        return self._guarded("patch_many", lambda: self._store.patch_many(patches))

    def delete_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """See ``Store``."""
        return self._guarded("delete_many", lambda: self._store.delete_many(keys))

    async def scan(self, prefix: bytes, /) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        """See ``Store``. Each page is a call."""
        async with aclosing(self._store.scan(prefix)) as pages:
            while (page := await self._guarded("scan", lambda: anext(pages, None))) is not None:
                yield page

    def clear(self, prefix: bytes, /) -> Awaitable[int]:
        """See ``Store``."""
        return self._guarded("clear", lambda: self._store.clear(prefix))

    def ping(self, lane: Hashable = None, /) -> Awaitable[None]:
        """See ``Store``."""
        return self._guarded("ping", lambda: self._store.ping(lane))

    def info(self) -> Awaitable[Mapping[str, str | int | float]]:
        """See ``Store``."""
        return self._guarded("info", self._store.info)

    async def aclose(self) -> None:
        """Close the wrapped store; works while broken."""
        await self._store.aclose()


# What some stores can do besides. Each is a part of the class that a faulty store is of, where the wrapped one can.

if TYPE_CHECKING:
    _Part = FaultyStore
else:
    _Part = object  # else no class could have both as its bases


class _Coherent(_Part):
    def slot(self, key: bytes, /) -> Slot | None:
        slot: Slot | None = self._store.slot(key)
        return slot

    def stamp(self, key: bytes, /) -> int | None:
        stamp: int | None = self._store.stamp(key)
        return stamp

    def changed(self, key: bytes, stamp: int, /) -> Awaitable[None]:
        return self._guarded("changed", lambda: self._store.changed(key, stamp))

    def distrust(self) -> None:
        self._store.distrust()


class _Leases(_Part):
    def renew_many(self, held: Sequence[Held], /, *, hold: float) -> Awaitable[list[bool]]:
        return self._guarded("renew_many", lambda: self._store.renew_many(held, hold=hold))

    def release_many(self, held: Sequence[Held], /) -> Awaitable[None]:
        return self._guarded("release_many", lambda: self._store.release_many(held))


class _Used(_Part):
    def used_many(self, keys: Sequence[bytes], /) -> Awaitable[None]:
        return self._guarded("used_many", lambda: self._store.used_many(keys))


class _Monitored(_Part):
    def state(self) -> StoreState:
        state: StoreState = self._store.state()
        return state

    @property
    def serving(self) -> str:
        serving: str = self._store.serving
        return serving


class _Passed:
    """An attribute of the wrapped store's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, store: FaultyStore | None, owner: type | None = None) -> Any:
        return self if store is None else getattr(store._store, self._name)  # noqa: SLF001  # one class in two parts

    def __set__(self, store: FaultyStore, value: Any) -> None:
        setattr(store._store, self._name, value)  # noqa: SLF001


class _Replaceable(_Part):
    on_replaced = _Passed()


class _Evicting(_Part):
    on_evict = _Passed()


class _Switching(_Part):
    on_state = _Passed()


class _Retiming(_Part):
    retimed = _Passed()


_ABLE: Final[tuple[tuple[type, type], ...]] = (
    (Coherent, _Coherent),
    (Leases, _Leases),
    (Used, _Used),
    (Monitored, _Monitored),
    (Replaceable, _Replaceable),
    (Evicting, _Evicting),
    (Switching, _Switching),
    (Retiming, _Retiming),
)


def faulty(
    store: Store | None = None, *, seed: int = 0, **options: Unpack[CacheOptions]
) -> tuple[Cache, FaultyStore]:  # fmt: skip
    """Return a cache, and its store, which can be broken.

    Args:
        store: The one that misbehaves on command; None: one in memory.
        seed: Of what is left to chance.
        **options: See ``Cache``.

    Example:
        >>> cache, faults = faulty(timeout=0.1)
        >>> with faults.break_down():
        ...     await agent(cache)
    """
    if store is None:
        store = MemoryStore()
    faults = FaultyStore(store, seed=seed)
    return Cache(faults, **options), faults


@contextmanager
def as_default(cache: Cache) -> Iterator[None]:
    """Have *cache* be the running loop's default, which ``@acached`` uses where it is given none, within the block.

    Raises:
        RuntimeError: No loop runs.

    Example:
        >>> cache, faults = faulty()
        >>> with as_default(cache), faults.break_down():
        ...     await agent()
    """
    with replaced_default(cache):
        yield
