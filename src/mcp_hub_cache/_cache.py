"""``Cache``: the face of the engine. Names become store keys, options become checked values; nothing is decided here.

Docstrings stand once, on the protocol ``AsyncCache``, and are inherited.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Hashable, Iterable, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack, overload

from ._async_cache import AsyncCache, Loader, PolicyOptions, Scope, Seconds
from ._blake import blake2b
from ._classes import NOTHING, ClassSet, as_class_set
from ._codec import Limits
from ._durations import seconds
from ._engine import Engine
from ._flight import Flight
from ._form import form_of
from ._keys import KeySpace, argument_bytes, digest, scope_of
from ._l1 import NOT_SHARED
from ._load import NO_TAGS, Loads
from ._policy import Coalesce, Policy
from ._protocols import Evicting, Leases, Observer, OnMisconfigured, Store, StoreState
from ._reads import MISS, Reads, Takes, tell_read
from ._rules import Rulebook, Rules
from ._shortcut import AGAIN, Shortcut
from ._stats import Counters
from ._tags import as_tags
from ._trip import Plan
from ._upkeep import Upkeep
from ._writes import Writes

if TYPE_CHECKING:
    from ._figures import CacheStatus, Entry, Stats

T = TypeVar("T")
D = TypeVar("D")

_MAX_KEY_LENGTH: Final = 16_000  # four bytes a character and the prefix fit the frame's key field


class Cache(AsyncCache):
    """An ``AsyncCache`` over any ``Store``.

    Opens on first use, may be used under one event loop after another, and is closed by ``aclose``, ``async with``,
    or the end of ``asyncio.run``. Two loops that run at once need a cache each.

    Args:
        store: Where frames are kept. The cache closes it.
        namespace: Keys of one namespace never touch another's; letters, digits, ``_.-``, at most 64.
        default_ttl: Seconds, where a call gives no ttl; more than 0, or ``FOREVER``.
        prefix: What every store key begins with. Of two caches on one server, neither's prefix may begin with the
            other's prefix and namespace.
        timeout: Seconds that one operation may take of the caller's time, waiting for connections and retries included.
            A loader's time is never part of it.
        l1_max_entries: Entries in the near cache; 0: none. It serves only where the store can tell of changes.
        l1_max_bytes: Bytes in the near cache.
        max_key_length: Characters, at most 16,000.
        max_value_bytes: The largest stored form of a value, written or read.
        max_value_items: The most items and containers in a value, at all its levels: a few bytes of text each, they
            take a hundred when read.
        policy: How entries are kept, refreshed and shared where a call does not say; its ttl wins over *default_ttl*.
        coalesce: "process": one load per key in each process. "fleet": one in all processes that share the store. Where
            no policy says.
        max_refreshes: How many refreshes may go on in the background at once; while there are so many, what is stale
            is served unrefreshed. 0: none.
        secret_key: Random text of at least 32 characters that seals entries: whoever else can write to the store can
            neither read nor forge one. Takes the extra ``crypto``. Once it is given, nothing is read that is not sealed
            with it. None: nothing is sealed.
        previous_secret_key: Opens what was sealed before *secret_key* took its place.
        on_misconfigured: While the store refuses, and a person must put that right (wrong credentials or certificate, a
            missing permission, a folder of another's). "serve": reads miss, writes are dropped, loads go on uncached.
            "raise": calls raise the store's ``StoreMisconfiguredError``, which says what to do, before they load
            anything; what a loader has yielded by then is returned all the same. ``status`` and ``health_check`` never
            raise. A server that is only away, full or busy raises nothing either way.
        observer: Hears what happens, beside the counters that ``status`` shows. It hears of every hit, so none takes a
            shortcut: one from the near cache then costs some ten times as much.
    """

    def __init__(
        self,
        store: Store,
        *,
        namespace: str = "default",
        default_ttl: Seconds = 3600.0,
        prefix: str = "mcp_hub:",
        timeout: Seconds = 0.5,
        l1_max_entries: int = 1024,
        l1_max_bytes: int = 64 * 1024 * 1024,
        max_key_length: int = 1024,
        max_value_bytes: int = 8 * 1024 * 1024,
        max_value_items: int = 1_000_000,
        policy: Policy | None = None,
        coalesce: Coalesce = "process",
        max_refreshes: int = 32,
        secret_key: str | None = None,
        previous_secret_key: str | None = None,
        on_misconfigured: OnMisconfigured = "serve",
        observer: Observer | None = None,
    ) -> None:
        if on_misconfigured not in ("serve", "raise"):
            raise ValueError(f'on_misconfigured must be "serve" or "raise", not {on_misconfigured!r}')
        self._default_ttl = seconds(default_ttl, "default_ttl")
        self._space = KeySpace(
            prefix,
            namespace,
            max_key_length=_whole(max_key_length, "max_key_length", least=1, most=_MAX_KEY_LENGTH),
        )
        self._key = self._space.entry
        self._counters = Counters()
        # A shortcut tells no observer.
        self._has_shortcuts = observer is None
        self._is_sealed = secret_key is not None
        self._lead_names()
        self._engine = Engine(
            store,
            timeout=seconds(timeout, "timeout"),
            l1_max_entries=_whole(l1_max_entries, "l1_max_entries"),
            l1_max_bytes=_whole(l1_max_bytes, "l1_max_bytes"),
            observers=(self._counters,) if observer is None else (self._counters, observer),
            form=form_of(secret_key, previous_secret_key),
            limits=Limits(
                _whole(max_value_bytes, "max_value_bytes", least=1), _whole(max_value_items, "max_value_items", least=1)
            ),
            prefix=prefix.encode(),
            raises=on_misconfigured == "raise",
        )
        no_fleet = f'coalesce="fleet" needs a store with leases, which {store.name} has not: use Redis or files'
        self._rulebook = Rulebook(policy, self._default_ttl, coalesce, None if isinstance(store, Leases) else no_fleet)
        self._reads = Reads(self._engine)
        self._writes = Writes(self._engine, self._reads)
        self._loads = Loads(
            self._engine, self._reads, self._writes, max_refreshes=_whole(max_refreshes, "max_refreshes")
        )
        self._upkeep = Upkeep(self._engine, self._reads, self._writes)
        if isinstance(store, Evicting):
            store.on_evict = self._counters.eviction

    def __repr__(self) -> str:
        """What it is, without anything secret."""
        return f"<{type(self).__name__} over {self._engine.store.name}, namespace {self._space.namespace!r}>"

    @property
    def namespace(self) -> str:
        """The namespace of this cache's keys."""
        return self._space.namespace

    @property
    def store(self) -> Store:
        """The store behind it."""
        return self._engine.store

    @property
    def stats(self) -> Stats:
        """What was counted since the cache was made, over all its namespaces. Costs nothing."""
        return self._counters.snapshot()

    def _lead_names(self) -> None:
        """Give this cache, or this view of it, a shortcut of its own from names to entries of L1."""
        self._names = Shortcut()
        self._find = self._names.table.get
        self.adopt(self._names)

    def adopt(self, shortcut: Shortcut) -> bool:
        """Count the hits that are had by *shortcut*; False: there are to be none, since an observer must hear all."""
        if self._has_shortcuts:
            self._counters.listen(shortcut)
        return self._has_shortcuts

    def abandon(self, shortcut: Shortcut) -> None:
        """Keep what *shortcut* has counted, and count it no more."""
        self._counters.leave(shortcut)

    def rules(self, policy: Policy | None = None, **changes: Any) -> Rules:
        """Return what *policy*, with *changes* of its options, means for this cache; a change to None is none.

        Raises:
            TypeError: There is no such option, or it is of the wrong type.
            ValueError: An option is out of range, contradicts another, or is nothing that this cache's store can do.
        """
        return self._rulebook.rules(policy, changes)

    @overload
    async def get(self, key: str, default: None = None, *, as_type: type[T]) -> T | None: ...
    @overload
    async def get(self, key: str, default: D, *, as_type: type[T]) -> T | D: ...
    @overload
    async def get(self, key: str, default: object = None, *, as_type: object = Any) -> Any: ...
    # The protocol's overloads to the letter; pyright can't match a union of two type variables with itself.
    async def get(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key: str, default: object = None, *, as_type: object = Any
    ) -> Any:
        try:
            near = self._find(key)
        except TypeError:  # not hashable: no text
            near = None
        if near is not None:
            # ``Near.holds`` spelled out: without that call, a hit takes a fifth less.
            changes = near.changes
            if changes.words[near.at] == near.word and (now := changes.clock()) < near.until and now < changes.until:
                value = near.value
                if value is NOT_SHARED:
                    value = near.read(_classes(as_type))
                if value is not NOT_SHARED:
                    near.visited = True
                    names = self._names
                    names.hits += 1
                    if near.cost:
                        names.saved += near.cost
                    return value
        reads = self._reads
        if not reads.has_l1:
            value = await reads.fetch(self._key(key), NOTHING if as_type is Any else _classes(as_type))
            return default if value is MISS else value
        hit, _ = await reads.look_up(self._engine.session(), self._key(key), _classes(as_type))
        tell_read(hit, self._engine.observers)
        if hit is None:
            return default
        if hit.near is not None and self._has_shortcuts:
            hit.near.alias(self._names.table, key)
        return hit.value

    async def get_many(self, keys: Iterable[str], *, as_type: object = Any) -> dict[str, Any]:
        names = {self._key(key): key for key in _several(keys)}
        values = await self._reads.read_many(list(names), _classes(as_type))
        return {name: values[key] for key, name in names.items() if key in values}

    async def get_entry(self, key: str, *, as_type: object = Any) -> Entry[Any] | None:
        engine = self._engine
        hit, _ = await self._reads.look_up(engine.session(), self._key(key), _classes(as_type))
        tell_read(hit, engine.observers)
        if hit is None:
            return None
        from ._figures import Entry  # noqa: PLC0415  # see there

        head = hit.head
        return Entry(hit.value, head.created, head.fresh_until, head.keep_until, head.cost, hit.tier)

    async def set(
        self,
        key: str,
        value: object,
        *,
        ttl: Seconds | None = None,
        tags: Iterable[str] = (),
        policy: Policy | None = None,
        as_type: object = Any,
    ) -> None:
        store_key, (life_of, all_tags) = self._key(key), self._rulebook.life(ttl, policy, tags)
        codec, payload = self._writes.encode(value, _classes(as_type))
        await self._writes.write(store_key, codec, payload, life_of(value), all_tags)

    async def set_many(
        self,
        mapping: Mapping[str, object],
        *,
        ttl: Seconds | None = None,
        tags: Iterable[str] = (),
        policy: Policy | None = None,
        as_type: object = Any,
    ) -> None:
        classes, (life_of, all_tags) = _classes(as_type), self._rulebook.life(ttl, policy, tags)
        entries = [
            (self._key(key), *self._writes.encode(value, classes), life_of(value)) for key, value in mapping.items()
        ]
        await self._writes.write_many(entries, all_tags)

    async def add(
        self,
        key: str,
        value: object,
        *,
        ttl: Seconds | None = None,
        tags: Iterable[str] = (),
        policy: Policy | None = None,
        as_type: object = Any,
    ) -> bool:
        store_key, (life_of, all_tags) = self._key(key), self._rulebook.life(ttl, policy, tags)
        codec, payload = self._writes.encode(value, _classes(as_type))
        return await self._writes.add(store_key, codec, payload, life_of(value), all_tags)

    async def delete(self, key: str) -> bool:
        return bool(await self._writes.delete_many([self._key(key)]))

    async def delete_many(self, keys: Iterable[str]) -> int:
        return await self._writes.delete_many(list(dict.fromkeys(map(self._key, _several(keys)))))

    async def exists(self, key: str) -> bool:
        return await self._reads.frame(self._key(key)) is not None

    async def ttl(self, key: str) -> float | None:
        frame = await self._reads.frame(self._key(key))
        return None if frame is None else frame.head.fresh_until - self._engine.store.now()

    async def touch(self, key: str, ttl: Seconds) -> bool:
        return await self._writes.touch(self._key(key), seconds(ttl))

    async def get_or_load(
        self,
        key: str,
        loader: Loader[T],
        *,
        policy: Policy | None = None,
        scope: Scope | None = None,
        as_type: object = Any,
        refresh: bool = False,
        share: bool = False,
        label: str | None = None,
        owner: str | None = None,
        observer: Observer | None = None,
        **changes: Unpack[PolicyOptions],
    ) -> T:
        plan = self.plan(
            name=label if label is not None else repr(key)[:80],
            label=label if label is not None else "a get_or_load",
            rules=self.rules(policy, **changes),
            as_type=as_type,
            refresh=refresh,
            share=share,
            owner=owner,
            observer=observer,
        )
        try:
            space = self._space if scope is None else self._scoped(scope)
        except LookupError as unset:
            self._engine.warn_once(f"{plan.label} scope", f"{plan.label} is called uncached: {unset}")
            return await loader()
        value: T = await self._loads.load(space.entry(key), loader, plan)
        return value

    def plan(
        self,
        *,
        name: str,
        label: str,
        rules: Rules,
        as_type: object,
        refresh: bool,
        share: bool,
        owner: str | None,
        observer: Observer | None,
        shortcut: Shortcut | None = None,
    ) -> Plan:
        """Return checked options for ``load``: for who uses the same ones again and again. See ``get_or_load``."""
        observers = self._engine.observers
        return Plan(
            name=name,
            label=label,
            rules=rules,
            takes=Takes(rules.stale_ttl, rules.failures, share),
            classes=_classes(as_type),
            refresh=refresh,
            owner=None if owner is None else _owner(owner),
            observers=observers if observer is None else (*observers, observer),
            shortcut=shortcut,
        )

    def load(
        self,
        key: str,
        loader: Loader[T],
        plan: Plan,
        name: Hashable = None,
        tags: Callable[[], Iterable[str]] = NO_TAGS,
    ) -> Coroutine[Any, Any, T]:
        """``get_or_load`` by a plan.

        Args:
            key: The key.
            loader: What loads it.
            plan: How.
            name: Stands for *key* in the plan's shortcut; None: nothing does.
            tags: Called for tags besides those of the plan.
        """
        return self._loads.load(self._key(key), loader, plan, name, tags)

    async def join(self, flight: Flight, plan: Plan) -> Any:
        """Return what *flight*, found by a shortcut, yields; ``AGAIN``: it is not for this caller."""
        return await self._loads.join(flight, plan) if self._loads.is_here(flight) else AGAIN

    async def invalidate(self, *tags: str) -> bool:
        wanted = as_tags(tags)
        return await self._writes.invalidate(self._space.root, wanted) if wanted else True

    async def keys(self, prefix: str = "") -> AsyncGenerator[str, None]:
        async with aclosing(self._upkeep.scan(self._entries(prefix))) as keys:
            async for key in keys:
                name = self._space.name_of(key)
                if name is not None:
                    yield name

    async def clear(self, *, prefix: str = "", owner: str | None = None) -> int:
        if owner is not None:
            return await self._upkeep.clear_owned(self._entries(prefix), _owner(owner))
        entries = self._entries(prefix)
        # Without a prefix the whole namespace goes, with what is damaged and bears no name any more.
        return await self._upkeep.clear(entries if prefix or self._space.scope else self._space.root)

    def _entries(self, prefix: str) -> bytes:
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a str, not {type(prefix).__name__}")
        return self._key(prefix) if prefix else self._space.entries

    def with_namespace(self, namespace: str) -> Cache:
        return self._view(self._space.other(namespace=namespace))

    def with_scope(self, scope: Scope) -> Cache:
        return self._view(self._scoped(scope))

    def _scoped(self, scope: Scope) -> KeySpace:
        if callable(scope):
            raise TypeError(
                "scope must be a value or a ContextVar here; functions of arguments are for @acached(scope=…)"
            )
        value, outer = argument_bytes(("scope",), (scope_of(scope),)), self._space.scope
        within = digest(outer.encode(), value) if outer else digest(value)
        return self._space.other(scope=within)

    def _view(self, space: KeySpace) -> Cache:
        view = copy.copy(self)
        view._space, view._key = space, space.entry
        view._lead_names()
        # Views come and go, one for each tenant of a moment perhaps; what they have counted is kept.
        weakref.finalize(view, self._counters.leave, view._names).atexit = False
        return view

    async def health_check(self) -> bool:
        return (await self._upkeep.ping()).state == "healthy"

    async def status(self) -> CacheStatus:
        from ._figures import CacheStatus  # noqa: PLC0415  # see there

        state: StoreState = await self._upkeep.ping()
        facts = await self._upkeep.facts()
        if state.state in ("healthy", "degraded"):
            facts["total_keys"] = await self._upkeep.count(self._space.entries)
        if self._is_sealed:
            facts["sealed"] = True
        known = {name: facts.pop(name) for name in list(facts) if name in CacheStatus.FACTS}
        l1_entries, l1_bytes = self._engine.l1_figures()
        return CacheStatus(
            status=state.state,
            backend=self._engine.store.name,
            namespace=self._space.namespace,
            key_prefix=self._space.prefix,
            default_ttl_seconds=self._default_ttl,
            stats=self.stats,
            l1_entries=l1_entries,
            l1_bytes=l1_bytes,
            degraded_since=state.since if state.state == "degraded" else None,
            problem=state.problem,
            facts=facts,
            **known,  # type: ignore[arg-type]  # names checked against FACTS; stores give the types they promise
        )

    async def aclose(self) -> None:
        await self._engine.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _classes(as_type: object) -> ClassSet:
    if as_type is Any:
        return NOTHING
    return as_type if isinstance(as_type, ClassSet) else as_class_set(as_type)


def _several(keys: Iterable[str]) -> Iterable[str]:
    if isinstance(keys, str | bytes):
        raise TypeError("keys must be several keys, not one text; put it in a list")
    return keys


def _owner(owner: str) -> bytes:
    return blake2b(owner.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _whole(value: int, what: str, *, least: int = 0, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be a whole number, not {type(value).__name__}")
    if value < least or (most is not None and value > most):
        raise ValueError(
            f"{what} must be {least} to {most}, not {value}"
            if most
            else f"{what} must be at least {least}, not {value}"
        )
    return value
