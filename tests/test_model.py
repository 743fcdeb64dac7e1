"""Two caches over one store against a plain model (``tests/model.py``), for tens of thousands of random steps."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from mcp_hub_cache import FOREVER, MISSING, Policy, current_entry
from tests.backends import poll
from tests.model import PROCESSES, Answer, Flight, Listed, Model, Order, Unlisted
from tests.servers import Server, valkey_server
from tests.shifted import Shifted

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

KEYS = ("a", "ab")
TAGS = ("x", "y")

processes = st.sampled_from(PROCESSES)
keys = st.sampled_from(KEYS)
tags = st.frozensets(st.sampled_from(TAGS))
ttls = st.sampled_from([5.0, 60.0, 7200.0, FOREVER])
stale_ttls = st.sampled_from([0.0, 30.0, 7200.0, 7200.0])
outcomes = st.sampled_from(
    ["value", "value", "skip", "worthless", "listed", "unlisted", "not modified", "not modified"]
)
orders = st.builds(
    Order,
    ttl=st.sampled_from([5.0, 60.0, 7200.0]),
    stale_ttl=stale_ttls,
    throttle=st.sampled_from([0.0, 3.0, 600.0]),
    at_once=st.booleans(),
    errors_ttl=st.sampled_from([None, 5.0, 600.0]),
    tags=tags,
    added=st.one_of(st.just(frozenset[str]()), tags),
    refresh=st.sampled_from([False, False, False, True]),
    fleet=st.booleans(),
    outcome=outcomes,
)


class Machine(RuleBasedStateMachine):
    """Does to the caches what it does to the model, and asks both."""

    name: ClassVar[str] = "memory"
    server: ClassVar[Server | None] = None
    unit: ClassVar[float] = (
        1.0  # what durations are multiplied by: more than a game takes, where time goes on by itself
    )

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.world = Shifted(self.name, self.folder, self.server)
        self.caches = [self.world.open() for _ in PROCESSES]
        self.model = Model()
        self.values = 0
        self.calls = 0
        self.gates: dict[int, tuple[asyncio.Event, asyncio.Task[Any]]] = {}

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def teardown(self) -> None:
        try:
            self._land_all()
        finally:
            self.run(self.world.aclose())
            self.runner.close()
            shutil.rmtree(self.folder)

    def new_value(self) -> list[Any]:
        self.values += 1
        return [self.values]

    async def quiet(self, process: int) -> None:
        """Return when all that *process* does in the background is done, and the store knows."""
        session = self.caches[process]._engine.session()
        await poll(lambda: session.behind == 0)
        await session.lines.settle()

    @staticmethod
    def same(got: Any, expected: Any) -> None:
        assert got == expected
        if isinstance(got, list):
            got.append("changed by the reader")  # which nobody else must see

    def loader(self, order: Order, value: list[Any], gate: asyncio.Event | None = None) -> Any:
        async def load() -> Any:
            self.calls += 1
            entry = current_entry()
            if gate is not None:
                await gate.wait()
            entry.tags.update(order.added)
            match order.outcome:
                case "skip":
                    entry.skip()
                case "listed":
                    raise Listed
                case "unlisted":
                    raise Unlisted
                case "not modified":
                    return entry.not_modified()
            return list(value)

        return load

    # Reading

    # What is done often has a rule of its own: they are all drawn alike.

    @rule(process=processes, key=keys, how=st.sampled_from(["get", "ask_about", "read_all"]))
    def read(self, process: int, key: str, how: str) -> None:
        match how:
            case "get":
                self.get(process, key)
            case "ask_about":
                self.ask_about(process, key)
            case _:
                self.read_all(process)

    def get(self, process: int, key: str) -> None:
        self.same(self.run(self.caches[process].get(key, MISSING)), self.model.get(key))

    def ask_about(self, process: int, key: str) -> None:
        cache, expected = self.caches[process], self.model.ttl(key)
        assert self.run(cache.exists(key)) is (expected is not None)
        found = self.run(cache.ttl(key))
        assert found == (None if expected is None else pytest.approx(expected, abs=self.slack))
        entry = self.run(cache.get_entry(key))
        self.same(MISSING if entry is None else entry.value, self.model.get(key))

    def read_all(self, process: int) -> None:
        cache = self.caches[process]
        expected = {key: value for key in KEYS if (value := self.model.get(key)) is not MISSING}

        async def listed() -> list[str]:
            return [key async for key in cache.keys()]  # noqa: SIM118  # no dict

        assert sorted(self.run(listed())) == sorted(expected)
        found = self.run(cache.get_many(KEYS))
        assert list(found) == list(expected)
        for key, value in found.items():
            self.same(value, expected[key])

    # Changing

    @rule(
        process=processes,
        key=keys,
        ttl=ttls,
        stale_ttl=stale_ttls,
        tagged=tags,
        how=st.sampled_from(["set", "set", "set_many", "add", "touch"]),
    )
    def write(  # noqa: PLR0917  # what is drawn
        self, process: int, key: str, ttl: float, stale_ttl: float, tagged: frozenset[str], how: str
    ) -> None:
        match how:
            case "set":
                self.set(process, key, ttl, stale_ttl, tagged)
            case "set_many":
                self.set_many(process, ttl, tagged)
            case "add":
                self.add(process, key, ttl, tagged)
            case _:
                self.touch(process, key, ttl)

    def set(self, process: int, key: str, ttl: float, stale_ttl: float, tagged: frozenset[str]) -> None:
        ttl, stale_ttl = ttl * self.unit, 0.0 if ttl == FOREVER else stale_ttl * self.unit
        value = self.new_value()
        policy = Policy(ttl=ttl, stale_ttl=stale_ttl)
        self.run(self.caches[process].set(key, value, policy=policy, tags=tagged))
        self.model.set(process, key, value, ttl, stale_ttl, tagged)

    def set_many(self, process: int, ttl: float, tagged: frozenset[str]) -> None:
        values, ttl = {key: self.new_value() for key in KEYS}, ttl * self.unit
        self.run(self.caches[process].set_many(values, ttl=ttl, tags=tagged))
        for key, value in values.items():
            self.model.set(process, key, value, ttl, 0.0, tagged)

    def add(self, process: int, key: str, ttl: float, tagged: frozenset[str]) -> None:
        value, ttl = self.new_value(), ttl * self.unit
        added = self.run(self.caches[process].add(key, value, ttl=ttl, tags=tagged))
        assert added is self.model.add(process, key, value, ttl, tagged)

    def touch(self, process: int, key: str, ttl: float) -> None:
        ttl *= self.unit
        assert self.run(self.caches[process].touch(key, ttl)) is self.model.touch(key, ttl)

    @rule(process=processes, key=keys)
    def delete(self, process: int, key: str) -> None:
        expected, deleted = self.model.delete(process, key), self.run(self.caches[process].delete(key))
        assert expected is None or deleted is expected

    @rule(process=processes, prefix=st.sampled_from(["", "a", "ab"]), really=st.sampled_from([False, False, True]))
    def clear(self, process: int, prefix: str, *, really: bool) -> None:
        if really:
            self.do_clear(process, prefix)

    def do_clear(self, process: int, prefix: str) -> None:
        self.run(self.caches[process].clear(prefix=prefix))
        self.model.clear(process, prefix)

    @rule(process=processes, tag=st.sampled_from(TAGS))
    def invalidate(self, process: int, tag: str) -> None:
        assert self.run(self.caches[process].invalidate(tag)) is True
        self.model.invalidate(process, tag)
        self.read_all(1 - process)

    @rule(seconds=st.sampled_from([0.5, 4.0, 6.0, 29.0, 61.0, 3700.0, 8000.0]))
    def let_pass(self, seconds: float) -> None:
        self._land_all()  # no placeholder is to expire: what then happens, ``test_load`` says
        self.world.advance(seconds * self.unit)
        self.model.now += seconds * self.unit

    @rule(key=keys)
    def let_expire(self, key: str) -> None:
        """Let pass what makes a fresh entry stale, and little more."""
        left = self.model.ttl(key)
        if left is not None and left < FOREVER:
            self.let_pass(left / self.unit + 0.5)

    # Loading

    def _may_load(self, process: int, key: str, order: Order) -> bool:
        """Whether the call would not wait for a load in progress."""
        if not self.model.flights.get(key):
            return True
        if self.name == "redis":
            return False  # where what has expired by our clock still stands
        entry = self.model.usable(key)
        if entry is not None and (entry.failure or self.model.now >= entry.fresh_until):
            return False  # leases on its refresh are beyond the model
        return not order.fleet and (order.refresh or not self.model.may_join(process, key))

    @rule(process=processes, key=keys, order=orders)
    def get_or_load(self, process: int, key: str, order: Order) -> None:
        order = order.times(self.unit)
        if self.name == "redis":
            order = order._replace(fleet=False)  # what a failed load leaves goes after a second of the server's
        if not self._may_load(process, key, order):
            return
        value, calls = self.new_value(), self.calls
        expected = self.model.load(process, key, order, value)
        got = self.run(self._outcome(process, key, order, value))
        assert got.raises is expected.raises
        self.same(got.value, expected.value)
        assert self.calls - calls == expected.calls

    @rule(key=keys, first=orders, outcome=outcomes)
    def load_here_and_there(self, key: str, first: Order, outcome: Any) -> None:
        """The same by both, one after the other, while little time passes: rests, failures and hits meet."""
        self.get_or_load(0, key, first)
        self.get_or_load(1, key, first._replace(outcome=outcome, refresh=False))
        self.get_or_load(0, key, first._replace(outcome=outcome, refresh=False))

    async def _outcome(self, process: int, key: str, order: Order, value: list[Any]) -> Answer:
        try:
            got = await self.caches[process].get_or_load(key, self.loader(order, value), **order.options())
        except (Listed, Unlisted, LookupError) as error:
            return Answer(raises=type(error))
        finally:
            await self.quiet(process)
        return Answer(got)

    @precondition(lambda self: len(self.gates) < 4)
    @rule(process=processes, key=keys, order=orders)
    def start_to_load(self, process: int, key: str, order: Order) -> None:
        order = order.times(self.unit)._replace(outcome="value", fleet=False, refresh=False, at_once=False)
        entry = self.model.usable(key)
        if self.model.fresh(key) or self.model.may_join(process, key) or not self._may_load(process, key, order):
            return
        if entry is not None and (entry.failure or entry.rests(process, self.model.now)):
            return
        flight = self.model.start(process, key, order, self.new_value())

        async def start() -> None:
            gate, calls = asyncio.Event(), self.calls
            work = self.caches[process].get_or_load(key, self.loader(order, flight.value, gate), **order.options())
            self.gates[id(flight)] = gate, asyncio.create_task(work)
            await poll(lambda: self.calls > calls)

        self.run(start())

    @precondition(lambda self: self.gates)
    @rule(data=st.data())
    def end_a_load(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.flights)))
        self._land(key, data.draw(st.sampled_from(self.model.flights[key])))

    def _land(self, key: str, flight: Flight) -> None:
        gate, task = self.gates.pop(id(flight))

        async def land() -> Any:
            gate.set()
            value = await task
            await self.quiet(flight.process)
            return value

        self.same(self.run(land()), flight.value)
        self.model.land(key, flight)

    def _land_all(self) -> None:
        for key, flights in list(self.model.flights.items()):
            for flight in list(flights):
                self._land(key, flight)

    @property
    def slack(self) -> float:
        """Seconds that the steps may have taken on a clock that goes on by itself."""
        return 1e-3 if self.unit == 1 else self.unit / 10

    @invariant()
    def nothing_is_left_over(self) -> None:
        for cache in self.caches:
            session = cache._engine._sessions.peek()
            assert session is None or len(session.flights._flights) <= len(self.gates)


def play(machine: type[Machine], *, games: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=games,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


@pytest.mark.timeout(600)  # a failure is shrunk first
def test_memory_does_as_the_model_does() -> None:
    play(Machine, games=600, steps=60)


@pytest.mark.timeout(600)
def test_a_folder_does_as_the_model_does() -> None:
    class OverFiles(Machine):
        name = "file"

    play(OverFiles, games=100, steps=50)


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.mark.timeout(600)
def test_a_server_does_as_the_model_does(valkey: Server) -> None:
    class OverRedis(Machine):
        name = "redis"
        server = valkey
        unit = 10_000.0

    play(OverRedis, games=100, steps=50)
