"""FAULTS.md, "secrets in logs": no argument, key, value, password or secret in a log, error, repr, status or warning.

Each is an unmistakable text, planted where it belongs; what is said anywhere, through all that can go wrong, is caught
and searched. A key that a caller names himself may stand in what is raised to him, and nowhere else.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import ssl
import subprocess
import sys
import traceback
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mcp_hub_cache import Cache, FileCache, MemoryCache, Policy, RedisCache, SettingsError, acached, open_cache
from mcp_hub_cache import _exceptions as errors
from mcp_hub_cache._settings import load_settings
from mcp_hub_cache.stores.failover import FailoverStore
from mcp_hub_cache.stores.file import FileStore
from mcp_hub_cache.stores.memory import MemoryStore
from mcp_hub_cache.stores.redis import RedisStore
from mcp_hub_cache.testing import FakeClock, FaultyStore
from tests.backends import NAMES, PATIENT, Backend, poll, store_raw, stored
from tests.servers import Server, certificates, free_port, redis_server, valkey_server

pytestmark = pytest.mark.long  # hardly hangs on the interpreter

ARGUMENT = "marked4argument"
VALUE = "marked4value"
KEY = "marked4key"
PASSWORD = "marked4password"
USER_PASSWORD = "marked4user"
SECRET = "marked4secret, with all the characters that it needs"
PREVIOUS = "marked4previous, with all the characters that it needs"
MARKERS = (ARGUMENT, VALUE, KEY, PASSWORD, USER_PASSWORD, "marked4secret", "marked4previous")
TENANT: ContextVar[str] = ContextVar("TENANT")


@dataclass
class Answer:
    text: str


class Stranger:
    """Of no annotation: can't be stored."""

    def __init__(self) -> None:
        self.text = VALUE

    def __repr__(self) -> str:
        return f"Stranger({self.text})"


