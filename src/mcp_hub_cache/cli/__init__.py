"""The ``mcp-hub-cache`` command. It uses the package's public names alone, and needs the extra ``cli``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command with this process's arguments; always exits."""
    try:
        import rich  # noqa: F401 (looked for, so that what is missing is told in words)
        import typer  # noqa: F401
    except ImportError:
        print("mcp-hub-cache: the command needs typer and rich: pip install 'mcp-hub-cache[cli]'", file=sys.stderr)
        sys.exit(2)
    from .app import run

    run()
