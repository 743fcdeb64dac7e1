"""Where a Redis server is and how to get in: from a URL or from parts, checked before anything connects.

Rules:
- A wrong setting is a ``ValueError`` here, at once; it never quotes a URL, which may hold a password, nor a piece
  of one that could have been mistaken for an option.
- TLS verifies certificate and host name. Nothing in a URL can weaken that: the word for it is ``tls_insecure``.
- Plaintext where TLS was asked for is an error, never a fallback.
"""

from __future__ import annotations

import re
import ssl
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

_PLAIN: Final = frozenset({"redis", "valkey"})
_TLS: Final = frozenset({"rediss", "valkeys"})
_UNIX: Final = frozenset({"unix", "redis+unix", "valkey+unix"})
_OPTIONS: Final = ("db", "ssl_ca_certs", "ssl_certfile", "ssl_cert_reqs", "ssl_check_hostname", "ssl_keyfile")
_UNIX_OPTIONS: Final = ("db", "password", "username")
_OPTION_NAME: Final = re.compile(r"[a-z_]{1,32}")
_YES: Final = frozenset({"1", "true", "yes", "on", "required"})


@dataclass(frozen=True, slots=True)
class Address:
    """A server, a database there, and credentials; shows itself without them.

    Attributes:
        path: A unix socket's; then host and port mean nothing.
        tls: None: plaintext.
    """

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    db: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        """The server, for people."""
        if self.path is not None:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def make_address(
    url: str | None,
    *,
    host: str,
    port: int,
    db: int,
    username: str | None,
    password: str | None,
    unix_socket_path: str | PathLike[str] | None,
    use_tls: bool,
    ca_certs: str | PathLike[str] | None,
    client_cert: str | PathLike[str] | None,
    client_key: str | PathLike[str] | None,
    tls_insecure: bool,
) -> Address:
    """Return the address that *url* says, or the parts where there is none; see ``RedisStore`` for them.

    User name and password are taken from the parts where the URL has none.

    Raises:
        ValueError: A part is out of range, contradicts another or would weaken TLS.
    """
    path = None if unix_socket_path is None else fspath(unix_socket_path)
    given = {"ca_certs": ca_certs, "client_cert": client_cert, "client_key": client_key}
    files = {name: fspath(file) for name, file in given.items() if file}
    if url is not None:
        said = _parse(url, tls_insecure=tls_insecure)
        files.update(said.files)
        if use_tls and not said.tls:
            raise ValueError("TLS was asked for (ssl=True, REDIS_SSL=true), but the URL has none: use a rediss:// URL")
        host, port, db, path = said.host, said.port, said.db, said.path
        # One or the other: the URL's user with another's password would be neither.
        if said.username or said.password:
            username, password = said.username, said.password
        use_tls = said.tls
    elif path is not None and use_tls:
        raise ValueError("a unix socket has no TLS: leave ssl or unix_socket_path out")
    _check(host, port, db, path)
    if client_cert and not use_tls:
        raise ValueError(
            "client_cert (REDIS_CLIENT_CERT) was given, but no TLS to show it in: use a rediss:// URL, or ssl=True "
            "(REDIS_SSL=true)"
        )
    context = _context(files, insecure=tls_insecure) if use_tls else None
    return Address(host, port, path, db, username or None, password or None, context)


def _check(host: str, port: int, db: int, path: str | None) -> None:
    if path is None and not host:
        raise ValueError("host must be a name or an address, not empty")
    if type(port) is not int or not 1 <= port <= 65535:
        raise ValueError("port must be a number from 1 to 65535")
    if type(db) is not int or db < 0:
        raise ValueError("db must be a number, 0 or more")
    if path is not None and not path:
        raise ValueError("unix_socket_path must be the path of a socket, not empty")


@dataclass(slots=True)
class _Said:
    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    db: int = 0
    username: str | None = None
    password: str | None = None
    tls: bool = False
    files: dict[str, str] = field(default_factory=dict)


