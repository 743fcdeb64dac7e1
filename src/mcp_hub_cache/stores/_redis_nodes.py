"""The nodes of a cluster, as one loop is connected to them, and the map that says which has which slot.

Strategy: each node has wires of its own, so that one that hangs holds up its own keys alone. The map comes from CLUSTER
SLOTS. Several nodes are asked for it, and the answer of the latest epoch counts, since a node that has just come back
tells of what was.

Rules:
- Whatever hints that the map is old (a redirection, a node that can't be reached, CLUSTERDOWN) has it read again in the
  background, one reading at a time, and again with growing pauses as long as a node that has slots is out of reach.
- A node that gets slots for the first time since this store knows a map may have been promoted and lack the last
  changes: ``replaced`` is called before anything is sent to it. One that had slots all along and gets more was given
  them, with what is in them.
- A node without slots is no longer connected to.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from .._exceptions import StoreBusyError, StoreError
from ._failover_breaker import Backoff
from ._redis_address import Address
from ._redis_clock import Clock
from ._redis_driver import ask
from ._redis_errors import store_error
from ._redis_places import Fixed, Identity
from ._redis_polls import poll
from ._redis_slots import Spot, spots_of
from ._redis_target import Target
from ._redis_wire import Wires

_ASKED: Final = 7  # nodes for a map, at most
_FIRST_WAIT: Final = 0.1  # seconds between readings while a node is out of reach, doubled with each
_LONGEST_WAIT: Final = 5.0


class Map:
    """Which node has which slot, as far as a store knows; outlives the loop that learnt it.

    Attributes:
        names: The node of each slot, "" where there is none; empty: nothing is known yet.
        serving: The nodes that have slots, and those that a redirection has named since.
        version: Another one whenever something has changed, or may be about to.
    """

    def __init__(self, replaced: Callable[[], None]) -> None:
        self.names: list[str] = []
        self.serving: set[str] = set()
        self.version = 0
        self.replaced = replaced

    def take(self, names: list[str]) -> None:
        """Believe *names* from now on."""
        if names != self.names:
            self.version += 1
        self.names, before = names, self.serving
        self.serving = {*names} - {""}
        if before and not self.serving <= before:
            self.replaced()

    def move(self, slot: int, name: str, *, once: bool) -> None:
        """A node says that *slot*, or a key in it, is at *name*."""
        self.version += 1
        if not once:
            self.names[slot] = name
        if name not in self.serving:
            self.serving.add(name)
            self.replaced()


class _At(Fixed):
    """A node's place: whether it still has its slots, the map says."""

    def __init__(self, address: Address, identity: Identity, check: Callable[[], object]) -> None:
        super().__init__(address, identity)
        self._check = check

    def check(self) -> None:
        """See ``Place``."""
        self._check()


class Node:
    """One node and the wires to it."""

    def __init__(self, address: Address, wires: Wires) -> None:
        self.name = address.where
        self.spot = Spot(address.host, address.port)
        self.wires = wires


