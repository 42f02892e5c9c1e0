"""Pulling the plug on a real server in the middle of a trial: cut at once, void afterwards, nothing left.

This module runs before the others of its tier: once this process has opened libvirt on a home, no server can.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.config import load_host_settings
from appliance.host.clock import wait_until
from appliance.host.paths import Paths
from appliance.model import TrialState
from appliance.pipeline import open_lab

pytestmark = [pytest.mark.trial, pytest.mark.timeout(1800)]


def hotcell(paths: Paths, *args: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "appliance.cli",
        "--home",
        str(paths.home),
        "--cache",
        str(paths.cache),
        *args,
    ]


def qemu_of(paths: Paths) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            argv = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
        except OSError:
            continue
        if argv.startswith(b"/usr/bin/qemu-system") and os.fsencode(paths.home) in argv:
            found.append(int(entry.name))
    return found


def test_kill_9_of_the_server_in_the_middle_of_a_trial(home: Paths) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "HOTCELL_HOST_NETNS"}
    with (home.home / "crash.log").open("wb") as log:
        server = subprocess.Popen(
            hotcell(home, "serve", "--port", "0"), stdout=log, stderr=log, env=environment
        )
        client = None
        try:
            wait_until(home.server_file.exists, 60, "the server to serve")
            client = subprocess.Popen(
                hotcell(home, "run", "idle", "--no-serve", "--limit", "wall_s=240"),
                stdout=log, stderr=log, env=environment,
            )  # fmt: skip
            wait_until(lambda: started(home), 900, "the subject to run")
            assert len(qemu_of(home)) == 2
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
            wait_until(lambda: not qemu_of(home), 20, "the warden to stop the machines")
            wait_until(lambda: not captures_of(home), 10, "the capture to end with its server")
            assert client.wait(60) not in (0, None)
        finally:
            for process in (server, client):
                if process is not None and process.poll() is None:
                    process.kill()
                    process.wait()
    last = json.loads(home.warden_log.read_text().splitlines()[-1])
    assert last["reason"] == "the control process is gone"
    assert last["links_cut"] == 2

    lab = open_lab(home, load_host_settings())
    try:
        newest = lab.trials(state=None, subject=None, limit=1, offset=0).items[0]
        assert newest.state is TrialState.VOID
        assert "control process" in newest.reason
        assert newest.bundle is not None
        assert lab.sweep(dry_run=True).strays == ()
    finally:
        lab.close()


def captures_of(paths: Paths) -> list[str]:
    lines = []
    for entry in Path("/proc").iterdir():
        try:
            lines.append((entry / "cmdline").read_bytes() if entry.name.isdecimal() else b"")
        except OSError:
            continue
    return [repr(x) for x in lines if b"tcpdump" in x and os.fsencode(paths.home) in x]


def started(paths: Paths) -> bool:
    return any('"event": "started"' in p.read_text() for p in paths.open_trials.glob("*/journal.jsonl"))
