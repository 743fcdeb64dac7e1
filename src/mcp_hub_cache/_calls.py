"""The calls of one decorated function: their options, their keys, and their way to the cache.

Strategy: what can be checked is checked when the function is decorated. What needs the module to be complete (the
return annotation) or a loop to run (the default cache) waits for the first call.

Rules:
- A key covers whose result it is (``scope``), which instance answers (``__cache_key__``), the function's version and
  result type, and every argument that is not ignored. It shows the function's name alone, unless ``key=`` says more.
- An unset scope variable means uncached, said once.
- Everything goes through the ``AsyncCache`` protocol: any cache will do.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ._async_cache import MISSING, AsyncCache
from ._bind import bind, bound_names, template
from ._classes import ClassSet, return_annotation
from ._identity import identify, own_key
from ._keys import KeySpace, argument_bytes, digest, function_name, namer, scope_of
from ._shortcut import AGAIN, Shortcut, generate, name_of
from ._stats import Counters
from ._tags import as_tags

if TYPE_CHECKING:
    from ._cache import Cache
    from ._policy import Policy
    from ._trip import Plan

log = logging.getLogger("mcp_hub_cache")

_UNSET: Final = object()
Scope = str | int | ContextVar[Any] | Callable[..., object]
HOW_TO_IDENTIFY: Final = (
    "say how its instances are identified: give it a `__cache_key__` attribute, property or method whose value tells "
    "apart what has different results (for an API client perhaps its base URL and tenant)"
)


class Options(NamedTuple):
    """What ``acached`` was given; see there. *changes*: the options of ``Policy``."""

    policy: Policy | None
    changes: Mapping[str, Any]
    cache: AsyncCache | Callable[[], AsyncCache] | None
    namespace: str | None
    key: str | Callable[..., str] | None
    ignore: frozenset[str]
    scope: Scope | None
    version: str | int | None
    share: bool

    def check(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for what can't be."""
        if self.namespace is not None:
            KeySpace(namespace=self.namespace)
        if self.cache is not None and not isinstance(self.cache, AsyncCache) and not callable(self.cache):
            raise TypeError(f"cache must be a cache or a function that returns one, not {type(self.cache).__name__}")
        if self.key is not None and not isinstance(self.key, str) and not callable(self.key):
            raise TypeError(f"key must be a template or a function, not {type(self.key).__name__}")
        if inspect.iscoroutinefunction(self.key) or inspect.iscoroutinefunction(self.scope):
            raise TypeError(
                "key and scope must be plain functions: they are called for the key, before anything is awaited"
            )
        if self.scope is not None and not isinstance(self.scope, str | int | ContextVar) and not callable(self.scope):
            raise TypeError(f"scope must be a value, a ContextVar or a function, not {type(self.scope).__name__}")
        rules: Any = getattr(self.cache, "rules", None) if isinstance(self.cache, AsyncCache) else None
        if rules is not None:
            rules(self.policy, **self.changes)  # what it can't do is said now
        else:
            from ._policy import changed  # noqa: PLC0415  # decorating needs it, importing the package does not

            changed(self.policy, self.changes)

    def tags(self) -> tuple[str, ...]:
        """Those of the function; of a cache's own policy, it is the cache that knows."""
        given = self.changes.get("tags")
        if given is not None:
            return as_tags(given)
        return () if self.policy is None else tuple(self.policy.tags)


class _Plans(NamedTuple):
    """How a function is called through a cache of ours."""

    cache: Cache
    load: Plan
    refresh: Plan


class _Uncached(Exception):  # noqa: N818  # control flow within this module
    """This call has no key."""


