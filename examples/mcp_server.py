"""An MCP server whose tool is cached: `@acached` under `@server.tool()`, and nothing else changes.

    python examples/mcp_server.py      (speaks MCP over stdin and stdout: give this command to an MCP client)

Needs mcp, which the extra "demo" brings: pip install 'mcp-hub-cache[demo]'
"""

import asyncio
from dataclasses import dataclass

from mcp.server.mcpserver import MCPServer

from mcp_hub_cache import acached

server = MCPServer("weather")
calls = 0


@dataclass
class Forecast:
    """What the tool answers."""

    city: str
    degrees: list[int]


@server.tool()
@acached(ttl="10m", namespace="example-weather")
async def forecast(city: str, days: int = 3) -> Forecast:
    """The weather of the next days."""
    global calls  # noqa: PLW0603 (counted, for the tool below)
    calls += 1
    await asyncio.sleep(0.2)  # in place of a slow service
    return Forecast(city, [len(city) + day for day in range(days)])


@server.tool()
async def calls_made() -> int:
    """How often the slow service was asked."""
    return calls


if __name__ == "__main__":
    server.run()
