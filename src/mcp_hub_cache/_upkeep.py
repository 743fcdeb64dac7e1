"""What concerns many entries, or the store as a whole: listing, counting, clearing, health and facts.

Rules:
- Page by page, so that no call stalls the loop or outgrows memory, however many entries there are.
- Trouble never reaches a caller who did not ask for that (``Engine.trouble``): what could not be done ends early, with
  a word in the log. Health and status never raise it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from ._engine import Engine, Session
from ._exceptions import StoreError, StoreMisconfiguredError
from ._frame import Kind, Mark, peek
from ._marks import OWNED
from ._protocols import StoreState
from ._reads import Reads
from ._writes import Writes

log = logging.getLogger("mcp_hub_cache")


class Upkeep:
    """The upkeep of one engine's store."""

    def __init__(self, engine: Engine, reads: Reads, writes: Writes) -> None:
        self._engine = engine
        self._reads = reads
        self._writes = writes
        self._store = engine.store

    async def scan(self, prefix: bytes) -> AsyncGenerator[bytes, None]:
        """Yield the keys of fresh entries under *prefix*; ends early, with a word in the log, if the store fails."""
        session = self._engine.session()
        try:
            async with aclosing(self._store.scan(prefix)) as pages:
                async for page in pages:
                    marked: list[bytes] = []
                    for key, data in page:
                        if (head := self._reads.fresh_head(key, data)) is None:
                            continue
                        if head.mark_count:  # a head alone does not say which
                            marked.append(key)
                        else:
                            yield key
                    for key in await self._standing(session, marked):
                        yield key
        except StoreError as error:
            self._say("listing of the %s cache is incomplete: %s", error)

    async def _standing(self, session: Session, keys: list[bytes]) -> list[bytes]:
        """Those of *keys* whose entries' marks stand."""
        if not keys:
            return []
        frames = [
            (key, frame)
            for key, data in zip(keys, await self._store.get_many(keys), strict=True)
            if (frame := self._reads.intact(key, data)) is not None
        ]
        standing = await self._reads.stand_all(session, frames) if frames else []
        return [key for (key, _), one in zip(frames, standing, strict=True) if one.good]

    async def count(self, prefix: bytes) -> int:
        """How many fresh entries there are under *prefix*, as far as they can be listed."""
        total = 0
        with suppress(StoreError):
            async for _ in self.scan(prefix):
                total += 1
        return total

    async def clear(self, prefix: bytes) -> int:
        """Remove all under *prefix*, with the loads in progress; 0, and a word in the log, if the store fails.

        Cancellation: what has begun is carried out, by a task of the session. A cancelled caller gives it the deadline
        to end, so that what he stores next is not cleared as well.
        """
        task = self._engine.session().run(self._clear(prefix))
        try:
            cleared = await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task], timeout=self._engine.timeout)
            raise
        if not isinstance(cleared, StoreError):
            return cleared
        self._say("clearing the %s cache failed: %s", cleared)
        return 0

    def _say(self, text: str, error: StoreError) -> None:
        self._engine.trouble(error)
        log.error(text, self._store.name, error)

    async def _clear(self, prefix: bytes) -> int | StoreError:
        session = self._engine.session()
        session.forget_loads(prefix)
        await session.drop_prefix(prefix)
        await session.lines.settle()  # what was asked for before must not land after
        try:
            return await self._store.clear(prefix)
        except StoreError as error:
            return error
        finally:
            await session.drop_prefix(prefix)

    async def clear_owned(self, prefix: bytes, owner: bytes) -> int:
        """Remove the entries under *prefix* that were stored with *owner*: reads them all to find out."""
        session = self._engine.session()
        session.flights.detach_all(prefix, owner)
        await session.lines.settle()
        owned: list[bytes] = []
        try:
            async with aclosing(self._store.scan(prefix)) as pages:
                async for page in pages:
                    keys = [key for key, _ in page]
                    for key, data in zip(keys, await self._store.get_many(keys), strict=True):
                        if self._is_owned(session, key, data, owner):
                            owned.append(key)
        except StoreError as error:
            self._say("clearing the %s cache failed: %s", error)
        return await self._writes.delete_many(owned)

    def _is_owned(self, session: Session, key: bytes, data: bytes | None, owner: bytes) -> bool:
        """Whether *data* is an entry of *owner*'s, or stands for a load that may be."""
        head = None if data is None else peek(data)
        if head is not None and head.kind == Kind.PLACEHOLDER:
            return not session.flights.is_of_another(key, owner)
        frame = self._reads.intact(key, data)
        return frame is not None and Mark(owner, OWNED) in frame.marks

    async def ping(self) -> StoreState:
        """Ask the store and return how it is."""
        self._engine.session()
        found = StoreState("healthy")
        try:
            async with asyncio.timeout(self._engine.timeout):
                await self._store.ping()
        except TimeoutError:
            found = StoreState("unhealthy", None, f"no answer within {self._engine.timeout:g} s")
        except StoreMisconfiguredError as error:
            found = StoreState("misconfigured", None, str(error))
        except StoreError as error:
            found = StoreState("unhealthy", None, str(error))
        known = None if self._engine.monitored is None else self._engine.monitored.state()
        return found if known is None or (known.state == "healthy" != found.state) else known

    async def facts(self) -> dict[str, str | int | float]:
        """What the store says of itself; empty where it can't."""
        self._engine.session()
        try:
            async with asyncio.timeout(self._engine.timeout * 10):
                return dict(await self._store.info())
        except (StoreError, TimeoutError):
            return {}
