"""Sealed entries: who has no part in the secret can't read, forge, edit, move or prolong one.

Strategy: a frame is sealed in two parts, so that other times (``touch``, "not modified") need a new head alone.

    payload   AES-256-GCM; bound to all of the head but its times, to the full key, and to the tags' marks
    head      keyed blake2b, cut to 96 bits, over the whole head and the full key, where plain frames have checksums

The secret gives two keys, by keyed blake2b: one for heads, and one from which the key and nonce of each payload are
derived by a salt of 24 random bytes, drawn from the system for every frame. The secret is taken for random text, so no
password hashing (scrypt, Argon2) stretches it; HKDF (RFC 5869) would do the same in more steps.

Rules:
- Nothing is taken from a frame that decides how it is verified: neither algorithm nor a key's name stands in one. There
  is one algorithm, and the secrets are tried, of which there are two at most.
- No nonce is used twice, and none has to be remembered: every frame has a key of its own, so neither threads nor a
  forked child nor a second process can repeat one. (A key per process, and a counter, would save 1.5 of 4 microseconds,
  and would have to be right in all of these.)
- The full key says prefix, namespace and scope: what is copied to another's key is a miss.
- A new head is made by what the payload was sealed by, else it could not be opened. So what is only ever touched stays
  with the previous secret, and is a miss when that is taken away.
- Placeholders, leases and marks are not sealed: stores plant them by themselves. They decide who loads and what is
  invalid, never what is served. See SECURITY.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from hmac import compare_digest
from struct import Struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from . import _frame
from ._blake import blake2b
from ._frame import (
    COPIED,
    HEAD_SIZE,
    MARK_SIZE,
    MAX_KEY_BYTES,
    MAX_MARKS,
    SEALED_START,
    Frame,
    FrameError,
    Head,
    Kind,
    Mark,
    join_front,
    marks_in,
    sealed_head,
)

SALT_SIZE: Final = 24
OVERHEAD: Final = SALT_SIZE + 16  # and the tag
_MAX_PAYLOAD: Final = 2**31 - 1 - OVERHEAD  # what AESGCM takes
_SIGNED: Final = 52  # bytes of the head; the rest is their MAC
_HEAD: Final = Struct("<5sBBB8sdddfHHI")
_unpack_entry: Final = Struct("<6sBB8xdddfHHI").unpack_from
_ENTRY_START: Final = SEALED_START + bytes([Kind.ENTRY])


class _Keys:
    """What one secret gives."""

    __slots__ = ("_heads", "_payloads")

    def __init__(self, secret: str) -> None:
        derived = blake2b(secret.encode("utf-8", "surrogatepass"), digest_size=64, person=b"mcp_hub_cache 1").digest()
        self._heads = blake2b(key=derived[:32], digest_size=HEAD_SIZE - _SIGNED, person=b"head")
        self._payloads = blake2b(key=derived[32:], digest_size=32 + 12, person=b"payload")

    def mac(self, signed: bytes, key: bytes) -> bytes:
        digest = self._heads.copy()
        digest.update(signed + key)
        return digest.digest()

    def seal(self, salt: bytes, payload: bytes, bound: bytes) -> bytes:
        digest = self._payloads.copy()
        digest.update(salt)
        subkey = digest.digest()
        return AESGCM(subkey[:32]).encrypt(subkey[32:], payload, bound)

    def open(self, data: bytes, at: int, bound: bytes) -> bytes:
        """The payload that stands *at*, behind its salt; raises ``InvalidTag``."""
        digest = self._payloads.copy()
        digest.update(data[at : at + SALT_SIZE])
        subkey = digest.digest()
        return AESGCM(subkey[:32]).decrypt(subkey[32:], memoryview(data)[at + SALT_SIZE :], bound)


def _bound(data: bytes, payload_at: int) -> bytes:
    """What a payload is bound to: version, kind, codec, flags, token, load cost, lengths, key and marks."""
    return data[4:16] + data[40:_SIGNED] + data[HEAD_SIZE:payload_at]


class Seal:
    """The form of entries under a secret; see ``_form.Form``.

    Args:
        secret: What entries are sealed with, and opened.
        previous: What they are opened with besides; None: nothing.
        draw: Returns so many random bytes, each time others.
    """

    __slots__ = ("_draw", "_keys")

    def __init__(self, secret: str, previous: str | None = None, *, draw: Callable[[int], bytes] = os.urandom) -> None:
        self._draw = draw
        self._keys = [_Keys(one) for one in (secret, previous) if one is not None]

    def pack(
        self,
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
        summed: int | None = None,  # noqa: ARG002  # as of plain frames
    ) -> bytes:
        """Return the bytes to store under *key*. See ``_frame.pack``; so for all that follow."""
        size = len(payload)
        if len(key) > MAX_KEY_BYTES or len(marks) > MAX_MARKS or size > _MAX_PAYLOAD:
            raise ValueError(f"no frame can hold a key of {len(key)} bytes, {len(marks)} marks and {size} of payload")
        signed = _HEAD.pack(
            SEALED_START, kind, codec, 0, token, created, fresh_until, keep_until, cost, len(key), len(marks),
            size + OVERHEAD,
        )  # fmt: skip
        front = join_front(key, marks) if marks else key
        keys, salt = self._keys[0], self._draw(SALT_SIZE)
        sealed = keys.seal(salt, payload, signed[4:16] + signed[40:] + front)
        return b"".join((signed, keys.mac(signed, key), front, salt, sealed))

    def sums_to_pack(
        self,
        key: bytes,  # noqa: ARG002  # as of plain frames
        payload: bytes,  # noqa: ARG002
        marks: tuple[Mark, ...],  # noqa: ARG002
        step: int,  # noqa: ARG002
    ) -> Iterator[int]:
        """Yield nothing: there is no checksum."""
        return iter(())

    def sums(self, data: bytes, step: int) -> Iterator[int]:  # noqa: ARG002  # as of plain frames
        """Yield nothing: there is no checksum."""
        return iter(())

    def unpack(self, data: bytes, key: bytes, summed: int | None = None) -> Frame:  # noqa: ARG002  # as above
        """Return the verified frame that *data* holds for *key*; of what is never sealed, the plain one."""
        if data[:5] != SEALED_START:
            frame = _frame.unpack(data, key)
            if frame.head.kind == Kind.ENTRY:
                raise FrameError("unsealed")
            return frame
        if len(data) < HEAD_SIZE:
            raise FrameError("truncated")
        said = sealed_head(data[:HEAD_SIZE])
        start = HEAD_SIZE + said.key_length
        payload_at = start + said.mark_count * MARK_SIZE
        if len(data) != payload_at + said.payload_length or said.payload_length < OVERHEAD:
            raise FrameError("truncated")
        if data[HEAD_SIZE:start] != key:  # an accident more likely than a forgery, which the next would call it
            raise FrameError("wrong-key")
        head, keys = self._verified(data, key)
        try:
            payload = keys.open(data, payload_at, _bound(data, payload_at))
        except InvalidTag:
            raise FrameError("forged") from None
        return Frame(head, marks_in(data, start, payload_at), payload, keys)

    def open_entry(self, data: bytes, key: bytes) -> tuple[int, float, float, float, float, bytes] | None:
        """Return what a read asks of the entry that *data* holds for *key*; None: ``unpack`` says what is wrong."""
        front = data[:HEAD_SIZE]
        if len(front) < HEAD_SIZE or len(data) > COPIED:
            return None
        start, codec, flags, created, fresh_until, keep_until, cost, key_length, marks, size = _unpack_entry(front)
        at = HEAD_SIZE + key_length
        if (
            start != _ENTRY_START
            or flags
            or marks
            or size < OVERHEAD
            or len(data) != at + size
            or data[HEAD_SIZE:at] != key
            or (keys := self._signer(front, key)) is None
        ):
            return None
        try:
            payload = keys.open(data, at, front[4:16] + front[40:_SIGNED] + key)
        except InvalidTag:
            return None
        return codec, created, fresh_until, keep_until, cost, payload

    def verified_head(self, data: bytes, key: bytes) -> Head:
        """Return the verified head of *data*, which stands under *key*; of what is never sealed, the plain one."""
        if data[:5] != SEALED_START:
            head = _frame.verified_head(data, key)
            if head.kind == Kind.ENTRY:
                raise FrameError("unsealed")
            return head
        return self._verified(data, key)[0]

    def prolonged(self, key: bytes, frame: Frame, *, fresh_until: float, keep_until: float) -> bytes:
        """Return 64 bytes that replace the head of *frame*, which stands under *key*."""
        keys = frame.sealed_by
        assert isinstance(keys, _Keys)
        return _signed(keys, key, frame.head._replace(fresh_until=fresh_until, keep_until=keep_until))

    def retimed(self, front: bytes, key: bytes, *, created: float, fresh_until: float, keep_until: float) -> bytes:
        """Return 64 bytes in place of those that *front* begins with."""
        if front[:5] != SEALED_START:
            return _frame.retimed(front, key, created=created, fresh_until=fresh_until, keep_until=keep_until)
        head, keys = self._verified(front, key)
        return _signed(keys, key, head._replace(created=created, fresh_until=fresh_until, keep_until=keep_until))

    def _verified(self, data: bytes, key: bytes) -> tuple[Head, _Keys]:
        front = data[:HEAD_SIZE]
        if len(front) < HEAD_SIZE:
            raise FrameError("truncated")
        keys = self._signer(front, key)
        if keys is None:
            raise FrameError("forged")
        return sealed_head(front), keys

    def _signer(self, front: bytes, key: bytes) -> _Keys | None:
        """Whose MAC the head under *key* bears."""
        signed, mac = front[:_SIGNED], front[_SIGNED:]
        for keys in self._keys:
            if compare_digest(mac, keys.mac(signed, key)):
                return keys
        return None


def _signed(keys: _Keys, key: bytes, head: Head) -> bytes:
    signed = _HEAD.pack(SEALED_START, *head[:11])
    return signed + keys.mac(signed, key)
