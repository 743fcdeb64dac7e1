"""How entries are written and verified: as they are (``_frame``), or sealed (``_seal``) where there is a secret.

Rules:
- Which of the two is decided here, once, by configuration. What is read has no say in it.
- What a form does not know for its own raises ``FrameError``: without a secret nothing sealed is read, with one nothing
  that is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from . import _frame
from ._exceptions import SettingsError
from ._frame import Frame, Head, Kind, Mark

SHORTEST_SECRET: Final = 32
"""Characters that a secret has at least."""

HOW_TO_MAKE_ONE: Final = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'


class Form(Protocol):
    """What ``_frame`` and ``Seal`` have in common; the functions of ``_frame`` say what each is for."""

    def pack(
        self,
        key: bytes,
        payload: bytes,
        *,
        token: bytes,
        created: float,
        fresh_until: float,
        keep_until: float,
        kind: Kind = ...,
        codec: int = ...,
        cost: float = ...,
        marks: tuple[Mark, ...] = ...,
        summed: int | None = ...,
    ) -> bytes:
        """See ``_frame.pack``; so for all that follow."""
        ...

    def sums_to_pack(self, key: bytes, payload: bytes, marks: tuple[Mark, ...], step: int) -> Iterator[int]:
        """See there."""
        ...

    def sums(self, data: bytes, step: int) -> Iterator[int]:
        """See there."""
        ...

    def unpack(self, data: bytes, key: bytes, summed: int | None = None) -> Frame:
        """See there."""
        ...

    def open_entry(self, data: bytes, key: bytes) -> tuple[int, float, float, float, float, bytes] | None:
        """See there."""
        ...

    def verified_head(self, data: bytes, key: bytes) -> Head:
        """See there."""
        ...

    def prolonged(self, key: bytes, frame: Frame, *, fresh_until: float, keep_until: float) -> bytes:
        """See there."""
        ...

    def retimed(self, front: bytes, key: bytes, *, created: float, fresh_until: float, keep_until: float) -> bytes:
        """See there."""
        ...


def form_of(secret_key: str | None, previous_secret_key: str | None) -> Form:
    """Return the form for these secrets; None: there is none.

    Raises:
        TypeError: One is no text.
        ValueError: One is shorter than 32 characters, or there is only a previous one.
        SettingsError: What sealing needs is not installed.
    """
    current = _checked(secret_key, "secret_key (CACHE_SECRET_KEY)")
    previous = _checked(previous_secret_key, "previous_secret_key (CACHE_SECRET_KEY_PREVIOUS)")
    if current is None:
        if previous is not None:
            raise ValueError(
                "previous_secret_key (CACHE_SECRET_KEY_PREVIOUS) opens what was sealed before; without a secret_key "
                "(CACHE_SECRET_KEY) to seal with now it means nothing"
            )
        return _frame
    try:
        from ._seal import Seal  # noqa: PLC0415  # who has no secret need not have cryptography
    except ImportError as missing:
        raise SettingsError(
            f"secret_key (CACHE_SECRET_KEY) needs the package cryptography, which can't be imported ({missing}). "
            "Install it: pip install 'mcp-hub-cache[crypto]'"
        ) from None
    return Seal(current, previous)


def _checked(secret: str | None, name: str) -> str | None:
    if secret is None:
        return None
    if not isinstance(secret, str):
        raise TypeError(f"{name} must be a str, not {type(secret).__name__}")
    if len(secret) < SHORTEST_SECRET:
        raise ValueError(
            f"{name} must have at least {SHORTEST_SECRET} characters, and has {len(secret)}; make one with "
            f"{HOW_TO_MAKE_ONE}"
        )
    return secret
