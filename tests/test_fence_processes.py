"""The fence between real processes: nobody gets what was changed, or dropped, before it asked; whatever the policy.

Two processes change, three read, each a ``fence_child``, on one folder or one Valkey; meanwhile some are stopped for a
while or killed, and others take their place. The seed of a run that fails stands in its name: not all of it can be
played again, but the policies and their order can.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fence_child import KEYS, Board, fault, value
from tests.servers import valkey_server

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

ROOT = Path(__file__).parents[1]
SECONDS = 4.0
ROLES = ("change 0", "change 1", "read a", "read b", "read c")
SPARED = "read c"  # so that one tells of all the time


class Herd:
    """The processes."""

    def __init__(self, kind: str, where: str, board: Path, coalesce: str, rng: random.Random) -> None:
        self._args = kind, where, str(board)
        self._coalesce = coalesce
        self._rng = rng
        self._until = time.monotonic() + SECONDS
        self._running: dict[str, subprocess.Popen[str]] = {}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._env = {**os.environ, "PYTHONPATH": path}

    def start(self, role: str) -> None:
        name, which = role.split()
        left, seed = self._until - time.monotonic(), self._rng.randrange(1 << 30)
        rest = which if name == "change" else self._coalesce
        self._running[role] = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fence_child.py"), name, *self._args, str(left), str(seed), rest],
            stdout=subprocess.PIPE, text=True, env=self._env,
        )  # fmt: skip

    def trouble(self) -> None:
        """Stop or kill one after the other."""
        while (left := self._until - time.monotonic()) > 1.0:
            time.sleep(self._rng.uniform(0.2, 0.7))
            role = self._rng.choice([role for role in ROLES if role != SPARED])
            process = self._running[role]
            if self._rng.random() < 0.4:
                process.send_signal(signal.SIGSTOP)
                time.sleep(self._rng.uniform(0.05, min(0.4, left)))
                process.send_signal(signal.SIGCONT)
            else:
                process.kill()
                process.communicate()
                self.start(role)

    def reports(self) -> dict[str, dict[str, Any]]:
        """What each that lived to its end has said."""
        said = {role: process.communicate(timeout=60)[0] for role, process in self._running.items()}
        assert {process.returncode for process in self._running.values()} == {0}
        return {role: json.loads(line) for role, line in said.items()}

    def end(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("coalesce", ["process", "fleet"])
@pytest.mark.parametrize("kind", ["file", "redis"])
def test_nobody_gets_what_was_dropped_before_it_asked(kind: str, coalesce: str, seed: int, tmp_path: Path) -> None:
    board = tmp_path / "board"
    board.write_bytes(bytes(Board.SIZE))
    with valkey_server() as server:
        where = server.url if kind == "redis" else str(tmp_path / "shared")
        herd = Herd(kind, where, board, coalesce, random.Random(seed))
        try:
            for role in ROLES:
                herd.start(role)
            herd.trouble()
            reports = herd.reports()
        finally:
            herd.end()
    assert [one for said in reports.values() for one in said["faults"]] == []
    assert reports[SPARED]["reads"] > 50
    assert reports[SPARED]["loads"] > 10
    assert sum(Board(str(board)).floor(key) for key in range(KEYS)) > 50


def test_what_is_looked_for_is_seen() -> None:
    good = value(3, 7, 5)
    assert fault(good, 3, 7) is None
    assert fault(good, 3, 8) == "key 3 got version 7 when 8 was the least"
    assert fault(good, 2, 0) is not None
    assert fault({**good, "text": "3-7;3-6;"}, 3, 0) is not None
