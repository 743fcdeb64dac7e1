"""Ways to a cache: the ready-made ones, the one that the environment asks for, and the default of a loop.

Rules:
- redis and pydantic take 150 to 250 ms to import. They are imported here when a cache that needs them is made, and
  for the default cache, which is made while a loop runs, in a thread.
- A cache on Redis always stands behind a breaker, with a standby or without: a server that is away costs one
  deadline, not one a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack
from weakref import WeakKeyDictionary

from ._async_cache import Seconds
from ._cache import Cache
from ._durations import seconds
from ._policy import Coalesce, Policy
from ._protocols import Observer, Store
from ._shortcut import CURRENT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pydantic import SecretStr

    from ._settings import Settings
    from .stores.failover import FailoverStore
    from .stores.redis import RedisStore


_SHARE: Final = 0.8  # of an operation's deadline, for one round trip to Redis: what is left is the standby's


class CacheOptions(TypedDict, total=False):
    """What every ready-made cache takes; see ``Cache``."""

    namespace: str
    default_ttl: Seconds
    prefix: str
    timeout: Seconds
    l1_max_entries: int
    l1_max_bytes: int
    max_key_length: int
    max_value_bytes: int
    max_value_items: int
    policy: Policy | None
    coalesce: Coalesce
    max_refreshes: int
    secret_key: str | None
    previous_secret_key: str | None
    observer: Observer | None


class FailoverOptions(TypedDict, total=False):
    """When a server counts as away, and what is done then; see ``FailoverStore``. Seconds are floats here."""

    failures: int
    slow_after: float
    probe_after: float
    probe_max: float
    standby_ttl: float
    max_journal: int


class MemoryCache(Cache):
    """A cache in this process's memory.

    Args:
        max_bytes: Room for keys and values; the least recently used go first. None: no bound.
        **options: See ``Cache``.
    """

    def __init__(self, *, max_bytes: int | None = 256 * 1024 * 1024, **options: Unpack[CacheOptions]) -> None:
        from .stores.memory import MemoryStore

        super().__init__(MemoryStore(max_bytes=max_bytes), **options)


class FileCache(Cache):
    """A cache in a folder that any number of processes may share. No server needed.

    Args:
        directory: The folder; everything is kept in ``mcp_hub_cache`` inside it, which is made when it is first used.
        max_bytes: Room on disk; the least recently used go first. None: no bound.
        durable: What is stored or deleted stays so after a power cut (fsync): each write waits for the disk, most often
            many times as long. Without it a power cut may lose the last seconds; torn entries are never served.
        **options: See ``Cache``.
    """

    def __init__(
        self,
        directory: str | Path = "cache",
        *,
        max_bytes: int | None = 1024**3,
        durable: bool = False,
        **options: Unpack[CacheOptions],
    ) -> None:
        super().__init__(_file_store(directory, max_bytes, options.get("prefix", "mcp_hub:"), durable), **options)


class RedisCache(Cache):
    """A cache on a Redis or Valkey server that a fleet shares.

    While the server is away, reads miss and writes are dropped (``fallback`` None), or a standby serves.

    Args:
        url: ``redis://[user:password@]host:port/db``, ``rediss://`` for TLS, ``unix:///path``,
            ``sentinel://[user:password@]host:port,host:port/service[/db]``; for a cluster one node or several. None:
            this machine's port 6379.
        username: Used where the URL has neither a user nor a password.
        password: The same.
        ca_certs: A file of CA certificates to trust, for TLS.
        client_cert: A file with a certificate, for servers that ask for one.
        client_key: A file with its key, if that stands apart.
        tls_insecure: Do not verify the server's certificate. Anybody between you and it can then read and forge.
        max_connections: At most so many connections; 1 or more. With 1 there is no near cache.
        sentinels: ``"host:port,host:port"``, or a list of such; in place of a URL.
        sentinel_service: What the sentinels call the primary; None: mymaster.
        sentinel_username: For the sentinels themselves.
        sentinel_password: The same.
        cluster: Whether the URL names nodes of a Redis Cluster.
        fallback: A store that serves while the server is away, such as ``FileStore("cache")``.
        failover: When that is: ``failures`` in a row (3), ``slow_after`` so many seconds (half of *timeout*), and
            others; see ``FailoverStore``.
        **options: See ``Cache``.

    Raises:
        ValueError: The URL is none, or contradicts other options.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        username: str | None = None,
        password: str | None = None,
        ca_certs: str | Path | None = None,
        client_cert: str | Path | None = None,
        client_key: str | Path | None = None,
        tls_insecure: bool = False,
        max_connections: int = 50,
        sentinels: str | Sequence[str] | None = None,
        sentinel_service: str | None = None,
        sentinel_username: str | None = None,
        sentinel_password: str | None = None,
        cluster: bool = False,
        fallback: Store | None = None,
        failover: FailoverOptions | None = None,
        **options: Unpack[CacheOptions],
    ) -> None:
        from .stores.redis import RedisStore

        timeout = seconds(options.get("timeout", 0.5), "timeout")
        store = RedisStore(
            url,
            username=username,
            password=password,
            ca_certs=ca_certs,
            client_cert=client_cert,
            client_key=client_key,
            tls_insecure=tls_insecure,
            timeout=_SHARE * timeout,
            max_connections=max_connections,
            sentinels=sentinels,
            sentinel_service=sentinel_service,
            sentinel_username=sentinel_username,
            sentinel_password=sentinel_password,
            cluster=cluster,
            prefix=options.get("prefix", "mcp_hub:"),
        )
        super().__init__(
            _guarded(store, fallback, options.get("prefix", "mcp_hub:"), timeout, failover or {}), **options
        )


