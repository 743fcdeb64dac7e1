"""What people see when something is wrong with Redis leads to what to do: docs/troubleshooting.md, and the command.

That the texts of the page are those of real servers in these states is proven with ``CASES``, in test_errors.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mcp_hub_cache import SettingsError, open_cache
from tests.cli.test_command import Command
from tests.faults.test_errors import CASES
from tests.servers import certificates, free_port, redis_server, valkey_server

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
ROW = re.compile(r"^\| (`.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))


def cure_of(seen: str) -> str:
    """What the page says to do about a text."""
    (row,) = [row for row in ROWS if f"`{seen}`" in row[0]]
    cure: str = row[2]
    return cure


@pytest.mark.parametrize("name", CASES)
def test_the_page_has_each_state_with_its_cure(name: str) -> None:
    case = CASES[name]
    assert case.cure in cure_of(case.says).replace("`", "")
    (row,) = [row for row in ROWS if f"`{case.says}`" in row[0]]
    assert f"({case.kind})" in row[0]


def test_the_page_has_no_other_states() -> None:
    """What it quotes in the first column is what some message says."""
    known = {case.says for case in CASES.values()}
    for seen, _, _ in ROWS:
        assert known & set(re.findall(r"`([^`]+)`", seen)) or "REDIS_SSL held true" in seen, seen


# The cases of the document that the project grew from, by the command.


def test_redis_connection_failed_and_fallback_to_file_cache(tmp_path: Path) -> None:
    port = free_port()
    done = Command("redis", REDIS_PORT=str(port), REDIS_HOST="127.0.0.1", CACHE_DIR=str(tmp_path))("status")
    assert done.returncode == 3
    assert "ERROR Failed to initialize Redis cache backend: Redis connection failed" in done.stderr
    assert f"Error connecting to 127.0.0.1:{port}. Connection refused." in done.stderr
    for cure in ("redis-cli ping", "REDIS_HOST", "REDIS_PORT", "REDIS_URL", "firewall"):
        assert cure in done.stderr
        assert cure.rstrip("s") in cure_of("Connection refused")
    assert "redis is degraded" in done.stderr


def test_authentication_failed(tmp_path: Path) -> None:
    with valkey_server(password="hunter2") as server:
        done = Command("redis", REDIS_URL=server.url, CACHE_DIR=str(tmp_path))("status")
        assert done.returncode == 3
        assert "NOAUTH Authentication required" in done.stderr
        assert "Set REDIS_PASSWORD" in done.stderr and "REDIS_URL=redis://:password@host:6379/0" in done.stderr


def test_certificate_verify_failed(tmp_path: Path) -> None:
    pems = certificates(tmp_path, "localhost")
    with redis_server(tls=pems) as server:
        command = Command(
            "redis",
            REDIS_HOST="localhost",
            REDIS_PORT=str(server.tls_port),
            CACHE_DIR=str(tmp_path / "cache"),
            CACHE_TIMEOUT="20",
        )
        plain = command("status")
        assert plain.returncode == 3
        assert "speaks TLS" in plain.stderr and "Set REDIS_SSL=true, or use a rediss:// URL" in plain.stderr
        untrusted = command("status", env={"REDIS_SSL": "true"})
        assert untrusted.returncode == 3
        assert "CERTIFICATE_VERIFY_FAILED" in untrusted.stderr and "Set REDIS_CA_CERTS" in untrusted.stderr
        put_right = command("status", env={"REDIS_SSL": "true", "REDIS_CA_CERTS": pems.ca})
        assert (put_right.returncode, put_right.stderr) == (0, "")


def test_tls_and_a_plain_url_contradict_each_other() -> None:
    with pytest.raises(SettingsError) as caught:
        open_cache(cache_backend="redis", redis_ssl=True, redis_url="redis://localhost:6379/0")
    assert "REDIS_SSL held true, but REDIS_URL held" in str(caught.value)
    assert "rediss://" in str(caught.value) and "rediss://" in cure_of("REDIS_SSL held true, but REDIS_URL held")


def test_high_memory_usage(tmp_path: Path) -> None:
    with valkey_server("--maxmemory", "1") as server:
        done = Command("redis", REDIS_URL=server.url, CACHE_DIR=str(tmp_path))("set", "k", "v")
        assert done.returncode == 3
        assert "is full (OOM)" in done.stderr
        assert done.stderr.count("CONFIG SET maxmemory-policy allkeys-lru") == 2  # the log's warning, and the answer
