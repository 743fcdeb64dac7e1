"""Which key's file stands where. Pure: nothing here looks at a disk."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from .._blake import blake2b

OTHER: Final = "_other"
TAG: Final = "CACHEDIR.TAG"

_RESERVED: Final = frozenset({".", "..", TAG.lower()})
_MAX_KNOWN: Final = 1024


class Place(NamedTuple):
    """Where a key's file stands."""

    space: str
    shelf: int
    name: str


class Places:
    """The places of keys.

    Args:
        prefix: What keys begin with, before their namespace.
    """

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        self._spaced = re.compile(re.escape(prefix) + rb"([A-Za-z0-9_.-]{1,64}):")
        self._known: dict[bytes, str] = {}  # namespace folders by the front of a key

    def place(self, key: bytes) -> Place:
        """Where the file of *key* stands."""
        name = blake2b(key, digest_size=16).hexdigest()
        return Place(self.space(key), int(name[:2], 16), name)

    def space(self, key: bytes) -> str:
        """The folder of the namespace that *key* names."""
        front = key[: key.find(b":", len(self.prefix)) + 1]
        space = self._known.get(front)
        if space is None:
            named = self._spaced.match(front)
            space = OTHER if named is None else named[1].decode("ascii")
            if space.lower() in _RESERVED:
                space = OTHER
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[front] = space
        return space

    def covers(self, prefix: bytes, space: str) -> bool:
        """Whether every key in the folder of *space* starts with *prefix*."""
        return space != OTHER and (self.prefix + space.encode() + b":").startswith(prefix)
