"""Fetching only what has changed: the origin is asked whether a page is still the one that is stored.

    python examples/conditional_fetch.py

In place of HTTP and its ETag and 304 (RFC 9110) there is an origin in this file; a real client fits the same way.
"""

import asyncio
from dataclasses import dataclass

from mcp_hub_cache import MISSING, Cache, acached, current_entry
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock

clock = FakeClock()  # to be set, so that nobody need wait
cache = Cache(MemoryStore(clock=clock))


@dataclass
class Page:
    """What is cached."""

    etag: str
    text: str


@dataclass
class Answer:
    """What the origin says."""

    status: int
    etag: str
    text: str
    max_age: float


class Origin:
    """A site that knows its pages' versions."""

    def __init__(self) -> None:
        self.version = 1
        self.sent_bytes = 0

    async def get(self, url: str, if_none_match: str | None) -> Answer:
        """Send the page, unless its ETag is the one that the client has."""
        etag = f"v{self.version}"
        if if_none_match == etag:
            return Answer(304, etag, "", max_age=60)
        text = f"{url}, version {self.version}".ljust(10_000, ".")
        self.sent_bytes += len(text)
        return Answer(200, etag, text, max_age=60)


origin = Origin()


@acached(cache=cache, stale_ttl="1d")  # kept for a day, to be asked about
async def fetch(url: str) -> Page | None:
    entry = current_entry()
    old: Page | None = None if entry.stale_value is MISSING else entry.stale_value
    answer = await origin.get(url, None if old is None else old.etag)
    entry.ttl = answer.max_age
    if answer.status == 304:
        return entry.not_modified()  # the stored page, fresh again; nothing is written but its times
    if answer.status == 404:
        entry.skip()
        return None
    return Page(answer.etag, answer.text)


async def show(when: str) -> None:
    page = await fetch("example.org/news")
    assert page is not None
    print(f"{when}: {page.etag}, {fetch.stats().loads} requests, {origin.sent_bytes:,} bytes sent")


async def main() -> None:
    async with cache:
        await show("at first")
        await show("within its minute")
        clock.advance(61)
        await show("a minute later, not modified")
        await show("within the next")
        origin.version = 2
        clock.advance(61)
        await show("modified")


asyncio.run(main())
