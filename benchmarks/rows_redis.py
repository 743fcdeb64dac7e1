"""Reads and writes of the 1.4 KB JSON value over Redis, near cache off: ours beside every client."""

from __future__ import annotations

import time

import orjson

from .bench import Bench
from .clients import Bare, Client, Opened, Ours
from .measure import Side, reads, spread, writes
from .specs import SPECS
from .values import WrongValueError, compare, result

_PEERS = {
    "redis-py": "redis-py, pool of 10",
    "bare": Bare.name,
    "redis-py-10": "redis-py, pool of 10",
    "redis-py-50": "redis-py, pool of 50",
    "valkey-glide": "valkey-glide",
    "cashews": "cashews",
    "aiocache": "aiocache",
    "coredis": "coredis",
    "py-key-value": "py-key-value",
}
_CALLERS = {"get1": 1, "get100": 100}
_KEYS = 2000
_QUICK_KEYS = 200
_MANY = 10_000
_CURVE = (1, 10, 100, 1000)
_QUICK_CURVE = (1, 10, 100)
_CURVE_ROUNDS = 9


def _keys_of(bench: Bench, client: Client, number: int = 0) -> list[str]:
    """Return the keys of a client; each has its own, since each stores in its own form."""
    number = number or (_QUICK_KEYS if bench.method.quick else _KEYS)
    return [f"{client.distribution}:{index}" for index in range(number)]


async def run(bench: Bench) -> None:
    """Measure the section."""
    if not bench.wants("redis.") and not bench.wants_curve("throughput"):
        return
    async with Opened(bench.address) as opened:
        ours = opened.clients[Ours.name]
        for client in opened.clients.values():
            keys = _keys_of(bench, client, _MANY if client is ours else 0)
            await client.fill((key, result(index)) for index, key in enumerate(keys))
        await _gets(bench, opened)
        await _crowds(bench, ours)
        await _sets(bench, opened)
        await _get_many(bench, opened)
        if bench.wants_curve("throughput"):
            await _throughput(bench, opened)


async def _gets(bench: Bench, opened: Opened) -> None:
    ours = opened.clients[Ours.name]
    for spec in SPECS:
        work, _, peer = spec.id.removeprefix("redis.").partition(".")
        if work not in _CALLERS:
            continue
        callers, name = _CALLERS[work], _PEERS[peer.removeprefix("bare-")]
        other = opened.clients.get(name)
        theirs = None if other is None else reads(other.get, _keys_of(bench, other), callers)
        this = opened.clients[Bare.name] if peer.startswith("bare-") else ours
        side = reads(this.get, _keys_of(bench, this), callers)
        await bench.compare(spec.id, side, theirs, missing=opened.missing.get(name, ""))


async def _crowds(bench: Bench, ours: Client) -> None:
    """Our own rate with more callers than anybody has, beside that with 100."""
    hundred = reads(ours.get, _keys_of(bench, ours), 100)
    await bench.compare("redis.get1000", reads(ours.get, _keys_of(bench, ours, _KEYS), 1000), hundred)
    crowd = reads(ours.get, _keys_of(bench, ours, _MANY), _MANY)
    await bench.compare("redis.get10000", crowd, hundred, number=15)


async def _sets(bench: Bench, opened: Opened) -> None:
    values = [result(index) for index in range(400)]
    ours = opened.clients[Ours.name]

    def side(client: Client) -> Side:
        keys = [f"{client.distribution}:set:{index}" for index in range(len(values))]
        return writes(client.set, client.get, keys, values, 100)

    for peer in ("redis-py", "valkey-glide", "cashews"):
        name = _PEERS[peer]
        other = opened.clients.get(name)
        theirs = None if other is None else side(other)
        await bench.compare(f"redis.set100.{peer}", side(ours), theirs, missing=opened.missing.get(name, ""))


async def _get_many(bench: Bench, opened: Opened) -> None:
    ours = opened.clients[Ours.name]
    redis_py = opened.clients[_PEERS["redis-py"]]
    our_keys, their_keys = _keys_of(bench, ours)[:100], _keys_of(bench, redis_py)[:100]

    async def get_many(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            found = await ours.cache.get_many(our_keys)
            if len(found) != len(our_keys) or any(found[key]["number"] != n for n, key in enumerate(our_keys)):
                raise WrongValueError("get_many")
        took = time.perf_counter() - started
        for number, key in enumerate(our_keys):
            compare(found[key], number)
        return took

    async def mget(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            frames = await redis_py.client.mget(their_keys)
            found = {key: orjson.loads(frame) for key, frame in zip(their_keys, frames, strict=True)}
            if len(found) != len(their_keys) or any(found[key]["number"] != n for n, key in enumerate(their_keys)):
                raise WrongValueError("mget")
        return time.perf_counter() - started

    await bench.compare("redis.get_many.redis-py", Side(get_many), Side(mget))


async def _throughput(bench: Bench, opened: Opened) -> None:
    """Reads per second by callers, every client in every round: the picture, not a claim."""
    clients = {name: client for name, client in opened.clients.items() if name != Bare.name}
    curve: dict[str, list[dict[str, float]]] = {name: [] for name in clients}
    for callers in _QUICK_CURVE if bench.method.quick else _CURVE:
        sides = {name: reads(client.get, _keys_of(bench, client), callers) for name, client in clients.items()}
        counts: dict[str, int] = {}
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(1 if bench.method.quick else _CURVE_ROUNDS):
            for name in list(sides) if turn % 2 == 0 else reversed(list(sides)):
                if name not in counts:
                    counts[name] = sides[name].least
                    if not bench.method.quick:
                        took = await sides[name].run(counts[name])
                        counts[name] = max(counts[name], round(counts[name] * bench.method.slice / took))
                rates[name].append(counts[name] / await sides[name].run(counts[name]))
        for name, found in rates.items():
            low, middle, high = spread(found)
            curve[name].append({"callers": callers, "per_second": middle, "low": low, "high": high})
    bench.curves["throughput"] = curve
