"""Counting what happens.

Counters are plain integers that the event loop alone changes: counting costs a hit next to nothing, and whoever wants
the figures takes a snapshot.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._figures import Stats


class Tap:
    """Hits that are counted where they happen, without a call.

    Attributes:
        hits: How many.
        saved: Seconds of loading that they spared.
    """

    __slots__ = ("__weakref__", "hits", "saved")

    def __init__(self) -> None:
        self.hits = 0
        self.saved = 0.0


class Counters:
    """The ``Observer`` that is always there."""

    __slots__ = (
        "__weakref__", "_coalesced", "_errors", "_evictions", "_hits", "_load_errors", "_load_seconds", "_loads",
        "_misses", "_saved_seconds", "_stale_hits", "_taps",
    )  # fmt: skip

    def __init__(self) -> None:
        self._hits: dict[str, int] = {}
        self._misses = 0
        self._stale_hits = 0
        self._coalesced = 0
        self._loads = 0
        self._load_errors = 0
        self._load_seconds = 0.0
        self._saved_seconds = 0.0
        self._evictions = 0
        self._errors: Counter[str] = Counter()
        self._taps: dict[Tap, tuple[int, float]] = {}  # with what they had counted before

    def listen(self, tap: Tap) -> None:
        """Count the L1 hits that *tap* counts from now on."""
        self._taps.setdefault(tap, (tap.hits, tap.saved))

    def leave(self, tap: Tap) -> None:
        """Keep what *tap* has counted, and listen no more."""
        hits, saved = self._taps.pop(tap, (tap.hits, tap.saved))
        if tap.hits != hits:
            self._hits["l1"] = self._hits.get("l1", 0) + tap.hits - hits
            self._saved_seconds += tap.saved - saved

    def hit(self, tier: str, /) -> None:
        """See ``Observer``; so for all that follow."""
        self._hits[tier] = self._hits.get(tier, 0) + 1

    def miss(self) -> None:
        """See ``Observer``."""
        self._misses += 1

    def stale(self) -> None:
        """See ``Observer``."""
        self._stale_hits += 1

    def coalesced(self) -> None:
        """See ``Observer``."""
        self._coalesced += 1

    def load(self, seconds: float, ok: bool, /) -> None:
        """See ``Observer``."""
        self._loads += 1
        self._load_errors += not ok
        self._load_seconds += seconds

    def saved(self, seconds: float, /) -> None:
        """See ``Observer``."""
        self._saved_seconds += seconds

    def error(self, kind: str, /) -> None:
        """See ``Observer``."""
        self._errors[kind] += 1

    def eviction(self, count: int, /) -> None:
        """See ``Observer``."""
        self._evictions += count

    def state(self, old: str, new: str, /) -> None:
        """See ``Observer``."""

    def snapshot(self) -> Stats:
        """Return the figures as they are now."""
        from ._figures import Stats  # noqa: PLC0415  # see there

        for tap in list(self._taps):
            self.leave(tap)
            self.listen(tap)
        return Stats(
            hits=sum(self._hits.values()),
            misses=self._misses,
            stale_hits=self._stale_hits,
            coalesced=self._coalesced,
            loads=self._loads,
            load_errors=self._load_errors,
            load_seconds=self._load_seconds,
            saved_seconds=self._saved_seconds,
            evictions=self._evictions,
            hits_by_tier=dict(self._hits),
            errors=dict(self._errors),
        )
