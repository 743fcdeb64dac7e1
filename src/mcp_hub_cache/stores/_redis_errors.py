"""What went wrong with a Redis server, told apart by cause and said for people.

One function, ``store_error``, for everything that can go wrong: the text of an error reply, what the driver raised
while it connected, what the operating system or TLS said below it.

Rules:
- The cause decides, not the driver's class: redis-py calls a wrong password, a full server and a refused port all
  ``ConnectionError``. So first the server's own word, then TLS, then the operating system, and only then the
  unknown.
- Of a server's text only what is known to be harmless is passed on: "unknown command" repeats arguments, an
  ``AUTH`` among them.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
from typing import Final

from .._exceptions import (
    StoreAuthError,
    StoreBusyError,
    StoreError,
    StoreExhaustedError,
    StoreFullError,
    StoreMisconfiguredError,
    StorePermissionError,
    StoreProtocolError,
    StoreReadOnlyError,
    StoreTimeoutError,
    StoreTLSError,
    StoreUnreachableError,
)

_REACH: Final = (
    "Check that the server is running (redis-cli ping), that REDIS_HOST and REDIS_PORT, or REDIS_URL, name it, "
    "and that no firewall stands between."
)
_SLOW: Final = "Check that the server is running and not overloaded (redis-cli ping), and the network between."
_CREDENTIALS: Final = (
    "Set REDIS_PASSWORD (and REDIS_USERNAME for an ACL user), or REDIS_URL=redis://:password@host:6379/0, "
    "to what the server expects."
)
_ROOM: Final = (
    "Raise maxmemory, or let the server evict: CONFIG SET maxmemory-policy allkeys-lru (and in redis.conf, to last)."
)
_NO_TLS: Final = "Use REDIS_SSL=false or a redis:// URL, or the server's TLS port."
_TLS: Final = "Set REDIS_SSL=true, or use a rediss:// URL."
_CA: Final = (
    "Set REDIS_CA_CERTS to a PEM file with the certificate authority that signed the server's certificate; "
    "verification stays on."
)
_HOST_NAME: Final = "Name the server in REDIS_HOST or REDIS_URL as its certificate does."
_CLUSTER: Final = "For Redis Cluster set REDIS_CLUSTER=true (cluster=True); else name a server that is no node of one."

_Row = tuple[type[StoreError], str, str]

# The first word of an error reply → class, what to say, what to do.
_CODES: Final[dict[str, _Row]] = {
    "NOAUTH": (StoreAuthError, "wants a password and got none: NOAUTH Authentication required.", _CREDENTIALS),
    "WRONGPASS": (StoreAuthError, "does not accept user name and password (WRONGPASS).", _CREDENTIALS),
    "NOPERM": (
        StorePermissionError,
        "refuses: {text}.",
        "Grant it to the user (ACL SETUSER), for the keys under the prefix.",
    ),
    "DENIED": (
        StoreAuthError,
        "is in protected mode: it takes no connections from other hosts without a password.",
        "Set a password there (requirepass) and in REDIS_PASSWORD.",
    ),
    "OOM": (StoreFullError, "is full (OOM): it has used up its maxmemory.", _ROOM),
    "READONLY": (
        StoreReadOnlyError,
        "is a replica and takes no writes (READONLY).",
        "Name the primary in REDIS_HOST or REDIS_URL.",
    ),
    "MISCONF": (
        StoreReadOnlyError,
        "takes no writes because it can't save to disk (MISCONF).",
        "See its log: the disk may be full or its folder not writable.",
    ),
    "NOREPLICAS": (StoreBusyError, "takes no writes while too few replicas follow it (NOREPLICAS).", ""),
    "LOADING": (StoreBusyError, "is loading its data (LOADING).", "Wait: it serves when it is done."),
    "BUSY": (StoreBusyError, "is busy with a script (BUSY).", "Wait, or end the script: SCRIPT KILL."),
    "MASTERDOWN": (StoreBusyError, "is a replica that has lost its primary (MASTERDOWN).", "Check the primary."),
    "TRYAGAIN": (StoreBusyError, "is moving these keys (TRYAGAIN).", ""),
    "CLUSTERDOWN": (StoreBusyError, "belongs to a cluster that is down (CLUSTERDOWN).", "Check the cluster's nodes."),
    "MOVED": (StoreMisconfiguredError, "is a node of a cluster (MOVED).", _CLUSTER),
    "ASK": (StoreMisconfiguredError, "is a node of a cluster (ASK).", _CLUSTER),
    "CROSSSLOT": (StoreMisconfiguredError, "is a node of a cluster (CROSSSLOT).", _CLUSTER),
    "WRONGTYPE": (
        StoreProtocolError,
        "holds something else than a string under a key of this cache (WRONGTYPE).",
        "Keep other programs off the key prefix.",
    ),
}

# Where the first word is only "ERR": a piece of the text, in lower case → the same.
_TEXTS: Final[dict[str, _Row]] = {
    "max number of clients": (
        StoreExhaustedError,
        "has reached its limit on clients.",
        "Raise maxclients there, or let fewer processes connect.",
    ),
    "without any password configured": (
        StoreAuthError,
        "has no password, but one was given.",
        "Unset REDIS_PASSWORD, or set the password on the server (requirepass).",
    ),
    "no password is set": (
        StoreAuthError,
        "has no password, but one was given.",
        "Unset REDIS_PASSWORD, or set the password on the server (requirepass).",
    ),
    "invalid password": (StoreAuthError, "does not accept the password.", _CREDENTIALS),
    "invalid username": (StoreAuthError, "does not accept user name and password.", _CREDENTIALS),
    "operation not permitted": (StoreAuthError, "wants a password and got none.", _CREDENTIALS),
    "acl failure in script": (
        StorePermissionError,
        "refuses: {text}.",
        "Grant it to the user (ACL SETUSER), for the keys under the prefix.",
    ),
    "db index is out of range": (
        StoreMisconfiguredError,
        "has no database of that number.",
        "Lower REDIS_DB (or the number at the end of REDIS_URL), or raise 'databases' on the server.",
    ),
    "select is not allowed in cluster mode": (
        StoreMisconfiguredError,
        "is a node of a cluster and has database 0 alone.",
        _CLUSTER,
    ),
}
_EMBEDDED: Final = re.compile(r"\b(" + "|".join(_CODES) + r")\b")
_ERRNO: Final = re.compile(r"\[?Err(?:no|or) (-?\d+)\b")
_LIMIT: Final = 200


def store_error(cause: BaseException | str, where: str) -> StoreError:
    """Return the error that says what *cause* means.

    Args:
        cause: The text of an error reply, or an exception that the driver raised.
        where: The server, as people name it: host:port or a path.
    """
    if isinstance(cause, StoreError):
        return cause
    if isinstance(cause, str):
        return _from_reply(cause, where)
    chain = _chain(cause)
    for error in chain:
        if isinstance(error, ssl.SSLError):
            return _from_tls(error, where)
    for error in chain:
        if isinstance(error, OSError):
            return _from_system(error, where)
    for error in chain:  # over a unix socket the driver wraps what the server said
        text, code = str(error), getattr(error, "status_code", None)
        known = _known(f"{code} {text}" if code else text, where)
        if known is not None:
            return known
    text, code = str(cause), getattr(cause, "status_code", None)
    if _is_named(cause, "TimeoutError"):
        return StoreTimeoutError(f"Redis connection failed: {where} did not answer in time.", cure=_SLOW)
    if _is_named(cause, "ResponseError"):
        return _from_reply(f"{code or 'ERR'} {text}", where)
    if _is_named(cause, "InvalidResponse") or _is_named(cause, "ProtocolError"):
        return not_redis(where)
    if _is_named(cause, "ConnectionError"):
        return unreachable(where, "The server closed the connection.")
    unknown = StoreProtocolError(f"unexpected {type(cause).__name__} from the driver for {where}.")
    unknown.__cause__ = cause
    return unknown


def unreachable(where: str, reason: str) -> StoreUnreachableError:
    """Nothing answers at *where*."""
    return StoreUnreachableError(f"Redis connection failed: Error connecting to {where}. {reason}", cure=_REACH)


def lost(where: str) -> StoreUnreachableError:
    """The connection ended while an answer was due."""
    return StoreUnreachableError(f"Redis connection failed: {where} closed the connection.", cure=_REACH)


def no_primary(where: str) -> StoreUnreachableError:
    """Sentinel names a server that is a replica: a failover is under way."""
    return StoreUnreachableError(
        f"Redis connection failed: {where} is a replica, though Sentinel names it as the primary.",
        cure="During a failover this passes by itself; else check the sentinels' configuration.",
    )


def timed_out(where: str, timeout: float) -> StoreTimeoutError:
    """No answer within the deadline."""
    return StoreTimeoutError(f"Redis at {where} did not answer within {timeout:g} s.", cure=_SLOW)


def not_redis(where: str) -> StoreProtocolError:
    """What came can't be parsed, or nobody asked for it."""
    return StoreProtocolError(
        f"what came from {where} is not what a Redis server says.",
        cure="Check that REDIS_HOST and REDIS_PORT name one.",
    )


