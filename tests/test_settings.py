"""Settings: defaults, sources, and what a wrong value is told."""

from __future__ import annotations

import copy
import math
import os
import traceback
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcp_hub_cache._exceptions import SettingsError
from mcp_hub_cache._open import open_cache
from mcp_hub_cache._settings import Settings, load_settings

# The reference document's block, to the letter.
REFERENCE = """\
# Cache Backend Selection
CACHE_BACKEND=redis  # Options: "file" or "redis"

# File Cache Settings (used when CACHE_BACKEND=file)
CACHE_DIR=cache
CACHE_DEFAULT_TTL=3600

# Redis Connection Settings
REDIS_HOST=localhost
REDIS_PORT=6379
REDIS_DB=0
REDIS_PASSWORD=  # Optional: leave empty if no password

# Advanced Redis Settings
REDIS_SSL=false  # Set to "true" for SSL connections
REDIS_MAX_CONNECTIONS=50

# Or use a Redis URL (takes precedence over individual settings)
REDIS_URL=redis://localhost:6379/0
# For password-protected Redis:
# REDIS_URL=redis://:password@localhost:6379/0
# For Redis with SSL:
# REDIS_URL=rediss://localhost:6379/0
"""

EXAMPLES = {
    "local": "CACHE_BACKEND=file\nCACHE_DIR=cache\nCACHE_DEFAULT_TTL=3600\n",
    "production": "CACHE_BACKEND=redis\nREDIS_HOST=redis.example.com\nREDIS_PASSWORD=p\nREDIS_SSL=true\n",
    "kubernetes": "CACHE_BACKEND=redis\nREDIS_HOST=redis-service\nREDIS_PORT=6379\nREDIS_DB=0\n",
    "aws": "CACHE_BACKEND=redis\nREDIS_URL=rediss://master.my-cache.use1.cache.amazonaws.com:6379\nREDIS_SSL=true\n",
    "azure": "CACHE_BACKEND=redis\nREDIS_HOST=my.windows.net\nREDIS_PORT=6380\nREDIS_PASSWORD=k\nREDIS_SSL=true\n",
    "tls trouble": "CACHE_BACKEND=redis\nREDIS_SSL=true\nREDIS_URL=rediss://your-host:6380\n",
}


