"""What sealing costs: the frame of the 1.4 KB JSON value alone, and reads and writes over Redis; beside it unsealed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .bench import Bench
from .clients import MissingError, require
from .measure import Side, reads, writes
from .values import WrongValueError, result

_SECRET = "the benchmark's secret, known to everybody"  # noqa: S105  # as it says
_KEY = b"mcp_hub:default:e:plan:42"
_NUMBERS = range(400)


async def run(bench: Bench) -> None:
    """Measure the section."""
    if not bench.wants("seal."):
        return
    try:
        require("cryptography")
    except MissingError as error:
        for work in ("pack", "open", "set100", "get100"):
            bench.skip(f"seal.{work}", str(error))
        return
    await _frames(bench)
    await _caches(bench)


async def _frames(bench: Bench) -> None:
    from mcp_hub_cache import _frame
    from mcp_hub_cache._codec import encode
    from mcp_hub_cache._form import Form, form_of

    codec, payload = encode(result(0))

    def pack(form: Form) -> bytes:
        return form.pack(
            _KEY, payload, codec=codec, token=b"12345678", created=1.0, fresh_until=2.0, keep_until=3.0, cost=0.5
        )

    def opens(form: Form) -> Callable[[], Any]:
        data = pack(form)
        opened = form.open_entry(data, _KEY)
        if opened is None or opened[-1] != payload:
            raise WrongValueError("a frame")
        return lambda: form.open_entry(data, _KEY)

    sealed = form_of(_SECRET, None)
    await bench.compare("seal.pack", _loop(lambda: pack(sealed)), _loop(lambda: pack(_frame)))
    await bench.compare("seal.open", _loop(opens(sealed)), _loop(opens(_frame)))


def _loop(work: Callable[[], object]) -> Side:
    async def run(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            work()
        return time.perf_counter() - started

    return Side(run, least=100)


async def _caches(bench: Bench) -> None:
    from mcp_hub_cache import RedisCache

    values = [result(number) for number in _NUMBERS]
    keys = [f"seal:{number}" for number in _NUMBERS]
    options: Any = {"l1_max_entries": 0, "timeout": 30}
    async with (
        RedisCache(bench.address.url, namespace="plain", **options) as plain,
        RedisCache(bench.address.url, namespace="sealed", secret_key=_SECRET, **options) as sealed,
    ):
        for cache in (plain, sealed):
            await cache.set_many(dict(zip(keys, values, strict=True)))
        await bench.compare("seal.get100", reads(sealed.get, keys, 100), reads(plain.get, keys, 100))
        sides = [writes(cache.set, cache.get, keys, values, 100) for cache in (sealed, plain)]
        await bench.compare("seal.set100", *sides)
