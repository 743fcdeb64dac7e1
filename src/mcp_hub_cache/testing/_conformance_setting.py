"""Two instances of a store, and frames to put in them: what every test of the conformance suite starts from."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from .._frame import Mark, pack, unpack
from .._freshness import span
from .._protocols import Coherent, Fence, Store, Write


def entry_frame(
    store: Store,
    key: bytes,
    payload: bytes = b'{"n":1}',
    *,
    ttl: float = 60.0,
    token: bytes | None = None,
    marks: tuple[Mark, ...] = (),
) -> bytes:
    """Return an entry's frame for *key* as the engine would write it to *store* now."""
    now = store.now()
    until = span(now, ttl)
    return pack(
        key,
        payload,
        codec=1,
        token=token if token is not None else secrets.token_bytes(8),
        created=now,
        fresh_until=until.fresh_until,
        keep_until=until.keep_until,
        marks=marks,
    )


def write_of(
    store: Store, key: bytes, payload: bytes = b'{"n":1}', *, ttl: float = 60.0, fence: Fence | None = None
) -> Write:
    """Return the write of such a frame."""
    return Write(key, entry_frame(store, key, payload, ttl=ttl), None if ttl == math.inf else ttl, fence)


def payload_of(frame: bytes | None, key: bytes) -> bytes | None:
    """Return the payload of the frame of *key*, None for None."""
    return None if frame is None else bytes(unpack(frame, key).payload)


class Pair:
    """Where the suite runs; ``StoreConformance`` says what a subclass gives."""

    prefix: bytes = b"mcp_hub:conformance:e:"

    def open_pair(self) -> AbstractAsyncContextManager[tuple[Store, Store]]:
        """Open two instances of the store; the subclass says how."""
        raise NotImplementedError

    async def wait_expiry(self, store: Store, until: float) -> None:
        """Return when *store*'s clock has passed *until*."""
        while store.now() <= until:  # noqa: ASYNC110  # the store's clock has no event to wait for
            await asyncio.sleep(0.005)

    async def wait_coherent(self, store: Coherent, key: bytes) -> bool:
        """Return whether *store* has stamps for *key*. For a store that comes to have them later: wait until it has."""
        return store.stamp(key) is not None

    @asynccontextmanager
    async def _pair(self) -> AsyncIterator[tuple[Store, Store]]:
        async with self.open_pair() as (one, two):
            try:
                yield one, two
            finally:
                await one.clear(b"")
                await one.aclose()
                await two.aclose()

    def key(self, name: str) -> bytes:
        """A key of the suite's own."""
        return self.prefix + name.encode()
