"""The benchmarks still run, and say something about every row. How fast anything is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.specs import SPECS

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

ROOT = Path(__file__).parents[2]


def run(out: Path, *options: str) -> str:
    # Peers may warn as they like: they run in a process of their own.
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.timeout(300)
def test_every_row_is_measured_or_visibly_skipped(tmp_path: Path) -> None:
    table = run(tmp_path)
    results = read(tmp_path / "results.json")

    rows = {row["id"]: row for row in results["rows"]}
    assert list(rows) == [spec.id for spec in SPECS]
    for row in rows.values():
        assert (row["figure"] is None) == bool(row["skipped"]), row
        assert row["work"] in table
    # These peers are always there.
    assert not rows["redis.get100.redis-py-10"]["skipped"]
    assert not rows["near.str.async-lru"]["skipped"]
    assert not rows["files.get100.hop"]["skipped"]
    for name in ("throughput.svg", "hits.svg", "files.svg"):
        assert (tmp_path / name).exists() == (find_spec("matplotlib") is not None)
    assert str(Path.home()) not in (tmp_path / "results.json").read_text()


@pytest.mark.timeout(300)
def test_growth_gives_its_curves(tmp_path: Path) -> None:
    run(tmp_path, "--growth", "--keys", "2000")
    curves = read(tmp_path / "growth.json")["curves"]

    assert list(curves) == ["keys", "upkeep", "callers", "sizes", "processes", "memory"]
    for curve in curves.values():
        assert curve.get("series") or curve["figures"]


def test_a_wrong_value_ends_the_run() -> None:
    import asyncio

    from benchmarks.measure import reads
    from benchmarks.values import WrongValueError, result

    async def get(key: str) -> object:
        return result(1 if key == "key:3" else int(key.removeprefix("key:")))

    with pytest.raises(WrongValueError):
        asyncio.run(reads(get, [f"key:{number}" for number in range(8)], 2).run(20))
