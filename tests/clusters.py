"""Several servers as one: a primary, its replica and three sentinels; a cluster of three primaries and replicas."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import hiredis

from tests.servers import Server, free_port, valkey_server

SERVICE = "mymaster"
_SECONDS = 40.0
# A node's second port is its first plus 10,000, unless it is told.
_NODE = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-replica-validity-factor", "0")


def wait_until(holds: Callable[[], bool]) -> None:
    """Return when *holds*, asked again and again, blocking: nobody's loop runs yet, or it need not."""
    until = time.monotonic() + _SECONDS
    while True:
        try:
            if holds():
                return
        except (OSError, hiredis.ReplyError):
            pass
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.01)


def section(server: Server, name: str) -> dict[str, str]:
    """What INFO says under *name*."""
    lines = server.command("INFO", name).decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def followed(primary: Server, replica: Server) -> None:
    """Return when *replica* has all that was written to *primary* so far."""
    offset = int(section(primary, "replication")["master_repl_offset"])
    wait_until(lambda: int(section(replica, "replication")["slave_repl_offset"]) >= offset)


@dataclass
class Watched:
    """A primary and its replica, and the sentinels that watch them."""

    servers: list[Server]
    sentinels: list[Server]

    @property
    def hosts(self) -> str:
        return ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)

    def primary(self) -> Server:
        """The one that most sentinels name."""
        named: list[int] = []
        for sentinel in self.sentinels:
            try:
                named.append(int(sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1]))
            except OSError:
                continue
        port = max(set(named), key=named.count)
        return next(server for server in self.servers if server.port == port)

    def other(self) -> Server:
        primary = self.primary()
        return next(server for server in self.servers if server is not primary)

    def wait_ready(self) -> None:
        """Return when the replica follows and the sentinels know of it and of each other."""
        wait_until(lambda: "state=online" in section(self.primary(), "replication").get("slave0", ""))
        wait_until(lambda: section(self.other(), "replication")["role"] == "slave")

        def agree(sentinel: Server) -> bool:
            flat = sentinel.command("SENTINEL", "MASTER", SERVICE)
            said = dict(zip(flat[::2], flat[1::2], strict=True))
            replicas = sentinel.command("SENTINEL", "REPLICAS", SERVICE)
            up = [replica for replica in replicas if b"slave" in replica and b"s_down" not in b",".join(replica)]
            return said[b"num-other-sentinels"] == b"2" and said[b"flags"] == b"master" and len(up) == 1

        wait_until(lambda: all(agree(sentinel) for sentinel in self.sentinels))

    def confirm(self) -> None:
        """Return when the replica has all that was written so far."""
        followed(self.primary(), self.other())


@contextmanager
def watched(*args: str, as_user: str | None = None) -> Iterator[Watched]:
    """Start a primary, its replica and three sentinels, which take over within about two seconds.

    *as_user*: whom the sentinels log in as, and everybody's password. Where a server deletes that user, they are cut
    off, and nobody else is.
    """
    with ExitStack() as stack:
        quick = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1", "--repl-timeout", "3", *args)
        if as_user is not None:
            quick += ("--user", as_user, "on", f">{as_user}", "~*", "&*", "+@all", "--masterauth", as_user)
        primary = stack.enter_context(valkey_server(*quick, password=as_user))
        replica = stack.enter_context(
            valkey_server("--replicaof", f"127.0.0.1 {primary.port}", *quick, password=as_user)
        )
        sentinels = [stack.enter_context(valkey_server(start=False)) for _ in range(3)]
        for sentinel in sentinels:
            _watch(sentinel, primary, replica, [other for other in sentinels if other is not sentinel], as_user)
        made = Watched([primary, replica], sentinels)
        made.wait_ready()
        yield made


def _watch(sentinel: Server, primary: Server, replica: Server, others: list[Server], as_user: str | None) -> None:
    """Start a sentinel that knows everybody from the start: finding each other takes them two seconds."""
    config = sentinel.folder / "sentinel.conf"
    lines = [
        f"sentinel myid {sentinel.port:040x}",
        f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} 2",
        f"sentinel down-after-milliseconds {SERVICE} 500",
        f"sentinel failover-timeout {SERVICE} 2000",
        *(f"sentinel auth-{what} {SERVICE} {as_user}" for what in ("user", "pass") if as_user is not None),
        f"sentinel known-replica {SERVICE} 127.0.0.1 {replica.port}",
        *(f"sentinel known-sentinel {SERVICE} 127.0.0.1 {other.port} {other.port:040x}" for other in others),
    ]
    config.write_text("\n".join([*lines, ""]))
    sentinel.config = (str(config), "--sentinel")
    sentinel.start()


