"""Real servers that a test brings into each state in which they refuse, and out of it again."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcp_hub_cache.testing import FaultProxy
from tests.servers import Server, certificates, free_port, redis_server, valkey_server

QUICK: dict[str, Any] = {"probe_after": 0.05, "probe_max": 0.2}
PASSWORD = "hunter2"
_MANY = 3_000  # keys, loaded at 5 ms each


@dataclass
class Scene:
    """A server that serves, and how to change that.

    Attributes:
        options: Of ``RedisCache``; the URL among them.
        breaks: Bring it into the state, and return when it is.
        mends: And out of it.
    """

    options: dict[str, Any]
    breaks: Callable[[], object]
    mends: Callable[[], object]
    settings: dict[str, Any] = field(default_factory=dict)  # the same for ``open_cache``, where names differ


Arranged = AbstractAsyncContextManager[Scene]


def wait_for(is_so: Callable[[], bool]) -> None:
    """Poll a server, blocking."""
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.005)


def _all(*works: Callable[[], object]) -> Callable[[], None]:
    def work() -> None:
        for each in works:
            each()

    return work


@asynccontextmanager
async def by_config(_: Path, name: str, bad: str | int, good: str | int) -> AsyncIterator[Scene]:
    """A setting of the server's."""
    with valkey_server() as server:
        yield Scene(
            {"url": server.url},
            lambda: server.command("CONFIG", "SET", name, bad),
            lambda: server.command("CONFIG", "SET", name, good),
        )


@asynccontextmanager
async def gone(_: Path) -> AsyncIterator[Scene]:
    """Nobody listens on the port."""
    with valkey_server() as server:
        yield Scene({"url": server.url}, server.kill, server.start)


@asynccontextmanager
async def stopped(_: Path) -> AsyncIterator[Scene]:
    """Connections are taken, and nothing is answered."""
    with valkey_server() as server:
        options = {"url": server.url, "timeout": 1.0, "failover": QUICK | {"failures": 1}}
        yield Scene(options, server.pause, server.resume)


@asynccontextmanager
async def password(_: Path, before: str, after: str) -> AsyncIterator[Scene]:
    """The password is another one from now on."""
    with valkey_server(password=before or None) as server:

        def change(to: str) -> None:
            server.command("CONFIG", "SET", "requirepass", to)
            server.password = to or None
            server.kill_clients()

        given = {"password": before} if before else {}
        settings = {f"redis_{name}": value for name, value in given.items()}
        yield Scene({"url": server.url, **given}, lambda: change(after), lambda: change(before), settings)


@asynccontextmanager
async def acl(_: Path) -> AsyncIterator[Scene]:
    """The user loses the right to the keys."""
    with valkey_server() as server:
        server.command("ACL", "SETUSER", "agent", "on", f">{PASSWORD}", "+@all", "~mcp_hub:*", "&*")
        given = {"username": "agent", "password": PASSWORD}
        yield Scene(
            {"url": server.url, **given},
            lambda: server.command("ACL", "SETUSER", "agent", "resetkeys", "~other:*"),
            lambda: server.command("ACL", "SETUSER", "agent", "resetkeys", "~mcp_hub:*"),
            {f"redis_{name}": value for name, value in given.items()},
        )


@contextmanager
def _kept_by(server: Server) -> Any:
    """A connection that is let in whatever the limit on clients is."""
    with socket.socket(socket.AF_UNIX) as kept:
        kept.connect(server.socket_path)

        def say(line: bytes) -> None:
            kept.sendall(line + b"\r\n")
            assert kept.recv(100)

        yield say


@asynccontextmanager
async def too_many_clients(_: Path) -> AsyncIterator[Scene]:
    """The server's limit on clients is used up."""
    with valkey_server() as server, _kept_by(server) as say:
        full = _all(lambda: say(b"CONFIG SET maxclients 1"), lambda: say(b"CLIENT KILL TYPE normal SKIPME yes"))
        yield Scene({"url": server.url}, full, lambda: say(b"CONFIG SET maxclients 1000"))


# TLS


@asynccontextmanager
async def certificate(folder: Path, *, ca: str, name: str) -> AsyncIterator[Scene]:
    """The server shows another certificate from now on: of another authority, or for another name."""
    good, other = folder / "good", folder / "other"
    for each in (good, other):
        each.mkdir()
    mine, theirs = certificates(good, "localhost"), certificates(other, name)
    trusted = folder / "trusted.pem"
    trusted.write_text(Path(mine.ca).read_text() + (Path(theirs.ca).read_text() if ca == "trusted" else ""))
    with redis_server(tls=mine) as server:

        def show(cert: str, key: str) -> None:
            server.command("CONFIG", "SET", "tls-cert-file", cert, "tls-key-file", key)
            server.kill_clients()

        url = f"rediss://localhost:{server.tls_port}/0"
        given = {"ca_certs": str(trusted)}
        yield Scene(
            {"url": url, **given},
            lambda: show(theirs.cert, theirs.key),
            lambda: show(mine.cert, mine.key),
            {"redis_ca_certs": given["ca_certs"]},
        )


