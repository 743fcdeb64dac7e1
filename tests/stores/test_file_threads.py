"""The file store's threads: who is told what, what hangs, and what ends when."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mcp_hub_cache._exceptions import StoreExhaustedError, StoreTimeoutError
from mcp_hub_cache.stores import _file_threads
from mcp_hub_cache.stores._file_threads import Aside, Threads


def alive(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def gone(name: str) -> bool:
    for thread in alive(name):
        thread.join(10)
    return not alive(name)


@asynccontextmanager
async def crew(name: str, most: int = 2) -> AsyncIterator[Threads]:
    threads = Threads(asyncio.get_running_loop(), most, name)
    try:
        yield threads
    finally:
        await threads.aclose()


def fail() -> None:
    raise LookupError("as it is")


async def test_results_and_errors_reach_their_callers() -> None:
    async with crew("t-results") as threads:
        first, second, third = threads.submit(len, "abc"), threads.submit(fail), threads.submit(os.getpid)
        assert await first == 3
        with pytest.raises(LookupError, match="as it is"):
            await second
        assert await third == os.getpid()
    assert gone("t-results")


async def test_quick_jobs_are_done_in_order_by_one_thread() -> None:
    done: list[int] = []
    async with crew("t-order", most=4) as threads:
        await asyncio.gather(*(threads.submit(done.append, n) for n in range(200)))
        assert done == list(range(200))
        assert len(alive("t-order")) == 1


async def test_a_job_that_takes_its_time_gets_others_a_thread_which_ends_when_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_file_threads, "_IDLE", 0.01)
    go_on = threading.Event()
    async with crew("t-slow", most=3) as threads:
        slow = [threads.submit(go_on.wait) for _ in range(2)]
        async with asyncio.timeout(10):
            assert await threads.submit(len, "abc") == 3
            assert len(alive("t-slow")) == 3
            third, queued = threads.submit(go_on.wait), threads.submit(len, "ab")  # no more than there may be
            await asyncio.sleep(0.05)
            assert not queued.done()
            go_on.set()
            await asyncio.gather(*slow, third, queued)
            while len(alive("t-slow")) > 1:
                await asyncio.sleep(0.01)
            assert await threads.submit(len, "abcd") == 4


async def test_a_cancelled_caller_changes_nothing_for_the_job_and_for_others() -> None:
    go_on, done = threading.Event(), threading.Event()
    async with crew("t-cancel", most=1) as threads:
        first = threads.submit(go_on.wait)
        second, third = threads.submit(done.set), threads.submit(len, "abc")
        first.cancel()  # begun
        second.cancel()  # not begun
        go_on.set()
        assert await third == 3
        assert done.is_set()
        assert first.cancelled()
        assert second.cancelled()


async def test_then_may_keep_a_result_back() -> None:
    kept: list[asyncio.Future[int]] = []

    def keep(future: asyncio.Future[int], result: int) -> bool:
        kept.append(future)
        return result == 3

    async with crew("t-then") as threads:
        three = threads.submit(len, "abc", then=keep)
        assert await threads.submit(len, "ab", then=keep) == 2
        assert not three.done()
        kept[0].set_result(30)
        assert await three == 30


async def test_aclose_waits_for_what_was_taken_in() -> None:
    async with crew("t-close", most=1) as threads:
        futures = [threads.submit(time.sleep, 0.001) for _ in range(20)]
    assert all(future.done() for future in futures)
    assert gone("t-close")


async def test_aclose_gives_up_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_file_threads, "_LAST", 0.02)
    go_on = threading.Event()
    async with asyncio.timeout(10):
        async with crew("t-hang", most=1) as threads:
            hangs, queued = threads.submit(go_on.wait), threads.submit(len, "abc")
        for future in (hangs, queued):
            with pytest.raises(StoreTimeoutError, match="does not answer"):
                await future
        aside = Aside("t-hang")
        await asyncio.get_running_loop().run_in_executor(aside, len, "abc")
        late = asyncio.get_running_loop().run_in_executor(aside, go_on.wait)
        await aside.aclose()
        assert not late.done()
    go_on.set()
    await late
    assert gone("t-hang")


def test_a_loop_that_is_closed_meanwhile_ends_no_thread_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[object] = []
    hook = threading.excepthook
    monkeypatch.setattr(
        threading, "excepthook", lambda told: (errors.append if told.thread in alive("t-closed") else hook)(told)
    )
    go_on, done = threading.Event(), threading.Event()

    async def begin() -> Threads:
        threads = Threads(asyncio.get_running_loop(), 1, "t-closed")
        _ = threads.submit(go_on.wait), threads.submit(done.set)
        return threads

    threads = asyncio.run(begin())
    go_on.set()
    assert done.wait(10)
    assert len(alive("t-closed")) == 1
    del threads
    gc.collect()
    assert gone("t-closed")  # nobody closed it, but nobody can use it any more
    assert errors == []


PRELUDE = """
import asyncio, atexit, os, sys, threading, time
from mcp_hub_cache.stores import _file_threads
from mcp_hub_cache.stores._file_threads import Aside, Threads
_file_threads._AT_EXIT = float(sys.argv[1])
async def main():
    threads, aside = Threads(asyncio.get_running_loop(), 1, "t"), Aside("aside")
