"""The clients of Redis that are compared, each in its best fair configuration, behind one tiny interface.

Fair means: over TCP, values as JSON by orjson where the client lets us choose (its own way where it has one), and the
deadline on an operation that it has by default. ``setup`` says the rest in a line, and is printed with the results.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Self

import orjson

from .servers import Address

TTL = 3600


class MissingError(Exception):
    """A peer that is not installed."""


def require(distribution: str) -> str:
    """Return the version of an installed distribution, or raise ``MissingError``."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        raise MissingError(f"{distribution} is not installed") from None


class Client:
    """A client of Redis.

    ``get`` and ``set`` take a key and give or take a value, not its bytes. Where a client's own method does that, it
    stands here itself, so that nothing is added to its cost.
    """

    name: ClassVar[str]
    distribution: ClassVar[str]
    setup: ClassVar[str]
    get: Callable[[str], Any]
    set: Callable[[str, Any], Any]

    async def open(self, address: Address) -> None:
        """Connect."""
        raise NotImplementedError

    async def close(self) -> None:
        """Disconnect."""
        raise NotImplementedError

    async def fill(self, items: Iterable[tuple[str, Any]]) -> None:
        """Store values, one after the other."""
        for key, value in items:
            await self.set(key, value)


class Ours(Client):
    """This library, with its near cache off."""

    name = "mcp-hub-cache"
    distribution = "mcp-hub-cache"
    setup = "RedisCache(url, l1_max_entries=0)"

    async def open(self, address: Address) -> None:
        """Connect."""
        from mcp_hub_cache import RedisCache

        # A deadline that a busy machine keeps; its length changes nothing in what is done.
        self.cache = RedisCache(address.url, l1_max_entries=0, timeout=30, default_ttl=TTL)
        self.get = self.cache.get
        self.set = self.cache.set

    async def close(self) -> None:
        """Disconnect."""
        await self.cache.aclose()

    async def fill(self, items: Iterable[tuple[str, Any]]) -> None:
        """Store values, many at a time."""
        batch: dict[str, Any] = {}
        for key, value in items:
            batch[key] = value
            if len(batch) == 500:
                await self.cache.set_many(batch)
                batch = {}
        if batch:
            await self.cache.set_many(batch)


class Bare(Client):
    """The least that a read takes on asyncio: what no client can be quicker than. For one caller at a time."""

    name = "a bare protocol"
    distribution = "hiredis"
    setup = "an asyncio.BufferedProtocol that writes GET, parses with hiredis and sets a future; orjson.loads"

    async def open(self, address: Address) -> None:
        """Connect."""
        import hiredis

        loop = asyncio.get_running_loop()
        asked = loop.create_future()
        reader = hiredis.Reader()

        class Protocol(asyncio.BufferedProtocol):
            buffer = bytearray(256 * 1024)
            view = memoryview(buffer)

            def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # the base class's signature
                return self.view

            def buffer_updated(self, nbytes: int) -> None:
                reader.feed(self.buffer, 0, nbytes)
                if (reply := reader.gets()) is not False:
                    asked.set_result(reply)

        self.transport, _ = await loop.create_connection(Protocol, address.host, address.port)

        async def ask(*command: bytes) -> Any:
            nonlocal asked
            asked = loop.create_future()
            self.transport.write(hiredis.pack_command(command))
            return await asked

        async def get(key: str) -> Any:
            return orjson.loads(await ask(b"GET", key.encode()))

        async def put(key: str, value: Any) -> None:
            await ask(b"SET", key.encode(), orjson.dumps(value), b"EX", b"%d" % TTL)

        self.get, self.set = get, put

    async def close(self) -> None:
        """Disconnect."""
        self.transport.close()


class RedisPy(Client):
    """redis.asyncio, by hand: what most programs do."""

    distribution = "redis"
    connections = 10

    async def open(self, address: Address) -> None:
        """Connect."""
        from redis.asyncio import BlockingConnectionPool, Redis

        pool = BlockingConnectionPool.from_url(address.url, max_connections=self.connections, timeout=60)
        self.client = client = Redis.from_pool(pool)

        async def get(key: str) -> Any:
            return orjson.loads(await client.get(key))

        async def put(key: str, value: Any) -> None:
            await client.set(key, orjson.dumps(value), px=TTL * 1000)

        self.get, self.set = get, put

    async def close(self) -> None:
        """Disconnect."""
        await self.client.aclose()


class RedisPy10(RedisPy):
    """Over a pool of 10."""

    name = "redis-py, pool of 10"
    setup = "redis.asyncio with hiredis, BlockingConnectionPool(max_connections=10), orjson around get and set"


class RedisPy50(RedisPy):
    """Over a pool of 50."""

    name = "redis-py, pool of 50"
    setup = "the same with max_connections=50"
    connections = 50


