"""The near cache: what this process read lately, bounded by entries and bytes.

Strategy: SIEVE (Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024). Entries stand in the order they came; a hit
sets a bit and moves nothing; the hand goes from old to new, takes the bit from those that have it and evicts the
first that has none. A scan comes and goes without a bit, so it doesn't flush what is used; and a hit costs one
attribute store, where LRU relinks.

It knows nothing of freshness and coherence: the engine asks both of every hit.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class _Node(Generic[T]):
    __slots__ = ("key", "newer", "older", "size", "value", "visited")

    def __init__(self, key: bytes, value: T, size: int) -> None:
        self.key = key
        self.value = value
        self.size = size
        self.visited = False
        self.newer: _Node[T] | None = None
        self.older: _Node[T] | None = None


class L1(Generic[T]):
    """A bounded table from key to value.

    Args:
        max_entries: At most so many; 0: none, and everything else is a no-op.
        max_bytes: At most so many bytes, as told by ``put``; 0: no entry either.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._nodes: dict[bytes, _Node[T]] = {}
        self._newest: _Node[T] | None = None
        self._oldest: _Node[T] | None = None
        self._hand: _Node[T] | None = None
        self.size_bytes = 0

    def __len__(self) -> int:
        """Entries held."""
        return len(self._nodes)

    def get(self, key: bytes) -> T | None:
        """Return what was put under *key* and is still there, and mark it as used."""
        node = self._nodes.get(key)
        if node is None:
            return None
        node.visited = True
        return node.value

    def put(self, key: bytes, value: T, size: int) -> int:
        """Hold *value*; answer how many others had to go for it. What is larger than the whole table is not held."""
        self.drop(key)
        if size > self._max_bytes or not self._max_entries:
            return 0
        evicted = 0
        while len(self._nodes) >= self._max_entries or self.size_bytes + size > self._max_bytes:
            self._evict()
            evicted += 1
        node = _Node(key, value, size)
        self._nodes[key] = node
        self.size_bytes += size
        node.older = self._newest
        if self._newest is not None:
            self._newest.newer = node
        self._newest = node
        if self._oldest is None:
            self._oldest = node
        return evicted

    def drop(self, key: bytes) -> None:
        """Forget *key*."""
        node = self._nodes.pop(key, None)
        if node is not None:
            self._unlink(node)

    def drop_prefix(self, prefix: bytes) -> None:
        """Forget every key that begins with *prefix*."""
        for key in [key for key in self._nodes if key.startswith(prefix)]:
            self.drop(key)

    def _unlink(self, node: _Node[T]) -> None:
        self.size_bytes -= node.size
        if self._hand is node:
            self._hand = node.newer
        if node.newer is None:
            self._newest = node.older
        else:
            node.newer.older = node.older
        if node.older is None:
            self._oldest = node.newer
        else:
            node.older.newer = node.newer

    def _evict(self) -> None:
        node = self._hand or self._oldest
        while node is not None and node.visited:
            node.visited = False
            node = node.newer or self._oldest
        assert node is not None
        self._hand = node
        self._unlink(self._nodes.pop(node.key))
