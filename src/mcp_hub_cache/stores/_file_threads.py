"""Threads of the file store's own, and how their results come back to the event loop.

Strategy: jobs go to a ``SimpleQueue``, results to a deque that one ``call_soon_threadsafe`` empties, whatever has come
to be in it by then. That is one hop there and one back, and nothing else: an executor's future, its locks and a task
for each batch cost as much as the 30 reads of a batch.

One thread serves while jobs come back quickly. Each system call gives the interpreter's lock away, so threads that
work side by side on what is in the page cache hand it to each other at every step, and are no quicker than one. Only
where nothing has come back for a moment does the next thread start, since then the disk is what is waited for; and it
ends when it has had nothing to do for a while.

Rules:
- A job that has been taken in is carried out to its end, whether or not its caller is still there.
- A job holds no lock of this process, so a fork inherits none. A child uses none of this: its own loop makes its own.
- The threads are daemons. A job that hangs (a dead mount) holds up neither the loop, nor ``aclose`` or the end of the
  interpreter beyond a bound. Before that bound, what was taken in is done: what is cut off there is what a kill cuts
  off, which leaves whole entries. Nothing is taken in from then on.
- A thread refers to its crew and to nothing above it, so a store that is forgotten with its loop ends its threads.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

from .._answer import Answer
from .._exceptions import StoreExhaustedError, StoreTimeoutError

T = TypeVar("T")

_PATIENCE: Final = 0.005  # seconds without a result after which what waits gets another thread
_IDLE: Final = 1.0  # seconds without a job after which a thread beyond the first ends
_LAST: Final = 5.0  # seconds without a result after which ``aclose`` waits no longer
_AT_EXIT: Final = 2.0  # seconds that the interpreter's end waits in all

# What a job is: whom to tell the result or the error, for whom, what to do, with what.
_Tell = Callable[[Any, Any, BaseException | None], None]
_Job = tuple[_Tell, Any, Callable[..., Any], tuple[Any, ...]]


class _Serving:
    """The threads of all crews of this process, which the interpreter's end waits for.

    One function for all of them, called once: a crew that was told by itself could be given a new thread while the
    others were still waited for, and that thread would be cut off in the middle of a file.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._ended = threading.Event()
        self._jobs: dict[threading.Thread, SimpleQueue[_Job | None]] = {}
        atexit.register(self._end)
        if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self._jobs.clear()
        self._ended = threading.Event()  # somebody may have been at its lock

    def begins(self, thread: threading.Thread, jobs: SimpleQueue[_Job | None]) -> bool:
        """Start a thread that serves *jobs*; false where the program ends.

        Raises:
            RuntimeError: There may be no more threads.
        """
        self._jobs[thread] = jobs  # first, so that either the end sees it here, or what comes next sees the end
        try:
            if not self.is_over:
                thread.start()
        finally:
            if thread.ident is None:
                self.ends(thread)
        return thread.ident is not None

    def ends(self, thread: threading.Thread) -> None:
        """To be called as the last by each thread."""
        self._jobs.pop(thread, None)
        if self.is_over:
            self._ended.set()

    def _end(self) -> None:
        self.is_over = True
        until = time.monotonic() + _AT_EXIT
        for jobs in tuple(self._jobs.values()):
            jobs.put(None)
        while self._jobs and self._ended.wait(max(0.0, until - time.monotonic())):
            self._ended.clear()  # before the next look: who ends after that says so again


_serving: Final = _Serving()


class Crew:
    """Daemon threads that take jobs from a queue in order.

    Args:
        name: Of the threads.
        most: Of them at once.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._pid = os.getpid()

    def put(self, tell: _Tell, whom: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Have *work* done; then ``tell(whom, result, error)`` is called in that thread, and must not raise.

        Raises:
            StoreExhaustedError: There is no thread, and none can be started.
        """
        if _serving.is_over:
            # A daemon's loop comes to its end here, as it would anywhere a moment later. Who is called at exit is told.
            if threading.current_thread() is threading.main_thread():
                raise StoreExhaustedError("the program is ending: no file is read or written any more.")
            return
        if not self._threads:
            try:
                self.grow()
            except RuntimeError as error:
                raise StoreExhaustedError(
                    f"no thread for the files: {error}.", cure="See what limits threads here (ulimit -u, pids.max)."
                ) from error
        self._jobs.put((tell, whom, work, args))

    def grow(self) -> None:
        """Start another thread, if there may be more.

        Raises:
            RuntimeError: There may be, but none can be started.
        """
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) < self._most:
            idle = _IDLE if self._threads else None
            thread = threading.Thread(target=_serve, args=(self._jobs, idle), name=self._name, daemon=True)
            if _serving.begins(thread, self._jobs):
                self._threads.append(thread)

    def size(self) -> int:
        """Threads there are; one that has just ended may be among them."""
        return len(self._threads)

    def can_grow(self) -> bool:
        """Whether there may be another thread."""
        return len(self._threads) < self._most or not all(thread.is_alive() for thread in self._threads)

    def end(self) -> None:
        """Let the threads end after the jobs that are queued. Waits for nothing."""
        if self._pid == os.getpid():
            self._jobs.put(None)


