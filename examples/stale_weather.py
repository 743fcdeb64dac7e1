"""An agent that answers at once with the weather it knows, while it asks for newer; and forgets a user at a word.

    python examples/stale_weather.py

The clock is one to be set, so that nobody need wait ten minutes. Without `clock=`, the same holds in real time.
"""

import asyncio
import logging
import sys

from mcp_hub_cache import Cache, Policy, acached
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.testing import FakeClock

clock = FakeClock()
# Fresh for ten minutes. For an hour more it is served at once, and refreshed in the background.
patient = Policy(ttl="10m", stale_ttl="1h", soft_timeout=0)
cache = Cache(MemoryStore(clock=clock), policy=patient)


class Service:
    """The weather service: slow, and at times down."""

    def __init__(self) -> None:
        self.degrees = 20
        self.calls = 0
        self.is_up = True

    async def ask(self, city: str) -> str:
        """Tell the temperature."""
        self.calls += 1
        await asyncio.sleep(0.05)
        if not self.is_up:
            raise ConnectionError("the weather service is down")
        return f"{self.degrees} degrees in {city}"


service = Service()


@acached(cache=cache, tags=["user:{user}"])
async def weather(user: str, city: str) -> str:
    """The weather, as the user wants it told."""
    return f"{user}: {await service.ask(city)}"


async def settled() -> None:
    """Wait until the background is quiet."""
    while weather.stats().loads < service.calls:  # noqa: ASYNC110 (the background has no event to wait for)
        await asyncio.sleep(0.01)


async def ask_all(when: str) -> None:
    answers = await asyncio.gather(*(weather(user, "Oslo") for user in ("ada", "bo") for _ in range(20)))
    print(f"{when}: {answers[0]}; {answers[-1]}; {service.calls} calls")


async def main() -> None:
    # A refresh that fails in the background has nobody to tell but the log.
    logging.basicConfig(stream=sys.stdout, format="log: %(message)s")
    async with cache:
        await ask_all("at first")

        service.degrees = 25
        clock.advance(11 * 60)
        await ask_all("11 minutes later, at once")
        await settled()
        await ask_all("then")

        service.is_up = False
        clock.advance(11 * 60)
        await ask_all("with the service down")
        await settled()
        await ask_all("and for half a minute nobody asks it")

        service.is_up = True
        await cache.invalidate("user:bo")
        await ask_all("bo is forgotten, and asks anew")
        stats = weather.stats()
        print(f"{stats.stale_hits} stale hits, {stats.hits} hits, {stats.load_errors} load errors")


asyncio.run(main())
