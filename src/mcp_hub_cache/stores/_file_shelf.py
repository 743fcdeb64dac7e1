"""One shelf, and the files in it: the only code that changes a file. The rules are at the head of ``_file_folder``."""

# Files are named relative to an open folder (dir_fd), which pathlib can't say.
# ruff: noqa: PTH108, PTH208

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, NamedTuple, Self

from .._exceptions import (
    StoreError,
    StoreExhaustedError,
    StoreFullError,
    StoreMisconfiguredError,
    StorePermissionError,
    StoreReadOnlyError,
)
from .._frame import HEAD_SIZE, LONGEST_FRONT, FrameError, Kind, claim, peek, unpack_head
from ._file_counters import Table

# For all locks of one job; below the engine's own deadline, so that an outcome names the cause.
LOCK_SECONDS: Final = 0.45
UNDER_WAY: Final = 60.0  # seconds of life that a load's placeholder never has more than: others are tags' marks
BLOCK: Final = 4096  # what a file system gives a small file; usage is counted in these
FILE_NAME: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)

_TEMP_NAME: Final = re.compile(r"\.[0-9a-f]{32}\.tmp", re.ASCII)
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
QUIET: Final = _READ | getattr(os, "O_NOATIME", 0)
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_AT_ONCE: Final = fcntl.LOCK_EX | fcntl.LOCK_NB
_LARGE: Final = 1 << 20
_FAR: Final = 1 << 33  # the year 2242: "for ever", and within what file systems can say
_DAMAGED_FOR: Final = 86_400.0  # seconds that a file of ours which can't be read is kept for people to look at


def bucket_of(name: str) -> int:
    """The change counter of the file *name*."""
    return int(name[:4], 16)


