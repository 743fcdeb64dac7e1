"""Reads and writes of the 1.4 KB JSON value in files: ours beside a thread hop by hand, and others.

On a tmpfs where there is one, so that the code is measured and not the disk; writes on the disk too, for reference.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import orjson

from mcp_hub_cache import FileCache

from .bench import Bench
from .clients import MissingError, require
from .measure import Side, reads, writes
from .servers import folder, has_memory_folder
from .values import result

_KEYS = 1000
_QUICK_KEYS = 200
_VALUES = [result(index) for index in range(200)]


class Files:
    """Something that keeps values in files: ``get`` and ``put``."""

    def __init__(self, get: Callable[[str], Any], put: Callable[[str, Any], Coroutine[Any, Any, Any]]) -> None:
        self.get = get
        self.put = put


async def _ours(place: Path, stack: AsyncExitStack, *, durable: bool = False) -> Files:
    cache = await stack.enter_async_context(FileCache(place, l1_max_entries=0, timeout=30, durable=durable))
    return Files(cache.get, cache.set)


def _path(place: Path, key: str) -> str:
    return f"{place}/{key}"


async def _hop(place: Path, stack: AsyncExitStack) -> Files:  # noqa: ARG001  # nothing to close
    """One thread hop for the whole read or write, as a careful programmer writes it."""

    def read(key: str) -> bytes:
        with open(_path(place, key), "rb") as file:  # noqa: PTH123  # the cheapest way there is
            return file.read()

    def write(key: str, data: bytes) -> None:
        path = _path(place, key)
        with open(f"{path}.tmp", "wb") as file:  # noqa: PTH123
            file.write(data)
        os.replace(f"{path}.tmp", path)  # noqa: PTH105

    async def get(key: str) -> Any:
        return orjson.loads(await asyncio.to_thread(read, key))

    async def put(key: str, value: Any) -> None:
        await asyncio.to_thread(write, key, orjson.dumps(value))

    return Files(get, put)


async def _aiofiles(place: Path, stack: AsyncExitStack) -> Files:
    import aiofiles

    async def get(key: str) -> Any:
        async with aiofiles.open(_path(place, key), "rb") as file:
            return orjson.loads(await file.read())

    return Files(get, (await _hop(place, stack)).put)


async def _diskcache(place: Path, stack: AsyncExitStack) -> Files:
    """Synchronous, so through threads; in its default pickle, which is its fastest."""
    require("diskcache")
    import diskcache

    cache = diskcache.Cache(str(place), timeout=60)
    stack.callback(cache.close)

    async def get(key: str) -> Any:
        return await asyncio.to_thread(cache.get, key)

    async def put(key: str, value: Any) -> None:
        await asyncio.to_thread(cache.set, key, value, 3600)

    return Files(get, put)


async def _py_key_value(place: Path, stack: AsyncExitStack) -> Files:  # noqa: ARG001  # nothing to close
    require("py-key-value-aio")
    try:
        from key_value.aio.stores.filetree import (
            FileTreeStore,
            FileTreeV1CollectionSanitizationStrategy,
            FileTreeV1KeySanitizationStrategy,
        )
    except ImportError as error:
        raise MissingError(f"py-key-value-aio[filetree] is not installed: {error}") from None

    store = FileTreeStore(
        data_directory=place,
        key_sanitization_strategy=FileTreeV1KeySanitizationStrategy(place),
        collection_sanitization_strategy=FileTreeV1CollectionSanitizationStrategy(place),
    )
    await store.setup()

    async def put(key: str, value: Any) -> None:
        await store.put(key.replace(":", "_"), value, ttl=3600)

    async def get(key: str) -> Any:
        return await store.get(key.replace(":", "_"))

    return Files(get, put)


_PEERS = {
    "hop": _hop,
    "aiofiles": _aiofiles,
    "diskcache": _diskcache,
    "py-key-value": _py_key_value,
}


async def run(bench: Bench) -> None:
    """Measure the section."""
    if not bench.wants("files."):
        return
    note = "" if has_memory_folder() else "on disk: no tmpfs here"
    for works, in_memory in ((("get1", "get100", "set100"), True), (("disk100",), False)):
        with folder(in_memory=in_memory) as place:
            async with AsyncExitStack() as stack:
                await _measure(bench, place, stack, works, note if in_memory else "")
    await _measure_durable(bench)


async def _measure_durable(bench: Bench) -> None:
    for callers in (1, 100):
        row = f"files.durable{callers}"
        if bench.wants(row):
            with folder(in_memory=False) as place:
                async with AsyncExitStack() as stack:
                    keys = [f"set:{index}" for index in range(len(_VALUES))]
                    ours = await _ours(_made(place, "durable"), stack, durable=True)
                    theirs = await _ours(_made(place, "default"), stack)
                    both = [writes(each.put, each.get, keys, _VALUES, callers) for each in (ours, theirs)]
                    await bench.compare(row, *both)


async def _measure(bench: Bench, place: Path, stack: AsyncExitStack, works: tuple[str, ...], note: str) -> None:
    if not any(bench.wants(f"files.{work}.") for work in works):
        return
    keys = [f"key:{index}" for index in range(_QUICK_KEYS if bench.method.quick else _KEYS)]
    ours = await _opened(_made(place, "ours"), _ours, stack, keys)
    for name, make in _PEERS.items():
        rows = [row for work in works if bench.wants(row := f"files.{work}.{name}")]
        if not rows:
            continue
        try:
            theirs = await _opened(_made(place, name), make, stack, keys)
        except MissingError as error:
            for row in rows:
                bench.skip(row, str(error))
            continue
        for row in rows:
            await bench.compare(row, _side(row, ours, keys), _side(row, theirs, keys), note=note)


def _made(place: Path, name: str) -> Path:
    (place / name).mkdir()
    return place / name


async def _opened(
    place: Path, make: Callable[[Path, AsyncExitStack], Any], stack: AsyncExitStack, keys: list[str]
) -> Files:
    """Open it in a folder of its own, with every key in it."""
    files: Files = await make(place, stack)
    for index, key in enumerate(keys):
        await files.put(key, result(index))
    return files


def _side(row: str, files: Files, keys: list[str]) -> Side:
    work = row.split(".")[1]
    if work.startswith("get"):
        return reads(files.get, keys, int(work.removeprefix("get")))
    return writes(files.put, files.get, [f"set:{index}" for index in range(len(_VALUES))], _VALUES, 100)
