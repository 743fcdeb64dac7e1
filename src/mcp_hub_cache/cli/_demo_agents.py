"""The demo's agents: what they ask, the MCP server that they ask, and one round of asking."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TextIO

from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

from mcp_hub_cache import Cache, Stats, acached

from ._demo_repository import Repository

Ask = Callable[[str, dict[str, str | int]], Awaitable[list[str]]]
# Hears after each answer: how many there are, and how many calls have reached the server.
Heard = Callable[[int, int], None]


class Question(NamedTuple):
    """A call of one of the server's tools."""

    tool: str
    arguments: dict[str, str | int]


class ToolError(Exception):
    """The server answered a call with an error."""


class ServerError(Exception):
    """The server did not start, or ended."""


def catalogue(repository: Repository) -> list[Question]:
    """Return what agents may ask, in the order of its popularity: first where things stand, then the newest commits."""

    def about(tool: str, **arguments: str | int) -> Question:
        return Question(tool, {"repo_path": repository.path, **arguments})

    questions = [
        about("git_status"),
        about("git_log", max_count=10),
        about("git_show", revision=repository.commits[0]),
        about("git_branch", branch_type="local"),
        about("git_diff_unstaged"),
        about("git_log", max_count=30),
        about("git_diff_staged"),
    ]
    questions += [about("git_show", revision=file) for file in repository.files]
    for number, commit in enumerate(repository.commits[1:]):
        questions.append(about("git_show", revision=commit))
        if number < 20:  # against the working tree, so the further back the longer
            questions.append(about("git_diff", target=commit))
    return questions


def draw(catalogue: int, *, agents: int, each: int, seed: int) -> list[list[int]]:
    """Return the questions of each agent, by number. No agent asks the same twice: every hit is another agent's doing.

    Popularity follows Zipf's law; the drawing without replacement is that of Efraimidis and Spirakis (2006).
    """
    rng = random.Random(seed)  # noqa: S311 (the same agents every time, nothing secret)

    def agent() -> list[int]:
        luck = {number: rng.random() ** (number + 1) for number in range(catalogue)}
        return sorted(luck, key=luck.__getitem__, reverse=True)[:each]

    return [agent() for _ in range(agents)]


class GitServer:
    """A running ``mcp-server-git``, and how many calls have reached it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.calls = 0

    async def ask(self, tool: str, arguments: dict[str, str | int]) -> list[str]:
        """Call *tool*; answer its texts."""
        self.calls += 1
        result = await self._client.call_tool(tool, arguments)
        texts = [content.text for content in result.content if content.type == "text"]
        if result.is_error:
            raise ToolError(f"{tool}: {' '.join(texts)}")
        return texts

    def cached(self, cache: Cache) -> Ask:
        """Return ``ask`` as a user of this library would have written it."""

        @acached(ttl="10m", cache=cache)
        async def ask(tool: str, arguments: dict[str, str | int]) -> list[str]:
            return await self.ask(tool, arguments)

        return ask


@asynccontextmanager
async def git_server(repository: str, log: TextIO) -> AsyncIterator[GitServer]:
    """Start the server on *repository*, what it has to say going to *log*; end it however this is left.

    Raises:
        ServerError: It did not start, or ended early.
    """
    command = StdioServerParameters(
        command=sys.executable,
        args=["-m", "mcp_server_git", "--repository", repository],
        env={"GIT_OPTIONAL_LOCKS": "0"},  # "git status" would else write to the index of a repository that is not ours
    )
    # mcp runs task groups, and those wrap whatever is raised in groups; the first error is what happened.
    try:
        async with Client(stdio_client(command, errlog=log)) as client:
            yield GitServer(client)
    except ExceptionGroup as group:
        error = _first(group)
    except Exception as alone:  # noqa: BLE001 (told apart below)
        error = alone
    else:
        return
    if type(error).__module__.partition(".")[0] in {"mcp", "anyio"}:
        raise ServerError(f"mcp-server-git ended: {error}")
    raise error


def _first(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


@dataclass(frozen=True, slots=True)
class Round:
    """One round of questions, as plain data.

    Attributes:
        process: The id of the process that asked.
        calls: Calls that reached the server.
        hits: Answers that came out of the cache.
        coalesced: Answers shared with an agent who was asking the same just then.
        wall_seconds: From the first question to the last answer.
        waited_seconds: What the agents waited for their answers, added up.
        answers: A digest of each answer, by agent.
        failed: Questions that the server answered with an error.
        errors: Trouble with the cache's store, by kind.
    """

    process: int
    calls: int
    hits: int
    coalesced: int
    wall_seconds: float
    waited_seconds: float
    answers: list[list[str]] = field(repr=False)
    failed: int = 0
    errors: dict[str, int] = field(default_factory=dict)


async def run(
    server: GitServer, questions: list[Question], plan: list[list[int]], heard: Heard, cache: Cache | None = None
) -> Round:
    """Let all agents ask at once, each one question after another, through *cache* if there is one."""
    clock = asyncio.get_running_loop().time
    ask = server.ask if cache is None else server.cached(cache)
    answered, failed, waited, calls_before = 0, 0, 0.0, server.calls

    async def agent(wanted: list[int]) -> list[str]:
        nonlocal answered, failed, waited
        answers = []
        for number in wanted:
            asked = clock()
            try:
                answer = await ask(*questions[number])
            except ToolError as error:
                answer = ["error", str(error)]
                failed += 1
            waited += clock() - asked
            answers.append(fingerprint(answer))
            answered += 1
            heard(answered, server.calls - calls_before)
        return answers

    before = Stats() if cache is None else cache.stats
    began = clock()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(agent(wanted)) for wanted in plan]
    wall = clock() - began
    after = Stats() if cache is None else cache.stats
    return Round(
        process=os.getpid(),
        calls=server.calls - calls_before,
        hits=after.hits - before.hits,
        coalesced=after.coalesced - before.coalesced,
        wall_seconds=wall,
        waited_seconds=waited,
        answers=[task.result() for task in tasks],
        failed=failed,
        errors=dict(after.errors),
    )


def fingerprint(answer: list[str]) -> str:
    """Return a digest of an answer: equal for equal answers alone."""
    return hashlib.blake2b(json.dumps(answer).encode(), digest_size=16).hexdigest()
