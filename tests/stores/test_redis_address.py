"""What a Redis URL and its parts may say, and what went wrong, said for people."""

from __future__ import annotations

import errno
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache._exceptions import StoreError
from mcp_hub_cache.stores._redis_errors import store_error
from mcp_hub_cache.stores.redis import RedisStore
from tests.servers import certificates

SECRET = "s3cr3t"


def parts(url: str | None = None, **said: Any) -> tuple[Any, ...]:
    address = RedisStore(url, **said)._address
    return address.where, address.db, address.username, address.password, address.tls is not None


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        (None, ("localhost:6379", 0, None, None, False)),
        ("redis://", ("localhost:6379", 0, None, None, False)),
        ("redis://redis", ("redis:6379", 0, None, None, False)),
        ("redis://redis:7000/3", ("redis:7000", 3, None, None, False)),
        ("redis://redis:7000?db=4", ("redis:7000", 4, None, None, False)),
        ("redis://:pw@redis", ("redis:6379", 0, None, "pw", False)),
        ("redis://:@redis", ("redis:6379", 0, None, None, False)),
        ("redis://me:p%40%2F%3A%23w@redis", ("redis:6379", 0, "me", "p@/:#w", False)),
        ("valkey://[::1]:7000/1", ("[::1]:7000", 1, None, None, False)),
        ("rediss://redis:6380/0", ("redis:6380", 0, None, None, True)),
        ("valkeys://redis", ("redis:6379", 0, None, None, True)),
        ("unix:///run/redis.sock", ("/run/redis.sock", 0, None, None, False)),
        ("unix:///run/redis.sock?db=2&password=pw", ("/run/redis.sock", 2, None, "pw", False)),
        ("valkey+unix:///run/redis.sock", ("/run/redis.sock", 0, None, None, False)),
        ("unix://me:pw@/run/redis.sock", ("/run/redis.sock", 0, "me", "pw", False)),
        ("rediss://redis?ssl_cert_reqs=required&ssl_check_hostname=true", ("redis:6379", 0, None, None, True)),
    ],
)
def test_urls(url: str | None, meant: tuple[Any, ...]) -> None:
    assert parts(url) == meant


def test_parts() -> None:
    assert parts(host="h", port=1, db=2, username="u", password="p", ssl=True) == ("h:1", 2, "u", "p", True)
    assert parts(unix_socket_path="/s", password="") == ("/s", 0, None, None, False)


def test_the_url_wins_but_takes_credentials_from_the_parts() -> None:
    assert parts("redis://a:1/2", host="b", port=3, db=4) == ("a:1", 2, None, None, False)
    assert parts("redis://a", username="u", password="p") == ("a:6379", 0, "u", "p", False)
    assert parts("redis://:mine@a", username="u", password="p") == ("a:6379", 0, None, "mine", False)
    assert parts("rediss://a", ssl=True) == ("a:6379", 0, None, None, True)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://redis",
        "redis+sentinel://redis",
        "redis://redis:port",
        "redis://redis:0",
        "redis://redis:70000",
        "redis://redis/zero",
        "redis://redis/-1",
        "redis://redis?db=x",
        "redis://redis?protocol=3",
        "redis://redis?socket_timeout=5",
        "unix://tmp/redis.sock",
        "unix://",
        "unix:///s?ssl_cert_reqs=none",
        f"redis://:{SECRET}#x@redis",
        f"redis://:x#{SECRET}@redis",
        f"redis://:{SECRET}/x@redis",
        f"redis://:x/{SECRET}@redis",
        f"redis://:{SECRET}?x@redis",
        f"redis://:x?{SECRET}@redis",
        f"redis://:x?{SECRET}=@redis",
        f"redis://u:{SECRET}:redis:6379",
        f"redis://[{SECRET}",
    ],
)
def test_urls_that_are_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        RedisStore(url)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    "option", ["ssl_cert_reqs=none", "ssl_cert_reqs=optional", "ssl_check_hostname=False", "ssl_check_hostname=0"]
)
def test_a_url_cannot_weaken_tls(option: str) -> None:
    with pytest.raises(ValueError, match="tls_insecure"):
        RedisStore(f"rediss://redis?{option}")
    assert parts(f"rediss://redis?{option}", tls_insecure=True)[4]


