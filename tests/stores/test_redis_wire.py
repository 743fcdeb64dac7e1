"""Wires against a server that does as it is told: order, cancellation, doubt, deadlines."""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hiredis
import pytest

from mcp_hub_cache import _exceptions as errors
from mcp_hub_cache._lifetime import PerLoop
from mcp_hub_cache._steady import steady
from mcp_hub_cache.stores._redis_address import Address
from mcp_hub_cache.stores._redis_clock import Clock
from mcp_hub_cache.stores._redis_link import Doubt, pack
from mcp_hub_cache.stores._redis_places import Fixed
from mcp_hub_cache.stores._redis_wire import Wire, Wires
from tests.servers import valkey_server

GET = pack((b"GET", b"k"))


class Script:
    """A server whose every reply is sent by the test. Greets, tells the time and who it is, by itself."""

    def __init__(self) -> None:
        self.path = ""
        self.facts = b"role:master"
        self.accepting = True
        self.accepted = 0
        self.asked: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.writers.append(writer)
        parser = hiredis.Reader()
        try:
            while data := await reader.read(65536):
                parser.feed(data)
                while (command := parser.gets()) is not False:
                    if not self.accepting:
                        continue
                    if command[0] == b"CLIENT":
                        writer.write(b"+OK\r\n")
                    elif command[0] == b"TIME":
                        writer.write(b"*2\r\n$10\r\n1700000000\r\n$6\r\n500000\r\n")
                    elif command[0] == b"INFO":
                        writer.write(b"$%d\r\n%b\r\n" % (len(self.facts), self.facts))
                    else:
                        self.asked.put_nowait(command)
        except OSError:
            pass
        finally:
            writer.close()

    def say(self, data: bytes) -> None:
        self.writers[-1].write(data)

    def hang_up(self) -> None:
        self.writers[-1].transport.abort()


@pytest.fixture
async def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Script]:
    script = Script()
    monkeypatch.chdir(tmp_path)  # a unix socket's path is short
    script.path = "s"
    server = await asyncio.start_unix_server(script.serve, script.path)
    yield script
    for writer in script.writers:
        writer.close()
    server.close()
    await server.wait_closed()


@asynccontextmanager
async def opened(
    script: Script, *, timeout: float = 5.0, clock: Clock | None = None, bulk: bool = False
) -> AsyncIterator[Wire]:
    wire = Wire(asyncio.get_running_loop(), Address(path=script.path), timeout, clock or Clock(), bulk=bulk)
    yield wire
    await wire.aclose()


def first(replies: list[Any]) -> Any:
    return replies[0]


async def test_replies_go_to_the_requests_in_order(script: Script) -> None:
    async with opened(script) as wire:
        one = wire.send(GET, 1, first)
        many = wire.send(GET * 3, 3, list)
        last = wire.send(GET, 1, first)
        for _ in range(5):
            await script.asked.get()
        script.say(b":1\r\n:2\r\n$-1\r\n")
        assert await one == 1
        assert not many.done()
        script.say(b"*1\r\n:3\r\n+four\r\n")
        assert await many == [2, None, [3]]
        assert await last == b"four"


async def test_a_reply_in_pieces(script: Script) -> None:
    async with opened(script) as wire:
        future = wire.send(GET, 1, first)
        await script.asked.get()
        for byte in b"$5\r\nhe\r\nl\r\n":
            script.say(bytes([byte]))
            await asyncio.sleep(0)
        assert await future == b"he\r\nl"


async def _warm(script: Script, wire: Wire) -> None:
    """Have everything out of the way that comes over a new connection."""
    warm = wire.send(GET, 1, first)
    await script.asked.get()
    script.say(b"+warm\r\n")
    assert await warm == b"warm"


def _large(value: bytes) -> bytes:
    return b"*1\r\n$%d\r\n%b\r\n" % (len(value), value)


