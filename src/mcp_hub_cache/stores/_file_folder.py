"""Where the file store's files stand, and how a shelf is locked. Synchronous: all of this runs in threads.

    <directory>/mcp_hub_cache/        0700, ours; CACHEDIR.TAG keeps backups away
        <namespace>/                  "_other" for keys that name none
            counters                  see ``_file_counters``
            <2 hex>/                  a *shelf*: one of 256, by the first byte of the key's digest
                <32 hex>              the frame of one key, named by the digest of the whole key
                .<32 hex>.tmp         one being written

Rules:
- Readers take no lock. A file is never changed in place: a new one takes its name (``os.replace``), so that a reader
  has the old frame or the new one, whole.
- Whoever changes a file holds ``flock`` on its shelf (the open folder itself, so the lock can't outlive what it guards)
  and works relative to that open folder. Where somebody deletes the tree meanwhile, the next step fails with
  FileNotFoundError, and the whole is done again in a new tree.
- A temporary file exists only under the lock. One that is met by who has just got the lock belongs to a dead writer.
- Locks are taken in the order root (eviction), shelf, namespace (to make its table), one of each at a time.
- A frame's head decides when it has expired. So that sweeps, eviction and status need not open every file, its
  ``mtime`` repeats that (the last three digits of the nanoseconds are its kind), and ``atime`` is when it was last
  used, to a second. Both are hints: nothing is deleted as expired for a hint alone.
- Only regular files with names of this pattern are ever read, replaced or deleted. Links are not followed, but for one
  in place of a shelf, by readers: to look for it takes an eighth of a read, and only this user can have made it.
"""

# Paths are made and checked on every call; as plain strings that takes a tenth of what pathlib takes.
# ruff: noqa: PTH101, PTH105, PTH108, PTH116, PTH118, PTH120, PTH208

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from .._exceptions import StoreMisconfiguredError, StorePermissionError, StoreTimeoutError
from .._steady import Passing, steady
from . import _file_counters
from ._file_counters import SHELVES, Table
from ._file_durable import Ground, make_folder
from ._file_memory import Memory
from ._file_places import OTHER, TAG, Place, Places
from ._file_shelf import (
    BLOCK,
    FILE_NAME,
    LOCK_SECONDS,
    Shelf,
    lock_folder,
    locked,
    open_folder,
    read_frame,
    unlock_folder,
    write_new,
)

_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_SHELF_NAMES: Final = {f"{number:02x}": number for number in range(SHELVES)}
_TAG_TEXT: Final = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n# The cache of mcp_hub_cache: may be deleted at any time.\n"
)
_MAX_TABLES: Final = 64  # open at once, at two file handles each; a namespace whose table is closed has no stamps
_LISTING: Final = 0.05  # seconds that a listing waits for a lock, before it does without


