r"""The frame: the one stored form of everything, the same bytes in a file, in Redis and in memory.

Strategy: a head of fixed size, then the full key, the tag marks and the payload.

    offset  size  field
    0       4     magic b"\x89MHC"
    4       1     version
    5       1     kind (``Kind``)
    6       1     codec (``_codec``)
    7       1     flags (none defined in version 1: a set flag is a frame from the future)
    8       8     token, random, new with every write
    16      8     created        f64, seconds of the store's clock since the epoch
    24      8     fresh_until    f64, inf: for ever
    32      8     keep_until     f64, inf: for ever
    40      4     load cost      f32, seconds the loader took; 0: unknown
    44      2     key length
    46      2     mark count
    48      4     payload length
    52      4     expanded length (equals payload length where nothing is compressed)
    56      4     crc32 of everything behind the head
    60      4     crc32 of the head's first 60 bytes
    64            key, then marks of 24 bytes each (16: digest of the tag, 8: its mark), then the payload

Version 2 is a sealed entry (``_seal``). It differs in two places, so that whoever moves frames need not know:

    52      12    MAC of the head's first 52 bytes and of the key, in place of the last three fields
    behind the marks: a salt of 24 bytes, the payload encrypted, its tag of 16; the payload length counts them all

Rules:
- All integers and floats are little-endian.
- The body's checksum leaves the head out, so that ``touch`` and "not modified" rewrite 64 bytes alone.
- The full key stands in the frame: bytes that are read under another key than their own are a miss, whatever
  driver, proxy or other writer mixed them up.
- Stores rely on four facts only, exported here: ``HEAD_SIZE``, ``TOKEN``, ``peek``, and ``claim`` where nothing need be
  verified. Of a sealed frame they take what the head says: without the secret it can't be verified, and nothing that is
  served hangs on it.
- This module is the form (``_form``) of what is not sealed: to it, a sealed frame is no frame.
- Whatever does not parse raises ``FrameError``; the engine makes that a miss. A version is never changed: a new one is
  added, and golden frames of every version stay in the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple
from zlib import crc32

from ._tokens import TOKEN_SIZE

MAGIC: Final = b"\x89MHC"
VERSION: Final = 1
SEALED: Final = 2  # the version of a sealed frame
HEAD_SIZE: Final = 64
TOKEN: Final = slice(8, 16)
MAX_KEY_BYTES: Final = 0xFFFF
MAX_MARKS: Final = 0xFFFF

_START: Final = MAGIC + bytes([VERSION])
SEALED_START: Final = MAGIC + bytes([SEALED])
_FIELDS: Final = "BBB8sdddfHHIII"  # kind and what follows, to the body's crc; the crc of these 60 bytes comes behind
_HEAD: Final = struct.Struct("<5s" + _FIELDS)
_CRC: Final = struct.Struct("<I")
_CLAIM: Final = struct.Struct("<5sB26xd4xHHI")  # of the same: kind, keep_until, and what tells the size
_unpack_fields: Final = struct.Struct("<5x" + _FIELDS).unpack_from
_unpack_entry: Final = struct.Struct("<6sBB8xdddfHHI4xI4x").unpack  # of the same: what a read asks, and no more
_make: Final = tuple.__new__  # a NamedTuple's own constructor is Python: 0.4 µs instead of 0.2
MARK_SIZE: Final = 24
COPIED: Final = 8192  # bytes of a frame up to which its parts are copied
_MAX_U32: Final = 0xFFFF_FFFF

# The crc32 of any bytes followed by their own little-endian crc32 is this constant (the "residue" of CRC-32, ISO 3309),
# so a head is checked in one call, without slicing off its last field.
_RESIDUE: Final = 0x2144_DF1C


class Kind(IntEnum):
    """What a frame is. Part of the stored format: values are never reused."""

    ENTRY = 1
    PLACEHOLDER = 2  # a load in progress: fence and lease in one
    MARK = 3  # a tag's current mark
    OVER = 4  # a load ended without a value: nobody need wait for it, or try again, while this stands
    JOURNAL = 5  # a delete that a primary has still to see


_ENTRY_START: Final = _START + bytes([Kind.ENTRY])


class FrameError(ValueError):
    """Bytes that are no frame of this key.

    ``reason`` is one of foreign, truncated, newer, corrupt, wrong-key; sealed: and no secret was given; and where one
    was, unsealed, or forged: edited, moved, or sealed with another secret. Readers add oversized: beyond their limits.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Head(NamedTuple):
    """The fields of a head. Times are seconds of the store's clock since the epoch; ``math.inf``: for ever."""

    kind: int
    codec: int
    flags: int
    token: bytes
    created: float
    fresh_until: float
    keep_until: float
    cost: float
    key_length: int
    mark_count: int
    payload_length: int
    expanded_length: int
    body_crc: int


