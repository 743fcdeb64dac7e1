"""Entries of the near cache: what must be asked of one before it is served.

Strategy: an entry holds all that must be asked before it may be served, so that a hit calls nothing: the counter of its
key, which must not have moved since *before* the entry was read (``_changes``), the end of its freshness, and the end
of the trust in the table of counters.

Rules:
- An entry never hands out an object that somebody else has, unless it can't be changed: a mutable value is decoded
  anew for each reader. ``shared`` alone is for readers who have promised not to write.
- Whoever takes an entry looks it up and reads it without awaiting in between: one that was dropped is no longer found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ._changes import Changes, Joint, Part
from ._classes import ClassSet
from ._codec import FAILURE, RICH, DecodeError, decode, is_immutable
from ._failures import Failures
from ._frame import HEAD_SIZE, Frame, Head
from ._l1 import NOT_SHARED, Node


class Near(Node):
    """What was read under a key, and the state of its counter from before that.

    Attributes:
        changes: The table in which the key's changes are counted.
        at: Where in it.
        word: The counter, taken before the read.
        until: When the entry stops being served without a thought, on the table's clock: at the end of its freshness,
            or before that, where it is to be refreshed ahead.
        fresh_until: The end of its freshness, on that clock.
        head: The frame's.
        value: The value itself where it can't be changed, else ``NOT_SHARED``.
        shared: One object for all who promised not to write, else ``NOT_SHARED``.
    """

    __slots__ = (
        "_payload", "_shared_for", "at", "changes", "cost", "fresh_until", "head", "shared", "until", "value", "word"
    )  # fmt: skip

    changes: Changes | Joint
    head: Head

    def __init__(self, key: bytes, changes: Changes, at: int, word: int) -> None:
        super().__init__(key)
        self.changes = changes
        self.at = at
        self.word = word
        self.until = self.fresh_until = -math.inf
        self.cost = 0.0
        self.value: Any = NOT_SHARED
        self.shared: Any = NOT_SHARED
        self._payload: bytes | memoryview | None = None
        self._shared_for: ClassSet | None = None

    def fill(self, frame: Frame, value: Any, seconds_fresh: float) -> None:
        """Take in what was read: *frame*, which decodes to *value* and is fresh for so long."""
        self.head = frame.head
        self.cost = frame.head.cost
        self.until = self.fresh_until = self.changes.clock() + seconds_fresh
        self.size = HEAD_SIZE + len(self.key) + len(frame.payload)
        if is_immutable(value):
            self.value = self.shared = value
        else:
            self._payload = frame.payload

    def hang_on(self, parts: Sequence[Part]) -> None:
        """Hold no longer than *parts* do: the marks of the entry's tags."""
        if parts:
            assert isinstance(self.changes, Changes)
            self.changes, self.at, self.word = Joint([Part(self.changes, self.at, self.word), *parts]), 0, 0

    def hasten(self, ahead: float) -> None:
        """Let the entry be due for a refresh *ahead* seconds before it stops being fresh; the first draw stands."""
        if not self.is_hastened():
            self.until = self.fresh_until - ahead

    def is_hastened(self) -> bool:
        """Whether that was drawn."""
        return self.until != self.fresh_until

    def is_fresh(self) -> bool:
        """Whether it may be served now, be it due for a refresh or not."""
        changes = self.changes
        now = changes.clock()
        return changes.words[self.at] == self.word and now < self.fresh_until and now < changes.until

    def is_due(self) -> bool:
        """Whether it is to be refreshed ahead."""
        return self.changes.clock() >= self.until

    def holds(self) -> bool:
        """Whether it may be served now."""
        # ``_shortcut`` and ``Cache.get`` spell the same out, to save the call.
        changes = self.changes
        return changes.words[self.at] == self.word and (now := changes.clock()) < self.until and now < changes.until

    def is_over(self) -> bool:
        """Whether it is of no use any more: what is merely not trusted may hold again, or stand in as stale."""
        changes = self.changes
        return changes.words[self.at] != self.word or changes.clock() >= self.fresh_until

    def read(self, classes: ClassSet) -> Any:
        """The value, for one reader; ``NOT_SHARED``: it was stored for other classes."""
        if self._payload is None:
            return self.value
        try:
            return decode(self.head.codec, self._payload, classes)
        except DecodeError:
            return NOT_SHARED  # let the full path say so

    def untrusted(self, classes: ClassSet) -> Any:
        """The value for one reader who takes it as stale; ``NOT_SHARED``: it has changed, or as in ``read``."""
        return NOT_SHARED if self.is_over() or self.head.codec == FAILURE else self.read(classes)

    def frame(self) -> Frame:
        """What it was made of, but for its marks, and for the payload of what can't be changed."""
        return Frame(self.head, (), b"" if self._payload is None else self._payload)

    def fail(self, failures: Failures, classes: ClassSet) -> Any:
        """The exception that was cached, for one caller; ``NOT_SHARED``: as in ``read``."""
        assert self._payload is not None
        try:
            return failures.decode(self._payload, classes)
        except DecodeError:
            return NOT_SHARED

    def share(self, classes: ClassSet) -> Any:
        """The one object for all who promised not to write; ``NOT_SHARED``: as in ``read``."""
        if self.shared is NOT_SHARED:
            self.shared = self.read(classes)
            self._shared_for = classes if self.head.codec == RICH else None  # of the rest, classes are no part
        return self.shared if self._shared_for is None or self._shared_for == classes else self.read(classes)