def open_cache(settings: Settings | None = None, **overrides: Any) -> Cache:
    """Return the cache that the environment and ``.env`` ask for. Nothing is touched before its first use.

    Args:
        settings: What ``load_settings`` returned; None: read them now.
        **overrides: Settings by their names in lower case, such as ``cache_backend="memory"``; they win over the
            environment.

    Raises:
        SettingsError: A setting has a wrong value; the error names the variable, what it held, and what it takes.
        TypeError: An override is no setting.

    Example:
        >>> async with open_cache() as cache:
        ...     await cache.set("plan:42", {"steps": []}, ttl="10m")
    """
    if settings is None:
        from ._settings import load_settings

        settings = load_settings(**overrides)
    elif overrides:
        raise TypeError("pass settings or overrides, not both")
    return Cache(
        _store(settings),
        namespace=settings.cache_namespace,
        default_ttl=settings.cache_default_ttl,
        prefix=settings.cache_key_prefix,
        timeout=settings.cache_timeout,
        l1_max_entries=settings.cache_l1_max_entries,
        l1_max_bytes=settings.cache_l1_max_bytes,
        coalesce=settings.cache_coalesce,
        max_refreshes=settings.cache_max_refreshes,
        max_value_bytes=settings.cache_max_value_bytes,
        max_value_items=settings.cache_max_value_items,
        secret_key=_text_of(settings.cache_secret_key),
        previous_secret_key=_text_of(settings.cache_secret_key_previous),
    )


def _text_of(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def _store(settings: Settings) -> Store:
    if settings.cache_backend == "memory":
        from .stores.memory import MemoryStore

        return MemoryStore()
    if settings.cache_backend == "file":
        return _files(settings, settings.cache_dir)
    from .stores.redis import RedisStore

    store = RedisStore(
        _text_of(settings.redis_url),
        host=settings.redis_host,
        port=settings.redis_port,
        db=settings.redis_db,
        username=settings.redis_username,
        password=_text_of(settings.redis_password),
        ssl=settings.redis_ssl,
        ca_certs=settings.redis_ca_certs,
        client_cert=settings.redis_client_cert,
        client_key=settings.redis_client_key,
        tls_insecure=settings.redis_tls_insecure,
        timeout=_SHARE * settings.cache_timeout,
        max_connections=settings.redis_max_connections,
        sentinels=settings.redis_sentinels,
        sentinel_service=settings.redis_sentinel_service,
        sentinel_username=settings.redis_sentinel_username,
        sentinel_password=_text_of(settings.redis_sentinel_password),
        cluster=settings.redis_cluster,
        prefix=settings.cache_key_prefix,
    )
    failover: FailoverOptions = {
        "failures": settings.cache_breaker_failures,
        "probe_after": settings.cache_probe_after,
        "probe_max": settings.cache_probe_max,
        "standby_ttl": settings.cache_standby_ttl,
        "max_journal": settings.cache_max_journal,
    }
    if settings.cache_slow_after is not None:
        failover["slow_after"] = settings.cache_slow_after
    return _guarded(store, _fallback(settings), settings.cache_key_prefix, settings.cache_timeout, failover)


def _fallback(settings: Settings) -> Store | None:
    if settings.cache_fallback == "memory":
        from .stores.memory import MemoryStore

        return MemoryStore()
    if settings.cache_fallback == "file":
        # A folder of its own: what a file cache keeps there is older than what Redis has.
        return _files(settings, settings.cache_dir / "standby")
    return None


def _files(settings: Settings, directory: Path) -> Store:
    return _file_store(directory, settings.cache_max_bytes, settings.cache_key_prefix, settings.cache_durable)


def _file_store(directory: str | Path, max_bytes: int | None, prefix: str, durable: bool) -> Store:
    from .stores.file import FileStore

    return FileStore(directory, prefix=prefix, max_bytes=max_bytes, durable=durable)


def _guarded(
    store: RedisStore, standby: Store | None, prefix: str, timeout: float, failover: FailoverOptions
) -> FailoverStore:
    from .stores.failover import FailoverStore

    failover = {"slow_after": timeout / 2, **failover}
    return FailoverStore(store, standby, prefix=prefix.encode(), journal=repr(store), **failover)


_defaults: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Future[Cache]] = WeakKeyDictionary()


async def default_cache() -> Cache:
    """Return the running loop's default cache, opened from the environment by whoever asks first.

    Raises:
        SettingsError: A setting has a wrong value. The next call reads the settings again.
    """
    loop = asyncio.get_running_loop()
    opening = _defaults.get(loop)
    if opening is None or (opening.done() and (opening.cancelled() or opening.exception() is not None)):
        CURRENT.cache = None
        opening = _defaults[loop] = asyncio.ensure_future(asyncio.to_thread(open_cache))
        opening.add_done_callback(_opened)
    return opening.result() if opening.done() else await asyncio.shield(opening)


def _opened(opening: asyncio.Future[Cache]) -> None:
    if _defaults.get(opening.get_loop()) is not opening:
        return  # another one has taken its place
    alone = sum(not loop.is_closed() for loop in list(_defaults)) == 1
    CURRENT.cache = opening.result() if alone and not opening.cancelled() and opening.exception() is None else None


@contextmanager
def replaced_default(cache: Cache) -> Iterator[None]:
    """Have *cache* be the running loop's default within the block."""
    loop = asyncio.get_running_loop()
    before = _defaults.get(loop)
    _defaults[loop] = instead = loop.create_future()
    instead.set_result(cache)
    _opened(instead)
    try:
        yield
    finally:
        CURRENT.cache = None
        if before is None:
            del _defaults[loop]
        else:
            _defaults[loop] = before
            if before.done():
                _opened(before)
