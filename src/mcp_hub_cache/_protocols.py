"""The seams below the engine: what a store must do, what it may do besides, and what an observer hears.

Rules for stores:
- Bytes in, bytes out. Of a frame a store knows its token, its kind and its ``keep_until`` (``_frame``), nothing else.
- Batch first: every call takes many keys and answers in their order. Duplicate keys in one call are allowed and are
  applied in order.
- Every method may return any awaitable. One that has begun its work when it returns a ``Future`` costs its caller no
  task; that is what ``Line`` makes use of.
- Whole-call trouble raises ``StoreError``; trouble with one item of a write is that item's outcome. Nothing else is
  raised, and ``CancelledError`` always passes.
- ``aclose`` gives back what the running loop opened. A later call, also under another event loop, opens again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from ._exceptions import StoreError

if TYPE_CHECKING:
    from ._changes import Slot

Outcome = Literal["done", "refused"] | StoreError


class Fence(NamedTuple):
    """What a load saw when it began. Its write is refused where the stored token is another one by then.

    Attributes:
        store: ``Store.id`` of the store that issued it; any other store refuses it.
        token: The 8 bytes that stood in the frame.
    """

    store: int
    token: bytes


class Begun(NamedTuple):
    """Answer to ``begin_many`` for one key.

    Attributes:
        frame: What was there: an entry, or another holder's placeholder. None: nothing was.
        fence: To be passed to the write of this load.
        leader: True where this call planted the placeholder.
    """

    frame: bytes | None
    fence: Fence
    leader: bool


class Write(NamedTuple):
    """One frame to store.

    Attributes:
        key: Under what.
        frame: What.
        keep: Seconds until it may go; None: for ever.
        fence: What must still stand there; None: whatever does.
        by_caller: A caller's own word in spite of its fence, and not what a load has found.
    """

    key: bytes
    frame: bytes
    keep: float | None
    fence: Fence | None
    by_caller: bool = False

    @property
    def is_change(self) -> bool:
        """Whether nothing that stood under the key before may be served any more, even if this can't be carried out."""
        return self.fence is None or self.by_caller


class Patch(NamedTuple):
    """A new head (64 bytes) over the same payload, where the stored token is the fence's. ``keep`` as in ``Write``."""

    key: bytes
    fence: Fence
    head: bytes
    keep: float | None


class Held(NamedTuple):
    """A placeholder that this process planted, or a lease or mark whose token it knows."""

    key: bytes
    fence: Fence


@runtime_checkable
class Store(Protocol):
    """Bytes by key, with compare-and-write. See the module's rules; ``testing.StoreConformance`` checks them."""

    @property
    def name(self) -> str:
        """What it is, in a word: redis, file, memory."""
        ...

    @property
    def id(self) -> int:
        """Unique among the stores of this process; what ``Fence.store`` says."""
        ...

    def now(self) -> float:
        """Seconds since the epoch on the clock that this store's entries expire by. Never blocks."""
        ...

    def lane(self, key: bytes, /) -> Hashable:
        """Which requests may share a batch, and fail together: those with equal lanes."""
        ...

    def get_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """The frames, None where there is none or it has outlived its ``keep``."""
        ...

    def head_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """The first 64 bytes of each frame, None as in ``get_many``."""
        ...

    def begin_many(self, keys: Sequence[bytes], /, *, hold: float) -> Awaitable[list[Begun]]:
        """Atomically per key: what is there, or else a new placeholder planted for *hold* seconds; inf: for ever."""
        ...

    def write_many(self, writes: Sequence[Write], /) -> Awaitable[list[Outcome]]:
        """Store frames. With a fence: only where the stored token is the fence's, atomically; else "refused"."""
        ...

    def patch_many(self, patches: Sequence[Patch], /) -> Awaitable[list[Outcome]]:
        """Replace heads where the token matches, atomically; else "refused"."""
        ...

    def delete_many(self, keys: Sequence[bytes], /) -> Awaitable[list[bytes | None]]:
        """Remove; answer the heads of what was there and had not outlived its ``keep``."""
        ...

    def scan(self, prefix: bytes, /) -> AsyncGenerator[list[tuple[bytes, bytes]], None]:
        """Pages of (key, head) of all whose key starts with *prefix*. What is there throughout comes at least once."""
        ...

    def clear(self, prefix: bytes, /) -> Awaitable[int]:
        """Remove what starts with *prefix*, placeholders too; answer how many entries (``Kind.ENTRY``)."""
        ...

    def ping(self, lane: Hashable = None, /) -> Awaitable[None]:
        """Return if what serves the keys of *lane* answers now, raise ``StoreError`` if not. None: the whole store."""
        ...

    def info(self) -> Awaitable[Mapping[str, str | int | float]]:
        """Facts for ``status()``; a fact that can't be had is left out."""
        ...

    def aclose(self) -> Awaitable[None]:
        """Give back everything the running loop opened; ends every task it started."""
        ...


