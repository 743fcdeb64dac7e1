"""Opening connections with redis-py, and giving their transports away.

Strategy: the driver does what it does well (addresses, TLS, AUTH, SELECT, its own handshake); then its connection
gives up the stream, and never reads or writes again.

Rules:
- The driver retries nothing and times nothing: the caller's one deadline covers all of it, by cancelling.
- Whatever it raises leaves here as a ``StoreError``; cancelled or failed, nothing stays open.
- Some mistakes look like an outage: a TLS hello to a plain port can hang, a plain command to a TLS port resets the
  connection, and so does one that crosses with a refusal. Where a failure looks like one of them, the server is asked
  once more, without credentials, in the way that tells.

This file alone imports redis.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Coroutine, Sequence
from typing import Any, Final, cast

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo
from redis.exceptions import ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from .._exceptions import StoreError, StoreUnreachableError
from ._redis_address import Address
from ._redis_errors import no_primary, not_redis, speaks_plain, speaks_tls, store_error

_LOOK: Final = 0.5  # seconds at most for each question why a server cut a connection off: callers wait meanwhile


async def open_connection(address: Address, timeout: float, *, primary: bool = False) -> asyncio.StreamWriter:
    """Return the stream of a new connection: authenticated, database selected, nothing read ahead.

    Args:
        address: The server.
        timeout: The caller's deadline, which it keeps itself: after half of it a TLS handshake that gets no answer is
            looked into.
        primary: Whether the server must say first that it is no replica.

    Raises:
        StoreError: It could not be had; says why.
    """
    connection = _connection(address)
    try:
        await _connect(connection, address, timeout)
        if primary:
            await _confirm_primary(connection, address)
        leftover = await connection.can_read()
    except BaseException as error:
        await connection.disconnect(nowait=True)
        if not isinstance(error, Exception):
            raise
        raise await _explained(error, address, timeout) from None
    if leftover:
        await connection.disconnect(nowait=True)
        raise not_redis(address.where)
    # Private, because the driver has no public way to give its transport away. The all-public way (send_packed_command
    # and read_response) costs 13 to 15 % at 100 callers, and a task that owns the reading.
    writer = connection._writer  # noqa: SLF001
    assert writer is not None
    connection._writer = None  # noqa: SLF001  # or it warns, when it is collected, that nobody closed it
    return writer


def hand_over(writer: asyncio.StreamWriter, protocol: asyncio.BaseProtocol) -> None:
    """Let *protocol* have what comes over a connection from now on.

    A server that has hung up in the very step before was heard by asyncio's stream alone, which keeps quiet about it
    and stops reading: requests would wait for their deadline. Reading begun anew meets the end once more.
    """
    transport = cast("asyncio.Transport", writer.transport)
    transport.set_protocol(protocol)
    transport.pause_reading()
    transport.resume_reading()


async def ask(address: Address, timeout: float, *commands: tuple[str, ...]) -> list[Any]:
    """Return the replies to *commands*, error replies among them, over a connection of their own.

    Raises:
        StoreError: The server could not be asked within *timeout* seconds.
    """
    connection = _connection(address)
    try:
        async with asyncio.timeout(timeout):
            try:
                await _connect(connection, address, timeout)
                return await _ask(connection, commands)
            except Exception as error:  # noqa: BLE001  # whatever the driver raises
                raise await _explained(error, address, timeout) from None
    except TimeoutError as late:
        raise store_error(late, address.where) from None
    finally:
        await connection.disconnect(nowait=True)


async def _confirm_primary(connection: AbstractConnection, address: Address) -> None:
    (role,) = await _ask(connection, (("ROLE",),))
    if isinstance(role, list) and role[0] != b"master":
        raise no_primary(address.where)


async def _ask(connection: AbstractConnection, commands: Sequence[tuple[str, ...]]) -> list[Any]:
    replies: list[Any] = []
    for command in commands:
        await connection.send_command(*command)
    for _ in commands:
        try:
            replies.append(await connection.read_response())
        except ResponseError as error:
            replies.append(error)
    return replies


def _connection(address: Address) -> AbstractConnection:
    common: dict[str, Any] = {
        "db": address.db,
        "username": address.username,
        "password": address.password,
        "protocol": 2,
        "driver_info": DriverInfo(name="redis-py(mcp-hub-cache)"),  # what CLIENT LIST shows
        # With them on, the driver would not notice a reply that was left over (its dirty check is tied to this).
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        "retry": Retry(NoBackoff(), 0),
        # No timers of the driver's: the wire's deadline covers all that it does.
        "socket_timeout": None,
        "socket_connect_timeout": None,
    }
    if address.path is not None:
        return UnixDomainSocketConnection(path=address.path, **common)
    if address.tls is None:
        return Connection(host=address.host, port=address.port, **common)
    connection = SSLConnection(host=address.host, port=address.port, **common)
    connection.ssl_context.context = address.tls
    return connection


async def _connect(connection: AbstractConnection, address: Address, timeout: float) -> None:
    connecting: Coroutine[Any, Any, None] = connection.connect()  # type: ignore[no-untyped-call]  # typed in part
    if address.tls is None:
        await connecting
        return
    opening = asyncio.ensure_future(connecting)
    opening.add_done_callback(_retrieve)
    try:
        # A plain server takes the hello of TLS for a command and may wait for its end.
        done, _ = await asyncio.wait({opening}, timeout=timeout / 2)
        if not done and await _answers_plain(address):
            raise speaks_plain(address.where)
        await opening
    finally:
        if not opening.done():
            opening.cancel()
            await asyncio.wait({opening})


def _retrieve(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


async def _explained(error: Exception, address: Address, timeout: float) -> StoreError:
    """What *error* means; where it looks like an outage and may be a mistake, the server is asked."""
    failed = store_error(error, address.where)
    if failed is error or not isinstance(failed, StoreUnreachableError) or not _was_there(error):
        return failed
    return await _explanation(address, min(timeout / 4, _LOOK)) or failed


def _was_there(error: BaseException | None) -> bool:
    """Whether the server had taken the connection before it ended."""
    while error is not None:
        if isinstance(error, OSError):
            return isinstance(error, ConnectionResetError | BrokenPipeError)
        error = error.__cause__ or error.__context__
    return True


async def _explanation(address: Address, seconds: float) -> StoreError | None:
    """Why the server cut a connection off, if it says so to one who only listens, or if it speaks TLS."""
    try:
        async with asyncio.timeout(seconds):
            said = await _greeting(address, seconds / 4)
        if said is None:
            return None
        if said.startswith("-"):
            return store_error(said[1:], address.where)
    except ssl.SSLError as error:
        return store_error(error, address.where)
    except (OSError, TimeoutError, ValueError):
        pass
    try:
        # A plain server takes the hello of TLS for a command and may wait for its end, too.
        async with asyncio.timeout(seconds):
            return speaks_tls(address.where) if address.tls is None and await _answers_tls(address) else None
    except TimeoutError:
        return None


async def _greeting(address: Address, seconds: float) -> str | None:
    """What the server says within *seconds* to one who says nothing; None: it is silent, and answers as it should."""
    if address.path is not None:
        reader, writer = await asyncio.open_unix_connection(address.path)
    else:
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=address.tls)
    try:
        try:
            async with asyncio.timeout(seconds):
                return (await reader.readline()).decode("utf-8", "replace")
        except TimeoutError:
            # Only now: what a server says while it hangs up is lost to those who have sent something.
            writer.write(b"PING\r\n")
        return None if await reader.read(1) in {b"+", b"-"} else ""
    finally:
        writer.transport.abort()


async def _answers_tls(address: Address) -> bool:
    if address.path is not None:
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is said over it: only whether there is TLS
    try:
        _, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
    except ssl.SSLError as error:
        return error.reason != "WRONG_VERSION_NUMBER"
    except OSError:
        return False
    writer.transport.abort()
    return True


async def _answers_plain(address: Address) -> bool:
    try:
        reader, writer = await asyncio.open_connection(address.host, address.port)
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        return await reader.read(1) in {b"+", b"-"}
    except OSError:
        return False
    finally:
        writer.transport.abort()