@dataclass
class Cluster:
    """Primaries, and then their replicas, in the order in which they started."""

    nodes: list[Server]

    @property
    def url(self) -> str:
        return "redis://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def alive(self) -> list[Server]:
        return [node for node in self.nodes if node.process is not None]

    def slots(self) -> list[tuple[int, int, Server, list[Server]]]:
        """Ranges of slots, each with its primary and replicas, as the first node that answers says."""
        by_port = {node.port: node for node in self.nodes}
        for node in self.alive():
            try:
                reply = node.command("CLUSTER", "SLOTS")
            except OSError:
                continue
            return [
                (first, last, by_port[primary[1]], [by_port[replica[1]] for replica in replicas])
                for first, last, primary, *replicas in reply
            ]
        raise AssertionError("no node answers")

    def primary_of(self, slot: int) -> Server:
        return next(primary for first, last, primary, _ in self.slots() if first <= slot <= last)

    def primaries(self) -> list[Server]:
        return list({id(primary): primary for _, _, primary, _ in self.slots()}.values())

    def wait_ready(self, replicas: int) -> None:
        """Return when all nodes agree on all slots, and each primary has its replicas."""
        ids = {node.port: node.command("CLUSTER", "MYID") for node in self.alive()}

        def agree(node: Server) -> bool:
            info = node.command("CLUSTER", "INFO")
            ranges = node.command("CLUSTER", "SLOTS")
            return (
                b"cluster_state:ok" in info
                and sum(last - first + 1 for first, last, *_ in ranges) == 16384
                and all(len(nodes) == 1 + replicas for _, _, *nodes in ranges)
                and {one[2] for _, _, *nodes in ranges for one in nodes} <= set(ids.values())
            )

        wait_until(lambda: all(agree(node) for node in self.alive()))
        for first, _, primary, following in self.slots():
            assert first >= 0
            for replica in following:
                wait_until(lambda replica=replica: section(replica, "replication")["master_link_status"] == "up")  # type: ignore[misc]  # bound now
            wait_until(lambda primary=primary: section(primary, "replication")["role"] == "master")  # type: ignore[misc]  # bound now

    def move(self, slot: int, to: Server, *, finish: bool = True) -> Callable[[], None]:
        """Have *slot* moved to another primary, key by key. Returns what finishes it, done already unless said."""
        source = self.primary_of(slot)
        source_id, target_id = (node.command("CLUSTER", "MYID") for node in (source, to))
        to.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)

        def rest() -> None:
            while keys := source.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                source.command("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys)
            for node in (to, source, *(one for one in self.primaries() if one is not to and one is not source)):
                node.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)

        if finish:
            rest()
        return rest


@contextmanager
def cluster(
    *args: str, replicas: int = 1, make: Callable[..., Any] = valkey_server, **options: Any
) -> Iterator[Cluster]:
    """Start three primaries with so many replicas each; a replica takes over within about three seconds."""
    with ExitStack() as stack:
        nodes: list[Server] = []
        for _ in range(3 * (1 + replicas)):
            bus = ("--cluster-port", str(free_port()), "--cluster-config-file", "nodes.conf")
            quick = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
            nodes.append(stack.enter_context(make(*_NODE, *bus, *quick, *args, **options)))
        made = Cluster(nodes)
        primaries, others = nodes[:3], nodes[3:]
        for number, node in enumerate(primaries):
            node.command("CLUSTER", "ADDSLOTSRANGE", number * 16384 // 3, (number + 1) * 16384 // 3 - 1)
        for number, node in enumerate(nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in nodes[1:]:
            bus_port = nodes[0].args[nodes[0].args.index("--cluster-port") + 1]
            node.command("CLUSTER", "MEET", "127.0.0.1", nodes[0].tls_port or nodes[0].port, bus_port)
        for number, node in enumerate(others):
            master = primaries[number % 3].command("CLUSTER", "MYID")
            wait_until(lambda node=node, master=master: node.command("CLUSTER", "REPLICATE", master) == b"OK")  # type: ignore[misc]  # bound now
        made.wait_ready(replicas)
        yield made
