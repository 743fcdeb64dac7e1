"""What a run has seen, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any


def totals(report: dict[str, Any], what: str) -> Counter[str]:
    """Add up one kind of figures over all workers."""
    total: Counter[str] = Counter()
    for worker in report["workers"].values():
        total.update(worker.get(what, {}))
    return total


def worst(report: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """The longest time of each operation, with the faults that went on."""
    longest: dict[str, tuple[float, str]] = {}
    for worker in report["workers"].values():
        for kind, (seconds, faults) in worker.get("worst", {}).items():
            longest[kind] = max(longest.get(kind, (0.0, "")), (seconds, faults))
    return longest


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report."""
    yield f"soak: {report['seconds']} s, seed {report['seed']}, {len(report['workers'])} processes came and went"
    yield "\nfaults injected"
    for name, number in sorted(report["faults"].items()):
        yield f"  {name:24}{number:6}"
    counts = totals(report, "counts")
    kinds = sorted({tuple(key.split(" ", 2)[:2]) for key in counts})
    longest = worst(report)
    yield "\noperations           calls   values   misses   raised  cut off   longest s"
    for place, kind in kinds:
        of = {key.split(" ", 2)[2]: number for key, number in counts.items() if key.startswith(f"{place} {kind} ")}
        calls = sum(number for outcome, number in of.items() if outcome in ("ok", "raised", "cancelled"))
        seconds, faults = longest.get(f"{place} {kind}", (0.0, ""))
        yield (
            f"  {place + ' ' + kind:18}{calls:6}{of.get('value', 0):9}{of.get('miss', 0):9}{of.get('raised', 0):9}"
            f"{of.get('cancelled', 0):9}{seconds:12.3f}  {faults}"
        )
    yield "\nthe cache on Redis was"
    for state, seconds in totals(report, "states").most_common():
        yield f"  {state:20}{seconds:8.1f} s"
    yield f"  back after a fault within {report.get('slowest recovery', 0):g} s of looking"
    yield "\nlogged"
    for text, number in totals(report, "heard").most_common(12):
        yield f"  {number:6}  {text}"
    yield "\nheld, at rest"
    for name, worker in report["workers"].items():
        if len(worker["samples"]) > 1:
            first, last = worker["samples"][0], worker["samples"][-1]
            held = ", ".join(f"{what} {first[what]} → {last[what]}" for what in first if what != "age")
            yield f"  {name} from {first['age']:g} to {last['age']:g} s: {held}"
    yield f"\n{report['disk full was'].capitalize()}: a full disk."
    violation = report["violation"]
    if violation is None:
        yield "every promise held"
        return
    # The end is what is left of a long log.
    yield "what was done to it"
    for line in violation.get("history", ()):
        yield f"    {line}"
    yield "VIOLATION: " + violation["violation"]
    for what in ("process", "faults", "name", "value"):
        if violation.get(what):
            yield f"  {what}: {str(violation[what])[:600]}"
    yield f"  again: nox -s soak -- --seed {report['seed']} --minutes {report['minutes']:g}"
