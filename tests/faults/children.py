"""Programs in processes of their own, with what goes wrong around them: system calls that fail, limits, kills."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


@functools.cache
def _strace() -> str | None:
    found = shutil.which("strace")
    if found is None:
        return None
    tried = subprocess.run([found, "-qq", "-o", os.devnull, "true"], capture_output=True, check=False)
    return found if tried.returncode == 0 else None  # a container may forbid it


needs_strace = pytest.mark.skipif(_strace() is None, reason="strace is not here, or may not trace")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")


def run(
    code: str,
    *args: object,
    strace: Sequence[str] = (),
    python: Sequence[str] = ("-X", "dev", "-W", "error"),
    env: dict[str, str] | None = None,
    seconds: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run *code* and wait for its end. With *strace*: under it, with these options."""
    command = [sys.executable, *python, "-c", code, *map(str, args)]
    if strace:
        command = [str(_strace()), "-f", "-qq", *strace, *command]
    return subprocess.run(
        command,
        env=os.environ | {"CACHE_TIMEOUT": "20", **(env or {})},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def clean(done: subprocess.CompletedProcess[str]) -> str:
    """What it printed; fails unless it ended well and complained of nothing."""
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-4000:] + done.stdout[-2000:]
    return done.stdout


def temps(folder: Path) -> list[Path]:
    """Files being written, and such as nobody writes any more."""
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".probe")]
