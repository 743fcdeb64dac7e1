"""Golden files: bytes that releases have written, which every later release must read, and write again.

Each folder holds one file per case, named as here. ``python -m tests.golden`` writes the files of new cases. It never
touches one that is there: a case whose bytes changed is a change of the stored format, which takes a new codec id, key
form or frame version, with cases of its own.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from ipaddress import ip_address, ip_network
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pydantic

from mcp_hub_cache._classes import classes_of
from mcp_hub_cache._codec import FAILURE, encode
from mcp_hub_cache._frame import Kind, Mark, frame_of_kind, pack, patch_head, placeholder, unpack_head
from mcp_hub_cache._keys import KeySpace, argument_bytes, bind, digest, function_name, namer
from mcp_hub_cache._seal import Seal

GOLDEN = Path(__file__).parent


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    y: float = 0.0


@dataclass(frozen=True)
class Result:
    id: int
    title: str
    colour: Colour | None = None
    points: tuple[Point, ...] = ()


class Page(pydantic.BaseModel):
    results: list[str]
    next: str | None = None
    _token: bytes = b""


class Record(msgspec.Struct):
    name: str
    note: str | msgspec.UnsetType = msgspec.UNSET


async def search(query: str, limit: int = 10, *words: str, exact: bool = False) -> list[Result]:
    raise NotImplementedError


def _codec_cases() -> dict[str, tuple[Any, Any]]:
    plain: dict[str, Any] = {
        "plain-scalars": [None, True, False, 0, -1, 2**64 - 1, -(2**63), 1.5, -0.0, 1e300, "", "text", "é漢😀"],
        "plain-nested": {"query": "redis", "results": [{"id": 1, "score": 0.25, "tags": ["a", "b"]}], "next": None},
        "bytes": b"\x00\xff raw",
        "rich-numbers": [2**64, -(2**70), math.inf, -math.inf, math.nan, 1j, range(1, 10, 2), ...],
        "rich-text": ["\ud800", {"\udc80": 1}],
        "rich-containers": (
            [1], (2,), {3}, frozenset({4}), b"five", bytearray(b"six"), {7: "seven", None: 0}, deque([8], 9),
            OrderedDict(ten=10), Counter({"x": 11}),
        ),
        "rich-times": [
            datetime(2024, 2, 29, 12, 30, 15, 6),
            datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
            datetime(2024, 1, 1, tzinfo=UTC), time(1, 2, 3, tzinfo=timezone(timedelta(hours=2), "two")),
            date(2024, 1, 1),
            timedelta(days=-1, microseconds=5),
        ],
        "rich-values": [
            UUID(int=5), Decimal("-1.10"), Decimal("NaN"), Fraction(1, 3), PurePosixPath("/a/b"), ip_address("::1"),
            ip_network("10.0.0.0/8"),
        ],
    }  # fmt: skip
    classes = {
        "class-dataclass": (Result(1, "one", Colour.RED, (Point(1, 2.5),)), Result),
        "class-enum": ([Colour.BLUE, Access.READ | Access.WRITE], Colour | Access),
        "class-pydantic": ([Page(results=["a"])], list[Page]),
        "class-msgspec": ({"a": Record("r"), "b": Record("r", "n")}, dict[str, Record]),
    }
    return {**{name: (value, None) for name, value in plain.items()}, **classes}


def _key_cases() -> dict[str, tuple[Callable[[], bytes], None]]:
    def of(*values: object) -> Callable[[], bytes]:
        return lambda: argument_bytes([f"a{index}" for index in range(len(values))], values)

    def named() -> bytes:
        names = function_name(search)
        name = namer(names.readable, [names.identity.encode(), b"1"], ("query", "limit", "words", "exact"))
        return KeySpace().entry(name(bind(search)("redis", exact=True)))

    cases = {
        "scalars": of("redis", 10, True, None, -1),
        "plain": of({"b": 1, "a": [1.5, {}]}, "x"),
        "tagged": of(2**64, (1, 2), {3, 1, 2}, {2: "b", 1: "a"}, b"x", 0.0, math.nan, date(2024, 1, 1)),
        "classes": of(Result(1, "one", Colour.RED), Page(results=[]), Record("r"), Point(1), Access(3)),
        "function": named,
        "digest": lambda: digest(b"a", b"bc", b"").encode(),
    }
    return {name: (make, None) for name, make in cases.items()}


def _frame_cases() -> dict[str, tuple[Callable[[], bytes], None]]:
    key, token = b"mcp_hub:default:e:plan:42", bytes(range(8))
    marks = (Mark(b"t" * 16, b"m" * 8), Mark(bytes(16), b"\xff" * 8))

    def entry(**more: Any) -> bytes:
        times = {"created": 1.7e9, "fresh_until": 1.7e9 + 600, "keep_until": 1.7e9 + 1200}
        return pack(key, b'{"steps":[1,2,3]}', **{"token": token, "codec": 1, "cost": 1.25, **times, **more})

    def patched() -> bytes:
        frame = entry()
        return patch_head(unpack_head(frame), fresh_until=1.8e9, keep_until=math.inf) + frame[64:]

    cases: dict[str, Callable[[], bytes]] = {
        "v1-entry": entry,
        "v1-entry-marks": lambda: entry(marks=marks),
        "v1-entry-forever": lambda: entry(fresh_until=math.inf, keep_until=math.inf),
        "v1-entry-patched": patched,
        "v1-placeholder": lambda: placeholder(key, token, 1.7e9, 15.0),
        "v1-mark": lambda: entry(kind=Kind.MARK, codec=0),
        "v1-failure": lambda: entry(codec=FAILURE),
        "v1-over": lambda: frame_of_kind(Kind.OVER, key, token, 1.7e9, 30.0),
    }
    return {name: (make, None) for name, make in cases.items()}


def golden_seal() -> Seal:
    """The seal that golden sealed frames are made by: each with the same salt, which no other ever is."""
    return Seal("golden secret, of no use to anybody", draw=lambda size: bytes(range(size)))


def _sealed_cases() -> dict[str, tuple[Callable[[], bytes], None]]:
    key, token = b"mcp_hub:default:e:plan:42", bytes(range(8))
    seal = golden_seal()

    def entry(payload: bytes = b'{"steps":[1,2,3]}', **more: Any) -> bytes:
        times = {"created": 1.7e9, "fresh_until": 1.7e9 + 600, "keep_until": 1.7e9 + 1200}
        return seal.pack(key, payload, **{"token": token, "codec": 1, "cost": 1.25, **times, **more})

    def prolonged() -> bytes:
        frame = entry()
        head = seal.prolonged(key, seal.unpack(frame, key), fresh_until=1.8e9, keep_until=math.inf)
        return head + frame[64:]

    cases: dict[str, Callable[[], bytes]] = {
        "v2-entry": entry,
        "v2-entry-marks": lambda: entry(marks=(Mark(b"t" * 16, b"m" * 8), Mark(bytes(16), b"\xff" * 8))),
        "v2-entry-empty": lambda: entry(b"", codec=3),
        "v2-entry-prolonged": prolonged,
        "v2-failure": lambda: entry(codec=FAILURE),
    }
    return {name: (make, None) for name, make in cases.items()}


def golden_cases(kind: str) -> dict[str, tuple[Any, Any]]:
    """Return the cases of "codec" (value, annotation), "keys", "frames" or "sealed" (maker of the bytes, None)."""
    return {"codec": _codec_cases, "keys": _key_cases, "frames": _frame_cases, "sealed": _sealed_cases}[kind]()


def written(kind: str, case: tuple[Any, Any]) -> bytes:
    """Return the bytes that this release writes for a case."""
    value, annotation = case
    if kind != "codec":
        return bytes(value())
    codec, payload = encode(value, classes_of(annotation))
    return bytes([codec]) + payload
