"""The command, as a process: what it prints where, and its exit codes."""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import MISSING, Cache, open_cache
from tests.servers import valkey_server

COMMAND = [sys.executable, "-m", "mcp_hub_cache"]
NOBODY = "redis://127.0.0.1:1/0"  # port 1: refused at once


class Command:
    """Runs the command with a backend's variables."""

    def __init__(self, backend: str, **variables: str) -> None:
        self.backend = backend
        self.variables = {"CACHE_BACKEND": backend} | variables
        self.env = os.environ | {"NO_COLOR": "1", "COLUMNS": "200"} | self.variables

    def __call__(
        self, *args: str, stdin: str = "", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *args],
            env=self.env | (env or {}),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def cache(self) -> Cache:
        """The cache that the command uses, in this process. So much time, since it may have to write many files."""
        return open_cache(**{name.lower(): value for name, value in self.variables.items()}, cache_timeout=60)

    def json(self, *args: str, code: int = 0, stdin: str = "") -> Any:
        done = self(*args, "--json", stdin=stdin)
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def valkey() -> Iterator[str]:
    with valkey_server() as server:
        yield server.url


@pytest.fixture(params=["file", "redis"])
def command(request: pytest.FixtureRequest, tmp_path: Path) -> Command:
    if request.param == "file":
        return Command("file", CACHE_DIR=str(tmp_path / "cache"))
    url: str = request.getfixturevalue("valkey")
    # A namespace of its own for each test: the server is shared.
    return Command("redis", REDIS_URL=url, CACHE_NAMESPACE=tmp_path.name[:64], CACHE_DIR=str(tmp_path / "cache"))


def test_set_get_delete(command: Command) -> None:
    assert command("get", "plan:42").returncode == 1
    assert command("set", "plan:42", '{"steps": [1, 2.5, null]}').returncode == 0
    done = command("get", "plan:42")
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, {"steps": [1, 2.5, None]}, "")
    found = command.json("get", "plan:42")
    assert found["value"] == {"steps": [1, 2.5, None]}
    assert found["fresh_until"] - found["created"] == pytest.approx(3600)
    assert command("delete", "plan:42").returncode == 0
    assert command("delete", "plan:42").returncode == 1
    assert command.json("get", "plan:42", code=1) == {"key": "plan:42", "found": False}


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ("hello", "hello"),
        ("42", 42),
        ('"42"', "42"),
        ("NaN", "NaN"),
        ("", ""),
        ("null", None),
        ("[" * 9000, "[" * 9000),
    ],
)
async def test_a_value_is_json_or_else_text(tmp_path: Path, value: str, stored: object) -> None:
    command = Command("file", CACHE_DIR=str(tmp_path / "cache"))
    assert command.json("set", "k", value) == {"key": "k", "stored": True}
    async with command.cache() as cache:
        assert await cache.get("k", MISSING) == stored


def test_json_stored_as_text_comes_back_as_it_was_written(tmp_path: Path) -> None:
    command = Command("file", CACHE_DIR=str(tmp_path / "cache"))
    assert command("set", "k", "[1,  2]", "--text").returncode == 0
    assert command("get", "k").stdout == "[1,  2]\n"


def test_a_value_from_standard_input(tmp_path: Path) -> None:
    command = Command("file", CACHE_DIR=str(tmp_path / "cache"))
    assert command("set", "k", "-", "--ttl", "forever", stdin='{"ä": "日本"}').returncode == 0
    found = command.json("get", "k")
    assert (found["value"], found["fresh_until"]) == ({"ä": "日本"}, "forever")


def test_status(command: Command) -> None:
    command("set", "a", "1")
    status = command.json("status")
    assert (status["status"], status["backend"], status["total_keys"]) == ("healthy", command.backend, 1)
    assert status["default_ttl_seconds"] == 3600
    for_people = command("status")
    assert for_people.returncode == 0
    assert "healthy" in for_people.stdout
    assert for_people.stderr == ""


