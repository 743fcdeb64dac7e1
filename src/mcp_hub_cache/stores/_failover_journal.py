"""What a primary has still to be told: deletes that failed, that are in doubt, or that were made while it was away.

A bounded set of keys, oldest first, and of prefixes. A ``set`` that failed is in it as a delete too: what matters is
that the old value is never seen again.

Rules:
- What is in here reads as a miss from the primary, until it has been replayed.
- Each note carries a serial number. A replay forgets what it has seen to under the number that it saw, so that a key
  noted again while its delete was on the way stays.
- More keys than fit become one note: "clear everything". That is always right, and only costs misses.
- All synchronous, in memory. What is noted here is written down in the standby as well (``_failover_pages``), which
  goes by the serial numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import count, islice, takewhile
from typing import Final, NamedTuple

_NOTHING: Final[frozenset[bytes]] = frozenset()
_MAX_PREFIXES: Final = 256


class Note(NamedTuple):
    """One note.

    Attributes:
        serial: Its number; later notes have higher ones.
        name: A key, or what keys begin with.
        is_prefix: Which of the two.
    """

    serial: int
    name: bytes
    is_prefix: bool


class Journal:
    """Deletes and clears that a primary has still to see.

    Args:
        prefix: What every key starts with; cleared as a whole when there are too many to remember.
        max_keys: How many keys to remember one by one.

    Attributes:
        last: The highest serial number given so far.
    """

    __slots__ = ("_keys", "_max_keys", "_prefix", "_prefixes", "_roots", "_serial", "last")

    def __init__(self, prefix: bytes, max_keys: int) -> None:
        if max_keys < 1:
            raise ValueError(f"max_journal must be at least 1, not {max_keys!r}")
        self._prefix = prefix
        self._max_keys = max_keys
        self._keys: dict[bytes, int] = {}
        self._prefixes: dict[bytes, int] = {}
        self._roots: tuple[bytes, ...] = ()
        self._serial = count(1).__next__
        self.last = 0

    def __len__(self) -> int:
        return len(self._keys) + len(self._prefixes)

    def add(self, keys: Iterable[bytes]) -> None:
        """Note that each of *keys* must go."""
        for key in keys:
            self._keys.pop(key, None)  # to the end: the oldest are replayed first
            self._keys[key] = self.last = self._serial()
        if len(self._keys) > self._max_keys:
            self.add_prefix(self._prefix)

    def add_prefix(self, prefix: bytes) -> None:
        """Note that everything under *prefix* must go."""
        self._keys = {key: serial for key, serial in self._keys.items() if not key.startswith(prefix)}
        self._prefixes = {root: serial for root, serial in self._prefixes.items() if not root.startswith(prefix)}
        self._prefixes[prefix] = self.last = self._serial()
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

    def after(self, serial: int) -> list[Note]:
        """Return the notes that were made after the one of that number, and still stand; in their order."""
        keys = takewhile(lambda item: item[1] > serial, reversed(self._keys.items()))
        notes = [Note(number, key, is_prefix=False) for key, number in keys]
        notes += [Note(number, prefix, is_prefix=True) for prefix, number in self._prefixes.items() if number > serial]
        return sorted(notes)

    def stands(self, note: Note) -> bool:
        """Whether *note* has still to be seen to."""
        return (self._prefixes if note.is_prefix else self._keys).get(note.name) == note.serial

    # Replaying

    def oldest(self, number: int, among: Callable[[bytes], bool]) -> dict[bytes, int]:
        """Return up to *number* keys of which *among* is true, with their serials."""
        return dict(islice((item for item in self._keys.items() if among(item[0])), number))

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


class Recent:
    """The deletes and clears that a primary has confirmed lately: another that takes its place may not have them.

    Args:
        seconds: For how long they are remembered.
        max_keys: How many at most; the oldest are forgotten first.
        clock: Seconds.
    """

    __slots__ = ("_clock", "_made", "_max_keys", "_seconds", "_size")

    def __init__(self, seconds: float, max_keys: int, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._max_keys = max_keys
        self._clock = clock
        self._made: deque[tuple[float, tuple[bytes, ...], bool]] = deque()
        self._size = 0

    def add(self, names: Iterable[bytes], *, are_prefixes: bool = False) -> None:
        """Remember deletes of keys, or clears of prefixes."""
        made = tuple(names)
        self._made.append((self._clock(), made, are_prefixes))
        self._size += len(made)
        self._prune()

    def _prune(self) -> None:
        since = self._clock() - self._seconds
        while self._made and (self._size > self._max_keys or self._made[0][0] < since):
            self._size -= len(self._made.popleft()[1])

    def take(self) -> tuple[list[bytes], list[bytes]]:
        """Return the keys and the prefixes, and forget them."""
        self._prune()
        keys = [name for _, names, are_prefixes in self._made if not are_prefixes for name in names]
        prefixes = [name for _, names, are_prefixes in self._made if are_prefixes for name in names]
        self._made.clear()
        self._size = 0
        return keys, prefixes
