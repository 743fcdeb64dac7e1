"""The frame: read for ever, and never believed when anything about it is wrong."""

from __future__ import annotations

import math
import struct
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_hub_cache._frame import (
    HEAD_SIZE,
    TOKEN,
    Frame,
    FrameError,
    Kind,
    Mark,
    claim,
    is_live,
    key_of,
    open_entry,
    pack,
    patch_head,
    peek,
    placeholder,
    sums,
    unpack,
    unpack_head,
)
from tests.golden import GOLDEN, golden_cases, written

KEY = b"mcp_hub:default:e:plan:42"
GOLDENS = sorted(golden_cases("frames"))


def golden(name: str) -> bytes:
    return (GOLDEN / "frames" / name).read_bytes()


def entry(key: bytes = KEY, payload: bytes = b"[1,2]", **more: Any) -> bytes:
    return pack(key, payload, **{"token": b"12345678", "created": 1.0, "fresh_until": 2.0, "keep_until": 3.0, **more})


def test_every_golden_file_has_its_case() -> None:
    assert sorted(path.name for path in (GOLDEN / "frames").iterdir()) == GOLDENS


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_frames_are_read_and_written_for_ever(name: str) -> None:
    data = golden(name)
    frame = unpack(data, KEY)
    assert written("frames", golden_cases("frames")[name]) == data
    assert frame.head.token == bytes(range(8)) == data[TOKEN]
    assert frame.head.created == 1.7e9
    assert key_of(data) == KEY


def test_what_golden_frames_say() -> None:
    frame = unpack(golden("v1-entry-marks"), KEY)
    assert frame.marks == (Mark(b"t" * 16, b"m" * 8), Mark(bytes(16), b"\xff" * 8))
    assert bytes(frame.payload) == b'{"steps":[1,2,3]}'
    assert (frame.head.kind, frame.head.codec, frame.head.cost) == (Kind.ENTRY, 1, 1.25)
    patched = unpack(golden("v1-entry-patched"), KEY)
    assert (patched.head.fresh_until, patched.head.keep_until) == (1.8e9, math.inf)
    planted = unpack(golden("v1-placeholder"), KEY)
    assert (planted.head.kind, planted.head.keep_until, bytes(planted.payload)) == (Kind.PLACEHOLDER, 1.7e9 + 15, b"")


@pytest.mark.parametrize("name", GOLDENS)
def test_every_flipped_bit_is_a_frame_error(name: str) -> None:
    data = bytearray(golden(name))
    for position in range(len(data) * 8):
        data[position // 8] ^= 1 << position % 8
        with pytest.raises(FrameError):
            unpack(bytes(data), KEY)
        assert open_entry(bytes(data), KEY) is None
        if position < HEAD_SIZE * 8:
            assert peek(bytes(data)) is None
        data[position // 8] ^= 1 << position % 8


@pytest.mark.parametrize("name", GOLDENS)
def test_every_truncation_and_extension_is_a_frame_error(name: str) -> None:
    data = golden(name)
    for length in range(len(data)):
        with pytest.raises(FrameError):
            unpack(data[:length], KEY)
        assert open_entry(data[:length], KEY) is None
    for more in (b"\0", data):
        with pytest.raises(FrameError):
            unpack(data + more, KEY)
        assert open_entry(data + more, KEY) is None


@pytest.mark.parametrize("key", [b"", KEY[:-1], KEY + b"3", b"mcp_hub:default:e:plan:43", KEY.upper()])
def test_another_key_is_a_frame_error(key: bytes) -> None:
    with pytest.raises(FrameError) as caught:
        unpack(entry(), key)
    assert caught.value.reason == "wrong-key"
    assert open_entry(entry(), key) is None


@pytest.mark.parametrize(("offset", "value"), [(4, 3), (4, 0), (4, 255), (7, 1), (7, 128)])
def test_a_newer_version_or_an_unknown_flag_is_a_frame_error(offset: int, value: int) -> None:
    data = bytearray(entry())
    data[offset] = value
    data[60:64] = struct.pack("<I", crc32(data[:60]))
    with pytest.raises(FrameError) as caught:
        unpack(bytes(data), KEY)
    assert caught.value.reason == "newer"
    assert open_entry(bytes(data), KEY) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "foreign"),
        (b"x" * 200, "foreign"),
        (b"\x89MHC", "truncated"),
        (b"\x89MHC" + bytes(60), "corrupt"),
        # Short, but followed by their own crc as a whole head is.
        *(
            (data + struct.pack("<I", crc32(data)), "truncated")
            for data in (b"\x89MHC\x01", entry()[:58], entry()[:59])
        ),
        (bytes(200) + struct.pack("<I", crc32(bytes(200))), "foreign"),
    ],
)
def test_reasons(data: bytes, reason: str) -> None:
    for read in (lambda: unpack(data, KEY), lambda: unpack_head(data), lambda: unpack_head(memoryview(data))):
        with pytest.raises(FrameError) as caught:
            read()
        assert caught.value.reason == reason
    assert peek(data) is None


