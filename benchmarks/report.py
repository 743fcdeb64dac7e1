"""What a run leaves behind: a table on the terminal, ``results.json``, pictures; for the docs, the table as Markdown.

Nothing here names the machine, its folders or its user.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import pictures
from .bench import Bench, Row
from .clients import CLIENTS
from .page import page
from .specs import SECTIONS, Kind

_PACKAGES = (
    *("mcp-hub-cache", "redis", "hiredis", "orjson", "valkey-glide", "coredis", "cashews", "aiocache"),
    *("py-key-value-aio", "async-lru", "cachebox", "aiofiles", "diskcache", "uvloop"),
)
_HEAD = ("Work", "beside", "ratio", "quartiles", "target", "", "ours", "theirs")


def write(bench: Bench, out: Path, *, seconds: float, growth: bool, publish: bool) -> None:
    """Print the table, and write everything into *out*."""
    out.mkdir(parents=True, exist_ok=True)
    results = _results(bench, seconds)
    name = "growth.json" if growth else "results.json"
    (out / name).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    written = [name, *pictures.draw(results, out)]
    if not growth:
        print(text_table(bench.rows))
        (out / "table.md").write_text(markdown_table(results), encoding="utf-8")
        written.append("table.md")
    if publish:
        (out / "README.md").write_text(page(out), encoding="utf-8")
        written.append("README.md")
    print(f"{seconds:.0f} s; written to {out}: {', '.join(written)}")


def _results(bench: Bench, seconds: float) -> dict[str, Any]:
    return {
        "machine": _machine(),
        "versions": _versions(bench),
        "method": {
            "pairs": bench.method.pairs,
            "slice_seconds": bench.method.slice,
            "quick": bench.method.quick,
            "seconds": round(seconds),
        },
        "clients": {kind.name: kind.setup for kind in CLIENTS},
        "rows": [_row(row) for row in bench.rows],
        "curves": _rounded(bench.curves),
    }


def _row(row: Row) -> dict[str, Any]:
    spec = row.spec
    return {
        "id": spec.id,
        "section": spec.section,
        "work": spec.work,
        "against": spec.against,
        "kind": spec.kind.value,
        "target": spec.target,
        "met": row.met,
        **_rounded({"figure": row.figure, "low": row.low, "high": row.high, "ours": row.ours, "theirs": row.theirs}),
        "pairs": row.pairs,
        "note": row.note,
        "skipped": row.skipped,
    }


def _rounded(value: Any) -> Any:
    """Four digits say more than was measured, and keep the committed file readable."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        memory = 0.0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cores": cores,
        "memory_gib": round(memory),
        "system": f"{platform.system()} {platform.machine()}",
        "load_at_the_end": round(os.getloadavg()[0], 1),
    }


def _versions(bench: Bench) -> dict[str, str]:
    found = {"python": platform.python_version(), "valkey": bench.address.version}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row's texts, in the order of the head."""
    kind = Kind(row["kind"])
    work = row["work"] + (f", {row['note']}" if row["note"] else "")
    target = "" if row["target"] is None else f"{'≥' if kind.more_is_better else '≤'} {row['target']:g}"
    if row["figure"] is None:
        return work, row["against"], "-", f"skipped: {row['skipped']}", target, "", "", ""
    if kind is Kind.STALL:
        unit, figure = " ms", f"{row['figure']:.1f} ms"
    else:
        unit, figure = "", f"{row['figure']:.3g} ×" if row["figure"] < 100 else f"{row['figure']:.0f} ×"
    quartiles = f"{row['low']:.3g} to {row['high']:.3g}{unit}"
    met = {None: "", True: "met", False: "short"}[row["met"]]
    return work, row["against"], figure, quartiles, target, met, *(_absolute(row, side) for side in ("ours", "theirs"))


def _absolute(row: dict[str, Any], side: str) -> str:
    seconds = row[side]
    if seconds is None:
        return ""
    if row["section"] in {"redis", "files", "uvloop"} and "many" not in row["id"]:
        return f"{float(f'{1 / seconds:.3g}'):,.0f}/s"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.2f} µs"


def text_table(rows: Iterable[Row]) -> str:
    """The table for a terminal."""
    rows = [_row(row) for row in rows]
    lines = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    texts, section = [], ""
    for line, row in zip(lines, [None, *rows], strict=True):
        if row is not None and row["section"] != section:
            section = row["section"]
            texts.append(f"\n{SECTIONS[section]}")
        texts.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return "\n".join(texts)


def markdown_table(results: dict[str, Any]) -> str:
    """The same as Markdown, a table per section."""
    lines: list[str] = []
    for section, title in SECTIONS.items():
        rows = [row for row in results["rows"] if row["section"] == section]
        if rows:
            lines += [f"**{title}**", "", f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
            lines += [f"| {' | '.join(cell.replace('|', '/') for cell in _cells(row))} |" for row in rows]
            lines.append("")
    return "\n".join(lines)
