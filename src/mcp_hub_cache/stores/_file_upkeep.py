"""What the file store does over whole folders: sweep, evict, list, clear, count. Synchronous; runs in threads.

Strategy: all of it is work that may be left off after each file, or after each shelf where it holds the shelf's lock:
nobody waits for a lock for longer than one shelf takes. It is done in steps of a few milliseconds, with a turn of the
event loop in between. For thread and loop share the interpreter: beside a thread that makes one system call after the
other, each step of the loop waits for it. For the same reason no more is kept of a file than must be: lists of
thousands of objects would have the garbage collector go through all that the program holds.

Eviction drops what was used least recently, over all namespaces: one pass over the files' ``atime`` finds the oldest
that together make enough room (a heap of candidates, so memory goes with what is dropped and not with what is there),
then drops them shelf by shelf unless they have been used meanwhile. It makes room for a tenth at once, so a pass is
paid for by many writes. One process at a time evicts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from heapq import heappop, heappush
from itertools import groupby
from typing import Final, NamedTuple, TypeVar

from .._exceptions import StoreError
from .._frame import HEAD_SIZE, FrameError, Kind, is_live, key_of, unpack_head
from ._file_folder import Folder
from ._file_places import Place
from ._file_shelf import LOCK_SECONDS, UNDER_WAY, Shelf, is_live_entry, look, store_error

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work that may be left off wherever it yields; what it holds goes with it."""
Found = tuple[bytes, bytes]
"""A key, and the head of what stands under it."""

_STEP: Final = 0.002  # seconds
_SETTLED: Final = 16  # shelves that are made durable together
_PAGE: Final = 100  # entries at most that the loop has to deal with in one go
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


def step(work: Steps[T]) -> T | None:
    """Do some milliseconds' worth of *work*; the result after the last of it."""
    until = time.monotonic() + _STEP
    try:
        while True:
            next(work)
            if time.monotonic() >= until:
                return None
    except StopIteration as end:
        result: T = end.value
        return result


def page(found: Iterator[Found | None]) -> list[Found] | None:
    """What some milliseconds find; None after the last of it."""
    until = time.monotonic() + _STEP
    items: list[Found] = []
    for item in found:
        if item is not None:
            items.append(item)
        if len(items) == _PAGE or time.monotonic() >= until:
            return items
    return items or None


def sweep(folder: Folder) -> Steps[int]:
    """Remove what has expired and what dead writers left; how many had expired."""
    expired = 0
    for space, shelf in folder.shelves():
        # In trouble: that is its own alone. Busy: it has its turn in the next round.
        with suppress(OSError, StoreError), folder.lock(space, shelf, _soon(_PATIENCE), make=False) as held:
            expired += held.tidy()
        yield
    folder.finish_sweep()
    return expired


def clear(folder: Folder, prefix: bytes) -> Steps[tuple[int, StoreError | None]]:
    """Remove what has a key that starts with *prefix*; how many entries, and what kept a shelf from being cleared."""
    total, trouble = 0, None
    changed: list[tuple[str, int]] = []
    for space, shelf in folder.shelves(prefix):
        now, whole = folder.clock(), folder.covers(prefix, space)
        try:
            with folder.lock(space, shelf, _soon(LOCK_SECONDS), make=False) as held:
                # All are seen before the first goes.
                for name, charge in [(seen.name, seen.charge) for seen in held.look()]:
                    total += _clear_one(held, name, charge, prefix, whole=whole, now=now)
        except FileNotFoundError:
            continue
        except OSError as error:
            trouble = trouble or store_error(error, folder.directory)
        except StoreError as error:
            trouble = trouble or error
        changed.append((space, shelf))
        if len(changed) == _SETTLED:
            trouble = _settle(folder, changed) or trouble
        yield
    return total, _settle(folder, changed) or trouble


def _settle(folder: Folder, changed: list[tuple[str, int]]) -> StoreError | None:
    shelves = [*changed]
    changed.clear()
    try:
        if folder.ground is not None and shelves:
            folder.ground.settle(shelves)
    except OSError as error:
        return store_error(error, folder.directory)
    return None


def _soon(seconds: float) -> float:
    return time.monotonic() + seconds


def _clear_one(shelf: Shelf, name: str, charge: int, prefix: bytes, *, whole: bool, now: float) -> bool:
    data = _front(partial(shelf.front, name))
    if data is None:
        return False
    try:
        key, head = key_of(data), unpack_head(data)
    except FrameError:
        if whole:
            shelf.drop_seen(name, charge)
        return False
    if not key.startswith(prefix):
        return False
    shelf.drop_seen(name, charge)
    return head.kind == Kind.ENTRY and is_live(head, now)


def _front(read: Callable[[int], bytes | None]) -> bytes | None:
    data = read(_FRONT)
    if data is not None and len(data) == _FRONT:
        with suppress(FrameError):
            length = HEAD_SIZE + unpack_head(data).key_length
            if length > _FRONT:
                return read(length)
    return data


def scan(folder: Folder, prefix: bytes) -> Iterator[Found | None]:
    """The keys that start with *prefix*, with their heads; None for each other file."""
    for space, shelf in folder.shelves(prefix):
        for name in folder.names(space, shelf):
            found: Found | None = None
            with suppress(FrameError, OSError):  # gone, damaged or not for us to read: not listed
                data = _front(partial(folder.read, Place(space, shelf, name)))
                if data is not None and (key := key_of(data)).startswith(prefix):
                    found = key, data[:HEAD_SIZE]
            yield found


def evict(folder: Folder, limit: int, target: int, wait: float) -> Steps[int]:
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


def _make_room(folder: Folder, limit: int, target: int) -> Steps[int]:
    need = folder.usage() - target
    oldest: list[_Candidate] = []  # a heap with the one used last on top, which is the first to be spared
    gain = total = 0
    now = folder.clock()
    for space, shelf in folder.shelves():
        with suppress(OSError):
            for seen in look(folder.path(space, shelf)):
                yield
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
        yield from sweep(folder)
        return 0
    return (yield from _drop(folder, oldest))


def _drop(folder: Folder, candidates: list[_Candidate]) -> Steps[int]:
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


def count(folder: Folder) -> Steps[dict[str, int]]:
    """How many files, expired files, bytes and live entries there are."""
    facts = {"total_files": 0, "expired_files": 0, "total_bytes": 0, "total_keys": 0}
    for space, shelf in folder.shelves():
        now, path = folder.clock(), folder.path(space, shelf)
        with suppress(OSError):
            for seen in look(path):
                facts["total_files"] += 1
                facts["total_bytes"] += seen.size
                facts["expired_files"] += seen.until <= now
                with suppress(OSError):
                    facts["total_keys"] += is_live_entry(seen, path, now)
                yield
    return facts
