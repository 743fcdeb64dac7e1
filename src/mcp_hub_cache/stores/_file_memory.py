"""Reads that wait for nothing but memory, which the event loop may therefore do itself.

Strategy: to wake a thread, and be woken by it, takes a lone read several times as long as the read. Linux opens a file
only if all of its path is in memory, when it is asked to (openat2 with RESOLVE_CACHED, since 5.12), and reads only what
is in memory (preadv2 with RWF_NOWAIT). A tmpfs doesn't know the latter, being memory itself: what of it was swapped out
has to be waited for as the interpreter's own pages have. Where all that can't be had, or anything is not as it mostly
is, the answer is "not here", and a thread goes the way that may wait.

Rules:
- Nothing here may wait for a disk: no look at a name that may be unknown, no lock, no write but to a tmpfs.
- What other systems, file systems (network, FUSE) and sandboxes lack is asked for once, and not missed.
"""

# ruff: noqa: PTH116, PTH123

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any, Final

_OPENAT2: Final = 437  # on every architecture but alpha
_AT_FDCWD: Final = -100
_RESOLVE_CACHED: Final = 0x20
_FLAGS: Final = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOATIME", 0)
_NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)  # 0: unknown here
_MOST: Final = 64 * 1024
_NEVER: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.E2BIG, errno.EPERM, errno.EOPNOTSUPP})


class NotHereError(Exception):
    """It could not be told without waiting."""


class Memory:
    """Files of one file system, as far as they are in memory.

    Args:
        path: A file that is there.

    Attributes:
        holds_all: It is a tmpfs: what changes there waits for nothing either.
    """

    def __init__(self, path: str) -> None:
        self.holds_all = _is_tmpfs(path)
        self._open = _opener() if self.holds_all or _NOWAIT else None
        self._buffer = bytearray(_MOST)
        self._view = memoryview(self._buffer)
        # Tried now, by a thread that may wait: what a file system doesn't know (NFS, FUSE) is not asked for again.
        with suppress(NotHereError, OSError):
            file = self.open(path)
            try:
                self.read(file)
            finally:
                os.close(file)

    @property
    def serves(self) -> bool:
        """Whether there is any use in asking."""
        return self._open is not None

    def open(self, path: str) -> int:
        """Open *path* for reading.

        Raises:
            FileNotFoundError: It is not there.
            NotHereError: It can't be opened, or not without waiting.
        """
        if self._open is None:
            raise NotHereError
        file = self._open(path)
        if file >= 0:
            return file
        if -file == errno.ENOENT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if -file in _NEVER:
            self._open = None
        raise NotHereError

    def read(self, file: int) -> bytes:
        """All of an open *file* that is not large.

        Raises:
            NotHereError: It is large, or not all in memory.
        """
        try:
            size = os.preadv(file, [self._buffer], 0, 0 if self.holds_all else _NOWAIT)
        except OSError as error:
            if error.errno in _NEVER:
                self._open = None
            raise NotHereError from None
        if size == _MOST:
            raise NotHereError
        return bytes(self._view[:size])


@cache  # the same for all of a process
def _opener() -> Callable[[str], int] | None:
    """What opens a file whose path is in memory: its number, or an error's less than 0. None: not on this system."""
    if sys.platform != "linux" or os.uname().machine == "alpha":
        return None
    try:
        import ctypes  # noqa: PLC0415  # 10 ms, and not everywhere

        library = ctypes.PyDLL(None, use_errno=True)  # it can't wait, so it need not let others have the interpreter
        syscall: Any = library.syscall
        how = (ctypes.c_uint64 * 3)(_FLAGS | os.O_CLOEXEC, 0, _RESOLVE_CACHED)
        number, here, size = ctypes.c_long(_OPENAT2), ctypes.c_int(_AT_FDCWD), ctypes.c_size_t(ctypes.sizeof(how))
        syscall.restype = ctypes.c_long
        errno_of = ctypes.get_errno
    except (ImportError, AttributeError, OSError, TypeError):
        return None

    def open_known(path: str) -> int:
        file: int = syscall(number, here, os.fsencode(path), how, size)
        return file if file >= 0 else -errno_of()

    return open_known


def _is_tmpfs(path: str) -> bool:
    try:
        return _is_tmpfs_device(os.stat(path).st_dev)
    except OSError:
        return False


@lru_cache(maxsize=64)  # folders of one device come and go
def _is_tmpfs_device(device: int) -> bool:
    try:
        wanted = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            return any(line.split()[2] == wanted and " - tmpfs " in line for line in mounts)
    except (OSError, IndexError, AttributeError):
        return False
