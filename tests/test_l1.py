"""The near cache: its bounds, and SIEVE."""

from __future__ import annotations

import random
from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from mcp_hub_cache._l1 import L1, Node


class Item(Node):
    def __init__(self, key: bytes, value: object, size: int) -> None:
        super().__init__(key, size)
        self.value = value


class Values:
    """A table whose entries are known by their values."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.l1: L1[Item] = L1(max_entries, max_bytes)
        self.drop = self.l1.drop

    def __len__(self) -> int:
        return len(self.l1)

    @property
    def size_bytes(self) -> int:
        return self.l1.size_bytes

    def get(self, key: bytes) -> object:
        item = self.l1.get(key)
        return None if item is None else item.value

    def put(self, key: bytes, value: object, size: int) -> int:
        return self.l1.put(Item(key, value, size))


def filled(keys: str, *, max_entries: int = 100, max_bytes: int = 1000) -> Values:
    l1 = Values(max_entries, max_bytes)
    for key in keys:
        l1.put(key.encode(), key, 1)
    return l1


def held(l1: Values, keys: str) -> str:
    """Which of *keys* are there; told apart from reading, which marks them."""
    return "".join(key for key in keys if key.encode() in l1.l1.snapshot())


def test_what_was_put_is_there_until_it_is_dropped() -> None:
    l1 = filled("ab")
    assert l1.get(b"a") == "a"
    assert l1.get(b"c") is None
    l1.drop(b"a")
    l1.drop(b"a")
    assert l1.get(b"a") is None
    assert len(l1) == l1.size_bytes == 1


def test_replacing_counts_once() -> None:
    l1 = Values(10, 100)
    l1.put(b"a", "old", 60)
    assert l1.put(b"a", "new", 70) == 0
    assert (l1.get(b"a"), len(l1), l1.size_bytes) == ("new", 1, 70)


def test_bounded_by_entries() -> None:
    l1 = filled("abc", max_entries=3)
    assert l1.put(b"d", "d", 1) == 1
    assert len(l1) == 3
    assert held(l1, "abcd") == "bcd"


def test_bounded_by_bytes() -> None:
    l1 = Values(100, 100)
    for key in (b"a", b"b", b"c"):
        assert l1.put(key, "x", 30) == 0
    assert l1.put(b"d", "x", 70) == 2
    assert l1.size_bytes == 100
    assert l1.get(b"c") == l1.get(b"d") == "x"


def test_what_is_larger_than_all_of_it_is_not_held_and_costs_nobody_a_place() -> None:
    l1 = filled("ab", max_bytes=10)
    assert l1.put(b"c", "c", 11) == 0
    assert held(l1, "abc") == "ab"
    # But what stood there before is out of date.
    assert l1.put(b"a", "a", 11) == 0
    assert held(l1, "ab") == "b"


def test_without_room_it_holds_nothing() -> None:
    for l1 in (Values(0, 100), Values(100, 0)):
        assert l1.put(b"a", "a", 1) == 0
        assert l1.get(b"a") is None
        l1.drop(b"a")
        assert (len(l1), l1.size_bytes) == (0, 0)


def test_clear() -> None:
    l1 = filled("abc")
    l1.l1.clear()
    assert (len(l1), l1.size_bytes, l1.get(b"a")) == (0, 0, None)
    assert l1.put(b"d", "d", 1) == 0


def test_an_alias_goes_with_its_entry_and_with_no_other() -> None:
    table: dict[str, Item] = {}
    l1: L1[Item] = L1(2, 100)
    for key in (b"a", b"b"):
        l1.put(Item(key, key, 1))
        entry = l1.get(key)
        assert entry is not None
        for _ in range(2):
            entry.alias(table, f"alias of {key.decode()}")
    assert table.keys() == {"alias of a", "alias of b"}
    l1.drop(b"b")
    assert table.keys() == {"alias of a"}
    successor = Item(b"c", "c", 1)
    l1.put(successor)
    successor.alias(table, "alias of a")  # leads elsewhere now
    l1.drop(b"a")
    assert table == {"alias of a": successor}
    l1.put(Item(b"c", "newer", 1))
    assert table == {}


def test_sieve_spares_what_was_used_and_evicts_the_oldest_that_was_not() -> None:
    """The example of the paper, figure 5 in spirit: the hand goes from old to new and takes the bits."""
    l1 = filled("abcde", max_entries=5)
    l1.get(b"a")
    l1.get(b"c")
    l1.put(b"f", "f", 1)  # the hand takes a's bit and evicts b
    assert held(l1, "abcdef") == "acdef"
    l1.put(b"g", "g", 1)  # goes on from there: takes c's bit, evicts d
    assert held(l1, "abcdefg") == "acefg"
    l1.put(b"h", "h", 1)  # e: never used
    assert held(l1, "acefgh") == "acfgh"
    l1.put(b"i", "i", 1)
    assert held(l1, "acfghi") == "acghi"
    for new in "jkl":
        l1.put(new.encode(), new, 1)
    assert len(l1) == 5


def test_all_used_is_as_none_used() -> None:
    l1 = filled("abc", max_entries=3)
    for key in (b"a", b"b", b"c"):
        l1.get(key)
    assert l1.put(b"d", "d", 1) == 1
    assert held(l1, "abcd") == "bcd"


def test_a_scan_does_not_flush_what_is_used() -> None:
    l1 = Values(100, 10_000)
    hot = [f"hot{n}".encode() for n in range(50)]
    for key in hot:
        l1.put(key, 1, 1)
    for turn in range(100):
        for key in hot:
            assert l1.get(key) == 1, f"turn {turn}"
        for n in range(100):
            l1.put(f"scan{turn}:{n}".encode(), 1, 1)


def test_it_hits_more_than_lru_on_a_skewed_load() -> None:
    """What SIEVE was chosen for; zipf-like requests with one-hit wonders between them."""
    rng = random.Random(7)
    l1 = Values(50, 10_000)
    lru: OrderedDict[bytes, int] = OrderedDict()
    hits = lru_hits = 0
    for n in range(20_000):
        key = f"{int(rng.paretovariate(0.8))}".encode() if rng.random() < 0.6 else f"once{n}".encode()
        if l1.get(key) is None:
            l1.put(key, 1, 1)
        else:
            hits += 1
        if key in lru:
            lru_hits += 1
            lru.move_to_end(key)
        else:
            lru[key] = 1
            if len(lru) > 50:
                lru.popitem(last=False)
    assert hits > lru_hits


class Model:
    """SIEVE told as simply as can be: a list from old to new, and the hand as an index."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.entries: list[tuple[bytes, int, int]] = []
        self.visited: set[bytes] = set()
        self.hand: bytes | None = None

    def keys(self) -> list[bytes]:
        return [key for key, _, _ in self.entries]

    def get(self, key: bytes) -> int | None:
        for each, value, _ in self.entries:
            if each == key:
                self.visited.add(key)
                return value
        return None

    def drop(self, key: bytes) -> None:
        keys = self.keys()
        if key in keys:
            at = keys.index(key)
            if self.hand == key:
                self.hand = keys[at + 1] if at + 1 < len(keys) else None
            del self.entries[at]
            self.visited.discard(key)

    def put(self, key: bytes, value: int, size: int) -> int:
        self.drop(key)
        if size > self.max_bytes or not self.max_entries:
            return 0
        evicted = 0
        while len(self.entries) >= self.max_entries or sum(s for _, _, s in self.entries) + size > self.max_bytes:
            keys = self.keys()
            at = keys.index(self.hand) if self.hand is not None else 0
            while keys[at] in self.visited:
                self.visited.discard(keys[at])
                at = (at + 1) % len(keys)
            self.hand = keys[at]
            self.drop(keys[at])
            evicted += 1
        self.entries.append((key, value, size))
        return evicted


keys = st.sampled_from([bytes([n]) for n in range(8)])
steps = st.one_of(
    st.tuples(st.just("get"), keys),
    st.tuples(st.just("put"), keys, st.integers(0, 100), st.integers(0, 12)),
    st.tuples(st.just("drop"), keys),
)


@given(st.integers(0, 5), st.integers(0, 20), st.lists(steps, max_size=80))
def test_it_does_what_the_model_does(max_entries: int, max_bytes: int, script: list[tuple[object, ...]]) -> None:
    l1 = Values(max_entries, max_bytes)
    model = Model(max_entries, max_bytes)
    for name, *args in script:
        assert getattr(l1, str(name))(*args) == getattr(model, str(name))(*args)
        assert len(l1) == len(model.entries) <= max_entries
        assert l1.size_bytes == sum(size for _, _, size in model.entries) <= max_bytes
    chain, node = [], l1.l1._oldest
    while node is not None:
        chain.append(node.key)
        node = node.newer
    assert chain == model.keys()
    assert set(chain) == set(l1.l1.snapshot())
