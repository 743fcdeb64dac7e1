"""The demo's three rounds: without the cache, with it, and with it in another process.

The other process is this command again with a hidden option. It gets its task as JSON on stdin and writes lines of
JSON: how far it is, and at last its round.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from typing import Any, TextIO

from mcp_hub_cache import Cache, StoreError, open_cache

from ._demo_agents import (
    GitServer,
    Question,
    Round,
    ServerError,
    ToolError,
    catalogue,
    draw,
    fingerprint,
    git_server,
    run,
)
from ._demo_report import Report, Screen
from ._demo_repository import Repository

EACH = 10
# A repository whose questions take long gets fewer of them: the first round should not be longer.
_FIRST_ROUND_SECONDS = 20.0
_END_SECONDS = 10.0


async def rounds(
    *,
    options: argparse.Namespace,
    repository: Repository,
    where: str,
    kept: bool,
    settings: dict[str, Any],
    screen: Screen,
    log: TextIO,
) -> Report:
    """Run the three rounds.

    Args:
        options: The command's arguments.
        repository: What to ask about.
        where: Where the cache is, in words.
        kept: Whether it is still there afterwards.
        settings: For ``open_cache``, here and in the other process.
        screen: Shows how far it is.
        log: Takes what the servers and the other process have to say.

    Raises:
        StoreError: The cache's store does not serve.
        ServerError: The MCP server, or the other process, did not start, or ended.

    Cancellation: Ends the server and the other process.
    """
    questions = catalogue(repository)
    async with open_cache(**settings) as cache:
        await _check(cache)
        async with git_server(repository.path, log) as server:
            each = options.questions or await _affordable(server, questions, options.agents)
            plan = draw(len(questions), agents=options.agents, each=each, seed=options.seed)
            total = sum(map(len, plan))

            screen.begin(0, total)
            without = await run(server, questions, plan, screen.heard)
            screen.end(without)
            screen.begin(1, total)
            cold = await run(server, questions, plan, screen.heard, cache)
            screen.end(cold)
            screen.begin(2, total)
            # While this one still has its cache open: two processes share it.
            warm = await _in_another_process(repository, questions, plan, settings, screen, log)
            screen.end(warm)

            changed, wrong = await _compare(server, questions, plan, [without, cold, warm])
    return Report(
        repository=repository.name,
        made=repository.made,
        backend=cache.store.name,
        where=where,
        namespace=settings["cache_namespace"] if kept else None,
        agents=options.agents,
        distinct=len({number for wanted in plan for number in wanted}),
        rounds=[without, cold, warm],
        changed=changed,
        wrong=wrong,
    )


async def _check(cache: Cache) -> None:
    status = await cache.status()
    if status.status != "healthy":
        raise StoreError(f"{status.backend} is {status.status}: {status.problem or 'it does not answer'}")


async def _affordable(server: GitServer, questions: list[Question], agents: int) -> int:
    """How many questions each agent can ask in the time that the first round may take."""
    clock = asyncio.get_running_loop().time
    # A few of each kind, and the first does not count: the server is still waking up.
    sample = questions[:3] + questions[3 :: max(1, len(questions) // 8)]
    began = clock()
    for number, question in enumerate(sample):
        if number == 1:
            began = clock()
        try:
            await server.ask(*question)
        except ToolError:
            pass  # counted where it is part of a round
    mean = (clock() - began) / (len(sample) - 1)
    return max(2, min(EACH, int(_FIRST_ROUND_SECONDS / (mean * agents))))


async def _compare(
    server: GitServer, questions: list[Question], plan: list[list[int]], rounds: list[Round]
) -> tuple[list[str], list[str]]:
    """Questions that were not answered the same each time: those whose answer is another by now, and the others."""
    without, ever = _answers(plan, rounds[:1]), _answers(plan, rounds)
    changed: list[str] = []
    wrong: list[str] = []
    for number in (number for number, different in ever.items() if len(different) > 1):
        try:
            now = await server.ask(*questions[number])
        except ToolError as error:
            now = ["error", str(error)]
        about = {name: value for name, value in questions[number].arguments.items() if name != "repo_path"}
        text = f"{questions[number].tool} {json.dumps(about)}"
        (wrong if without[number] == {fingerprint(now)} else changed).append(text)
    return changed, wrong


def _answers(plan: list[list[int]], rounds: list[Round]) -> dict[int, set[str]]:
    """The different answers that there were to each question."""
    answers: dict[int, set[str]] = {}
    for done in rounds:
        for wanted, given in zip(plan, done.answers, strict=True):
            for number, answer in zip(wanted, given, strict=True):
                answers.setdefault(number, set()).add(answer)
    return answers


async def _in_another_process(
    repository: Repository,
    questions: list[Question],
    plan: list[list[int]],
    settings: dict[str, Any],
    screen: Screen,
    log: TextIO,
) -> Round:
    """Have the same round run by another process, and hear how far it is."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mcp_hub_cache", "demo", "--second-process"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        limit=64 * 1024 * 1024,
        env=os.environ | {name.upper(): value for name, value in settings.items()},
        start_new_session=True,  # a terminal's Ctrl-C comes here alone, and is passed on once
    )
    assert process.stdin is not None
    assert process.stdout is not None
    result: dict[str, Any] | None = None
    try:
        process.stdin.write(json.dumps({"repository": repository.path, "questions": questions, "plan": plan}).encode())
        process.stdin.write_eof()
        async for line in process.stdout:
            heard = json.loads(line)
            if "round" in heard:
                result = heard["round"]
            else:
                screen.heard(heard["answered"], heard["calls"])
        await process.wait()
    except (BrokenPipeError, ConnectionResetError):
        pass  # it ended early
    finally:
        await _end(process)
    if result is None:
        raise ServerError(f"the second process ended with {process.returncode}")
    return Round(**result)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the second process, which ends its server first; if it does not, that sees its input end all the same."""
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def second_process() -> None:
    """Run one round with the cache that the environment names, for the process that started this one."""
    task = json.load(sys.stdin)
    questions = [Question(*question) for question in task["questions"]]
    plan: list[list[int]] = task["plan"]
    told = 0.0
    clock = asyncio.get_running_loop().time

    def heard(answered: int, calls: int) -> None:
        nonlocal told
        if clock() - told > 0.05:
            told = clock()
            print(json.dumps({"answered": answered, "calls": calls}), flush=True)

    async with open_cache() as cache, git_server(task["repository"], sys.stderr) as server:
        done = await run(server, questions, plan, heard, cache)
    print(json.dumps({"answered": sum(map(len, plan)), "calls": done.calls}))
    print(json.dumps({"round": dataclasses.asdict(done)}))
