"""What a primary has still to be told."""

from __future__ import annotations

from math import inf

import pytest

from mcp_hub_cache._frame import HEAD_SIZE, Kind, pack
from mcp_hub_cache.stores._failover_journal import Journal, is_older

P = b"mcp_hub:"


def _keys(*names: str) -> list[bytes]:
    return [P + name.encode() for name in names]


def any_key(_: bytes) -> bool:
    return True


def test_covers_what_was_noted_and_nothing_else() -> None:
    journal = Journal(P, 10)
    a, b, c = _keys("a", "b", "ns:c")
    assert not len(journal)
    assert journal.doubts([a, b, c]).covered == frozenset()
    journal.add([a])
    journal.add_prefix(P + b"ns:")
    assert journal.doubts([a, b, c]).covered == {a, c}
    assert len(journal) == 2


def test_a_key_noted_again_outlives_the_replay_of_its_first_note() -> None:
    journal = Journal(P, 10)
    a, b = _keys("a", "b")
    journal.add([a, b])
    seen = journal.oldest(10, any_key)
    journal.add([a])
    journal.forget(seen)
    assert journal.doubts([a, b]).covered == {a}
    journal.forget(journal.serials([a, b]))
    assert not len(journal)


def test_a_prefix_noted_again_outlives_the_replay_of_its_first_note() -> None:
    journal = Journal(P, 10)
    journal.add_prefix(P)
    ((prefix, serial),) = journal.prefixes().items()
    journal.add_prefix(P)
    journal.forget_prefix(prefix, serial)
    assert journal.covers(P + b"x")
    journal.forget_prefix(prefix, journal.prefixes()[prefix])
    assert not journal.covers(P + b"x")


def test_oldest_first() -> None:
    journal = Journal(P, 10)
    a, b, c = _keys("a", "b", "c")
    journal.add([a, b, c])
    journal.add([a])
    assert list(journal.oldest(2, any_key)) == [b, c]


def test_overflow_becomes_one_note_that_covers_everything() -> None:
    journal = Journal(P, 3)
    keys = _keys("a", "b", "c", "d")
    journal.add(keys)
    assert len(journal) == 1
    assert journal.prefixes().keys() == {P}
    assert all(map(journal.covers, [*keys, P + b"never seen"]))


def test_overflow_during_the_clear_that_an_earlier_one_caused_is_not_lost() -> None:
    journal = Journal(P, 3)
    journal.add(_keys("a", "b", "c", "d"))
    ((prefix, serial),) = journal.prefixes().items()
    journal.add(_keys("e", "f", "g", "h"))
    journal.forget_prefix(prefix, serial)
    assert journal.covers(P + b"e")


def test_a_key_outside_of_the_prefix_is_never_dropped() -> None:
    journal = Journal(P, 2)
    journal.add([b"other:1", *_keys("a", "b")])
    assert journal.covers(b"other:1")
    assert list(journal.oldest(9, any_key)) == [b"other:1"]


def test_prefixes_are_bounded_too() -> None:
    journal = Journal(P, 10)
    for n in range(1000):
        journal.add_prefix(P + b"ns%d:" % n)
    assert len(journal) < 300
    assert all(journal.covers(P + b"ns%d:k" % n) for n in range(1000))


def _head(created: float, *, token: bytes = b"another.", cost: float = 0.0, kind: Kind = Kind.ENTRY) -> bytes:
    frame = pack(
        b"k", b"{}", token=token, created=created, fresh_until=inf, keep_until=inf, cost=cost, kind=kind
    )  # fmt: skip
    return frame[:HEAD_SIZE]


@pytest.mark.parametrize(
    ("there", "older"),
    [
        (None, False),
        (_head(100.0, token=b"this-one"), False),
        (_head(90.0, token=b"this-one"), False),  # by whoever has given it a new head
        (_head(99.9), True),
        (_head(100.0), True),
        (_head(100.1), False),  # set by somebody else since
        (_head(99.9, kind=Kind.PLACEHOLDER), True),
        (_head(100.1, kind=Kind.PLACEHOLDER), False),
        (_head(101.0, cost=2.0), True),  # of a load that had begun before
        (_head(103.0, cost=2.0), True),  # nobody knows
        (_head(108.0, cost=2.0), False),
        (b"", True),
        (b"\x89MHC\x03 something from the future".ljust(HEAD_SIZE), True),
    ],
)
def test_what_is_older_than_what_was_set(there: bytes | None, *, older: bool) -> None:
    assert is_older(there, _head(100.0, token=b"this-one")) is older
    assert not is_older(there, None)
