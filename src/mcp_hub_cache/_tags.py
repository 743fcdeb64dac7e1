"""Tags as text, as digests and as keys. Pure; what is done with them, see ``_marks``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ._blake import blake2b

MAX_TAG: Final = 1024
MAX_TAGS: Final = 1000


def as_tags(given: object) -> tuple[str, ...]:
    """Return *given* as tags, each once.

    Raises:
        TypeError: It is one text, or holds something that is no text.
        ValueError: A tag is empty, or longer than 1,024 characters, or there are more than 1,000.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f'tags must be several texts, such as tags=["user:42"], not {type(given).__name__}')
    tags = tuple(given)
    for tag in tags:
        check_tag(tag)
    check_count(len(tags))
    return tuple(dict.fromkeys(tags))


def check_count(count: int) -> None:
    """Raise ``ValueError`` for more tags than an entry, or an invalidation, may have."""
    if count > MAX_TAGS:
        raise ValueError(f"at most {MAX_TAGS:,} tags, not {count:,}: tag what changes together, not each thing in it")


def check_tag(tag: object) -> None:
    """Raise what ``as_tags`` raises for one of them."""
    if not isinstance(tag, str):
        raise TypeError(f'a tag must be text, such as "user:42", not {type(tag).__name__}')
    if not 0 < len(tag) <= MAX_TAG:
        raise ValueError(f"a tag has 1 to {MAX_TAG:,} characters, not {len(tag):,}")


def tag_digest(tag: str) -> bytes:
    """Return what stands for *tag* in keys and frames: 16 bytes."""
    return blake2b(tag.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def mark_key(root: bytes, digest: bytes) -> bytes:
    """Return the key of a tag's mark. *root*: what all keys of its namespace begin with."""
    return root + b"t:" + digest.hex().encode()


ANY_DIGEST: Final = tag_digest("")
"""Of the tag that every invalidation invalidates; no user's tag is empty."""