@given(st.binary(max_size=300))
def test_random_bytes_are_frame_errors(data: bytes) -> None:
    for candidate in (data, b"\x89MHC\x01" + data):
        with pytest.raises(FrameError):
            unpack(candidate, KEY)
        assert open_entry(candidate, KEY) is None


times = st.floats(allow_nan=False)


@given(
    key=st.binary(max_size=80),
    payload=st.binary(max_size=200),
    token=st.binary(min_size=8, max_size=8),
    created=times,
    fresh_until=times,
    keep_until=times,
    kind=st.sampled_from(Kind),
    codec=st.integers(0, 255),
    cost=st.floats(0, 1e6, width=32),
    marks=st.lists(st.builds(Mark, st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8)), max_size=3),
)
def test_what_is_packed_is_unpacked(key: bytes, payload: bytes, marks: list[Mark], **fields: Any) -> None:
    data = pack(key, payload, marks=tuple(marks), **fields)
    frame: Frame = unpack(data, key)
    assert {name: getattr(frame.head, name) for name in fields} == fields
    assert (bytes(frame.payload), frame.marks, key_of(data)) == (payload, tuple(marks), key)
    assert unpack_head(data) == unpack_head(data[:HEAD_SIZE]) == frame.head == peek(data)
    short = None
    if fields["kind"] == Kind.ENTRY and not marks:
        short = (*(fields[name] for name in ("codec", "created", "fresh_until", "keep_until", "cost")), payload)
    assert open_entry(data, key) == short


def test_what_is_large_is_left_to_be_unpacked_without_a_copy() -> None:
    data = entry(payload=b"x" * 10_000)
    assert open_entry(data, KEY) is None
    assert type(unpack(data, KEY).payload) is memoryview


@given(payload=st.binary(max_size=100), fresh_until=times, keep_until=times)
def test_a_patched_head_fits_the_same_body(payload: bytes, fresh_until: float, keep_until: float) -> None:
    data = entry(payload=payload)
    head = patch_head(unpack_head(data), fresh_until=fresh_until, keep_until=keep_until)
    frame = unpack(head + data[HEAD_SIZE:], KEY)
    assert len(head) == HEAD_SIZE
    assert frame.head == unpack_head(data)._replace(fresh_until=fresh_until, keep_until=keep_until)
    assert bytes(frame.payload) == payload


def test_liveness() -> None:
    head = unpack_head(entry(keep_until=3.0))
    assert is_live(head, 2.9)
    assert not is_live(head, 3.0)
    assert not is_live(None, 0.0)
    assert is_live(unpack_head(entry(keep_until=math.inf)), 1e300)


@pytest.mark.parametrize(
    "more", [{"key": bytes(65_536)}, {"token": b"short"}, {"marks": (Mark(bytes(16), bytes(8)),) * 65_536}]
)
def test_what_the_format_can_not_say_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no frame can hold"):
        entry(**more)


def test_key_of_needs_the_whole_key() -> None:
    data = entry()
    with pytest.raises(FrameError):
        key_of(data[: HEAD_SIZE + 3])
    assert key_of(placeholder(KEY, b"12345678", 1.0, 2.0)) == KEY


@pytest.mark.parametrize("step", [1, 7, 64, 4096])
def test_a_checksum_had_in_steps_is_the_same(step: int) -> None:
    data = entry(payload=bytes(range(256)) * 3)
    *_, summed = sums(data, step)
    assert unpack(data, KEY, summed) == unpack(data, KEY)
    with pytest.raises(FrameError, match="corrupt"):
        unpack(data, KEY, summed ^ 1)


def test_a_claim_is_what_the_head_says() -> None:
    data = entry(kind=Kind.MARK, marks=(Mark(b"t" * 16, b"m" * 8),))
    said = claim(data)
    assert said is not None
    assert (said.kind, said.keep_until, said.size) == (Kind.MARK, 3.0, len(data))
    assert claim(data[:HEAD_SIZE]) == said
    assert claim(data[: HEAD_SIZE - 1]) is None
    assert claim(b"\0" + data[1:]) is None
    assert claim(data[:4] + b"\x03" + data[5:]) is None