def _serve(jobs: SimpleQueue[_Job | None], idle: float | None) -> None:
    try:
        while True:
            try:
                job = jobs.get(timeout=idle)
            except Empty:
                return
            if job is None:
                jobs.put(None)  # for the next thread
                return
            tell, whom, work, args = job
            result, trouble = None, None
            try:
                result = work(*args)
            except BaseException as error:  # noqa: BLE001  # the caller's to see, whatever it is
                trouble = error
            tell(whom, result, trouble)
            del job, tell, whom, work, args, result, trouble  # an idle thread keeps nothing alive
    finally:
        _serving.ends(threading.current_thread())


class _Returns:
    """Where results wait for the loop. What the threads see of ``Threads``."""

    __slots__ = ("__weakref__", "_done", "_loop", "_told", "count", "pending", "settled")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._done: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._told = False
        self.count = 0
        self.pending: dict[asyncio.Future[Any], Callable[[asyncio.Future[Any], Any], bool] | None] = {}
        self.settled: asyncio.Future[None] | None = None

    def tell(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        """Called in a thread."""
        self._done.append((future, result, error))
        # The loop forgets that it was told before it looks; so what is added after it has looked is told anew.
        if not self._told:
            self._told = True
            try:
                self._loop.call_soon_threadsafe(self.take)
            except RuntimeError:  # the loop has been closed: nobody waits any more
                self._done.clear()

    def take(self) -> None:
        """Hand on what there is; called on the loop."""
        self._told = False
        done = self._done
        while done:
            future, result, error = done.popleft()
            then = self.pending.pop(future, None)
            self.count += 1
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            elif then is None or not then(future, result):
                future.set_result(result)
        if self.settled is not None and not self.settled.done() and not self.pending:
            self.settled.set_result(None)


class Threads:
    """Threads that work for one event loop.

    Args:
        loop: The loop.
        most: Jobs at once.
        name: Of the threads.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int, name: str) -> None:
        self._loop = loop
        self._crew = Crew(name, most)
        self._returns = _Returns(loop)
        self._tell = self._returns.tell
        self._watch: asyncio.TimerHandle | None = None
        weakref.finalize(self, self._crew.end).atexit = False

    def submit(
        self,
        work: Callable[..., T],
        *args: object,
        then: Callable[[asyncio.Future[T], T], bool] | None = None,
    ) -> asyncio.Future[T]:
        """Have *work* done in a thread and return the future of its result. To cancel that changes nothing there.

        Args:
            work: Called with *args*.
            *args: See *work*.
            then: Called on the loop with the future and the result; true where it takes care of the future itself.
        """
        future: asyncio.Future[T] = Answer(loop=self._loop)
        self._crew.put(self._tell, future, work, args)
        pending = self._returns.pending
        pending[future] = then  # in time: the loop takes the results, and it is here
        if self._watch is None and len(pending) > self._crew.size():
            self._look_later()
        return future

    @property
    def busy(self) -> bool:
        """Whether a job is queued or under way."""
        return bool(self._returns.pending)

    def _look_later(self) -> None:
        if self._crew.can_grow():
            due = self._loop.time() + _PATIENCE
            self._watch = self._loop.call_at(due, self._look, due, self._returns.count)

    def _look(self, due: float, count: int) -> None:
        self._watch = None
        if len(self._returns.pending) <= self._crew.size():
            return
        # A loop that was late to look has kept the threads from the interpreter's lock: that they have done nothing
        # meanwhile is its own doing.
        if count == self._returns.count and self._loop.time() - due < _PATIENCE:
            with suppress(RuntimeError):  # those that there are serve what waits
                self._crew.grow()
        self._look_later()

    async def aclose(self) -> None:
        """Let jobs end, and then the threads. What does not end any more is given up; its callers get an error."""
        returns = self._returns
        count = -1
        try:
            while returns.pending and count != returns.count:
                count = returns.count
                if returns.settled is None or returns.settled.done():
                    returns.settled = self._loop.create_future()
                await asyncio.wait([returns.settled], timeout=_LAST)
        finally:
            if self._watch is not None:
                self._watch.cancel()
            self._crew.end()
            for future in returns.pending:
                if not future.done():
                    future.set_exception(
                        StoreTimeoutError(
                            "the folder does not answer.", cure="Look whether its disk or mount is there."
                        )
                    )
            returns.pending.clear()
            if returns.settled is not None and not returns.settled.done():
                returns.settled.set_result(None)  # another one that closes may wait for it


class Aside(futures.Executor):
    """One thread, for what may take its time: an executor for ``loop.run_in_executor``, but with daemons."""

    def __init__(self, name: str) -> None:
        self._crew = Crew(name, 1)
        self._last: futures.Future[None] | None = None
        weakref.finalize(self, self._crew.end).atexit = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> futures.Future[T]:
        """See ``Executor.submit``."""
        future: futures.Future[T] = futures.Future()
        self._crew.put(_answer, future, lambda: fn(*args, **kwargs), ())
        return future

    async def aclose(self) -> None:
        """Let jobs end, and then the thread. What takes longer than a few seconds is not waited for."""
        try:
            if self._crew.size():
                if self._last is None:  # once the thread has ended, nothing is done any more
                    self._last = self.submit(_nothing)
                await asyncio.wait([asyncio.wrap_future(self._last)], timeout=_LAST)
        finally:
            self._crew.end()


def _nothing() -> None:
    """What every job before has to be done for."""


def _answer(future: futures.Future[Any], result: Any, error: BaseException | None) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
