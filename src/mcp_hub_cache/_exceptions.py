"""Every error this library raises of its own, and what to do about each.

Three families, told apart so that callers can tell *their* mistake from *our* trouble:

- Misuse (a bad key, a bad ttl, a value that no cache can hold) is a ``ValueError`` or ``TypeError``
  and reaches the caller at once, before anything stored has changed.
- ``StoreError`` is trouble with a store. The engine turns it into a miss or a counted failed write. Only code that
  talks to a ``Store`` directly ever sees one, and callers of a cache with ``on_misconfigured="raise"``: of those that
  a person must put right (``StoreMisconfiguredError``).
- A loader's error is never wrapped: callers get it unchanged.

No message here ever holds a value, an argument or a password.
"""

from __future__ import annotations

from typing import ClassVar, Self


class CacheError(Exception):
    """Base of the errors that are this library's own."""


class InvalidKeyError(CacheError, ValueError):
    """A key that no store can hold: empty, too long, or not encodable as UTF-8."""


class UncacheableError(CacheError, TypeError):
    """A value or argument that cannot be stored so that a hit equals a miss.

    Attributes:
        where: The place inside the value, such as ``value[key 0][3].when``: keys are content, and are counted from 0.
    """

    def __init__(self, message: str, *, where: str = "value") -> None:
        super().__init__(message)
        self.where = where


class ValueTooLargeError(CacheError, ValueError):
    """A value whose stored form is beyond the cache's ``max_value_bytes`` or ``max_value_items``."""


class SettingsError(CacheError, ValueError):
    """A setting with a wrong value: names the variable, what it held (never a secret), what it takes."""


class CircularLoadError(CacheError, RuntimeError):
    """A loader waits, directly or through others, for the value that it is loading itself."""


class LoadTimeoutError(CacheError, TimeoutError):
    """A load took longer than its policy allows, or another process's did, and nothing stale could stand in."""


class WrongLoopError(CacheError, RuntimeError):
    """One cache is used from two event loops that run at the same time."""


class StoreError(CacheError):
    """Trouble with a store. Base of all of them; ``kind`` is what metrics count it under.

    Attributes:
        kind: A short stable word for the cause.
        cure: What to do about it, for people.
        outage: Whether the cause means that the store can't be reached now, so that a standby may serve.
    """

    kind: ClassVar[str] = "other"
    outage: ClassVar[bool] = False
    default_cure: ClassVar[str] = ""

    def __init__(self, message: str, *, cure: str | None = None) -> None:
        self.cure = self.default_cure if cure is None else cure
        super().__init__(f"{message} {self.cure}".rstrip())

    def again(self) -> Self:
        """Return the same error for one more to raise: raising writes to an exception."""
        copy = type(self).__new__(type(self), *self.args)
        copy.cure, copy.__cause__ = self.cure, self.__cause__
        return copy

    @staticmethod
    def of(error: BaseException) -> StoreError:
        """Return *error* if it is one, or else one that says what a store should not have raised."""
        if isinstance(error, StoreError):
            return error
        unexpected = StoreError(f"unexpected {type(error).__name__} in the store.")
        unexpected.__cause__ = error
        return unexpected


class StoreUnreachableError(StoreError):
    """Nothing answers there: refused, unknown host, no route, connection lost."""

    kind = "unreachable"
    outage = True


class StoreTimeoutError(StoreError):
    """The store did not answer within the deadline."""

    kind = "timeout"
    outage = True


class StoreExhaustedError(StoreError):
    """Our own limit on connections, threads or handles is used up. No outage."""

    kind = "exhausted"


class StoreBusyError(StoreError):
    """The store is there but can't serve now: loading its data, running a script, its primary is down."""

    kind = "busy"


class StoreFullError(StoreError):
    """There is no room: disk full, out of inodes, or the server's memory limit."""

    kind = "full"


class StoreReadOnlyError(StoreError):
    """The store takes no writes: a replica, or a read-only folder."""

    kind = "readonly"


class StoreMisconfiguredError(StoreError):
    """The store answers and says no: something in the configuration must be changed by a person."""

    kind = "misconfigured"


class StoreAuthError(StoreMisconfiguredError):
    """User name or password missing or wrong."""

    kind = "auth"


class StorePermissionError(StoreMisconfiguredError):
    """The user may not run that command or touch that key (ACL), or the folder belongs to somebody else."""

    kind = "permission"


class StoreTLSError(StoreMisconfiguredError):
    """TLS could not be agreed on: untrusted certificate, wrong host name, or a plain port."""

    kind = "tls"


class StoreProtocolError(StoreError):
    """The store's answer can't be understood, or a key holds something of another type."""

    kind = "protocol"