"""


def run(code: str, bound: float) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + code, str(bound)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


KEPT = """
    global kept
    kept = threads, aside
asyncio.run(main())
"""


def test_the_interpreters_end_waits_for_what_was_taken_in() -> None:
    code = """
    threads.submit(time.sleep, 0.2)
    threads.submit(print, "written")
    aside.submit(print, "aside")
"""
    assert sorted(run(code + KEPT, bound=30)) == ["aside", "written"]


def test_the_interpreters_end_is_not_held_up_by_what_hangs() -> None:
    code = """
    threads.submit(threading.Event().wait)
    threads.submit(print, "never")
    aside.submit(threading.Event().wait)
    print("begun", flush=True)
"""
    assert run(code + KEPT, bound=0.1) == ["begun"]


def test_the_interpreters_end_waits_for_a_store_that_is_forgotten() -> None:
    code = """
    threads.submit(time.sleep, 0.2)
    threads.submit(print, "written")
asyncio.run(main())
"""
    assert run(code, bound=30) == ["written"]


def test_nothing_is_begun_any_more_that_the_interpreters_end_would_cut_off() -> None:
    """A daemon's loop goes on, and asks, while functions are called at exit."""
    code = """
    def work():
        global begun, ended
        begun += 1
        time.sleep(0.001)
        ended += 1
    while True:
        await asyncio.gather(*(threads.submit(work) for _ in range(20)))
        ready.set()
begun = ended = 0
ready = threading.Event()
def look():
    at_the_end = begun
    time.sleep(0.1)
    print(at_the_end >= 20, begun - at_the_end, begun - ended)
atexit.unregister(_file_threads._serving._end)
atexit.register(look)
atexit.register(_file_threads._serving._end)
threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
ready.wait()
"""
    assert run(code, bound=30) == ["True", "0", "0"]


def test_who_is_called_at_exit_after_the_threads_have_ended_is_told() -> None:
    code = """
    print(await threads.submit(len, "abc"))
def late():
    try:
        asyncio.run(main())
    except Exception as error:
        print(type(error).__name__, "the program is ending" in str(error))
atexit.unregister(_file_threads._serving._end)
atexit.register(late)
atexit.register(_file_threads._serving._end)
"""
    assert run(code, bound=30) == ["StoreExhaustedError", "True"]


async def test_no_thread_to_be_had_is_said_and_no_more_of_them_is_borne(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    go_on = threading.Event()
    async with crew("t-none") as threads:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            with pytest.raises(StoreExhaustedError, match=r"no thread for the files: can.t start new thread\..*ulimit"):
                threads.submit(len, "abc")
        assert await threads.submit(len, "abc") == 3
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            slow, queued = threads.submit(go_on.wait), threads.submit(len, "ab")
            await asyncio.sleep(0.05)
            go_on.set()
            assert (await slow, await queued) == (True, 2)


def test_a_forked_childs_end_waits_for_none_of_its_parents_jobs() -> None:
    code = """
    go_on = threading.Event()
    busy = threads.submit(go_on.wait)
    child = os.fork()
    if not child:
        asyncio._set_running_loop(None)
        async def anew():
            mine = Threads(asyncio.get_running_loop(), 1, "t")
            print(await mine.submit(len, "abc"), flush=True)
            await mine.aclose()
        asyncio.run(anew())
        atexit._run_exitfuncs()  # and no more: to unwind would close the epoll that it shares with its parent
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    go_on.set()
    await busy
    await threads.aclose()
"""
    assert run(code + KEPT, bound=1000) == ["3", "0"]