@asynccontextmanager
async def ports_change_places(folder: Path, *, asks_for_tls: bool) -> AsyncIterator[Scene]:
    """What was the TLS port is the plain one from now on, and the other way round."""
    pems = certificates(folder, "localhost")
    with redis_server(tls=pems) as server:
        plain, tls = server.port, server.tls_port

        def listen(plain_port: int, tls_port: int) -> None:
            for name, port in (("port", 0), ("tls-port", 0), ("port", plain_port), ("tls-port", tls_port)):
                server.command("CONFIG", "SET", name, port)
            server.kill_clients()

        url = f"rediss://localhost:{tls}/0" if asks_for_tls else f"redis://localhost:{plain}/0"
        given = {"ca_certs": pems.ca} if asks_for_tls else {}
        settings = {f"redis_{name}": value for name, value in given.items()}
        # A plain port answers a TLS greeting with silence.
        yield Scene(
            {"url": url, "timeout": 1.5, **given}, lambda: listen(tls, plain), lambda: listen(plain, tls), settings
        )


# Servers that are there, and serve some or none


@asynccontextmanager
async def replica(_: Path, *, serves_stale: bool) -> AsyncIterator[Scene]:
    """It is made a replica of a primary that is not there."""
    with valkey_server("--replica-serve-stale-data", "yes" if serves_stale else "no") as server:
        yield Scene(
            {"url": server.url},
            lambda: server.command("REPLICAOF", "127.0.0.1", free_port()),
            lambda: server.command("REPLICAOF", "NO", "ONE"),
        )


@asynccontextmanager
async def loading(_: Path) -> AsyncIterator[Scene]:
    """It has just been started, with data that take long to load."""
    # The server looks at its clients after every so many bytes: after each of these values.
    with valkey_server("--loading-process-events-interval-bytes", "1024", "--rdbcompression", "no") as server:
        filling = f"for i = 1, {_MANY} do server.call('SET', 'other:' .. i, string.rep('x', 1100)) end"
        server.command("EVAL", filling, 0)

        def restart() -> None:
            server.command("SAVE")
            server.kill()
            server.args += ("--key-load-delay", "5000")
            server.start()
            wait_for(lambda: b"loading:1" in server.command("INFO", "persistence"))

        def load() -> None:
            server.command("CONFIG", "SET", "key-load-delay", "0")
            wait_for(lambda: b"loading:0" in server.command("INFO", "persistence"))

        yield Scene({"url": server.url}, restart, load)


@asynccontextmanager
async def busy(_: Path) -> AsyncIterator[Scene]:
    """A script does not end."""
    with valkey_server("--busy-reply-threshold", "1") as server, socket.socket(socket.AF_UNIX) as asking:
        asking.connect(server.socket_path)

        def is_busy() -> bool:
            try:
                server.command("PING")
            except Exception as error:  # the reply
                return "BUSY" in str(error)
            return False

        def end() -> None:
            server.command("SCRIPT", "KILL")
            wait_for(lambda: not is_busy())

        yield Scene(
            {"url": server.url},
            _all(lambda: asking.sendall(b'EVAL "while true do end" 0\r\n'), lambda: wait_for(is_busy)),
            end,
        )


@asynccontextmanager
async def cannot_save(_: Path) -> AsyncIterator[Scene]:
    """Its snapshots can't be put where they belong."""
    with valkey_server() as server:
        target = server.folder / "dump.rdb"

        def save(expected: bytes) -> None:
            def ended() -> bool:
                return b"rdb_last_bgsave_status:" + expected in server.command("INFO", "persistence")

            server.command("BGSAVE")
            wait_for(ended)

        def block() -> None:
            target.unlink(missing_ok=True)
            (target / "in the way").mkdir(parents=True)
            server.command("CONFIG", "SET", "save", "3600 1")
            save(b"err")

        def clear() -> None:
            (target / "in the way").rmdir()
            target.rmdir()
            save(b"ok")

        yield Scene({"url": server.url}, block, clear)


@asynccontextmanager
async def cluster_without_slots(_: Path) -> AsyncIterator[Scene]:
    """A cluster of one loses its slots."""
    bus = ("--cluster-port", str(free_port()), "--cluster-config-file", "nodes.conf")
    with valkey_server("--cluster-enabled", "yes", "--cluster-node-timeout", "500", *bus) as server:

        def is_up() -> bool:
            return b"cluster_state:ok" in server.command("CLUSTER", "INFO")

        def assign() -> None:
            server.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_for(is_up)

        def take() -> None:
            server.command("CLUSTER", "DELSLOTSRANGE", 0, 16383)
            wait_for(lambda: not is_up())

        assign()
        yield Scene({"url": server.url}, take, assign)


@asynccontextmanager
async def web_server(_: Path) -> AsyncIterator[Scene]:
    """What answers is no Redis: its replies are another protocol's."""
    with valkey_server() as server:
        async with FaultProxy(server.url) as between:

            def begin() -> None:
                between.edit(lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n")
                server.kill_clients()

            def end() -> None:
                between.heal()
                server.kill_clients()

            yield Scene({"url": between.url}, begin, end)
