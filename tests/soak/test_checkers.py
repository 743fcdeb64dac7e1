"""The soak sees what is wrong: caches that are broken on purpose, each in one way, are caught."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mcp_hub_cache import Cache
from mcp_hub_cache.stores.memory import MemoryStore
from tests.backends import poll
from tests.ledger import Ledger, Name, Reading, Value
from tests.soak import load as load_module
from tests.soak.load import Load, Place
from tests.soak.report import lines
from tests.soak.watch import Ears, Faults, Heartbeat

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

A, B = Name("redis", "s", "", "a"), Name("redis", "s", "", "b")


def value(name: Name = A, *, at: float = 10.0, ttl: float = 5.0, **rest: Any) -> dict[str, Any]:
    return Value(name, rest.pop("by", "me"), rest.pop("number", 1), at, at, ttl, **rest).plain()


def ledger() -> Ledger:
    return Ledger("me", late=2.0, slack=0.5)


def test_what_is_right_is_not_complained_of() -> None:
    book = ledger()
    book.changed(A, 9.0, 9.5)
    book.changed(A, 11.0, 13.0)  # still under way when the call began
    assert book.wrong(A, value(), Reading(12.0, 12.0)) is None


@pytest.mark.parametrize("changed", [A, ("redis", "s"), ("redis", "s", ""), ("redis", "s", "tag", "t")])
def test_a_value_from_before_a_change_of_its_key_namespace_or_tag_is_wrong(changed: Any) -> None:
    book = ledger()
    book.changed(changed, 11.0, 11.5)
    wrong = book.wrong(A, value(tags=("t",)), Reading(12.0, 12.0))
    assert wrong is not None and "1.000 s older" in wrong


def test_another_keys_value_and_a_damaged_one_are_wrong() -> None:
    book = ledger()
    assert "'b'" in str(book.wrong(A, value(B), Reading(12.0, 12.0)))
    assert "damaged" in str(book.wrong(A, value() | {"at": 11.0}, Reading(12.0, 12.0)))
    assert "damaged" in str(book.wrong(A, b"?", Reading(12.0, 12.0)))


def test_a_value_past_its_ttl_is_wrong_unless_it_may_be_stale() -> None:
    book = ledger()
    assert book.wrong(A, value(), Reading(15.4, 15.4)) is None
    assert "past its ttl" in str(book.wrong(A, value(), Reading(15.6, 15.6)))
    assert book.wrong(A, value(), Reading(15.6, 15.6, stale_ttl=1.0)) is None


def test_a_set_may_land_until_its_call_has_ended() -> None:
    book = ledger()
    book.set_begins(1)
    book.changed(A, 11.0, 11.5)
    assert book.wrong(A, value(how="set"), Reading(12.0, 12.0)) is None
    book.set_ended(1, 10.5)
    assert book.wrong(A, value(how="set"), Reading(12.0, 12.0)) is not None
    assert book.wrong(A, value(how="set", by="another"), Reading(12.0, 12.0)) is None


class Honest(Cache):
    """Broken by those who inherit."""


class Stale(Cache):
    """Forgets to delete."""

    async def delete(self, key: str) -> bool:
        return True


class Mixed(Cache):
    """Gives the value of another key, now and then."""

    async def get(self, key: str, default: object = None, *, as_type: object = Any) -> Any:  # type: ignore[override]
        return await super().get("k1" if key == "k2" else key, default)


class Eternal(Cache):
    """Keeps everything for longer than it is told."""

    async def set(self, key: str, value: object, *, ttl: Any = None, **how: Any) -> None:
        await super().set(key, value, ttl=1000.0, **how)


class Slow(Cache):
    """Is late for once."""

    async def delete(self, key: str) -> bool:
        await asyncio.sleep(0.2)
        return await super().delete(key)


class Raising(Cache):
    """Makes its trouble the caller's."""

    async def get_many(self, keys: Any, **how: Any) -> dict[str, Any]:
        raise ConnectionError("no server")


class Lone(Cache):
    """Does not coalesce."""

    async def get_or_load(self, key: str, loader: Callable[[], Awaitable[Any]], **how: Any) -> Any:
        return await loader()


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (Stale, "older than this process's last change"),
        (Mixed, "the value of"),
        (Eternal, "past its ttl"),
        (Slow, "took 0."),
        (Raising, "raised ConnectionError"),
        (Lone, "loaders at once"),
    ],
)
async def test_a_broken_cache_is_caught(
    broken: type[Cache], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(load_module, "DEADLINE", 0.05)
    monkeypatch.setattr(load_module, "SLACK", 0.05)
    complaints = await _complaints(broken, until=lambda found: any(complaint in each for each in found))
    assert any(complaint in each for each in complaints), complaints


async def test_an_honest_cache_is_not_complained_of() -> None:
    seen = 0

    def enough(_: list[str]) -> bool:
        nonlocal seen
        seen += 1
        return seen > 100

    assert await _complaints(Honest, until=enough) == []


async def _complaints(kind: type[Cache], *, until: Callable[[list[str]], bool]) -> list[str]:
    """Let agents play with a cache until that holds, and return what was said of it."""
    complaints: list[str] = []
    cache = kind(MemoryStore())
    heartbeat = Heartbeat()
    load = Load(
        "me",
        [Place("memory", cache, time.time)],
        late=1.0,
        rng=random.Random(1),
        heartbeat=heartbeat,
        faults=Faults(),
        violation=lambda text, **_: complaints.append(text),
        pause=0.0005,
    )
    tasks = [asyncio.create_task(work) for work in (heartbeat.beat(), *(load.play() for _ in range(8)))]
    try:
        await poll(lambda: until(complaints))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await cache.aclose()
        heartbeat.close()
    return complaints


def test_errors_are_excused_by_a_fault_and_by_nothing_else() -> None:
    complaints: list[str] = []
    faults = Faults()
    ears = Ears(faults, complaints.append)
    record = logging.LogRecord("mcp_hub_cache", logging.ERROR, "", 0, "Redis connection failed", (), None)
    faults.begin("server killed")
    ears.emit(record)
    assert complaints == []
    faults.end("server killed")
    faults._last -= 60
    ears.emit(record)
    assert complaints == ["logged with no fault about: Redis connection failed"]
    ears.emit(logging.LogRecord("asyncio", logging.WARNING, "", 0, "socket.send() raised exception.", (), None))
    assert complaints[1:] == ["asyncio complains: socket.send() raised exception."]


def test_a_report_says_what_was_broken_and_how_to_see_it_again() -> None:
    report = {
        "seed": 7, "minutes": 2.0, "seconds": 1.0, "disk full was": "possible", "faults": {"flushed": 2},
        "workers": {"0.1": {
            "samples": [], "counts": {"redis get ok": 3, "redis get value": 2, "redis get miss": 1},
            "worst": {"redis get": [0.25, "flushed"]}, "states": {"healthy": 2.0},
        }},
        "violation": {"violation": "get on redis: 1 s older", "history": ["1-2 set ok"]},
    }  # fmt: skip
    text = "\n".join(lines(report))
    for said in ("flushed", "0.250", "healthy", "VIOLATION: get on redis: 1 s older", "1-2 set ok", "--seed 7"):
        assert said in text
