"""Where a wire connects, and which server it then talks to.

Strategy: a wire (``_redis_wire``) asks its place for each connection, and puts a question in front of whatever it sends
first, and again now and then: the answer tells the time, and which server it is. A ``Fixed`` place is one address;
``_redis_sentinel`` finds the primary of the moment.

Rules:
- A server is another one when its run id changes (it was restarted, or something else answers at that address) or its
  replication id (it was promoted, or was a replica meanwhile). Then its last changes may be lost, and whoever wants to
  know is told before any answer of it is handed out: its word on itself comes first on every connection.
- Where INFO is denied, nobody can tell, and every connection that follows a lost one may be to another server.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from ._redis_address import Address
from ._redis_driver import open_connection

IDENTIFY: Final = (b"INFO", b"server"), (b"INFO", b"replication")
"""The commands whose replies say which server it is; two, since servers before 7 take one section at a time."""
_FACT: Final = re.compile(rb"^(run_id|master_replid|role):(\w+)", re.MULTILINE)


class Identity:
    """Which server was last heard, and whether it is another one than before.

    Args:
        replaced: Called when it is.
    """

    def __init__(self, replaced: Callable[[], None]) -> None:
        self._replaced = replaced
        self._known: tuple[bytes, ...] | None = None
        self._in_doubt = False

    def lost(self) -> None:
        """A connection has ended."""
        self._in_doubt = True

    def met(self, facts: dict[bytes, bytes]) -> None:
        """A server has said *facts* of itself; none: it was not willing to."""
        said = tuple(facts[name] for name in (b"run_id", b"master_replid") if name in facts) or None
        replaced = self._in_doubt if said is None else self._known not in {None, said}
        self._known = said or self._known
        self._in_doubt = False
        if replaced:
            self._replaced()


class Place(Protocol):
    """Where the wires of one loop connect.

    Attributes:
        ask_every: Seconds of a connection's use between questions of who is there.
    """

    ask_every: float

    @property
    def where(self) -> str:
        """The server, for people."""
        ...

    async def open(self, timeout: float) -> asyncio.StreamWriter:
        """Open a connection; see ``open_connection``."""
        ...

    def check(self) -> None:
        """See to it, in the background, that this is still the right server. Called now and then while it is used."""
        ...

    def met(self, replies: Sequence[Any]) -> None:
        """Take the replies to ``IDENTIFY``."""
        ...

    def lost(self) -> None:
        """A connection has ended, or was given up."""
        ...

    def refused(self) -> None:
        """The server takes no writes: it is a replica."""
        ...

    async def aclose(self) -> None:
        """End what is under way."""
        ...


def facts_of_server(replies: Sequence[Any]) -> dict[bytes, bytes]:
    """What the replies to ``IDENTIFY`` say; error replies say nothing."""
    return {
        name: value for reply in replies if isinstance(reply, bytes) for name, value in _FACT.findall(reply)
    }  # fmt: skip


class Fixed:
    """A server that stays where it is. See ``Place``.

    Args:
        address: Its address.
        identity: Learns who answers there; None: nobody wants to know.
    """

    ask_every = 60.0

    def __init__(self, address: Address, identity: Identity | None = None) -> None:
        self.address = address
        self.where = address.where
        self._identity = identity

    async def open(self, timeout: float) -> asyncio.StreamWriter:
        """See ``Place``; so for those that follow."""
        return await open_connection(self.address, timeout)

    def check(self) -> None:
        """Nothing to see to."""

    def met(self, replies: Sequence[Any]) -> None:
        """See ``Place``."""
        if self._identity is not None:
            self._identity.met(facts_of_server(replies))

    def lost(self) -> None:
        """See ``Place``."""
        if self._identity is not None:
            self._identity.lost()

    def refused(self) -> None:
        """Nothing to be done: the address is what was asked for."""

    async def aclose(self) -> None:
        """Nothing is under way."""