def test_tls_is_verified_unless_given_up() -> None:
    strict = RedisStore("rediss://redis")._address.tls
    loose = RedisStore("rediss://redis", tls_insecure=True)._address.tls
    assert strict is not None
    assert loose is not None
    assert (strict.verify_mode, strict.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert (loose.verify_mode, loose.check_hostname) == (ssl.CERT_NONE, False)


@pytest.mark.parametrize(
    "said",
    [
        {"url": "redis://redis", "ssl": True},
        {"url": "unix:///s", "ssl": True},
        {"unix_socket_path": "/s", "ssl": True},
        {"url": "redis://redis?ssl_ca_certs=/x"},
        {"host": ""},
        {"port": 0},
        {"port": True},
        {"port": "6379"},
        {"db": -1},
        {"unix_socket_path": ""},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"max_connections": 0},
        {"ssl": True, "ca_certs": "/no/such/file"},
        {"ssl": True, "client_key": __file__},
        {"ssl": True, "ca_certs": __file__},
    ],
)
def test_parts_that_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        RedisStore(**said)


def test_certificates_from_the_url_and_the_parts(tmp_path: Path) -> None:
    pems = certificates(tmp_path, "localhost")
    by_parts = RedisStore(ssl=True, ca_certs=pems.ca, client_cert=pems.cert, client_key=pems.key)
    by_url = RedisStore(f"rediss://h?ssl_ca_certs={pems.ca}&ssl_certfile={pems.cert}&ssl_keyfile={pems.key}")
    assert by_parts._address.tls is not None
    assert by_url._address.tls is not None


def test_a_repr_has_no_secrets() -> None:
    for store in (RedisStore(f"redis://me:{SECRET}@redis/1"), RedisStore(password=SECRET)):
        assert SECRET not in f"{store!r} {store._address!r}"


@pytest.mark.parametrize(
    ("reply", "kind", "hint"),
    [
        ("NOAUTH Authentication required.", "auth", "REDIS_PASSWORD"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "auth", "REDIS_PASSWORD"),
        ("ERR invalid password", "auth", "REDIS_PASSWORD"),
        ("ERR operation not permitted", "auth", "REDIS_PASSWORD"),
        ("ERR Client sent AUTH, but no password is set", "auth", "Unset"),
        ("DENIED Redis is running in protected mode because …", "auth", "requirepass"),
        ("NOPERM User default has no permissions to run the 'get' command", "permission", "ACL"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "full", "allkeys-lru"),
        (
            "ERR Error running script (call to f_1): @user_script:2: @user_script: 2: -OOM command not allowed",
            "full",
            "allkeys-lru",
        ),
        ("READONLY You can't write against a read only replica.", "readonly", "primary"),
        ("MISCONF Redis is configured to save RDB snapshots, but …", "readonly", "disk"),
        ("LOADING Redis is loading the dataset in memory", "busy", ""),
        ("BUSY Redis is busy running a script.", "busy", "SCRIPT KILL"),
        ("MASTERDOWN Link with MASTER is down", "busy", ""),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "busy", ""),
        ("CLUSTERDOWN The cluster is down", "busy", ""),
        ("MOVED 3999 127.0.0.1:6381", "misconfigured", "Cluster"),
        ("ERR SELECT is not allowed in cluster mode", "misconfigured", "Cluster"),
        ("ERR DB index is out of range", "misconfigured", "REDIS_DB"),
        ("ERR max number of clients reached", "exhausted", "maxclients"),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", "protocol", "prefix"),
        ("ERR syntax error", "protocol", ""),
        ("", "protocol", ""),
        (f"ERR unknown command 'AUTH', with args beginning with: '{SECRET}'", "protocol", ""),
    ],
)
def test_replies(reply: str, kind: str, hint: str) -> None:
    error = store_error(reply, "redis:6379")
    assert isinstance(error, StoreError)
    assert error.kind == kind
    assert hint in error.cure
    assert "redis:6379" in str(error)
    assert SECRET not in str(error)
    assert not error.outage