async def _half_a_large_value(script: Script, wire: Wire) -> tuple[asyncio.Future[Any], asyncio.Future[Any]]:
    """Two requests, of which the first has had half a megabyte of its one of zeros."""
    await _warm(script, wire)
    one, other = wire.send(GET, 1, first), wire.send(GET, 1, first)
    for _ in range(2):
        await script.asked.get()
    script.say(_large(bytes(1_000_000))[:500_000])
    await asyncio.sleep(0.001)
    return one, other


@pytest.mark.parametrize("cuts", ["none", "header", "in the header", "end", "in the end", "behind the end", "many"])
async def test_large_values_are_received_in_place(script: Script, cuts: str) -> None:
    """Wherever what comes is cut, and whatever comes before, between and behind."""
    values = [os.urandom(size) for size in (1_000_000, 70_000, 3_000_000, 10)]
    said = b"*1\r\n$-1\r\n" + b"".join(map(_large, values)) + b"*1\r\n$2\r\nok\r\n"
    begin = said.index(b"*1\r\n$1000000")
    end = begin + len(_large(values[0]))
    places = {
        "none": [],
        "header": [begin, begin + 14],
        "in the header": [begin, begin + 7, begin + 9],
        "end": [begin, end - 2],
        "in the end": [begin, end - 1],
        "behind the end": [begin, end, end + 3],
        "many": [begin, *range(begin + 16, len(said), 37_001)],
    }[cuts]
    async with opened(script, bulk=True) as wire:
        futures = [wire.send(GET, 1, first) for _ in range(6)]
        for _ in futures:
            await script.asked.get()
        for start, stop in zip([0, *places], [*places, len(said)], strict=True):
            script.say(said[start:stop])
            await script.writers[-1].drain()
            await asyncio.sleep(0.001)
        assert await asyncio.gather(*futures) == [[None], *([value] for value in values), [b"ok"]]
        assert all(type(future.result()[0]) is bytes for future in futures[1:])
        assert script.accepted == 1


async def test_a_large_value_whose_caller_left_is_thrown_away(script: Script) -> None:
    async with opened(script, bulk=True) as wire:
        gone, mine = await _half_a_large_value(script, wire)
        gone.cancel()
        script.say(bytes(1_000_000 - (500_000 - 14)) + b"\r\n+mine\r\n")
        assert await mine == b"mine"


@pytest.mark.parametrize("how", ["hangs up", "says more", "is aborted"])
async def test_a_large_value_that_does_not_end_as_it_should(script: Script, how: str) -> None:
    async with opened(script, bulk=True) as wire:
        one, other = await _half_a_large_value(script, wire)
        if how == "hangs up":
            script.hang_up()
        elif how == "is aborted":
            await wire.aclose()
        else:
            script.say(bytes(600_000))
        for future in (one, other):
            with pytest.raises(errors.StoreError):
                await future


async def test_a_server_that_hangs_up_while_its_connection_changes_hands(script: Script) -> None:
    class HangsUp(Fixed):
        async def open(self, timeout: float) -> asyncio.StreamWriter:
            writer = await super().open(timeout)
            script.accepting = False
            script.writers[-1].write_eof()  # what is still written to it, nobody objects to
            while not writer._reader.at_eof():  # type: ignore[attr-defined]  # what has been heard, and by whom
                await asyncio.sleep(0)
            return writer

    wire = Wire(asyncio.get_running_loop(), HangsUp(Address(path=script.path)), 30.0, Clock())
    async with asyncio.timeout(10):
        with pytest.raises(errors.StoreUnreachableError, match="closed the connection"):
            await wire.send(GET, 1, first)
    await wire.aclose()


async def test_a_connection_cut_off_while_it_opens_is_not_looked_into_for_long() -> None:
    """A plain server may wait for the end of the hello of TLS, by which it is asked whether it speaks that."""
    accepted = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        if accepted > 1:
            await reader.read()  # to its end, and without a word
        writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        address = Address(host="127.0.0.1", port=server.sockets[0].getsockname()[1])
        wire = Wire(asyncio.get_running_loop(), address, 40.0, Clock())
        async with asyncio.timeout(20):
            with pytest.raises(errors.StoreUnreachableError):
                await wire.send(GET, 1, first)
        assert accepted == 3
        await wire.aclose()


