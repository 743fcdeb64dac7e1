"""What the pages say: links lead somewhere, programs print what stands below them, figures are those of a run."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import page

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "docs" / "benchmarks"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
CONCEPTS = sorted(ROOT.glob("docs/*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# What the README claims, by the row that it comes from.
CLAIMS = {
    "redis.get100.redis-py-10": "{} × the rate of redis-py with orjson and a pool of 10",
    "redis.get100.valkey-glide": "{} × valkey-glide",
    "redis.get100.cashews": "{} × cashews",
    "redis.get100.aiocache": "{} × aiocache",
    "redis.set100.redis-py": "{} × redis-py |",
    "near.str.async-lru": "{} × the time of async-lru; ",
    "near.str.cashews": "{} × as fast as cashews' memory decorator",
    "near.str.aiocache": "{} × aiocache's",
    "files.get100.hop": "{} × the rate of a thread hop for each",
    "files.get100.aiofiles": "{} × aiofiles",
    "load.waiters.async-lru": "{} × the time of async-lru |",
    "load.miss.async-lru": "takes {} × that of async-lru",
    "import.time": "{} × the time of `import asyncio, inspect, typing`",
}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_what_is_there(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def programs(path: Path) -> list[tuple[str, str]]:
    """The programs of a page, each with what it says that they print: the block that follows."""
    blocks = FENCED.findall(path.read_text(encoding="utf-8"))
    answers = [*blocks[1:], ("", "")]
    found = []
    for (language, code), (following, printed) in zip(blocks, answers, strict=False):
        if language == "python":
            assert following == "text", f"nothing says what this prints: {code[:200]}"
            found.append((code, printed))
    return found


PROGRAMS = [
    pytest.param(code, printed, id=f"{path.stem}-{number}")
    for path in CONCEPTS
    for number, (code, printed) in enumerate(programs(path), 1)
]


def test_every_concept_has_programs() -> None:
    assert len(CONCEPTS) > 4
    for path in CONCEPTS:
        assert programs(path), f"{path.name} shows nothing"


@pytest.mark.parametrize(("code", "printed"), PROGRAMS)
def test_programs_print_what_stands_below_them(code: str, printed: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(code, encoding="utf-8")
    # A busy machine may take longer than an agent would be kept waiting.
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=tmp_path,
        env=os.environ | {"CACHE_TIMEOUT": "10"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (printed, "")


def test_the_readmes_first_program_runs(tmp_path: Path) -> None:
    code = FENCED.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert code is not None and code[1] == "python"
    for calls in (1, 0):  # as its comment promises
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code[2]],
            cwd=tmp_path,
            env=os.environ | {"CACHE_TIMEOUT": "10"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.stdout, done.stderr) == (f"50 answers, {calls} call(s)\n{{'steps': ['a', 'b']}}\n", "")


def test_the_readmes_other_programs_are_python() -> None:
    for language, code in FENCED.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        if language == "python":
            compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_benchmarks_page_is_what_the_run_wrote() -> None:
    assert (PUBLISHED / "README.md").read_text(encoding="utf-8") == page(PUBLISHED)


@pytest.mark.parametrize("row", CLAIMS)
def test_the_readme_claims_what_was_measured(row: str) -> None:
    rows: list[dict[str, Any]] = json.loads((PUBLISHED / "results.json").read_text(encoding="utf-8"))["rows"]
    (ratio,) = [each["figure"] for each in rows if each["id"] == row]
    shown = CLAIMS[row].format(f"{ratio:.2g}")
    assert shown in (ROOT / "README.md").read_text(encoding="utf-8")
