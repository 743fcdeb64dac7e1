"""The rows: what is compared with what, and where we want to be.

This one list is what the runs, the table and the tests go by.
A row's id is its place: section, work, peer. ``--only`` selects by any part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Kind(Enum):
    """What a row's figure is, and which way is good."""

    RATE = "rate"  # our rate over theirs: at least
    TIME = "time"  # our time over theirs: at most
    STALL = "stall"  # milliseconds that the event loop was held up: at most

    @property
    def more_is_better(self) -> bool:
        """Whether the target is a lower bound."""
        return self is Kind.RATE


@dataclass(frozen=True)
class Spec:
    """A row before it is measured. Without a target it is there for reference."""

    id: str
    work: str
    against: str
    kind: Kind
    target: float | None = None

    @property
    def section(self) -> str:
        """The first part of the id."""
        return self.id.partition(".")[0]


SECTIONS: Final = {
    "redis": "Redis: the 1.4 KB JSON value, L1 off",
    "big": "Redis: small reads beside a value of 5 MB, L1 off",
    "near": "Hits in the process",
    "load": "Misses and flights",
    "files": "Files: the 1.4 KB JSON value, L1 off",
    "import": "Import",
    "uvloop": "uvloop",
    "seal": "Sealed with a secret: the 1.4 KB JSON value",
}

RATE, TIME, STALL = Kind.RATE, Kind.TIME, Kind.STALL
_GET1, _GET = "RedisCache.get, 1 caller", "RedisCache.get, 100 callers"
_SET = "RedisCache.set, 100 callers"
_HIT, _JSON, _SHARED = "@acached hit, str, two arguments", "@acached hit, JSON value", "@acached(share=True) hit, JSON"
_GET_HIT = "cache.get hit, str"
_FILE1, _FILE = "FileCache.get, 1 caller", "FileCache.get, 100 callers"
_FILE_SET = "FileCache.set, 100 callers, tmpfs"
_DISK_SET = "FileCache.set, 100 callers, disk"
_HOP = "to_thread(open + read)"
_HOP_SET = "to_thread(write + replace)"
_SMALL = "p99 of small reads, 10 callers,"