class Ear:
    """Hears all that is said, and says at the end whether it was too much."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self.heard: list[str] = []
        self.raised: list[str] = []

    def note(self, *things: object) -> None:
        """What a program might print."""
        self.heard.extend(text for thing in things for text in (str(thing), repr(thing)))

    def on_loop(self, _: object, context: dict[str, Any]) -> None:
        self.note(context)

    def of(self, error: BaseException | None) -> None:
        """An error with all that hangs on it, shown or not."""
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            texts = [str(error), repr(error), repr(error.args), *getattr(error, "__notes__", ())]
            self.raised.extend([*texts, repr(vars(error)), *traceback.format_exception(error)])
            if error.__cause__ is not None:
                self.of(error.__cause__)
            error = error.__context__

    async def raises(self, kind: Any, awaitable: Any) -> BaseException:
        with pytest.raises(kind) as caught:
            await awaitable
        self.of(caught.value)
        return caught.value

    def search(self, *, least: int = 1) -> None:
        gc.collect()  # tasks whose errors nobody has asked for say so now
        out, err = self._capture.readouterr()
        said = [*self.heard, out, err]
        for marker in MARKERS:
            assert not [text for text in said if marker in text], marker
            if marker != KEY:
                assert not [text for text in self.raised if marker in text], marker
        assert len(said) + len(self.raised) > least  # there was something to search


@pytest.fixture
def ear(capfd: pytest.CaptureFixture[str]) -> Iterator[Ear]:
    ear = Ear(capfd)

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            ear.note(record.getMessage(), record.args, record.exc_text)
            if record.exc_info and record.exc_info[1] is not None:
                kept, ear.raised = ear.raised, []
                ear.of(record.exc_info[1])
                ear.heard, ear.raised = ear.heard + ear.raised, kept

    root, listener = logging.getLogger(), Listener()
    levels = {name: logging.getLogger(name).level for name in ("", "mcp_hub_cache", "asyncio", "redis")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.DEBUG)
    root.addHandler(listener)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield ear
        ear.note(*(warning.message for warning in warned))
    root.removeHandler(listener)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    ear.search()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@asynccontextmanager
async def caches(*opened: Cache) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for cache in opened:
            await cache.aclose()


async def looked_at(ear: Ear, cache: Cache) -> None:
    """All that a cache tells of itself."""
    ear.note(cache, cache.store, cache.stats, await cache.status(), (await cache.status()).as_dict())
    ear.note(await cache.health_check(), *asyncio.all_tasks())


async def used(ear: Ear, cache: Cache) -> None:
    """All kinds of calls, with all that a caller can do wrong."""

    @acached(cache=cache, ttl=60, tags=[f"{ARGUMENT}:{{query}}"], stale_ttl=60)
    async def search(query: str, limit: int = 1) -> Answer:
        return Answer(VALUE)

    @acached(cache=cache)
    async def strange(query: str) -> Any:
        return Stranger()

    @acached(cache=cache)
    async def again(query: str) -> str:
        return await again(query)

    @acached(cache=cache, scope=TENANT)
    async def scoped(query: str) -> str:
        return VALUE

    @acached(cache=cache, cache_errors={LookupError: 60}, timeout=PATIENT)
    async def failing(query: str) -> str:
        raise LookupError("not found")

    @acached(cache=cache, key="{query}", scope="{query}")
    async def named(query: str) -> str:
        return VALUE

    for spelled in (ARGUMENT, f"{ARGUMENT}\ud800"):
        assert await named(spelled) == VALUE
    await ear.raises(errors.InvalidKeyError, later(lambda: named(ARGUMENT * 1000)))
    await ear.raises(errors.InvalidKeyError, cache.get(f"{ARGUMENT}\ud800"))
    for _ in range(2):
        assert await search(ARGUMENT) == Answer(VALUE)
        assert (await strange(ARGUMENT)).text == VALUE
        assert await scoped(ARGUMENT) == VALUE
        await ear.raises(LookupError, failing(ARGUMENT))
    await search.refresh(ARGUMENT)
    await search.invalidate(ARGUMENT)
    await ear.raises(errors.CircularLoadError, again(ARGUMENT))
    await ear.raises(TypeError, later(lambda: search(ARGUMENT, limit=object())))  # type: ignore[arg-type]
    await ear.raises(TypeError, later(lambda: search(ARGUMENT, 1, ARGUMENT)))  # type: ignore[call-arg]
    ear.note(search, strange, scoped, search.stats(), failing)

    await cache.set(KEY, VALUE, ttl=60, tags=[ARGUMENT])
    assert await cache.get(KEY) in {VALUE, None}  # None: where the store is broken
    ear.note(await cache.get_entry(KEY))
    await ear.raises(errors.UncacheableError, cache.set(KEY, Stranger()))
    await ear.raises(errors.UncacheableError, cache.set(KEY, {"a": [{(1, 2): Stranger()}]}))
    await ear.raises(errors.ValueTooLargeError, cache.set(KEY, VALUE * 1_000_000))
    await ear.raises(errors.InvalidKeyError, cache.get(KEY * 1000))
    await ear.raises(TypeError, cache.set(KEY, VALUE, tags=VALUE))
    await ear.raises(ValueError, cache.set(KEY, VALUE, ttl=-1))

    async def never() -> str:
        await asyncio.sleep(PATIENT)
        return VALUE

    async def itself() -> str:
        value: str = await cache.get_or_load(f"{KEY}:2", itself)
        return value

    await ear.raises(errors.LoadTimeoutError, cache.get_or_load(f"{KEY}:1", never, timeout=0.01))
    await ear.raises(errors.CircularLoadError, cache.get_or_load(f"{KEY}:2", itself))
    assert isinstance(await cache.get_or_load(f"{KEY}:3", stranger), Stranger)
    await cache.get_or_load(f"{KEY}:4", stranger, scope=TENANT)
    waiting = asyncio.ensure_future(cache.get_or_load(f"{KEY}:5", never))
    await poll(lambda: "load" in repr([task.get_name() for task in asyncio.all_tasks()]))
    ear.note(*asyncio.all_tasks())
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def later(call: Callable[[], Any]) -> Any:
    return await call()


async def stranger() -> Any:
    return Stranger()


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("name", NAMES)
async def test_through_hits_misses_mistakes_and_damage(
    ear: Ear, name: str, secret: str | None, tmp_path: Path, server: Server
) -> None:
    asyncio.get_running_loop().set_exception_handler(ear.on_loop)
    backend = Backend(name, tmp_path, server if name == "redis" else None)
    cache = backend.open(secret_key=secret, previous_secret_key=secret and PREVIOUS)
    reader = backend.open(secret_key=secret, l1_max_entries=0)
    async with caches(cache, reader):
        await used(ear, cache)
        await cache.set(KEY, VALUE)
        assert await cache.get(KEY) == VALUE
        frame = await stored(cache, KEY)
        assert frame is not None
        for place in (1, 4, 7, 20, 62, 70, len(frame) - 2):
            await store_raw(cache, KEY, frame[:place] + bytes([frame[place] ^ 1]) + frame[place + 1 :])
            assert await reader.get(KEY) is None
            assert await reader.get_many([KEY]) == {}
        await store_raw(cache, KEY, VALUE.encode())
        assert await reader.get(KEY) is None
        await looked_at(ear, cache)


async def test_through_faults_of_a_store(ear: Ear) -> None:
    asyncio.get_running_loop().set_exception_handler(ear.on_loop)
    causes: list[errors.StoreError] = [
        errors.StoreUnreachableError("down."),
        errors.StoreTimeoutError("slow."),
        errors.StoreFullError("full."),
        errors.StoreAuthError("refused."),
        errors.StoreError.of(KeyError("something else")),
    ]
    for cause in causes:
        store = FaultyStore(MemoryStore())
        for kept in (store, FailoverStore(store, MemoryStore()), FailoverStore(store, None)):
            cache = Cache(kept, secret_key=SECRET)
            async with caches(cache):
                store.break_down(cause)
                await used(ear, cache)
                await cache.delete(KEY)
                await cache.invalidate(ARGUMENT)
                await cache.clear()
                assert [key async for key in cache.keys(KEY)] == []
                await looked_at(ear, cache)
                store.repair()


async def test_a_refresh_that_fails_behind_the_callers_back(ear: Ear) -> None:
    """Its text is the loader's own, and goes to whoever waits for it; where nobody does, to nobody."""
    asyncio.get_running_loop().set_exception_handler(ear.on_loop)
    clock = FakeClock()
    cache = Cache(MemoryStore(clock=clock))
    failed = asyncio.Event()

    async def load() -> str:
        return "old"

    async def fail() -> str:
        failed.set()
        raise RuntimeError(f"no {VALUE} for {ARGUMENT}")

    async with caches(cache):
        policy = Policy(ttl=10, stale_ttl=600, soft_timeout=0)
        await cache.get_or_load(KEY, load, policy=policy)
        clock.advance(20)
        assert await cache.get_or_load(KEY, fail, policy=policy) == "old"
        await failed.wait()
        await poll(lambda: cache.stats.load_errors == 1)
        await looked_at(ear, cache)


