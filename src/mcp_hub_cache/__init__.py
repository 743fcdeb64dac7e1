"""mcp-hub-cache: cache what async agents wait for, once.

    from mcp_hub_cache import acached, open_cache

    @acached(ttl="10m")                      # 50 agents ask at once: one call
    async def search(query: str) -> list[str]: ...

    async with open_cache() as cache:        # CACHE_BACKEND, REDIS_URL, … decide
        await cache.set("plan:42", {"steps": []}, ttl=600)
        plan = await cache.get("plan:42")

Importing this package loads what decorating functions takes. The engine comes with the first cache, or the first name
below that speaks of one; redis and pydantic with the cache that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ._acached import Acached, acached
from ._async_cache import MISSING, AsyncCache, MissingType
from ._current import CurrentEntry, current_entry
from ._durations import FOREVER
from ._exceptions import (
    CacheError,
    CircularLoadError,
    InvalidKeyError,
    LoadTimeoutError,
    SettingsError,
    StoreError,
    StoreMisconfiguredError,
    UncacheableError,
    ValueTooLargeError,
    WrongLoopError,
)

if TYPE_CHECKING:
    from ._cache import Cache
    from ._figures import CacheStatus, Entry, Stats
    from ._open import FileCache, MemoryCache, RedisCache, default_cache, open_cache
    from ._policy import Policy
    from ._protocols import Observer, Store

__all__ = [
    "FOREVER",
    "MISSING",
    "Acached",
    "AsyncCache",
    "Cache",
    "CacheError",
    "CacheStatus",
    "CircularLoadError",
    "CurrentEntry",
    "Entry",
    "FileCache",
    "InvalidKeyError",
    "LoadTimeoutError",
    "MemoryCache",
    "MissingType",
    "Observer",
    "Policy",
    "RedisCache",
    "SettingsError",
    "Stats",
    "Store",
    "StoreError",
    "StoreMisconfiguredError",
    "UncacheableError",
    "ValueTooLargeError",
    "WrongLoopError",
    "acached",
    "current_entry",
    "default_cache",
    "open_cache",
]
__version__ = "0.1.0"

_LATER = {
    "Cache": "_cache",
    "CacheStatus": "_figures",
    "Entry": "_figures",
    "FileCache": "_open",
    "MemoryCache": "_open",
    "Observer": "_protocols",
    "Policy": "_policy",
    "RedisCache": "_open",
    "Stats": "_figures",
    "Store": "_protocols",
    "default_cache": "_open",
    "open_cache": "_open",
}

if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name for one of ours

    def __getattr__(name: str) -> object:
        """Import what was left for later (PEP 562)."""
        module = _LATER.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f".{module}", __name__), name)
        return found

    def __dir__() -> list[str]:
        """All names, there or still to come."""
        return sorted({*globals(), *_LATER})