def speaks_tls(where: str) -> StoreTLSError:
    """A plain connection came to a TLS port."""
    return StoreTLSError(f"{where} speaks TLS, and was spoken to without.", cure=_TLS)


def speaks_plain(where: str) -> StoreTLSError:
    """A TLS connection came to a plain port."""
    return StoreTLSError(f"{where} does not speak TLS on that port.", cure=_NO_TLS)


def _from_reply(text: str, where: str) -> StoreError:
    known = _known(text, where)
    if known is not None:
        return known
    return StoreProtocolError(f"Redis at {where} answered with an error: {_harmless(text)}.")


def _known(text: str, where: str) -> StoreError | None:
    code = text.partition(" ")[0].lstrip("-")
    row = _CODES.get(code)
    if row is None and code == "ERR":
        low = text.lower()
        row = next((known for piece, known in _TEXTS.items() if piece in low), None)
        # Servers before 7 wrap what a script met: "ERR Error running script (call to f_…): … -OOM command not …".
        if row is None and "running script" in low and (found := _EMBEDDED.search(text)) is not None:
            row = _CODES[found[1]]
    if row is None:
        return None
    kind, says, cure = row
    return kind(f"Redis at {where} {says.format(text=_harmless(text))}", cure=cure)


def _harmless(text: str) -> str:
    return text.splitlines()[0].partition(", with args")[0][:_LIMIT].rstrip(" .") if text else "nothing said"


