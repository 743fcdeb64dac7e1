"""``nox -s soak -- --minutes 10``; the exit code says whether every promise held."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from pathlib import Path

from tests.soak.faults import FAULTS
from tests.soak.report import lines
from tests.soak.runner import Run


def main() -> int:
    parser = argparse.ArgumentParser(prog="nox -s soak --", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=None, help="what came up in an earlier run; default: a new one")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--agents", type=int, default=10, help="concurrent callers in each process")
    parser.add_argument("--only", action="append", default=[], choices=sorted(FAULTS), help="inject this fault alone")
    parser.add_argument("--json", type=Path, help="write all figures there")
    given = parser.parse_args()
    seed = random.randrange(1_000_000) if given.seed is None else given.seed
    print(f"soak: seed {seed}, {given.minutes:g} minutes", flush=True)
    run = Run(minutes=given.minutes, seed=seed, processes=given.processes, agents=given.agents, only=given.only)
    report = asyncio.run(run.run())
    for line in lines(report):
        print(line)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))
    return 0 if report["violation"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