def _url(server: Server, password: str = PASSWORD, user: str = "") -> str:
    return f"redis://{user}:{password}@127.0.0.1:{server.port}/0"


async def test_wrong_passwords_on_a_real_server(ear: Ear) -> None:
    asyncio.get_running_loop().set_exception_handler(ear.on_loop)
    with valkey_server(password="the right one") as server:
        server.command("ACL", "SETUSER", "limited", "on", f">{USER_PASSWORD}", "~other:*", "+get")
        unknown = f"redis://nobody:{PASSWORD}@127.0.0.1:{server.port}/0"
        urls = [_url(server), unknown, _url(server, USER_PASSWORD, "limited")]
        opened = [RedisCache(url, timeout=PATIENT, secret_key=SECRET) for url in urls]
        opened.append(RedisCache(server.url, password=PASSWORD, timeout=PATIENT))
        opened.append(
            open_cache(
                cache_backend="redis",
                cache_timeout=PATIENT,
                cache_fallback="none",
                redis_port=server.port,
                redis_password=PASSWORD,
            )
        )
        async with caches(*opened):
            for cache in opened:
                await used(ear, cache)
                await looked_at(ear, cache)
                assert (await cache.status()).status == "misconfigured"
                ear.note(cache.store.__dict__)
        store = RedisStore(_url(server), timeout=PATIENT)
        await ear.raises(errors.StoreAuthError, store.ping())
        await ear.raises(errors.StoreAuthError, store.get_many([KEY.encode()]))
        await store.aclose()


