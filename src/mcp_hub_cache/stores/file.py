"""A store in a folder: no server, many processes, nothing lost to a kill.

Strategy: every call is one job in a thread of the store's own (``_file_batches``), so the event loop never waits for a
disk and a cancelled caller never leaves a job half-way; only a lone read is had without one where the kernel says that
it is in memory (``_file_memory``). What has to be true on disk is true there, whoever dies when:
see ``_file_folder``. This module is what binds that to an event loop: threads, the sweep in the background, eviction
when a write went over the bound.

What goes over whole folders (scan, clear, info, sweep, eviction) goes shelf by shelf through ``aiofiles`` and a thread
apart, so that it stands in no read's way. Reads and writes don't go that way: a coroutine, a task and an executor's
future for each took longer than the work (``_file_threads``).

Rules:
- Jobs hold no lock of this process, so that a fork never inherits one; the child makes threads of its own.
- Threads are few and ours: a folder that hangs (a dead mount) stalls this store and nothing else in the process.
- Stamps come from a table in a file (``_file_counters``), by one system call that waits for nothing. They are coherent
  between processes of one host; on a network file system, other hosts' changes are not seen.
- Somebody who deletes the folder by hand is noticed by the next call, and without one within a second.
"""

# ruff: noqa: PTH100, PTH111

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from aiofiles.os import wrap

from .._answer import Answer, pass_on, when_done
from .._changes import Slot
from .._exceptions import StoreError, StoreUnreachableError
from .._frame import HEAD_SIZE
from .._lifetime import PerLoop
from .._protocols import Begun, Held, Outcome, Patch, Write
from . import _file_upkeep, next_store_id
from ._file_batches import Batches
from ._file_folder import Folder
from ._file_memory import NotHereError
from ._file_shelf import bucket_of, store_error
from ._file_threads import Aside, Threads

T = TypeVar("T")

_log = logging.getLogger("mcp_hub_cache")

_WATCH: Final = 1.0  # seconds between looks at whether the folder is still the same
_FIRST_SWEEP: Final = 0.5  # seconds after opening: programs that run for a moment don't pay for it
_BREATH: Final = 0.05  # seconds between the steps of a background sweep
_SWEEP_SHARE: Final = 20  # times as long as a sweep took until the next one
_ROOM: Final = 0.05  # seconds that a write waits for the eviction it caused
_LARGE: Final = 1 << 26  # bytes of bound from which on room is made ahead
_AHEAD: Final = 32  # the part of such a bound that is kept free for writes while room is made
_SLOW: Final = 0.0002  # seconds per write from which it is the disk that is waited for
_PARTS: Final = 4
_POLLS: Final = (0.005, 1.5, 0.05)  # of a stamp somebody waits for: first pause, growth, longest pause
_MAX_SLOTS: Final = 65_536


class _State:
    """What belongs to one event loop."""

    __slots__ = ("aside", "keeper", "room", "threads")

    def __init__(self, threads: Threads, aside: Aside) -> None:
        self.threads = threads
        self.aside = aside
        self.keeper: asyncio.Task[None] | None = None
        self.room: asyncio.Task[None] | None = None