class Calls:
    """The calls of one decorated function: their keys, their cache, their figures."""

    def __init__(
        self,
        func: Callable[..., Any],
        options: Options,
        *,
        is_method: bool,
        names: Mapping[str, object] | None,
        like: Calls | None = None,
    ) -> None:
        self.func = func
        self._like = like  # whose keys these are
        self.options = options
        self.is_method = is_method
        self.readable = function_name(func).readable
        self.counters = Counters()
        self._names = names
        self._views: dict[int, tuple[AsyncCache, AsyncCache]] = {}
        self._scope_warned = False
        self._makes_cache = not isinstance(options.cache, AsyncCache)  # asked once: it is slow
        self._parameters = bound_names(func, ignore=options.ignore, skip_first=is_method)
        self._bind = bind(func, ignore=options.ignore, skip_first=is_method)
        self._shortcut = Shortcut()
        self._count_no_more: weakref.finalize[Any, Any] | None = None
        self._plans: _Plans | None = None
        self.counters.listen(self._shortcut)
        self._template: Callable[..., str] | None = None
        if isinstance(options.key, str):
            self._template = template(options.key, func, skip_first=is_method)
        self._scope_template: Callable[..., str] | None = None
        if isinstance(options.scope, str) and "{" in options.scope:
            self._scope_template = template(options.scope, func, skip_first=is_method, what="scope")
        # Of the tags, those that depend on arguments; the rest are the policy's for every call.
        self._changes, tags = options.changes, options.tags()
        # Who invalidates a tag writes it as plain text, so nothing in it is escaped.
        self._tags = tuple(
            [template(tag, func, skip_first=is_method, what="tag", plain=True) for tag in tags if "{" in tag]
        )
        self._fixed_tags = tuple([tag for tag in tags if "{" not in tag])
        if self._tags:
            self._changes = {**options.changes, "tags": self._fixed_tags}

    # What waits for the first call

    @functools.cached_property
    def identity(self) -> str:
        """What tells the function from all others."""
        return identify(self.func) if self._like is None else self._like.identity

    @functools.cached_property
    def classes(self) -> ClassSet:
        """The classes that results may hold."""
        returned = return_annotation(self.func, self._names)
        classes = returned.classes()
        if returned.problem is not None or classes.unresolved:
            what = returned.problem or ", ".join(classes.unresolved)
            log.warning(
                "the return annotation of %s can't be evaluated (%s): only results of plain types are cached",
                self.readable,
                what,
            )
        return classes

    @functools.cached_property
    def root(self) -> str:
        """What the keys of this function begin with."""
        return f"{self.readable}.{digest(*self._meaning)[:12]}:"

    @functools.cached_property
    def _meaning(self) -> tuple[bytes, ...]:
        """What tells this function's results from all others', apart from the arguments."""
        return (self.identity.encode(), self.classes.fingerprint.encode(), self._version)

    @functools.cached_property
    def _name(self) -> Callable[[tuple[Any, ...]], str]:
        """Makes the key of bound arguments, to which ``key`` adds what else tells calls apart."""
        return namer(self.root[:-1], self._meaning, (*self._parameters, "scope", "__cache_key__"))

    async def cache(self) -> AsyncCache:
        """The cache of this call."""
        given: Any = self.options.cache
        if given is None:
            from ._open import default_cache  # noqa: PLC0415  # the layer above: it makes caches

            cache: AsyncCache = await default_cache()
        else:
            cache = given() if self._makes_cache else given
        if cache is not self._shortcut.cache:
            self._lead_to(cache)
        return self._view(cache)

    def _view(self, cache: AsyncCache) -> AsyncCache:
        if self.options.namespace is None:
            return cache
        view = self._views.get(id(cache))
        if view is None or view[0] is not cache:
            view = self._views[id(cache)] = (cache, cache.with_namespace(self.options.namespace))
        return view[1]

    # The shortcut

    def shortcut(self) -> Callable[..., Any] | None:
        """A wrapper that takes the shortcut to the near cache (``_shortcut``); None: there is none."""
        options = self.options
        scope = options.scope if isinstance(options.scope, ContextVar) else None
        asks_more = self.is_method or callable(options.key) or callable(options.scope) or self._scope_template
        if asks_more or (self._makes_cache and options.cache is not None):
            return None
        return generate(
            self.func,
            self._call_by_name,
            self._shortcut,
            ignore=options.ignore,
            scope=scope,
            classes=lambda: self.classes,
            share=options.share,
            default=options.cache is None,
        )

    def _lead_to(self, cache: AsyncCache) -> None:
        """Let the shortcut lead to *cache*, and no longer to another."""
        self._shortcut.lead_to(cache)
        if self._count_no_more is not None:
            self._count_no_more()
            self._count_no_more = None
        self._plans = None
        from ._cache import Cache  # noqa: PLC0415  # decorating needs no engine, calling does

        if not isinstance(cache, Cache):
            return
        view = self._view(cache)
        assert isinstance(view, Cache)
        if counted := cache.adopt(self._shortcut):
            # Functions come and go; what they have counted is kept, and nothing else of them.
            self._count_no_more = weakref.finalize(self, cache.abandon, self._shortcut)
            self._count_no_more.atexit = False
        make = functools.partial(
            view.plan,
            name=self.readable,
            label=self.readable,
            rules=view.rules(self.options.policy, **self._changes),
            as_type=self.classes,
            share=self.options.share,
            owner=self._owner,
            observer=self.counters,
        )
        self._plans = _Plans(
            view, make(refresh=False, shortcut=self._shortcut if counted else None), make(refresh=True)
        )

    async def _call_by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The full path, by which shortcuts are found."""
        bound = self._bind(*args, **kwargs)
        scope = self.options.scope
        name = name_of((scope.get(_UNSET), *bound) if isinstance(scope, ContextVar) else bound)
        if name is not None:
            if self._plans is None or self._makes_cache:
                await self.cache()  # flights of another one are forgotten by this
            flight = self._shortcut.flights.get(name)
            if flight is not None and self._plans is not None:
                found = await self._plans.cache.join(flight, self._plans.load)
                if found is not AGAIN:
                    return found
        return await self.call(args, kwargs, bound=bound, name=name)

    # Keys

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any], bound: tuple[Any, ...] | None = None) -> str:
        """Return the key of a call. *bound*: the arguments, where they are bound already.

        Raises:
            _Uncached: The scope variable is not set.
            UncacheableError: An argument has no stable form.
        """
        scope = self._scope(args, kwargs)
        if self.options.key is None:
            values = self._bind(*args, **kwargs) if bound is None else bound
            return self._name((*values, scope, self._own(args)))
        text = self._template(*args, **kwargs) if self._template is not None else self._by_function(args, kwargs)
        extra = (scope, self._version.decode("latin-1"), self._own(args))
        return f"{text}:{digest(*(part.encode() for part in extra))}" if any(extra) else text

    def _by_function(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        assert callable(self.options.key)
        text = self.options.key(*args, **kwargs)
        if not isinstance(text, str):
            raise TypeError(f"the key function of {self.readable} must return text, not {type(text).__name__}")
        return text

    @functools.cached_property
    def _version(self) -> bytes:
        return b"" if self.options.version is None else argument_bytes(("version",), (self.options.version,))

    def _own(self, args: tuple[Any, ...]) -> str:
        """What identifies the instance that a method is called on; text, which is the quickest part of a key."""
        if not self.is_method:
            return ""
        if not args:
            raise TypeError(f"{self.readable} is a method: call it on an instance")
        instance = args[0]
        owner = type(instance)
        if not hasattr(owner, "__cache_key__"):
            raise TypeError(f"{self.readable} can't be cached for {owner.__qualname__}: {HOW_TO_IDENTIFY}.")
        return digest(argument_bytes(("class", "__cache_key__"), own_key(instance)))

    def _scope(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        scope = self.options.scope
        if scope is None:
            return ""
        try:
            value = scope_of(scope)
        except LookupError as unset:
            raise _Uncached(str(unset)) from None
        if self._scope_template is not None:
            value = self._scope_template(*args, **kwargs)
        elif callable(scope):
            value = scope(*args, **kwargs)
        return digest(argument_bytes(("scope",), (value,)))

    def _said_uncached(self, reason: _Uncached) -> None:
        if not self._scope_warned:
            self._scope_warned = True
            log.warning("%s is called uncached: %s", self.readable, reason)

    # Calls

    async def call(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        refresh: bool = False,
        bound: tuple[Any, ...] | None = None,
        name: Hashable = None,
    ) -> Any:
        """The cached call. *name* stands for its arguments in the shortcut; None: nothing does."""
        try:
            key = self.key(args, kwargs, bound)
        except _Uncached as reason:
            self._said_uncached(reason)
            return await self.func(*args, **kwargs)
        loader = functools.partial(self.func, *args, **kwargs)
        tags = functools.partial(self._tags_of, args, kwargs) if self._tags else tuple
        plans = self._plans
        if plans is None or self._makes_cache:
            cache = await self.cache()
            plans = self._plans
            if plans is None:
                changes = {**self._changes, "tags": (*self._fixed_tags, *tags())} if self._tags else self._changes
                return await cache.get_or_load(
                    key,
                    loader,
                    policy=self.options.policy,
                    as_type=self.classes,
                    refresh=refresh,
                    share=self.options.share,
                    label=self.readable,
                    owner=self._owner,
                    observer=self.counters,
                    **changes,
                )
        return await plans.cache.load(key, loader, plans.refresh if refresh else plans.load, name, tags)

    def _tags_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        """The tags of a call that depend on its arguments."""
        return as_tags(render(*args, **kwargs) for render in self._tags)

    @property
    def _owner(self) -> str | None:
        return self.identity if self.options.key is not None else None

    async def invalidate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Remove the entry of a call."""
        try:
            key = self.key(args, kwargs)
        except _Uncached:
            return False
        return await (await self.cache()).delete(key)

    async def peek(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The entry of a call, or MISSING."""
        try:
            key = self.key(args, kwargs)
        except _Uncached:
            return MISSING
        return await (await self.cache()).get(key, MISSING, as_type=self.classes)

    async def clear(self) -> int:
        """Remove every entry of the function."""
        cache = await self.cache()
        if self.options.key is not None:
            return await cache.clear(owner=self.identity)
        return await cache.clear(prefix=self.root)

    def public_key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The key of a call, for people."""
        try:
            return self.key(args, kwargs)
        except _Uncached as reason:
            raise LookupError(f"this call has no key: {reason}") from None
