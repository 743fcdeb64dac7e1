"""What a cache tells of itself and its entries: plain figures, made when somebody asks.

A dataclass takes up to two milliseconds to define, so these are imported by whoever makes one first, and no sooner.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """A cached value with what is known of it. Times are seconds since the epoch on the store's clock.

    Attributes:
        value: The value; a copy of the caller's own. Not shown in the repr.
        created: When it was stored.
        fresh_until: When it stops being fresh; ``math.inf``: never.
        keep_until: When the store may drop it; ``math.inf``: never.
        load_cost: Seconds its load took; 0: not loaded, or unknown.
        tier: Where it was found: l1, or the store's name.
    """

    value: T = field(repr=False)
    created: float
    fresh_until: float
    keep_until: float
    load_cost: float
    tier: str


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
        problem: What is wrong and what to do about it; also where the server is there but full, busy or read-only.
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