class Nodes:
    """All that one loop is connected to.

    Args:
        loop: The running loop.
        target: Where to start from; credentials and TLS of all.
        known: The store's map.
        timeout: Seconds for a call.
        clock: Learns the time; the nodes' clocks should agree.
        limit: Connections to each node.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        target: Target,
        known: Map,
        *,
        timeout: float,
        clock: Clock,
        limit: int,
    ) -> None:
        self.loop = loop
        self.timeout = timeout
        self.map = known
        self._target = target
        self._clock = clock
        self._limit = limit
        self._nodes: dict[str, Node] = {}
        self._addresses = {node.where: node for node in target.nodes}
        self._reading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._away: set[str] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    # Nodes

    def node(self, name: str) -> Node:
        """Return the node of that name, with wires that connect when they are needed."""
        node = self._nodes.get(name)
        if node is None:
            place = _At(self._addresses[name], Identity(self.map.replaced), self.refresh)
            wires = Wires(self.loop, place, self.timeout, self._clock, self._limit)
            node = self._nodes[name] = Node(place.address, wires)
        return node

    def serving(self) -> list[Node]:
        """The nodes that have slots."""
        return [self.node(name) for name in sorted({*self.map.names} - {""})]

    def moved(self, slot: int, spot: Spot, *, once: bool) -> Node:
        """Return the node that a redirection names, and have the map read again."""
        address = replace(self._target.address, host=spot.host, port=spot.port)
        self._addresses.setdefault(address.where, address)
        self.map.move(slot, address.where, once=once)
        if not once:
            _ = self.refresh()
        return self.node(address.where)

    def heard(self, node: Node) -> None:
        """*node* has answered."""
        self._away.discard(node.name)

    def missed(self, node: Node) -> None:
        """*node* can't be reached, or says that the cluster is down."""
        self._away.add(node.name)
        if self._watching is None and not self._closed:
            self._watching = task = self.loop.create_task(self._watch(), name="mcp_hub_cache: watch the cluster")
            task.add_done_callback(self._watched)

    async def _watch(self) -> None:
        backoff = Backoff(_FIRST_WAIT, _LONGEST_WAIT, random.random)
        while self._away:
            await asyncio.wait([self.refresh()])
            self._away &= {*self.map.names}
            if self._away:
                await asyncio.sleep(backoff.next())

    def _watched(self, task: asyncio.Task[None]) -> None:
        self._watching = None
        if not task.cancelled():
            task.exception()

    # The map

    def refresh(self) -> asyncio.Task[None]:
        """Return the reading of the map under way, begun now if there is none.

        Raises:
            StoreError: No node could be asked, or the one that was is none of a cluster.
        """
        if self._reading is None:
            self._reading = task = self.loop.create_task(self._read(), name="mcp_hub_cache: read the cluster's map")
            task.add_done_callback(self._has_read)
        return self._reading

    def _has_read(self, task: asyncio.Task[None]) -> None:
        self._reading = None
        if not task.cancelled():
            task.exception()

    async def _read(self) -> None:
        asked = list({**self._addresses, **{address.where: address for address in self._target.nodes}}.values())
        asked = random.sample(asked, min(len(asked), _ASKED))
        told = await poll([self._ask_one(address) for address in asked], self.timeout)
        if not told.answers:
            raise told.trouble() or StoreBusyError(
                f"{self._target.where}: no node knows which one has which keys.",
                cure="Check the cluster (redis-cli cluster info): its slots may not be assigned yet.",
            )
        _, spots = max(told.answers, key=lambda answer: answer[0])
        addresses = {
            spot: replace(self._target.address, host=spot.host, port=spot.port) for spot in {*spots} if spot is not None
        }
        self._addresses = {address.where: address for address in addresses.values()}
        names = {spot: address.where for spot, address in addresses.items()}
        self.map.take(["" if spot is None else names[spot] for spot in spots])
        for name in self._nodes.keys() - self._addresses.keys():
            task = self.loop.create_task(self._nodes.pop(name).wires.aclose())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _ask_one(self, address: Address) -> tuple[tuple[bool, int], list[Spot | None]] | None:
        """A node's map, with what says how far it is to be believed; None: it knows of no other."""
        slots, info = await ask(address, self.timeout, ("CLUSTER", "SLOTS"), ("CLUSTER", "INFO"))
        if isinstance(slots, Exception):
            raise store_error(str(slots), address.where)
        spots = spots_of(slots, Spot(address.host, address.port))
        if not any(spots):
            return None
        facts = dict(line.split(b":", 1) for line in info.split() if b":" in line) if isinstance(info, bytes) else {}
        # Where CLUSTER INFO is denied, any map will do.
        return (facts.get(b"cluster_state") == b"ok", int(facts.get(b"cluster_current_epoch", 0))), spots

    async def aclose(self) -> None:
        """Close all connections, and end what is under way."""
        self._closed = True
        tasks = [task for task in (self._reading, self._watching) if task is not None]
        for task in tasks:
            task.cancel()
        for node in self._nodes.values():
            await node.wires.aclose()
        if left := [*tasks, *self._ending]:
            await asyncio.wait(left)


def out_of_reach(error: StoreError) -> bool:
    """Whether *error* hints that the cluster is not as it was."""
    return error.outage or isinstance(error, StoreBusyError)
