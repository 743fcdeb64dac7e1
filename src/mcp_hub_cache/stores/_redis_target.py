"""What a store connects to: one server, the primary that Sentinel names, or a cluster. From a URL or from parts.

Rules:
- ``_redis_address`` reads credentials, TLS and database, the same for all three. Here is what several hosts add: a
  URL is split into its hosts and one that names the first of them alone.
- A combination that makes no sense is a ``ValueError`` that says which of the two to leave out; no URL is ever quoted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ._redis_address import Address, make_address

_SENTINEL_URL: Final = {"sentinel": "redis", "sentinels": "rediss"}
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s\[\]:/@?#,]+)(?::(\d{1,5}))?")
_SENTINEL_PORT: Final = 26379
_SERVICE: Final = "mymaster"


@dataclass(frozen=True, slots=True)
class Target:
    """What to connect to.

    Attributes:
        address: One server. With nodes: the credentials, TLS and database of all, and the first node's host and port.
        nodes: The sentinels, or the cluster's nodes to start from; empty: the address alone.
        service: What the sentinels call the primary; None: no Sentinel.
    """

    address: Address
    nodes: tuple[Address, ...] = ()
    service: str | None = None

    @property
    def where(self) -> str:
        """All of it, for people."""
        if not self.nodes:
            return self.address.where
        hosts = ",".join(node.where for node in self.nodes)
        return f"the cluster at {hosts}" if self.service is None else f"{self.service} of the sentinels at {hosts}"


def make_target(
    url: str | None,
    *,
    sentinels: str | Sequence[str] | None,
    sentinel_service: str | None,
    sentinel_username: str | None,
    sentinel_password: str | None,
    cluster: bool,
    **parts: Any,
) -> Target:
    """Return what the URL and the parts name; *parts* are those of ``make_address``.

    Raises:
        ValueError: A part is out of range, contradicts another or would weaken TLS.
    """
    by_url = url is not None and url.partition("://")[0] in _SENTINEL_URL
    if cluster and (sentinels or by_url):
        raise ValueError(
            "a cluster (cluster=True, REDIS_CLUSTER) has no sentinels (sentinels, REDIS_SENTINELS, a sentinel:// URL): "
            "leave one of the two out"
        )
    if sentinels and (url is not None or parts.get("unix_socket_path") is not None):
        raise ValueError(
            "sentinels (REDIS_SENTINELS) say where the server is: leave url (REDIS_URL) and unix_socket_path out, or "
            "use a sentinel://host:port,host:port/service URL alone"
        )
    if not (sentinels or by_url):
        if sentinel_service or sentinel_username or sentinel_password:
            raise ValueError(
                "sentinel_service, sentinel_username or sentinel_password (REDIS_SENTINEL_…) was given, but no "
                "sentinels: give sentinels (REDIS_SENTINELS) or a sentinel:// URL"
            )
        if _has_several(url) and not cluster:
            raise ValueError(
                "the Redis URL names several hosts: for a cluster's nodes give cluster=True (REDIS_CLUSTER=true), for "
                "sentinels use sentinel://host:port,host:port/service"
            )
        return _cluster(url, parts) if cluster else Target(make_address(url, **parts))
    service = sentinel_service or _SERVICE
    if by_url:
        assert url is not None
        url, hosts, named = _split(url)
        if named and sentinel_service and named != sentinel_service:
            raise ValueError(
                "sentinel_service (REDIS_SENTINEL_SERVICE) is another than the URL's: leave one of them out"
            )
        service = named or service
    else:
        hosts = sentinels if isinstance(sentinels, str) else ",".join(sentinels or ())
        url = None
    places = _hosts(hosts, _SENTINEL_PORT)
    host, port = places[0]
    address = replace(make_address(url, **parts), host=host, port=port)
    sentinel = replace(address, db=0, username=sentinel_username or None, password=sentinel_password or None)
    return Target(address, tuple(replace(sentinel, host=host, port=port) for host, port in places), service)


def _cluster(url: str | None, parts: dict[str, Any]) -> Target:
    if url is not None and _has_several(url):
        url, hosts, database = _split(url)
        if database:
            url += f"/{database}"
        places = _hosts(hosts, 6379)
        address = make_address(url, **parts)
    else:
        address = make_address(url, **parts)
        places = [(address.host, address.port)]
    if address.path is not None:
        raise ValueError("a cluster's nodes name each other by host and port: give host and port, no unix socket")
    if address.db:
        raise ValueError(
            f"a cluster has database 0 alone: db (REDIS_DB, or the number at the end of REDIS_URL) is {address.db}; "
            "leave it out, and keep caches apart by prefix (CACHE_KEY_PREFIX) or namespace"
        )
    nodes = tuple(replace(address, host=host, port=port) for host, port in places)
    return Target(nodes[0], nodes)


def _has_several(url: str | None) -> bool:
    return url is not None and "," in url.partition("://")[2].rpartition("@")[2].partition("/")[0]


def _split(url: str) -> tuple[str, str, str]:
    """Return *url* with one host, its hosts, and the first part of its path where it is a sentinel's."""
    scheme, _, rest = url.partition("://")
    rest, mark, query = rest.partition("?")
    # A slash, or a question mark, in a password that was not percent-encoded must not end up in a host's place.
    if "@" in query or "@" in rest.partition("/")[2]:
        raise ValueError(_malformed())
    place, _, path = rest.partition("/")
    user, at, hosts = place.rpartition("@")
    service, _, database = path.partition("/")
    one = f"{_SENTINEL_URL.get(scheme, scheme)}://{user}{at}localhost"
    if database:
        one += f"/{database}"
    return one + mark + query, hosts, service


def _hosts(text: str, port: int) -> list[tuple[str, int]]:
    places: list[tuple[str, int]] = []
    for piece in text.split(","):
        if not piece.strip():
            continue
        found = _HOST.fullmatch(piece.strip())
        number = int(found[2] or port) if found is not None else 0
        if found is None or not 1 <= number <= 65535:
            raise ValueError(_malformed())
        places.append((found[1].strip("[]"), number))
    if not places:
        raise ValueError(_malformed())
    return places


def _malformed() -> str:
    return (
        "the list of hosts can't be read: it looks like host:port,host:port, with an IPv6 address in brackets; a URL "
        "like sentinel://[user:password@]host:port,host:port/service[/db] (or redis://… for a cluster), with special "
        "characters in user name and password percent-encoded (urllib.parse.quote(password, safe=''))"
    )
