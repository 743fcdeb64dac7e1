"""The commands. Each opens the cache that the environment asks for, does one thing, and its exit code says how it went.

A cache hides trouble with its store from the program that uses it; a person at a terminal wants to know. So each
command asks afterwards whether the store did its part, and ends with ``UNHEALTHY`` where it may not have.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from enum import IntEnum
from typing import Annotated, Any, NoReturn

import typer

from mcp_hub_cache import Cache, CacheError, CacheStatus, SettingsError, StoreError, __version__, open_cache

from . import output


class Exit(IntEnum):
    """What the command's exit code means; ``--help`` says the same."""

    OK = 0
    MISS = 1
    USAGE = 2
    UNHEALTHY = 3
    INTERRUPTED = 130
    CLOSED = 141


MAX_STDIN = 256 * 1024 * 1024

app = typer.Typer(
    name="mcp-hub-cache",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    epilog=(
        "Exit codes: 0 done · 1 nothing found under the key · 2 wrong usage or settings · "
        "3 the store can't be reached or refuses · 130 interrupted · 141 output closed"
    ),
)

JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout, for programs.")]
NamespaceOption = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="The namespace to look at; else CACHE_NAMESPACE's.", metavar="NAME"),
]
KeyArgument = Annotated[str, typer.Argument(help="A key, 1 to 1,024 characters.", show_default=False)]


def run() -> None:
    """Run the command; always exits."""
    logging.basicConfig(level=logging.WARNING, format="mcp-hub-cache: %(levelname)s %(message)s", stream=sys.stderr)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)


def _closed() -> Exit:
    # Whoever read our output has gone (``| head``). The interpreter would try to flush once more, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Exit.CLOSED


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Look into the cache, and change it.

    It is the one that your programs use: CACHE_BACKEND, REDIS_URL and so on decide, from the environment or .env.
    """


def _with_cache(work: Callable[[Cache], Coroutine[Any, Any, Exit]], namespace: str | None) -> NoReturn:
    """Run *work* on the cache of the environment; end with the exit code that it answers, or its error's."""

    async def opened() -> Exit:
        async with cache:
            return await work(cache if namespace is None else cache.with_namespace(namespace))

    try:
        cache = open_cache()
        code = asyncio.run(opened())
        sys.stdout.flush()
    except BrokenPipeError:
        # Here, since click would end with 1, which means a miss.
        code = _closed()
    except StoreError as error:
        output.say(str(error))
        code = Exit.UNHEALTHY
    except SettingsError as error:
        for line in str(error).splitlines():
            output.say(line)
        code = Exit.USAGE
    except (CacheError, ValueError) as error:
        output.say(str(error))
        code = Exit.USAGE
    raise typer.Exit(code)


def _refused(cache: Cache) -> list[str]:
    """Which kinds of trouble with the store this command has had."""
    return [kind for kind in cache.stats.errors if kind in _STORE_ERRORS]


async def _answered(cache: Cache, otherwise: Exit) -> Exit:
    """Return *otherwise* where the store did its part, else say what is wrong."""
    refused = _refused(cache)
    if not refused and await cache.health_check():
        return otherwise
    found = await cache.status()
    if found.status != "healthy":
        output.say(_trouble(found))
    else:
        output.say(f"the store did not do all that was asked of it: {found.problem or ', '.join(refused)}")
    return Exit.UNHEALTHY


def _kinds(error: type[StoreError]) -> set[str]:
    return {error.kind}.union(*(_kinds(each) for each in error.__subclasses__()))


_STORE_ERRORS = _kinds(StoreError)


def _trouble(status: CacheStatus) -> str:
    serves = " The standby serves: nothing was changed on the server." if status.status == "degraded" else ""
    return f"{status.backend} is {status.status}: {status.problem or 'it does not answer'}{serves}"


@app.command()
def status(namespace: NamespaceOption = None, to_json: JsonOption = False) -> None:
    """Show how the cache is: state, entries, and what its store tells. Ends with 3 unless it is healthy."""

    async def work(cache: Cache) -> Exit:
        found = await cache.status()
        facts = found.as_dict()
        if to_json:
            output.print_json(facts)
        else:
            counted = {"stats", *found.stats.__dataclass_fields__, "hit_rate", "l1_entries", "l1_bytes"}
            # Counts of this process: it has only just begun.
            output.print_facts(
                f"Cache {found.namespace}", {name: fact for name, fact in facts.items() if name not in counted}
            )
        if found.status == "healthy":
            return Exit.OK
        output.say(_trouble(found))
        return Exit.UNHEALTHY

    _with_cache(work, namespace)


@app.command()
def get(key: KeyArgument, namespace: NamespaceOption = None, to_json: JsonOption = False) -> None:
    """Show the value under KEY: text as it is, everything else as JSON. Ends with 1 where there is none."""

    async def work(cache: Cache) -> Exit:
        entry = await cache.get_entry(key)
        if entry is not None:
            if to_json:
                forever = math.isinf(entry.fresh_until)
                output.print_json(
                    {
                        "key": key,
                        "found": True,
                        "value": entry.value,
                        "created": entry.created,
                        "fresh_until": "forever" if forever else entry.fresh_until,
                    }
                )
            else:
                output.print_value(entry.value)
            return Exit.OK
        code = await _answered(cache, Exit.MISS)
        if code == Exit.MISS:
            if await cache.exists(key):
                output.say(f"{key!r} holds objects of classes that only a program which knows them can rebuild")
            else:
                output.say(f"nothing under {key!r}")
        if to_json:
            output.print_json({"key": key, "found": False})
        return code

    _with_cache(work, namespace)


