"""What the pages say: links lead somewhere, and every figure is one that a run has left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import page

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "docs" / "benchmarks"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])

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


def test_the_benchmarks_page_is_what_the_run_wrote() -> None:
    assert (PUBLISHED / "README.md").read_text(encoding="utf-8") == page(PUBLISHED)


@pytest.mark.parametrize("row", CLAIMS)
def test_the_readme_claims_what_was_measured(row: str) -> None:
    rows: list[dict[str, Any]] = json.loads((PUBLISHED / "results.json").read_text(encoding="utf-8"))["rows"]
    (ratio,) = [each["figure"] for each in rows if each["id"] == row]
    shown = CLAIMS[row].format(f"{ratio:.2g}")
    assert shown in (ROOT / "README.md").read_text(encoding="utf-8")