def charge_of(size: int) -> int:
    """Bytes of disk that a file of *size* bytes takes."""
    return -(-size // BLOCK) * BLOCK


def store_error(error: OSError, path: str) -> StoreError:
    """What *error*, met under *path*, means and what to do about it."""
    number = error.errno or 0
    named = error.filename
    there = named if isinstance(named, str) and named.startswith(path) else path
    what = f"{there}: {os.strerror(number)} ({errno.errorcode.get(number, number)})."
    match number:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return StoreFullError(what, cure="Free room or inodes on that disk, or lower CACHE_MAX_BYTES.")
        case errno.EROFS:
            return StoreReadOnlyError(what, cure="Mount it writable, or point CACHE_DIR to a folder that is.")
        case errno.EACCES | errno.EPERM:
            return StorePermissionError(
                what, cure="Give this user read, write and search rights there, or point CACHE_DIR elsewhere."
            )
        case errno.EMFILE | errno.ENFILE:
            return StoreExhaustedError(what, cure="Raise the limit on open files (ulimit -n).")
        case errno.ENOTDIR | errno.ELOOP | errno.EEXIST | errno.ENAMETOOLONG | errno.EISDIR:
            return StoreMisconfiguredError(what, cure="Point CACHE_DIR to a folder, or remove what stands in its way.")
        case errno.ENOLCK | errno.ENOTSUP | errno.ENOSYS:
            return StoreMisconfiguredError(what, cure="That file system has no locks: point CACHE_DIR to a local disk.")
        case _:
            return StoreError(what, cure="Check that disk or mount, or point CACHE_DIR to another one.")


def lock_folder(fd: int, deadline: float) -> bool:
    """Take the lock of the open folder *fd* unless *deadline* (monotonic) passes. False: it passed."""
    pause = 0.0002
    while True:
        try:
            fcntl.flock(fd, _AT_ONCE)
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(pause * 1.6, 0.01)
        else:
            return True


def open_folder(path: str) -> int:
    """Open the folder itself, no link to one."""
    return os.open(path, _FOLDER)


@contextmanager
def locked(path: str, deadline: float) -> Iterator[bool]:
    """Hold the lock of the folder at *path*; says whether it was had in time."""
    fd = open_folder(path)
    try:
        yield lock_folder(fd, deadline)
    finally:
        unlock_folder(fd)


def unlock_folder(fd: int) -> None:
    """Give back the lock and close the folder."""
    # Said explicitly: a child forked meanwhile has the same open folder, and closing ours would leave it locked.
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def read_frame(
    path: str, clock: Callable[[], float], *, size: int | None = None, fd: int | None = None
) -> bytes | None:
    """The frame in the file at *path*, None where there is none or it has expired. What doesn't parse comes as it is.

    Args:
        path: The file; relative to *fd* if that is given.
        clock: Seconds since the epoch.
        size: The first so many bytes; None: all, which counts as use.
        fd: An open folder.

    Raises:
        OSError: It is there and can't be read.
    """
    try:
        try:
            # Without O_NOATIME the kernel would note every look at a file as use: its mtime is ahead (relatime).
            file = os.open(path, QUIET, dir_fd=fd)
        except PermissionError:
            file = os.open(path, _READ, dir_fd=fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return None
        raise
    try:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            return None
        length = facts.st_size if size is None else size
        if size is None and length > _LARGE:
            # What is no frame, or is longer than its head says, need not fill the memory: the head is enough to tell.
            head = peek(os.pread(file, HEAD_SIZE, 0))
            if head is None or length - head.payload_length > LONGEST_FRONT:
                length = HEAD_SIZE
        data = os.read(file, length)
        while len(data) < length and (more := os.read(file, length - len(data))):
            data += more
        head = peek(data)
        if head is not None and clock() >= head.keep_until:
            return None
        if size is None:
            with suppress(OSError):  # not ours to mark as used: a read-only folder
                os.utime(file, ns=(time.time_ns(), facts.st_mtime_ns))
        return data
    finally:
        os.close(file)


def hint(keep_until: float, kind: int) -> int:
    """The ``mtime`` in nanoseconds of a file that holds such a frame."""
    until = max(keep_until, 0.0) if keep_until < _FAR else _FAR
    return int(until * 1_000_000) * 1000 + kind


def hint_of(frame: bytes) -> int:
    """The ``mtime`` in nanoseconds of a file that holds *frame*: as its head says, which is not verified here."""
    said = claim(frame)
    return _FAR * 1_000_000_000 if said is None else hint(said.keep_until, said.kind)


class Seen(NamedTuple):
    """A file of ours, as its folder tells without opening it."""

    name: str
    charge: int
    size: int
    used: int
    until: float
    kind: int  # 0: the file system doesn't tell


def _seen(entry: os.DirEntry[str]) -> Seen | None:
    try:
        facts = entry.stat(follow_symlinks=False)
    except OSError:
        return None
    if not stat.S_ISREG(facts.st_mode):
        return None
    until, kind = divmod(facts.st_mtime_ns, 1000)
    return Seen(entry.name, charge_of(facts.st_size), facts.st_size, facts.st_atime_ns, until / 1_000_000, kind)


def look(fd: int | str) -> Iterator[Seen]:
    """Every file of ours in a shelf. None may be removed before the last was seen."""
    with os.scandir(fd) as entries:
        for entry in entries:
            if FILE_NAME.fullmatch(entry.name) and (seen := _seen(entry)) is not None:
                yield seen


class Shelf:
    """A shelf whose lock is held. Leaving it (``with``) gives the lock back."""

    __slots__ = ("_clock", "_fd", "_number", "_table")

    def __init__(self, fd: int, number: int, table: Table, clock: Callable[[], float]) -> None:
        self._fd = fd
        self._number = number
        self._table = table
        self._clock = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unlock_folder(self._fd)

    def head(self, name: str) -> bytes | None:
        """The first 64 bytes of what is there and has not expired."""
        return read_frame(name, self._clock, size=HEAD_SIZE, fd=self._fd)

    def frame(self, name: str) -> bytes | None:
        """All of what is there and has not expired."""
        return read_frame(name, self._clock, fd=self._fd)

    def front(self, name: str, size: int) -> bytes | None:
        """The first *size* bytes, expired or not; None: not there, or no file of ours."""
        return read_frame(name, _never, size=size, fd=self._fd)

    def put(self, name: str, frame: bytes, *, sync: bool = False) -> None:
        """Let *frame* take the place of what is there. On an error what was there still is.

        Args:
            name: The file.
            frame: Its bytes.
            sync: Have the bytes on disk first. For the name to be there, too, see ``Ground.settle``.
        """
        fd, table = self._fd, self._table
        more = charge_of(len(frame))
        try:
            facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            pass
        else:
            if not stat.S_ISREG(facts.st_mode):
                raise StoreMisconfiguredError(
                    f"{name}: a link or folder stands where a cache file belongs.",
                    cure="Remove it by hand: it isn't ours.",
                )
            more -= charge_of(facts.st_size)
        temp = f".{name}.tmp"
        bucket = bucket_of(name)
        table.begin(bucket)
        try:
            try:
                file = self._create(temp)
                try:
                    _write_all(file, frame)
                    os.utime(file, ns=(time.time_ns(), hint_of(frame)))
                    if sync:
                        os.fsync(file)
                finally:
                    os.close(file)
                os.replace(temp, name, src_dir_fd=fd, dst_dir_fd=fd)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temp, dir_fd=fd)
                raise
            if more:
                table.charge(self._number, more)
        finally:
            table.end(bucket)

    def _create(self, temp: str) -> int:
        try:
            file = os.open(temp, _CREATE, 0o600, dir_fd=self._fd)
        except FileExistsError:  # a dead writer's; any other stays where it is
            if not stat.S_ISREG(os.stat(temp, dir_fd=self._fd, follow_symlinks=False).st_mode):
                raise
            os.unlink(temp, dir_fd=self._fd)
            file = os.open(temp, _CREATE, 0o600, dir_fd=self._fd)
        os.fchmod(file, 0o600)  # whatever the umask took
        return file

    def drop(self, name: str) -> None:
        """Remove the file, if it is there. Counts as a change even if it is not."""
        facts = self._facts(name)
        mine = facts is not None and stat.S_ISREG(facts.st_mode)
        self._remove(name, None if facts is None or not mine else charge_of(facts.st_size))

    def drop_seen(self, name: str, charge: int) -> None:
        """Remove a file that was seen under this lock."""
        self._remove(name, charge)

    def drop_unused(self, name: str, used: int) -> bool:
        """Remove the file unless it has been used since *used*; whether it was removed."""
        facts = self._facts(name)
        if facts is None or facts.st_atime_ns != used or not stat.S_ISREG(facts.st_mode):
            return False
        self._remove(name, charge_of(facts.st_size))
        return True

    def _remove(self, name: str, charge: int | None) -> None:
        bucket = bucket_of(name)
        self._table.begin(bucket)
        try:
            if charge is not None:
                with suppress(FileNotFoundError):  # somebody's rm was quicker
                    os.unlink(name, dir_fd=self._fd)
                self._table.charge(self._number, -charge)
        finally:
            self._table.end(bucket)

    def _facts(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def look(self) -> Iterator[Seen]:
        """See ``look``."""
        return look(self._fd)

    def tidy(self) -> int:
        """Remove what has expired and what dead writers left, and count again; answer how many had expired."""
        now = self._clock()
        for name in os.listdir(self._fd):
            if _TEMP_NAME.fullmatch(name) and (facts := self._facts(name)) is not None and stat.S_ISREG(facts.st_mode):
                os.unlink(name, dir_fd=self._fd)
        total, over = 0, []
        for seen in self.look():
            if seen.until <= now and self._is_over(seen, now):
                over.append((seen.name, seen.charge))
            else:
                total += seen.charge
        for name, charge in over:
            self.drop_seen(name, charge)
        self._table.set_usage(self._number, total)
        self._table.mend(self._number)
        return len(over)

    def _is_over(self, seen: Seen, now: float) -> bool:
        data = self.front(seen.name, HEAD_SIZE)
        if data is None:
            return False
        try:
            return now >= unpack_head(data).keep_until
        except FrameError as error:
            return error.reason != "newer" and now >= seen.until + _DAMAGED_FOR


def _never() -> float:
    return float("-inf")


def is_live_entry(seen: Seen, path: str, now: float) -> bool:
    """Whether the file is an entry that has not expired; opened only where its folder doesn't tell."""
    if seen.until <= now or seen.kind not in (Kind.ENTRY, Kind.PLACEHOLDER):
        data = read_frame(f"{path}/{seen.name}", lambda: now, size=HEAD_SIZE)
        head = peek(data) if data is not None else None
        return head is not None and head.kind == Kind.ENTRY
    return seen.kind == Kind.ENTRY


def _write_all(file: int, data: bytes) -> None:
    done = os.write(file, data)
    while done < len(data):
        done += os.write(file, memoryview(data)[done:])


def write_new(path: str, data: bytes) -> None:
    file = os.open(path, _CREATE, 0o600)
    try:
        os.fchmod(file, 0o600)
        _write_all(file, data)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(file)