@app.command("set")
def set_(
    key: KeyArgument,
    value: Annotated[
        str, typer.Argument(help='JSON, or text if it is no JSON; "-" reads standard input.', show_default=False)
    ],
    ttl: Annotated[
        str | None,
        typer.Option(
            "--ttl", help='How long it stays: seconds, "10m", or "forever"; else CACHE_DEFAULT_TTL.', metavar="TTL"
        ),
    ] = None,
    tags: Annotated[
        list[str] | None,
        typer.Option("--tag", help="A mark for invalidate; may be given several times.", metavar="TAG"),
    ] = None,
    as_text: Annotated[bool, typer.Option("--text", help="Store VALUE as text, even if it is JSON.")] = False,
    namespace: NamespaceOption = None,
    to_json: JsonOption = False,
) -> None:
    """Store VALUE under KEY."""

    async def work(cache: Cache) -> Exit:
        text = _read_stdin() if value == "-" else value
        parsed = text if as_text else _parsed(text)
        await cache.set(key, parsed, ttl=None if ttl is None else _ttl(ttl), tags=tags or ())
        code = await _answered(cache, Exit.OK)
        if to_json:
            output.print_json({"key": key, "stored": code == Exit.OK})
        elif code == Exit.OK:
            output.say(f"stored {key!r}")
        return code

    _with_cache(work, namespace)


@app.command()
def delete(
    keys: Annotated[list[str], typer.Argument(help="Keys to remove.", metavar="KEY...", show_default=False)],
    namespace: NamespaceOption = None,
    to_json: JsonOption = False,
) -> None:
    """Remove the entries under each KEY. Ends with 1 where there was none under any."""

    async def work(cache: Cache) -> Exit:
        wanted = list(dict.fromkeys(keys))
        removed = dict(zip(wanted, await asyncio.gather(*map(cache.delete, wanted)), strict=True))
        count = sum(removed.values())
        code = await _answered(cache, Exit.OK if count else Exit.MISS)
        if to_json:
            output.print_json({"deleted": count, "keys": removed})
        else:
            for key in (key for key, there in removed.items() if not there):
                output.say(f"nothing under {key!r}")
            output.say(f"deleted {_entries(count)}")
        return code

    _with_cache(work, namespace)


@app.command()
def invalidate(
    tags: Annotated[list[str], typer.Argument(help="Tags to invalidate.", metavar="TAG...", show_default=False)],
    namespace: NamespaceOption = None,
    to_json: JsonOption = False,
) -> None:
    """Invalidate every entry of the namespace that has one of these tags, however many there are."""

    async def work(cache: Cache) -> Exit:
        wanted = list(dict.fromkeys(tags))
        told = await cache.invalidate(*wanted)
        code = await _answered(cache, Exit.OK)
        if to_json:
            output.print_json({"invalidated": told and code == Exit.OK, "tags": wanted})
        elif code == Exit.OK:
            output.say(f"invalidated {', '.join(map(repr, wanted))}")
        return code

    _with_cache(work, namespace)


@app.command()
def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    namespace: NamespaceOption = None,
    to_json: JsonOption = False,
) -> None:
    """Remove everything in the namespace, and nothing else."""
    if not yes:
        if to_json or not sys.stdin.isatty():
            output.say("clear asks first, and there is nobody to ask: say --yes")
            raise typer.Exit(Exit.USAGE)
        typer.confirm("Remove everything in this namespace?", abort=True, err=True)

    async def work(cache: Cache) -> Exit:
        count = await cache.clear()
        code = await _answered(cache, Exit.OK)
        if to_json:
            output.print_json({"cleared": count})
        else:
            output.say(f"cleared {_entries(count)}")
        return code

    _with_cache(work, namespace)


@app.command("keys")
def keys_(
    prefix: Annotated[str, typer.Argument(help="Only keys that begin with it.", show_default=False)] = "",
    namespace: NamespaceOption = None,
    to_json: JsonOption = False,
) -> None:
    """List the keys, one a line, in no order, as they come. A JSON array that is not closed is not complete."""

    async def work(cache: Cache) -> Exit:
        listing = cache.keys(prefix)
        try:
            count = await output.print_keys(listing, to_json=to_json, complete=lambda: not _refused(cache))
        finally:
            await _aclose(listing)
        if sys.stdout.isatty():
            output.say(f"{count:,} {'key' if count == 1 else 'keys'}")
        return await _answered(cache, Exit.OK)

    _with_cache(work, namespace)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def demo(context: typer.Context) -> None:
    """Let 40 agents question a real MCP server, without the cache and with it. Needs the extra "demo"."""
    try:
        from .demo import main as run_demo
    except ImportError as error:
        output.say(f"the demo needs {error.name}: pip install 'mcp-hub-cache[demo]'")
        raise typer.Exit(Exit.USAGE) from None
    raise typer.Exit(run_demo(context.args))


def _parsed(text: str) -> object:
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return text


def _no_json(name: str) -> NoReturn:
    # Python reads NaN and Infinity; they are no JSON.
    raise ValueError(name)


def _ttl(text: str) -> str | float:
    if text.strip().lower() == "forever":
        return math.inf
    try:
        number = float(text)
    except ValueError:
        return text
    if math.isinf(number):
        raise ValueError('ttl: for no expiry say "forever"')
    return number


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(data) > MAX_STDIN:
        raise ValueError(f"standard input holds more than {MAX_STDIN:,} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError("standard input is not UTF-8 text") from None


async def _aclose(iterator: object) -> None:
    aclose: Callable[[], Awaitable[None]] | None = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()


def _entries(count: int) -> str:
    return f"{count:,} {'entry' if count == 1 else 'entries'}"