class Mark(NamedTuple):
    """One tag that an entry was written under, and the tag's mark at that time."""

    tag: bytes
    mark: bytes


LONGEST_FRONT: Final = HEAD_SIZE + MAX_KEY_BYTES + MARK_SIZE * MAX_MARKS
"""Bytes that may stand in front of a payload."""


class Claim(NamedTuple):
    """What a head says, unverified. ``size``: of the whole frame."""

    kind: int
    keep_until: float
    size: int


class Frame(NamedTuple):
    """A whole frame, verified. A large payload is a view into the bytes it was read from: no copy.

    ``sealed_by``: what it was sealed by, for who gives it a new head.
    """

    head: Head
    marks: tuple[Mark, ...]
    payload: bytes | memoryview
    sealed_by: object | None = None


def pack(
    key: bytes,
    payload: bytes,
    *,
    token: bytes,
    created: float,
    fresh_until: float,
    keep_until: float,
    kind: Kind = Kind.ENTRY,
    codec: int = 0,
    cost: float = 0.0,
    marks: tuple[Mark, ...] = (),
    summed: int | None = None,
) -> bytes:
    """Return the bytes to store under *key*.

    Args:
        key: The full store key, at most 65,535 bytes.
        payload: The encoded value, less than 4 GiB.
        token: 8 random bytes, new with every write.
        created: When the value came to be, in the store's time.
        fresh_until: End of freshness.
        keep_until: When the store may drop it; never before *fresh_until*.
        kind: What the frame is.
        codec: How the payload is encoded.
        cost: Seconds the load took; 0 if unknown.
        marks: Tag digests of 16 bytes with marks of 8.
        summed: The last of ``sums_to_pack``, where that was had in steps.

    Raises:
        ValueError: A part is longer than the format can say.
    """
    size, key_length, mark_count = len(payload), len(key), len(marks)
    if key_length > MAX_KEY_BYTES or mark_count > MAX_MARKS or size > _MAX_U32 or len(token) != TOKEN_SIZE:
        raise ValueError(f"no frame can hold a key of {key_length} bytes, {mark_count} marks and {size} of payload")
    front = join_front(key, marks) if marks else key
    head = _HEAD.pack(
        _START, kind, codec, 0, token, created, fresh_until, keep_until, cost, key_length, mark_count, size, size,
        crc32(payload, crc32(front)) if summed is None else summed,
    )  # fmt: skip
    return b"".join((head, _CRC.pack(crc32(head)), front, payload))


def sums_to_pack(key: bytes, payload: bytes, marks: tuple[Mark, ...], step: int) -> Iterator[int]:
    """Yield the checksum that ``pack`` takes, *step* bytes further each time: the last is all."""
    total, view = crc32(join_front(key, marks)), memoryview(payload)
    for start in range(0, len(payload), step):
        total = crc32(view[start : start + step], total)
        yield total


def join_front(key: bytes, marks: tuple[Mark, ...]) -> bytes:
    """Return what stands between the head and the payload."""
    return b"".join((key, *(part for mark in marks for part in mark)))


