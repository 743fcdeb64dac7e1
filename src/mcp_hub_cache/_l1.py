"""The near cache's table: bounded by entries and bytes, and not flushed by a scan.

Strategy: SIEVE (Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024). Entries stand in the order they came; a hit
sets a bit and moves nothing; the hand goes from old to new, takes the bit from those that have it and evicts the
first that has none. A scan comes and goes without a bit, so it doesn't flush what is used; and a hit costs one
attribute store, where LRU relinks.

Other tables may lead to an entry by names of their own (a function's arguments): aliases, which go with the entry.

It knows nothing of freshness and coherence: who takes an entry asks the entry for both (``_near``).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, Generic, TypeVar

NOT_SHARED: Final = object()
"""In place of an entry's value: there is none that may be handed to many."""


TOLD: Final = 2
"""In place of "visited": it was, and the store has been told."""


class Node:
    """An entry's place in the table; entries derive from it.

    Attributes:
        key: What it stands under.
        size: Bytes it counts for.
        visited: Whether it was used since the hand last came by; ``TOLD`` where the store knows of it.
    """

    __slots__ = ("aliases", "key", "newer", "older", "size", "visited")

    def __init__(self, key: bytes, size: int = 0) -> None:
        self.key = key
        self.size = size
        self.visited: int = False
        self.newer: Any = None
        self.older: Any = None
        self.aliases: list[tuple[dict[Any, Any], Hashable]] | None = None

    def alias(self, table: dict[Any, Any], name: Hashable) -> None:
        """Let *table* lead from *name* to this entry as long as L1 holds it."""
        if table.get(name) is not self:
            table[name] = self
            self.aliases = [*(self.aliases or ()), (table, name)]


N = TypeVar("N", bound=Node)


class L1(Generic[N]):
    """A bounded table of entries.

    Args:
        max_entries: At most so many; 0: none, and everything else is a no-op.
        max_bytes: At most so many bytes, as the entries say; 0: no entry either.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._nodes: dict[bytes, N] = {}
        self._newest: N | None = None
        self._oldest: N | None = None
        self._hand: N | None = None
        self.size_bytes = 0

    def __len__(self) -> int:
        """Entries held."""
        return len(self._nodes)

    def get(self, key: bytes) -> N | None:
        """Return the entry under *key*, and mark it as used."""
        node = self._nodes.get(key)
        if node is not None:
            node.visited = True
        return node

    def peek(self, key: bytes) -> N | None:
        """Return the entry under *key*; that is no use of it."""
        return self._nodes.get(key)

    def served(self) -> list[bytes]:
        """The keys that were used since this was last asked."""
        served = [key for key, node in self._nodes.items() if node.visited and node.visited != TOLD]
        for key in served:
            self._nodes[key].visited = TOLD
        return served

    def snapshot(self) -> list[bytes]:
        """The keys held, oldest first."""
        return list(self._nodes)

    def put(self, node: N) -> int:
        """Hold *node*; answer how many others had to go for it. What is larger than the whole table is not held."""
        self.drop(node.key)
        if node.size > self._max_bytes or not self._max_entries:
            return 0
        evicted = 0
        while len(self._nodes) >= self._max_entries or self.size_bytes + node.size > self._max_bytes:
            self._evict()
            evicted += 1
        self._nodes[node.key] = node
        self.size_bytes += node.size
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

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self._nodes):
            self.drop(key)

    def _unlink(self, node: N) -> None:
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
        node.newer = node.older = None
        for table, name in node.aliases or ():
            if table.get(name) is node:
                del table[name]
        node.aliases = None

    def _evict(self) -> None:
        node = self._hand or self._oldest
        while node is not None and node.visited:
            node.visited = False
            node = node.newer or self._oldest
        assert node is not None
        self._hand = node
        self._unlink(self._nodes.pop(node.key))