@runtime_checkable
class Coherent(Protocol):
    """A store that can say whether a key may have changed since a stamp was taken."""

    def slot(self, key: bytes, /) -> Slot | None:
        """Where the changes of *key* are counted (``_changes``); None: can't tell now."""
        ...

    def stamp(self, key: bytes, /) -> int | None:
        """The stamp of that slot: another one after *key* changed. None: can't tell now."""
        ...

    def changed(self, key: bytes, stamp: int, /) -> Awaitable[None]:
        """Return when the stamp is another than *stamp*; may wake falsely."""
        ...

    def distrust(self) -> None:
        """Void every stamp given so far."""
        ...


@runtime_checkable
class Immediate(Protocol):
    """A store whose calls are over when they return, with a future that is done: batching would gain nothing.

    Said by the class itself; it does not hold for classes derived from it unless they say so, too.
    """

    immediate: ClassVar[Literal[True]]

    def get(self, key: bytes, /) -> bytes | None:
        """``get_many`` of one key: no list and no awaitable around it, on the way of every miss. So for the others."""
        ...

    def begin(self, key: bytes, hold: float, /) -> Begun:
        """``begin_many`` of one key."""
        ...

    def write(self, write: Write, /) -> Outcome:
        """``write_many`` of one write."""
        ...


@runtime_checkable
class Leases(Protocol):
    """A store whose placeholders, leases and marks can be prolonged and given back."""

    def renew_many(self, held: Sequence[Held], /, *, hold: float) -> Awaitable[list[bool]]:
        """Keep each for at least *hold* seconds from now where its token still stands; False where it does not.

        Nothing is ever shortened: what was to stay longer does. ``math.inf``: for ever.
        """
        ...

    def release_many(self, held: Sequence[Held], /) -> Awaitable[None]:
        """Remove each where its token still stands."""
        ...


@runtime_checkable
class Used(Protocol):
    """A store that can be told of uses it doesn't see, as where a near cache answers in its place."""

    def used_many(self, keys: Sequence[bytes], /) -> Awaitable[None]:
        """Count each as used now, for what drops the least recently used; unknown keys are ignored.

        Changes nothing else: stamps don't move.
        """
        ...


OnMisconfigured = Literal["serve", "raise"]
"""What calls get while a person has to put the store's configuration right: a cache of nothing, or the error."""


State = Literal["healthy", "degraded", "misconfigured", "unhealthy"]


class StoreState(NamedTuple):
    """How a store is, without asking it.

    Attributes:
        state: healthy, degraded (a standby serves), misconfigured, unhealthy.
        since: Seconds since the epoch at which it came into this state; None where it has been so from the start.
        problem: What is wrong and what to do about it; of a healthy one, what it has refused lately (full, busy, …).
    """

    state: State
    since: float | None = None
    problem: str | None = None


@runtime_checkable
class Monitored(Protocol):
    """A store that keeps an eye on itself."""

    def state(self) -> StoreState:
        """Return how it is now. Never blocks."""
        ...

    @property
    def serving(self) -> str:
        """The name of the store that serves now."""
        ...


@runtime_checkable
class Replaceable(Protocol):
    """A store whose server may turn out to be another one: restarted, promoted, restored."""

    on_replaced: Callable[[], None] | None
    """Called on the event loop, before any answer of the other server is handed out: its last changes may be lost."""


@runtime_checkable
class Evicting(Protocol):
    """A store that drops entries for room and says so."""

    on_evict: Callable[[int], None] | None
    """Called on the event loop with how many were dropped."""


@runtime_checkable
class Switching(Protocol):
    """A store whose state changes and that says so."""

    on_state: Callable[[str, str], None] | None
    """Called on the event loop with the old and the new state."""


class Retimed(Protocol):
    """What gives a frame other times; see ``_frame.retimed``."""

    def __call__(self, front: bytes, key: bytes, /, *, created: float, fresh_until: float, keep_until: float) -> bytes:
        """Return the first 64 bytes of a frame that begins with *front*."""
        ...


@runtime_checkable
class Retiming(Protocol):
    """A store that changes the times of frames, which takes the secret where they are sealed."""

    retimed: Retimed
    """Called for each; set by who has the secret. Raises ``FrameError`` for what it can't verify."""


class Observer(Protocol):
    """Hears what the engine does. Called on the event loop, many times a second: must return at once and never raise.

    No call ever passes a key's arguments or a value.
    """

    def hit(self, tier: str, /) -> None:
        """A value was served from *tier*: "l1" or the store's name."""
        ...

    def miss(self) -> None:
        """A read found nothing to serve."""
        ...

    def stale(self) -> None:
        """A stale value stood in."""
        ...

    def coalesced(self) -> None:
        """A caller joined a load in progress instead of loading."""
        ...

    def load(self, seconds: float, ok: bool, /) -> None:
        """A loader ended."""
        ...

    def saved(self, seconds: float, /) -> None:
        """A hit spared a load that had once taken so long."""
        ...

    def error(self, kind: str, /) -> None:
        """Something failed softly: a store error's ``kind``, a frame's reason, or "uncacheable"."""
        ...

    def eviction(self, count: int, /) -> None:
        """Entries were dropped for room."""
        ...

    def state(self, old: str, new: str, /) -> None:
        """The cache's state changed: healthy, degraded, misconfigured, unhealthy."""
        ...