async def test_keys_by_prefix_and_clear_of_one_namespace(command: Command) -> None:
    async with command.cache() as cache:
        await cache.set_many({"user:1": 1, "user:2": 2, "other": 3})
    command("set", "elsewhere", "x", "-n", "another")
    assert sorted(command("keys").stdout.split()) == ["other", "user:1", "user:2"]
    assert sorted(command.json("keys", "user:")) == ["user:1", "user:2"]
    assert command.json("keys", "nothing") == []
    assert command("clear").returncode == 2  # nobody to ask
    assert command.json("clear", "--yes") == {"cleared": 3}
    assert command("keys").stdout == ""
    assert command("keys", "-n", "another").stdout == "elsewhere\n"
    command("clear", "-y", "-n", "another")


async def test_several_keys_are_deleted_at_once(command: Command) -> None:
    async with command.cache() as cache:
        await cache.set_many({"a": 1, "b": 2})
    assert command.json("delete", "a", "b", "c", "a") == {"deleted": 2, "keys": {"a": True, "b": True, "c": False}}


async def test_a_tag_is_invalidated_in_its_namespace(command: Command) -> None:
    async with command.cache() as cache:
        await cache.set("a", 1, tags=["user:1", "all"])
        await cache.set("b", 2, tags=["user:2", "all"])
        await cache.set("c", 3)
    assert command.json("set", "d", "x", "--tag", "user:1", "--tag", "mine")["stored"]
    command("set", "elsewhere", "x", "--tag", "all", "-n", "another")
    assert command.json("invalidate", "nobody's") == {"invalidated": True, "tags": ["nobody's"]}
    assert sorted(command("keys").stdout.split()) == ["a", "b", "c", "d"]
    done = command("invalidate", "user:1", "mine", "user:1")
    assert (done.returncode, done.stdout) == (0, "")
    assert "invalidated 'user:1', 'mine'" in done.stderr
    assert sorted(command("keys").stdout.split()) == ["b", "c"]
    assert command("get", "a").returncode == 1
    assert command("invalidate", "all").returncode == 0
    assert command("keys").stdout == "c\n"
    assert command("keys", "-n", "another").stdout == "elsewhere\n"
    command("clear", "-y", "-n", "another")


@pytest.mark.parametrize(
    ("args", "env", "says"),
    [
        (["set", "k", "v", "--ttl", "0"], {}, "ttl"),
        (["set", "k", "v", "--ttl", "soon"], {}, "ttl"),
        (["set", "k", "v", "--ttl", "inf"], {}, "forever"),
        (["set", "", "v"], {}, "key"),
        (["get", "k" * 1025], {}, "1,024"),
        (["invalidate"], {}, "TAG"),
        (["invalidate", ""], {}, "a tag has 1 to 1,024 characters"),
        (["set", "k", "v", "--tag", "t" * 1025], {}, "1,024"),
        (["status", "-n", "../up"], {}, "namespace"),
        (["status"], {"CACHE_BACKEND": "mongo", "REDIS_DB": "x"}, "CACHE_BACKEND held 'mongo'"),
        (["status", "--nonsense"], {}, "nonsense"),
        (["nonsense"], {}, "nonsense"),
    ],
)
def test_wrong_usage_and_settings_end_with_2_and_a_sentence(
    tmp_path: Path, args: list[str], env: dict[str, str], says: str
) -> None:
    done = Command("file", CACHE_DIR=str(tmp_path / "cache"))(*args, env=env)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("args", "fallback"),
    [
        (["status"], "file"),
        (["get", "k"], "file"),
        (["set", "k", "v"], "file"),
        (["set", "k", "v"], "none"),
        (["delete", "k"], "file"),
        (["invalidate", "t"], "file"),
        (["invalidate", "t"], "none"),
        (["keys"], "none"),
        (["clear", "--yes"], "none"),
    ],
)
def test_a_store_that_does_not_answer_ends_with_3(tmp_path: Path, args: list[str], fallback: str) -> None:
    command = Command("redis", REDIS_URL=NOBODY, CACHE_DIR=str(tmp_path / "cache"), CACHE_FALLBACK=fallback)
    done = command(*args)
    assert done.returncode == 3, done.stderr
    assert "127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_password_is_told_and_never_shown(tmp_path: Path) -> None:
    with valkey_server(password="right") as server:
        url = f"redis://:hunter2@127.0.0.1:{server.port}/0"
        for args in (["status"], ["set", "k", "v"]):
            done = Command("redis", REDIS_URL=url, CACHE_DIR=str(tmp_path / "cache"))(*args)
            assert done.returncode == 3, done.stderr
            assert "misconfigured" in done.stderr
            assert "hunter2" not in done.stdout + done.stderr


