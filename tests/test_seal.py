"""Sealed frames: opened by who has the secret, under their own key, as they were written, and else a miss."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_hub_cache import Cache, FileCache, MemoryCache, RedisCache, SettingsError, open_cache
from mcp_hub_cache import _form as form
from mcp_hub_cache._exceptions import StoreUnreachableError
from mcp_hub_cache._frame import HEAD_SIZE, FrameError, Kind, Mark, claim, key_of, pack, peek, placeholder, unpack
from mcp_hub_cache._seal import OVERHEAD, Seal
from mcp_hub_cache._settings import load_settings
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock, FaultyStore
from tests.backends import store_raw, stored
from tests.forks import in_child
from tests.golden import GOLDEN, golden_cases, golden_seal, written

KEY = b"mcp_hub:default:e:plan:42"
SECRET = "correct horse battery staple, and then some"
OTHER = "another secret, of as many characters as it takes"
GOLDENS = sorted(golden_cases("sealed"))
MARKS = (Mark(b"t" * 16, b"m" * 8), Mark(b"u" * 16, b"n" * 8))
SEAL = Seal(SECRET)


def entry(seal: Any = SEAL, key: bytes = KEY, payload: bytes = b"[1,2]", **more: Any) -> bytes:
    fields = {"token": b"12345678", "codec": 1, "created": 1.0, "fresh_until": 2.0, "keep_until": 3.0, **more}
    data: bytes = seal.pack(key, payload, **fields)
    return data


def reason(data: bytes, key: bytes = KEY, seal: Any = SEAL) -> str:
    """Why *data* is not read, by any of the ways there are."""
    assert seal.open_entry(data, key) is None
    with pytest.raises(FrameError) as caught:
        seal.unpack(data, key)
    return caught.value.reason


# The form


def test_every_golden_file_has_its_case() -> None:
    assert sorted(path.name for path in (GOLDEN / "sealed").iterdir()) == GOLDENS


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_sealed_frames_are_read_and_written_for_ever(name: str) -> None:
    data = (GOLDEN / "sealed" / name).read_bytes()
    assert written("sealed", golden_cases("sealed")[name]) == data
    frame = golden_seal().unpack(data, KEY)
    assert frame.payload == (b"" if name == "v2-entry-empty" else b'{"steps":[1,2,3]}')
    assert (frame.head.created, frame.head.cost, frame.head.token) == (1.7e9, 1.25, bytes(range(8)))
    assert frame.head.fresh_until == (1.8e9 if name == "v2-entry-prolonged" else 1.7e9 + 600)
    assert len(frame.marks) == (2 if name == "v2-entry-marks" else 0)


@given(payload=st.binary(max_size=100), key=st.binary(max_size=40), marks=st.sampled_from([(), MARKS]))
def test_what_is_sealed_is_opened(payload: bytes, key: bytes, marks: tuple[Mark, ...]) -> None:
    data = entry(key=key, payload=payload, marks=marks)
    frame = SEAL.unpack(data, key)
    assert (frame.payload, frame.marks, frame.head.kind) == (payload, marks, Kind.ENTRY)
    assert SEAL.verified_head(data[:HEAD_SIZE], key) == frame.head
    opened = SEAL.open_entry(data, key)
    assert opened == (None if marks else (1, 1.0, 2.0, 3.0, 0.0, payload))
    assert len(data) == HEAD_SIZE + len(key) + 24 * len(marks) + len(payload) + OVERHEAD


def test_two_frames_of_the_same_have_nothing_in_common_but_what_they_say() -> None:
    one, two = entry(), entry()
    at = HEAD_SIZE + len(KEY)
    assert one[:at] == two[:at]
    assert not {one[n : n + 4] for n in range(at, len(one) - 3)} & {two[n : n + 4] for n in range(at, len(two) - 3)}


def test_stores_read_of_a_sealed_frame_what_they_read_of_any() -> None:
    data = entry(marks=MARKS)
    head = peek(data)
    assert head is not None and head == SEAL.unpack(data, KEY).head
    assert claim(data) == (Kind.ENTRY, 3.0, len(data))
    assert key_of(data) == KEY


# What is not believed


@pytest.mark.parametrize("marks", [(), MARKS])
def test_every_flipped_bit_is_a_miss(marks: tuple[Mark, ...]) -> None:
    data = entry(marks=marks)
    for place in range(len(data)):
        for bit in range(8):
            flipped = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
            assert reason(flipped) in {"foreign", "newer", "corrupt", "wrong-key", "forged", "truncated"}
            if place < HEAD_SIZE:
                with pytest.raises(FrameError):
                    SEAL.verified_head(flipped[:HEAD_SIZE], KEY)


@given(st.data())
def test_whatever_else_is_done_to_a_frame_makes_a_miss(data: st.DataObject) -> None:
    one = entry(payload=b"one" * 5)
    two = entry(payload=b"two" * 5, token=b"abcdefgh", fresh_until=9.0, keep_until=9.0)
    cut = data.draw(st.integers(0, len(one)))
    edited = data.draw(
        st.one_of(
            st.just(one[:cut] + two[cut:]),  # spliced
            st.just(one[:cut]),
            st.builds(lambda extra: one + extra, st.binary(min_size=1, max_size=50)),
            st.builds(lambda part: one[:cut] + part + one[cut + len(part) :], st.binary(min_size=1, max_size=30)),
        )
    )
    if edited not in {one, two}:
        assert reason(edited)


def test_the_times_can_not_be_moved_by_any_of_the_heads_that_go_around() -> None:
    """A head of the same frame under other times passes (see SECURITY.md); one of any other frame does not."""
    data, later = entry(), entry(fresh_until=math.inf, keep_until=math.inf, token=b"abcdefgh")
    assert reason(later[:HEAD_SIZE] + data[HEAD_SIZE:]) == "forged"
    plain = pack(KEY, b"[1,2]", token=b"12345678", created=1.0, fresh_until=math.inf, keep_until=math.inf)
    assert reason(plain[:HEAD_SIZE] + data[HEAD_SIZE:]) in {"truncated", "corrupt", "unsealed"}


def test_a_frame_moved_to_another_key_is_a_miss() -> None:
    data = entry()
    assert reason(data, b"mcp_hub:default:e:plan:43") == "wrong-key"
    moved = data[:HEAD_SIZE] + b"mcp_hub:default:e:plan:43" + data[HEAD_SIZE + len(KEY) :]
    assert reason(moved, b"mcp_hub:default:e:plan:43") == "forged"


def test_marks_can_be_neither_taken_away_nor_exchanged() -> None:
    data, at = entry(marks=MARKS), HEAD_SIZE + len(KEY)
    assert reason(data[:at] + data[at + 24 : at + 48] + data[at : at + 24] + data[at + 48 :]) == "forged"
    assert reason(data[: at + 16] + b"valid_it" + data[at + 24 :]) == "forged"
    assert reason(data[:at] + data[at + 48 :]) == "truncated"


def test_an_unsealed_entry_is_a_miss_and_what_is_never_sealed_is_read() -> None:
    fields: dict[str, Any] = {"token": b"12345678", "created": 1.0, "fresh_until": 2.0, "keep_until": 3.0}
    plain = pack(KEY, b"[1]", codec=1, **fields)
    assert reason(plain) == "unsealed"
    with pytest.raises(FrameError, match="unsealed"):
        SEAL.verified_head(plain[:HEAD_SIZE], KEY)
    planted = placeholder(KEY, b"12345678", 1.0, 9.0)
    assert SEAL.unpack(planted, KEY) == unpack(planted, KEY)
    assert SEAL.verified_head(planted, KEY).kind == Kind.PLACEHOLDER


def test_to_who_has_no_secret_a_sealed_frame_is_no_frame() -> None:
    with pytest.raises(FrameError, match="sealed"):
        unpack(entry(), KEY)
    with pytest.raises(FrameError, match="sealed"):
        form.form_of(None, None).verified_head(entry(), KEY)
    assert form.form_of(None, None).open_entry(entry(), KEY) is None


# Secrets


def test_another_secret_opens_nothing_and_the_previous_one_does() -> None:
    assert reason(entry(), seal=Seal(OTHER)) == "forged"
    both = Seal(OTHER, SECRET)
    assert both.unpack(entry(), KEY).payload == b"[1,2]"
    assert both.open_entry(entry(), KEY) is not None
    assert Seal(OTHER).unpack(entry(both), KEY).payload == b"[1,2]"
    assert reason(entry(both)) == "forged"  # sealed with the new one


def test_a_new_head_is_made_by_what_the_payload_was_sealed_with() -> None:
    data, both = entry(), Seal(OTHER, SECRET)
    frame = both.unpack(data, KEY)
    head = both.prolonged(KEY, frame, fresh_until=8.0, keep_until=9.0)
    assert both.unpack(head + data[HEAD_SIZE:], KEY).head == frame.head._replace(fresh_until=8.0, keep_until=9.0)
    again = both.retimed(head, KEY, created=0.5, fresh_until=1.5, keep_until=2.5)
    assert both.open_entry(again + data[HEAD_SIZE:], KEY) == (1, 0.5, 1.5, 2.5, 0.0, b"[1,2]")
    with pytest.raises(FrameError, match="forged"):
        Seal(OTHER).retimed(data, KEY, created=0.5, fresh_until=1.5, keep_until=2.5)
    planted = placeholder(KEY, b"12345678", 1.0, 9.0)
    assert SEAL.retimed(planted[:HEAD_SIZE], KEY, created=1.0, fresh_until=10.0, keep_until=10.0) == planted[:HEAD_SIZE]


def test_a_forked_child_seals_with_other_keys_than_its_parent() -> None:
    at, (reading, writing) = HEAD_SIZE + len(KEY), os.pipe()
    for _ in range(2):
        in_child(lambda: os.write(writing, entry()[at : at + 24]))
    salts = {entry()[at : at + 24], os.read(reading, 24), os.read(reading, 24)}
    os.close(reading)
    os.close(writing)
    assert len(salts) == 3


@pytest.mark.parametrize("make", [MemoryCache, FileCache, RedisCache])
def test_a_secret_that_is_none_is_refused_at_once_and_not_shown(make: Any) -> None:
    with pytest.raises(ValueError, match="at least 32 characters, and has 31") as caught:
        make(secret_key="s" * 31)
    assert "s" * 31 not in str(caught.value)
    with pytest.raises(TypeError, match="must be a str, not bytes"):
        make(secret_key=SECRET.encode())
    with pytest.raises(ValueError, match="at least 32 characters"):
        make(secret_key="")
    with pytest.raises(ValueError, match="without a secret_key"):
        make(previous_secret_key=SECRET)


def test_settings_hold_secrets_and_show_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_SECRET_KEY_PREVIOUS", OTHER)
    with pytest.raises(SettingsError, match="CACHE_SECRET_KEY is not") as caught:
        load_settings()
    assert OTHER not in str(caught.value)
    monkeypatch.setenv("CACHE_SECRET_KEY", SECRET)
    settings = load_settings()
    cache = open_cache(settings)
    for shown in (repr(settings), str(settings), repr(cache), repr(cache._engine.form), repr(vars(cache))):
        assert SECRET not in shown and OTHER not in shown
    assert entry(cache._engine.form, payload=b"x") and type(cache._engine.form) is Seal
    assert cache._engine.form.unpack(entry(Seal(OTHER)), KEY).payload == b"[1,2]"


def test_a_secret_without_cryptography_is_an_error_that_names_the_cure() -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from mcp_hub_cache import MemoryCache, SettingsError\n"
        "MemoryCache()\n"
        f"try: MemoryCache(secret_key={SECRET!r})\n"
        "except SettingsError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "pip install 'mcp-hub-cache[crypto]'" in told.stdout
    assert SECRET not in told.stdout + told.stderr


# Caches


async def test_what_is_cached_is_not_to_be_read_in_the_store() -> None:
    store = MemoryStore()
    cache, thief = Cache(store, secret_key=SECRET), Cache(store)
    await cache.set("k", {"password": "a value to be kept secret"}, tags=["t"])
    await cache.set("l", "a value to be kept secret", ttl=60)
    for key in ("k", "l"):
        data = await stored(cache, key)
        assert data is not None and b"kept secret" not in data and data[4] == 2
        assert await thief.get(key) is None
    assert thief.stats.errors == {"sealed": 2}
    assert await cache.get("k") == {"password": "a value to be kept secret"}
    assert await cache.get_many(["k", "l"]) == {
        "k": {"password": "a value to be kept secret"},
        "l": "a value to be kept secret",
    }
    assert {key async for key in cache.keys("")} == {"k", "l"}
    assert await cache.exists("l") and await cache.touch("l", 600)
    assert 500 < (await cache.ttl("l") or 0) <= 600
    assert await cache.get("l") == "a value to be kept secret"
    assert await cache.delete_many(["k", "l", "m"]) == 2
    assert cache.stats.errors == {}


async def test_keys_and_deletes_count_what_can_be_read_alone() -> None:
    store = MemoryStore()
    cache = Cache(store, secret_key=SECRET, l1_max_entries=0)
    await Cache(store).set("plain", 1)
    await Cache(store, secret_key=OTHER).set("another's", 1)
    await cache.set("ours", 1)
    assert [key async for key in cache.keys("")] == ["ours"]
    assert (await cache.status()).total_keys == 1
    assert not await cache.exists("plain") and not await cache.exists("another's")
    assert cache.stats.errors == {"unsealed": 1, "forged": 1}
    assert await cache.delete_many(["plain", "another's", "ours"]) == 1


@pytest.mark.parametrize("size", [100, 10_000, 900_000])
@pytest.mark.parametrize("value", ["x", b"x", ["x"]])
async def test_any_value_comes_back(size: int, value: Any) -> None:
    cache = MemoryCache(secret_key=SECRET, l1_max_entries=0)
    await cache.set("k", value * size)
    assert await cache.get("k") == value * size
    assert (await cache.get_entry("k")).value == value * size  # type: ignore[union-attr]


async def test_stale_failures_tags_and_not_modified_work_under_a_seal() -> None:
    clock = FakeClock()
    cache = Cache(MemoryStore(clock=clock), secret_key=SECRET)

    async def fail() -> int:
        raise LookupError("gone")

    async def five() -> int:
        return 5

    from mcp_hub_cache import current_entry

    async def unchanged() -> Any:
        return current_entry().not_modified()

    for _ in range(2):
        with pytest.raises(LookupError, match="gone"):
            await cache.get_or_load("failure", fail, cache_errors={LookupError: 60})
    assert cache.stats.load_errors == 1
    assert await cache.get_or_load("k", five, ttl=10, stale_ttl=100, tags=["t"]) == 5
    clock.advance(20)
    assert await cache.get_or_load("k", fail, ttl=10, stale_ttl=100, throttle=0, tags=["t"]) == 5
    clock.advance(20)
    assert await cache.get_or_load("k", unchanged, ttl=10, stale_ttl=100, tags=["t"]) == 5
    assert await cache.get("k") == 5
    await cache.invalidate("t")
    assert await cache.get("k") is None
    assert cache.stats.errors == {}


async def test_fifty_who_wait_share_one_opening() -> None:
    """L1 and flights hold what was opened: a hit in memory costs no more than without a secret."""
    store = MemoryStore()
    cache = Cache(store, secret_key=SECRET)
    await cache.set("k", {"a": 1})
    opened = []
    cache._reads._unpack = lambda *args: opened.append(args) or SEAL.unpack(*args)  # type: ignore[assignment,func-returns-value]
    assert await asyncio.gather(*(cache.get("k") for _ in range(50))) == [{"a": 1}] * 50
    assert len(opened) == 1


async def test_rotation_keeps_what_there_is() -> None:
    store = MemoryStore()
    await Cache(store, secret_key=SECRET).set("k", "old")
    cache = Cache(store, secret_key=OTHER, previous_secret_key=SECRET)
    assert await cache.get("k") == "old"
    assert await cache.touch("k", 60)
    assert await cache.get("k") == "old"
    await cache.set("l", "new")
    after = Cache(store, secret_key=OTHER)
    assert (await after.get("k"), await after.get("l")) == (None, "new")


async def test_the_standby_serves_what_it_had_to_cut() -> None:
    """Its times are cut to the standby's ttl, which takes a new head: made by the cache that has the secret."""
    clock = FakeClock()
    primary = FaultyStore(MemoryStore(clock=clock))
    store = FailoverStore(primary, MemoryStore(clock=clock), failures=1, standby_ttl=30.0, clock=clock)
    cache = Cache(store, secret_key=SECRET, l1_max_entries=0)
    primary.break_down(StoreUnreachableError("down"))
    assert await cache.get("k") is None
    await cache.set("k", "kept", ttl=600)
    assert await cache.get("k") == "kept"
    assert await cache.ttl("k") == 30
    assert cache.stats.errors.get("forged") is None
    await cache.aclose()


async def test_two_tenants_frames_exchanged_are_misses_with_a_secret_and_without() -> None:
    for secret in (None, SECRET):
        cache = MemoryCache(secret_key=secret)
        one, two = cache.with_scope("one"), cache.with_scope("two")
        await one.set("k", "of one")
        await two.set("k", "of two")
        frames = [await stored(tenant, "k") for tenant in (one, two)]
        for tenant, frame in zip((two, one), frames, strict=True):
            assert frame is not None
            await store_raw(tenant, "k", frame)
        assert [await one.get("k"), await two.get("k")] == [None, None]
        assert cache.stats.errors == {"wrong-key": 2}
