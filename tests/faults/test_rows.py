"""The table of rows and proofs names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("rows.md")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", TABLE.read_text(encoding="utf-8"))))


def test_the_table_names_proofs() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    assert all("::test_" in row or row.endswith("| proof |") for row in rows)


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_each_proof_is_there(path: str, name: str) -> None:
    text = (TABLE.parents[2] / path).read_text(encoding="utf-8")
    assert re.search(rf"^ *(async )?def {name}\(", text, re.MULTILINE), f"{path} has no {name}"
