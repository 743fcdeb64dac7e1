"""``nox`` checks style and types, runs the tests on every interpreter found, and the cache under load and faults.

``nox -s demo`` runs the demo, ``nox -s bench`` the benchmarks, ``nox -s model`` the model against the real thing.

An interpreter that is not there is skipped, and the closing table says so. Environments are kept in ``.nox`` and
installed into again only when pyproject.toml has changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
# Coverage is measured once, on the interpreter that nox itself runs on.
MEASURED = PYTHONS[min(max(sys.version_info.minor - 11, 0), len(PYTHONS) - 1)]

nox.options.sessions = ["lint", "types", "tests", "soak"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"


def _answers(command: str) -> bool:
    """Whether *command* is an interpreter that starts; a pyenv shim does not where pyenv selects another version."""
    found = shutil.which(command)
    return found is not None and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0


def _add_pyenv_versions() -> None:
    """Put the interpreters that pyenv has installed, selected or not, on the PATH where no other answers."""
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for python in PYTHONS:
        if _answers(f"python{python}"):
            continue
        found = [path for path in versions.glob(f"{python}.*/bin") if (path / f"python{python}").exists()]
        if found:
            newest = max(found, key=lambda path: [int(part) for part in re.findall(r"\d+", path.parent.name)])
            os.environ["PATH"] = f"{newest}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


_add_pyenv_versions()


def _install(session: nox.Session, *groups: str, extras: str = "") -> None:
    """Install the package, editable, with *extras* and dependency *groups*, unless that was done already."""
    wanted = [f"--editable=.{extras}"] if extras else []
    wanted += nox.project.dependency_groups(PROJECT, *groups)
    state = hashlib.blake2b(repr((wanted, (ROOT / "pyproject.toml").read_bytes())).encode()).hexdigest()
    stamp = Path(session.virtualenv.location) / "installed"
    if stamp.exists() and stamp.read_text() == state:
        return
    session.install("--quiet", *wanted)
    stamp.write_text(state)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    _install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy in strict mode and pyright, for the package and for the typing examples."""
    _install(session, "types", extras="[cli,demo]")
    session.run("mypy")
    # The project is named, since a pyrightconfig.json in any parent folder would come first; and without the variable
    # every run asks a server for a newer release.
    session.run("pyright", "--project", "pyproject.toml", env={"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Pytest: all of it, with coverage, on one interpreter; on others without what is marked as long.

    Arguments after ``--`` go to pytest, and then nothing is left out, or measured.
    """
    _install(session, "test", extras="[cli,demo]")
    if session.posargs or session.python != MEASURED:
        session.run("pytest", *(session.posargs or ("-m", "not long")))
        return
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest")
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session
def soak(session: nox.Session) -> None:
    """Load under random faults, two minutes of it; longer: ``-- --minutes 60``, again: ``-- --seed 7``."""
    _install(session, "test", extras="[cli,demo]")
    session.run("python", "-m", "tests.soak", *session.posargs)


@nox.session
def model(session: nox.Session) -> None:
    """The model against caches over failing stores: ``-- --minutes 60``; each round prints its seed."""
    _install(session, "test", extras="[cli,demo]")
    session.run("python", "-m", "tests.model_run", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The demo on a real MCP server. REPO, CACHE_ and REDIS_ variables apply; arguments after ``--`` go to it."""
    _install(session, "demo", extras="[demo]")
    session.run("mcp-hub-cache", "demo", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Links lead somewhere, examples run and print what their reader is told, figures are those of a run."""
    _install(session, "test", extras="[cli,demo]")
    session.run("pytest", "tests/test_docs.py", "tests/test_examples.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Ratios to the peers, as a table, JSON and pictures. ``-- --quick``, ``-- --growth`` and more: ``-- --help``."""
    _install(session, "bench", extras="[fast]")
    session.run("python", "-m", "benchmarks", *session.posargs)