class FileStore:
    """Frames in files, one each; least recently used dropped first. Uses less than a second apart count as one.

    Args:
        directory: Where; ours is the folder ``mcp_hub_cache`` in it. Made at first use, by 0700 if it is not there.
        prefix: What keys begin with, before their namespace: each namespace has a folder of its own.
        max_bytes: Disk to take up, in blocks of 4 KiB as a file system gives them; None: no bound. Kept over all
            processes and namespaces; writers may be over it for moments.
        threads: Jobs that may run at once.
        sweep_interval: Seconds between sweeps of expired files, at least: a folder that takes long to sweep is swept
            less often, so that it never costs more than a twentieth of the time.
        durable: What a call has stored or removed when it returns is so after a power cut, too (fsync of files and
            folders). Without it a power cut may lose the last seconds; what is torn then is never served.
        clock: Seconds since the epoch.
        on_evict: Called on the event loop with the number of entries dropped for room.
    """

    name = "file"

    def __init__(
        self,
        directory: str | Path = "cache",
        *,
        prefix: str = "mcp_hub:",
        max_bytes: int | None = 1 << 30,
        threads: int = 4,
        sweep_interval: float = 5.0,
        durable: bool = False,
        clock: Callable[[], float] = time.time,
        on_evict: Callable[[int], None] | None = None,
    ) -> None:
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"max_bytes must be more than 0 or None, not {max_bytes!r}")
        if threads < 1:
            raise ValueError(f"threads must be 1 or more, not {threads!r}")
        if not sweep_interval > 0:
            raise ValueError(f"sweep_interval must be more than 0, not {sweep_interval!r}")
        self.id = next_store_id()
        self.on_evict = on_evict
        self._directory = directory
        self._max_bytes = max_bytes
        # A folder of many files takes seconds to look through, and writers that are over the bound wait. So where there
        # is enough room to spare, it is made before the bound is met.
        self._limit = 0 if max_bytes is None else max_bytes - (max_bytes // _AHEAD if max_bytes >= _LARGE else 0)
        self._threads = threads
        self._sweep_interval = sweep_interval
        self._clock = clock
        self._cramped: str | None = None  # why no room could be made the last time
        self._folder = Folder(os.path.abspath(os.path.expanduser(directory)), prefix.encode(), clock, durable=durable)
        self._batches = Batches(self._folder, self.id, max_bytes)
        self._slots: dict[bytes, tuple[str, int]] = {}
        self._local = PerLoop(
            self._open, owner=f"the file store in {str(directory)!r}", close=self._close, at_loop_end=False
        )

    def _open(self, loop: asyncio.AbstractEventLoop) -> _State:
        state = _State(Threads(loop, self._threads, "mcp_hub_cache"), Aside("mcp_hub_cache_upkeep"))
        state.keeper = loop.create_task(self._keep(), name="mcp_hub_cache sweep")
        return state

    async def _close(self, state: _State) -> None:
        tasks = [task for task in (state.keeper, state.room) if task is not None]
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
            await state.threads.aclose()
        finally:
            await state.aside.aclose()
        if self._local.peek() is None:
            self._folder.close()

    def _job(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return self._local.get().threads.submit(_call, self._folder, work, *args)

    def _change(self, work: Callable[..., T], *args: object) -> Awaitable[T]:
        return self._local.get().threads.submit(_call, self._folder, work, *args, then=self._is_waiting_for_room)

    async def _aside(self, work: Callable[..., T], *args: object) -> T:
        result: T = await _in_thread(self._folder, work, *args, executor=self._local.get().aside)
        return result

    def now(self) -> float:
        """Seconds since the epoch; see ``Store.now``."""
        return self._clock()

    def lane(self, key: bytes, /) -> Hashable:  # noqa: ARG002 -- the protocol's signature
        """One lane: jobs run in several threads, and a lane per key's size would let a delete overtake a write."""
        return None

    # Store

    def get_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """See ``Store.get_many``. One key's file is read on the loop where it is in memory (``_file_memory``)."""
        # Beside a thread that works, the loop would contend with it for the interpreter at every system call.
        if len(keys) != 1 or self._local.get().threads.busy:
            return self._job(self._batches.get, keys)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[bytes | None]] = Answer(loop=loop)
        # Not in the caller's own step, so that others have theirs; who asks in the same turn gathers in a batch.
        loop.call_soon(self._glance, keys, future)
        return future

    def _glance(self, keys: Sequence[bytes], future: asyncio.Future[list[bytes | None]]) -> None:
        if future.done():
            return
        try:
            found = self._batches.glance(keys[0])
        except (NotHereError, OSError):  # a thread finds out what it is
            if self._local.peek() is None:
                future.set_exception(StoreUnreachableError("the store was closed while it was asked."))
            else:
                when_done(self._job(self._batches.get, keys), partial(pass_on, future))
        else:
            future.set_result([found])

    def head_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """See ``Store.head_many``."""
        return self._job(self._batches.get, keys, HEAD_SIZE)

    def begin_many(self, keys: Sequence[bytes], /, *, hold: float) -> Awaitable[list[Begun]]:
        """See ``Store.begin_many``."""
        return self._change(self._batches.begin, keys, hold)

    def write_many(self, writes: Sequence[Write], /) -> Awaitable[list[Outcome]]:
        """See ``Store.write_many``. Returns within the bound where eviction takes no longer than 50 ms."""
        if self._batches.pace > _SLOW and len(writes) >= _PARTS:
            return self._write_parts(writes)
        return self._change(self._batches.write, writes)

    async def _write_parts(self, writes: Sequence[Write]) -> list[Outcome]:
        """As ``write_many``, in several jobs of whole shelves: while one waits for the disk, others go on.

        A third to twice as fast on ext4; where there is no disk to wait for, it gains nothing.
        """
        parts: dict[int, list[int]] = {}
        for at, write in enumerate(writes):
            parts.setdefault(self._folder.place(write.key).shelf % _PARTS, []).append(at)
        answers = await asyncio.gather(
            *(self._change(self._batches.write, [writes[at] for at in part]) for part in parts.values())
        )
        outcomes: dict[int, Outcome] = {}
        for part, answer in zip(parts.values(), answers, strict=True):
            outcomes.update(zip(part, answer, strict=True))
        return [outcomes[at] for at in range(len(writes))]

    def patch_many(self, patches: Sequence[Patch], /) -> Awaitable[list[Outcome]]:
        """See ``Store.patch_many``."""
        return self._job(self._batches.patch, patches)

    def delete_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """See ``Store.delete_many``."""
        return self._job(self._batches.delete, keys)

    async def scan(self, prefix: bytes, /) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        """See ``Store.scan``. A page is what a few milliseconds find."""
        found = _file_upkeep.scan(self._folder, prefix)
        while (page := await self._aside(_file_upkeep.page, found)) is not None:
            if page:
                yield page

    async def clear(self, prefix: bytes, /) -> int:
        """See ``Store.clear``. A shelf that can't be cleared keeps none of the others."""
        total, trouble = await self._in_steps(_file_upkeep.clear(self._folder, prefix))
        if trouble is not None:
            raise trouble
        return total

    def ping(self, _lane: Hashable = None, /) -> Awaitable[None]:
        """Return if the folder is there, or can be made, and takes a file. Leaves none."""
        return self._job(self._folder.probe)

    async def info(self) -> Mapping[str, str | int | float]:
        """Files and entries of all namespaces, counted."""
        facts = await self._in_steps(_file_upkeep.count(self._folder))
        size_mb = round(facts["total_bytes"] / (1024 * 1024), 2)
        return {"cache_dir": str(self._directory), **facts, "total_size_mb": size_mb}

    async def aclose(self) -> None:
        """End the background sweep, wait for jobs that run, and let go of threads and table."""
        await self._local.aclose()

    # Coherent, Leases and Used

    def slot(self, key: bytes, /) -> Slot | None:
        """See ``Coherent.slot``. None before the namespace was first used here."""
        slot = self._slots.get(key)
        if slot is None:
            place = self._folder.place(key)
            slot = (place.space, bucket_of(place.name))
            if len(self._slots) >= _MAX_SLOTS:
                self._slots.clear()
            self._slots[key] = slot
        table = self._folder.open_table(slot[0])
        return None if table is None else Slot(table.changes, slot[1])

    def stamp(self, key: bytes, /) -> int | None:
        """See ``Coherent.stamp``. None also while the key is being changed."""
        slot = self.slot(key)
        return None if slot is None else slot.stamp()

    async def changed(self, key: bytes, stamp: int, /) -> None:
        """See ``Coherent.changed``. Looks every 5 ms, and less and less often down to every 50 ms."""
        pause, growth, longest = _POLLS
        while self.stamp(key) == stamp:
            await asyncio.sleep(pause)
            pause = min(pause * growth, longest)

    def distrust(self) -> None:
        """See ``Coherent.distrust``."""
        self._folder.distrust()

    def renew_many(self, held: Sequence[Held], /, *, hold: float) -> Awaitable[list[bool]]:
        """See ``Leases.renew_many``."""
        return self._job(self._batches.renew, held, hold)

    def release_many(self, held: Sequence[Held], /) -> Awaitable[None]:
        """See ``Leases.release_many``."""
        return self._job(self._batches.release, held)

    def used_many(self, keys: Sequence[bytes], /) -> Awaitable[None]:
        """See ``Used.used_many``. Noted at most once a second for each, like reads."""
        return self._job(self._batches.used, keys)

    # In the background

    async def sweep(self) -> int:
        """Remove expired files and what dead writers left; answer how many had expired. The background does it too."""
        return await self._in_steps(_file_upkeep.sweep(self._folder))

    async def _in_steps(self, work: _file_upkeep.Steps[T], breath: float = 0.0) -> T:
        while True:
            result = await self._aside(partial(_file_upkeep.step, work))
            if result is not None:
                return result
            if breath:
                await asyncio.sleep(breath)

    async def _keep(self) -> None:
        await asyncio.sleep(_FIRST_SWEEP)
        due, interval = 0.0, self._sweep_interval
        while True:
            try:
                await self._aside(self._folder.refresh)
                if time.monotonic() >= due:
                    # One sweep per interval does for all processes; the first is each one's own, for what a kill left.
                    began = time.monotonic()
                    fresh = due and 0 <= time.time() - self._folder.swept() < interval * 0.9
                    due = began + interval
                    if not fresh:
                        await self._in_steps(_file_upkeep.sweep(self._folder), _BREATH)
                        if (room := self._keep_bound()) is not None:
                            await asyncio.wait({room}, timeout=_ROOM)
                        interval = max(self._sweep_interval, _SWEEP_SHARE * (time.monotonic() - began))
                        due = time.monotonic() + interval
            except StoreError as error:
                _log.debug("the sweep of the file cache failed: %s", error)  # calls meet the same, and say so
            except Exception:  # noqa: BLE001 -- the task goes on whatever happens; the log has it
                _log.exception("the sweep of the file cache failed")
            await asyncio.sleep(min(_WATCH, self._sweep_interval))

    def _keep_bound(self) -> asyncio.Task[None] | None:
        """Start to make room if there is need; the task that does so."""
        if self._max_bytes is None or self._folder.usage() <= self._limit:
            return None
        state = self._local.peek()
        if state is None:  # being closed
            return None
        if state.room is None or state.room.done():
            state.room = asyncio.get_running_loop().create_task(self._make_room(self._limit, self._max_bytes * 9 // 10))
        return state.room

    def _is_waiting_for_room(self, future: asyncio.Future[T], result: T) -> bool:
        """Whether the writer that *future* is of has to wait for the eviction it caused; it is told the result then."""
        room = self._keep_bound()
        if room is None or self._max_bytes is None or self._folder.usage() <= self._max_bytes:
            return False

        def go_on(_: object = None) -> None:
            late.cancel()
            if not future.done():
                future.set_result(result)

        late = future.get_loop().call_later(_ROOM, go_on)
        room.add_done_callback(go_on)
        return True

    async def _make_room(self, limit: int, target: int) -> None:
        try:
            dropped = await self._in_steps(_file_upkeep.evict(self._folder, limit, target, _ROOM))
        except StoreError as error:
            # Once per change: it is tried again with nearly every write.
            _log.log(
                logging.DEBUG if self._cramped == error.kind else logging.WARNING,
                "the file cache could not make room: %s",
                error,
            )
            self._cramped = error.kind
            return
        self._cramped = None
        if dropped and self.on_evict is not None:
            self.on_evict(dropped)


def _call(folder: Folder, work: Callable[..., Any], *args: object) -> Any:
    try:
        return work(*args)
    except OSError as error:
        raise store_error(error, folder.directory) from error


_in_thread: Final[Callable[..., Any]] = wrap(_call)
