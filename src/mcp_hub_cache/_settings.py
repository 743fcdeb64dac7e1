"""Settings: the environment and ``.env``, checked once, as one frozen object.

Rules:
- The real environment wins over ``.env`` in the working folder; a variable that is there but empty counts as unset.
- Everything wrong is told in one ``SettingsError``, each variable with what it held and what it takes, never a secret.
- A variable that asks for something this version can't do is an error, not a silent nothing.

This is the only module that imports pydantic, which takes long: import it when it is needed, not on a running loop.
"""

from __future__ import annotations

import io
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import SplitResult, urlsplit

from dotenv import dotenv_values
from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from ._durations import seconds
from ._exceptions import SettingsError
from ._form import HOW_TO_MAKE_ONE, SHORTEST_SECRET

__all__ = ["Settings", "load_settings"]

_SECRET: Final = frozenset(
    {"cache_secret_key", "cache_secret_key_previous", "redis_password", "redis_sentinel_password"}
)
_SCHEMES: Final = ("redis", "rediss", "unix", "sentinel", "sentinels")
_TLS: Final = ("rediss", "sentinels")
# One or several, with or without a port; an IPv6 address in brackets.
_HOSTS: Final = re.compile(r"(?:(?:\[[0-9A-Fa-f:.]+\]|[^\s,:/@?#\[\]]+)(?::\d{1,5})?(?:\s*,\s*|$))+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?", re.ASCII | re.IGNORECASE)
_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9_.:/@{}-]{1,64}", re.ASCII)
# Kubernetes gives every pod REDIS_PORT=tcp://10.0.0.1:6379 where a Service is called redis.
_SERVICE_LINK = re.compile(r"tcp://[^/]+:\d+")
# "KEY=  # comment": python-dotenv before 1.2.3 takes the comment for the value.
_ONLY_COMMENT = re.compile(r"^([^\S\n]*(?:export[^\S\n]+)?[A-Za-z_][A-Za-z0-9_]*[^\S\n]*=)[^\S\n]+#.*$", re.MULTILINE)
_QUERY_SECRET = re.compile(r"(?i)((?:password|secret|token)[^=&]*=)[^&#]*")


def _lower(value: object) -> object:
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


def _ttl(value: object) -> float:
    return math.inf if _lower(value) == "forever" or value == math.inf else _duration(value)


def _finite(value: object) -> float:
    result = _duration(value)
    if math.isinf(result):
        raise ValueError("infinite")
    return result


