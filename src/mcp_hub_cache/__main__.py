"""``python -m mcp_hub_cache`` is the command ``mcp-hub-cache``."""

from .cli import main

if __name__ == "__main__":
    main()