def _fault(data: bytes | memoryview) -> str:
    """Why *data* begins with no head of this version."""
    if data[:4] != MAGIC:
        return "foreign"
    if len(data) < HEAD_SIZE:
        return "truncated"
    if data[:5] == SEALED_START:
        return "sealed"
    return "corrupt" if crc32(data[:HEAD_SIZE]) != _RESIDUE else "newer"


def unpack_head(data: bytes | memoryview) -> Head:
    """Return the head of *data*, which may be the head alone or a whole frame; verified unless it is sealed.

    Raises:
        FrameError: Not a head, or one of a version that this code does not know.
    """
    front = data[:HEAD_SIZE]
    if len(front) == HEAD_SIZE and front[:5] == SEALED_START:
        return sealed_head(front)
    if len(front) < HEAD_SIZE or crc32(front) != _RESIDUE or front[:5] != _START:
        raise FrameError(_fault(data))
    head = _make(Head, _unpack_fields(front))
    if head.flags:
        raise FrameError("newer")
    return head


def sealed_head(front: bytes | memoryview) -> Head:
    """Return what a sealed head says, unverified."""
    fields = _unpack_fields(front)
    if fields[2]:
        raise FrameError("newer")
    return _make(Head, (*fields[:11], fields[10], 0))


def verified_head(data: bytes, key: bytes) -> Head:  # noqa: ARG001  # a sealed one takes the key to be verified
    """Return the verified head of *data*, which stands under *key*.

    Raises:
        FrameError: As ``unpack_head``; or it is sealed.
    """
    if data[:5] == SEALED_START:
        raise FrameError(_fault(data))
    return unpack_head(data)


def sums(data: bytes, step: int) -> Iterator[int]:
    """Yield the checksum of what stands behind the head of *data*, *step* bytes further each time: the last is all."""
    view, total = memoryview(data), 0
    for start in range(HEAD_SIZE, len(data), step):
        total = crc32(view[start : start + step], total)
        yield total


def unpack(data: bytes, key: bytes, summed: int | None = None) -> Frame:
    """Return the verified frame that *data* holds for *key*.

    Args:
        data: Bytes of any origin.
        key: Whose frame it must be.
        summed: The last of ``sums``, where that was had in steps.

    Raises:
        FrameError: Anything else than an intact frame of exactly this key.
    """
    # On the way of every read, so it repeats what unpack_head does: the call and the fields by name cost a tenth more.
    front = data[:HEAD_SIZE]
    if len(front) < HEAD_SIZE or crc32(front) != _RESIDUE or front[:5] != _START:
        raise FrameError(_fault(data))
    fields = _unpack_fields(front)
    flags = fields[2]
    key_length = fields[8]
    mark_count = fields[9]
    payload_length = fields[10]
    body_crc = fields[12]
    if flags:
        raise FrameError("newer")
    start = HEAD_SIZE + key_length
    payload_at = start + mark_count * MARK_SIZE
    if len(data) != payload_at + payload_length:
        raise FrameError("truncated")
    # A view costs more than a copy of some kilobytes.
    body = data if len(data) <= COPIED else memoryview(data)
    if (crc32(body[HEAD_SIZE:]) if summed is None else summed) != body_crc:
        raise FrameError("corrupt")
    if data[HEAD_SIZE:start] != key:
        raise FrameError("wrong-key")
    marks = marks_in(data, start, payload_at) if mark_count else ()
    return _make(Frame, (_make(Head, fields), marks, body[payload_at:], None))