class Folder(Places):
    """The tree under one directory. Thread-safe; nothing of it is bound to an event loop.

    Args:
        directory: The application's folder; ours is inside. Made if it is missing, otherwise left as it is.
        prefix: What keys begin with, before their namespace.
        clock: Seconds since the epoch.
        durable: Lasting changes survive a power cut; see ``_file_durable``.

    Attributes:
        ground: The folders that are known to be on disk; None where nothing has to be durable.
    """

    def __init__(self, directory: str, prefix: bytes, clock: Callable[[], float], *, durable: bool = False) -> None:
        super().__init__(prefix)
        self.directory = directory
        self.root = os.path.join(directory, "mcp_hub_cache")
        self.clock = clock
        # Near caches live by a clock that nobody sets back.
        self._passing = steady if clock is time.time else Passing(clock)
        self.ground = Ground(self.root) if durable else None
        self._tables: dict[str, Table] = {}
        self._listed = 0
        self._closed: dict[str, int] = {}  # usage of namespaces whose tables are not open, as of the last refresh
        self._checked = False

    def spaces(self, prefix: bytes = b"") -> list[str]:
        """The namespace folders there are that may hold keys that start with *prefix*."""
        named = self._spaced.match(prefix)
        part = prefix[len(self.prefix) :].decode("ascii", "replace") if prefix.startswith(self.prefix) else ""
        foreign = not (prefix.startswith(self.prefix) or self.prefix.startswith(prefix))
        there: list[str] = []
        with suppress(FileNotFoundError):
            if self.check():
                with os.scandir(self.root) as entries:
                    names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
                there = [name for name in names if _NAMESPACE.fullmatch(name)]
        if named is not None:
            only = self.space(prefix)
            return [space for space in there if space == only]
        return sorted(space for space in there if space == OTHER or (not foreign and space.startswith(part)))

    def shelves(self, prefix: bytes = b"") -> list[tuple[str, int]]:
        """The shelves there are of those namespaces, as (namespace, number); nothing else that stands there."""
        found: list[tuple[str, int]] = []
        for space in self.spaces(prefix):
            with suppress(FileNotFoundError), os.scandir(f"{self.root}/{space}") as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
                found += [(space, _SHELF_NAMES[name]) for name in sorted(names) if name in _SHELF_NAMES]
        return found

    def path(self, space: str, shelf: int) -> str:
        """The path of a shelf."""
        return f"{self.root}/{space}/{shelf:02x}"

    def read(self, place: Place, size: int) -> bytes | None:
        """See ``read_frame``."""
        return read_frame(self.file(place), self.clock, size=size)

    def file(self, place: Place) -> str:
        """The path of a file."""
        return f"{self.root}/{place.space}/{place.name[:2]}/{place.name}"

    def names(self, space: str, shelf: int) -> list[str]:
        """The names of our files in a shelf: listed under its lock, since a listing may lose what is just replaced."""
        path = self.path(space, shelf)
        try:
            with locked(path, time.monotonic() + _LISTING):
                return [name for name in os.listdir(path) if FILE_NAME.fullmatch(name)]
        except FileNotFoundError:
            return []

    # Making and checking

    def ready(self, spaces: Collection[str]) -> None:
        """Look that the tree is the one we know, and open the tables of *spaces*.

        Raises:
            OSError: It can't be looked at.
            StoreError: It isn't ours to use.
        """
        # A table at its path that is the one we have open is in our own folder, checked when it was opened.
        for space in spaces:
            if not (self._checked and self._current(space)):
                self.check()
                self.table(space)

    def _current(self, space: str) -> Table | None:
        """The open table of the namespace, if that is the one on disk."""
        table = self._tables.get(space)
        if table is None:
            return None
        try:
            facts = os.lstat(f"{self.root}/{space}/{_file_counters.NAME}")
        except OSError:
            return None
        return table if table.is_at(facts) else None

    def check(self) -> bool:
        """Whether our folder is there.

        Raises:
            StoreError: It is, but isn't ours to use.
        """
        try:
            facts = os.lstat(self.root)
        except FileNotFoundError:
            self._checked = False
            return False
        self._checked = False
        if not stat.S_ISDIR(facts.st_mode):
            raise StorePermissionError(
                f"{self.root} is a link or a file, no folder of ours.", cure="Remove it, or point CACHE_DIR elsewhere."
            )
        if facts.st_uid != os.geteuid():
            raise StorePermissionError(
                f"{self.root} belongs to user {facts.st_uid}, not to {os.geteuid()}.",
                cure="Point CACHE_DIR to a folder of this user's own.",
            )
        mode = facts.st_mode
        if mode & 0o077 and not mode & stat.S_IWOTH:  # a volume's fsGroup, a copy by another umask
            with suppress(OSError):
                os.chmod(self.root, stat.S_IMODE(mode) & 0o700)
                mode = os.lstat(self.root).st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise StorePermissionError(
                f"{self.root} may be written by others (mode {stat.S_IMODE(mode):03o}): what is in it is not trusted.",
                cure="Remove it and let it be made anew, or point CACHE_DIR to a file system that keeps modes.",
            )
        self._checked = True
        return True

    def build(self) -> None:
        """Make our folder if it is not there."""
        if self.check():
            return
        missing = self.directory
        chain: list[str] = []
        while not os.path.lexists(missing):
            chain.append(missing)
            missing = os.path.dirname(missing)
        for path in reversed(chain):
            make_folder(path, sync=self.ground is not None)
        make_folder(self.root, sync=False)  # as all below, it is synced when there is something in it
        self.check()
        with suppress(FileExistsError):
            write_new(f"{self.root}/{TAG}", _TAG_TEXT)

    def probe(self) -> None:
        """Make our folder and write a file in it that never has a name, or not for long.

        Raises:
            OSError: It can't be done.
            StoreError: The folder isn't ours.
        """
        self.check()
        self.build()
        try:
            file = os.open(self.root, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except (AttributeError, OSError) as error:  # not on this system, or not on this file system
            if isinstance(error, OSError) and error.errno not in (errno.EISDIR, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            path = f"{self.root}/.probe.{os.urandom(8).hex()}"
            write_new(path, bytes(BLOCK))
            os.unlink(path)
            return
        try:
            os.write(file, bytes(BLOCK))
        finally:
            os.close(file)

    def lock(self, space: str, shelf: int, deadline: float, *, make: bool) -> Shelf:
        """Take the lock of a shelf.

        Args:
            space: Its namespace.
            shelf: Its number.
            deadline: Until when to try, by ``time.monotonic``.
            make: Make it if it is not there.

        Raises:
            FileNotFoundError: It is not there, or has just been deleted.
            StoreTimeoutError: Somebody else kept it locked.
        """
        path = self.path(space, shelf)
        try:
            fd = open_folder(path)
        except FileNotFoundError:
            if not make:
                raise
            self.build()
            make_folder(f"{self.root}/{space}", sync=False)
            make_folder(path, sync=False)
            if self.ground is not None:
                self.ground.loosen(space)
            fd = open_folder(path)
        try:
            return self._hold(fd, space, shelf, deadline)
        except BaseException:
            unlock_folder(fd)
            raise

    def _hold(self, fd: int, space: str, shelf: int, deadline: float) -> Shelf:
        if not lock_folder(fd, deadline):
            raise StoreTimeoutError(
                f"{self.path(space, shelf)} stays locked by another process.",
                cure="Look for one that is stopped (fuser shows it).",
            )
        # Only now: a tree made anew while we waited has a new table.
        table = self.table(space, make=True)
        if table is None:  # deleted as soon as it was made
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._table_path(space))
        held = Shelf(fd, shelf, table, self.clock)
        if table.broken(shelf):
            held.tidy()
        return held

    @contextmanager
    def alone(self, seconds: float) -> Iterator[bool]:
        """Hold the lock of the whole tree, which eviction takes; False if another process has it for *seconds*."""
        with locked(self.root, time.monotonic() + seconds) as mine:
            yield mine

    # Tables

    def table(self, space: str, *, make: bool = False) -> Table | None:
        """The namespace's table as it is on disk now, opened if need be; made anew if *make*."""
        table = self._current(space)
        if table is not None:
            return table
        path = self._table_path(space)
        try:
            facts = os.lstat(path)
            if not (stat.S_ISREG(facts.st_mode) and stat.S_ISDIR(os.lstat(f"{self.root}/{space}").st_mode)):
                raise StoreMisconfiguredError(f"{path} or its folder is a link.", cure="Remove it by hand.")
            table = _file_counters.open_table(path, self._passing)
        except FileNotFoundError:
            table = None
        if table is None and make:
            with locked(f"{self.root}/{space}", time.monotonic() + LOCK_SECONDS) as mine:
                if not mine:
                    raise StoreTimeoutError(f"{path} stays locked by another process.")
                table = _file_counters.open_table(path, self._passing)
                if table is None:
                    temp = f"{self.root}/{space}/.{_file_counters.NAME}.tmp"
                    with suppress(FileNotFoundError):
                        os.unlink(temp)
                    write_new(temp, _file_counters.blank())
                    os.replace(temp, path)
                    table = _file_counters.open_table(path, self._passing)
        self._forget(space)
        if table is not None:
            for oldest in list(self._tables)[: len(self._tables) - _MAX_TABLES + 1]:
                if (closed := self._tables.get(oldest)) is not None:
                    self._closed[oldest] = closed.usage()  # first: ``usage`` must find it in one place or the other
                    self._forget(oldest)
            self._tables[space] = table
        return table

    def _forget(self, space: str) -> Table | None:
        """Let go of the namespace's table; what is in near caches by its counters is trusted no more."""
        table = self._tables.pop(space, None)
        if self.ground is not None:
            self.ground.loosen(space)
        if table is not None:
            table.changes.void()
        return table

    def _table_path(self, space: str) -> str:
        return f"{self.root}/{space}/{_file_counters.NAME}"

    def open_table(self, space: str) -> Table | None:
        """The namespace's table if it is open."""
        return self._tables.get(space)

    def memory(self, space: str) -> Memory | None:
        """What reads the namespace's files without waiting; None: nothing does now. Doesn't wait itself."""
        # The look at the table's path finds it in memory: it is open, which keeps it there and all that is above it.
        if not self._checked or (table := self._tables.get(space)) is None or not table.memory.serves:
            return None
        return table.memory if self._current(space) is table else None

    def distrust(self) -> None:
        """Void all stamps taken so far."""
        for table in list(self._tables.values()):
            table.changes = table.changes.anew()

    def refresh(self) -> None:
        """Look whether the tables that are open are still those on disk, and at those of other namespaces."""
        if not self.check():
            self.close()
            return
        there = self.spaces()
        for space in {*self._tables, *there}:
            if space in self._tables or len(self._tables) < _MAX_TABLES:
                self.table(space)
            elif (table := _file_counters.open_table(self._table_path(space), self._passing)) is not None:
                self._closed[space] = table.usage()
        for space in {*self._closed} - {*there}:
            self._closed.pop(space, None)

    def notice(self) -> None:
        """Open the tables of namespaces that others made, for ``usage`` to know. One system call if there are none."""
        changed = os.stat(self.root).st_mtime_ns
        if changed != self._listed:
            self.refresh()
            self._listed = changed

    def usage(self) -> int:
        """Bytes of disk taken, by the tables: one system call for each."""
        tables = self._tables.copy()
        closed = self._closed.copy() if self._closed else {}
        return sum(table.usage() for table in tables.values()) + sum(closed[space] for space in closed.keys() - tables)

    def swept(self) -> float:
        """When every namespace had last been swept, by ``time.time``."""
        return min((table.swept for table in list(self._tables.values())), default=0.0)

    def finish_sweep(self) -> None:
        """Note that all have been swept. What was charged to shelves that are no longer there is forgotten."""
        for space, table in list(self._tables.items()):
            for shelf in table.charged():
                if not os.path.lexists(self.path(space, shelf)):
                    table.set_usage(shelf, 0)
            table.set_swept(time.time())

    def close(self) -> None:
        """Let go of the tables; the next use opens them again."""
        for space in list(self._tables):
            self._forget(space)
        self._checked = False
        self._closed.clear()
        self._listed = 0
        if self.ground is not None:
            self.ground.loosen()
