"""Every example runs, as a process of its own, and prints what its reader is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mcp import Client, StdioServerParameters

from tests.servers import valkey_server

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTS = {
    "conditional_fetch": "^at first: v1, 1 requests, 10,000 bytes sent\n"
    "within its minute: v1, 1 requests, 10,000 bytes sent\n"
    "a minute later, not modified: v1, 2 requests, 10,000 bytes sent\n"
    "within the next: v1, 2 requests, 10,000 bytes sent\n"
    "modified: v2, 3 requests, 20,000 bytes sent\n$",
    "get_set": "goal='ship it'.*\n"
    "fresh for 600 seconds\n"
    "a cached None: None\n"
    "a miss: MISSING\n"
    ".*'b': 2.5, 'c': .*\n"
    "the first: True, the second: False\n"
    "keys: .*'plan:42'.*\n"
    "deleted: True, and the rest: 5\n$",
    "methods": "4 questions, 3 calls\nafter invalidate: 4 calls\n$",
    "redis_fleet": "^No server is configured.*\n"
    "(process .* on file: .*\n){3}"
    "3 processes asked 30 questions; 10 results were stored\n$",
    "stale_weather": "^at first: ada: 20 degrees in Oslo; bo: 20 degrees in Oslo; 2 calls\n"
    "11 minutes later, at once: ada: 20 degrees in Oslo; bo: 20 degrees in Oslo; 4 calls\n"
    "then: ada: 25 degrees in Oslo; bo: 25 degrees in Oslo; 4 calls\n"
    "with the service down: ada: 25 degrees in Oslo; bo: 25 degrees in Oslo; 6 calls\n"
    "log: refreshing .*weather in the background failed \\(ConnectionError\\): what there is stands in\n"
    "and for half a minute nobody asks it: ada: 25 degrees in Oslo; bo: 25 degrees in Oslo; 6 calls\n"
    "bo is forgotten, and asks anew: ada: 25 degrees in Oslo; bo: 25 degrees in Oslo; 7 calls\n"
    "140 stale hits, 40 hits, 2 load errors\n$",
    "tool_cache": "^50 agents asked: 1 call\n"
    "asked again: 1 call\n"
    "asked after invalidate: 2 calls\n"
    "1 hit, 49 coalesced\n$",
    "warming": "^warmed 5 of 5\nwarmed 0 of 5 the second time\nthen 5 hits, 0 calls\n$",
}


def run(name: str, **variables: str) -> str:
    """What the example prints; it must have nothing to complain of."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")],
        # A busy machine may take longer than an agent would be kept waiting.
        env=os.environ | {"CACHE_TIMEOUT": "10"} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_all_examples_are_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == PRINTS.keys() | {"mcp_server"}


@pytest.mark.parametrize("name", PRINTS)
def test_it_prints_what_it_shows(name: str) -> None:
    for _ in range(2):  # what the first run has left does not matter to the second
        assert re.search(PRINTS[name], run(name))


def test_a_fleet_shares_what_is_on_redis() -> None:
    with valkey_server() as server:
        printed = run("redis_fleet", CACHE_BACKEND="redis", REDIS_URL=server.url)
        counted = re.findall(r"on redis: (\d+) calls, (\d+) hits", printed)
        assert counted == [("10", "0"), ("0", "10"), ("0", "10")]
        assert server.command("DBSIZE") == 0  # it clears its own away


async def test_an_mcp_server_with_a_cached_tool(tmp_path: Path) -> None:
    command = StdioServerParameters(
        command=sys.executable,
        args=[str(EXAMPLES / "mcp_server.py")],
        env=os.environ | {"CACHE_TIMEOUT": "10"},
        cwd=tmp_path,
    )
    for calls_at_the_end in (2, 0):  # the second server finds what the first has stored
        async with Client(command) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            # The decorated function keeps its signature and its docstring: they are the tool's schema.
            assert tools["forecast"].input_schema["properties"].keys() == {"city", "days"}
            assert tools["forecast"].description == "The weather of the next days."
            for arguments, degrees in (
                ({"city": "Oslo"}, [4, 5, 6]),
                ({"city": "Oslo", "days": 3}, [4, 5, 6]),
                ({"city": "Bergen", "days": 1}, [6]),
            ):
                answer = await client.call_tool("forecast", arguments)
                assert not answer.is_error
                assert answer.structured_content == {"city": arguments["city"], "degrees": degrees}
            calls = await client.call_tool("calls_made", {})
            assert calls.structured_content == {"result": calls_at_the_end}
