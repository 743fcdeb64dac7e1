"""docs/benchmarks/README.md, from the JSON files beside it: written by the run, never by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HEAD = """\
# Benchmarks

How fast this library is beside others, measured in one run on one machine, as ratios. Written by the command below;
[results.json](results.json) has every figure.

```sh
nox -s bench                          # about {minutes} minutes: the table, the pictures, results.json
nox -s bench -- --quick               # does everything work? Says nothing about speed
nox -s bench -- --only redis.get100   # some rows
nox -s bench -- --growth              # the growth curves
nox -s bench -- --publish             # what is in this folder
```

Nothing is needed but the environment that nox makes: the benchmarks start a Valkey of their own.
"""

_RESULTS = """\
## Results

A ratio is ours over theirs: of rates where at least so much is wanted (≥), of times where at most (≤).
[Where the time goes](profile.md) has the profiles of what falls short.
"""

_METHOD = """\
## Method

- **Pairs, back to back.** Shared machines change their speed within a second. Both sides of a row are measured one
  after the other, about {slice:.0f} ms each, the order alternating; a row is the median of {pairs} pairs' ratios, with
  their quartiles. Absolute figures are medians too. They are of this machine only, and never the claim.
- **Steady state.** With N callers, N tasks ask for one key after the other, no two for the same. The clock starts when
  every one has had its first value.
- **Checked.** A wrong value ends the run. Each read on the clock is looked at (a text whole, JSON for the number of its
  key, since comparing all of it would flatter the slower side), each caller's first and last value are compared whole,
  and what was written is read back.
- **Like with like.** Values go through orjson wherever a client lets one choose; every client keeps a deadline on
  operations where it has one by default. The garbage collector is on, and run between pairs.
- **Near cache off**, unless the row is about it.
- Quartiles that straddle a target mean: not decided on this machine.

| client | as it is set up |
|---|---|
"""

_PICTURES = {
    "throughput.svg": "Reads per second over Redis, by concurrent callers",
    "hits.svg": "Hits in the process",
    "files.svg": "Files",
}


def page(folder: Path) -> str:
    """Return the page for what is in *folder*."""
    results = _read(folder / "results.json")
    growth = _read(folder / "growth.json")
    parts: list[str] = []
    if results:
        method = results["method"]
        parts += [
            _HEAD.format(minutes=max(1, round(method["seconds"] / 60))),
            _RESULTS,
            (folder / "table.md").read_text(encoding="utf-8"),
            *(f"![{title}]({name})\n" for name, title in _PICTURES.items() if (folder / name).exists()),
        ]
    if growth:
        parts.append(_growth(growth))
    if results:
        method = results["method"]
        clients = "".join(f"| {name} | {setup} |\n" for name, setup in results["clients"].items())
        parts += [
            _METHOD.format(slice=method["slice_seconds"] * 1e3, pairs=method["pairs"]) + clients,
            _machine(results),
        ]
    return "\n".join(parts)


def _read(path: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        "## Machine and versions\n\n"
        f"{machine['cores']} cores of an {machine['cpu']}, {machine['memory_gib']} GiB, {machine['system']}, shared "
        f"with the server and whatever else ran (load at the end: {machine['load_at_the_end']}).\n\n{versions}.\n"
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{float(f'{value:.3g}'):,.0f}"


def _growth(growth: dict[str, Any]) -> str:
    """The curves' pictures and slopes, and the figures that stand alone."""
    lines = [
        "## Growth",
        "",
        f"From `nox -s bench -- --growth` ({max(1, round(growth['method']['seconds'] / 60))} minutes).",
        "A slope is that of the line in the log-log picture: 0 is constant cost, 1 is proportional.",
        "",
    ]
    for name, curve in growth["curves"].items():
        if "series" in curve:
            lines += [f"### {curve['title']}", "", f"![{curve['title']}](growth-{name}.svg)", ""]
            lines += ["| | from | to | slope |", "|---|---|---|---|"]
            for line, found in curve["series"].items():
                (first, low), (last, high) = found["points"][0], found["points"][-1]
                span = f"{_number(low)} at {_number(first)} | {_number(high)} at {_number(last)}"
                lines.append(f"| {line} | {span} | {found['slope']:+.2f} |")
            lines.append("")
        else:
            lines += [f"### {curve['title']}", "", "| | |", "|---|---|"]
            lines += [f"| {what} | {figure} |" for what, figure in curve["figures"].items()]
            lines.append("")
    return "\n".join(lines)
