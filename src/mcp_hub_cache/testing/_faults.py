"""Stand-ins that misbehave when told to: a clock that is set, a store that fails or hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any

from .._exceptions import StoreError, StoreUnreachableError
from .._protocols import Begun, Outcome, Patch, Store, Write


class FakeClock:
    """A clock for ``clock=``: call it for the time, ``advance`` it by hand.

    Args:
        start: Seconds since the epoch.
    """

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self.time = start

    def __call__(self) -> float:
        """Return the time."""
        return self.time

    def advance(self, by: float) -> None:
        """Move on by so many seconds; negative: the clock is set back."""
        self.time += by


class FaultyStore:
    """A store in front of another one that misbehaves on command; for trying an agent against a broken cache.

    Attributes:
        error: Raised by every call while set.
        hang: While cleared, calls wait for it to be set.
        calls: How often each method was called.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.error: StoreError | None = None
        self.hang = asyncio.Event()
        self.hang.set()
        self.calls: dict[str, int] = {}

    def break_down(self, error: StoreError | None = None) -> None:
        """Fail every call from now on, as an unreachable server does unless *error* says otherwise."""
        self.error = error if error is not None else StoreUnreachableError("the store was broken by the test.")

    def repair(self) -> None:
        """Serve again."""
        self.error = None
        self.hang.set()

    @property
    def name(self) -> str:
        """The wrapped store's."""
        return self._store.name

    @property
    def id(self) -> int:
        """The wrapped store's."""
        return self._store.id

    def now(self) -> float:
        """The wrapped store's."""
        return self._store.now()

    def lane(self, key: bytes, /) -> Hashable:
        """The wrapped store's."""
        return self._store.lane(key)

    async def _guarded(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        self.calls[name] = self.calls.get(name, 0) + 1
        await self.hang.wait()
        if self.error is not None:
            raise self.error
        return await call()

    async def get_many(self, keys: Sequence[bytes], /) -> list[bytes | None]:
        """See ``Store``; so for all that follow."""
        result: list[bytes | None] = await self._guarded("get_many", lambda: self._store.get_many(keys))
        return result

    async def head_many(self, keys: Sequence[bytes], /) -> list[bytes | None]:
        """See ``Store``."""
        result: list[bytes | None] = await self._guarded("head_many", lambda: self._store.head_many(keys))
        return result

    async def begin_many(self, keys: Sequence[bytes], /, *, hold: float) -> list[Begun]:
        """See ``Store``."""
        result: list[Begun] = await self._guarded("begin_many", lambda: self._store.begin_many(keys, hold=hold))
        return result

    async def write_many(self, writes: Sequence[Write], /) -> list[Outcome]:
        """See ``Store``."""
        result: list[Outcome] = await self._guarded("write_many", lambda: self._store.write_many(writes))
        return result

    async def patch_many(self, patches: Sequence[Patch], /) -> list[Outcome]:
        """See ``Store``."""
        result: list[Outcome] = await self._guarded("patch_many", lambda: self._store.patch_many(patches))
        return result

    async def delete_many(self, keys: Sequence[bytes], /) -> list[bytes | None]:
        """See ``Store``."""
        result: list[bytes | None] = await self._guarded("delete_many", lambda: self._store.delete_many(keys))
        return result

    async def scan(self, prefix: bytes, /) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        """See ``Store``."""
        async for page in self._store.scan(prefix):
            if self.error is not None:
                raise self.error
            yield page

    async def clear(self, prefix: bytes, /) -> int:
        """See ``Store``."""
        result: int = await self._guarded("clear", lambda: self._store.clear(prefix))
        return result

    async def ping(self, lane: Hashable = None, /) -> None:
        """See ``Store``."""
        await self._guarded("ping", lambda: self._store.ping(lane))

    async def info(self) -> Mapping[str, str | int | float]:
        """See ``Store``."""
        result: Mapping[str, str | int | float] = await self._guarded("info", self._store.info)
        return result

    async def aclose(self) -> None:
        """Close the wrapped store; works while broken."""
        await self._store.aclose()
