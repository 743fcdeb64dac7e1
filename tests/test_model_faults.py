"""Caches over stores that fail, hang, are emptied and restarted, against what they may answer all the same.

``test_model`` knows what a cache answers where nothing fails. Here only so much is certain: a read gives the value
that was stored last or a miss, never an older one than this process's last change, another key's, or one past its ttl
(``tests.ledger``). And where nothing has failed since a change, it gives exactly that.

What is promised of a change that failed differs. A cache that has a journal (failover) never shows what was there
before; a lone store may have done it or not, until one is seen. Of other processes' changes nothing is promised while
anything is broken.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from mcp_hub_cache import MISSING, Cache
from mcp_hub_cache._exceptions import StoreError, StoreFullError, StoreTimeoutError, StoreUnreachableError
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import FakeClock
from tests.backends import PATIENT, poll
from tests.ledger import Ledger, Name, Reading, Value, tag_of
from tests.servers import Server, valkey_server
from tests.stores.failing import Primary, View

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

KEYS = ("a", "b", "c")
TAGS = ("x", "y")
PROCESSES = (0, 1)

_METHODS = ("get_many", "head_many", "begin_many", "write_many", "patch_many", "delete_many", "clear", "ping")
_ERRORS: dict[str, type[StoreError]] = {
    "unreachable": StoreUnreachableError,
    "full": StoreFullError,
    "hangs": StoreTimeoutError,
}
_HANG = 0.002

SIDES = ("primary", "standby")
STEPS = (
    "write", "write", "add", "delete", "break primary", "break primary", "fail primary 1", "fail primary 2",
    "fail standby 1", "fail standby 2", "repair primary", "repair standby", "heal", "restart",
)  # fmt: skip

processes = st.sampled_from(PROCESSES)
keys = st.sampled_from(KEYS)
tags = st.frozensets(st.sampled_from(TAGS), max_size=1)
ttls = st.sampled_from([5.0, 60.0])


@dataclass
class Mood:
    """How a store fails from now on.

    Attributes:
        kind: A name in ``_ERRORS``; "dead": as unreachable, until the end. None: not at all.
        after: Whether what was asked is done all the same.
        calls: After how many calls it is over; None: not by itself.
        fired: How many calls have failed.
    """

    kind: str | None = None
    after: bool = False
    calls: int | None = None
    fired: int = 0

    def draw(self, name: str) -> str | None:
        """Return how this call is to fail."""
        kind = self.kind
        if kind is None or (kind == "full" and name not in ("begin_many", "write_many", "patch_many")):
            return None
        if self.calls is not None:
            self.calls -= 1
            if not self.calls:
                self.kind = self.calls = None
        return kind


def moody(store: Any) -> tuple[Any, Mood]:
    """Have *store* fail as its mood says."""
    mood = Mood()

    def make(name: str) -> Any:
        ask = getattr(store, name)

        async def call(*args: Any, **how: Any) -> Any:
            kind, after = mood.draw(name), mood.after
            try:
                if kind is not None and not after:
                    raise await _error(kind)
                answer = await ask(*args, **how)
                if kind is not None:
                    raise await _error(kind)
            except StoreError:
                mood.fired += 1
                raise
            return answer

        # As a store that needs no task of its caller's for what most calls are.
        return call if name not in ("get_many", "write_many") else lambda *args: asyncio.ensure_future(call(*args))

    for name in _METHODS:
        setattr(store, name, make(name))
    return store, mood


async def _error(kind: str) -> StoreError:
    if kind == "hangs":
        await asyncio.sleep(_HANG)
    return _ERRORS.get(kind, StoreUnreachableError)("as the test wants it.")


@dataclass
class Process:
    """A cache, the moods of what is below, and what it knows."""

    cache: Cache
    moods: list[Mood]
    ledger: Ledger
    sure: dict[str, tuple[Any, float, frozenset[str]]] = field(default_factory=dict)  # value, end, tags
    lacks_marks: bool = False  # and has not found out: they went behind its back

    def fired(self) -> int:
        return sum(mood.fired for mood in self.moods)

    def knows(self) -> tuple[bool, int]:
        """Whether it has been told what the process before had still to tell, and how often its standby has failed.

        Where it could not be told, nothing is promised of what it reads until it has been, be that in the same call.
        """
        if not isinstance(self.cache.store, FailoverStore):
            return True, 0
        pages = self.cache.store._keeper._pages
        return pages is None or not pages.is_unread, self.moods[-1].fired


class Machine(RuleBasedStateMachine):
    """Does to caches what ledgers take down."""

    journal: ClassVar[bool] = False  # also: what it still has to tell may cost a miss at any time
    # Whether a server's word of changes arrives a moment later: others' near caches may be behind, and a connection
    # that was cut may be noticed, and cost a miss, after the next change.
    told_later: ClassVar[bool] = False
    kind: ClassVar[str] = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.clock = FakeClock()
        self.server = MemoryStore(clock=self.clock)
        self.steps = 0
        self.numbers = 0
        self.dropped: list[Process] = []
        self.processes = [self.open(at) for at in PROCESSES]

    # The world

    def stores(self) -> list[Any]:
        """The stores of one process, the one that fails first; where there are two, the second stands by."""
        return [Primary(View(self.server))]

    def now(self) -> float:
        return self.clock()

    def open(self, at: int) -> Process:
        stores, moods = zip(*map(moody, self.stores()), strict=True)
        store = stores[0]
        if len(stores) > 1:
            store = FailoverStore(*stores, clock=self.clock, probe_after=0.001, probe_max=0.004)
        cache = Cache(store, timeout=PATIENT, l1_max_entries=0 if self.kind in ("memory", "file") else 100)
        return Process(cache, list(moods), Ledger(str(at), late=0.0, slack=self.slack))

    slack: ClassVar[float] = 0.1

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do that, and all that it has set going: what is withdrawn for a failed set must not meet the next one."""

        async def settled() -> Any:
            answer = await work
            for process in self.processes:
                if (session := process.cache._engine._sessions.peek()) is not None:
                    await session.lines.settle()
            return answer

        return self.runner.run(settled())

    def teardown(self) -> None:
        try:
            for process in (*self.processes, *self.dropped):
                self.run(process.cache.aclose())
        finally:
            self.runner.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def step(self) -> float:
        self.steps += 1
        self.clock.advance(0.001)
        return float(self.steps)

    def is_calm(self) -> bool:
        return not any(mood.kind for process in self.processes for mood in process.moods) and all(
            self.is_healthy(process) for process in self.processes
        )

    def mark(self, process: Process) -> int:
        """What to compare ``fired`` with after a call; -1: it may have been the standby that was asked."""
        return -1 if self.journal and not self.is_calm() else process.fired()

    @staticmethod
    def is_healthy(process: Process) -> bool:
        store = process.cache.store
        return not isinstance(store, FailoverStore) or not store._keeper._is_needed()

    @staticmethod
    def is_written_down(process: Process) -> bool:
        """Whether what the server has still to be told outlives the process."""
        pages = process.cache.store._keeper._pages if isinstance(process.cache.store, FailoverStore) else None
        return pages is not None and pages.works and not pages.is_behind

    def unsure(self) -> None:
        for process in self.processes:
            process.sure.clear()

    def value(self, key: str, ttl: float, tagged: frozenset[str]) -> dict[str, Any]:
        self.numbers += 1
        name = Name(self.kind, "default", "", key)
        return Value(name, "any", self.numbers, self.step(), self.now(), ttl, tags=tuple(sorted(tagged))).plain()

    # What is answered

    def look(  # noqa: PLR0917  # what is known of a reading
        self, process: Process, key: str, got: Any, asked: float, now: float, stale_ttl: float = 0.0
    ) -> None:
        if got is MISSING:
            return
        name = Name(self.kind, "default", "", key)
        wrong = process.ledger.wrong(name, got, Reading(asked, now, stale_ttl))
        assert wrong is None, f"{key}: {wrong}: {got}"
        if not self.journal:  # what has been seen was done, and what was before it is gone
            for other in self.processes:
                other.ledger.changed(name, got["at"], asked)

    def expect(self, process: Process, key: str, got: Any, now: float, *, clean: bool) -> None:
        """Where nothing can have gone wrong, hold *got* against what was done."""
        if not clean:
            self.unsure()
        elif key in process.sure and self.is_calm():
            value, until, _ = process.sure[key]
            if now < until - self.slack:
                allowed = self.told_later or self.journal
                assert got == value or (allowed and got is MISSING), f"{key}: {got} instead of {value}"

    def changed(
        self, process: Process, names: list[Any], start: float, *, clean: bool, told: bool | None = None
    ) -> None:  # fmt: skip
        """Take down a change: everywhere, where nothing is wrong; where it is in doubt, as far as is promised."""
        end = self.step()
        calm = clean and self.is_calm()
        for other in self.processes:
            if (
                (clean and not self.journal)
                or (calm and not self.told_later)
                or (other is process and self.journal and told is not False)
            ):
                for name in names:
                    other.ledger.changed(name, start, end)
        if not calm:
            self.unsure()

    def surely(
        self, process: Process, keys: Any, value: Any, until: float, tagged: frozenset[str] = frozenset()
    ) -> None:
        if self.is_calm():
            for each in self.processes:
                for key in keys:
                    if each is process or not self.told_later:
                        each.sure[key] = value, until, tagged
                    else:
                        each.sure.pop(key, None)

    # Reading

    @rule(at=processes, key=keys, many=st.booleans())
    def read(self, at: int, key: str, *, many: bool) -> None:
        process = self.processes[at]
        asked, now, fired, knew = self.step(), self.now(), self.mark(process), process.knows()
        wanted = KEYS if many else (key,)
        found = self.run(process.cache.get_many(wanted)) if many else {key: self.run(process.cache.get(key, MISSING))}
        for each in wanted:
            got = found.get(each, MISSING)
            if process.knows() == knew and knew[0]:
                self.look(process, each, got, asked, now)
            self.expect(process, each, got, now, clean=process.fired() == fired)

    # Changing

    @rule(at=processes, key=keys, ttl=ttls, tagged=tags, add=st.sampled_from([False, False, True]))
    def write(self, at: int, key: str, ttl: float, tagged: frozenset[str], *, add: bool) -> None:
        process = self.processes[at]
        value, fired = self.value(key, ttl, tagged), self.mark(process)
        done = self.run((process.cache.add if add else process.cache.set)(key, value, ttl=ttl, tags=tagged))
        clean = process.fired() == fired
        if add and not done:
            if not clean:
                self.unsure()
            return
        self.changed(process, [Name(self.kind, "default", "", key)], value["at"], clean=clean)
        if clean and not (tagged and process.lacks_marks):
            self.surely(process, [key], value, value["made"] + ttl, tagged)
        elif clean:
            self.unsure()
        process.lacks_marks &= not (clean and tagged)

    @rule(at=processes, key=keys)
    def delete(self, at: int, key: str) -> None:
        self.run(self._delete(self.processes[at], key))

    async def _delete(self, process: Process, key: str) -> None:
        start, fired = self.step(), self.mark(process)
        await process.cache.delete(key)
        clean = process.fired() == fired
        self.changed(process, [Name(self.kind, "default", "", key)], start, clean=clean)
        if clean:
            self.surely(process, [key], MISSING, self.now() + 1e9)

    @rule(at=processes, tag=st.sampled_from(TAGS))
    def invalidate(self, at: int, tag: str) -> None:
        self.run(self._invalidate(self.processes[at], tag))

    async def _invalidate(self, process: Process, tag: str) -> None:
        start, fired = self.step(), self.mark(process)
        told = await process.cache.invalidate(tag)
        clean = process.fired() == fired
        self.changed(process, [tag_of(self.kind, "default", tag)], start, clean=clean, told=told)
        if clean:
            assert told or not self.is_calm()
            hit = {key for each in self.processes for key, (_, _, tagged) in each.sure.items() if tag in tagged}
            self.surely(process, hit, MISSING, self.now() + 1e9)

    @rule(at=processes, really=st.sampled_from([False, False, True]))
    def clear(self, at: int, *, really: bool) -> None:
        process = self.processes[at]
        if not really:
            return
        start, fired = self.step(), self.mark(process)
        self.run(process.cache.clear())
        clean = process.fired() == fired
        self.changed(process, [(self.kind, "default")], start, clean=clean)
        if clean:
            self.surely(process, KEYS, MISSING, self.now() + 1e9)

    # Loading

    @rule(
        at=processes,
        key=keys,
        ttl=ttls,
        tagged=tags,
        stale_ttl=st.sampled_from([0.0, 60.0]),
        inside=st.sampled_from([None, None, "delete here", "delete there", "invalidate here", "invalidate there"]),
    )
    def load(  # noqa: PLR0917  # what is drawn
        self, at: int, key: str, ttl: float, tagged: frozenset[str], stale_ttl: float, inside: str | None
    ) -> None:
        """Load, and perhaps change what is loaded meanwhile."""
        process = self.processes[at]
        value, calls = self.value(key, ttl, tagged), 0

        async def loader() -> Any:
            nonlocal calls
            calls += 1
            if inside is not None:
                changer = self.processes[at if "here" in inside else 1 - at]
                if "delete" in inside:
                    await self._delete(changer, key)
                else:
                    await self._invalidate(changer, TAGS[0])
            return dict(value)

        asked, now, fired, knew = self.step(), self.now(), self.mark(process), process.knows()
        got = self.run(process.cache.get_or_load(key, loader, ttl=ttl, stale_ttl=stale_ttl, tags=tagged))
        clean = process.fired() == fired
        assert calls <= 1
        if calls:
            assert got == value or stale_ttl
            known = process.sure.get(key) if clean and inside is None else None
            if known is not None and known[0] is not MISSING and self.is_calm():
                assert now >= known[1] - self.slack, f"{key} was loaded, and should have been there"
            for each in self.processes:
                each.sure.pop(key, None)
            return
        if process.knows() == knew and knew[0]:
            self.look(process, key, got, asked, now, stale_ttl)
        self.expect(process, key, got, now, clean=clean and not stale_ttl)

    # Time, faults, restarts

    @rule(seconds=st.sampled_from([1.0, 6.0, 61.0, 3600.0]))
    def let_pass(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(
        at=processes,
        side=st.sampled_from([0, 0, 1]),
        kind=st.sampled_from(sorted(_ERRORS)),
        after=st.booleans(),
        calls=st.sampled_from([1, 2, 4, None, None]),
    )
    def fail(self, at: int, side: int, kind: str, *, after: bool, calls: int | None) -> None:
        moods = self.processes[at].moods
        mood = moods[side % len(moods)]
        mood.kind, mood.after, mood.calls = kind, after, calls
        self.unsure()

    @rule(at=processes, side=st.sampled_from([0, 0, 1]))
    def break_down(self, at: int, side: int) -> None:
        """For long enough that everybody knows."""
        self.fail(at, side, "unreachable", after=False, calls=None)
        for _ in range(4):
            self.read(at, KEYS[0], many=False)

    @rule(at=processes)
    def repair(self, at: int) -> None:
        for mood in self.processes[at].moods:
            mood.kind = mood.calls = None

    @rule()
    def heal(self) -> None:
        """Repair everything, and wait until all is as it was."""
        for at in PROCESSES:
            self.repair(at)

        async def healed() -> None:
            for process in self.processes:
                await poll(process.cache.health_check)
                await poll(lambda process=process: self._has_caught_up(process))

        self.run(healed())

    @rule(at=processes, key=keys, steps=st.lists(st.sampled_from(STEPS), min_size=3, max_size=8))
    def trouble(self, at: int, key: str, steps: list[str]) -> None:
        """What happens to one key of one process in a row, with a look at it after each step."""
        for step in steps:
            moods = self.processes[at].moods
            match step.split(" "):
                case ["write" | "add"]:
                    self.write(at, key, 60.0, frozenset(), add=step == "add")
                case ["delete"]:
                    self.delete(at, key)
                case ["break", side]:
                    self.break_down(at, SIDES.index(side))
                case ["fail", side, calls]:
                    self.fail(at, SIDES.index(side), "unreachable", after=False, calls=int(calls))
                    continue  # a look would be what fails
                case ["repair", side]:
                    moods[SIDES.index(side) % len(moods)].kind = None
                case ["heal"]:
                    self.heal()
                case ["restart"]:
                    self.restart(at, cleanly=True)
            self.read(at, key, many=False)

    async def _has_caught_up(self, process: Process) -> bool:
        await process.cache.get(KEYS[0])  # what is left to be told is seen to when somebody asks
        return self.is_healthy(process)

    @rule()
    def empty(self) -> None:
        """The server is emptied, behind everybody's back."""
        self.run(self.server.clear(b""))
        self.unsure()

    @rule(at=processes, cleanly=st.booleans())
    def restart(self, at: int, *, cleanly: bool) -> None:
        process = self.processes[at]
        survives = self.is_healthy(process) or self.is_written_down(process)
        if cleanly:
            self.run(process.cache.aclose())
        else:
            for mood in process.moods:
                mood.kind, mood.after, mood.calls = "dead", False, None
            self.dropped.append(process)
        self.processes[at] = self.open(at)
        if survives:
            self.processes[at].ledger = process.ledger


class Files(Machine):
    kind = "file"

    def stores(self) -> list[Any]:
        return [FileStore(self.folder, clock=self.clock)]

    @rule()
    def empty(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        self.unsure()
        for process in self.processes:
            process.lacks_marks = True


class Tiered(Files):
    """The same, with a near cache in each process."""

    kind = "tiered"

    @rule()
    def empty(self) -> None:
        """By a third process: near caches do not hear of what strangers remove."""

        async def clear() -> None:
            store = FileStore(self.folder, clock=self.clock)
            await store.clear(b"mcp_hub:")
            await store.aclose()

        self.run(clear())
        self.unsure()


class Failover(Machine):
    kind = "failover"
    journal = True

    def stores(self) -> list[Any]:
        return [Primary(View(self.server)), FileStore(self.folder, clock=self.clock)]


class OverRedis(Failover):
    """A real server, and a near cache: time goes on by itself."""

    kind = "redis"
    told_later = True
    slack = 0.5
    server_process: ClassVar[Server]

    def __init__(self) -> None:
        self.server_process.command("FLUSHALL")
        super().__init__()

    let_pass = None  # type: ignore[assignment]  # no rule here

    def now(self) -> float:
        return time.time()

    def stores(self) -> list[Any]:
        # Now and then what was sent to a server that is then killed is waited for until its deadline.
        return [RedisStore(self.server_process.url, timeout=3.0), FileStore(self.folder)]

    @rule()
    def empty(self) -> None:
        self.server_process.command("FLUSHALL")
        self.unsure()

    @rule()
    def cut_off(self) -> None:
        self.server_process.kill_clients()
        self.unsure()

    @rule(really=st.sampled_from([False, False, True]))
    def restart_server(self, *, really: bool) -> None:
        if really:
            self.unsure()
            self.server_process.kill()
            try:
                self.read(0, KEYS[0], many=False)
            finally:
                self.server_process.start()


def play(machine: type[Machine], *, games: int, steps: int = 40) -> None:
    """Play so many games with new randomness in each run, or that of an earlier one; a failing game is printed."""
    given = os.environ.get("MODEL_SEED")
    first = random.randrange(1 << 30) if given is None else int(given)
    print(f"the same games again: MODEL_SEED={first}, {machine.__name__}, {games} games of {steps} steps")
    run_state_machine_as_test(
        seed(first)(machine),
        settings=settings(
            max_examples=games,
            stateful_step_count=steps,
            deadline=None,
            derandomize=False,
            print_blob=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


GAMES = ((Machine, 150), (Files, 50), (Tiered, 50), (Failover, 80))


@pytest.fixture(autouse=True)
def _without_logs() -> Iterator[None]:
    """Thousands of lines, as was to be expected."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(600)  # a failure is shrunk first
@pytest.mark.parametrize(("machine", "games"), GAMES)
def test_caches_over_failing_stores_answer_nothing_wrong(machine: type[Machine], games: int) -> None:
    play(machine, games=games)


@pytest.fixture
def over_redis() -> Iterator[type[Machine]]:
    with valkey_server() as server:
        OverRedis.server_process = server
        yield OverRedis


@pytest.mark.timeout(600)
def test_caches_over_a_failing_server_answer_nothing_wrong(over_redis: type[Machine]) -> None:
    play(over_redis, games=30)
