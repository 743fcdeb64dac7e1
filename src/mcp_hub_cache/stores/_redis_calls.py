"""The calls of a store that are about keys, as commands of one key each, and what their replies mean.

Strategy: here is what is said to a server; where it is sent is a subclass's business (``redis``: one server;
``_redis_cluster``: a node for each key).

Rules:
- Every command touches one key, and stands at its key's place; an empty one is not sent, and gets no reply.
- What came instead of a reply, where another part of the call got its own, is a ``StoreError`` in its place.
- Scripts are sent whole, with EVAL. EVALSHA would save 6 to 9 % of a fenced write, and cost a second round trip,
  out of order with what was sent since, whenever the server has forgotten them (restart, promotion, SCRIPT FLUSH).
- A key of another type (a list, a hash) reads as nothing, begins as a frame without bytes, and is replaced by the
  write that follows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from .._exceptions import StoreError
from .._frame import TOKEN, placeholder
from .._protocols import Begun, Fence, Held, Outcome, Patch, Write
from .._tokens import new_token
from . import next_store_id
from ._redis_clock import Clock
from ._redis_commands import get_range, px
from ._redis_errors import store_error
from ._redis_link import Doubt, ReplyError, pack
from ._redis_outlet import BIG, in_parts
from ._redis_scripts import BEGIN, DELETE, PATCH, RELEASE, RENEW, WRITE

T = TypeVar("T")
Command = bytes | list[bytes]
"""A packed command, whole or in parts."""

_BIG_KEYS: Final = 1024  # how many such keys are remembered

_OUTCOMES: Final[dict[bytes | int, Outcome]] = {b"OK": "done", 1: "done", 0: "refused"}


class Calls:
    """What all stores on Redis say, and understand."""

    _where: str

    def __init__(self) -> None:
        self.id = next_store_id()
        self._clock = clock = Clock()
        self._big: dict[bytes, str] = {}  # keys seen with a big value, latest last, and their lane
        self.now: Callable[[], float] = clock.now

    def _read(
        self, keys: Sequence[bytes], commands: list[bytes], convert: Callable[[list[Any]], T]
    ) -> asyncio.Future[T]:
        """Send what changes nothing: a command for each of *keys*."""
        raise NotImplementedError

    def _change(
        self,
        keys: Sequence[bytes],
        commands: Sequence[Command],
        convert: Callable[[list[Any]], T],
        *,
        again: bool = False,
    ) -> asyncio.Future[T]:
        """Send changes, in the order called: a command for each of *keys*, or an empty one. ``again``: see ``Wire``."""
        raise NotImplementedError

    # Reading

    def head_many(self, keys: Sequence[bytes], /) -> asyncio.Future[list[bytes | None]]:
        """See ``Store.head_many``."""
        if not keys:
            return done([])
        return self._read(keys, [get_range(key, b"63") for key in keys], self._heads)

    def _heads(self, replies: list[Any]) -> list[bytes | None]:
        return [self._head(reply) or None for reply in replies]

    def _head(self, reply: Any) -> bytes:
        if isinstance(reply, ReplyError) and str(reply).startswith("WRONGTYPE"):
            return b""
        head: bytes = self._plain(reply, bytes)
        return head

    def _size_up(self, key: bytes, value: bytes | None) -> None:
        """Remember *key* as big, or no longer."""
        self._big.pop(key, None)
        if value is not None and len(value) > BIG:
            self._big[key] = "bulk"
            if len(self._big) > _BIG_KEYS:
                del self._big[next(iter(self._big))]

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
        commands: list[Command] = []
        again = True
        for key, frame, keep, fence, _ in writes:
            if len(frame) > BIG or key in self._big:
                self._size_up(key, frame)
            ms = px(keep)
            command: tuple[bytes, ...] = (b"SET", key, frame, b"PX", ms) if ms else (b"SET", key, frame)
            if fence is not None:
                again = False  # a second try would be refused by the first one's effect
                command = (b"EVAL", WRITE, b"1", key, fence.token, frame, ms)
                if fence.store != self.id:
                    commands.append(b"")
                    continue
            commands.append(pack(command) if len(frame) <= BIG else in_parts(command))
        keys = [write.key for write in writes]
        return self._change(keys, commands, partial(self._outcomes, commands), again=again)

    def patch_many(self, patches: Sequence[Patch], /) -> asyncio.Future[list[Outcome]]:
        """See ``Store.patch_many``."""
        commands = [
            self._fenced(fence, b"EVAL", PATCH, b"1", key, fence.token, head, px(keep))
            for key, fence, head, keep in patches
        ]
        return self._change([patch.key for patch in patches], commands, partial(self._outcomes, commands))

    def _fenced(self, fence: Fence, *command: bytes) -> bytes:
        return pack(command) if fence.store == self.id else b""

    def _outcomes(self, commands: Sequence[Command], replies: list[Any]) -> list[Outcome]:
        """The outcomes of *commands*; refused, those that were not sent, since their fences are another store's."""
        if len(commands) == len(replies):
            if replies.count(b"OK") == len(replies):
                return ["done"] * len(replies)
            return [self._outcome(reply) for reply in replies]
        rest = iter(replies)
        return [self._outcome(next(rest)) if command else "refused" for command in commands]

    def _outcome(self, reply: Any) -> Outcome:
        if isinstance(reply, ReplyError):
            return self._error(reply)
        return reply if isinstance(reply, StoreError) else _OUTCOMES[reply]

    def delete_many(self, keys: Sequence[bytes], /) -> asyncio.Future[list[bytes | None]]:
        """See ``Store.delete_many``."""
        for key in keys if self._big else ():
            self._big.pop(key, None)
        commands = [pack((b"EVAL", DELETE, b"1", key)) for key in keys]
        return self._change(keys, commands, self._heads, again=True)

    def renew_many(self, held: Sequence[Held], /, *, hold: float) -> asyncio.Future[list[bool]]:
        """See ``Leases.renew_many``."""
        ms = px(hold)
        commands = [self._fenced(fence, b"EVAL", RENEW, b"1", key, fence.token, ms) for key, fence in held]
        return self._change([one.key for one in held], commands, partial(self._held, commands))

    def release_many(self, held: Sequence[Held], /) -> asyncio.Future[None]:
        """See ``Leases.release_many``."""
        commands = [self._fenced(fence, b"EVAL", RELEASE, b"1", key, fence.token) for key, fence in held]
        return self._change([one.key for one in held], commands, partial(self._released, commands), again=True)

    def _released(self, commands: list[bytes], replies: list[Any]) -> None:
        self._held(commands, replies)

    def _held(self, commands: list[bytes], replies: list[Any]) -> list[bool]:
        outcomes = self._outcomes(commands, replies)
        for outcome in outcomes:
            if isinstance(outcome, StoreError):
                raise outcome
        return [outcome == "done" for outcome in outcomes]

    # Replies

    def _plain(self, reply: Any, kind: type[Any]) -> Any:
        if isinstance(reply, kind):
            return reply
        if isinstance(reply, ReplyError):
            raise self._error(reply)
        if isinstance(reply, StoreError):
            raise reply
        raise Doubt

    def _error(self, reply: Exception) -> StoreError:
        if "READONLY" in str(reply):
            self._refused()
        return store_error(str(reply), self._where)

    def _refused(self) -> None:
        """A server has said that it is a replica."""


def done(value: T) -> asyncio.Future[T]:
    """Return a future that is done, with *value*."""
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future
