"""Hits in the process: the decorator and ``cache.get``, beside the in-process caches of others.

One caller in a plain loop, since nothing is waited for. The loop and the comparison of the value (some 30 ns) are in
both sides' time, which makes small ratios larger, so against us.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import repeat
from typing import Any

import orjson

from mcp_hub_cache import AsyncCache, FileCache, MemoryCache, RedisCache, acached

from .bench import Bench
from .clients import MissingError, require
from .measure import Side
from .servers import folder
from .values import TEXT, WrongValueError, compare, result

Call = Callable[[str, int], Awaitable[Any]]
_ARGS = ("how do agents cache tool calls", 10)


async def run(bench: Bench) -> None:
    """Measure the section."""
    if not bench.wants("near."):
        return
    async with AsyncExitStack() as stack:
        memory = await stack.enter_async_context(MemoryCache(timeout=30))
        await _decorators(bench, stack, memory)
        await _json(bench, memory)
        await _gets(bench, stack, memory)


def _texts(call: Call) -> Side:
    """Hits of a decorated function of two arguments that returns a str."""
    query, limit = _ARGS
    expected = f"{query} {limit} {TEXT}"

    async def run(count: int) -> float:
        if await call(query, limit) != expected:  # the miss, if it was not there yet
            raise WrongValueError(call)
        started = time.perf_counter()
        for _ in repeat(None, count):
            if await call(query, limit) != expected:
                raise WrongValueError(call)
        return time.perf_counter() - started

    return Side(run)


async def _text(query: str, limit: int) -> str:
    return f"{query} {limit} {TEXT}"


def _ours(cache: AsyncCache) -> Call:
    @acached(ttl="1h", cache=cache)
    async def ours(query: str, limit: int) -> str:
        return f"{query} {limit} {TEXT}"

    return ours


def _async_lru() -> Call:
    require("async-lru")
    from async_lru import alru_cache

    return alru_cache(maxsize=1024)(_text)


def _cachebox() -> Call:
    require("cachebox")
    import cachebox

    decorated: Call = cachebox.cached(cachebox.LRUCache(1024))(_text)
    return decorated


def _aiocache() -> Call:
    require("aiocache")
    from aiocache import cached

    decorated: Call = cached(ttl=3600)(_text)
    return decorated


async def _cashews(stack: AsyncExitStack) -> Any:
    require("cashews")
    from cashews import Cache

    cache = Cache()
    cache.setup("mem://", size=1024)
    await cache.init()
    stack.push_async_callback(cache.close)
    return cache


async def _decorators(bench: Bench, stack: AsyncExitStack, memory: AsyncCache) -> None:
    async def cashews() -> Call:
        decorated: Call = (await _cashews(stack))(ttl="1h")(_text)
        return decorated

    for peer, make in {
        "async-lru": _async_lru,
        "cachebox": _cachebox,
        "cashews": cashews,
        "aiocache": _aiocache,
    }.items():
        row = f"near.str.{peer}"
        if not bench.wants(row):
            continue
        try:
            made: Any = make()
            theirs = _texts(await made if inspect.iscoroutine(made) else made)
        except MissingError as error:
            bench.skip(row, str(error))
            continue
        await bench.compare(row, _texts(_ours(memory)), theirs)
    if bench.wants("near.str.over-"):
        place = stack.enter_context(folder(in_memory=True))
        files = await stack.enter_async_context(FileCache(place, timeout=30))
        redis = await stack.enter_async_context(RedisCache(bench.address.url, timeout=30))
        for name, cache in {"files": files, "redis": redis}.items():
            try:
                theirs = _texts(_async_lru())
            except MissingError as error:
                bench.skip(f"near.str.over-{name}", str(error))
            else:
                await bench.compare(f"near.str.over-{name}", _texts(_ours(cache)), theirs)


async def _json(bench: Bench, memory: AsyncCache) -> None:
    if bench.wants("near.json"):
        try:
            theirs = _jsons(_loaded())
        except MissingError as error:
            bench.skip("near.json.async-lru", str(error))
        else:
            await bench.compare("near.json.async-lru", _jsons(_our_json(memory)), theirs)
    if bench.wants("near.shared"):
        if "share" not in inspect.signature(acached).parameters:
            bench.skip("near.shared.str", "acached has no share= yet")
        else:
            shared = _jsons(_our_json(memory, share=True))
            await bench.compare("near.shared.str", shared, _texts(_ours(memory)))


def _jsons(call: Call) -> Side:
    async def run(count: int) -> float:
        query, limit = _ARGS
        compare(await call(query, limit), limit)
        started = time.perf_counter()
        for _ in repeat(None, count):
            if (found := await call(query, limit))["number"] != limit:
                raise WrongValueError(call)
        took = time.perf_counter() - started
        compare(found, limit)
        return took

    return Side(run)


def _our_json(cache: AsyncCache, **options: Any) -> Call:
    @acached(ttl="1h", cache=cache, version=repr(options), **options)
    async def ours(query: str, limit: int) -> dict[str, Any]:  # noqa: ARG001  # part of the key
        return result(limit)

    return ours


def _loaded() -> Call:
    """A hit of async-lru that may be changed by its caller: bytes are kept, and decoded at each hit."""
    require("async-lru")
    from async_lru import alru_cache

    @alru_cache(maxsize=1024)
    async def encoded(query: str, limit: int) -> bytes:  # noqa: ARG001  # part of the key
        return orjson.dumps(result(limit))

    async def loaded(query: str, limit: int) -> Any:
        return orjson.loads(await encoded(query, limit))

    return loaded


async def _gets(bench: Bench, stack: AsyncExitStack, memory: MemoryCache) -> None:
    await memory.set("text", TEXT)
    ours = _get(memory.get, TEXT)

    async def cashews() -> Side:
        cache = await _cashews(stack)
        await cache.set("text", TEXT, expire=3600)
        return _get(cache.get, TEXT)

    async def client_side() -> Side:
        require("cashews")
        from cashews import Cache

        cache = Cache()
        cache.setup(bench.address.url, client_side=True, check_repr=False, suppress=False, socket_timeout=30)
        await cache.init()
        stack.push_async_callback(cache.close)
        await cache.set("text", TEXT, expire=3600)
        return _get(cache.get, TEXT)

    async def aiocache() -> Side:
        require("aiocache")
        from aiocache import SimpleMemoryCache

        cache = SimpleMemoryCache()
        await cache.set("text", TEXT, ttl=3600)
        return _get(cache.get, TEXT)

    async def py_key_value() -> Side:
        require("py-key-value-aio")
        from key_value.aio.stores.memory import MemoryStore

        store = MemoryStore()
        value = {"text": TEXT}  # it takes mappings only
        await store.put("text", value, ttl=3600)
        return _get(store.get, value)

    async def plain() -> Side:
        kept = {"text": TEXT}

        async def get(key: str) -> str:
            return kept[key]

        return _get(get, TEXT)

    sides = {
        "cashews": cashews,
        "cashews-client-side": client_side,
        "aiocache": aiocache,
        "py-key-value": py_key_value,
        "dict": plain,
    }
    for peer, make in sides.items():
        if not bench.wants(f"near.get.{peer}"):
            continue
        try:
            theirs = await make()
        except (MissingError, ImportError) as error:
            bench.skip(f"near.get.{peer}", str(error))
        else:
            await bench.compare(f"near.get.{peer}", ours, theirs)


def _get(get: Callable[[str], Awaitable[Any]], expected: object) -> Side:
    async def run(count: int) -> float:
        if await get("text") != expected:
            raise WrongValueError(get)
        started = time.perf_counter()
        for _ in repeat(None, count):
            if await get("text") != expected:
                raise WrongValueError(get)
        return time.perf_counter() - started

    return Side(run)
