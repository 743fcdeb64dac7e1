"""Counting what happens, and the picture that ``status()`` gives of it.

Counters are plain integers that the event loop alone changes: counting costs a hit next to nothing, and whoever wants
the figures takes a snapshot.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar


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


@dataclass(frozen=True, slots=True)
class Stats:
    """What was counted since the cache was made.

    Attributes:
        hits: Reads served from L1 or the store.
        misses: Reads that found nothing; callers who then joined a load in progress are among them.
        stale_hits: Stale values that stood in.
        coalesced: Callers who joined a load in progress.
        loads: Loaders called.
        load_errors: Loaders that raised.
        load_seconds: Seconds spent in loaders, added up.
        saved_seconds: Seconds of loading that hits and joined loads have spared.
        evictions: Entries dropped for room by this process.
        hits_by_tier: Hits by where they came from: l1, redis, file, memory.
        errors: Soft failures by kind.
    """

    hits: int = 0
    misses: int = 0
    stale_hits: int = 0
    coalesced: int = 0
    loads: int = 0
    load_errors: int = 0
    load_seconds: float = 0.0
    saved_seconds: float = 0.0
    evictions: int = 0
    hits_by_tier: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Hits among all reads, 0 to 1; 0 where there were none."""
        reads = self.hits + self.misses
        return self.hits / reads if reads else 0.0


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """What ``status()`` answers. Fields that a backend does not have are None, and left out by ``as_dict``.

    Attributes:
        status: healthy, degraded (the standby serves), misconfigured, or unhealthy.
        backend: redis, file or memory; the primary's where there is a standby.
        namespace: The namespace asked.
        key_prefix: What all keys begin with.
        default_ttl_seconds: Seconds an entry stays fresh unless told otherwise; inf: for ever.
        stats: Counted since the cache was made.
        hits, misses, hit_rate, coalesced: The most wanted of them.
        l1_entries, l1_bytes: What the near cache holds now.
        degraded_since: When the standby took over, seconds since the epoch.
        problem: What is wrong and what to do about it.
        total_keys: Live entries in the namespace.
        cache_dir, total_files, expired_files, total_size_mb: Of the file store.
        redis_version, redis_mode, connected_clients, memory_used_human: Of the server, where it tells.
        facts: Whatever else the store said.
    """

    status: str
    backend: str
    namespace: str
    key_prefix: str
    default_ttl_seconds: float
    stats: Stats
    l1_entries: int = 0
    l1_bytes: int = 0
    degraded_since: float | None = None
    problem: str | None = None
    total_keys: int | None = None
    cache_dir: str | None = None
    total_files: int | None = None
    expired_files: int | None = None
    total_size_mb: float | None = None
    redis_version: str | None = None
    redis_mode: str | None = None
    connected_clients: int | None = None
    memory_used_human: str | None = None
    facts: dict[str, str | int | float] = field(default_factory=dict)

    FACTS: ClassVar[tuple[str, ...]] = (
        "total_keys", "cache_dir", "total_files", "expired_files", "total_size_mb", "redis_version", "redis_mode",
        "connected_clients", "memory_used_human",
    )  # fmt: skip
    """The fields that a store fills by facts of those names."""

    @property
    def hits(self) -> int:
        """See ``Stats.hits``."""
        return self.stats.hits

    @property
    def misses(self) -> int:
        """See ``Stats.misses``."""
        return self.stats.misses

    @property
    def hit_rate(self) -> float:
        """See ``Stats.hit_rate``."""
        return self.stats.hit_rate

    @property
    def coalesced(self) -> int:
        """See ``Stats.coalesced``."""
        return self.stats.coalesced

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types, without what this backend does not have. No end is the text "forever"."""
        result: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "stats":
                result |= {part.name: getattr(value, part.name) for part in fields(value)}
                result["hit_rate"] = round(value.hit_rate, 4)
            elif each.name == "facts":
                result |= {name: fact for name, fact in value.items() if name not in result}
            elif value is not None or each.name == "degraded_since":
                result[each.name] = "forever" if value == float("inf") else value
        return result
