"""What a primary has still to be told: deletes that failed, that are in doubt, or that were made while it was away.

A bounded set of keys, oldest first, and of prefixes. A ``set`` that failed is in it as a delete too: what matters is
that the old value is never seen again.

Rules:
- What is in here reads as a miss from the primary, until it has been replayed.
- Each note carries a serial number. A replay forgets what it has seen to under the number that it saw, so that a key
  noted again while its delete was on the way stays.
- More keys than fit become one note: "clear everything". That is always right, and only costs misses.
- All synchronous, in memory. The issue on faults keeps it in the standby as well (``Kind.JOURNAL``): the methods that
  change it are the seam.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count, islice
from typing import Final

_NOTHING: Final[frozenset[bytes]] = frozenset()
_MAX_PREFIXES: Final = 256


class Journal:
    """Deletes and clears that a primary has still to see.

    Args:
        prefix: What every key starts with; cleared as a whole when there are too many to remember.
        max_keys: How many keys to remember one by one.
    """

    __slots__ = ("_keys", "_max_keys", "_prefix", "_prefixes", "_roots", "_serial")

    def __init__(self, prefix: bytes, max_keys: int) -> None:
        if max_keys < 1:
            raise ValueError(f"max_journal must be at least 1, not {max_keys!r}")
        self._prefix = prefix
        self._max_keys = max_keys
        self._keys: dict[bytes, int] = {}
        self._prefixes: dict[bytes, int] = {}
        self._roots: tuple[bytes, ...] = ()
        self._serial = count(1).__next__

    def __len__(self) -> int:
        return len(self._keys) + len(self._prefixes)

    def add(self, keys: Iterable[bytes]) -> None:
        """Note that each of *keys* must go."""
        for key in keys:
            self._keys.pop(key, None)  # to the end: the oldest are replayed first
            self._keys[key] = self._serial()
        if len(self._keys) > self._max_keys:
            self.add_prefix(self._prefix)

    def add_prefix(self, prefix: bytes) -> None:
        """Note that everything under *prefix* must go."""
        self._keys = {key: serial for key, serial in self._keys.items() if not key.startswith(prefix)}
        self._prefixes = {root: serial for root, serial in self._prefixes.items() if not root.startswith(prefix)}
        self._prefixes[prefix] = self._serial()
        self._roots = tuple(self._prefixes)
        if len(self._roots) > _MAX_PREFIXES and prefix != self._prefix:
            self.add_prefix(self._prefix)

    def covers(self, key: bytes) -> bool:
        """Whether what the primary has under *key* must not be trusted."""
        return key in self._keys or key.startswith(self._roots)

    def among(self, keys: Iterable[bytes]) -> frozenset[bytes]:
        """Return those of *keys* that are covered."""
        if not self._keys and not self._roots:
            return _NOTHING
        return frozenset(key for key in keys if self.covers(key))

    # Replaying

    def oldest(self, number: int) -> dict[bytes, int]:
        """Return up to *number* keys with their serials."""
        return dict(islice(self._keys.items(), number))

    def serials(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Return those of *keys* that are noted one by one, with their serials."""
        return {key: self._keys[key] for key in keys if key in self._keys}

    def prefixes(self) -> dict[bytes, int]:
        """Return the prefixes with their serials."""
        return dict(self._prefixes)

    def forget(self, serials: Mapping[bytes, int]) -> None:
        """Strike out the keys that have been deleted, unless they were noted again since."""
        for key, serial in serials.items():
            if self._keys.get(key) == serial:
                del self._keys[key]

    def forget_prefix(self, prefix: bytes, serial: int) -> None:
        """Strike out a prefix that has been cleared, unless it was noted again since."""
        if self._prefixes.get(prefix) == serial:
            del self._prefixes[prefix]
            self._roots = tuple(self._prefixes)