def settings(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def complaint(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        settings(monkeypatch, **variables)
    return str(caught.value)


def test_defaults() -> None:
    found = load_settings()
    assert (found.cache_backend, found.cache_dir, found.cache_default_ttl) == ("file", Path("cache"), 3600.0)
    assert (found.redis_host, found.redis_port, found.redis_db) == ("localhost", 6379, 0)
    assert (found.redis_username, found.redis_password, found.redis_url) == (None, None, None)
    assert (found.redis_ssl, found.redis_ca_certs, found.redis_tls_insecure) == (False, None, False)
    assert (found.redis_max_connections, found.cache_timeout, found.cache_fallback) == (50, 0.5, "file")
    assert (found.cache_key_prefix, found.cache_namespace) == ("mcp_hub:", "default")
    assert (found.cache_l1_max_entries, found.cache_l1_max_bytes, found.cache_max_bytes) == (1024, 2**26, 2**30)
    assert found.cache_durable is False
    assert found.server == "redis://localhost:6379/0"


def test_the_reference_block_from_env_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(REFERENCE)
    found = load_settings()
    assert found.cache_backend == "redis"
    assert found.redis_password is None
    assert found.redis_ssl is False
    assert found.redis_url is not None
    assert found.redis_url.get_secret_value() == "redis://localhost:6379/0"
    assert found.redis_max_connections == 50


@pytest.mark.parametrize("text", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_the_reference_examples(tmp_path: Path, text: str) -> None:
    (tmp_path / ".env").write_text(text)
    found = load_settings()
    assert found.tls is ("REDIS_SSL=true" in text)


def test_the_environment_wins_over_the_file_even_where_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("CACHE_BACKEND=redis\nREDIS_URL=redis://elsewhere\nREDIS_HOST=there\nREDIS_DB=3\n")
    found = settings(monkeypatch, REDIS_URL="", REDIS_HOST="here")
    assert found.server == "redis://here:6379/3"
    assert found.cache_backend == "redis"


def test_an_override_wins_over_the_environment_and_none_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_BACKEND", "redis")
    assert load_settings(cache_backend="memory", cache_default_ttl=None).cache_backend == "memory"
    with pytest.raises(TypeError, match="cache_bakend"):
        load_settings(cache_bakend="memory")


def test_names_in_any_case_and_values_with_space(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings(monkeypatch, cache_backend=" Redis ", Redis_Port=" 7000 ", REDIS_CLUSTER="False")
    assert (found.cache_backend, found.redis_port) == ("redis", 7000)


def test_unrelated_variables_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("OTHER=1\nexport CACHE_DIR='a # b'\nJUST_A_NAME\n")
    assert settings(monkeypatch, CACHE_SOMETHING="x").cache_dir == Path("a # b")


@pytest.mark.parametrize("file", [None, "elsewhere.env", "folder"])
def test_no_env_file_is_fine(tmp_path: Path, file: str | None) -> None:
    (tmp_path / "folder").mkdir()
    assert load_settings(env_file=file).cache_backend == "file"


def test_an_env_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"REDIS_PASSWORD=\xff\xfe")
    with pytest.raises(SettingsError, match="UTF-8"):
        load_settings()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_env_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").touch(0o000)
    with pytest.raises(SettingsError, match=r"\.env can't be read"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "ttl"),
    [("600", 600.0), ("0.5", 0.5), ("10m", 600.0), ("1h30m", 5400.0), ("forever", math.inf), ("FOREVER", math.inf)],
)
def test_ttl(monkeypatch: pytest.MonkeyPatch, text: str, ttl: float) -> None:
    assert settings(monkeypatch, CACHE_DEFAULT_TTL=text).cache_default_ttl == ttl


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("512MB", 512_000_000), ("1GiB", 2**30), ("1.5 KiB", 1536), ("64Mi", 2**26), ("2gb", 2 * 10**9)],
)
def test_sizes(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    assert settings(monkeypatch, CACHE_MAX_BYTES=text).cache_max_bytes == size


def test_zero_turns_the_near_cache_off(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings(monkeypatch, CACHE_L1_MAX_ENTRIES="0", CACHE_L1_MAX_BYTES="0")
    assert (found.cache_l1_max_entries, found.cache_l1_max_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("CACHE_BACKEND", "mongo", "file, redis or memory"),
        ("CACHE_DEFAULT_TTL", "0", "seconds, more than 0"),
        ("CACHE_DEFAULT_TTL", "-5", "seconds, more than 0"),
        ("CACHE_DEFAULT_TTL", "nan", "seconds, more than 0"),
        ("CACHE_DEFAULT_TTL", "inf", '"forever"'),
        ("CACHE_DEFAULT_TTL", "soon", "seconds, more than 0"),
        ("CACHE_DIR", "a\0b", "a folder"),
        ("CACHE_FALLBACK", "maybe", "file, memory or none"),
        ("CACHE_KEY_PREFIX", "a b", "in front of every key"),
        ("CACHE_KEY_PREFIX", "a*", "in front of every key"),
        ("CACHE_L1_MAX_ENTRIES", "-1", "a whole number"),
        ("CACHE_L1_MAX_ENTRIES", "many", "a whole number"),
        ("CACHE_L1_MAX_BYTES", "1 XB", "a size in bytes"),
        ("CACHE_MAX_BYTES", "0", "more than 0"),
        ("CACHE_MAX_BYTES", "-1", "a size in bytes"),
        ("CACHE_NAMESPACE", "a/b", "letters, digits"),
        ("CACHE_NAMESPACE", "..", "not all dots"),
        ("CACHE_NAMESPACE", "n" * 65, "1 to 64"),
        ("CACHE_TIMEOUT", "0", "more than 0"),
        ("CACHE_TIMEOUT", "forever", "more than 0"),
        ("CACHE_TIMEOUT", "inf", "more than 0"),
        ("REDIS_CA_CERTS", "a\0b", "CA certificates"),
        ("REDIS_DB", "-1", "a database number"),
        ("REDIS_HOST", "redis://host", "a URL goes into REDIS_URL"),
        ("REDIS_MAX_CONNECTIONS", "0", "1 or more"),
        ("REDIS_PORT", "0", "1 to 65535"),
        ("REDIS_PORT", "65536", "1 to 65535"),
        ("REDIS_PORT", "redis", "1 to 65535"),
        ("REDIS_SSL", "perhaps", "true or false"),
        ("REDIS_TLS_INSECURE", "perhaps", "true or false"),
        ("REDIS_URL", "http://host", "redis://"),
        ("REDIS_URL", "redis://", "redis://"),
        ("REDIS_URL", "unix://", "unix:///"),
        ("REDIS_URL", "redis://host:port", "redis://"),
        ("REDIS_URL", "redis://host:0", "redis://"),
        ("REDIS_URL", "redis://host:70000", "redis://"),
        ("CACHE_COALESCE", "world", "fleet"),
        ("CACHE_MAX_REFRESHES", "-1", "whole number"),
        ("REDIS_CLUSTER", "perhaps", "true or false"),
        ("REDIS_SENTINELS", "one,redis://two", "host:port,host:port"),
        ("REDIS_SENTINELS", "one:port", "host:port,host:port"),
        ("REDIS_URL", "sentinel://", "sentinel://"),
        ("REDIS_URL", "sentinel://one:x/mymaster", "sentinel://"),
        ("REDIS_URL", "sentinel://one,two/mymaster/first", "sentinel://"),
        ("REDIS_URL", "redis://one,two/first", "redis://"),
        # Asked for by name, and not there yet.
        ("CACHE_COMPRESS_MIN_BYTES", "1024", "not available"),
        ("CACHE_ON_MISCONFIGURED", "raise", "not available"),
        ("CACHE_SECRET_KEY", "a" * 31, "at least 32 characters"),
        ("CACHE_SECRET_KEY_PREVIOUS", "b" * 31, "at least 32 characters"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_held_and_what_it_takes(name: str, value: str, takes: str) -> None:
    # As an argument: a NUL can't stand in the environment.
    with pytest.raises(SettingsError) as caught:
        load_settings(**{name.lower(): value})
    message = str(caught.value)
    assert message.startswith(f"{name} held ")
    assert takes in message
    assert "\n" not in message
    if "SECRET" in name:
        assert value not in message
    else:
        assert value[:40].replace("\0", "\\x00") in message


def test_all_wrong_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    message = complaint(monkeypatch, CACHE_BACKEND="x", REDIS_PORT="y", REDIS_DB="z", CACHE_TIMEOUT="10m")
    assert [line.partition(" ")[0] for line in message.splitlines()] == ["CACHE_BACKEND", "REDIS_PORT", "REDIS_DB"]


def test_what_asks_for_nothing_special_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    settings(
        monkeypatch,
        CACHE_COALESCE="process",
        CACHE_COMPRESS_MIN_BYTES="",
        CACHE_ON_MISCONFIGURED="serve",
        CACHE_SECRET_KEY="",
        REDIS_CLUSTER="no",
        REDIS_SENTINELS="",
    )


def test_tls_asked_for_with_a_plain_url_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    message = complaint(monkeypatch, REDIS_SSL="true", REDIS_URL="redis://:hunter2@host:6379/0")
    assert "REDIS_SSL" in message
    assert "redis://***@host:6379/0" in message
    assert "rediss://" in message
    assert "hunter2" not in message


SENTINEL = {"REDIS_SENTINELS": "one,two:26380"}
SENTINEL_URL = {"REDIS_URL": "sentinel://:hunter2@one,two/main/2"}


@pytest.mark.parametrize(
    ("said", "names", "cure"),
    [
        ({**SENTINEL, "REDIS_URL": "redis://:hunter2@host"}, ["REDIS_SENTINELS", "REDIS_URL"], "leave one"),
        ({**SENTINEL, "REDIS_CLUSTER": "true"}, ["REDIS_SENTINELS", "REDIS_CLUSTER"], "leave one"),
        ({**SENTINEL_URL, "REDIS_CLUSTER": "true"}, ["REDIS_URL", "REDIS_CLUSTER"], "leave one"),
        ({"REDIS_SENTINEL_PASSWORD": "hunter2"}, ["REDIS_SENTINEL_PASSWORD"], "set REDIS_SENTINELS"),
        ({"REDIS_SENTINEL_SERVICE": "main"}, ["REDIS_SENTINEL_SERVICE"], "set REDIS_SENTINELS"),
        ({"REDIS_CLUSTER": "true", "REDIS_DB": "1"}, ["REDIS_CLUSTER", "REDIS_DB"], "leave it out"),
        ({"REDIS_CLUSTER": "true", "REDIS_URL": "redis://one,two/1"}, ["REDIS_CLUSTER", "REDIS_URL"], "leave it out"),
        ({"REDIS_URL": "redis://:hunter2@one,two"}, ["REDIS_URL"], "REDIS_CLUSTER=true"),
        ({**SENTINEL_URL, "REDIS_SSL": "true"}, ["REDIS_SSL", "REDIS_URL"], "rediss://"),
    ],
)
def test_combinations_that_make_no_sense(
    said: dict[str, str], names: list[str], cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = complaint(monkeypatch, **said)
    assert all(name in message for name in names)
    assert cure in message
    assert "hunter2" not in message


def test_sentinel_and_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings(monkeypatch, CACHE_BACKEND="redis", CACHE_FALLBACK="none", **SENTINEL, REDIS_DB="2")
    assert found.server == "sentinel://one,two:26380/mymaster/2"
    target = open_cache(found).store._primary.store._target  # type: ignore[attr-defined]  # behind a breaker
    assert [node.where for node in target.nodes] == ["one:26379", "two:26380"]
    assert (target.service, target.address.db) == ("mymaster", 2)
    monkeypatch.delenv("REDIS_SENTINELS")
    monkeypatch.delenv("REDIS_DB")
    by_url = load_settings(redis_url="sentinels://:hunter2@one,two/main/3")
    assert (by_url.tls, by_url.server) == (True, "sentinels://***@one,two/main/3")
    clustered = open_cache(redis_url="redis://one:1,two", redis_cluster=True, cache_backend="redis")
    assert "one:1,two:6379" in clustered.store._primary.store._where  # type: ignore[attr-defined]  # the same


def test_ca_certificates_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "REDIS_CA_CERTS" in complaint(monkeypatch, CACHE_BACKEND="redis", REDIS_CA_CERTS="ca.pem")
    (tmp_path / "ca.pem").touch()
    assert load_settings().redis_ca_certs == Path("ca.pem")


@pytest.mark.parametrize("name", ["REDIS_CLIENT_CERT", "REDIS_CLIENT_KEY"])
def test_client_certificates_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert f"{name} held 'me.pem'" in complaint(monkeypatch, CACHE_BACKEND="redis", **{name: "me.pem"})
    (tmp_path / "me.pem").touch()
    monkeypatch.setenv("REDIS_CLIENT_CERT", "me.pem")
    assert load_settings().redis_client_cert == Path("me.pem")


def test_a_clients_key_without_its_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "REDIS_CLIENT_CERT is not" in complaint(monkeypatch, REDIS_CLIENT_KEY="me.pem")


def test_a_port_that_kubernetes_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(monkeypatch, REDIS_PORT="tcp://10.0.0.1:6379").redis_port == 6379  # no Redis used: no concern
    assert "Kubernetes" in complaint(monkeypatch, CACHE_BACKEND="redis")


def test_the_server_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(monkeypatch, REDIS_HOST="::1", REDIS_SSL="1", REDIS_DB="2").server == "rediss://[::1]:6379/2"
    url = "rediss://me:pw@h:1/0?password=pw2"
    assert settings(monkeypatch, REDIS_URL=url).server == "rediss://***@h:1/0?password=***"


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert settings(monkeypatch, CACHE_DIR="~/c").cache_dir == Path("/home/someone/c")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().redis_db = 3


PASSWORD = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1).map(
    lambda text: f"S3cr{text}Et"
)


@given(PASSWORD)
@example("S3cr/@?#:Et")
def test_a_password_is_never_shown(password: str) -> None:
    for given_ in ({"redis_password": password}, {"redis_url": f"rediss://user:{password}@host:6379/0"}):
        for wrong in ({}, {"cache_backend": "x"}, {"redis_ssl": True, "redis_url": f"redis://:{password}@host"}):
            try:
                found = load_settings(env_file=None, **{**given_, **wrong})
            except SettingsError as error:
                shown = "".join(traceback.format_exception(error))
            else:
                shown = f"{found!r} {found} {found.server} {copy.copy(found)!r} {found.model_dump_json()}"
            assert password not in shown
            assert "S3cr" not in shown
            assert "ValidationError" not in shown


@pytest.mark.parametrize(
    "value", ["hunter2", "user:hunter2@host", "htp://user:hunter2@host", "redis://u:hun@ter/hunter2@h:x"]
)
def test_a_password_in_a_wrong_place_is_not_shown_either(value: str) -> None:
    for name in ("redis_url", *(["redis_host"] if "@" in value else [])):
        with pytest.raises(SettingsError) as caught:
            load_settings(**{name: value})
        assert "hunter2" not in str(caught.value)
