"""The server process: sockets first, then the seal, then the laboratory.

A socket keeps the network namespace it was made in. So the listeners are bound in the host's namespace,
``seal()`` moves the process into one without an uplink, and everything made later (taps, QEMU, captures)
can reach nothing, while accepted API connections still work. ``seal()`` must run before any thread exists.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import logging
import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.auth import LOCAL_HOSTS, ensure_token
from appliance import __version__
from appliance.errors import ConfigError, ConflictError, HostError
from appliance.host.log import Log, set_up
from appliance.host.paths import Paths
from appliance.model import Frozen
from appliance.service import LabService

log = Log("hotcell.server")

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7077
_GRACE_S = 3


class ServerInfo(Frozen):
    """What the server file says: whom to ask, and how to see whether it still lives."""

    pid: int
    started: float
    url: str
    socket: str
    version: str


def serve(
    service_factory: Callable[[], LabService],
    paths: Paths,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    *,
    seal: Callable[[], None],
    allow_remote: bool = False,
    ready: Callable[[ServerInfo], None] | None = None,
) -> None:
    """Run the control plane until SIGTERM or SIGINT. Port 0 takes a free one.

    Raises:
        ConfigError: ``host`` is not a loopback address and ``allow_remote`` is not given.
        ConflictError: another server uses this home.
        HostError: a socket cannot be bound.
    """
    address = _check_address(host, allow_remote)
    set_up()
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    paths.make()
    with ExitStack() as stack:
        stack.enter_context(_only_one(paths))
        paths.server_file.unlink(missing_ok=True)  # of a server that was killed; the lock is ours
        token = ensure_token(paths.token)
        sockets = [stack.enter_context(_tcp(address, port)), stack.enter_context(_unix(paths.api_socket))]
        url = _url(sockets[0])
        stop = stack.enter_context(_signals())
        seal()
        service = service_factory()
        stack.callback(service.close)
        hosts = LOCAL_HOSTS if address.is_loopback else LOCAL_HOSTS | {_bracketed(address)}
        app = create_app(service, token, hosts=hosts)
        info = ServerInfo(
            pid=os.getpid(),
            started=time.time(),
            url=url,
            socket=os.fspath(paths.api_socket),
            version=__version__,
        )

        def announce() -> None:
            _write(paths.server_file, info)
            log.info("serving", url=info.url, socket=info.socket)
            if ready is not None:
                ready(info)

        stack.callback(paths.server_file.unlink, missing_ok=True)
        stop.server = _Server(app, announce)
        if not stop.asked:
            stop.server.run(sockets=sockets)
        log.info("stopping")


class _Server(uvicorn.Server):
    """uvicorn with our signals, a callback once it listens, and followers that end when it stops."""

    def __init__(self, app: FastAPI, announce: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                http="h11",
                loop="asyncio",
                proxy_headers=False,
                server_header=False,
                limit_concurrency=256,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        self._announce = announce
        self._followers = app.state.followers

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to :func:`_signals`; uvicorn's own would end the process before the clean-up."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let followers go first, else each open event stream would use up the whole grace period."""
        self._followers.stopping.set()
        await super().shutdown(sockets)


class _Stop:
    """What a signal does: before the server runs, interrupt; then, ask it to end; a second time, at once."""

    def __init__(self) -> None:
        self.server: uvicorn.Server | None = None
        self.asked = False

    def __call__(self, _signum: int, _frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if self.server is None:
            if not again:
                raise KeyboardInterrupt
            return
        self.server.should_exit = True
        self.server.force_exit = self.server.force_exit or again


@contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _check_address(host: str, allow_remote: bool) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
    except ValueError as e:
        raise ConfigError(
            f"{host!r} is not an IP address", hint="use 127.0.0.1, ::1, or a host address"
        ) from e
    if not address.is_loopback and not allow_remote:
        raise ConfigError(
            f"{host} is not a loopback address, and whoever reaches the API controls this host's machines",
            hint="forward the port over ssh instead, or give --allow-remote",
        )
    return address


@contextmanager
def _only_one(paths: Paths) -> Iterator[None]:
    """Hold a lock on the home directory; the kernel lets go of it even after SIGKILL."""
    fd = os.open(paths.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ConflictError(
                f"another server uses {paths.home}", hint="use it, stop it, or choose another --home"
            ) from e
        yield
    finally:
        os.close(fd)


@contextmanager
def _tcp(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((str(address), port))
            s.listen(128)
        except (OSError, OverflowError) as e:
            raise HostError(
                f"cannot listen on {address} port {port}: {e}", hint="choose another --port"
            ) from e
        yield s


@contextmanager
def _unix(path: Path) -> Iterator[socket.socket]:
    """Listen on ``path``, mode 0600. What a killed server left there is replaced; the lock is held."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise HostError(f"{path} is in the way: not a socket", hint="move it away")
        path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        mask = os.umask(0o177)
        try:
            s.bind(os.fspath(path))
        except OSError as e:
            raise HostError(f"cannot listen on {path}: {e}", hint="check the home directory") from e
        finally:
            os.umask(mask)
        s.listen(128)
        try:
            yield s
        finally:
            path.unlink(missing_ok=True)


def _bracketed(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{_bracketed(ipaddress.ip_address(host))}:{port}"


def _write(path: Path, info: ServerInfo) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(info.model_dump()) + "\n")
    part.chmod(0o600)
    part.replace(path)
