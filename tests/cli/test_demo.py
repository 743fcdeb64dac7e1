"""The demo: its figures add up, its answers are right, and it leaves nothing behind, however it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache.cli import _demo_agents as agents
from mcp_hub_cache.cli import _demo_rounds as rounds
from mcp_hub_cache.cli._demo_report import Report
from mcp_hub_cache.cli._demo_repository import MOST, NoHistoryError, look_at, make
from tests.servers import valkey_server

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

DEMO = [sys.executable, "-m", "mcp_hub_cache", "demo"]
FEW = ["--agents", "8", "--questions", "6"]


def running() -> Iterator[tuple[int, str]]:
    """Every process and its arguments."""
    if Path("/proc/self/cmdline").exists():
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return
    listed = subprocess.run(["ps", "-Aww", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        pid, _, args = line.strip().partition(" ")
        yield int(pid), args


class Demo:
    """Runs the demo with a folder for temporary files of its own, where nothing may stay."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        # A busy machine may take longer than an agent would be kept waiting.
        self.env = os.environ | {"TMPDIR": folder, "NO_COLOR": "1", "COLUMNS": "100", "CACHE_TIMEOUT": "10"}
        self.env.pop("REPO", None)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *args: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*DEMO, *args], env=self.env | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        """End what a failed test has left."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def __call__(self, *args: str, code: int = 0, **variables: str) -> tuple[str, str]:
        process = self.start(*args, **variables)
        out, err = process.communicate(timeout=90)
        assert process.returncode == code, err
        assert "Traceback" not in err
        self.assert_clean()
        return out, err

    def json(self, *args: str, **variables: str) -> Any:
        return json.loads(self(*FEW, "--json", *args, code=0, **variables)[0])

    def processes(self, what: str) -> list[int]:
        """The processes that the demo has started: all have its folder among their arguments."""
        return [pid for pid, args in running() if self.folder in args and what in args]

    def assert_clean(self) -> None:
        assert list(Path(self.folder).iterdir()) == []
        assert self.processes("") == []


@pytest.fixture
def demo() -> Iterator[Demo]:
    # A short path: a unix socket is made in it.
    folder = tempfile.mkdtemp(prefix="mhc")
    ours = Demo(folder)
    try:
        yield ours
    finally:
        ours.end()
        shutil.rmtree(folder, ignore_errors=True)


def assert_adds_up(report: Any) -> None:
    without, cold, warm = report["rounds"]
    questions = report["questions"]
    assert questions == report["agents"] * 6
    assert (without["server_calls"], without["hits"], without["coalesced"]) == (questions, 0, 0)
    assert cold["server_calls"] == report["distinct_questions"] < questions
    assert cold["server_calls"] + cold["hits"] + cold["coalesced"] == questions
    assert cold["coalesced"] > 0
    assert (warm["server_calls"], warm["hits"]) == (0, questions)
    assert without["process"] == cold["process"] != warm["process"]
    assert cold["seconds_saved"] == pytest.approx(without["wall_seconds"] - cold["wall_seconds"], abs=0.001)
    assert all(each["wall_seconds"] > 0 and not each["cache_errors"] for each in report["rounds"])
    assert (report["answers_equal"], report["wrong_answers"], report["changed_meanwhile"]) == (True, [], [])


def test_on_files_with_a_repository_of_its_own(demo: Demo) -> None:
    out, err = demo(*FEW, "--json")
    report = json.loads(out)
    assert_adds_up(report)
    assert (report["backend"], report["namespace"]) == ("file", None)
    assert "not a git repository" in report["repository_made_because"]
    assert not any(each["server_errors"] for each in report["rounds"])
    # No terminal: lines, without anything that moves.
    assert "\x1b" not in out + err
    assert [line.partition(":")[0] for line in err.splitlines()[1:]] == [
        "1 without the cache",
        "2 with it, cold",
        "3 new process, warm",
    ]


@pytest.fixture
def history(tmp_path: Path) -> Path:
    folder = tmp_path / "history"
    folder.mkdir()
    make(folder, "")
    return folder


def test_on_a_repository_and_a_folder_that_are_the_users(demo: Demo, history: Path, tmp_path: Path) -> None:
    index = (history / ".git" / "index").stat().st_mtime_ns
    out, _ = demo(*FEW, REPO="history", CACHE_DIR=str(tmp_path / "kept"))
    assert "8 agents put 48 questions" in out
    assert "about history." in out
    assert re.search(r"1 without the cache +48 .* s +\n2 with it, cold .* s +\S+ s\n3 new process, warm +0 ", out)
    assert "did not call the server once" in out
    assert "All 96 answers from the cache equalled those without it." in out
    # What is said there can be looked at is there, and nothing else was touched.
    look = re.search(r"mcp-hub-cache (keys -n \S+)", out)
    assert look is not None
    listed = subprocess.run(
        [*DEMO[:-1], *look[1].split()],
        env=demo.env | {"CACHE_DIR": str(tmp_path / "kept")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"history", "kept"}
    assert (history / ".git" / "index").stat().st_mtime_ns == index


def test_on_a_redis_that_is_the_users(demo: Demo, history: Path) -> None:
    with valkey_server() as server:
        server.command("SET", "mine", "1")
        report = demo.json("--repo", str(history), CACHE_BACKEND="redis", REDIS_URL=server.url)
        assert_adds_up(report)
        assert (report["backend"], report["repository"]) == ("redis", "history")
        keys = server.command("KEYS", "*")
        assert len([key for key in keys if b":e:" in key]) == report["distinct_questions"]
        assert all(key == b"mine" or report["namespace"].encode() in key for key in keys)


def test_on_a_valkey_of_its_own(demo: Demo) -> None:
    out, err = demo(*FEW, CACHE_BACKEND="redis")
    assert "started a Valkey of the demo's own" in err
    assert "had left on the demo's own Valkey" in out
    assert "mcp-hub-cache keys" not in out  # it is gone


@pytest.mark.parametrize(
    ("after", "number"),
    [
        ("No Redis", signal.SIGTERM),
        ("1 without", signal.SIGINT),
        ("2 with it", signal.SIGINT),
        ("2 with it", signal.SIGHUP),
    ],
)
def test_interrupted_it_leaves_nothing_behind(demo: Demo, after: str, number: signal.Signals) -> None:
    process = demo.start("--questions", "2", CACHE_BACKEND="redis")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(after):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == ""
    assert "Traceback" not in err
    demo.assert_clean()


def test_sigterm_ends_it_where_sigint_is_ignored(demo: Demo) -> None:
    """So it is in the background jobs of a script."""
    process = subprocess.Popen(
        ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *DEMO, *FEW], env=demo.env, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("1 without"):
            break
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    demo.assert_clean()


def test_on_a_terminal_it_shows_bars_and_ends_with_ctrl_c(demo: Demo) -> None:
    terminal, theirs = pty.openpty()
    # What a login shell has: a session of its own on that terminal, which turns Ctrl-C into a signal for all in front.
    take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", take, *DEMO],
        env=demo.env | {"CACHE_BACKEND": "redis", "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    while b"/400" not in shown or b"\xe2\x94\x81" not in shown:
        shown += os.read(terminal, 65536)
    os.write(terminal, b"\x03")
    try:
        while more := os.read(terminal, 65536):
            shown += more
    except OSError:
        pass  # Linux says so that the other end is closed
    os.close(terminal)
    assert process.wait(timeout=60) == 130
    assert b"1 without the cache" in shown
    assert b"Traceback" not in shown
    assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h") > 0  # the cursor is given back
    demo.assert_clean()


def test_a_server_that_dies_is_told_in_a_line(demo: Demo) -> None:
    process = demo.start("--questions", "50")
    while not (servers := demo.processes("mcp_server_git")):
        assert process.poll() is None
    os.kill(servers[0], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "mcp-hub-cache: mcp-server-git ended" in err
    assert "Traceback" not in err
    demo.assert_clean()


@pytest.mark.parametrize(
    ("args", "variables", "code", "says"),
    [
        (["--agents", "0"], {}, 2, "'0' is no whole number"),
        ([], {"REPO": "nowhere"}, 2, "nowhere is no folder"),
        ([], {"CACHE_BACKEND": "memory"}, 2, "CACHE_BACKEND=memory can't be shared"),
        ([], {"CACHE_BACKEND": "mongo"}, 2, "CACHE_BACKEND held 'mongo'"),
        ([], {"CACHE_BACKEND": "redis", "REDIS_URL": "redis://127.0.0.1:1/0"}, 3, "127.0.0.1:1"),
        ([], {"PATH": ""}, 2, "the demo needs git"),
    ],
)
def test_what_it_can_not_do_it_says(
    demo: Demo, args: list[str], variables: dict[str, str], code: int, says: str
) -> None:
    out, err = demo(*args, code=code, **variables)
    assert says in err
    assert out == ""


@pytest.mark.parametrize("package", ["mcp", "mcp_server_git"])
def test_a_missing_extra_is_told_with_how_to_install_it(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import mcp_hub_cache.cli.demo as d; sys.exit(d.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    needed = package.replace("_", "-")
    assert done.stderr == f"mcp-hub-cache: the demo needs {needed}: pip install 'mcp-hub-cache[demo]'\n"


# The parts


def test_the_repository_made_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, other = make(tmp_path / "one", "why"), make(tmp_path / "other", "why")
    assert one.commits == other.commits
    assert len(one.commits) == 48
    assert len(one.files) == 7
    assert one.made == "why"


def test_a_shallow_clone_is_asked_about_what_it_has(history: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for depth in ("20", "3"):
        shutil.rmtree(clone, ignore_errors=True)
        subprocess.run(["git", "clone", "-q", "--depth", depth, f"file://{history}", str(clone)], check=True)
        if depth == "20":
            # Not the last: what it changed against its parent is not there.
            assert look_at(clone).commits == look_at(history).commits[:19]
        else:
            with pytest.raises(NoHistoryError, match="2 commits"):
                look_at(clone)


def test_a_repository_without_commits_has_no_history(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    with pytest.raises(NoHistoryError, match="no commits yet"):
        look_at(tmp_path)


def test_agents_share_questions_and_none_asks_twice(history: Path) -> None:
    questions = agents.catalogue(look_at(history))
    assert len({json.dumps(question) for question in questions}) == len(questions) > MOST
    plan = agents.draw(len(questions), agents=40, each=10, seed=1)
    assert plan == agents.draw(len(questions), agents=40, each=10, seed=1)
    assert plan != agents.draw(len(questions), agents=40, each=10, seed=2)
    assert all(len(wanted) == len(set(wanted)) == 10 for wanted in plan)
    asked = [number for wanted in plan for number in wanted]
    assert asked.count(0) > 30  # the most popular
    assert 40 < len(set(asked)) < 100


class Server:
    """Stands in for the git server: answers at once, and otherwise where it is told to."""

    def __init__(self, otherwise: dict[str, str] | None = None) -> None:
        self.otherwise = otherwise or {}

    async def ask(self, tool: str, arguments: dict[str, str | int]) -> list[str]:
        if tool == "fails":
            raise agents.ToolError("no")
        return [self.otherwise.get(tool, tool)]


def a_round(*answers: str) -> agents.Round:
    return agents.Round(1, 1, 1, 1, 1.0, 1.0, [[agents.fingerprint([answer]) for answer in answers]])


async def test_an_answer_that_differs_is_wrong_unless_the_repository_changed() -> None:
    questions = [agents.Question(tool, {"repo_path": "r", "n": 1}) for tool in ("a", "b", "c")]
    without, cold, warm = a_round("a", "b", "c"), a_round("a", "B", "C"), a_round("a", "B", "C")
    changed, wrong = await rounds._compare(Server({"c": "C"}), questions, [[0, 1, 2]], [without, cold, warm])  # type: ignore[arg-type]  # a stand-in
    assert changed == ['c {"n": 1}']
    assert wrong == ['b {"n": 1}']
    # Where answers differ without the cache, it is not the cache.
    twice = dataclasses.replace(without, answers=[*cold.answers, *without.answers])
    changed, wrong = await rounds._compare(Server(), questions, [[0, 1, 2]] * 2, [twice])  # type: ignore[arg-type]  # a stand-in
    assert (changed, wrong) == (['b {"n": 1}', 'c {"n": 1}'], [])


@pytest.mark.parametrize(
    ("wrong", "changed", "says"),
    [
        ([], [], "All 4 answers from the cache equalled those without it."),
        ([], ["git_status {}"], "The repository changed while the demo ran, and so did the answers to git_status {}."),
        (["git_log {}"], [], "WRONG: with the cache other answers came than without it, to git_log {}."),
    ],
)
def test_the_report_says_how_it_went(
    wrong: list[str], changed: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = a_round("a", "b")
    report = Report("r", None, "file", "here", None, 1, 2, [done, done, done], changed, wrong)
    report.show()
    assert says in capsys.readouterr().out.splitlines()
    assert report.as_dict()["answers_equal"] is not bool(wrong)


async def test_where_answers_take_long_fewer_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [agents.Question("a", {})] * 40
    assert await rounds._affordable(Server(), questions, 40) == 10  # type: ignore[arg-type]  # a stand-in
    monkeypatch.setattr(rounds, "_FIRST_ROUND_SECONDS", 0.0)
    assert await rounds._affordable(Server(), questions, 40) == 2  # type: ignore[arg-type]  # a stand-in