SPECS: Final = (
    Spec("redis.get1.redis-py", _GET1, "redis-py get + orjson", RATE, 1.7),
    Spec("redis.get1.bare", _GET1, "a bare protocol, nothing verified", RATE),
    Spec("redis.get1.bare-redis-py", "a bare protocol, 1 caller", "redis-py get + orjson", RATE),
    Spec("redis.get1.valkey-glide", _GET1, "valkey-glide", RATE),
    Spec("redis.get1.cashews", _GET1, "cashews", RATE),
    Spec("redis.get1.aiocache", _GET1, "aiocache", RATE),
    Spec("redis.get1.coredis", _GET1, "coredis", RATE),
    Spec("redis.get1.py-key-value", _GET1, "py-key-value", RATE),
    Spec("redis.get100.redis-py-10", _GET, "redis-py, pool of 10", RATE, 7.5),
    Spec("redis.get100.redis-py-50", _GET, "redis-py, pool of 50", RATE, 6.0),
    Spec("redis.get100.valkey-glide", _GET, "valkey-glide", RATE, 2.4),
    Spec("redis.get100.cashews", _GET, "cashews", RATE, 9.0),
    Spec("redis.get100.aiocache", _GET, "aiocache", RATE, 6.0),
    Spec("redis.get100.coredis", _GET, "coredis", RATE),
    Spec("redis.get100.py-key-value", _GET, "py-key-value", RATE),
    Spec("redis.get1000", "RedisCache.get, 1,000 callers", "itself at 100", RATE, 0.85),
    Spec("redis.get10000", "RedisCache.get, 10,000 callers", "itself at 100", RATE, 0.7),
    Spec("redis.set100.redis-py", _SET, "redis-py set + orjson, pool of 10", RATE, 8.0),
    Spec("redis.set100.valkey-glide", _SET, "valkey-glide", RATE),
    Spec("redis.set100.cashews", _SET, "cashews", RATE),
    Spec("redis.get_many.redis-py", "RedisCache.get_many, 100 keys", "redis-py mget + orjson", TIME, 1.15),
    Spec("big.bytes.read", f"{_SMALL} 5 MB of bytes being read", "p99 alone", TIME, 3.0),
    Spec("big.bytes.written", f"{_SMALL} 5 MB of bytes being written", "p99 alone", TIME, 3.0),
    Spec("big.json.read", f"{_SMALL} 5 MB of JSON being read", "p99 alone", TIME),
    Spec("big.json.written", f"{_SMALL} 5 MB of JSON being written", "p99 alone", TIME),
    Spec("big.stall.bytes", "longest stall of the loop, get of 5 MB of bytes", "", STALL),
    Spec("big.stall.json", "longest stall of the loop, get of 5 MB of JSON", "", STALL),
    Spec("big.stall.loads", "orjson.loads of that JSON alone", "", STALL),
    Spec("near.str.async-lru", _HIT, "async-lru", TIME, 0.4),
    Spec("near.str.cachebox", _HIT, "cachebox", TIME),
    Spec("near.str.cashews", _HIT, "cashews' memory decorator", RATE, 50.0),
    Spec("near.str.aiocache", _HIT, "aiocache's memory decorator", RATE, 28.0),
    Spec("near.str.over-files", f"{_HIT}, over files", "async-lru", TIME),
    Spec("near.str.over-redis", f"{_HIT}, over Redis", "async-lru", TIME),
    Spec("near.json.async-lru", _JSON, "orjson.loads + an async-lru hit", TIME, 1.0),
    Spec("near.shared.str", _SHARED, "its own hit of a str", TIME, 1.1),
    Spec("near.get.cashews", _GET_HIT, "cashews' memory get", RATE, 12.0),
    Spec("near.get.cashews-client-side", _GET_HIT, "cashews' client-side-cached get", RATE, 5.0),
    Spec("near.get.aiocache", _GET_HIT, "aiocache's memory get", RATE),
    Spec("near.get.py-key-value", _GET_HIT, "py-key-value's memory get", RATE),
    Spec("near.get.dict", _GET_HIT, "an awaited dict lookup", TIME),
    Spec("load.miss.async-lru", "@acached miss, JSON, in memory", "async-lru's + dumps + loads", TIME, 1.5),
    Spec("load.waiters.async-lru", "1,000 waiters on one flight", "async-lru", TIME, 1.1),
    Spec("files.get1.hop", _FILE1, _HOP, RATE, 1.4),
    Spec("files.get1.diskcache", _FILE1, "to_thread(diskcache get)", RATE),
    Spec("files.get100.hop", _FILE, _HOP, RATE, 2.2),
    Spec("files.get100.aiofiles", _FILE, "aiofiles.open + read", RATE, 5.5),
    Spec("files.get100.diskcache", _FILE, "to_thread(diskcache get)", RATE),
    Spec("files.get100.py-key-value", _FILE, "py-key-value's file tree", RATE),
    Spec("files.set100.hop", _FILE_SET, _HOP_SET, RATE, 1.8),
    Spec("files.set100.py-key-value", _FILE_SET, "py-key-value's file tree", RATE, 5.0),
    Spec("files.disk100.hop", _DISK_SET, _HOP_SET, RATE),
    Spec("files.disk100.py-key-value", _DISK_SET, "py-key-value's file tree", RATE),
    Spec("files.durable1", "FileCache.set, durable, 1 caller, disk", "itself, not durable", RATE),
    Spec("files.durable100", "FileCache.set, durable, 100 callers, disk", "itself, not durable", RATE),
    Spec("import.time", "import mcp_hub_cache, on top of", "import asyncio, inspect, typing", TIME, 0.35),
    Spec("uvloop.get1", f"{_GET1}, uvloop", "itself on asyncio", RATE),
    Spec("uvloop.get100", f"{_GET}, uvloop", "itself on asyncio", RATE),
    Spec("seal.pack", "a sealed frame is made", "a plain one", TIME),
    Spec("seal.open", "a sealed frame is opened", "a plain one", TIME),
    Spec("seal.get100", f"{_GET}, sealed", "itself unsealed", RATE),
    Spec("seal.set100", f"{_SET}, sealed", "itself unsealed", RATE),
)
