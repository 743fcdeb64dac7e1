"""The layers, held: what imports what, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mcp_hub_cache

PACKAGE = Path(mcp_hub_cache.__file__).parent

# A module may import from lower layers only: those further down in this list. Modules of one layer know nothing of each
# other. A folder stands for all its modules, which may import each other.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"__init__", "testing"},
    {"_acached"},
    {"_calls"},
    {"_open"},
    {"_cache"},
    {"_identity", "_load", "_upkeep"},
    {"_leader"},
    {"_turn"},
    {"_trip"},
    {"_shortcut", "_writes"},
    {"_reads"},
    {"_engine"},
    {"_use"},
    {"_keys", "_leases", "_marks", "_near", "_rules", "_settings", "stores"},
    {"_policy", "_settings_values"},
    {"_failures"},
    {"_codec"},
    {"_revive"},
    {"_tagged"},
    {"_classes", "_current", "_placeholders"},
    {"_async_cache", "_tags"},
    {"_form"},
    {"_budget", "_direct", "_seal"},
    {"_bind", "_flight", "_frame", "_l1", "_lifetime", "_lines", "_protocols", "_shapes", "_stats"},
    {"_lane"},
    {
        "_answer",
        "_figures",
        "_batches",
        "_blake",
        "_changes",
        "_durations",
        "_exceptions",
        "_freshness",
        "_steady",
        "_steps",
        "_tokens",
    },
]
RANKS = {module: len(LAYERS) - rank for rank, layer in enumerate(LAYERS) for module in layer}

# Each of these is imported by the modules named, and by no other.
DRIVERS: dict[str, set[str]] = {
    "aiofiles": {"stores/file"},
    "cryptography": {"_seal"},
    "dotenv": {"_settings"},
    "hiredis": {"stores/_redis_link"},
    "mcp": {"cli"},
    "msgspec": set(),
    "orjson": {"_tagged"},
    "pydantic": {"_settings"},
    "pydantic_settings": {"_settings"},
    "redis": {"stores/_redis_driver"},
    "rich": {"cli"},
    "typer": {"cli"},
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def layer(module: str) -> str:
    return module.partition("/")[0]


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """The modules that *path* imports, anywhere in it: ours as ``./module/…``, others by their first name."""
    typing_only: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            typing_only.update(inner for statement in node.body for inner in ast.walk(statement))
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["mcp_hub_cache", *name(path).split("/")][: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            # "from . import _x" names modules; "from ._x import y" names things in one.
            names = [".".join([*base, alias.name]) for alias in node.names] if not node.module else [".".join(base)]
        else:
            continue
        for imported_name in names:
            first, *rest = imported_name.split(".")
            yield ("./" + ("/".join(rest) or "__init__") if first == "mcp_hub_cache" else first), node.lineno


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_point_downwards(path: Path) -> None:
    module = layer(name(path))
    assert module in RANKS, f"{name(path)} has no layer: give it one in LAYERS"
    for target, line in imported(path):
        if target.startswith("./") and (below := layer(target[2:])) != module:
            assert below in RANKS, f"{name(path)}:{line} imports {target[2:]}, which is no module or has no layer"
            assert RANKS[below] < RANKS[module], f"{name(path)}:{line} imports {target[2:]}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_each_driver_is_imported_in_its_place_alone(path: Path) -> None:
    for target, line in imported(path):
        if (allowed := DRIVERS.get(target)) is not None:
            assert {name(path), layer(name(path))} & allowed, f"{name(path)}:{line} imports {target}"


def test_every_layer_names_modules_that_are_there() -> None:
    there = {layer(name(path)) for path in MODULES}
    assert set(RANKS) == there


def fresh(code: str) -> str:
    """What a fresh process prints that runs *code*."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_no_driver() -> None:
    loaded = fresh("import sys, mcp_hub_cache; print(*sys.modules)").split()
    slow = {"aiofiles", "anyio", "hiredis", "mcp", "msgspec", "pydantic", "pydantic_settings", "redis", "rich", "typer"}
    assert slow.isdisjoint(loaded)


def newly_loaded(code: str) -> set[str]:
    """What *code* imports in a fresh process, beyond what asyncio, inspect and typing do."""
    before = "import asyncio, inspect, sys, typing; before = set(sys.modules)"
    return set(fresh(f"{before}\n{code}\nprint(*sys.modules.keys() - before)").split())


# No value's type is imported before there is such a value, no digest of OpenSSL's, nothing of the cli's.
UNUSED = {
    "ctypes", "decimal", "email", "fractions", "hashlib", "http", "importlib.metadata", "logging.config", "random",
    "secrets", "statistics", "tempfile", "unittest", "zoneinfo", "mcp_hub_cache._figures", "mcp_hub_cache._settings",
}  # fmt: skip


def test_importing_the_package_loads_what_decorating_takes() -> None:
    loaded = newly_loaded("import mcp_hub_cache; mcp_hub_cache.acached(ttl='10m', namespace='a')(asyncio.sleep)")
    assert loaded.isdisjoint(UNUSED | {"ipaddress", "pathlib", "urllib"})
    ours = {each for each in loaded if each.startswith("mcp_hub_cache.")}
    assert ours.isdisjoint({f"mcp_hub_cache.{each}" for each in ("_cache", "_engine", "_frame", "_open", "stores")})


def test_a_cache_that_nobody_made_loads_no_store() -> None:
    loaded = newly_loaded("from mcp_hub_cache import Cache, FileCache, RedisCache, open_cache")
    assert loaded.isdisjoint(UNUSED | {"mcp_hub_cache.stores.redis", "redis", "pydantic"})


def test_names_for_later_are_there_when_asked_for() -> None:
    code = """
import mcp_hub_cache
assert set(mcp_hub_cache.__all__) <= set(dir(mcp_hub_cache)) and "Cache" not in vars(mcp_hub_cache)
from mcp_hub_cache import *
assert open_cache is mcp_hub_cache.open_cache is vars(mcp_hub_cache)["open_cache"] and issubclass(FileCache, Cache)
try:
    mcp_hub_cache.open_cahce
except AttributeError as error:
    print(error)
"""
    assert fresh(code).strip() == "module 'mcp_hub_cache' has no attribute 'open_cahce'"


def test_importing_the_package_starts_nothing() -> None:
    code = "import threading, mcp_hub_cache; print(threading.active_count())"
    assert fresh(code).strip() == "1"


def test_all_is_complete() -> None:
    names = mcp_hub_cache.__all__
    machinery = {"TYPE_CHECKING", "annotations", "cli", "import_module", "stores", "testing"}
    assert {n for n in dir(mcp_hub_cache) if not n.startswith("_")} - set(names) <= machinery
    assert sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name)) == names
    for each in names:
        assert getattr(mcp_hub_cache, each) is not None
