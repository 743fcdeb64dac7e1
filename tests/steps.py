"""All orders in which some actors can act on one store, one step at a time.

Strategy: stateless model checking (Godefroid: "Model Checking for Programming Languages using VeriSoft", POPL 1997). A
store in front of the real one holds back the calls that count as steps. Whenever nothing moves any more, one that is
held back is let through; the choice is noted. The whole is then played again with another choice in the last place
that has one left, until none has.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from mcp_hub_cache._changes import Slot
from mcp_hub_cache._protocols import Begun, Held, Outcome, Patch, Write

# Iterations of the loop after which nothing moves any more that nothing outside moves.
_QUIET = 25

NOBODY = "nobody"
ACTOR: ContextVar[str] = ContextVar("actor", default=NOBODY)


class _Choice(NamedTuple):
    taken: int
    options: tuple[str, ...]


class Conductor:
    """Who may take the next step."""

    def __init__(self) -> None:
        self._held: list[tuple[str, asyncio.Future[None]]] = []
        self._trace: list[_Choice] = []
        self._running = 0
        self._idle = asyncio.Event()
        self._calls = 0

    async def gate(self, step: str) -> None:
        """Wait for this step's turn."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.append((f"{ACTOR.get()} {step}", future))
        await future

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Something moves that the loop knows nothing of."""
        self._calls += 1
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _settle(self) -> None:
        quiet = calls = 0
        while quiet < _QUIET:
            # Turning on while a thread is at work would keep the interpreter from it.
            await self._idle.wait() if self._running else await asyncio.sleep(0)
            quiet = 0 if self._running or calls != self._calls else quiet + 1
            calls = self._calls

    async def play(self, actors: Mapping[str, Callable[[], Coroutine[Any, Any, Any]]]) -> AsyncIterator[dict[str, Any]]:
        """Yield what each of the *actors* returned, for every order of their steps."""
        while True:
            before = self._trace
            self._trace = []
            results = await self._once(actors, [choice.taken for choice in before])
            yield results
            for then, now in zip(before, self._trace[: len(before)], strict=True):
                assert then.options == now.options or then is before[-1], "the same choices led elsewhere"
            while self._trace and self._trace[-1].taken + 1 == len(self._trace[-1].options):
                self._trace.pop()
            if not self._trace:
                return
            taken, options = self._trace[-1]
            self._trace[-1] = _Choice(taken + 1, options)

    async def _once(
        self, actors: Mapping[str, Callable[[], Coroutine[Any, Any, Any]]], choices: Sequence[int]
    ) -> dict[str, Any]:
        tasks = {name: asyncio.ensure_future(self._act(name, work)) for name, work in actors.items()}
        for at in range(1000):
            await self._settle()
            if not self._held:
                break
            self._held.sort(key=lambda one: one[0])
            taken = choices[at] if at < len(choices) else 0
            self._trace.append(_Choice(taken, tuple(step for step, _ in self._held)))
            _, future = self._held.pop(taken)
            future.set_result(None)
        return {name: await asyncio.wait_for(task, 30) for name, task in tasks.items()}

    async def _act(self, name: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        ACTOR.set(name)
        await self.gate("start")
        return await work()

    @property
    def order(self) -> list[str]:
        """The steps of the last play."""
        return [choice.options[choice.taken] for choice in self._trace]


class Steps:
    """A store, some of whose calls are steps.

    Args:
        store: The real one.
        conductor: Lets steps through.
        is_step: Called with a call's name and keys.
        done: Called with the same when it is over, and whether it was unconditional.
    """

    def __init__(
        self,
        store: Any,
        conductor: Conductor,
        is_step: Callable[[str, Sequence[bytes]], bool],
        done: Callable[[str, Sequence[bytes], bool], None],
    ) -> None:
        self._store = store
        self._conductor = conductor
        self._is_step = is_step
        self._done = done
        self.name: str = store.name
        self.id: int = store.id

    def now(self) -> float:
        return float(self._store.now())

    def lane(self, key: bytes, /) -> Hashable:
        return ACTOR.get()  # or else the calls of two actors would be one

    async def _call(self, name: str, keys: Sequence[bytes], work: Callable[[], Awaitable[Any]], *, sure: bool) -> Any:
        if ACTOR.get() != NOBODY and self._is_step(name, keys):
            await self._conductor.gate(name)
        with self._conductor.moving():
            answer = await work()
        self._done(name, keys, sure)
        return answer

    async def get_many(self, keys: Sequence[bytes], /) -> list[bytes | None]:
        return await self._call("get", keys, lambda: self._store.get_many(keys), sure=True)  # type: ignore[no-any-return]

    async def head_many(self, keys: Sequence[bytes], /) -> list[bytes | None]:
        return await self._call("head", keys, lambda: self._store.head_many(keys), sure=True)  # type: ignore[no-any-return]

    async def begin_many(self, keys: Sequence[bytes], /, *, hold: float) -> list[Begun]:
        return await self._call("begin", keys, lambda: self._store.begin_many(keys, hold=hold), sure=True)  # type: ignore[no-any-return]

    async def write_many(self, writes: Sequence[Write], /) -> list[Outcome]:
        keys, sure = [write.key for write in writes], any(write.fence is None for write in writes)
        return await self._call("write", keys, lambda: self._store.write_many(writes), sure=sure)  # type: ignore[no-any-return]

    async def patch_many(self, patches: Sequence[Patch], /) -> list[Outcome]:
        keys = [patch.key for patch in patches]
        return await self._call("patch", keys, lambda: self._store.patch_many(patches), sure=False)  # type: ignore[no-any-return]

    async def delete_many(self, keys: Sequence[bytes], /) -> list[bytes | None]:
        return await self._call("delete", keys, lambda: self._store.delete_many(keys), sure=True)  # type: ignore[no-any-return]

    async def renew_many(self, held: Sequence[Held], /, *, hold: float) -> list[bool]:
        keys = [one.key for one in held]
        return await self._call("renew", keys, lambda: self._store.renew_many(held, hold=hold), sure=True)  # type: ignore[no-any-return]

    async def release_many(self, held: Sequence[Held], /) -> None:
        await self._call("release", [one.key for one in held], lambda: self._store.release_many(held), sure=False)

    async def scan(self, prefix: bytes, /) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        async for page in self._store.scan(prefix):
            yield page

    async def clear(self, prefix: bytes, /) -> int:
        return int(await self._store.clear(prefix))

    async def ping(self, lane: Hashable = None, /) -> None:
        await self._store.ping(lane)

    async def info(self) -> Mapping[str, str | int | float]:
        return await self._store.info()  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        await self._store.aclose()


class CoherentSteps(Steps):
    """The same over a store that hears at once of every change."""

    def slot(self, key: bytes, /) -> Slot | None:
        slot: Slot | None = self._store.slot(key)
        return slot

    def stamp(self, key: bytes, /) -> int | None:
        stamp: int | None = self._store.stamp(key)
        return stamp

    async def changed(self, key: bytes, stamp: int, /) -> None:
        await self._store.changed(key, stamp)

    def distrust(self) -> None:
        self._store.distrust()