async def test_servers_that_are_not_there(ear: Ear, tmp_path: Path) -> None:
    asyncio.get_running_loop().set_exception_handler(ear.on_loop)
    urls = [
        f"redis://:{PASSWORD}@127.0.0.1:{free_port()}/0",
        f"rediss://someone:{PASSWORD}@127.0.0.1:{free_port()}/0",
        f"redis://:{PASSWORD}@no-such-host.invalid/0",
        f"unix://{tmp_path}/s?password={PASSWORD}",
    ]
    for url in urls:
        cache = RedisCache(url, fallback=FileStore(tmp_path / "standby"), timeout=2.0)
        async with caches(cache):
            await used(ear, cache)
            await looked_at(ear, cache)
        store = RedisStore(url)
        await ear.raises(errors.StoreError, store.ping())
        ear.note(store, store.__dict__)
        await store.aclose()


async def test_tls_that_fails(ear: Ear, tmp_path: Path) -> None:
    pems = certificates(tmp_path, "localhost")
    with redis_server(password=PASSWORD, tls=pems) as server:
        for url in (
            f"rediss://:{PASSWORD}@localhost:{server.tls_port}/0",
            f"rediss://:{PASSWORD}@127.0.0.1:{server.tls_port}/0?ssl_ca_certs={pems.ca}",
            f"rediss://:{PASSWORD}@localhost:{server.port}/0",
            f"redis://:{PASSWORD}@localhost:{server.tls_port}/0",
        ):
            store = RedisStore(url, timeout=3.0)
            await ear.raises(errors.StoreError, store.ping())
            ear.note(store)
            await store.aclose()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE])
