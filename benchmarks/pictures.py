"""The pictures, from the results alone: small SVG, readable on light and dark ground, the same bytes for the same data.

Without matplotlib nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_GREY = "#808890"  # of text and lines: as far from white as from black
_OURS = "#2f9e6e"
_OTHERS = ("#d9822b", "#5b8def", "#c05bb5", "#b0a030", "#d65f5f", "#4fb3bf", "#9a7b5f")
_STYLE = {
    "svg.hashsalt": "mcp-hub-cache",
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _GREY,
    "axes.labelcolor": _GREY,
    "axes.edgecolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
# Rows whose two sides are bars of one group, with the name that the other side has there.
_HITS = {
    "@acached, a str": {
        "near.str.async-lru": "async-lru",
        "near.str.cachebox": "cachebox",
        "near.str.aiocache": "aiocache",
        "near.str.cashews": "cashews",
    },
    "@acached, 1.4 KB of JSON": {"near.json.async-lru": "orjson.loads + async-lru"},
    "cache.get, a str": {
        "near.get.dict": "an awaited dict lookup",
        "near.get.cashews-client-side": "cashews, client-side",
        "near.get.cashews": "cashews, memory",
        "near.get.aiocache": "aiocache, memory",
        "near.get.py-key-value": "py-key-value, memory",
    },
}
_FILES = {
    "get, 100 callers": {
        "files.get100.hop": "to_thread(open + read)",
        "files.get100.aiofiles": "aiofiles",
        "files.get100.diskcache": "to_thread(diskcache)",
        "files.get100.py-key-value": "py-key-value",
    },
    "set, 100 callers": {
        "files.set100.hop": "to_thread(write + replace)",
        "files.set100.py-key-value": "py-key-value",
    },
}


def draw(results: dict[str, Any], out: Path) -> list[str]:
    """Draw what the results have data for; return the names of the files."""
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed")
        return []
    rows = {row["id"]: row for row in results["rows"] if row["figure"] is not None}
    drawn = []
    if "throughput" in results["curves"]:
        drawn.append(_throughput(results["curves"]["throughput"], out))
    if any(row_id.startswith("near.") for row_id in rows):
        drawn.append(_bars(rows, _HITS, out / "hits.svg", "time of a hit, µs", lambda seconds: seconds * 1e6))
    if any(row_id.startswith("files.") for row_id in rows):
        drawn.append(_bars(rows, _FILES, out / "files.svg", "per second, on a tmpfs", lambda seconds: 1 / seconds))
    drawn += [_growth(name, curve, out) for name, curve in results["curves"].items() if "series" in curve]
    return drawn


@contextmanager
def _figure(path: Path, height: float) -> Iterator[Any]:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.4, height), layout="constrained")
        yield axes
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _lines(axes: Any, series: dict[str, list[tuple[float, float]]]) -> None:
    """Lines with their names at the side, ours on top; both axes logarithmic."""
    others = iter(_OTHERS * 3)
    for name, points in series.items():
        ours = name.startswith("mcp-hub-cache")
        axes.plot(
            *zip(*points, strict=True),
            color=_OURS if ours else next(others),
            linewidth=2.2 if ours else 1.3,
            marker="o",
            markersize=3.5,
            zorder=3 if ours else 2,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _plain(axis)
    axes.grid(visible=True)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)


def _plain(axis: Any) -> None:
    """Whole numbers at 1, 2 and 5 of each decade; at the decades alone where that would be too many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value / 1e6:g} M"))


def _throughput(curve: dict[str, list[dict[str, float]]], out: Path) -> str:
    series = {name: [(point["callers"], point["per_second"]) for point in points] for name, points in curve.items()}
    with _figure(out / "throughput.svg", 3.2) as axes:
        _lines(axes, series)
        axes.set_xlabel("concurrent callers")
        axes.set_ylabel("reads per second")
    return "throughput.svg"


def _bars(
    rows: dict[str, Any], groups: dict[str, dict[str, str]], path: Path, label: str, figure: Callable[[float], float]
) -> str:
    names: list[str] = []
    values: list[float] = []
    for group, peers in groups.items():
        there = [row_id for row_id in peers if row_id in rows]
        if not there:
            continue
        names.append(f"{group}: mcp-hub-cache")
        ours = rows[there[0]]["ours"]
        values.append(figure(ours))
        for row_id in there:  # by the ratio: rows are not measured at the same time
            row = rows[row_id]
            names.append(peers[row_id])
            values.append(figure(ours * row["figure"] if row["kind"] == "rate" else ours / row["figure"]))
    with _figure(path, 0.5 + 0.26 * len(names)) as axes:
        places = range(len(names), 0, -1)
        colors = [_OURS if name.endswith("mcp-hub-cache") else _GREY for name in names]
        bars = axes.barh(list(places), values, color=colors, height=0.65)
        axes.bar_label(bars, [f"{float(f'{value:.3g}'):,g}" for value in values], padding=3, color=_GREY, fontsize=8)
        axes.set_yticks(list(places), names)
        axes.set_xscale("log")
        axes.set_xlim(min(values, default=1) / 2, max(values, default=1) * 3)
        axes.set_xlabel(label)
        _plain(axes.xaxis)
        axes.grid(visible=True, axis="x")
    return path.name


def _growth(name: str, curve: dict[str, Any], out: Path) -> str:
    """A growth curve; the legend has each line's slope in the log-log picture."""
    series = {
        f"{line}, slope {found['slope']:+.2f}": [tuple(point) for point in found["points"]]
        for line, found in curve["series"].items()
    }
    with _figure(out / f"growth-{name}.svg", 2.8) as axes:
        _lines(axes, series)  # type: ignore[arg-type]  # pairs, from JSON
        axes.set_xlabel(curve["x"])
        axes.set_ylabel(curve["y"])
    return f"growth-{name}.svg"
