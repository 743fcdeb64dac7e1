"""Change counters: how a near cache knows, without a call, that what it holds still stands.

Strategy: a store that hears of changes keeps a table of counters, indexed by a hash of the key. Each change moves the
counter of its key on. Who reads the counter *before* reading the key, and finds it unmoved later, knows that the key
has not changed since. Two keys may share a counter: false changes are allowed, missed ones never; and there is nothing
to keep per key.

Rules:
- A counter is even at rest. An odd one says that a change is under way: what is read meanwhile must not be kept.
- A table is trusted until a moment that its store may move on, or back: ``void`` ends, at once, the trust in everything
  that was read under it. A store that lost touch, or another that takes over, starts a new table.
- Everything here happens on the event loop; the words of a shared table may be moved by other processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

SLOTS: Final = 65_536

_generations = itertools.count(1)


class Words(Protocol):
    """Counters by number."""

    def __getitem__(self, at: int, /) -> int:
        """Return the counter *at* as it is now."""
        ...


class Changes:
    """A table of change counters.

    Attributes:
        words: The counters.
        clock: Seconds, on the clock that ``until`` and entries in a near cache are compared with. Cheap to call.
        until: When trust in the table ends, on that clock.
    """

    __slots__ = ("_generation", "clock", "until", "words")

    def __init__(self, words: Words, clock: Callable[[], float], *, until: float = math.inf) -> None:
        self._generation = next(_generations) << 64  # stamps of two tables are never equal
        self.words = words
        self.clock = clock
        self.until = until

    def stamp(self, at: int) -> int | None:
        """Return a number that is another one after a key of this counter changed; None: can't tell now."""
        word = self.words[at]
        return None if word & 1 or self.clock() >= self.until else self._generation | word

    def void(self) -> None:
        """End the trust in whatever was read under this table."""
        self.until = -math.inf

    def anew(self) -> Changes:
        """Void this table and return another over the same counters, trusted as long as this one was."""
        until = self.until
        self.void()
        return Changes(self.words, self.clock, until=until)


class Part(NamedTuple):
    """The state of a counter, from before its key was read."""

    changes: Changes
    at: int
    word: int

    def holds(self) -> bool:
        """Whether the counter has not moved, and is trusted."""
        changes = self.changes
        return changes.words[self.at] == self.word and changes.clock() < changes.until


class Joint:
    """Several counters that look like a table with one, for what stands on more keys than its own.

    Attributes:
        words: Itself: every word is 0 as long as no counter has moved, and 1 from then on.
        clock: As in ``Changes``, of which all parts must have the same.
    """

    __slots__ = ("_parts", "clock", "words")

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self.clock = parts[0].changes.clock
        self.words = self

    def __getitem__(self, at: int) -> int:
        """Return the state of all parts, whatever *at* is."""
        for changes, place, word in self._parts:
            if changes.words[place] != word:
                return 1
        return 0

    @property
    def until(self) -> float:
        """When trust in the first of the tables ends."""
        return min([part.changes.until for part in self._parts])


class Slot(NamedTuple):
    """Where the changes of a key are counted."""

    changes: Changes
    at: int

    def part(self) -> Part | None:
        """The state of the counter now; None: a change is under way."""
        word = self.changes.words[self.at]
        return None if word & 1 else Part(self.changes, self.at, word)

    def stamp(self) -> int | None:
        """See ``Changes.stamp``."""
        return self.changes.stamp(self.at)