def open_entry(data: bytes, key: bytes) -> tuple[int, float, float, float, float, bytes] | None:
    """Return codec, created, fresh_until, keep_until, cost and payload of the intact entry that *data* holds for *key*.

    None: it holds anything else, or what is to be unpacked. On the way of most reads: it makes no object that most have
    no use for, and leaves it to ``unpack`` to say what is wrong.
    """
    front = data[:HEAD_SIZE]
    if len(front) < HEAD_SIZE or len(data) > COPIED:
        return None
    start, codec, flags, created, fresh_until, keep_until, cost, key_length, marks, size, total = _unpack_entry(front)
    at = HEAD_SIZE + key_length
    if (
        start != _ENTRY_START
        or flags
        or marks
        or len(data) != at + size
        or data[HEAD_SIZE:at] != key
        or crc32(front) != _RESIDUE
        or crc32(payload := data[at:], crc32(key)) != total
    ):
        return None
    return codec, created, fresh_until, keep_until, cost, payload


def marks_in(data: bytes, start: int, end: int) -> tuple[Mark, ...]:
    """Return the marks that stand there."""
    return tuple([Mark(data[at : at + 16], data[at + 16 : at + MARK_SIZE]) for at in range(start, end, MARK_SIZE)])


def patch_head(head: Head, *, fresh_until: float, keep_until: float) -> bytes:
    """Return 64 bytes that replace *head*: other times, the same token and payload."""
    packed = _HEAD.pack(_START, *head._replace(fresh_until=fresh_until, keep_until=keep_until))
    return packed + _CRC.pack(crc32(packed))


def prolonged(key: bytes, frame: Frame, *, fresh_until: float, keep_until: float) -> bytes:  # noqa: ARG001  # as above
    """Return 64 bytes that replace the head of *frame*, which stands under *key*: other times, the same payload."""
    return patch_head(frame.head, fresh_until=fresh_until, keep_until=keep_until)


def retimed(front: bytes, key: bytes, *, created: float, fresh_until: float, keep_until: float) -> bytes:  # noqa: ARG001
    """Return 64 bytes in place of those that *front* begins with: for who has no more of a frame than that.

    Raises:
        FrameError: It begins with no head.
    """
    head = unpack_head(front)._replace(created=created)
    return patch_head(head, fresh_until=fresh_until, keep_until=keep_until)


def placeholder(key: bytes, token: bytes, now: float, hold: float) -> bytes:
    """Return the frame that says "being loaded": planted by ``begin_many``, kept for *hold* seconds."""
    return frame_of_kind(Kind.PLACEHOLDER, key, token, now, hold)


def frame_of_kind(kind: Kind, key: bytes, token: bytes, now: float, keep: float, *, fresh: bool = True) -> bytes:
    """Return a frame that says what it is, and nothing else, for *keep* seconds; not *fresh*: it is at no time."""
    until = now + keep
    fresh_until = until if fresh else 0.0  # on nobody's clock
    return pack(key, b"", kind=kind, token=token, created=now, fresh_until=fresh_until, keep_until=until)


def key_of(data: bytes) -> bytes:
    """Return the full key that *data* claims to be of: for sweeps, which start from files and not from keys.

    Raises:
        FrameError: No head, or fewer bytes than head and key take.
    """
    head = unpack_head(data)
    key = data[HEAD_SIZE : HEAD_SIZE + head.key_length]
    if len(key) != head.key_length:
        raise FrameError("truncated")
    return key


def peek(data: bytes) -> Head | None:
    """Return the head of *data*, or None where it has none that this code can read."""
    try:
        return unpack_head(data)
    except FrameError:
        return None


def claim(data: bytes) -> Claim | None:
    """Return what *data* says of itself, None where it begins with no head of this version.

    For stores, which hand on what does not parse as it is: a third of the cost of ``peek``.
    """
    if len(data) < HEAD_SIZE:
        return None
    start, kind, keep_until, key_length, mark_count, payload_length = _CLAIM.unpack_from(data)
    if start != _START and start != SEALED_START:  # noqa: PLR1714  # half the time of "in"
        return None
    size = HEAD_SIZE + key_length + mark_count * MARK_SIZE + payload_length
    return _make(Claim, (kind, keep_until, size))


def is_live(head: Head | None, now: float) -> bool:
    """Whether a store must still keep what *head* stands for."""
    return head is not None and now < head.keep_until
