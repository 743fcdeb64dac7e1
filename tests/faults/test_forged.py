"""FAULTS.md, "forged frame on a shared server" and "one tenant reads another's".

A neighbour on the server, or in the folder, has all rights, and not the secret: he reads and writes the very bytes, in
a real Valkey and a real folder. Whatever he makes of them is a miss, counted, and logged by the key's digest.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from mcp_hub_cache import Cache, FileCache, RedisCache
from mcp_hub_cache._frame import HEAD_SIZE, FrameError, Kind, key_of, pack, unpack_head
from mcp_hub_cache._seal import Seal
from tests.backends import PATIENT, poll
from tests.servers import Server, valkey_server

SECRET = "the fleet's secret, which the neighbour has not"
FORGED = b'"forged"'


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


class Neighbour:
    """Reads and writes what is stored, by no means of this library."""

    def __init__(self, server: Server | None, folder: Path) -> None:
        self._server = server
        self._folder = folder / "cache"
        self._paths: dict[bytes, Path] = {}
        self._opened: list[Cache] = []

    def cache(self, **options: Any) -> Cache:
        """A cache that he shares the store with."""
        options = {"timeout": PATIENT, "secret_key": SECRET, **options}
        cache = FileCache(self._folder, **options) if self._server is None else RedisCache(self._server.url, **options)
        self._opened.append(cache)
        return cache

    def _path(self, key: bytes) -> Path:
        for path in self._folder.rglob("*"):
            with suppress(FrameError):
                if path.is_file() and (owner := key_of(path.read_bytes())) not in self._paths:
                    self._paths[owner] = path
        return self._paths[key]

    def read(self, key: bytes) -> bytes:
        if self._server is None:
            return self._path(key).read_bytes()
        data: bytes = self._server.command("GET", key)
        return data

    def write(self, key: bytes, data: bytes) -> None:
        """Put *data* there for ever, whatever it says of itself."""
        if self._server is not None:
            self._server.command("SET", key, data)
            return
        path = self._path(key)
        path.unlink()
        path.write_bytes(data)
        path.chmod(0o600)

    async def aclose(self) -> None:
        for cache in self._opened:
            await cache.aclose()


@pytest.fixture(params=["redis", "file"])
async def neighbour(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> AsyncIterator[Neighbour]:
    server.command("FLUSHALL")
    neighbour = Neighbour(server if request.param == "redis" else None, tmp_path)
    yield neighbour
    await neighbour.aclose()


def _head(data: bytes, version: int = 0, **fields: Any) -> bytes:
    """*data* with other fields in its head, and a checksum to match, for what that is worth."""
    head = unpack_head(data)._replace(**fields)
    packed = data[:4] + struct.pack("<BBBB8sdddfHHIII", version or data[4], *head)
    return packed[:60] + struct.pack("<I", crc32(packed[:60])) + data[HEAD_SIZE:]


def _plain(data: bytes, payload: bytes = FORGED, **fields: Any) -> bytes:
    head = unpack_head(data)
    times = {"created": head.created, "fresh_until": head.fresh_until, "keep_until": head.keep_until}
    return pack(key_of(data), payload, **{"token": head.token, "codec": 1, **times, **fields})


def _sealed_otherwise(data: bytes) -> bytes:
    head = unpack_head(data)
    return Seal("the neighbour's own secret, as long as it takes").pack(
        key_of(data), FORGED, token=head.token, created=head.created, fresh_until=math.inf, keep_until=math.inf, codec=1
    )


# What is made of the frame under a key, and of that of another key.
FORGERIES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "edited": lambda one, _: one[:-3] + bytes([one[-3] ^ 1]) + one[-2:],
    "cut": lambda one, _: one[:-1],
    "prolonged": lambda one, _: _head(one, fresh_until=math.inf, keep_until=math.inf),
    "prolonged, its MAC left": lambda one, _: _head(one, fresh_until=math.inf)[:52] + one[52:],
    "made older": lambda one, _: _head(one, created=0.0),
    "another kind": lambda one, _: _head(one, kind=Kind.OVER),
    "another codec": lambda one, _: _head(one, codec=3),
    "another cost": lambda one, _: _head(one, cost=1e9),
    "a flag": lambda one, _: _head(one, flags=1),
    "fewer marks": lambda one, _: _head(one, mark_count=0),
    "marks cut out": lambda one, _: _without_marks(one),
    "the head of another": lambda one, two: two[:HEAD_SIZE] + one[HEAD_SIZE:],
    "the payload of another": lambda one, two: one[: HEAD_SIZE + 60] + two[HEAD_SIZE + 60 :],
    "moved": lambda _, two: two,
    "moved, the key exchanged": lambda one, two: two.replace(key_of(two), key_of(one)),
    "unsealed": lambda one, _: _plain(one),
    "unsealed, for ever": lambda one, _: _plain(one, fresh_until=math.inf, keep_until=math.inf),
    "an unsealed failure": lambda one, _: _plain(one, codec=4),
    "the first version": lambda one, _: _head(one, version=1),
    "a version to come": lambda one, _: one[:4] + b"\x03" + one[5:],
    "sealed with another secret": lambda one, _: _sealed_otherwise(one),
}
# These leave the head as it was, by which a delete counts.
HEAD_STANDS = {"edited", "cut", "the payload of another"}


def _without_marks(data: bytes) -> bytes:
    head, at = unpack_head(data), HEAD_SIZE + len(key_of(data))
    return _head(data[:at] + data[at + 24 * head.mark_count :], mark_count=0)


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_forged_frame_is_a_miss(neighbour: Neighbour, forgery: str, caplog: pytest.LogCaptureFixture) -> None:
    cache, reader = neighbour.cache(), neighbour.cache(l1_max_entries=0)
    await cache.set("one", "kept secret", tags=["t"], ttl=600)
    await cache.set("two", "kept secret", tags=["t"], ttl=6000)
    key, other = cache._key("one"), cache._key("two")
    neighbour.write(key, FORGERIES[forgery](neighbour.read(key), neighbour.read(other)))

    with caplog.at_level(logging.DEBUG):
        assert await reader.get("one") is None
        assert await reader.get_many(["one"]) == {}
        assert await reader.get_entry("one") is None
    assert sum(reader.stats.errors.values()) == 3
    assert caplog.text.count("treated as a miss") == 1
    assert "kept secret" not in caplog.text and "one" not in caplog.text.replace("none", "")
    assert await reader.exists("one") is False
    assert await reader.ttl("one") is None
    assert await reader.touch("one", 60) is False
    listed = {name async for name in reader.keys()}  # noqa: SIM118  # no dict
    assert listed == {"two"}
    assert await reader.delete_many(["one"]) == (forgery in HEAD_STANDS)

    async def load() -> str:
        return "loaded"

    assert await reader.get_or_load("one", load, stale_ttl=600) == "loaded"
    assert await reader.get("one") == "loaded"
    assert await reader.get("two") == "kept secret"


async def test_who_has_a_near_cache_is_not_served_forgeries_either(neighbour: Neighbour) -> None:
    cache = neighbour.cache()
    await cache.set("one", "ours")
    key = cache._key("one")
    good = neighbour.read(key)
    neighbour.write(key, _plain(good))
    assert await neighbour.cache().get("one") is None
    neighbour.write(key, good)
    assert await neighbour.cache().get("one") == "ours"


async def test_a_frame_of_another_tenant_or_namespace_is_a_miss(neighbour: Neighbour) -> None:
    for secret in (SECRET, None):
        cache = neighbour.cache(secret_key=secret, l1_max_entries=0)
        tenants = [cache.with_scope("one"), cache.with_scope("two"), cache.with_namespace("another"), cache]
        for number, tenant in enumerate(tenants):
            await tenant.set("k", f"of {number}")
        keys = [tenant._key("k") for tenant in tenants]
        frames = [neighbour.read(key) for key in keys]
        for place, key in enumerate(keys):
            for frame in frames[:place] + frames[place + 1 :]:
                neighbour.write(key, frame)
                assert await tenants[place].get("k") is None
            neighbour.write(key, frames[place])
        assert [await tenant.get("k") for tenant in tenants] == ["of 0", "of 1", "of 2", "of 3"]
        assert cache.stats.errors == {"wrong-key": 12}


async def test_an_expired_frame_put_back_is_a_miss(neighbour: Neighbour) -> None:
    cache = neighbour.cache(l1_max_entries=0)
    await cache.set("k", "old", ttl=0.4)
    key = cache._key("k")
    old = neighbour.read(key)
    until = unpack_head(old).fresh_until
    await cache.set("k", "new", ttl=60)
    neighbour.read(key)  # the file's name, before it goes
    await poll(lambda: cache.store.now() > until)
    neighbour.write(key, old)
    assert await cache.get("k") is None

    async def fail() -> str:
        raise LookupError("the source is away")

    with pytest.raises(LookupError):  # it may not stand in for longer than its ttl and stale_ttl either
        await cache.get_or_load("k", fail, stale_ttl=600)


async def test_an_old_frame_that_has_not_expired_can_be_put_back(neighbour: Neighbour) -> None:
    """What sealing can't prevent, as SECURITY.md says: the time is bounded by the entry's own, which is sealed."""
    cache = neighbour.cache(l1_max_entries=0)
    await cache.set("k", "old", ttl=600)
    key = cache._key("k")
    old = neighbour.read(key)
    await cache.set("k", "new", ttl=600)
    neighbour.write(key, old)
    assert await cache.get("k") == "old"


async def test_without_the_secret_nothing_sealed_is_read(neighbour: Neighbour) -> None:
    await neighbour.cache().set("k", "kept secret")
    stranger = neighbour.cache(secret_key=None, l1_max_entries=0)
    assert await stranger.get("k") is None
    assert stranger.stats.errors == {"sealed": 1}


# "Decompression bomb, deep nesting, huge value, huge key": a neighbour where there is no secret, or one who has it


BOMBS = {
    "eight MiB of small objects": b"[" + b"{}," * 2_700_000 + b"{}]",
    "eight MiB of small texts": b"[" + b'"",' * 2_700_000 + b'""]',
    "objects behind a text": b'["' + b'\\"' * 100 + b'",' + b"[0]," * 1_000_000 + b"0]",
    "too many bytes": b'"' + b"x" * (8 * 1024 * 1024) + b'"',
}


@pytest.mark.parametrize("bomb", BOMBS)
async def test_a_bomb_is_a_miss_before_it_is_unfolded(
    neighbour: Neighbour, bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = neighbour.cache(secret_key=None, l1_max_entries=0)
    await cache.set("k", "x")
    key = cache._key("k")
    neighbour.write(key, _plain(neighbour.read(key), BOMBS[bomb]))
    unfolded = []
    monkeypatch.setattr("mcp_hub_cache._codec.loads", unfolded.append)
    assert await cache.get("k") is None
    assert await cache.get_many(["k"]) == {}
    assert await cache.exists("k") is False
    assert not unfolded
    assert cache.stats.errors == {"oversized": 3}


async def test_a_deeply_nested_value_is_a_miss(neighbour: Neighbour) -> None:
    cache = neighbour.cache(secret_key=None, l1_max_entries=0)
    await cache.set("k", "x")
    key = cache._key("k")
    for codec in (1, 2):
        neighbour.write(key, _plain(neighbour.read(key), b'["l",' * 50_000 + b"1" + b"]" * 50_000, codec=codec))
        assert await cache.get("k") is None
    assert cache.stats.errors == {"undecodable": 2}


async def test_lengths_that_are_not_there_are_a_miss(neighbour: Neighbour) -> None:
    cache = neighbour.cache(secret_key=None, l1_max_entries=0)
    await cache.set("k", "x")
    key = cache._key("k")
    frame = neighbour.read(key)
    for fields in ({"payload_length": 2**32 - 1}, {"mark_count": 65535}, {"key_length": 65535}):
        neighbour.write(key, _head(frame, **fields))
        assert await cache.get("k") is None
    assert cache.stats.errors == {"truncated": 3}
