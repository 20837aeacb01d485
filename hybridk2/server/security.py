"""Who may ask: API keys, the Host header, the content type.

Owns the one gate that every request passes before it is routed. It looks at the raw path, so that
no spelling of a path gets around it, and knows nothing of what the endpoints do.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.types import Scope

from hybridk2.errors import ConfigError
from hybridk2.server.errors import ApiError

# What is open without a key: whether the server is up, and the page that asks for the key.
OPEN_PATHS = frozenset({b"/", b"/health", b"/chat.css", b"/chat.js", b"/favicon.ico"})

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_MIN_KEY_CHARACTERS = 16


@dataclass(frozen=True)
class Gate:
    """What a request has to show.

    keys: any of them opens; none at all means that nobody is asked. hosts: names that the Host
    header may say, lower case, beside loopback. any_address: whether it may also be an IP address,
    which no web page can rebind.
    """

    keys: tuple[bytes, ...] = ()
    hosts: frozenset[str] = frozenset()
    any_address: bool = False

    def check(self, scope: Scope) -> None:
        """Raises ApiError for a request that must not pass."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._check_host(_all(headers, b"host"))
        preflight = scope["method"] == "OPTIONS"  # carries no key, and gets to no endpoint
        if self.keys and not preflight and scope["raw_path"] not in OPEN_PATHS:
            self._check_key(headers)
        if scope["method"] == "POST":
            _check_content_type(_all(headers, b"content-type"))

    def _check_host(self, values: Sequence[bytes]) -> None:
        """A page of another site can make a browser send requests here under a name of its own;
        it cannot make it say one of ours (DNS rebinding)."""
        name = _host_name(values[0].decode("latin-1")) if len(values) == 1 else ""
        allowed = name in _LOOPBACK_NAMES or name in self.hosts
        if not allowed and not (self.any_address and _is_address(name)):
            message = "the Host header names a host that this server does not answer to"
            raise ApiError(403, f"{message}; start it with --allow-host NAME", "host_not_allowed")

    def _check_key(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        given = list(_all(headers, b"x-api-key"))
        for value in _all(headers, b"authorization"):
            scheme, _, credentials = value.partition(b" ")
            if scheme.lower() == b"bearer":
                given.append(credentials.strip())
        matches = [hmac.compare_digest(key, candidate) for key in self.keys for candidate in given]
        if not any(matches):
            raise ApiError(
                401,
                "an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def read_keys(text: str, source: str) -> tuple[bytes, ...]:
    """API keys, one a line; empty lines and lines that begin with # are none.

    Raises ConfigError when there is none, or one is too short or not printable ASCII.
    """
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{source}: expected an API key, found none")
    for number, key in enumerate(keys, start=1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{source}: key {number}: expected printable ASCII without spaces")
        if len(key) < _MIN_KEY_CHARACTERS:
            raise ConfigError(
                f"{source}: key {number}: expected at least {_MIN_KEY_CHARACTERS} characters, "
                f"found {len(key)}. `openssl rand -hex 24` makes a good one"
            )
    return tuple(key.encode() for key in keys)


def read_key_file(path: Path) -> tuple[bytes, ...]:
    """API keys from a file. Raises ConfigError, also when others may read the file."""
    try:
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise ConfigError(f"{path}: the API keys cannot be read: {reason}") from error
    if mode & 0o077:
        raise ConfigError(
            f"{path}: others on this machine can read the API keys; run chmod 600 on the file"
        )
    return read_keys(text, str(path))


def is_loopback(host: str) -> bool:
    """Whether this name or address is reached from this machine only. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host: {host!r} is no address of this machine: {error}") from error
    return all(ipaddress.ip_address(address[4][0]).is_loopback for address in found)


def gate(keys: tuple[bytes, ...], host: str, allowed_hosts: Iterable[str]) -> Gate:
    """The gate of a server that listens on `host`."""
    names = {host.lower(), *(name.lower() for name in allowed_hosts)}
    return Gate(keys, frozenset(names), any_address=not is_loopback(host))


def _all(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for found, value in headers if found == name]


def _host_name(value: str) -> str:
    """The name in a Host header, without port and brackets, lower case; "" when it is none."""
    name, separator, port = value.rpartition(":")
    if not separator or not port.isdigit():
        name = value
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    return name.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_content_type(values: Sequence[bytes]) -> None:
    """JSON only: a web page can send text/plain anywhere without asking the browser first."""
    kind = values[0].split(b";")[0].strip().lower() if len(values) == 1 else b""
    if kind != b"application/json":
        message = "the body has to be sent as content-type: application/json"
        raise ApiError(415, message, "unsupported_media_type")
