"""What the file store does over whole folders: sweep, evict, list, clear, count. Synchronous; runs in threads.

Strategy: work goes shelf by shelf, in slices of a few milliseconds, so that a thread is never gone for long and nobody
waits for a lock for longer than one shelf takes. Slices take a list of shelves and give back those not done yet.

Eviction drops what was used least recently, over all namespaces: one pass over the files' ``atime`` finds the oldest
that together make enough room (a heap of candidates, so memory goes with what is dropped and not with what is there),
then drops them shelf by shelf unless they have been used meanwhile. It makes room for a tenth at once, so a pass is
paid for by many writes. One process at a time evicts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from heapq import heappop, heappush
from itertools import groupby
from typing import Final, NamedTuple, TypeVar

from .._exceptions import StoreError
from .._frame import HEAD_SIZE, FrameError, Kind, is_live, key_of, unpack_head
from ._file_folder import Folder
from ._file_places import Place
from ._file_shelf import LOCK_SECONDS, UNDER_WAY, Seen, Shelf, is_live_entry, look, store_error

T = TypeVar("T")
Shelves = Sequence[tuple[str, int]]
Steps = Generator[None, None, int]
"""Work in steps of some milliseconds, so that its thread is never gone for long. What it holds goes with it."""

_SLICE: Final = 0.005
_FRONT: Final = 2048  # a head and nearly every key
_PATIENCE: Final = 0.05  # for the lock of a shelf that upkeep can as well do later
_PASSES: Final = 3


class _Candidate(NamedTuple):
    age: int  # the more, the longer unused
    space: str
    shelf: int
    name: str
    charge: int
    used: int
    live: bool


def slice_of(shelves: Shelves, one: Callable[[str, int], T]) -> tuple[list[T], Shelves]:
    """Do *one* for the first of *shelves* and for more while there is time; the results, and the shelves left."""
    until = time.monotonic() + _SLICE
    done: list[T] = []
    for at, (space, shelf) in enumerate(shelves):
        if done and time.monotonic() >= until:
            return done, shelves[at:]
        done.append(one(space, shelf))
    return done, ()


def sweep(folder: Folder, shelves: Shelves) -> tuple[int, Shelves]:
    """Remove what has expired and what dead writers left; how many had expired."""

    def one(space: str, shelf: int) -> int:
        try:
            with folder.lock(space, shelf, time.monotonic() + _PATIENCE, make=False) as held:
                return held.tidy()
        except (OSError, StoreError):  # busy: it has its turn in the next round; or in trouble, which is its own alone
            return 0

    counts, left = slice_of(shelves, one)
    return sum(counts), left


def clear(folder: Folder, prefix: bytes, shelves: Shelves) -> tuple[int, StoreError | None, Shelves]:
    """Remove what has a key that starts with *prefix*; how many entries, and what kept a shelf from being cleared."""

    def one(space: str, shelf: int) -> int | StoreError:
        now, whole = folder.clock(), folder.covers(prefix, space)
        try:
            with folder.lock(space, shelf, time.monotonic() + LOCK_SECONDS, make=False) as held:
                return sum(_clear_one(held, seen, prefix, whole=whole, now=now) for seen in held.look())
        except FileNotFoundError:
            return 0
        except OSError as error:
            return store_error(error, folder.directory)
        except StoreError as error:
            return error

    results, left = slice_of(shelves, one)
    if folder.ground is not None:
        try:
            folder.ground.settle(shelves[: len(results)])
        except OSError as error:
            results.append(store_error(error, folder.directory))
    trouble = next((result for result in results if isinstance(result, StoreError)), None)
    return sum(result for result in results if not isinstance(result, StoreError)), trouble, left


def _clear_one(shelf: Shelf, seen: Seen, prefix: bytes, *, whole: bool, now: float) -> bool:
    data = _front(shelf.front, seen.name)
    if data is None:
        return False
    try:
        key, head = key_of(data), unpack_head(data)
    except FrameError:
        if whole:
            shelf.drop_seen(seen)
        return False
    if not key.startswith(prefix):
        return False
    shelf.drop_seen(seen)
    return head.kind == Kind.ENTRY and is_live(head, now)


def _front(read: Callable[[str, int], bytes | None], name: str) -> bytes | None:
    data = read(name, _FRONT)
    if data is not None and len(data) == _FRONT:
        with suppress(FrameError):
            length = HEAD_SIZE + unpack_head(data).key_length
            if length > _FRONT:
                return read(name, length)
    return data


def scan(folder: Folder, prefix: bytes, shelves: Shelves) -> tuple[list[tuple[bytes, bytes]], Shelves]:
    """A page of keys that start with *prefix*, with their heads."""

    def one(space: str, shelf: int) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        for name in folder.names(space, shelf):
            with suppress(FrameError, OSError):  # gone, damaged or not for us to read: not listed
                data = _front(lambda name, size: folder.read(Place(space, shelf, name), size), name)
                if data is not None and (key := key_of(data)).startswith(prefix):
                    found.append((key, data[:HEAD_SIZE]))
        return found

    pages, left = slice_of(shelves, one)
    return [item for page in pages for item in page], left


def evict(folder: Folder, limit: int, target: int, wait: float) -> Steps:
    """Make room if more than *limit* bytes are taken, in steps; returns how many live entries went.

    Args:
        folder: The tree.
        limit: What may be taken without anything being done.
        target: What may still be taken afterwards.
        wait: Seconds to wait for another process that evicts just now.
    """
    dropped = 0
    with suppress(FileNotFoundError), folder.alone(wait) as mine:
        for _ in range(_PASSES if mine else 0):
            folder.refresh()
            if folder.usage() <= limit:
                break
            dropped += yield from _make_room(folder, limit, target)
    return dropped


def _make_room(folder: Folder, limit: int, target: int) -> Steps:
    need = folder.usage() - target
    shelves = folder.shelves()
    oldest: list[_Candidate] = []  # a heap with the one used last on top, which is the first to be spared
    gain = total = 0
    now = folder.clock()
    for space, shelf in shelves:
        try:
            files = look(folder.path(space, shelf))
        except OSError:
            continue
        yield
        for seen in files:
            total += seen.charge
            live = seen.until > now
            if live and seen.kind == Kind.PLACEHOLDER and seen.until < now + UNDER_WAY:
                continue
            age = -seen.used if live else 0
            if gain >= need and age < oldest[0].age:
                continue
            heappush(oldest, _Candidate(age, space, shelf, seen.name, seen.charge, seen.used, live))
            gain += seen.charge
            while gain - oldest[0].charge >= need:
                gain -= heappop(oldest).charge
    if total <= limit:  # the tables are wrong, not the folder too full
        left: Shelves = shelves
        while left:
            _, left = sweep(folder, left)
            yield
        folder.finish_sweep()
        return 0
    return (yield from _drop(folder, oldest))


def _drop(folder: Folder, candidates: list[_Candidate]) -> Steps:
    dropped = 0
    candidates.sort(key=lambda one: (one.space, one.shelf))
    for (space, shelf), group in groupby(candidates, lambda one: (one.space, one.shelf)):
        try:
            with folder.lock(space, shelf, time.monotonic() + _PATIENCE, make=False) as held:
                for one in group:
                    dropped += held.drop_unused(one.name, one.used) and one.live
        except (OSError, StoreError):  # gone, or in use and thus not the oldest, or in trouble
            pass
        yield
    return dropped


def step(work: Steps) -> int | None:
    """Do the next step; the result after the last."""
    try:
        next(work)
    except StopIteration as end:
        result: int = end.value
        return result
    return None


def count(folder: Folder, facts: dict[str, int], shelves: Shelves) -> Shelves:
    """Add to *facts* how many files, expired files, bytes and live entries there are in some of *shelves*."""
    now = folder.clock()

    def one(space: str, shelf: int) -> None:
        path = folder.path(space, shelf)
        with suppress(OSError):
            for seen in look(path):
                facts["total_files"] += 1
                facts["total_bytes"] += seen.size
                facts["expired_files"] += seen.until <= now
                with suppress(OSError):
                    facts["total_keys"] += is_live_entry(seen, path, now)

    return slice_of(shelves, one)[1]