async def filled(tmp_path: Path, count: int, width: int = 5) -> Command:
    command = Command("file", CACHE_DIR=str(tmp_path / "cache"))
    async with command.cache() as cache:
        await cache.set_many({f"key:{number:0{width}}": number for number in range(count)})
    return command


async def test_a_long_listing_is_whole_and_quiet_where_nobody_watches(tmp_path: Path) -> None:
    command = await filled(tmp_path, 2500)
    done = command("keys")
    assert sorted(done.stdout.splitlines()) == [f"key:{n:05}" for n in range(2500)]
    assert done.stderr == ""
    assert len(command.json("keys")) == 2500


async def test_a_long_listing_shows_progress_on_a_terminal(tmp_path: Path) -> None:
    command = await filled(tmp_path, 2500)
    leader, follower = pty.openpty()
    env = {name: value for name, value in command.env.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    with subprocess.Popen([*COMMAND, "keys"], env=env, stdout=subprocess.PIPE, stderr=follower, text=True) as process:
        listed, _ = process.communicate(timeout=60)
    os.close(follower)
    shown = read_all(leader)
    assert len(listed.splitlines()) == 2500
    assert "keys" in shown
    assert process.returncode == 0


def read_all(terminal: int) -> str:
    shown = b""
    try:
        while data := os.read(terminal, 65536):
            shown += data
    except OSError:  # how a terminal says that its other end is closed
        pass
    finally:
        os.close(terminal)
    return shown.decode()


async def test_output_that_nobody_reads_to_its_end_is_no_error(tmp_path: Path) -> None:
    command = await filled(tmp_path, 1000, width=500)
    with subprocess.Popen(
        [*COMMAND, "keys"], env=command.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


async def test_interrupting_leaves_no_traceback(tmp_path: Path) -> None:
    command = await filled(tmp_path, 1000, width=500)
    with subprocess.Popen(
        [*COMMAND, "keys"], env=command.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it runs, and a pipe is too small for the rest
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in said


async def test_keys_with_control_characters_stay_on_their_line(tmp_path: Path) -> None:
    command = Command("file", CACHE_DIR=str(tmp_path / "cache"))
    async with command.cache() as cache:
        await cache.set("a\nb\x1b[31m", "x")
    assert command("keys").stdout == "a\\nb\\x1b[31m\n"
    assert command.json("keys") == ["a\nb\x1b[31m"]


async def test_what_json_lacks_is_shown_all_the_same(tmp_path: Path) -> None:
    command = Command("file", CACHE_DIR=str(tmp_path / "cache"))
    value = {"when": dt.date(2026, 1, 2), 3: (1, math.inf), "b": b"x", "s": {2, 1}, "d": Decimal("1.50")}
    async with command.cache() as cache:
        await cache.set("k", value)
    shown = {"when": "2026-01-02", "3": [1, "inf"], "b": "x", "s": [1, 2], "d": "1.50"}
    assert json.loads(command("get", "k").stdout) == shown
    assert command.json("get", "k")["value"] == shown


@dataclass
class Point:
    x: int


async def test_an_object_that_only_its_program_can_rebuild_is_told_from_nothing(tmp_path: Path) -> None:
    command = Command("file", CACHE_DIR=str(tmp_path / "cache"))
    async with command.cache() as cache:
        await cache.set("k", Point(1), as_type=Point)
    done = command("get", "k")
    assert done.returncode == 1
    assert "classes" in done.stderr


def test_help_says_what_the_exit_codes_mean() -> None:
    done = Command("memory")("--help")
    assert done.returncode == 0
    for words in ("status", "Exit codes", "130"):
        assert words in done.stdout


def test_version() -> None:
    assert Command("memory")("--version").stdout.startswith("0.")


def test_without_its_extra_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from mcp_hub_cache.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "mcp-hub-cache[cli]" in done.stderr
    assert len(done.stderr.splitlines()) == 1
