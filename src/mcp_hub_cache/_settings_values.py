"""What settings hold, read and shown: durations, sizes, addresses. Pure.

What can't be read is a ``ValueError`` that nobody sees: whoever asks words it for people (``_settings``). What is shown
never holds a secret, nor what may be a piece of one.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final
from urllib.parse import urlsplit

from ._durations import seconds

SECRET: Final = frozenset(
    {"cache_secret_key", "cache_secret_key_previous", "redis_password", "redis_sentinel_password"}
)
"""The settings that are never shown."""

_SCHEMES: Final = ("redis", "rediss", "unix", "sentinel", "sentinels")
HOSTS: Final = re.compile(r"(?:(?:\[[0-9A-Fa-f:.]+\]|[^\s,:/@?#\[\]]+)(?::\d{1,5})?(?:\s*,\s*|$))+")
"""One or several, with or without a port; an IPv6 address in brackets."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?", re.ASCII | re.IGNORECASE)
_NO_DATABASE = re.compile(r"^((?:redis|rediss)://[^/?#]*/)(?=[^?#]*[^\d?#])[^?#]*")
_NO_OPTION = re.compile(r"([?&])(?![a-z_]*(?:[=&#]|$))[^&#]*")
_QUERY_SECRET = re.compile(r"(?i)((?:password|secret|token)[^=&]*=)[^&#]*")


def lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _duration(value: object) -> float:
    """Seconds from a number, numeric text, or text with units."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
        else:
            if math.isinf(value):
                raise ValueError("infinite")
    return seconds(value)


def ttl(value: object) -> float:
    return math.inf if lower(value) == "forever" or value == math.inf else _duration(value)


def finite(value: object) -> float:
    result = _duration(value)
    if math.isinf(result):
        raise ValueError("infinite")
    return result


def size(value: object) -> int:
    """Bytes from an int or text: KB, MB, GB and TB are powers of 1,000; KiB, MiB, GiB and TiB of 1,024."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number, unit, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("no size")


def revealed(value: Any) -> object:
    """Return what a secret holds, and anything else as it is."""
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


def url(value: object) -> object:
    text = revealed(value)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError("no text")  # noqa: TRY004 (pydantic turns ValueErrors alone into its own)
    parts = urlsplit(text)
    hosts = parts.netloc.rpartition("@")[2]
    if parts.scheme.startswith("sentinel") or "," in hosts:
        path = r"(/[^/@]*(/\d*)?)?" if parts.scheme.startswith("sentinel") else r"/?\d*"
        if parts.scheme not in _SCHEMES or not HOSTS.fullmatch(hosts) or not re.fullmatch(path, parts.path):
            raise ValueError("no list of hosts")
        return value
    if parts.scheme not in _SCHEMES or not (parts.path if parts.scheme == "unix" else parts.hostname):
        raise ValueError("no URL of a server")
    if parts.scheme != "unix" and not re.fullmatch(r"/?\d*", parts.path):
        raise ValueError("no database")  # most often a password with a / that is not percent-encoded
    if parts.port == 0:  # reading it checks that it is a number
        raise ValueError("no port")
    return value


def held(field: str, value: object) -> str:
    if field in SECRET:
        return "***"
    text = str(revealed(value))
    if field == "redis_url" and "://" not in text:
        return "***"  # it may be a password put into the wrong variable
    text = redacted(text)
    return repr(text if len(text) <= 80 else text[:79] + "…")


def redacted(text: str) -> str:
    """Return *text* with what stands before a URL's last @, and secrets in its query, replaced."""
    before, at, behind = text.rpartition("@")
    if at:
        scheme, slashes, _ = before.partition("://")
        text = f"{scheme}://***@{behind}" if slashes else f"***@{behind}"
    # What stands where a database or an option should may be a piece of the password, too.
    text = _NO_DATABASE.sub(r"\1***", text)
    return _NO_OPTION.sub(r"\1***", _QUERY_SECRET.sub(r"\1***", text))
