"""What a primary has still to be told: deletes that failed, that are in doubt, or that were made while it was away.

A bounded set of keys, oldest first, and of prefixes. A ``set`` that failed is in it as a delete too: what matters is
that the old value is never seen again. Beside them, keys to be checked: what was set on a server whose place another
has taken is there still, or something older is, which must go.

Rules:
- What is in here reads as a miss from the primary, until it has been replayed. So does what is to be checked, if it
  does not pass.
- Each note carries a serial number. A replay forgets what it has seen to under the number that it saw, so that a key
  noted again while its delete was on the way stays.
- More keys than fit become one note: "clear everything". That is always right, and only costs misses.
- All synchronous, in memory. What is noted here is written down in the standby as well (``_failover_pages``), which
  goes by the serial numbers. Checks are not: what they go by is known to this process alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count, islice, takewhile
from typing import Final, NamedTuple

from .._frame import TOKEN, peek

_MAX_PREFIXES: Final = 256
_DOUBT: Final = 5.0  # seconds by which a load may have begun earlier than its entry says


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


def is_older(there: bytes | None, head: bytes | None) -> bool:
    """Whether the frame that begins with *there* may be from before the one that was written with *head*.

    A load that had begun before is, though it ended later: its fence went with the former server. Where that can't be
    told, by the clocks of two servers, it counts as older.
    """
    # A new head over the same payload has the token still.
    if there is None or head is None or there[TOKEN] == head[TOKEN]:
        return False
    one, other = peek(there), peek(head)
    if one is None or other is None:
        return True
    began = one.created - one.cost - _DOUBT if one.cost else one.created
    return began <= other.created


@dataclass(frozen=True, slots=True)
class Doubts:
    """What a journal has noted of some keys.

    Attributes:
        covered: Those that must go.
        heads: Those that are to be checked, with the heads of what may stay.
    """

    covered: frozenset[bytes] = frozenset()
    heads: Mapping[bytes, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.covered or self.heads)

    def __or__(self, later: Doubts) -> Doubts:
        return Doubts(self.covered | later.covered, {**self.heads, **later.heads})

    def concern(self, key: bytes, frame: bytes | None) -> bool:
        """Whether *frame*, which the primary has under *key*, must not be believed."""
        return key in self.covered or is_older(frame, self.heads.get(key))


_NO_DOUBTS: Final = Doubts()


class Journal:
    """Deletes and clears that a primary has still to see.

    Args:
        prefix: What every key starts with; cleared as a whole when there are too many to remember.
        max_keys: How many keys to remember one by one.

    Attributes:
        last: The highest serial number given so far.
    """

    __slots__ = ("_checks", "_keys", "_max_keys", "_prefix", "_prefixes", "_roots", "_serial", "last")

    def __init__(self, prefix: bytes, max_keys: int) -> None:
        if max_keys < 1:
            raise ValueError(f"max_journal must be at least 1, not {max_keys!r}")
        self._prefix = prefix
        self._max_keys = max_keys
        self._keys: dict[bytes, int] = {}
        self._checks: dict[bytes, bytes] = {}  # the head of what may stay
        self._prefixes: dict[bytes, int] = {}
        self._roots: tuple[bytes, ...] = ()
        self._serial = count(1).__next__
        self.last = 0

    def __len__(self) -> int:
        return len(self._keys) + len(self._prefixes) + len(self._checks)

    def add(self, keys: Iterable[bytes]) -> None:
        """Note that each of *keys* must go."""
        for key in keys:
            self._checks.pop(key, None)
            self._keys.pop(key, None)  # to the end: the oldest are replayed first
            self._keys[key] = self.last = self._serial()
        if len(self._keys) > self._max_keys:
            self.add_prefix(self._prefix)

    def add_prefix(self, prefix: bytes) -> None:
        """Note that everything under *prefix* must go."""
        self._keys = {key: serial for key, serial in self._keys.items() if not key.startswith(prefix)}
        self._checks = {key: head for key, head in self._checks.items() if not key.startswith(prefix)}
        self._prefixes = {root: serial for root, serial in self._prefixes.items() if not root.startswith(prefix)}
        self._prefixes[prefix] = self.last = self._serial()
        self._roots = tuple(self._prefixes)
        if len(self._roots) > _MAX_PREFIXES and prefix != self._prefix:
            self.add_prefix(self._prefix)

    def check(self, heads: Mapping[bytes, bytes]) -> None:
        """Note that each key of *heads* must go, if what stands there is older than what has that head."""
        self._checks |= {key: head for key, head in heads.items() if not self.covers(key)}
        for key in list(islice(self._checks, max(len(self._checks) - self._max_keys, 0))):
            del self._checks[key]

    def covers(self, key: bytes) -> bool:
        """Whether what the primary has under *key* must not be trusted."""
        return key in self._keys or key.startswith(self._roots)

    def doubts(self, keys: Collection[bytes]) -> Doubts:
        """Return what is noted of *keys*."""
        if not len(self):
            return _NO_DOUBTS
        covered = frozenset(key for key in keys if self.covers(key))
        return Doubts(covered, {key: self._checks[key] for key in keys if key in self._checks})

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

    def unchecked(self, number: int, among: Callable[[bytes], bool]) -> dict[bytes, bytes]:
        """Return up to *number* keys to be checked of which *among* is true, with the heads of what may stay."""
        return dict(islice((item for item in self._checks.items() if among(item[0])), number))

    def checked(self, heads: Mapping[bytes, bytes]) -> None:
        """Strike out the keys that have been checked by these *heads*."""
        for key, head in heads.items():
            if self._checks.get(key) == head:
                del self._checks[key]

    def deleted(self, keys: Iterable[bytes]) -> None:
        """Whatever stood under *keys* is gone: there is nothing left to check."""
        if self._checks:
            for key in keys:
                self._checks.pop(key, None)

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
    """What a primary has confirmed lately: another that takes its place may lack it, and still have what was before.

    Args:
        seconds: For how long it is remembered.
        max_keys: How many keys, those changed last; up to twice as many are held. As many prefixes as a journal holds.
        clock: Seconds.
    """

    __slots__ = ("_clock", "_keys", "_max_keys", "_prefixes", "_seconds")

    def __init__(self, seconds: float, max_keys: int, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._max_keys = max_keys
        self._clock = clock
        # By name, in the order of the last change: when that was, and the head of what stands there since.
        self._keys: dict[bytes, tuple[float, bytes | None]] = {}
        self._prefixes: dict[bytes, float] = {}

    def set(self, heads: Mapping[bytes, bytes]) -> None:
        """What has that head was set under each key of *heads*."""
        self._add(heads.items())

    def deleted(self, keys: Iterable[bytes]) -> None:
        """Each of *keys* was deleted."""
        self._add((key, None) for key in keys)

    def cleared(self, prefix: bytes) -> None:
        """Everything under *prefix* was deleted."""
        self._prefixes.pop(prefix, None)
        self._prefixes[prefix] = self._clock()
        if len(self._prefixes) > _MAX_PREFIXES:
            del self._prefixes[next(iter(self._prefixes))]

    def _add(self, changes: Iterable[tuple[bytes, bytes | None]]) -> None:
        now, keys = self._clock(), self._keys
        for key, head in changes:
            keys.pop(key, None)  # to the end
            keys[key] = now, head
        if len(keys) > 2 * self._max_keys:  # many at once: one at a time would cost each set as much as all the rest
            self._keys = self._last()

    def _last(self) -> dict[bytes, tuple[float, bytes | None]]:
        return dict(islice(self._keys.items(), max(len(self._keys) - self._max_keys, 0), None))

    def take(self) -> tuple[list[bytes], dict[bytes, bytes], list[bytes]]:
        """Return what was deleted, what was set, and the prefixes that were cleared; and forget it."""
        since = self._clock() - self._seconds
        recent = {key: head for key, (at, head) in self._last().items() if at >= since}
        deleted = [key for key, head in recent.items() if head is None]
        heads = {key: head for key, head in recent.items() if head is not None}
        prefixes = [prefix for prefix, at in self._prefixes.items() if at >= since]
        self._keys.clear()
        self._prefixes.clear()
        return deleted, heads, prefixes
