"""``python -m benchmarks``: run, print one table, write ``results.json`` and the pictures.

About eight minutes; ``--quick`` only proves that everything works, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from . import report
from .bench import Bench
from .measure import Method
from .sections import measure
from .servers import valkey

_DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
_SECTIONS = (
    "rows_redis", "rows_big", "rows_near", "rows_load", "rows_files", "rows_import", "rows_uvloop", "rows_seal"
)  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and short slices: does everything work?")
    parser.add_argument("--growth", action="store_true", help="the growth curves instead of the table of ratios")
    parser.add_argument("--keys", type=float, default=1e6, help="the largest number of keys of --growth (1e6)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows or curves whose id contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), help="where to write (%(default)s)")
    parser.add_argument("--publish", action="store_true", help="write into docs/benchmarks, with its table and page")
    arguments = parser.parse_args()
    if arguments.publish and (arguments.quick or arguments.only):
        parser.error("--publish is for a whole run: not with --quick or --only")
    return arguments


def main() -> None:
    """Run what the arguments ask for."""
    arguments = _arguments()
    method = Method(pairs=1, slice=0.0, quick=True) if arguments.quick else Method()
    out = _DOCS if arguments.publish else arguments.out
    # However we end, the server and the section that runs end with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmarks: terminated"))
    started = time.monotonic()
    with valkey() as address:
        bench = Bench(method, address, arguments.only)
        for module in ("growth",) if arguments.growth else _SECTIONS:
            measure(module, bench, round(arguments.keys) if arguments.growth else 0)
    report.write(bench, out, seconds=time.monotonic() - started, growth=arguments.growth, publish=arguments.publish)


if __name__ == "__main__":
    main()
