"""A run: which rows are wanted, and what came out of each."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from .measure import Method, Paired, Side, pairs, spread
from .servers import Address
from .specs import SPECS, Kind, Spec


@dataclass(frozen=True)
class Row:
    """A measured row, or why it was not measured.

    Attributes:
        spec: What it is.
        figure: The median: a ratio, or milliseconds for a stall.
        low: Its lower quartile.
        high: Its upper quartile.
        pairs: How many ratios.
        ours: Median seconds per operation.
        theirs: The same of the other side.
        note: Something to know about it.
        skipped: Why there is no figure.
    """

    spec: Spec
    figure: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0
    ours: float | None = None
    theirs: float | None = None
    note: str = ""
    skipped: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none, or no figure."""
        target = self.spec.target
        if target is None or self.figure is None:
            return None
        return self.figure >= target if self.spec.kind.more_is_better else self.figure <= target


@dataclass
class Bench:
    """What the rows' modules are given."""

    method: Method
    address: Address
    only: str = ""
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)

    def wants(self, prefix: str) -> bool:
        """Whether any row whose id begins with *prefix* is asked for."""
        return any(self._selected(spec) for spec in SPECS if spec.id.startswith(prefix))

    def wants_curve(self, name: str) -> bool:
        """Whether the curve *name* is asked for."""
        return self.only in name

    def _selected(self, spec: Spec) -> bool:
        return self.only in spec.id

    async def compare(
        self,
        row_id: str,
        ours: Side,
        theirs: Side | None,
        *,
        missing: str = "",
        number: int | None = None,
        note: str = "",
    ) -> None:
        """Measure row *row_id* if it is asked for; skip it, visibly, where there is no other side."""
        spec = _spec(row_id)
        if not self._selected(spec):
            return
        if theirs is None:
            self.skip(row_id, missing)
            return
        self.paired(row_id, await pairs(ours, theirs, self.method, number), note)

    def paired(self, row_id: str, paired: Paired, note: str = "") -> None:
        """Add a row of pairs that were measured elsewhere."""
        spec = _spec(row_id)
        low, middle, high = spread(paired.rates if spec.kind is Kind.RATE else paired.times)
        ours, theirs = spread(paired.ours)[1], spread(paired.theirs)[1]
        self._add(Row(spec, middle, low, high, len(paired.ours), ours, theirs, note))

    def single(self, row_id: str, values: list[float], note: str = "") -> None:
        """Add a row that is a figure of its own."""
        if self._selected(_spec(row_id)):
            low, middle, high = spread(values)
            self._add(Row(_spec(row_id), middle, low, high, len(values), note=note))

    def skip(self, row_id: str, reason: str) -> None:
        """Add a row that could not be measured."""
        if self._selected(_spec(row_id)):
            self._add(Row(_spec(row_id), skipped=reason or "not measured"))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self.rows.sort(key=lambda row: SPECS.index(row.spec))
        said = f"skipped: {row.skipped}" if row.figure is None else f"{row.figure:.3g}"
        print(f"  {row.spec.id:32} {said}", file=sys.stderr, flush=True)


def _spec(row_id: str) -> Spec:
    return next(spec for spec in SPECS if spec.id == row_id)
