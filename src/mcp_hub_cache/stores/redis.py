"""A store in a Redis or Valkey server.

Strategy: reads are MGET, unconditional writes pipelined ``SET PX``; what must look before it acts is a script of one
key. A call packs its commands, hands them to a wire (``_redis_wire``) and returns the future of the answer: it costs
its caller no task.

Rules:
- Everything that changes a key goes over one wire, in the order called: a delete that follows a write arrives after
  it, even where the writer was cancelled meanwhile. Reads have a wire of their own, and reads of big values
  another.
- Nothing outside of the prefix that was asked for is ever touched: SCAN and UNLINK, never FLUSHDB.
- Every change is told to the feed (``_redis_feed``) as it is sent, and again when it is answered.
- A cluster is another class (``_redis_cluster``), so that one server's calls ask nothing about it. What a command says,
  and what its reply means, is the same (``_redis_calls``).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, Final, Self, TypeVar, cast

from .._changes import SLOTS, Slot
from .._lifetime import PerLoop
from .._protocols import Outcome, Write
from ._redis_calls import Calls, Command, done
from ._redis_commands import escape, facts_of, get_range, is_entry, set_all, touches
from ._redis_feed import Connections, Feed
from ._redis_link import Doubt, pack
from ._redis_outlet import BIG
from ._redis_places import Fixed, Identity
from ._redis_sentinel import Sentinels
from ._redis_target import make_target
from ._redis_wire import Wire

T = TypeVar("T")

_PAGE: Final = b"500"


class RedisStore(Calls):
    """Frames in Redis 6 or later, or Valkey: one server, the primary that Sentinel names, or a cluster.

    Connects when first used.

    Args:
        url: ``redis://[[user]:password@]host[:port][/db]``; ``rediss://`` for TLS, ``unix:///path`` for a socket,
            and the same with ``valkey``. Wins over the parts, but user name and password may stand apart from it.
            ``sentinel://[user:password@]host:port,host:port/service[/db]``, and ``sentinels://`` where sentinels and
            servers have TLS. For a cluster ``redis://host:port,host:port`` names several nodes to start from.
        host: Name or address.
        port: 1 to 65535.
        db: Number of the database; a cluster has 0 alone.
        username: An ACL user's; None: the default user.
        password: None or empty: none.
        ssl: TLS. With a URL it must agree with it.
        unix_socket_path: Wins over host and port.
        ca_certs: PEM file of further certificate authorities to trust.
        client_cert: PEM file of a certificate for servers that ask for one.
        client_key: PEM file of its key, if it stands apart.
        tls_insecure: Give up verifying whom one talks to: anybody on the way can read and change everything.
        sentinels: ``"host:port,host:port"``, or a list of such; in place of url, host and port.
        sentinel_service: What the sentinels call the primary; None: mymaster.
        sentinel_username: For the sentinels themselves.
        sentinel_password: The same.
        cluster: Redis Cluster; host and port, or the URL, name one node or several to start from.
        timeout: Seconds for a call, connecting included; more than 0.
        max_connections: At least 1; up to 5 are used; to each node of a cluster, up to 4. With 1 there is no feed, and
            so no near cache; in a cluster there is none in any case.
        prefix: Of the keys that the feed watches, for near caches; other keys have no stamps.

    Attributes:
        lane: See ``Store.lane``: "bulk" for keys lately seen with a big value; in a cluster, of each node.
        now: Seconds since the epoch as the server tells it; this machine's before the first connect.
        on_replaced: See ``Replaceable``.

    Raises:
        ValueError: A part is out of range, contradicts another, or would weaken TLS.
    """

    name = "redis"
    on_replaced: Callable[[], None] | None = None

    def __new__(cls, *args: Any, cluster: bool = False, **parts: Any) -> Self:  # noqa: ARG004  # __init__'s
        """Make a store of the class that the target takes."""
        if cluster and cls is RedisStore:
            from ._redis_cluster import ClusterStore  # noqa: PLC0415  # it is derived from this class

            return cast("Self", object.__new__(ClusterStore))
        return object.__new__(cls)

    def __init__(
        self,
        url: str | None = None,
        *,
        host: str = "localhost",
        port: int = 6379,
        db: int = 0,
        username: str | None = None,
        password: str | None = None,
        ssl: bool = False,
        unix_socket_path: str | PathLike[str] | None = None,
        ca_certs: str | PathLike[str] | None = None,
        client_cert: str | PathLike[str] | None = None,
        client_key: str | PathLike[str] | None = None,
        tls_insecure: bool = False,
        sentinels: str | Sequence[str] | None = None,
        sentinel_service: str | None = None,
        sentinel_username: str | None = None,
        sentinel_password: str | None = None,
        cluster: bool = False,
        timeout: float = 0.5,
        max_connections: int = 50,
        prefix: str | bytes = "mcp_hub:",
    ) -> None:
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout must be a number of seconds, more than 0, not {timeout!r}")
        if max_connections < 1:
            raise ValueError(f"max_connections must be 1 or more, not {max_connections!r}")
        super().__init__()
        self._target = target = make_target(
            url,
            sentinels=sentinels,
            sentinel_service=sentinel_service,
            sentinel_username=sentinel_username,
            sentinel_password=sentinel_password,
            cluster=cluster,
            host=host,
            port=port,
            db=db,
            username=username,
            password=password,
            unix_socket_path=unix_socket_path,
            use_tls=ssl,
            ca_certs=ca_certs,
            client_cert=client_cert,
            client_key=client_key,
            tls_insecure=tls_insecure,
        )
        self._address = target.address
        self._where = target.where
        self._timeout = timeout
        self._max_connections = max_connections
        self._prefix = prefix.encode() if isinstance(prefix, str) else prefix
        self._identity = Identity(self._replaced)
        # Asked for every read: two frames less each, where it is the table's own look-up.
        self.lane: Callable[[bytes], Hashable] = self._big.get
        self._wires: PerLoop[Connections] = PerLoop(
            self._connections, owner=f"the Redis store at {self._where}", close=Connections.aclose, at_loop_end=False
        )

    def _connections(self, loop: asyncio.AbstractEventLoop) -> Connections:
        sentinels = None
        if self._target.service is not None:
            sentinels = Sentinels(loop, self._target, self._timeout, self._identity)
        place = sentinels or Fixed(self._address, self._identity)
        made = Connections(loop, place, self._timeout, self._clock, self._max_connections, prefix=self._prefix)
        if sentinels is not None:
            sentinels.moved = made.renew
        return made

    def _replaced(self) -> None:
        if self.on_replaced is not None:
            self.on_replaced()

    def _refused(self) -> None:
        if (wires := self._wires.peek()) is not None:
            wires.place.refused()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._where}/{self._address.db})"

    # Reading

    def get_many(self, keys: Sequence[bytes], /) -> asyncio.Future[list[bytes | None]]:
        """See ``Store.get_many``."""
        if not keys:
            return done([])
        wires = self._wires.get()
        if self._big and not self._big.keys().isdisjoint(keys):  # each by itself: see the wire
            commands = b"".join([pack((b"MGET", key)) for key in keys])
            return wires.bulk.send(commands, len(keys), partial(self._values, keys), again=True)
        return wires.reads.send(pack((b"MGET", *keys)), 1, partial(self._values, keys), again=True)

    def _values(self, keys: Sequence[bytes], replies: list[Any]) -> list[bytes | None]:
        values: list[bytes | None] = self._plain(replies[0], list)
        for reply in replies[1:]:
            values += self._plain(reply, list)
        if len(values) != len(keys):
            raise Doubt
        if max(map(len, filter(None, values)), default=0) > BIG or (
            self._big and not self._big.keys().isdisjoint(keys)
        ):
            for key, value in zip(keys, values, strict=True):
                self._size_up(key, value)
        return values

    def _read(
        self, keys: Sequence[bytes], commands: list[bytes], convert: Callable[[list[Any]], T]
    ) -> asyncio.Future[T]:  # fmt: skip
        if not keys:
            return done(convert([]))
        return self._wires.get().reads.send(b"".join(commands), len(commands), convert, again=True)

    def used_many(self, keys: Sequence[bytes], /) -> asyncio.Future[None]:
        """See ``Used.used_many``. A read to the server, too: nobody is told of it."""
        return self._read(keys, touches(keys), self._touched)

    def _touched(self, replies: list[Any]) -> None:
        for reply in replies:
            self._plain(reply, int)

    # Writing

    def write_many(self, writes: Sequence[Write], /) -> asyncio.Future[list[Outcome]]:
        """See ``Store.write_many``."""
        if writes and not self._big and all([write.fence is None and len(write.frame) <= BIG for write in writes]):  # noqa: C419
            keys = [write.key for write in writes]
            return self._send(keys, set_all(writes), len(writes), partial(self._outcomes, keys), again=True)
        return super().write_many(writes)

    def _change(
        self,
        keys: Sequence[bytes],
        commands: Sequence[Command],
        convert: Callable[[list[Any]], T],
        *,
        again: bool = False,
    ) -> asyncio.Future[T]:
        count = len(commands) - commands.count(b"")
        if not count:
            return done(convert([]))
        parts: list[bytes] = []
        for command in commands:
            if isinstance(command, bytes):
                parts.append(command)
            else:
                parts += command
        data = parts if max(map(len, parts)) > BIG else b"".join(parts)
        return self._send(keys, data, count, convert, again=again)

    def _send(
        self,
        keys: Sequence[bytes],
        data: bytes | list[bytes],
        count: int,
        convert: Callable[[list[Any]], T],
        *,
        again: bool,
    ) -> asyncio.Future[T]:
        wires = self._wires.get()
        answer = wires.writes.send(data, count, convert, again=again)
        if wires.feed is not None:
            wires.feed.own(keys, answer)
        return answer

    # All keys

    async def scan(self, prefix: bytes, /) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        """See ``Store.scan``. The deadline is each page's; keys may come twice."""
        async for keys in self._pages(prefix):
            heads = await self.head_many(keys)
            if page := [(key, head) for key, head in zip(keys, heads, strict=True) if head is not None]:
                yield page

    async def _pages(
        self, prefix: bytes, wire: Callable[[], Wire] | None = None
    ) -> AsyncGenerator[list[bytes], None]:  # fmt: skip
        """The keys under *prefix* on the server at the end of a wire: the one there is."""
        pattern = escape(prefix) + b"*"
        cursor = b"0"
        while True:
            command = pack((b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _PAGE))
            admin = self._wires.get().admin if wire is None else wire()
            cursor, keys = await admin.send(command, 1, self._page, again=True)
            if keys:
                yield keys
            if cursor == b"0":
                return

    def _page(self, replies: list[Any]) -> tuple[bytes, list[bytes]]:
        cursor, keys = self._plain(replies[0], list)
        return cursor, list(dict.fromkeys(keys))

    async def clear(self, prefix: bytes, /) -> int:
        """See ``Store.clear``. Page by page, with the deadline for each; other work goes on between them."""
        entries = 0
        async for keys in self._pages(prefix):
            commands = b"".join([get_range(key, b"5") for key in keys]) + pack((b"UNLINK", *keys))
            wires = self._wires.get()
            answer = wires.admin.send(commands, len(keys) + 1, self._cleared, again=True)
            if wires.feed is not None:
                wires.feed.own(keys, answer)
            entries += await answer
        for key in [key for key in self._big if key.startswith(prefix)]:
            del self._big[key]
        return entries

    def _cleared(self, replies: list[Any]) -> int:
        self._plain(replies.pop(), int)
        return sum(is_entry(self._head(reply)) for reply in replies)

    # The server

    async def ping(self, lane: Hashable = None, /) -> None:
        """See ``Store.ping``."""
        wires = self._wires.get()
        wire = wires.reads if lane is None else wires.bulk
        await wire.send(pack((b"PING",)), 1, self._pong, again=True)

    def _pong(self, replies: list[Any]) -> None:
        self._plain(replies[0], bytes)

    async def info(self) -> Mapping[str, str | int | float]:
        """See ``Store.info``: what the server tells of its version, clients and memory, and how the feed is."""
        wires = self._wires.get()
        facts = await wires.admin.send(pack((b"INFO",)), 1, facts_of, again=True)
        feed = "off: max_connections is 1" if wires.feed is None else wires.feed.state()
        return facts if feed is None else {**facts, "l1_feed": feed}

    def aclose(self) -> Awaitable[None]:
        """Close the connections of the running loop. What waits for an answer fails; a later call connects again."""
        return self._wires.aclose()

    # Coherent

    def slot(self, key: bytes, /) -> Slot | None:
        """See ``Coherent.slot``. None for keys that are not under the prefix, and while the feed is not there."""
        feed = self._feed()
        if feed is None or not key.startswith(self._prefix):
            return None
        changes = feed.changes()
        return None if changes is None else Slot(changes, hash(key) % SLOTS)

    def stamp(self, key: bytes, /) -> int | None:
        """See ``Coherent.stamp``."""
        slot = self.slot(key)
        return None if slot is None else slot.stamp()

    async def changed(self, key: bytes, stamp: int, /) -> None:
        """See ``Coherent.changed``. Wakes also where the feed is lost."""
        slot, feed = self.slot(key), self._feed()
        if slot is not None and slot.stamp() == stamp and feed is not None:
            await feed.changed(slot.at)

    def distrust(self) -> None:
        """See ``Coherent.distrust``."""
        if (feed := self._feed()) is not None:
            feed.distrust()

    def _feed(self) -> Feed | None:
        wires = self._wires.peek()
        return None if wires is None else wires.feed