async def test_a_disk_that_fails(ear: Ear, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FileCache(tmp_path, timeout=PATIENT)
    async with caches(cache):
        await cache.set(KEY, VALUE)
        really = os.open

        def refused(path: Any, flags: int, *args: Any, **more: Any) -> int:
            if flags & (os.O_CREAT | os.O_WRONLY):
                raise OSError(code, os.strerror(code), path)
            return really(path, flags, *args, **more)

        monkeypatch.setattr(os, "open", refused)
        await cache.set(f"{KEY}:other", VALUE)
        await used_softly(cache)
        await looked_at(ear, cache)
        assert cache.stats.errors
        monkeypatch.undo()


async def used_softly(cache: Cache) -> None:
    async def load() -> str:
        return VALUE

    for number in range(3):
        assert await cache.get_or_load(f"{KEY}:{number}", load) == VALUE
        await cache.delete(f"{KEY}:{number}")


# Settings and addresses

WRONG_URLS = [
    f"redis://:{PASSWORD}@host:port/0",
    f"redis://:{PASSWORD}@host:70000/0",
    f"redis://:{PASSWORD}/more@host/0",
    f"redis://:{PASSWORD}#more@host/0",
    f"redis://:{PASSWORD}@host/{PASSWORD}",
    f"redis://:{PASSWORD}@host/0?{PASSWORD}={PASSWORD}",
    f"redis://host/0?password={PASSWORD}",
    f"http://:{PASSWORD}@host/0",
    f"redis://:{PASSWORD}@[host/0",
    f"rediss://:{PASSWORD}@host/0?ssl_cert_reqs=none",
    f"rediss://:{PASSWORD}@host/0?ssl_check_hostname={PASSWORD}",
    f"redis://:{PASSWORD}@host/0?ssl_ca_certs=x",
    f"redis:{PASSWORD}",
    PASSWORD,
]


@pytest.mark.parametrize("url", WRONG_URLS)
def test_wrong_addresses(ear: Ear, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (RedisCache, RedisStore):
        try:
            ear.note(make(url))
        except ValueError as error:
            ear.of(error)
    monkeypatch.setenv("REDIS_URL", url)
    monkeypatch.setenv("REDIS_SSL", "true")
    monkeypatch.setenv("CACHE_BACKEND", "redis")
    try:
        ear.note(load_settings(), open_cache())
    except (SettingsError, ValueError) as error:
        ear.of(error)


def test_wrong_settings(ear: Ear, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = {
        "CACHE_SECRET_KEY": SECRET[:20],
        "CACHE_SECRET_KEY_PREVIOUS": PREVIOUS[:20],
        "REDIS_PASSWORD": PASSWORD,
        "REDIS_PORT": "x",
        "REDIS_URL": f"redis://:{PASSWORD}@",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    ear.of(caught.value)
    (tmp_path / "settings.env").write_text("\n".join(f"{name}='{value}'" for name, value in wrong.items()))
    for name in wrong:
        monkeypatch.delenv(name)
    with pytest.raises(SettingsError) as caught:
        load_settings(env_file=tmp_path / "settings.env")
    ear.of(caught.value)
    for make in (MemoryCache, RedisCache):
        for options in ({"secret_key": SECRET[:20]}, {"secret_key": SECRET, "previous_secret_key": PREVIOUS[:20]}):
            with pytest.raises(ValueError, match="at least 32") as refused:
                make(**options)
            ear.of(refused.value)


def test_settings_that_are_right(ear: Ear) -> None:
    settings = load_settings(
        cache_secret_key=SECRET,
        cache_secret_key_previous=PREVIOUS,
        redis_password=PASSWORD,
        redis_url=f"redis://user:{USER_PASSWORD}@host/0",
        cache_backend="redis",
    )
    cache = open_cache(settings)
    ear.note(settings, settings.server, settings.model_dump(), cache, cache.store, vars(cache), vars(cache._engine))
    ear.note(vars(cache.store), cache._engine.form, ssl)


# The command


@pytest.mark.parametrize("arguments", [["status"], ["get", "other", "--json"]])
def test_what_the_command_says(ear: Ear, server: Server, arguments: list[str]) -> None:
    for url in (_url(server), f"redis://:{PASSWORD}@127.0.0.1:{free_port()}/0", f"redis://:{PASSWORD}@host:port"):
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-m", "mcp_hub_cache", *arguments],
            env=os.environ | {"CACHE_BACKEND": "redis", "REDIS_URL": url, "CACHE_SECRET_KEY": SECRET},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.stdout or done.stderr
        ear.note(done.stdout, done.stderr)


def test_the_ear_hears(capfd: pytest.CaptureFixture[str]) -> None:
    """A search that can't find anything would prove nothing."""

    def logged() -> None:
        logging.getLogger("mcp_hub_cache").debug("%s", {"a": VALUE})

    def printed() -> None:
        print(ARGUMENT, file=sys.stderr)

    say: list[Callable[[Ear], object]] = [
        lambda ear: ear.note({"k": SECRET}),
        lambda ear: ear.of(_chained()),
        lambda _: logged(),
        lambda _: printed(),
    ]
    for one in say:
        listening = ear.__wrapped__(capfd)  # type: ignore[attr-defined]
        heard = next(listening)
        one(heard)
        with pytest.raises(AssertionError, match="marked4"):
            next(listening)


def _chained() -> Exception:
    error = ValueError("hidden")
    error.__context__, error.__suppress_context__ = KeyError(PASSWORD), True
    return error