@pytest.mark.parametrize("when", ["connecting", "sent", "half answered"])
async def test_a_cancelled_request_keeps_its_place(script: Script, when: str) -> None:
    async with opened(script) as wire:
        if when != "connecting":
            warm = wire.send(GET, 1, first)
            await script.asked.get()
            script.say(b"+warm\r\n")
            await warm
        gone = wire.send(pack((b"GET", b"gone")) * 2, 2, list)
        if when == "half answered":
            await script.asked.get()
            await script.asked.get()
            script.say(b"+theirs\r\n")
            await asyncio.sleep(0.01)
        gone.cancel()
        mine = wire.send(pack((b"GET", b"mine")), 1, first)
        if when == "connecting":  # it was never sent
            assert await script.asked.get() == [b"GET", b"mine"]
            script.say(b"+mine\r\n")
        else:
            while (await script.asked.get())[1] != b"mine":
                pass
            script.say((b"" if when == "half answered" else b"+theirs\r\n") + b"+theirs\r\n+mine\r\n")
        assert await mine == b"mine"
        assert script.accepted == 1


@pytest.mark.parametrize("noise", [b"+nobody asked\r\n", b"\x15\x03\x01\x00\x02\x02\x46", b"?"])
async def test_what_nobody_asked_for_ends_the_connection(script: Script, noise: bytes) -> None:
    async with opened(script) as wire:
        future = wire.send(GET, 1, first)
        await script.asked.get()
        script.say(b"+one\r\n" + noise)
        assert await future == b"one"
        second = wire.send(GET, 1, first)
        # Either it went out before the noise was seen, and fails with it, or it has a new connection.
        answer = asyncio.create_task(script.asked.get())
        await asyncio.wait({second, answer}, return_when=asyncio.FIRST_COMPLETED)
        if not second.done():
            script.say(b"+two\r\n")
            assert await second == b"two"
        else:
            assert isinstance(second.exception(), errors.StoreProtocolError)
        answer.cancel()
        third = wire.send(GET, 1, first)
        await script.asked.get()
        script.say(b"+three\r\n")
        assert await third == b"three"
        assert script.accepted == 2


async def test_bytes_that_do_not_parse_fail_all_that_wait(script: Script) -> None:
    async with opened(script) as wire:
        futures = [wire.send(GET, 1, first) for _ in range(3)]
        for _ in futures:
            await script.asked.get()
        script.say(b"+one\r\nHTTP/1.1 400 Bad Request\r\n")
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert results[0] == b"one"
        assert [type(result) for result in results[1:]] == [errors.StoreProtocolError] * 2


@pytest.mark.parametrize("reason", [Doubt(), KeyError("a mistake of ours"), RecursionError()])
async def test_an_answer_of_the_wrong_shape_ends_the_connection(script: Script, reason: Exception) -> None:
    def convert(_: list[Any]) -> None:
        raise reason

    async with opened(script) as wire:
        bad, behind = wire.send(GET, 1, convert), wire.send(GET, 1, first)
        await script.asked.get()
        script.say(b"+one\r\n+two\r\n")
        results = await asyncio.gather(bad, behind, return_exceptions=True)
        assert [type(result) for result in results] == [errors.StoreProtocolError] * 2


async def test_an_error_of_one_request_is_its_own(script: Script) -> None:
    def convert(replies: list[Any]) -> None:
        raise errors.StoreFullError(str(replies[0]))

    async with opened(script) as wire:
        full, fine = wire.send(GET, 1, convert), wire.send(GET, 1, first)
        await script.asked.get()
        script.say(b"-OOM\r\n+fine\r\n")
        with pytest.raises(errors.StoreFullError, match="OOM"):
            await full
        assert await fine == b"fine"
        assert script.accepted == 1


