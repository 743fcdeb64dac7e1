"""Reading many files: three system calls each where all is as it should be.

Strategy: open, one read, close. Of what came, the head says whether it is a whole frame that has not expired; then
nobody asks the file system for type and size, and the checksums are the engine's to verify. Whatever else it is goes
the careful way (``read_frame``), which asks for everything, in its own time. (Measured: 6.5 µs a read, where the
careful way took 17.)

That an entry was used is noted at most once a second: the least recently used is known to a second, and what is read
often costs no more than its read.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from .._frame import claim
from ._file_memory import Memory, NotHereError
from ._file_shelf import QUIET, hint, read_frame

_CHUNK: Final = 64 * 1024  # to ask for more than there is costs nothing; what is larger than this can be asked twice
_NOTED_FOR: Final = 1.0


class Reads:
    """Reads of whole frames, which count as use.

    Args:
        clock: Seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._noted: set[str] = set()  # what was noted as used since ``_since``
        self._since = 0.0

    def read(self, paths: Iterable[str]) -> tuple[list[bytes | None], list[OSError]]:
        """The frames in those files, and what kept it from reading some. None and order: see ``read_frame``."""
        now = self._clock()
        noted = self._fresh()
        found: list[bytes | None] = []
        trouble: list[OSError] = []
        for path in paths:
            try:
                found.append(self._one(path, now, noted))
            except FileNotFoundError:
                found.append(None)
            except OSError:
                try:
                    found.append(read_frame(path, self._clock))
                except OSError as error:
                    trouble.append(error)
                    found.append(None)
        return found, trouble

    def note(self, paths: Iterable[str]) -> list[OSError]:
        """Note those files as used; answer what kept it from opening some that are there."""
        noted = self._fresh()
        trouble: list[OSError] = []
        for path in paths:
            if path not in noted:
                try:
                    _note(path)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EPERM):
                        trouble.append(error)
                else:
                    noted.add(path)
        return trouble

    def glance(self, path: str, memory: Memory) -> bytes | None:
        """The frame in the file at *path*, had without waiting; None as in ``read_frame``.

        Raises:
            NotHereError: It can't be had so.
        """
        noted = self._fresh()
        if path not in noted and not memory.holds_all:
            raise NotHereError  # to note its use may wait for the file system's journal
        try:
            file = memory.open(path)
        except FileNotFoundError:
            return None
        try:
            return self._whole(file, memory.read(file), path, self._clock(), noted)
        finally:
            os.close(file)

    def _fresh(self) -> set[str]:
        now = time.monotonic()
        if now - self._since >= _NOTED_FOR:
            self._since = now
            self._noted = set()
        return self._noted

    def _one(self, path: str, now: float, noted: set[str]) -> bytes | None:
        file = os.open(path, QUIET)
        try:
            return self._whole(file, os.read(file, _CHUNK), path, now, noted)
        except NotHereError:
            pass
        finally:
            os.close(file)
        return read_frame(path, self._clock)

    def _whole(self, file: int, data: bytes, path: str, now: float, noted: set[str]) -> bytes:
        """*data*, if it is a whole frame that has not expired; notes its use."""
        said = claim(data)
        if said is None or said.size != len(data) or now >= said.keep_until:
            raise NotHereError
        if path not in noted:
            with suppress(OSError):  # not ours to mark as used: a read-only folder
                os.utime(file, ns=(time.time_ns(), hint(said.keep_until, said.kind)))
            noted.add(path)
        return data


def _note(path: str) -> None:
    # By the open file, so that what takes its place meanwhile is not given its mtime.
    file = os.open(path, QUIET)
    try:
        facts = os.fstat(file)
        if stat.S_ISREG(facts.st_mode):
            with suppress(OSError):  # as above
                os.utime(file, ns=(time.time_ns(), facts.st_mtime_ns))
    finally:
        os.close(file)
