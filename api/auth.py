"""Who may talk to the control plane: a token in a 0600 file, a known Host, a bounded body."""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Collection
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem_response
from appliance.errors import ConfigError
from appliance.model import printable

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
MAX_BODY = 64 * 1024
_TOKEN = re.compile(r"^[A-Za-z0-9_-]{32,128}$")


def ensure_token(path: Path) -> str:
    """The API token; made on first use, in a file that only its owner can read.

    Raises:
        ConfigError: the file is readable by others, is a link, or holds no token.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_token(path)
    token = secrets.token_urlsafe(32)
    with os.fdopen(fd, "w") as f:
        f.write(token + "\n")
    return token


def read_token(path: Path) -> str:
    """The token in ``path``.

    Raises:
        ConfigError: as for :func:`ensure_token`, or the file does not exist.
    """
    hint = f"remove {path} and start the server again; it makes a new one"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as e:
        raise ConfigError(f"cannot read the API token {path}: {e.strerror}", hint=hint) from e
    with os.fdopen(fd) as f:
        mode = os.fstat(f.fileno()).st_mode & 0o777
        if mode & 0o077:
            raise ConfigError(f"the API token {path} has mode {mode:04o}, allowed is 0600", hint=hint)
        token = f.read(200).strip()
    if not _TOKEN.match(token):
        raise ConfigError(f"{path} does not hold an API token", hint=hint)
    return token


class Gate:
    """ASGI middleware before everything else: Host, then token, then body size.

    The Host check stops DNS rebinding: a page in a local browser can reach a loopback port under its own
    name, but it cannot choose the Host header. It comes before the token so that a wrong Host learns nothing.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Collection[str] = LOCAL_HOSTS) -> None:
        self.app = app
        self.token = token.encode()
        self.hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a refusal, or pass the request on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # nothing else is spoken here
        headers = Headers(scope=scope)
        path = scope["path"]
        host = _without_port(headers.get("host", ""))
        if host not in self.hosts:
            refusal = problem_response(
                421,
                "wrong-host",
                f"Host {printable(host, 80)!r} is not one of {', '.join(sorted(self.hosts))}",
                instance=path,
                hint="use the address that `hotcell serve` printed",
            )
            await refusal(scope, receive, send)
            return
        if not self._known(headers.get("authorization", "")):
            refusal = problem_response(
                401,
                "unauthorized",
                "the request carries no valid token",
                instance=path,
                hint="send `Authorization: Bearer TOKEN`; the token lies in the server's home directory",
                headers={"WWW-Authenticate": 'Bearer realm="hotcell"'},
            )
            await refusal(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:12]) > MAX_BODY:
            await _too_large(path)(scope, receive, send)
            return
        await self.app(scope, _bounded(receive), send)

    def _known(self, header: str) -> bool:
        scheme, _, given = header.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token)


def _too_large(path: str) -> ASGIApp:
    return problem_response(
        413, "too-large", f"the body is larger than {MAX_BODY} bytes", instance=path, hint="send less"
    )


def _bounded(receive: Receive) -> Receive:
    """Count what arrives, since a chunked body announces no length."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY:
            raise HTTPException(413, f"the body is larger than {MAX_BODY} bytes")
        return message

    return counted


def _without_port(host: str) -> str:
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]*)(:[0-9]{1,5})?", host)
    return found[1].lower() if found else host
