"""The primary that Sentinel names, wherever it is now.

Strategy: all sentinels are asked at once; of the answers that come, the one of the latest configuration counts (a
sentinel that was cut off still names the former primary). Before a connection to that server is used, the server itself
must say, by ROLE, that it is a primary: one that has been demoted is never written to.

Rules:
- When another server is named, all connections to the former one are dropped at once, the feed's among them.
- The sentinels are asked again before every connect, whenever the server says READONLY, and every ``_LOOK`` seconds of
  use. A sentinel that demotes a server also closes its clients' connections. So a former primary that nobody told of
  its demotion, since it is cut off from the sentinels but not from here, is used for ``_LOOK`` seconds of use and a
  round trip at most; so is one that was demoted by hand.
- Where ROLE is denied, the sentinels' word is enough.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from .._exceptions import StoreAuthError, StoreMisconfiguredError, StoreUnreachableError
from ._redis_address import Address
from ._redis_driver import ask, open_connection
from ._redis_errors import lost, store_error
from ._redis_places import Identity, facts_of_server
from ._redis_polls import poll
from ._redis_target import Target

_LOOK: Final = 5.0  # seconds of use between questions to the sentinels


class Sentinels:
    """Where the primary of a service is. See ``Place``. Of one loop.

    Args:
        loop: The running loop.
        target: Sentinels, service, and the servers' credentials.
        timeout: Seconds that asking may take.
        identity: Learns which server answers.

    Attributes:
        moved: Called when connections lead to the wrong server.
    """

    ask_every = _LOOK

    def __init__(self, loop: asyncio.AbstractEventLoop, target: Target, timeout: float, identity: Identity) -> None:
        self._loop = loop
        self._target = target
        self._timeout = timeout
        self._identity = identity
        self._primary: Address | None = None
        self._asking: asyncio.Task[Address] | None = None
        self._asked_at = -_LOOK
        self.moved: Callable[[], None] = lambda: None

    @property
    def where(self) -> str:
        """The primary where it is known, for people; else what to ask for it."""
        return self._target.where if self._primary is None else self._primary.where

    async def open(self, timeout: float) -> asyncio.StreamWriter:
        """See ``Place``; so for those that follow.

        Raises:
            StoreError: No sentinel answers, none knows the service, or the server is no primary.
        """
        address = await asyncio.shield(self._ask())
        writer = await open_connection(address, timeout, primary=True)
        if address != self._primary:  # another has been named meanwhile
            writer.transport.abort()
            raise lost(address.where)
        return writer

    def check(self) -> None:
        """Ask the sentinels, unless that has just been done."""
        if self._loop.time() - self._asked_at >= _LOOK:
            _ = self._ask()

    def met(self, replies: Sequence[Any]) -> None:
        """See ``Place``. A replica is given up."""
        facts = facts_of_server(replies)
        self._identity.met(facts)
        if facts.get(b"role") == b"slave":
            self.refused()

    def lost(self) -> None:
        """See ``Place``."""
        self._identity.lost()

    def refused(self) -> None:
        """Give up the connections, which makes the next ones ask the sentinels."""
        self._loop.call_soon(self.moved)  # not now: the answers that have come with this one are still being taken

    # Asking

    def _ask(self) -> asyncio.Task[Address]:
        """Return the question under way, begun now if there is none."""
        if self._asking is None:
            self._asked_at = self._loop.time()
            self._asking = task = self._loop.create_task(self._find(), name="mcp_hub_cache: ask Sentinel")
            task.add_done_callback(self._answered)
        return self._asking

    def _answered(self, task: asyncio.Task[Address]) -> None:
        self._asking = None
        if task.cancelled() or task.exception() is not None:
            return
        former, self._primary = self._primary, task.result()
        if former is not None and former != self._primary:
            self.moved()

    async def _find(self) -> Address:
        asked = await poll([self._ask_one(sentinel) for sentinel in self._target.nodes], self._timeout)
        named = {epoch: address for epoch, address in asked.answers if address is not None}
        if named:
            return named[max(named)]
        if asked.answers:
            raise StoreMisconfiguredError(
                f"the sentinels know no service {self._target.service!r} ({self._target.where}).",
                cure="Set REDIS_SENTINEL_SERVICE, or the path of the sentinel:// URL, to the name in their "
                "'sentinel monitor' line.",
            )
        trouble = asked.trouble()
        raise trouble if isinstance(trouble, StoreMisconfiguredError) else _silent(self._target.where)

    async def _ask_one(self, sentinel: Address) -> tuple[int, Address | None]:
        """What one sentinel says: the epoch of its configuration, and the primary's address; None: it knows of none."""
        service = self._target.service or ""
        try:
            place, facts = await ask(
                sentinel,
                self._timeout,
                ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service),
                ("SENTINEL", "MASTER", service),
            )
        except StoreAuthError as error:
            raise StoreAuthError(
                str(error).removesuffix(error.cure).rstrip(),
                cure="For the sentinels, set REDIS_SENTINEL_PASSWORD (and REDIS_SENTINEL_USERNAME).",
            ) from None
        if isinstance(place, Exception):
            raise store_error(str(place), sentinel.where)
        if place is None:
            return 0, None
        host, port = place
        said = dict(zip(facts[::2], facts[1::2], strict=False)) if isinstance(facts, list) else {}
        epoch = int(said.get(b"config-epoch", 0))
        return epoch, replace(self._target.address, host=host.decode() or sentinel.host, port=int(port))

    async def aclose(self) -> None:
        """End what is under way."""
        self.moved = lambda: None
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])


def _silent(where: str) -> StoreUnreachableError:
    return StoreUnreachableError(
        f"Redis connection failed: none of the sentinels answers ({where}).",
        cure="Check that they are running, that REDIS_SENTINELS (or the sentinel:// URL) names them, and that no "
        "firewall stands between.",
    )
