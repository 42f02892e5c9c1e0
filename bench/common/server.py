"""A server of a benchmark's own, and trials through it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from appliance.cli.client import Client, connect
from appliance.host.clock import wait_until
from appliance.host.paths import Paths
from appliance.service import LimitOverrides, TrialRequest, TrialView

_POLL_S = 0.2


class Server(NamedTuple):
    """A running server and a client of it."""

    pid: int
    client: Client


@contextlib.contextmanager
def running_server(paths: Paths) -> Iterator[Server]:
    """A server on the home of ``paths`` for the length of the block."""
    process = subprocess.Popen([sys.executable, "-m", "appliance.cli", "serve", "--port", "0"])
    try:
        wait_until(paths.server_file.exists, 60, "the server to serve")
        pid = int(json.loads(paths.server_file.read_text())["pid"])
        with connect(paths, None, None) as client:
            yield Server(pid, client)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


def run_trial(client: Client, subject: str, seed: int, *, wall_s: float | None = None) -> TrialView:
    """Run one trial to its end; ``wall_s`` is the longest that its subject may take."""
    request = TrialRequest(subject=subject, seed=seed, limits=LimitOverrides(wall_s=wall_s))
    trial = client.post(TrialView, "trials", request)
    while not trial.state.ended:
        time.sleep(_POLL_S)
        trial = client.get(TrialView, f"trials/{trial.id}")
    return trial