@pytest.mark.parametrize("whole", [False, True])
async def test_large_data_goes_out_in_turns_and_in_order(script: Script, whole: bool) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with opened(script) as wire:
        warm = wire.send(GET, 1, first)
        await script.asked.get()
        script.say(b"+warm\r\n")
        await warm
        large = os.urandom(3_000_000)
        other = asyncio.create_task(others())
        parts = [b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3000000\r\n", large, b"\r\n"]
        futures = [
            wire.send(b"".join(parts) if whole else parts, 1, first),
            wire.send(pack((b"GET", b"after")), 1, first),
        ]
        assert await script.asked.get() == [b"SET", b"k", large]
        assert await script.asked.get() == [b"GET", b"after"]
        assert turns > 10
        other.cancel()
        script.say(b"+one\r\n+two\r\n")
        assert await asyncio.gather(*futures) == [b"one", b"two"]


@pytest.mark.parametrize("connected", [False, True])
async def test_hung_up_on_amid_large_data(script: Script, connected: bool) -> None:
    """Nothing of the rest of it reaches the connection that comes after."""
    async with opened(script) as wire:
        if connected:
            warm = wire.send(GET, 1, first)
            await script.asked.get()
            script.say(b"+warm\r\n")
            await warm
        large = os.urandom(3_000_000)
        parts = [b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3000000\r\n", large, b"\r\n"]
        future = wire.send(parts, 1, first, again=True)
        if connected:
            await asyncio.sleep(0)
            script.hang_up()
        assert await script.asked.get() == [b"SET", b"k", large]
        script.say(b"+done\r\n")
        assert await future == b"done"
        assert script.accepted == 1 + connected


# Connections that end


async def test_hung_up_in_the_middle(script: Script) -> None:
    """Once something was heard since the request, repeating it could be one time too many."""
    async with opened(script) as wire:
        futures = [wire.send(GET, 1, first, again=True) for _ in range(2)]
        for _ in futures:
            await script.asked.get()
        script.say(b"+one\r\n+hal")
        assert await futures[0] == b"one"
        script.hang_up()
        with pytest.raises(errors.StoreUnreachableError):
            await futures[1]


async def test_hung_up_while_idle_is_repeated_once(script: Script) -> None:
    async with opened(script) as wire:
        warm = wire.send(GET, 1, first)
        await script.asked.get()
        script.say(b"+warm\r\n")
        await warm
        script.hang_up()
        again, once = wire.send(GET, 1, first, again=True), wire.send(GET, 1, first)
        with pytest.raises(errors.StoreUnreachableError):
            await once
        await script.asked.get()
        script.say(b"+again\r\n")
        assert await again == b"again"
        assert script.accepted == 2
        script.hang_up()
        doomed = wire.send(GET, 1, first, again=True)
        await script.asked.get()
        script.hang_up()
        with pytest.raises(errors.StoreUnreachableError):
            await doomed
        assert script.accepted == 3


async def test_a_failed_connect_fails_all_and_the_next_request_tries_anew(script: Script) -> None:
    wire = Wire(asyncio.get_running_loop(), Address(path="nowhere"), 5.0, Clock())
    for _ in range(2):
        futures = [wire.send(GET, 1, first, again=True) for _ in range(3)]
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert {type(result) for result in results} == {errors.StoreUnreachableError}
    await wire.aclose()


# Deadlines


async def test_the_deadline_counts_from_send_and_covers_connecting(script: Script) -> None:
    script.accepting = False
    async with opened(script, timeout=0.2) as wire:
        started = time.monotonic()
        with pytest.raises(errors.StoreTimeoutError, match=r"within 0\.2 s"):
            await wire.send(GET, 1, first, again=True)
        assert 0.19 < time.monotonic() - started < 0.4


async def test_the_oldest_decides_and_takes_the_rest_along(script: Script) -> None:
    async with opened(script, timeout=0.2) as wire:
        warm = wire.send(GET, 1, first)
        await script.asked.get()
        script.say(b"+warm\r\n")
        await warm
        started = time.monotonic()
        old = wire.send(GET, 1, first)
        await asyncio.sleep(0.1)
        young = wire.send(GET, 1, first)
        results = await asyncio.gather(old, young, return_exceptions=True)
        assert 0.19 < time.monotonic() - started < 0.4
        assert {type(result) for result in results} == {errors.StoreTimeoutError}
        script.asked = asyncio.Queue()
        fresh = wire.send(GET, 1, first)
        await script.asked.get()
        script.say(b"+fresh\r\n")
        assert await fresh == b"fresh"
        assert script.accepted == 2


async def test_a_steady_flow_never_times_out(script: Script) -> None:
    async with opened(script, timeout=0.1) as wire:
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            future = wire.send(GET, 1, first)
            await script.asked.get()
            script.say(b"+x\r\n")
            assert await future == b"x"


async def test_a_busy_process_is_no_failure(script: Script) -> None:
    async with opened(script, timeout=0.1) as wire:
        future = wire.send(GET, 1, first)
        await script.asked.get()
        time.sleep(0.3)  # the loop is blocked: nothing could have been read meanwhile
        script.say(b"+late\r\n")
        assert await future == b"late"


async def test_a_busy_process_buys_no_endless_grace(script: Script) -> None:
    async with opened(script, timeout=0.1) as wire:
        future = wire.send(GET, 1, first)
        await script.asked.get()
        time.sleep(0.3)
        started = time.monotonic()
        with pytest.raises(errors.StoreTimeoutError):
            await future
        assert time.monotonic() - started < 0.4


# Closing, other processes, time


async def test_a_closed_wire_stays_closed(script: Script) -> None:
    async with opened(script) as wire:
        await wire.aclose()
        with pytest.raises(errors.StoreUnreachableError, match="closed"):
            await wire.send(GET, 1, first, again=True)
        assert script.accepted == 0


async def test_the_clock_is_learnt_on_connecting(script: Script) -> None:
    clock = Clock()
    assert clock.now() == pytest.approx(time.time(), abs=1)
    async with opened(script, clock=clock) as wire:
        future = wire.send(GET, 1, first)
        await script.asked.get()
        assert clock.now() == pytest.approx(time.time(), abs=1)
        script.say(b"+x\r\n")
        await future
    assert clock.now() == pytest.approx(1_700_000_000.5, abs=0.5)


async def test_the_time_is_asked_for_again(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fixed, "ask_every", 0.0)
    learnt = asyncio.Event()

    class Counting(Clock):
        times = 0

        def learn(self, told: float, asked: float, heard: float) -> None:
            self.times += 1
            if self.times == 2:
                learnt.set()

    async with opened(script, timeout=0.1, clock=Counting()) as wire:
        future = wire.send(GET, 1, first)
        await script.asked.get()
        script.say(b"+x\r\n")
        await future
        await asyncio.wait_for(learnt.wait(), 5)


def test_a_slow_answer_that_contradicts_nothing_teaches_nothing() -> None:
    clock = Clock()
    base = steady()
    clock.learn(1000.0, base, base + 0.002)
    near = clock.now() - steady()
    clock.learn(1000.3, base, base + 1.0)
    assert clock.now() - steady() == pytest.approx(near, abs=1e-6)
    clock.learn(2000.0, base, base + 1.0)
    assert clock.now() - steady() == pytest.approx(near + 1000, abs=1)


async def test_a_forked_child_opens_connections_of_its_own() -> None:
    with valkey_server(tcp=False) as server:
        wires: PerLoop[Wires] = PerLoop(
            lambda loop: Wires(loop, Address(path=server.socket_path), 5.0, Clock(), 1), owner="it", close=Wires.aclose
        )

        async def client_id() -> int:
            number: int = await wires.get().reads.send(pack((b"CLIENT", b"ID")), 1, first)
            return number

        mine = await client_id()
        read_end, write_end = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on, where other tests have left threads
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                asyncio._set_running_loop(None)
                os.write(write_end, b"%d" % asyncio.run(client_id()))
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        theirs = int(os.read(read_end, 100))
        os.close(read_end)
        os.close(write_end)
        assert theirs != mine
        assert await client_id() == mine
        await wires.aclose()