def _parse(url: str, *, tls_insecure: bool) -> _Said:
    parts, port = _split(url)
    if parts is None:
        raise ValueError(_malformed("its port is not a number, or its address not in order"))
    if parts.fragment or "@" in parts.query or "@" in parts.path:
        raise ValueError(_malformed("it has '#', or '@' after the host"))
    said = _Said(tls=parts.scheme in _TLS)
    said.username = unquote(parts.username) if parts.username else None
    said.password = unquote(parts.password) if parts.password else None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme in _UNIX:
        if parts.hostname:
            raise ValueError("a unix socket's URL has three slashes: unix:///path/to/socket")
        said.path = unquote(parts.path)
        _only(options, _UNIX_OPTIONS)
        said.username = said.username or options.get("username")
        said.password = said.password or options.get("password")
    elif parts.scheme in _PLAIN | _TLS:
        said.host = unquote(parts.hostname or "localhost")
        said.port = 6379 if port is None else port
        _only(options, _OPTIONS)
        digits = unquote(parts.path).strip("/")
        if digits:
            options.setdefault("db", digits)
        _take_tls(options, said, insecure=tls_insecure)
    else:
        raise ValueError("a Redis URL starts with redis://, rediss:// (TLS), unix://, or valkey:// and valkeys://")
    if "db" in options:
        if not options["db"].isdecimal() or len(options["db"]) > 9:
            raise ValueError(_malformed("what follows the host is not a database number"))
        said.db = int(options["db"])
    return said


def _split(url: str) -> tuple[SplitResult | None, int | None]:
    """The parts of *url* and its port; None: it has none that could be told apart."""
    # Said by an answer: an error in its place would have this one, which may quote the password, for its context.
    with suppress(ValueError):
        parts = urlsplit(url)
        return parts, parts.port
    return None, None


def _malformed(what: str) -> str:
    return (
        f"the Redis URL can't be read: {what}. It looks like redis://[[user]:password@]host[:port][/db]; "
        "special characters in user name and password are percent-encoded (urllib.parse.quote(password, safe=''))"
    )


def _only(options: dict[str, str], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            shown = f" {name!r}" if _OPTION_NAME.fullmatch(name) else ""
            raise ValueError(f"unknown option{shown} in the Redis URL; it takes {', '.join(known)}")


def _take_tls(options: dict[str, str], said: _Said, *, insecure: bool) -> None:
    for option in ("ssl_cert_reqs", "ssl_check_hostname"):
        if option in options and options[option].lower() not in _YES and not insecure:
            raise ValueError(
                f"{option} in the Redis URL would switch verification off. For a private certificate authority give "
                "ca_certs (REDIS_CA_CERTS); tls_insecure=True gives up verification knowingly"
            )
    if not said.tls and any(name.startswith("ssl_") for name in options):
        raise ValueError("the Redis URL has TLS options, but no TLS: use a rediss:// URL")
    for option, name in (("ssl_ca_certs", "ca_certs"), ("ssl_certfile", "client_cert"), ("ssl_keyfile", "client_key")):
        if options.get(option):
            said.files[name] = options[option]


def _context(files: dict[str, str], *, insecure: bool) -> ssl.SSLContext:
    # Made once: loading the system's authorities takes tens of milliseconds, which no connection should cost the loop.
    context = ssl.create_default_context()
    for name, path in files.items():
        if not Path(path).is_file():
            raise ValueError(f"{name}: there is no file {path}")
    try:
        if "ca_certs" in files:
            context.load_verify_locations(cafile=files["ca_certs"])
        if "client_cert" in files:
            context.load_cert_chain(
                files["client_cert"], files.get("client_key"), password=""
            )  # never asks at the terminal
        elif "client_key" in files:
            raise ValueError("client_key needs client_cert beside it")
    except (ssl.SSLError, OSError) as error:
        raise ValueError("ca_certs, client_cert or client_key holds no usable PEM data") from error
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
