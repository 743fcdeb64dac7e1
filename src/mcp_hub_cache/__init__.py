"""mcp-hub-cache: cache what async agents wait for, once.

    from mcp_hub_cache import acached, open_cache

    @acached(ttl="10m")                      # 50 agents ask at once: one call
    async def search(query: str) -> list[str]: ...

    async with open_cache() as cache:        # CACHE_BACKEND, REDIS_URL, … decide
        await cache.set("plan:42", {"steps": []}, ttl=600)
        plan = await cache.get("plan:42")

Importing this package imports neither redis nor pydantic; a cache that needs them does.
"""

from __future__ import annotations

from ._acached import Acached, acached
from ._async_cache import MISSING, AsyncCache, Entry, MissingType
from ._cache import Cache
from ._exceptions import (
    CacheError,
    CircularLoadError,
    InvalidKeyError,
    SettingsError,
    StoreError,
    UncacheableError,
    ValueTooLargeError,
    WrongLoopError,
)
from ._open import FileCache, MemoryCache, RedisCache, default_cache, open_cache
from ._policy import FOREVER
from ._protocols import Observer, Store
from ._stats import CacheStatus, Stats

__all__ = [
    "FOREVER",
    "MISSING",
    "Acached",
    "AsyncCache",
    "Cache",
    "CacheError",
    "CacheStatus",
    "CircularLoadError",
    "Entry",
    "FileCache",
    "InvalidKeyError",
    "MemoryCache",
    "MissingType",
    "Observer",
    "RedisCache",
    "SettingsError",
    "Stats",
    "Store",
    "StoreError",
    "UncacheableError",
    "ValueTooLargeError",
    "WrongLoopError",
    "acached",
    "default_cache",
    "open_cache",
]
__version__ = "0.1.0"
