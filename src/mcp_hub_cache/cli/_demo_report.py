"""What the demo shows: how far it is, then a table and a few sentences, or the same as JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import output
from ._demo_agents import Round

TITLES = ("without the cache", "with it, cold", "new process, warm")
_BAR = 10


@dataclass(frozen=True, slots=True)
class Report:
    """What the demo found.

    Attributes:
        repository: What to call it.
        made: Why it was made for the demo; None: it is the user's own.
        backend: What the cache is kept in: file or redis.
        where: The same in words.
        namespace: Where it is the user's own store, the namespace in it, to look at; None: all is gone by now.
        agents: How many asked.
        distinct: Different questions among all that were asked in a round.
        rounds: As many as ``TITLES``.
        changed: Questions whose answer changed while the demo ran, because the repository did.
        wrong: Questions that were answered otherwise with the cache than without it, though nothing had changed.
    """

    repository: str
    made: str | None
    backend: str
    where: str
    namespace: str | None
    agents: int
    distinct: int
    rounds: list[Round]
    changed: list[str]
    wrong: list[str]

    @property
    def questions(self) -> int:
        """Questions in a round."""
        return sum(map(len, self.rounds[0].answers))

    def saved(self, number: int) -> float:
        """Seconds by which a round was faster than the first."""
        return self.rounds[0].wall_seconds - self.rounds[number].wall_seconds

    def as_dict(self) -> dict[str, object]:
        """Return it as plain data."""
        return {
            "repository": self.repository,
            "repository_made_because": self.made,
            "backend": self.backend,
            "namespace": self.namespace,
            "agents": self.agents,
            "questions": self.questions,
            "distinct_questions": self.distinct,
            "rounds": [
                {
                    "name": title,
                    "process": each.process,
                    "server_calls": each.calls,
                    "hits": each.hits,
                    "coalesced": each.coalesced,
                    "wall_seconds": round(each.wall_seconds, 4),
                    "seconds_saved": round(self.saved(number), 4),
                    "agents_waited_seconds": round(each.waited_seconds, 4),
                    "server_errors": each.failed,
                    "cache_errors": each.errors,
                }
                for number, (title, each) in enumerate(zip(TITLES, self.rounds, strict=True))
            ],
            "answers_equal": not self.wrong,
            "wrong_answers": self.wrong,
            "changed_meanwhile": self.changed,
        }

    def show(self) -> None:
        """Write the table and the sentences to stdout."""
        console = Console(highlight=False)

        def say(*parts: str | tuple[str, str]) -> None:
            # In a file or a log, a sentence is a line.
            console.print(Text.assemble(*parts), soft_wrap=not console.is_terminal)

        say()
        say(
            (f"{self.agents} agents", "bold"),
            f" put {self.questions:,} questions, {self.distinct:,} of them different, to ",
            ("mcp-server-git", "bold"),
            f" about {output.printable(self.repository)}.",
        )
        if self.made is not None:
            say((f"(Made because {output.printable(self.made)}.)", "dim"))
        say()
        console.print(self._table(console))
        say()
        for sentence in self._sentences():
            say(sentence)
        say()

    def _table(self, console: Console) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("Round")
        table.add_column("Calls", justify="right")
        table.add_column("to the server", width=_BAR + 3, no_wrap=True)
        for header in ("Hits", "Coalesced", "Wall time", "Saved"):
            table.add_column(header, justify="right", no_wrap=True)
        mark = "#" if console.options.ascii_only else "\N{LOWER SEVEN EIGHTHS BLOCK}"
        for number, (title, each) in enumerate(zip(TITLES, self.rounds, strict=True)):
            share = each.calls / (self.rounds[0].calls or 1)
            with_cache = number > 0
            table.add_row(
                f"{number + 1} {title}",
                Text(f"{each.calls:,}", "bold"),
                # Never so short that a call could not be seen.
                Text(mark * max(round(share * _BAR), each.calls > 0), "green" if with_cache else "yellow"),
                f"{each.hits:,}" if with_cache else "",
                f"{each.coalesced:,}" if with_cache else "",
                f"{each.wall_seconds:.2f} s",
                Text(f"{self.saved(number):.2f} s", "bold green") if with_cache else "",
            )
        return table

    def _sentences(self) -> Iterator[tuple[str, str]]:
        """What the figures say, each sentence with its style."""
        without, cold, warm = self.rounds
        cost = f"{self.questions:,} questions cost {cold.calls:,} calls instead of {without.calls:,}"
        waited = f"waited {cold.waited_seconds:,.1f} s between them instead of {without.waited_seconds:,.1f} s"
        yield f"With the cache, {cost}, and the agents {waited}.", ""
        asked = "did not call the server once" if not warm.calls else f"called the server {warm.calls:,} times"
        left = f"{warm.hits:,} answers that process {cold.process} had left {output.printable(self.where)}"
        yield f"Process {warm.process} then {asked}: it found {left}.", ""
        if without.failed:
            yield f"The server answered {without.failed:,} questions with an error.", "yellow"
        if trouble := {kind for each in self.rounds for kind in each.errors}:
            yield f"The cache had trouble meanwhile: {', '.join(sorted(trouble))}.", "yellow"
        if self.changed:
            what = ", ".join(map(output.printable, self.changed[:3]))
            yield f"The repository changed while the demo ran, and so did the answers to {what}.", "yellow"
        if self.wrong:
            what = ", ".join(map(output.printable, self.wrong[:3]))
            yield f"WRONG: with the cache other answers came than without it, to {what}.", "bold red"
        elif self.changed:
            yield "All other answers from the cache equalled those without it.", "bold green"
        else:
            yield f"All {2 * self.questions:,} answers from the cache equalled those without it.", "bold green"
        if self.namespace is not None:
            yield f"For ten minutes you can look at them: mcp-hub-cache keys -n {self.namespace}", "dim"


class Screen(contextlib.AbstractContextManager["Screen"]):
    """Shows on stderr how far the demo is: bars on a terminal, else a line when something is done."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[calls]}"),
                TimeElapsedColumn(),
                console=self._console,
                redirect_stdout=False,
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal back."""
        if self._progress is not None:
            self._progress.stop()

    def say(self, sentence: str) -> None:
        """Tell what is being done, above the bars."""
        self._console.print(Text(output.printable(sentence), "dim"), soft_wrap=not self._console.is_terminal)

    def begin(self, number: int, total: int) -> None:
        """Begin a round of *total* questions."""
        self._title = f"{number + 1} {TITLES[number]}"
        if self._progress is not None:
            self._task = self._progress.add_task(f"{self._title:<19}", total=total, calls="")

    def heard(self, answered: int, calls: int) -> None:
        """Take note of an answer."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=answered, calls=f"{calls:>4} calls")

    def end(self, done: Round) -> None:
        """End the round."""
        if self._progress is None:
            self.say(f"{self._title}: {done.calls} calls to the server in {done.wall_seconds:.2f} s")
