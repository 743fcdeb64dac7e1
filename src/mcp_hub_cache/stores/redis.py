"""A store in a Redis or Valkey server.

Strategy: reads are MGET, unconditional writes pipelined ``SET PX``; what must look before it acts is a script of one
key. A call packs its commands, hands them to a wire (``_redis_wire``) and returns the future of the answer: it costs
its caller no task.

Rules:
- Everything that changes a key goes over one wire, in the order called: a delete that follows a write arrives after
  it, even where the writer was cancelled meanwhile. Reads have a wire of their own, and reads of big values
  another.
- Scripts are sent whole, with EVAL. EVALSHA would save 6 to 9 % of a fenced write, and cost a second round trip,
  out of order with what was sent since, whenever the server has forgotten them (restart, promotion, SCRIPT FLUSH).
- Nothing outside of the prefix that was asked for is ever touched: SCAN and UNLINK, never FLUSHDB.
- Every change is told to the feed (``_redis_feed``) as it is sent, and again when it is answered.
- A key of another type (a list, a hash) reads as nothing, begins as a frame without bytes, and is replaced by the
  write that follows.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, Final, TypeVar

from .._changes import SLOTS, Slot
from .._exceptions import StoreError
from .._frame import MAGIC, TOKEN, Kind, placeholder
from .._lifetime import PerLoop
from .._protocols import Begun, Fence, Held, Outcome, Patch, Write
from .._tokens import new_token
from . import next_store_id
from ._redis_address import make_address
from ._redis_clock import Clock
from ._redis_commands import escape, facts_of, get_ranges, px, set_all, touches
from ._redis_errors import store_error
from ._redis_feed import Connections, Feed
from ._redis_outlet import BIG, in_parts
from ._redis_scripts import BEGIN, DELETE, PATCH, RELEASE, RENEW, WRITE
from ._redis_wire import Doubt, ReplyError, pack

T = TypeVar("T")

_BIG_KEYS: Final = 1024  # how many such keys are remembered
_PAGE: Final = b"500"

_OUTCOMES: Final[dict[bytes | int, Outcome]] = {b"OK": "done", 1: "done", 0: "refused"}


class RedisStore:
    """Frames in Redis 6 or later, or Valkey. Connects when first used.

    Args:
        url: ``redis://[[user]:password@]host[:port][/db]``; ``rediss://`` for TLS, ``unix:///path`` for a socket,
            and the same with ``valkey``. Wins over the parts, but user name and password may stand apart from it.
        host: Name or address.
        port: 1 to 65535.
        db: Number of the database.
        username: An ACL user's; None: the default user.
        password: None or empty: none.
        ssl: TLS. With a URL it must agree with it.
        unix_socket_path: Wins over host and port.
        ca_certs: PEM file of further certificate authorities to trust.
        client_cert: PEM file of a certificate for servers that ask for one.
        client_key: PEM file of its key, if it stands apart.
        tls_insecure: Give up verifying whom one talks to: anybody on the way can read and change everything.
        timeout: Seconds for a call, connecting included; more than 0.
        max_connections: At least 1; up to 5 are used. With 1 there is no feed, and so no near cache.
        prefix: Of the keys that the feed watches, for near caches; other keys have no stamps.

    Attributes:
        lane: See ``Store.lane``: "bulk" for keys lately seen with a big value.
        now: Seconds since the epoch as the server tells it; this machine's before the first connect.

    Raises:
        ValueError: A part is out of range, contradicts another, or would weaken TLS.
    """

    name = "redis"

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
        timeout: float = 0.5,
        max_connections: int = 50,
        prefix: str | bytes = "mcp_hub:",
    ) -> None:
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout must be a number of seconds, more than 0, not {timeout!r}")
        if max_connections < 1:
            raise ValueError(f"max_connections must be 1 or more, not {max_connections!r}")
        self.id = next_store_id()
        self._address = address = make_address(
            url,
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
        self._clock = clock = Clock()
        self._big: dict[bytes, str] = {}  # keys seen with a big value, latest last, and their lane
        # Asked for every read: two frames less each, where it is the table's own look-up.
        self.lane: Callable[[bytes], Hashable] = self._big.get
        self.now: Callable[[], float] = clock.now
        self._prefix = watched = prefix.encode() if isinstance(prefix, str) else prefix
        self._wires: PerLoop[Connections] = PerLoop(
            lambda loop: Connections(loop, address, timeout, clock, max_connections, prefix=watched),
            owner=f"the Redis store at {address.where}",
            close=Connections.aclose,
            at_loop_end=False,
        )

    def __repr__(self) -> str:
        return f"RedisStore({self._address.where}/{self._address.db})"

    # Reading

    def get_many(self, keys: Sequence[bytes], /) -> asyncio.Future[list[bytes | None]]:
        """See ``Store.get_many``."""
        if not keys:
            return _done([])
        wires = self._wires.get()
        big = self._big and not self._big.keys().isdisjoint(keys)
        wire = wires.bulk if big else wires.reads
        return wire.send(pack((b"MGET", *keys)), 1, partial(self._values, keys), again=True)

    def _values(self, keys: Sequence[bytes], replies: list[Any]) -> list[bytes | None]:
        values: list[bytes | None] = self._plain(replies[0], list)
        if len(values) != len(keys):
            raise Doubt
        if max(map(len, filter(None, values)), default=0) > BIG or (
            self._big and not self._big.keys().isdisjoint(keys)
        ):
            for key, value in zip(keys, values, strict=True):
                self._size_up(key, value)
        return values

    def _size_up(self, key: bytes, value: bytes | None) -> None:
        """Remember *key* as big, or no longer."""
        self._big.pop(key, None)
        if value is not None and len(value) > BIG:
            self._big[key] = "bulk"
            if len(self._big) > _BIG_KEYS:
                del self._big[next(iter(self._big))]

    def head_many(self, keys: Sequence[bytes], /) -> asyncio.Future[list[bytes | None]]:
        """See ``Store.head_many``."""
        if not keys:
            return _done([])
        return self._wires.get().reads.send(get_ranges(keys, b"63"), len(keys), self._heads, again=True)

    def _heads(self, replies: list[Any]) -> list[bytes | None]:
        return [self._head(reply) or None for reply in replies]

    def _head(self, reply: Any) -> bytes:
        if isinstance(reply, ReplyError) and str(reply).startswith("WRONGTYPE"):
            return b""
        head: bytes = self._plain(reply, bytes)
        return head

    def used_many(self, keys: Sequence[bytes], /) -> asyncio.Future[None]:
        """See ``Used.used_many``. A read to the server, too: nobody is told of it."""
        commands = touches(keys)
        if not commands:
            return _done(None)
        return self._wires.get().reads.send(b"".join(commands), len(commands), self._touched, again=True)

    def _touched(self, replies: list[Any]) -> None:
        for reply in replies:
            self._plain(reply, int)

    # Beginning and writing

    def begin_many(self, keys: Sequence[bytes], /, *, hold: float) -> asyncio.Future[list[Begun]]:
        """See ``Store.begin_many``."""
        now, ms = self.now(), px(hold)
        planted: list[tuple[bytes, bytes]] = []
        commands: list[bytes] = []
        for key in keys:
            token = new_token()
            frame = placeholder(key, token, now, hold)
            planted.append((token, frame))
            commands.append(pack((b"EVAL", BEGIN, b"1", key, frame, ms)))
        return self._change(keys, commands, partial(self._begun, keys, planted), again=True)

    def _begun(self, keys: Sequence[bytes], planted: list[tuple[bytes, bytes]], replies: list[Any]) -> list[Begun]:
        begun: list[Begun] = []
        for key, (token, frame), reply in zip(keys, planted, replies, strict=True):
            # One's own is found where the first try had arrived before its connection was lost.
            if reply is None or reply == frame:
                begun.append(Begun(None, Fence(self.id, token), leader=True))
                continue
            found: bytes = self._plain(reply, bytes)
            if len(found) > BIG or key in self._big:
                self._size_up(key, found)
            begun.append(Begun(found, Fence(self.id, found[TOKEN]), leader=False))
        return begun

    def write_many(self, writes: Sequence[Write], /) -> asyncio.Future[list[Outcome]]:
        """See ``Store.write_many``."""
        if writes and not self._big and all([write.fence is None and len(write.frame) <= BIG for write in writes]):  # noqa: C419
            keys = [write.key for write in writes]
            return self._change(keys, [set_all(writes)], self._all_outcomes, count=len(writes), again=True)
        commands: list[bytes] = []
        asked: list[bool] = []
        again = True
        for key, frame, keep, fence in writes:
            if len(frame) > BIG or key in self._big:
                self._size_up(key, frame)
            ms = px(keep)
            asked.append(fence is None or fence.store == self.id)
            command: tuple[bytes, ...] = (b"SET", key, frame, b"PX", ms) if ms else (b"SET", key, frame)
            if fence is not None:
                if fence.store != self.id:
                    continue
                again = False  # a second try would be refused by the first one's effect
                command = (b"EVAL", WRITE, b"1", key, fence.token, frame, ms)
            if len(frame) <= BIG:
                commands.append(pack(command))
            else:
                commands += in_parts(command)
        keys = [write.key for write in writes]
        return self._change(keys, commands, partial(self._outcomes, asked), count=sum(asked), again=again)

    def patch_many(self, patches: Sequence[Patch], /) -> asyncio.Future[list[Outcome]]:
        """See ``Store.patch_many``."""
        asked = [patch.fence.store == self.id for patch in patches]
        commands = [
            pack((b"EVAL", PATCH, b"1", key, fence.token, head, px(keep)))
            for key, fence, head, keep in patches
            if fence.store == self.id
        ]
        return self._change([patch.key for patch in patches], commands, partial(self._outcomes, asked))

    def _outcomes(self, asked: list[bool], replies: list[Any]) -> list[Outcome]:
        """The outcomes of replies to what was *asked*; refused, the rest, as another store's fences."""
        if len(asked) == len(replies):
            if replies.count(b"OK") == len(replies):
                return ["done"] * len(replies)
            return [self._outcome(reply) for reply in replies]
        rest = iter(replies)
        return [self._outcome(next(rest)) if was else "refused" for was in asked]

    def _all_outcomes(self, replies: list[Any]) -> list[Outcome]:
        return self._outcomes([True] * len(replies), replies)

    def _outcome(self, reply: Any) -> Outcome:
        if isinstance(reply, ReplyError):
            return self._error(reply)
        return _OUTCOMES[reply]

    def delete_many(self, keys: Sequence[bytes], /) -> asyncio.Future[list[bytes | None]]:
        """See ``Store.delete_many``."""
        for key in keys if self._big else ():
            self._big.pop(key, None)
        commands = [pack((b"EVAL", DELETE, b"1", key)) for key in keys]
        return self._change(keys, commands, self._heads, again=True)

    def renew_many(self, held: Sequence[Held], /, *, hold: float) -> asyncio.Future[list[bool]]:
        """See ``Leases.renew_many``."""
        asked, ms = [one.fence.store == self.id for one in held], px(hold)
        commands = [pack((b"EVAL", RENEW, b"1", key, fence.token, ms)) for key, fence in held if fence.store == self.id]
        return self._change(
            [one.key for one in held], commands, lambda replies: self._raised(self._outcomes(asked, replies))
        )

    def release_many(self, held: Sequence[Held], /) -> asyncio.Future[None]:
        """See ``Leases.release_many``."""
        commands = [pack((b"EVAL", RELEASE, b"1", key, fence.token)) for key, fence in held if fence.store == self.id]
        return self._change([one.key for one in held], commands, self._released, again=True)

    def _released(self, replies: list[Any]) -> None:
        self._raised(self._all_outcomes(replies))

    @staticmethod
    def _raised(outcomes: list[Outcome]) -> list[bool]:
        for outcome in outcomes:
            if isinstance(outcome, StoreError):
                raise outcome
        return [outcome == "done" for outcome in outcomes]

    def _change(
        self,
        keys: Sequence[bytes],
        commands: list[bytes],
        convert: Callable[[list[Any]], T],
        *,
        count: int = 0,
        again: bool = False,
    ) -> asyncio.Future[T]:
        if not commands:
            return _done(convert([]))
        wires = self._wires.get()
        data = commands if max(map(len, commands)) > BIG else b"".join(commands)
        answer = wires.writes.send(data, count or len(commands), convert, again=again)
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

    async def _pages(self, prefix: bytes) -> AsyncGenerator[list[bytes], None]:
        pattern = escape(prefix) + b"*"
        cursor = b"0"
        while True:
            command = pack((b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _PAGE))
            cursor, keys = await self._wires.get().admin.send(command, 1, self._page, again=True)
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
            commands = get_ranges(keys, b"5") + pack((b"UNLINK", *keys))
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
        entry = MAGIC + bytes([1, Kind.ENTRY])
        return sum(1 for reply in replies if (head := self._head(reply))[:4] == MAGIC and head[5:] == entry[5:])

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

    # Replies

    def _plain(self, reply: Any, kind: type[Any]) -> Any:
        if isinstance(reply, kind):
            return reply
        if isinstance(reply, ReplyError):
            raise self._error(reply)
        raise Doubt

    def _error(self, reply: Exception) -> StoreError:
        return store_error(str(reply), self._address.where)


def _done(value: T) -> asyncio.Future[T]:
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future