def _from_tls(error: ssl.SSLError, where: str) -> StoreError:
    if isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message
        if "mismatch" in said.lower():
            return StoreTLSError(f"the certificate of {where} is for another name: {said}", cure=_HOST_NAME)
        return StoreTLSError(
            f"the certificate of {where} is not trusted (CERTIFICATE_VERIFY_FAILED: {said}).", cure=_CA
        )  # fmt: skip
    text = str(error)
    if any(sign in text for sign in ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST")):
        return speaks_plain(where)
    # The rest of the text is a line number in CPython's sources.
    said = text.partition("] ")[2].partition(" (_ssl")[0] or "no reason given"
    return StoreTLSError(
        f"TLS with {where} failed: {said}.", cure="If the server asks for a client certificate, give client_cert."
    )  # fmt: skip


def _from_system(error: OSError, where: str) -> StoreError:
    if isinstance(error, TimeoutError):
        return StoreTimeoutError(f"Redis connection failed: Error connecting to {where}. It timed out.", cure=_SLOW)
    if isinstance(error, socket.gaierror):
        return unreachable(where, f"The host name can't be resolved ({error.strerror or 'unknown'}).")
    number = error.errno
    # Where a name has several addresses, asyncio raises one OSError that quotes them all and has no number.
    if number is None and (found := _ERRNO.search(str(error))) is not None:
        number = int(found[1])
    if number in {errno.EMFILE, errno.ENFILE}:
        return StoreExhaustedError(
            "no more files or sockets can be opened in this process.", cure="Raise the limit (ulimit -n)."
        )  # fmt: skip
    if number in {errno.EACCES, errno.EPERM}:
        return StorePermissionError(
            f"Redis connection failed: not permitted to connect to {where}.",
            cure="Check the socket file's owner and mode.",
        )
    if number is None or number <= 0:
        return unreachable(where, "The connection was lost.")
    return unreachable(where, f"{os.strerror(number)}.")


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return chain


def _is_named(error: BaseException, name: str) -> bool:
    # By name, so that this module can be imported, and tested, without the driver.
    return any(base.__name__ == name for base in type(error).__mro__)
