"""A store in a Redis Cluster: each key at the node that has its slot.

Strategy: a call is split by node, each part goes over that node's wires, and the replies are put together again.
Reads are pipelined GETs: MGET takes the keys of one slot alone, and few share one. A lane is a node, so what comes from
the engine is seldom split.

Rules:
- A part that is redirected (MOVED, ASK) was not executed: it is sent again to where it belongs, whatever it is, under
  the deadline of its call.
- A node that fails costs its own items. Where some of a call's parts were answered, each write has an outcome of its
  own; a call that can't say so fails as a whole. Listing and clearing go on with the other nodes, and fail at the end.
- Slots may move while all keys are walked through. The walk is repeated where the map has changed meanwhile.
- There is no feed, and so no near cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Generic, TypeVar

from .._answer import Answer
from .._exceptions import StoreBusyError, StoreError
from .._lifetime import PerLoop
from .._protocols import Outcome, Write
from ._redis_calls import Calls, Command, done
from ._redis_commands import facts_of, get_range, is_entry, touches
from ._redis_errors import not_redis, store_error, timed_out
from ._redis_link import ReplyError, pack
from ._redis_nodes import Map, Node, Nodes, out_of_reach
from ._redis_outlet import BIG
from ._redis_slots import redirection, slot_of
from ._redis_wire import Wire, Wires
from .redis import RedisStore

T = TypeVar("T")

_HOPS: Final = 5  # redirections of one command
_WALKS: Final = 3  # through all keys, while the map changes
_ASKING: Final = pack((b"ASKING",))
_LINES: Final[dict[str, Callable[[Wires], Wire]]] = {
    "reads": lambda wires: wires.reads,
    "writes": lambda wires: wires.writes,
    "bulk": lambda wires: wires.bulk,
    "admin": lambda wires: wires.admin,
}


class _Call(Generic[T]):
    """One call: commands, each for its key, and what becomes of them.

    Args:
        nodes: Of the running loop.
        line: Which of a node's wires.
        keys: One for each command.
        commands: Empty ones are not sent.
        convert: Makes the answer of the replies of those that were.
        where: The cluster, for people.
        again: See ``Wire.send``.
    """

    def __init__(
        self,
        nodes: Nodes,
        line: str,
        keys: Sequence[bytes],
        commands: Sequence[Command],
        convert: Callable[[list[Any]], T],
        *,
        where: str,
        again: bool,
    ) -> None:
        self._nodes = nodes
        self._wire = _LINES[line]
        self._commands = commands
        self._convert = convert
        self._where = where
        self._again = again
        self._since = nodes.loop.time()
        self._slots = [slot_of(key) for key in keys]
        self._replies: dict[int, Any] = {place: None for place, command in enumerate(commands) if command}
        self._left = 0
        self._hops = 0
        self.answer: Answer[T] = Answer(loop=nodes.loop)
        if nodes.map.names:
            self._start()
        else:
            nodes.refresh().add_done_callback(self._mapped)

    def _mapped(self, reading: asyncio.Task[None]) -> None:
        if self.answer.done():
            return
        if reading.cancelled():
            self.answer.set_exception(StoreBusyError(f"{self._where}: the store was closed."))
        elif (error := reading.exception()) is not None:
            self.answer.set_exception(StoreError.of(error).with_traceback(None))
        else:
            self._start()

    def _start(self) -> None:
        parts: dict[str, list[int]] = {}
        names = self._nodes.map.names
        for place in self._replies:
            parts.setdefault(names[self._slots[place]], []).append(place)
        self._left += 1  # so that nothing is over before all has been sent
        for name, places in parts.items():
            if name:
                self._send(self._nodes.node(name), places)
            else:
                self._set(places, _uncovered(self._where))
                _ = self._nodes.refresh()
        self._over()

    def _send(self, node: Node, places: list[int], *, asking: bool = False) -> None:
        data: list[bytes] = []
        for place in places:
            command = self._commands[place]
            if asking:
                data.append(_ASKING)
            data += [command] if isinstance(command, bytes) else command
        big = max(map(len, data)) > BIG
        self._left += 1
        sent = self._wire(node.wires).send(
            data if big else b"".join(data),
            len(places) * (2 if asking else 1),
            _same,
            again=self._again,
            since=self._since,
        )
        sent.listen(partial(self._got, node, places, asking))

    def _got(self, node: Node, places: list[int], asking: bool, sent: asyncio.Future[list[Any]]) -> None:
        error = None if sent.cancelled() else sent.exception()
        if error is not None or sent.cancelled():
            failed = StoreError.of(error) if error is not None else StoreBusyError("the store was closed.")
            if out_of_reach(failed):
                self._nodes.missed(node)
            self._set(places, failed)
        else:
            self._nodes.heard(node)
            replies = sent.result()
            self._take(node, places, replies[1::2] if asking else replies)
        self._over()

    def _take(self, node: Node, places: list[int], replies: list[Any]) -> None:
        elsewhere: dict[tuple[Node, bool], list[int]] = {}
        for place, reply in zip(places, replies, strict=True):
            if not isinstance(reply, ReplyError):
                self._replies[place] = reply
            elif (to := redirection(reply, node.spot)) is not None:
                there = self._nodes.moved(to.slot, to.spot, once=to.once)
                elsewhere.setdefault((there, to.once), []).append(place)
            else:
                self._replies[place] = reply
                if str(reply).startswith("CLUSTERDOWN"):
                    self._nodes.missed(node)
        if not elsewhere:
            return
        self._hops += 1
        is_late = self._nodes.loop.time() - self._since >= self._nodes.timeout
        for (there, once), redirected in elsewhere.items():
            if self._hops > _HOPS or is_late:
                self._set(redirected, timed_out(self._where, self._nodes.timeout))
            else:
                self._send(there, redirected, asking=once)

    def _set(self, places: Iterable[int], error: StoreError) -> None:
        for place in places:
            self._replies[place] = error

    def _over(self) -> None:
        """One part is: the last makes the answer."""
        self._left -= 1
        if self._left or self.answer.done():
            return
        replies = list(self._replies.values())
        if replies and all(isinstance(reply, StoreError) for reply in replies):
            self.answer.set_exception(replies[0])
            return
        try:
            converted = self._convert(replies)
        except StoreError as error:
            self.answer.set_exception(error)
        except Exception:  # noqa: BLE001  # as on a wire: a reply of a shape that it can't have
            self.answer.set_exception(not_redis(self._where))
        else:
            self.answer.set_result(converted)


class ClusterStore(RedisStore):
    """What ``RedisStore(cluster=True)`` makes."""

    def __init__(self, *args: Any, **parts: Any) -> None:
        super().__init__(*args, **parts)
        self._map = known = Map(self._replaced)
        target, timeout, clock, limit = self._target, self._timeout, self._clock, self._max_connections
        self.lane = self._lane
        self._nodes: PerLoop[Nodes] = PerLoop(
            lambda loop: Nodes(loop, target, known, timeout=timeout, clock=clock, limit=limit),
            owner=f"the Redis store at {self._where}",
            close=Nodes.aclose,
            at_loop_end=False,
        )

    def _lane(self, key: bytes, /) -> Hashable:
        names = self._map.names
        name = names[slot_of(key)] if names else ""
        return (name, "bulk") if key in self._big else name

    def _call(
        self,
        line: str,
        keys: Sequence[bytes],
        commands: Sequence[Command],
        convert: Callable[[list[Any]], T],
        *,
        again: bool,
    ) -> asyncio.Future[T]:
        if not any(commands):
            return done(convert([]))
        return _Call(self._nodes.get(), line, keys, commands, convert, where=self._where, again=again).answer

    def _read(
        self, keys: Sequence[bytes], commands: list[bytes], convert: Callable[[list[Any]], T]
    ) -> asyncio.Future[T]:  # fmt: skip
        return self._call("reads", keys, commands, convert, again=True)

    def _change(
        self,
        keys: Sequence[bytes],
        commands: Sequence[Command],
        convert: Callable[[list[Any]], T],
        *,
        again: bool = False,
    ) -> asyncio.Future[T]:
        return self._call("writes", keys, commands, convert, again=again)

    # Reading and writing

    def get_many(self, keys: Sequence[bytes], /) -> asyncio.Future[list[bytes | None]]:
        """See ``Store.get_many``."""
        line = "bulk" if self._big and not self._big.keys().isdisjoint(keys) else "reads"
        commands = [pack((b"GET", key)) for key in keys]
        return self._call(line, keys, commands, partial(self._frames, keys), again=True)

    def _frames(self, keys: Sequence[bytes], replies: list[Any]) -> list[bytes | None]:
        frames: list[bytes | None] = []
        for key, reply in zip(keys, replies, strict=True):
            frame = None if reply is None else self._head(reply) or None
            if key in self._big or (frame is not None and len(frame) > BIG):
                self._size_up(key, frame)
            frames.append(frame)
        return frames

    def used_many(self, keys: Sequence[bytes], /) -> asyncio.Future[None]:
        """See ``Used.used_many``."""
        return self._read(keys, [touch for key in keys for touch in touches((key,))], self._touched)

    def write_many(self, writes: Sequence[Write], /) -> asyncio.Future[list[Outcome]]:
        """See ``Store.write_many``."""
        return Calls.write_many(self, writes)

    # All keys

    async def _walk(self, prefix: bytes) -> AsyncGenerator[list[bytes], None]:
        """The keys under *prefix* of all nodes, again where slots have moved meanwhile; fails at the end."""
        nodes = self._nodes.get()
        if not nodes.map.names:
            await nodes.refresh()
        failed: StoreError | None = None
        for _ in range(_WALKS):
            version = nodes.map.version
            for node in nodes.serving():
                try:
                    async for keys in self._pages(prefix, lambda wires=node.wires: wires.admin):  # type: ignore[misc]  # bound now
                        yield keys
                except StoreError as error:
                    if out_of_reach(error):
                        nodes.missed(node)
                    failed = error
            await nodes.refresh()
            if version == nodes.map.version:
                break
        if failed is not None:
            raise failed

    async def scan(self, prefix: bytes, /) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        """See ``Store.scan``. The deadline is each page's; keys may come twice."""
        async for keys in self._walk(prefix):
            heads = await self.head_many(keys)
            if page := [(key, head) for key, head in zip(keys, heads, strict=True) if head is not None]:
                yield page

    async def clear(self, prefix: bytes, /) -> int:
        """See ``Store.clear``. Node by node and page by page, with the deadline for each."""
        entries = 0
        async for keys in self._walk(prefix):
            commands = [command for key in keys for command in (get_range(key, b"5"), pack((b"UNLINK", key)))]
            twice = [key for key in keys for _ in range(2)]
            entries += await self._call("admin", twice, commands, self._cleared, again=True)
        for key in [key for key in self._big if key.startswith(prefix)]:
            del self._big[key]
        return entries

    def _cleared(self, replies: list[Any]) -> int:
        for reply in replies[1::2]:
            self._plain(reply, int)
        return sum(is_entry(self._head(reply)) for reply in replies[::2])

    # The nodes

    async def ping(self, lane: Hashable = None, /) -> None:
        """See ``Store.ping``. A node that has no slots any more holds up nobody; "" is the lane of who knows no map."""
        nodes = self._nodes.get()
        if not nodes.map.names:
            await nodes.refresh()
        name, bulk = (lane[0], True) if isinstance(lane, tuple) else (lane, False)
        asked = [node for node in nodes.serving() if name in {None, node.name}]
        await _all([self._ping(nodes, node, bulk=bulk) for node in asked])

    async def _ping(self, nodes: Nodes, node: Node, *, bulk: bool) -> None:
        wire = node.wires.bulk if bulk else node.wires.reads
        try:
            await wire.send(pack((b"PING",)), 1, self._pong, again=True)
        except StoreError as error:
            if out_of_reach(error):
                nodes.missed(node)
            raise
        nodes.heard(node)

    async def info(self) -> Mapping[str, str | int | float]:
        """See ``Store.info``: what the nodes tell, put together."""
        nodes = self._nodes.get()
        if not nodes.map.names:
            await nodes.refresh()
        serving = nodes.serving()
        asked = [node.wires.admin.send(pack((b"INFO",)), 1, facts_of, again=True) for node in serving]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        told = [answer for answer in answers if isinstance(answer, dict)]
        facts = dict(told[0]) if told else {}
        if "connected_clients" in facts:
            facts["connected_clients"] = sum(int(one.get("connected_clients", 0)) for one in told)
        if "memory_used_human" in facts:
            facts["memory_used_human"] = " + ".join(str(one.get("memory_used_human", "?")) for one in told)
        return {**facts, "cluster_primaries": len(serving), "l1_feed": "off: a cluster has no feed in this version"}

    def aclose(self) -> Awaitable[None]:
        """Close the connections of the running loop. What waits for an answer fails; a later call connects again."""
        return self._nodes.aclose()


async def _all(asked: Sequence[Awaitable[None]]) -> None:
    """Return when all have been answered; raise the first error then."""
    for answer in await asyncio.gather(*asked, return_exceptions=True):
        if answer is not None:
            raise answer


def _same(replies: list[Any]) -> list[Any]:
    return replies


def _uncovered(where: str) -> StoreError:
    return store_error("CLUSTERDOWN Hash slot not served", where)
