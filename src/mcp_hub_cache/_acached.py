"""``@acached``: a function's arguments become a key, its result an entry.

Strategy: decorating checks everything that can be checked and touches nothing; ``Calls`` does the rest, at the call.

Rules:
- The result is a real async function with attributes. Only methods need a descriptor, which binds the attributes too.
- ``self`` is part of the key through ``__cache_key__`` and in no other way; a class without it is an error.
- An argument without a stable form is an error that names it, at the call.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Protocol, Self, TypeVar, Unpack, overload

from ._async_cache import AsyncCache, MissingType, PolicyOptions
from ._bind import parameters_of
from ._calls import HOW_TO_IDENTIFY, Calls, Options, Scope

if TYPE_CHECKING:
    from ._figures import Stats
    from ._policy import Policy

P = ParamSpec("P")
P2 = ParamSpec("P2")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
S = TypeVar("S")


class Acached(Protocol[P, R_co]):
    """What ``@acached`` makes of an async function: the same call, and more that takes the function's own arguments."""

    __name__: str
    __qualname__: str

    @property
    def __wrapped__(self) -> Callable[P, Coroutine[Any, Any, R_co]]:
        """The function as it was written."""
        ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]:
        """Return the cached value, or call the function and store what it returns.

        Concurrent calls with equal arguments share one call. Raises what the function raises, unchanged; that is not
        stored.

        Cancellation: other callers keep the call; the last to leave cancels it.
        """
        ...

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key that a call with these arguments has in the cache."""
        ...

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, bool]:
        """Remove the entry of these arguments; answer whether there was one. A call in progress stores nothing."""
        ...

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]:
        """Call the function even if there is an entry, store and return the result."""
        ...

    def peek(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co | MissingType]:
        """Return the cached value or ``MISSING``; never calls the function."""
        ...

    def bypass(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]:
        """Call the function; the cache is neither read nor written."""
        ...

    def with_policy(self, policy: Policy | None = None, **changes: Unpack[PolicyOptions]) -> Acached[P, R_co]:
        """Return the same cached function under another policy: the same keys and entries.

        Make it once and keep it, as one decorates once; it counts for itself.

        Args:
            policy: In place of the function's own; None: that one.
            **changes: Options of ``Policy``; None: as in *policy*.
        """
        ...

    def clear(self) -> Coroutine[Any, Any, int]:
        """Remove every entry of this function, answer how many. With ``key=`` it looks into all of the namespace."""
        ...

    def stats(self) -> Stats:
        """Return what was counted for this function in this process."""
        ...

    @overload
    def __get__(self, instance: None, owner: type | None = None, /) -> Self: ...
    @overload
    def __get__(self: Acached[Concatenate[S, P2], R], instance: S, owner: type | None = None, /) -> Acached[P2, R]: ...


class Decorator(Protocol):
    """What ``@acached(...)`` returns."""

    def __call__(self, func: Callable[P, Coroutine[Any, Any, R]], /) -> Acached[P, R]:
        """Decorate *func*."""
        ...


@overload
def acached(func: Callable[P, Coroutine[Any, Any, R]], /) -> Acached[P, R]: ...
@overload
def acached(
    *,
    policy: Policy | None = None,
    cache: AsyncCache | Callable[[], AsyncCache] | None = None,
    namespace: str | None = None,
    key: str | Callable[..., str] | None = None,
    ignore: Iterable[str] = (),
    scope: Scope | None = None,
    version: str | int | None = None,
    share: bool = False,
    **changes: Unpack[PolicyOptions],
) -> Decorator: ...
def acached(
    func: Callable[..., Any] | None = None,
    /,
    *,
    policy: Policy | None = None,
    cache: AsyncCache | Callable[[], AsyncCache] | None = None,
    namespace: str | None = None,
    key: str | Callable[..., str] | None = None,
    ignore: Iterable[str] = (),
    scope: Scope | None = None,
    version: str | int | None = None,
    share: bool = False,
    **changes: Unpack[PolicyOptions],
) -> Any:
    """Cache what an async function returns, by its arguments.

    The return annotation says which classes may be rebuilt from the cache; a result that it can't revive exactly is
    returned and not stored, with one warning in the log. The function runs in a copy of the first caller's context:
    what it reads from context variables must be in ``scope``.

    Args:
        func: The async function, where the decorator is used bare.
        policy: How results are kept, refreshed and shared; None: as the cache is set.
        cache: A cache, or a function that returns one at the call; None: the running loop's default cache, from the
            environment.
        namespace: Keep the entries in this namespace of the cache.
        key: The key itself: a template such as ``"user:{user_id}"``, or a function of the same arguments that returns
            text.
        ignore: Parameters that make no difference to the result.
        scope: Whose result it is (tenant, user, agent run): a value, a context variable, a template of arguments such
            as ``"{tenant_id}"``, or a function of them. Part of every key.
        version: Change it when the function's meaning changes: old entries are then no longer found.
        share: Callers promise not to change results, and may be handed the same object as others: a hit in the near
            cache then costs no decoding. Without it every caller gets a copy of its own.
        **changes: Options of ``Policy`` (``ttl="10m"``, ``stale_ttl``, ``cache_if``, …), in place of the policy's. A
            tag may be a template of arguments, as ``str`` shows them: ``tags=["user:{user_id}"]``.

    Raises:
        TypeError: *func* is not an async function that can be cached, or an option is none; the message says what to
            do.
        ValueError: An option is out of range, contradicts another, or names no parameter.

    Example:
        >>> @acached(ttl="10m")
        ... async def search(query: str, limit: int = 10) -> list[str]: ...
    """
    options = Options(
        policy=_policy(policy, changes),
        cache=cache,
        namespace=namespace,
        key=key,
        ignore=frozenset((ignore,) if isinstance(ignore, str) else ignore),
        scope=scope,
        version=version,
        share=share,
    )
    options.check()
    if func is not None:
        return _decorate(func, options, sys._getframe(1))  # noqa: SLF001  # for classes local to who decorates
    return lambda func: _decorate(func, options, sys._getframe(1))  # noqa: SLF001


def _policy(policy: Policy | None, changes: Mapping[str, Any]) -> Policy:
    from ._policy import changed  # noqa: PLC0415  # decorating needs it, importing the package does not

    return changed(policy, changes)


def _decorate(func: Any, options: Options, frame: FrameType) -> Any:
    if isinstance(func, staticmethod):
        return staticmethod(_decorate(func.__func__, options, frame))
    _refuse_what_cannot_be(func)
    wrapper, calls = _made(func, options, _local_classes(func, frame))
    return _Method(wrapper, calls) if calls.is_method else wrapper


def _made(func: Any, options: Options, names: Mapping[str, object]) -> tuple[Any, Calls]:
    calls = Calls(func, options, is_method=_is_method(func), names=names)
    wrapper = _wrapper(func, calls)

    def with_policy(policy: Policy | None = None, **changes: Any) -> Any:
        other = _policy(options.policy if policy is None else policy, changes)
        return _made(func, options._replace(policy=other), names)[0]

    wrapper.with_policy = with_policy
    return wrapper, calls


def _local_classes(func: Any, frame: FrameType | None) -> dict[str, object]:
    """The local classes that the return annotation may name: of the function around *func* and class bodies in it."""
    found: dict[str, object] = {}
    while "<locals>" in func.__qualname__ and frame is not None:
        found = {name: item for name, item in frame.f_locals.items() if isinstance(item, type)} | found
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a function; a class body has no fast locals
            break
        frame = frame.f_back
    return found


def _refuse_what_cannot_be(func: Any) -> None:
    name = getattr(func, "__qualname__", None) or type(func).__name__
    if isinstance(func, classmethod) or (_in_class(func) and _first_parameter(func) == "cls"):
        raise TypeError(
            f"@acached can't be used with @classmethod on {name}: make it a static method or a module's function."
        )
    if inspect.isasyncgenfunction(func):
        raise TypeError(
            f"{name} is an async generator; @acached caches single results. Collect the items and return a list."
        )
    if not inspect.iscoroutinefunction(func):
        raise TypeError(
            f"@acached needs an async function, and {name} is none. Declare it with `async def`; if it blocks, let it "
            "`return await asyncio.to_thread(...)`."
        )
    if not inspect.isfunction(func) and not hasattr(func, "__code__"):
        raise TypeError(
            f"@acached needs a function, not the {type(func).__name__} {name}: what is bound to it already could not "
            "be part of the key. Decorate the function or method where it is defined."
        )
    if inspect.ismethod(func):
        raise TypeError(f"{name} is bound to an instance already. Decorate it in its class.")


def _first_parameter(func: Any) -> str | None:
    try:
        return next((parameter.name for parameter in parameters_of(func)), None)
    except (TypeError, ValueError):
        return None


def _in_class(func: Any) -> bool:
    owner = getattr(func, "__qualname__", "").rpartition(".")[0]
    return bool(owner) and not owner.endswith("<locals>")


def _is_method(func: Any) -> bool:
    return _in_class(func) and _first_parameter(func) == "self"


def _wrapper(func: Callable[..., Any], calls: Calls) -> Any:
    async def any_call(*args: Any, **kwargs: Any) -> Any:
        return await calls.call(args, kwargs)

    wrapper: Any = functools.wraps(func)(calls.shortcut() or any_call)

    async def bypass(*args: Any, **kwargs: Any) -> Any:
        return await func(*args, **kwargs)

    async def refresh(*args: Any, **kwargs: Any) -> Any:
        return await calls.call(args, kwargs, refresh=True)

    async def invalidate(*args: Any, **kwargs: Any) -> bool:
        return await calls.invalidate(args, kwargs)

    async def peek(*args: Any, **kwargs: Any) -> Any:
        return await calls.peek(args, kwargs)

    def key(*args: Any, **kwargs: Any) -> str:
        return calls.public_key(args, kwargs)

    extras: dict[str, Any] = {
        "key": key,
        "invalidate": invalidate,
        "refresh": refresh,
        "peek": peek,
        "bypass": bypass,
        "clear": calls.clear,
        "stats": calls.counters.snapshot,
    }
    for name, extra in extras.items():
        if name in _TAKING_ARGUMENTS:
            extra.__wrapped__ = func  # whose signature it has
        setattr(wrapper, name, extra)
    return wrapper


_TAKING_ARGUMENTS: Final = ("key", "invalidate", "refresh", "peek", "bypass")


class _Bound(functools.partial[Any]):
    """A decorated method on an instance. A partial, so that ``inspect.iscoroutinefunction`` sees through it."""

    def __init__(self, wrapper: Any, instance: object, /) -> None:
        functools.update_wrapper(self, wrapper, updated=())
        self.__wrapped__ = functools.partial(wrapper.__wrapped__, instance)  # its signature has no ``self``
        for name in _TAKING_ARGUMENTS:
            setattr(self, name, functools.partial(getattr(wrapper, name), instance))
        self.clear = wrapper.clear
        self.stats = wrapper.stats
        self._wrapper, self._instance = wrapper, instance

    def with_policy(self, policy: Policy | None = None, **changes: Any) -> Any:
        """See ``Acached``."""
        return _Bound(self._wrapper.with_policy(policy, **changes), self._instance)


class _Method(staticmethod):  # type: ignore[type-arg]  # generic for type checkers only
    """A decorated method in its class.

    A ``staticmethod``, since frameworks that collect attributes (pydantic) leave those alone.
    """

    def __init__(self, wrapper: Any, calls: Calls) -> None:
        super().__init__(wrapper)
        self._calls = calls

    def __set_name__(self, owner: type, name: str) -> None:
        # Before 3.12 an error here would reach the user as a RuntimeError; there the first call tells.
        if sys.version_info >= (3, 12) and not hasattr(owner, "__cache_key__"):
            raise TypeError(f"{owner.__qualname__}.{name} can't be cached: {HOW_TO_IDENTIFY}.")

    def __get__(self, instance: object | None, owner: type | None = None, /) -> Any:
        function = self.__func__
        return function if instance is None else _Bound(function, instance)
