"""Start the fake laboratory's server as a process of its own, for the length of a block."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.host import command
from appliance.host.paths import Paths

_SERVER = Path(__file__).with_name("server.py")


@contextmanager
def short_home() -> Iterator[Paths]:
    """A home with a short name, since socket paths are short."""
    root = Path(tempfile.mkdtemp(prefix="hc-", dir="/tmp"))
    try:
        yield Paths(root / "h", root / "c").make()
    finally:
        shutil.rmtree(root)


def spawn_server(paths: Paths, *args: str) -> command.Process[bytes]:
    """Start a server and wait until it has said that it is ready; its log goes to ``HOME/log``."""
    with (paths.home / "log").open("ab") as log:
        child = command.spawn(
            [sys.executable, _SERVER, paths.home, paths.cache, *args], stdout=log, stderr=log
        )
    limit = time.monotonic() + 20
    while not _announced(paths, child.pid):
        if child.poll() is not None or time.monotonic() > limit:
            command.end(child)
            raise AssertionError((paths.home / "log").read_text())
        time.sleep(0.02)
    return child


def _announced(paths: Paths, pid: int) -> bool:
    try:
        return bool(json.loads(paths.server_file.read_text())["pid"] == pid)
    except FileNotFoundError:
        return False


@contextmanager
def running(*args: str) -> Iterator[Paths]:
    """A home with a running server."""
    with short_home() as paths:
        child = spawn_server(paths, *args)
        try:
            yield paths
        finally:
            command.end(child, grace=10)
