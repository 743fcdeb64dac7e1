"""The table of change counters beside a namespace's files: how processes see each other's writes without asking.

Strategy: one small file of fixed size per namespace, kept open by every process that uses it.

    offset  size      field
    0       8         magic
    8       4         version, native byte order (a table of the other order is foreign)
    12      4         random, tells a table from the one that it was made anew for
    16      8         f64, when the last whole sweep ended, seconds since the epoch
    2048    256 * 8   i64, bytes of disk charged to each fan-out folder
    4096    65536*4   u32, a change counter for each first two bytes of a digest

Rules:
- A word is written only by who holds the lock of the fan-out folder that its first byte names, so no increment is lost.
- A counter is odd while a file of its bucket is being changed, and moves on to the next even number afterwards. An odd
  one has no stamp. A writer that is killed half-way leaves it odd, so nobody trusts what it read meanwhile; the next
  holder of the lock sees that, tidies up and moves it on.
- A word is had by ``pread``, 0.6 µs, though a mapping would give it in 0.04: whoever truncates a mapped file (a backup
  put back in place, a disk that fails) ends every process that looks at it, by SIGBUS. Here it is a table that is gone:
  none of its words is one that anybody has seen, and the next change makes it anew.
- What was read is good for 20 µs, less than it takes a process to hear of another's change by any way but this one.
  Hits in close succession then cost half as much. What this process changes itself is seen at once.
- The file is filled with real zeros when it is made, so that a full disk is met then.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import Final

from .._changes import Changes
from ._file_memory import Memory

NAME: Final = "counters"
SHELVES: Final = 256

_MAGIC: Final = b"MHCtable"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("=8sII")
_SWEPT: Final = struct.Struct("=d")
_SWEPT_AT: Final = 16
_USAGE: Final = struct.Struct("=q")
_USAGES: Final = struct.Struct(f"={SHELVES}q")
_USAGE_AT: Final = 2048
_WORD: Final = struct.Struct("=I")
_WORDS_AT: Final = 4096
_unpack_word: Final = _WORD.unpack  # on the way of every hit, as this and the next
_pread: Final = os.pread
_PER_SHELF: Final = 256
_GOOD_FOR: Final = 20e-6  # seconds
_SIZE: Final = _WORDS_AT + SHELVES * _PER_SHELF * _WORD.size
_GONE: Final = -1  # in place of a word that can't be had: odd, and no word's value
_LOW_BYTE: Final = 0 if sys.byteorder == "little" else _WORD.size - 1
_EVEN: Final = bytes(range(0, 256, 2))
_FLAGS: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class _Words:
    """The counters of an open file, which is closed when nobody refers to them any more."""

    __slots__ = ("__weakref__", "fd", "seen")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.seen: dict[int, tuple[float, int]] = {}  # counters read lately, each with the time until which it is good
        # Not at exit: threads may be at work until the very end, and would write to what has the number then.
        weakref.finalize(self, os.close, fd).atexit = False

    def __getitem__(self, at: int) -> int:
        now = perf_counter()  # before the read
        seen = self.seen.get(at)
        if seen is not None and now < seen[0]:
            return seen[1]
        try:
            word: int = _unpack_word(_pread(self.fd, 4, _WORDS_AT + 4 * at))[0]
        except (OSError, struct.error):  # the latter: it ends before
            return _GONE
        if not word & 1:
            self.seen[at] = now + _GOOD_FOR, word
        return word


class Table:
    """A namespace's table, open. Goes on working when the file is deleted under it; see ``inode``.

    Attributes:
        changes: The counters, for near caches.
        inode: Device and inode. Held open here, so that a file of the same inode is the same file.
        memory: Of the file system it is on.
    """

    __slots__ = ("_fd", "_refusal", "_words", "changes", "inode", "memory")

    def __init__(
        self, path: str, fd: int, inode: tuple[int, int], refusal: OSError | None, clock: Callable[[], float]
    ) -> None:
        self.memory = Memory(path)
        self._fd = fd
        self._refusal = refusal
        self._words = _Words(fd)
        self.changes = Changes(self._words, clock)
        self.inode = inode

    def is_at(self, facts: os.stat_result) -> bool:
        """Whether a file of which these are the facts is this table, whole."""
        return self.inode == (facts.st_dev, facts.st_ino) and facts.st_size == _SIZE

    def begin(self, bucket: int) -> None:
        """Say that a file of *bucket* is about to change.

        Raises:
            FileNotFoundError: The table has been truncated.
            OSError: It can't be read or written.
        """
        offset = _WORDS_AT + bucket * _WORD.size
        (word,) = _WORD.unpack(self._read(_WORD.size, offset))
        self._write(_WORD.pack(word | 1), offset)
        self._words.seen.pop(bucket, None)

    def end(self, bucket: int) -> None:
        """Say that it has changed, or may have."""
        self._words.seen.pop(bucket, None)
        word = self._words[bucket]
        if word != _GONE:  # to write to it then would lengthen the file again
            self._write(_WORD.pack(((word | 1) + 1) & 0xFFFF_FFFF), _WORDS_AT + bucket * _WORD.size)
            self._words.seen.pop(bucket, None)

    def broken(self, shelf: int) -> bool:
        """Whether a writer died in the middle of a change in *shelf*; asked by who holds its lock."""
        words = self._read(_PER_SHELF * _WORD.size, _WORDS_AT + shelf * _PER_SHELF * _WORD.size)
        return words[_LOW_BYTE :: _WORD.size].translate(None, _EVEN) != b""

    def mend(self, shelf: int) -> None:
        """Move on every counter that a dead writer left odd."""
        for bucket in range(shelf * _PER_SHELF, (shelf + 1) * _PER_SHELF):
            if self._words[bucket] & 1:
                self.end(bucket)

    def usage(self) -> int:
        """Bytes of disk charged to the namespace."""
        return sum(self._usages())

    def charged(self) -> list[int]:
        """The shelves to which anything is charged."""
        return [shelf for shelf, total in enumerate(self._usages()) if total]

    def _usages(self) -> tuple[int, ...]:
        try:
            return _USAGES.unpack(self._read(_USAGES.size, _USAGE_AT))
        except OSError:
            return ()

    def charge(self, shelf: int, change: int) -> None:
        """Add *change* to what is charged to *shelf*."""
        (total,) = _USAGE.unpack(self._read(_USAGE.size, _USAGE_AT + shelf * _USAGE.size))
        self.set_usage(shelf, max(0, total + change))

    def set_usage(self, shelf: int, total: int) -> None:
        """Set what is charged to *shelf*, after counting."""
        self._write(_USAGE.pack(total), _USAGE_AT + shelf * _USAGE.size)

    @property
    def swept(self) -> float:
        """When a whole sweep last ended, by ``time.time``; 0: nobody knows."""
        try:
            when: float = _SWEPT.unpack(self._read(_SWEPT.size, _SWEPT_AT))[0]
        except OSError:
            return 0.0
        return when

    def set_swept(self, when: float) -> None:
        """Note the end of a whole sweep."""
        self._write(_SWEPT.pack(when), _SWEPT_AT)

    def _read(self, size: int, offset: int) -> bytes:
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise FileNotFoundError(errno.ENOENT, "the table of change counters has been truncated")
        return data

    def _write(self, data: bytes, offset: int) -> None:
        if self._refusal is not None:
            raise OSError(self._refusal.errno, self._refusal.strerror)
        os.pwrite(self._fd, data, offset)


def open_table(path: str, clock: Callable[[], float]) -> Table | None:
    """Open the table at *path*. None: there is none, or what is there is none and must be made anew.

    Args:
        path: The file.
        clock: See ``Changes``.

    Raises:
        OSError: It is there and can't be opened.
    """
    refusal: OSError | None = None
    try:
        fd = os.open(path, os.O_RDWR | _FLAGS)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        refusal = error  # what may be read only still has stamps
        fd = os.open(path, os.O_RDONLY | _FLAGS)
    try:
        facts = os.fstat(fd)
        if stat.S_ISREG(facts.st_mode) and facts.st_size == _SIZE:
            front = os.pread(fd, _HEADER.size, 0)
            if len(front) == _HEADER.size and _HEADER.unpack(front)[:2] == (_MAGIC, _VERSION):
                return Table(path, fd, (facts.st_dev, facts.st_ino), refusal, clock)
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def blank() -> bytes:
    """The bytes of a new table."""
    return _HEADER.pack(_MAGIC, _VERSION, int.from_bytes(os.urandom(4), "big")).ljust(_SIZE, b"\0")
