"""What ``durable=True`` adds: changes that survive a power cut, from the moment their caller hears of them.

Strategy: a file's bytes are synced before it takes its name, so that the name never leads to half of them. Its folder
is synced when all files of a call have their names: the first of those syncs commits what a journalling file system
has gathered, and the others find little left to do.

Rules:
- Nobody is told of a change before all folders that lead to it have been synced. What nobody relies on after a power
  cut (placeholders, leases, what is dropped for age or room) is not waited for.
- A delete syncs its folder even where there was nothing to delete: an eviction may have taken it a moment ago, and
  that may not have reached the disk.
"""

# Folders are named by plain strings, as in all modules of the file store.
# ruff: noqa: PTH101, PTH102, PTH120

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress

from ._file_shelf import open_folder


def make_folder(path: str, *, sync: bool) -> None:
    """Make the folder at *path*, for us alone, if it is not there; have its name survive a power cut if *sync*."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    os.chmod(path, 0o700)  # whatever the umask took
    if sync:
        sync_folder(os.path.dirname(path))


def sync_folder(path: str) -> None:
    """Have the names in the folder at *path* survive a power cut. Where it is gone there is nothing to do."""
    with suppress(FileNotFoundError):
        fd = open_folder(path)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Ground:
    """The folders of one tree, as far as they are known to be on disk. Thread-safe.

    Args:
        root: Our folder.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._firm: frozenset[tuple[str, int]] = frozenset()

    def settle(self, shelves: Collection[tuple[str, int]]) -> None:
        """Return when what was changed in *shelves*, given as (namespace, number), would survive a power cut.

        Raises:
            OSError: A folder can't be synced; what was changed is in doubt.
        """
        new = set(shelves) - self._firm
        paths = [f"{self._root}/{space}/{shelf:02x}" for space, shelf in shelves]
        if new:
            paths += [f"{self._root}/{space}" for space in sorted({space for space, _ in new})]
            paths += [self._root, os.path.dirname(self._root)]
        for path in paths:
            sync_folder(path)
        if new:  # two threads at once may lose one another's: that costs a sync, no more
            self._firm = self._firm.union(new)

    def loosen(self, space: str | None = None) -> None:
        """Forget what is known of a namespace's folders, or of all: somebody deleted them."""
        self._firm = frozenset(one for one in self._firm if space is not None and one[0] != space)
