"""What a flight and those who wait for it tell each other: how to load, what is known so far, what it yields.

Pure, and of one event loop; what is done with it, see ``_leader`` (the work) and ``_load`` (the waiting).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ._changes import Part
from ._classes import ClassSet
from ._codec import decode, is_immutable
from ._frame import Mark
from ._protocols import Begun, Observer
from ._reads import Hit, Takes
from ._rules import Rules
from ._shortcut import Shortcut
from ._tags import tag_digest


class Plan(NamedTuple):
    """How to load: what ``Cache`` makes of its options.

    Attributes:
        name: What to call the load in errors.
        label: What to call it in logs, where no key must stand.
        rules: The policy.
        takes: What it takes besides fresh values.
        classes: What may be revived.
        refresh: Load even if there is something fresh.
        owner: 16 bytes that mark the entry as belonging to a function.
        observers: Who hears of it.
        shortcut: Where aliases of what is found may stand.
    """

    name: str
    label: str
    rules: Rules
    takes: Takes
    classes: ClassSet
    refresh: bool
    owner: bytes | None
    observers: tuple[Observer, ...]
    shortcut: Shortcut | None = None


class Trip:
    """What a flight and those who wait for it have to tell each other.

    Attributes:
        spare: The stale hit that may stand in for what the flight yields.
        seen: The token of what was found; the flight is to replace that very entry.
        ahead: There is something fresh: who asks for it need not wait.
        behind: Nobody waits for it: it goes on in the background from the start.
        doubtful: Something was invalidated meanwhile that may concern it: who came after that loads again.
        tags: The entry's, as far as they are known before the load.
        digests: Of these.
        begun: What was found at the beginning; None: not begun yet, or not to be had.
        part: The counter of the key, from before what must stand was last known to.
        marks: Of the tags, since they were taken.
        look: Set while somebody looks whether ``begun`` still stands.
    """

    __slots__ = (
        "ahead", "begun", "behind", "digests", "doubtful", "look", "marks", "part", "seen", "spare", "tags"
    )  # fmt: skip

    def __init__(
        self,
        tags: tuple[str, ...] = (),
        *,
        spare: Hit | None = None,
        seen: bytes | None = None,
        ahead: bool = False,
        behind: bool = False,
    ) -> None:
        self.spare = spare
        self.seen = seen
        self.ahead = ahead
        self.behind = behind
        self.doubtful = False
        self.tags = tags
        self.digests = tuple(map(tag_digest, tags)) if tags else ()
        self.begun: Begun | None = None
        self.part: Part | None = None
        self.marks: tuple[Mark, ...] = ()
        self.look: Any = None

    @property
    def must_stand(self) -> bytes | None:
        """The token that must stand for who comes now: of the beginning; before that, of what may stand in."""
        if self.begun is not None:
            return self.begun.fence.token
        return None if self.spare is None else self.seen

    def is_unmoved(self) -> bool:
        """Whether nothing has happened to the key since it was last known to stand, as far as that is told."""
        return self.must_stand is None or (self.part is not None and self.part.holds())

    def surely_stands(self) -> bool:
        """Whether nobody need be asked for who comes now to join the load."""
        return not self.hangs_on() and self.is_unmoved()

    def hangs_on(self) -> tuple[Mark, ...]:
        """The marks that must stand for who comes now: of the load, and of what may stand in for it."""
        return self.marks if self.spare is None or self.spare.stale is None else (*self.marks, *self.spare.stale.marks)

    def is_of(self, digests: frozenset[bytes]) -> bool:
        """Whether its entry, or what may stand in for it, has one of these tags, as far as that is known."""
        return not digests.isdisjoint((*self.digests, *(digest for digest, _ in self.hangs_on())))


class Landed(NamedTuple):
    """What a flight yields.

    Attributes:
        value: The value.
        codec: Of the payload.
        payload: None: it can't be encoded, so all waiters share the one object.
        classes: What may be revived.
        cost: Seconds the load took.
    """

    value: Any
    codec: int
    payload: bytes | memoryview | None
    classes: ClassSet
    cost: float

    def copy(self) -> Any:
        """Return the value, for one more reader."""
        if self.payload is None or is_immutable(self.value):
            return self.value
        return decode(self.codec, self.payload, self.classes)


class NothingToDoError(Exception):
    """The flight came to nothing: what is stale rests, or is refreshed by somebody else."""