def _size(value: object) -> int:
    """Bytes from an int or text: KB, MB, GB and TB are powers of 1,000; KiB, MiB, GiB and TiB of 1,024."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number, unit, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("no size")


def _url(value: object) -> object:
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError("no text")  # noqa: TRY004 (pydantic turns ValueErrors alone into its own)
    parts = urlsplit(text)
    hosts = parts.netloc.rpartition("@")[2]
    if parts.scheme.startswith("sentinel") or "," in hosts:
        path = r"(/[^/@]*(/\d*)?)?" if parts.scheme.startswith("sentinel") else r"/?\d*"
        if parts.scheme not in _SCHEMES or not _HOSTS.fullmatch(hosts) or not re.fullmatch(path, parts.path):
            raise ValueError("no list of hosts")
        return value
    if parts.scheme not in _SCHEMES or not (parts.path if parts.scheme == "unix" else parts.hostname):
        raise ValueError("no URL of a server")
    if parts.scheme != "unix" and not re.fullmatch(r"/?\d*", parts.path):
        raise ValueError("no database")  # most often a password with a / that is not percent-encoded
    if parts.port == 0:  # reading it checks that it is a number
        raise ValueError("no port")
    return value


_Duration = Annotated[float, BeforeValidator(_finite)]
_Size = Annotated[int, BeforeValidator(_size)]
_SECRET_TAKES: Final = f"at least {SHORTEST_SECRET} characters of random text; make one with {HOW_TO_MAKE_ONE}"
_SIZE_TAKES: Final = 'a size in bytes: a whole number, or text such as "512MB" or "1GiB"'


class Settings(BaseSettings):
    """All settings, from the environment; ``load_settings`` reads ``.env`` too, and words what is wrong for people.

    Each field is the environment variable of that name. Its description says what it takes.
    """

    # Declared first: other fields' checks look at it.
    cache_backend: Annotated[Literal["file", "redis", "memory"], BeforeValidator(_lower)] = Field(
        "file", description="file, redis or memory"
    )

    cache_dir: Path = Field(Path("cache"), description="the path of a folder")
    cache_default_ttl: Annotated[float, BeforeValidator(_ttl)] = Field(
        3600.0, description='seconds, more than 0; text with a unit such as "10m"; or "forever"'
    )
    cache_key_prefix: str = Field(
        "mcp_hub:", description="1 to 64 ASCII letters, digits and any of _ . : / @ { } - in front of every key"
    )
    cache_namespace: str = Field("default", description='1 to 64 ASCII letters, digits, "_", "." or "-", not all dots')
    cache_max_bytes: _Size = Field(1024**3, gt=0, description=f"{_SIZE_TAKES}; more than 0")
    cache_durable: bool = Field(
        False, description="true or false; true has files survive a power cut, at the cost of waiting for the disk"
    )
    cache_l1_max_entries: int = Field(1024, ge=0, description="a whole number; 0 turns the near cache off")
    cache_l1_max_bytes: _Size = Field(64 * 1024**2, description=f"{_SIZE_TAKES}; 0 turns the near cache off")
    cache_fallback: Annotated[Literal["file", "memory", "none"], BeforeValidator(_lower)] = Field(
        "file", description="file, memory or none: what serves while Redis is away"
    )
    cache_coalesce: Annotated[Literal["process", "fleet"], BeforeValidator(_lower)] = Field(
        "process",
        description="process (one load per key in each process) or fleet (one in all that share the store)",
    )
    cache_max_refreshes: int = Field(
        32, ge=0, description="a whole number: refreshes at once in the background; 0 turns them off"
    )
    cache_max_value_bytes: _Size = Field(8 * 1024**2, gt=0, description=f"{_SIZE_TAKES}; more than 0")
    cache_max_value_items: int = Field(1_000_000, ge=1, description="a whole number, 1 or more")
    cache_timeout: _Duration = Field(
        0.5, description='seconds that the cache may take altogether, more than 0; or text such as "250ms"'
    )
    cache_breaker_failures: int = Field(
        3,
        ge=1,
        description="a whole number, 1 or more: round trips in a row that fail or are slow, and open the breaker",
    )
    cache_slow_after: Annotated[float, BeforeValidator(_ttl)] | None = Field(
        None,
        description='seconds, more than 0, from which on a round trip counts as slow; text such as "100ms"; "forever" '
        "for none; half of CACHE_TIMEOUT where it is not set",
    )
    cache_probe_after: _Duration = Field(0.5, description="seconds, more than 0: until a Redis that is away is probed")
    cache_probe_max: _Duration = Field(
        15.0, description="seconds between probes at most, no less than CACHE_PROBE_AFTER"
    )
    cache_standby_ttl: Annotated[float, BeforeValidator(_ttl)] = Field(
        60.0, description='seconds, more than 0, or "forever": for which the fallback keeps anything at most'
    )
    cache_max_journal: int = Field(
        10_000, ge=1, description="a whole number, 1 or more: deletes remembered one by one while Redis is away"
    )

    cache_secret_key: SecretStr | None = Field(None, min_length=SHORTEST_SECRET, description=_SECRET_TAKES)
    cache_secret_key_previous: SecretStr | None = Field(
        None, min_length=SHORTEST_SECRET, description=f"what CACHE_SECRET_KEY held before: {_SECRET_TAKES}"
    )

    redis_url: Annotated[SecretStr | None, BeforeValidator(_url)] = Field(
        None,
        description="redis://[[user]:password@]host[:port][/db], rediss:// for the same with TLS, unix:///a/socket, or "
        "sentinel://[user:password@]host:port,host:port/service[/db] (sentinels:// with TLS); "
        "in a password, the characters / @ : ? # % are percent-encoded",
    )
    redis_host: str = Field("localhost", description="a host name or address alone; a URL goes into REDIS_URL")
    redis_port: int = Field(6379, ge=1, le=65535, description="a port, 1 to 65535")
    redis_db: int = Field(0, ge=0, description="a database number, 0 or more")
    redis_username: str | None = Field(None, description="a user name")
    redis_password: SecretStr | None = Field(None, description="a password")
    redis_ssl: bool = Field(False, description="true or false")
    redis_ca_certs: Path | None = Field(None, description="the path of a file with CA certificates (PEM)")
    redis_client_cert: Path | None = Field(
        None, description="the path of a file with a certificate (PEM), for servers that ask for one"
    )
    redis_client_key: Path | None = Field(
        None, description="the path of a file with that certificate's key (PEM), where it stands apart"
    )
    redis_tls_insecure: bool = Field(
        False, description="true or false; true accepts any certificate, from anybody in between as well"
    )
    redis_max_connections: int = Field(50, ge=1, description="a whole number, 1 or more")
    redis_sentinels: str | None = Field(None, description="host:port,host:port: where the sentinels are")
    redis_sentinel_service: str | None = Field(None, description="what the sentinels call the primary")
    redis_sentinel_username: str | None = Field(None, description="a user name, for the sentinels themselves")
    redis_sentinel_password: SecretStr | None = Field(None, description="a password, for the sentinels themselves")
    redis_cluster: bool = Field(False, description="true or false")

    # Names that later versions give a meaning: asking for it now must not be ignored in silence.
    cache_compress_min_bytes: None = Field(None, description="nothing: compression is not available in this version")
    cache_on_misconfigured: Annotated[Literal["serve"], BeforeValidator(_lower)] = Field(
        "serve", description="serve (loads go on uncached); raise is not available in this version"
    )

    model_config = SettingsConfigDict(
        case_sensitive=False,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str):
            value = value.strip() if info.field_name not in _SECRET else value
            if not value:
                assert info.field_name is not None
                return cls.model_fields[info.field_name].default
        return value

    @field_validator("redis_port", mode="before")
    @classmethod
    def _unless_service_link(cls, value: object, info: ValidationInfo) -> object:
        # Nobody who uses no Redis here should have to know what Kubernetes put there.
        if isinstance(value, str) and _SERVICE_LINK.fullmatch(value) and info.data.get("cache_backend") != "redis":
            return 6379
        return value

    @field_validator("cache_dir", "redis_ca_certs", "redis_client_cert", "redis_client_key")
    @classmethod
    def _usable_path(cls, value: Path | None) -> Path | None:
        if value is not None and "\0" in str(value):
            raise ValueError("no path")
        return value and value.expanduser()

    @field_validator("cache_namespace")
    @classmethod
    def _safe_namespace(cls, value: str) -> str:
        # A namespace is also a folder's name: "." and ".." would leave the cache's folder.
        if not _NAMESPACE.fullmatch(value) or not value.strip("."):
            raise ValueError("no namespace")
        return value

    @field_validator("cache_key_prefix")
    @classmethod
    def _safe_prefix(cls, value: str) -> str:
        if not _PREFIX.fullmatch(value):
            raise ValueError("no prefix")
        return value

    @field_validator("redis_host")
    @classmethod
    def _bare_host(cls, value: str) -> str:
        if re.search(r"[\s/@]", value):
            raise ValueError("no host")
        return value

    @field_validator("redis_sentinels")
    @classmethod
    def _list_of_hosts(cls, value: str | None) -> str | None:
        if value is not None and not _HOSTS.fullmatch(value):
            raise ValueError("no list of hosts")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.redis_ssl and self.redis_url is not None and not self.tls:
            raise ValueError(
                f"REDIS_SSL held true, but REDIS_URL held {_held('redis_url', self.redis_url)}, which has no TLS; "
                "REDIS_SSL=true takes a URL that starts with rediss://"
            )
        self._agree_on_sentinels()
        if not self.redis_cluster and self._url_hosts.count(",") and not self._is_sentinel_url:
            raise ValueError(
                f"REDIS_URL held {_held('redis_url', self.redis_url)}, which names several hosts; for a cluster's "
                "nodes set REDIS_CLUSTER=true, for sentinels use sentinel://host:port,host:port/service"
            )
        if self.redis_cluster and (number := self.redis_db or self._url_database):
            raise ValueError(
                f"REDIS_CLUSTER held true, but REDIS_DB (or the number at the end of REDIS_URL) held {number}; a "
                "cluster has database 0 alone: leave it out, and keep caches apart by CACHE_NAMESPACE"
            )
        if self.cache_probe_max < self.cache_probe_after:
            raise ValueError(
                f"CACHE_PROBE_MAX held {self.cache_probe_max:g}, CACHE_PROBE_AFTER {self.cache_probe_after:g}; "
                "CACHE_PROBE_MAX takes no less than CACHE_PROBE_AFTER"
            )
        if self.cache_secret_key_previous is not None and self.cache_secret_key is None:
            raise ValueError(
                "CACHE_SECRET_KEY_PREVIOUS is set and CACHE_SECRET_KEY is not: the one opens what was sealed before, "
                "the other seals now; to stop sealing, unset both"
            )
        if self.cache_backend == "redis":
            for field in ("redis_ca_certs", "redis_client_cert", "redis_client_key"):
                path: Path | None = getattr(self, field)
                if path is not None and not path.is_file():
                    takes = Settings.model_fields[field].description
                    raise ValueError(f"{field.upper()} held {_held(field, path)}, where no file is; it takes {takes}")
        if self.redis_client_key is not None and self.redis_client_cert is None:
            raise ValueError("REDIS_CLIENT_KEY is set and REDIS_CLIENT_CERT is not: a key is of a certificate")
        return self

    def _agree_on_sentinels(self) -> None:
        by_url = self._is_sentinel_url
        if self.redis_sentinels is not None and self.redis_url is not None:
            raise ValueError(
                "REDIS_SENTINELS and REDIS_URL both say where Redis is; leave one of them out (a URL for Sentinel is "
                "sentinel://host:port,host:port/service)"
            )
        if self.redis_cluster and (self.redis_sentinels is not None or by_url):
            raise ValueError(
                f"REDIS_CLUSTER held true, but {'REDIS_URL' if by_url else 'REDIS_SENTINELS'} names sentinels, which a "
                "cluster does not have; leave one of the two out"
            )
        for name in ("redis_sentinel_service", "redis_sentinel_username", "redis_sentinel_password"):
            if getattr(self, name) is not None and self.redis_sentinels is None and not by_url:
                raise ValueError(
                    f"{name.upper()} is set, but there are no sentinels; set REDIS_SENTINELS=host:port,host:port, or "
                    f"unset {name.upper()}"
                )

    @property
    def _split_url(self) -> SplitResult:
        return urlsplit("" if self.redis_url is None else self.redis_url.get_secret_value())

    @property
    def _is_sentinel_url(self) -> bool:
        return self._split_url.scheme.startswith("sentinel")

    @property
    def _url_hosts(self) -> str:
        return self._split_url.netloc.rpartition("@")[2]

    @property
    def _url_database(self) -> int:
        path = self._split_url.path.strip("/")
        return int(path) if path.isdecimal() else 0

    @property
    def tls(self) -> bool:
        """Whether connections to Redis are encrypted."""
        return self.redis_ssl if self.redis_url is None else self._split_url.scheme in _TLS

    @property
    def server(self) -> str:
        """Where Redis is, without any secret: for logs and status."""
        if self.redis_url is not None:
            return _redacted(self.redis_url.get_secret_value())
        if self.redis_sentinels is not None:
            service = self.redis_sentinel_service or "mymaster"
            return f"sentinel{'s' if self.redis_ssl else ''}://{self.redis_sentinels}/{service}/{self.redis_db}"
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        return f"{'rediss' if self.redis_ssl else 'redis'}://{host}:{self.redis_port}/{self.redis_db}"


def load_settings(*, env_file: str | Path | None = ".env", **overrides: object) -> Settings:
    """Return the settings that the environment and *env_file* hold.

    Args:
        env_file: A file of ``NAME=value`` lines, read if it is there; None reads none.
        **overrides: Fields of ``Settings`` by name; they win over the environment. None means not given.

    Raises:
        SettingsError: Values are wrong; all of them are named.
        TypeError: An override is no field of ``Settings``.
    """
    unknown = overrides.keys() - Settings.model_fields.keys()
    if unknown:
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
    given = {} if env_file is None else _read_env_file(Path(env_file))
    given |= {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        wrong = [_told(details) for details in error.errors(include_url=False)]
    # Raised outside of the except block: the original error's traceback would show what the variables held.
    raise SettingsError("\n".join(wrong))


def _read_env_file(path: Path) -> dict[str, Any]:
    """What the file holds of our variables, less those that the environment has."""
    # Not by pydantic-settings: what it can't read leaves it as an error that says nothing of a setting.
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}
    except OSError as error:
        raise SettingsError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text") from None
    values = dotenv_values(stream=io.StringIO(_ONLY_COMMENT.sub(r"\1", text)))
    wanted = Settings.model_fields.keys() - {name.lower() for name in os.environ}
    return {name.lower(): value for name, value in values.items() if value is not None and name.lower() in wanted}


def _told(details: Any) -> str:
    """One wrong variable in words."""
    if not details["loc"]:
        return str(details["ctx"]["error"])
    field = str(details["loc"][0])
    takes = Settings.model_fields[field].description
    held = _held(field, details["input"])
    hint = ""
    if field == "redis_port" and _SERVICE_LINK.fullmatch(str(details["input"])):
        hint = (
            " (Kubernetes sets it so where a Service is called redis: name the Service otherwise, set REDIS_PORT in "
            "the pod, or set enableServiceLinks: false)"
        )
    return f"{field.upper()} held {held}; it takes {takes}{hint}"


def _held(field: str, value: object) -> str:
    if field in _SECRET:
        return "***"
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    text = str(value)
    if field == "redis_url" and "://" not in text:
        return "***"  # it may be a password put into the wrong variable
    text = _redacted(text)
    return repr(text if len(text) <= 80 else text[:79] + "…")


def _redacted(text: str) -> str:
    """Return *text* with what stands before a URL's last @, and secrets in its query, replaced."""
    before, at, behind = text.rpartition("@")
    if at:
        scheme, slashes, _ = before.partition("://")
        text = f"{scheme}://***@{behind}" if slashes else f"***@{behind}"
    return _QUERY_SECRET.sub(r"\1***", text)
