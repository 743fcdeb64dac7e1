"""Limits: what is too large is refused before it is sent, by an error that names the limit, and else read again."""

from __future__ import annotations

import logging
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_hub_cache import Cache, InvalidKeyError, MemoryCache, ValueTooLargeError, open_cache
from mcp_hub_cache._codec import Limits, has_more_items
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FaultyStore

JSON = st.recursive(
    st.none() | st.integers(0, 9) | st.text(alphabet='a,"[{\\\n]', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='a,"{\\', max_size=4), inner),
    max_leaves=30,
)


def items(value: Any) -> int:
    """Containers, and items but for the first of each."""
    if not isinstance(value, list | dict):
        return 0
    inner = value if isinstance(value, list) else list(value.values())
    return 1 + max(0, len(inner) - 1) + sum(map(items, inner))


@given(JSON, st.integers(0, 40))
def test_items_are_counted_without_making_any(value: Any, most: int) -> None:
    assert has_more_items(orjson.dumps(value), most) is (items(value) > most)


def test_a_text_that_is_cut_between_slices_is_counted_as_one() -> None:
    text = "[,{" * 100_000
    for filling in range(4):
        value = ["x" * filling, text, [1, 2], 'a"b' * 30_000, [3]]
        assert not has_more_items(orjson.dumps(value), 8)
        assert has_more_items(orjson.dumps(value), 7)


@pytest.mark.parametrize(
    ("options", "value", "limit"),
    [
        ({"max_value_bytes": 99}, "x" * 98, "max_value_bytes (CACHE_MAX_VALUE_BYTES)"),
        ({"max_value_bytes": 99}, b"x" * 100, "max_value_bytes (CACHE_MAX_VALUE_BYTES)"),
        ({"max_value_items": 99}, [0] * 100, "max_value_items (CACHE_MAX_VALUE_ITEMS)"),
        ({"max_value_items": 99}, [{}] * 50, "max_value_items (CACHE_MAX_VALUE_ITEMS)"),
        ({"max_value_items": 99}, {(1, 2)} | {*range(100)}, "max_value_items (CACHE_MAX_VALUE_ITEMS)"),
        ({}, [[]] * 1_000_000, "more than 1,000,000 items"),
        ({}, "x" * (8 * 1024 * 1024), "at most 8,388,608"),
    ],
)
async def test_what_is_too_large_is_refused_before_it_is_sent(options: Any, value: Any, limit: str) -> None:
    store = FaultyStore(MemoryStore())
    cache = Cache(store, **options)
    for write in (cache.set("k", value), cache.set_many({"a": 1, "k": value}), cache.add("k", value)):
        with pytest.raises(ValueTooLargeError) as caught:
            await write
        assert limit in str(caught.value) and "xx" not in str(caught.value)
    assert store.calls == {}


@pytest.mark.parametrize("value", [["," * 200, "[{" * 200], "," * 200, b"[,{" * 200, [0] * 90])
async def test_what_is_in_texts_and_bytes_is_no_item(value: Any) -> None:
    cache = MemoryCache(max_value_items=99, l1_max_entries=0)
    await cache.set("k", value)
    assert await cache.get("k") == value


@pytest.mark.parametrize("secret", [None, "a secret of more than thirty-two characters"])
async def test_limits_hold_for_what_is_read(secret: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """What another process with wider limits has stored is a miss, and no error; so is what a neighbour has."""
    store = MemoryStore()
    wide = Cache(store, secret_key=secret)
    await wide.set("items", [0] * 200)
    await wide.set("bytes", "x" * 200_000)
    narrow = Cache(store, secret_key=secret, max_value_items=99, max_value_bytes=100_000, l1_max_entries=0)
    with caplog.at_level(logging.WARNING):
        assert await narrow.get("items") is None
        assert await narrow.get_many(["items", "bytes"]) == {}
    assert narrow.stats.errors == {"oversized": 3}
    assert caplog.text.count("is oversized; treated as a miss") == 2
    assert await wide.get("items") == [0] * 200


async def test_an_error_too_large_to_be_cached_is_raised_all_the_same() -> None:
    cache = MemoryCache(max_value_bytes=1000)

    async def fail() -> None:
        raise LookupError("x" * 2000)

    for _ in range(2):
        with pytest.raises(LookupError):
            await cache.get_or_load("k", fail, cache_errors={LookupError: 60})
    assert cache.stats.errors == {"uncacheable": 2}


async def test_a_key_too_long_is_refused_before_it_is_sent() -> None:
    store = FaultyStore(MemoryStore())
    cache = Cache(store, max_key_length=9)
    for call in (cache.get("k" * 10), cache.set("k" * 10, 1), cache.delete("k" * 10)):
        with pytest.raises(InvalidKeyError, match="at most 9 characters"):
            await call
    assert store.calls == {}


def test_limits_by_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_MAX_VALUE_BYTES", "1MiB")
    monkeypatch.setenv("CACHE_MAX_VALUE_ITEMS", "1000")
    assert open_cache(cache_backend="memory")._engine.limits == Limits(1024 * 1024, 1000)
