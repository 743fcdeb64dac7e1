"""What the command prints.

Rules: results go to stdout, everything else to stderr; with ``--json`` stdout holds one JSON document. What comes out
of the cache is data, never markup, and reaches a terminal without control characters.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

# A listing is written in blocks: one write per key would cost more than reading it.
BLOCK = 500
# From here on a listing shows that it is under way.
MANY = 1000


def say(message: str) -> None:
    """Tell the person, on stderr."""
    print(f"mcp-hub-cache: {message}", file=sys.stderr)


def as_json(value: object, *, indent: int | None = 2) -> str:
    """Return JSON in plain ASCII. What JSON has no form for is shown as the nearest that it has, or as text."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def print_json(value: object) -> None:
    """Write *value* to stdout as one JSON document."""
    print(as_json(value))


def print_value(value: object) -> None:
    """Write a cached value to stdout: text as it is, everything else as JSON."""
    text = value if isinstance(value, str) else json.dumps(_plain(value), indent=2, ensure_ascii=False)
    if sys.stdout.isatty():
        text = printable(text, keep="\n\t")
    sys.stdout.write(text.encode(errors="surrogatepass").decode(errors="replace") + "\n")


def printable(text: str, *, keep: str = "") -> str:
    """Return *text* with control characters written out, so that it stays on its line and can't command a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """Write a table of names and values to stdout."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        shown = Text(printable(str(value)))
        if name == "status":
            shown.stylize("bold green" if value == "healthy" else "bold red")
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)


async def print_keys(keys: AsyncIterator[str], *, to_json: bool, complete: Callable[[], bool]) -> int:
    """Write keys to stdout as they come, holding one block of them at a time; answer how many.

    A JSON array is closed only if *complete* says so at the end: a listing that broke off must not look whole.
    """
    count = 0
    block: list[str] = []
    with _Listing() as listing:
        if to_json:
            listing.write("[")
        async for key in keys:
            block.append(("," if count else "") + "\n  " + json.dumps(key) if to_json else printable(key) + "\n")
            count += 1
            if len(block) >= BLOCK:
                listing.write("".join(block), count)
                block.clear()
        if to_json and complete():
            block.append("\n]\n" if count else "]\n")
        listing.write("".join(block), count)
    return count


class _Listing(contextlib.AbstractContextManager["_Listing"]):
    """Writes to stdout, and shows on a terminal's stderr how far it is once there is much."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._both = sys.stdout.isatty()

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        sys.stdout.flush()

    def write(self, text: str, count: int = 0) -> None:
        if self._progress is None and count >= MANY and self._console.is_terminal:
            columns = SpinnerColumn(), TextColumn("{task.completed:,.0f} keys"), TimeElapsedColumn()
            progress = Progress(*columns, console=self._console, transient=True, redirect_stdout=False)
            progress.add_task("keys", total=None)
            progress.start()
            self._progress = progress
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=count)
            if self._both:
                # One screen for both: the display has to make room for the lines.
                self._progress.console.out(text, end="", highlight=False)
                return
        sys.stdout.write(text)


def _plain(value: object, depth: int = 0) -> object:
    """Return *value* in plain JSON types, as near as they come; nothing is deeper than parsers follow."""
    if depth > 500:
        return "…"
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case bytes():
            return value.decode(errors="backslashreplace")
        case Mapping():
            return {key if isinstance(key, str) else str(key): _plain(item, depth + 1) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item, depth + 1) for item in _in_order(value)]
        case _:
            return str(value)


def _in_order(items: Iterable[object]) -> Iterator[object]:
    # A set has no order of its own; the same set must print the same way twice.
    return iter(sorted(items, key=repr)) if isinstance(items, set | frozenset) else iter(items)
