"""The repository that the demo's questions are about: the one given, or one made for the occasion."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

# With fewer commits there is too little to ask.
FEWEST = 8
# The newest are asked about; a history of a million commits takes no longer than one of a hundred.
MOST = 60
_LARGEST_FILE = 32 * 1024
_FILES = 8

_AUTHORS = (("Ada Example", "ada@example.com"), ("Bo Example", "bo@example.com"), ("Cy Example", "cy@example.com"))
_MODULES = ("reader", "writer", "index", "query", "server", "report")
_MADE_COMMITS = 48
_BEGINNING = 1_750_000_000  # fixed dates: the same commits, with the same hashes, whenever it is made


class NoHistoryError(Exception):
    """There is no repository with enough history; says what there is."""


@dataclass(frozen=True, slots=True)
class Repository:
    """What there is to ask about.

    Attributes:
        path: The top folder of its working tree.
        commits: Hashes, the newest first; at most ``MOST``.
        files: Small files of the newest commit, as ``git show`` takes them.
        made: Why it was made for the demo; None: it is the user's own.
    """

    path: str
    commits: tuple[str, ...]
    files: tuple[str, ...]
    made: str | None = None

    @property
    def name(self) -> str:
        """What to call it."""
        return Path(self.path).name if self.made is None else "a repository made for this demo"


def look_at(folder: Path) -> Repository:
    """Return the repository that *folder* is in.

    Raises:
        NoHistoryError: It is in none, or in one with hardly any commits.
    """
    if not folder.is_dir():
        raise NoHistoryError(f"{folder} is no folder")
    top = Path(_git(folder, "rev-parse", "--show-toplevel").removesuffix("\n"))
    if _tries(top, "rev-parse", "--verify", "HEAD") is None:
        raise NoHistoryError(f"{top} has no commits yet")
    commits = _git(top, "rev-list", f"--max-count={MOST}", "HEAD").split()
    # A shallow clone ends with commits whose parents it does not have: nobody can show what those changed.
    shallow = top / _git(top, "rev-parse", "--git-path", "shallow").removesuffix("\n")
    ends = set(shallow.read_text().split()) if shallow.is_file() else set()
    commits = [commit for commit in commits if commit not in ends]
    if len(commits) < FEWEST:
        raise NoHistoryError(f"{top} has {len(commits)} commits to ask about, and {FEWEST} are needed")
    return Repository(str(top), tuple(commits), tuple(_small_files(top, commits[0])))


def make(folder: Path, why: str) -> Repository:
    """Make a repository of a few dozen commits in *folder*, the same one each time."""
    _git(folder, "init", "--quiet")
    _git(folder, "symbolic-ref", "HEAD", "refs/heads/main")
    _git(folder, "fast-import", "--quiet", stdin=_history())
    _git(folder, "reset", "--quiet", "--hard", "main")
    made = look_at(folder)
    return Repository(made.path, made.commits, made.files, why)


def _small_files(top: Path, commit: str) -> list[str]:
    found = []
    for line in _git(top, "ls-tree", "-l", "-z", commit).split("\0"):
        about, _, path = line.partition("\t")
        _, kind, _, size = about.split() if about else ("", "", "", "")
        if kind == "blob" and int(size) <= _LARGEST_FILE and path.isprintable():
            found.append(f"{commit}:{path}")
    return found[:_FILES]


def _tries(folder: Path, *args: str) -> str | None:
    try:
        return _git(folder, *args)
    except NoHistoryError:
        return None


def _git(folder: Path, *args: str, stdin: str = "") -> str:
    # Within a git hook, variables such as GIT_DIR name another repository than the folder's.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(folder), *args],  # noqa: S607 (whichever git the PATH has is the user's)
        env=env | {"LC_ALL": "C"},
        input=stdin.encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"git ended with {done.returncode}"]
        raise NoHistoryError(f"{folder}: {said[0]}")
    return done.stdout.decode(errors="surrogateescape")


def _history() -> str:
    """A stream for ``git fast-import``: one process instead of a hundred and fifty."""
    files = {"README.md": "# Example\n\nA small project with a history, for agents to ask about.\n"}
    stream = []
    for number in range(_MADE_COMMITS):
        module = _MODULES[number % len(_MODULES)]
        path = f"{module}.py"
        before = files.get(path, f'"""The {module}."""\n')
        files[path] = (
            before + f"\n\ndef {module}_{number}(items: list[int]) -> int:\n"
            f'    """Step {number}."""\n    return sum(items) * {number}\n'
        )
        if number % 8 == 7:
            files["README.md"] += f"- Release {number // 8 + 1}\n"
        name, email = _AUTHORS[number % len(_AUTHORS)]
        who = f"{name} <{email}> {_BEGINNING + number * 3600} +0000"
        stream += [
            "commit refs/heads/main",
            f"author {who}",
            f"committer {who}",
            _data(f"Let the {module} take step {number}\n"),
        ]
        stream += [f"M 100644 inline {each}\n{_data(files[each])}" for each in ("README.md", path)]
    return "\n".join([*stream, ""])


def _data(text: str) -> str:
    return f"data {len(text.encode())}\n{text}"