class Glide(Client):
    """valkey-glide, whose core is in Rust."""

    name = "valkey-glide"
    distribution = "valkey-glide"
    setup = "GlideClient, inflight_requests_limit=20,000, request_timeout=5 s, orjson around get and set"

    async def open(self, address: Address) -> None:
        """Connect."""
        from glide import ExpirySet, ExpiryType, GlideClient, GlideClientConfiguration, Logger, LogLevel, NodeAddress

        Logger.set_logger_config(LogLevel.ERROR)
        self.client = client = await GlideClient.create(
            GlideClientConfiguration(
                [NodeAddress(address.host, address.port)], inflight_requests_limit=20_000, request_timeout=5000
            )
        )
        expiry = ExpirySet(ExpiryType.SEC, TTL)

        async def get(key: str) -> Any:
            return orjson.loads(await client.get(key))  # type: ignore[arg-type]  # none of the keys is missing

        async def put(key: str, value: Any) -> None:
            await client.set(key, orjson.dumps(value), expiry=expiry)

        self.get, self.set = get, put

    async def close(self) -> None:
        """Disconnect."""
        await self.client.close()


class Cashews(Client):
    """cashews, in its own serialization."""

    name = "cashews"
    distribution = "cashews"
    setup = "setup(url, max_connections=10, check_repr=False), its default pickle, unsigned: its fastest"

    async def open(self, address: Address) -> None:
        """Connect."""
        from cashews import Cache

        self.cache = cache = Cache()
        # Its own default of 1 s for a reply, and silence about errors, would turn a busy moment into a wrong value.
        cache.setup(
            address.url,
            max_connections=10,
            check_repr=False,
            suppress=False,
            socket_timeout=30,
            wait_for_connection_timeout=60,
        )
        await cache.init()

        async def put(key: str, value: Any) -> None:
            await cache.set(key, value, expire=TTL)

        self.get, self.set = cache.get, put

    async def close(self) -> None:
        """Disconnect."""
        await self.cache.close()


class Aiocache(Client):
    """aiocache, through its serializer interface."""

    name = "aiocache"
    distribution = "aiocache"
    setup = "RedisCache over a BlockingConnectionPool of 10, its serializer interface with orjson, its timeout of 5 s"

    async def open(self, address: Address) -> None:
        """Connect."""
        from aiocache import RedisCache
        from aiocache.serializers import BaseSerializer
        from redis.asyncio import BlockingConnectionPool

        class Orjson(BaseSerializer):  # type: ignore[misc]  # untyped
            DEFAULT_ENCODING = None

            def dumps(self, value: Any) -> bytes:
                return orjson.dumps(value)

            def loads(self, value: bytes | None) -> Any:
                return None if value is None else orjson.loads(value)

        self.cache = cache = RedisCache(
            serializer=Orjson(),
            endpoint=address.host,
            port=address.port,
            pool_max_size=10,
            connection_pool_class=BlockingConnectionPool,
            connection_pool_kwargs={"timeout": 60},
        )

        async def put(key: str, value: Any) -> None:
            await cache.set(key, value, ttl=TTL)

        self.get, self.set = cache.get, put

    async def close(self) -> None:
        """Disconnect."""
        await self.cache.close()


class Coredis(Client):
    """coredis, which pipelines over few connections."""

    name = "coredis"
    distribution = "coredis"
    setup = "Redis.from_url(url), its default pool, orjson around get and set"

    async def open(self, address: Address) -> None:
        """Connect."""
        from coredis import Redis

        self.client = client = Redis.from_url(address.url)
        await client.__aenter__()

        async def get(key: str) -> Any:
            return orjson.loads(await client.get(key))  # type: ignore[arg-type]  # none of the keys is missing

        async def put(key: str, value: Any) -> None:
            await client.set(key, orjson.dumps(value), ex=TTL)

        self.get, self.set = get, put

    async def close(self) -> None:
        """Disconnect."""
        await self.client.__aexit__(None, None, None)


class PyKeyValue(Client):
    """py-key-value-aio, in its own format."""

    name = "py-key-value"
    distribution = "py-key-value-aio"
    setup = "RedisStore over a redis-py BlockingConnectionPool of 10"

    async def open(self, address: Address) -> None:
        """Connect."""
        try:
            from key_value.aio.stores.redis import RedisStore
        except ImportError as error:
            raise MissingError(f"py-key-value-aio[redis] is not installed: {error}") from None
        from redis.asyncio import BlockingConnectionPool, Redis

        self.client = Redis.from_pool(
            BlockingConnectionPool.from_url(address.url, max_connections=10, timeout=60, decode_responses=True)
        )
        self.store = store = RedisStore(client=self.client)
        await store.__aenter__()

        async def put(key: str, value: Any) -> None:
            await store.put(key, value, ttl=TTL)

        self.get, self.set = store.get, put

    async def close(self) -> None:
        """Disconnect."""
        await self.store.__aexit__(None, None, None)
        await self.client.aclose()


CLIENTS: tuple[type[Client], ...] = (Ours, Bare, RedisPy10, RedisPy50, Glide, Cashews, Aiocache, Coredis, PyKeyValue)


class Opened:
    """All clients that are installed, connected; and of those that are not, why."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.clients: dict[str, Client] = {}
        self.missing: dict[str, str] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for kind in CLIENTS:
            try:
                require(kind.distribution)
                client = kind()
                await client.open(self.address)
            except MissingError as error:
                self.missing[kind.name] = str(error)
                continue
            self._stack.push_async_callback(client.close)
            self.clients[kind.name] = client
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