@pytest.mark.parametrize(
    ("raised", "kind", "says"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "no"), "unreachable", "Connection refused"),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 111]"), "unreachable", "refused"),
        (OSError(errno.ENETUNREACH, "no"), "unreachable", "unreachable"),
        (ConnectionResetError("Connection lost"), "unreachable", "lost"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "unreachable", "can't be resolved"),
        (TimeoutError(), "timeout", "timed out"),
        (OSError(errno.EMFILE, "no"), "exhausted", "ulimit"),
        (PermissionError(errno.EACCES, "no"), "permission", "not permitted"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), "tls", "TLS"),
        (RuntimeError("what is that"), "protocol", "RuntimeError"),
    ],
)
def test_what_is_raised(raised: Exception, kind: str, says: str) -> None:
    error = store_error(raised, "redis:6379")
    assert error.kind == kind
    assert says in str(error)
    assert "what is that" not in str(error)
    assert store_error(error, "elsewhere") is error


def nodes(url: str | None = None, **said: Any) -> tuple[str, ...]:
    """The sentinels, or the nodes to start from."""
    return tuple(node.where for node in RedisStore(url, **said)._target.nodes)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"url": "sentinel://a:1,b"}, ("a:1", "b:26379")),
        ({"url": "sentinel://a,[::1]:2/db-primary/3"}, ("a:26379", "[::1]:2")),
        ({"url": f"sentinels://me:{SECRET}@a,b/x"}, ("a:26379", "b:26379")),
        ({"sentinels": "a:1, b"}, ("a:1", "b:26379")),
        ({"sentinels": ["a:1", "b"]}, ("a:1", "b:26379")),
        ({"url": "redis://a:1,b,[::1]:2", "cluster": True}, ("a:1", "b:6379", "[::1]:2")),
        ({"url": f"rediss://me:{SECRET}@a:1,b/0", "cluster": True}, ("a:1", "b:6379")),
        ({"host": "a", "port": 1, "cluster": True}, ("a:1",)),
        ({"host": "a"}, ()),
    ],
)
def test_several_hosts(said: dict[str, Any], meant: tuple[str, ...]) -> None:
    assert nodes(**said) == meant
    assert SECRET not in repr(RedisStore(**said)) + repr(RedisStore(**said)._target)


def test_what_a_sentinel_url_says() -> None:
    target = RedisStore("sentinels://me:p%40w@a,b/db-primary/3", sentinel_password="theirs")._target
    assert target.service == "db-primary"
    assert (target.address.db, target.address.username, target.address.password) == (3, "me", "p@w")
    assert target.address.tls is not None
    assert [(one.db, one.username, one.password) for one in target.nodes] == [(0, None, "theirs")] * 2
    assert all(one.tls is target.address.tls for one in target.nodes)
    assert RedisStore("sentinel://a")._target.service == "mymaster"
    assert RedisStore("sentinel://a", sentinel_service="x")._target.service == "x"
    assert RedisStore(sentinels="a", username="me", password="pw", db=2)._target.address.db == 2


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"sentinels": "a", "cluster": True}, "REDIS_CLUSTER"),
        ({"url": "sentinel://a", "cluster": True}, "REDIS_CLUSTER"),
        ({"sentinels": "a", "url": "redis://b"}, "REDIS_SENTINELS"),
        ({"sentinels": "a", "unix_socket_path": "/s"}, "REDIS_SENTINELS"),
        ({"sentinel_service": "x"}, "REDIS_SENTINELS"),
        ({"sentinel_password": SECRET}, "REDIS_SENTINELS"),
        ({"url": "sentinel://a/x", "sentinel_service": "y"}, "REDIS_SENTINEL_SERVICE"),
        ({"cluster": True, "db": 1}, "REDIS_DB"),
        ({"cluster": True, "url": "redis://a,b/1"}, "REDIS_DB"),
        ({"cluster": True, "url": "redis://a/1"}, "REDIS_DB"),
        ({"cluster": True, "unix_socket_path": "/s"}, "socket"),
        ({"sentinels": " , "}, "host:port"),
        ({"sentinels": "a:b"}, "host:port"),
        ({"sentinels": "a:0"}, "host:port"),
        ({"sentinels": "a:70000"}, "host:port"),
        ({"sentinels": f"me:{SECRET}@a"}, "host:port"),
        ({"url": "sentinel://"}, "host:port"),
        ({"url": f"sentinel://:{SECRET}/x@a,b"}, "host:port"),
        ({"url": f"sentinel://:x?{SECRET}@a,b"}, "host:port"),
        ({"url": "sentinel://a,b/x/first"}, "database"),
        ({"url": "redis://a,b"}, "port|address|host"),
    ],
)
def test_targets_that_are_refused(said: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        RedisStore(**said)
    assert SECRET not in str(caught.value)
