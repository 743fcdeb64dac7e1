"""What is stored and read back, and how a wrong value is told.

Every value carries the number of its key, and the values of two keys differ in every part. Reads on the clock look at
that number, each of them; whole values are compared off the clock, for the first and the last value of every caller
in every slice. Comparing each whole value on the clock would cost as much as a tenth of a merged read, on both sides:
it would flatter the slower one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TEXT = "Concurrent calls for one key share a single load, so that the tool is asked once."


Make = Callable[[int], Any]


class WrongValueError(AssertionError):
    """A client answered with something else than what was stored under the key."""


def result(number: int) -> dict[str, Any]:
    """Return the JSON search result of 1.4 KB that belongs to key *number*."""
    return {
        "query": f"how do agents cache tool calls, part {number}",
        "number": number,
        "took_ms": 37.5,
        "complete": True,
        "next": None,
        "results": [
            {
                "rank": rank,
                "title": f"Result {rank} of search {number}: caching for agents",
                "url": f"https://example.com/articles/{number}/{rank}?ref=search",
                "score": round(0.97 - rank / 31, 4),
                "snippet": f"{TEXT} ({number}.{rank}) What is stored keeps its types.",
            }
            for rank in range(5)
        ],
    }


def compare(value: object, number: int, make: Make = result) -> None:
    """Compare a whole value with what was stored under key *number*."""
    if value != make(number):
        raise WrongValueError(f"key {number} answered {str(value)[:80]}")


def small(number: int) -> dict[str, Any]:
    """Return a value of 100 bytes, for when there are very many."""
    return {"number": number, "text": TEXT[:70]}


def sized(size: int, number: int) -> dict[str, Any]:
    """Return a JSON value of about *size* bytes: rows of a table, with the number of its key."""
    row = {"id": 0, "name": "a row of a table", "score": 0.5, "tags": ["cache", "agent"], "text": TEXT}
    rows = max(0, (size - 40) // 150)
    value: dict[str, Any] = {"number": number, "rows": [{**row, "id": number + index} for index in range(rows)]}
    if not rows:
        value["text"] = "x" * max(0, size - 40)
    return value


def blob(size: int, number: int) -> bytes:
    """Return *size* bytes that no JSON could be mistaken for, with the number of its key."""
    return (number.to_bytes(8, "big") + bytes(range(256)) * (size // 256 + 1))[:size]
