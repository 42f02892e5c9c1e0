"""Ansible on a root tree, through the chroot connection. The only module that imports ansible_runner."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ansible_runner

from appliance.build.workspace import Workspace, explain, remove
from appliance.errors import BuildError

PLAYBOOK = "image.yml"
_LIMIT_S = 1800


def _failure(event: dict[str, Any]) -> str:
    data = event.get("event_data", {})
    result = data.get("res", {})
    said = result.get("stderr") or result.get("msg") or result.get("stdout") or result
    return f"role {data.get('role', '?')}, task {data.get('task', '?')}: {str(said).strip()[-2000:]}"


class _Watched:
    """Follows the events of a run: names of tasks, failures, and the seconds of slow tasks."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.failures: list[str] = []
        self.slow: dict[str, float] = {}

    def __call__(self, event: dict[str, Any]) -> bool:
        """Take one event; ansible-runner need not store it."""
        data = event.get("event_data", {})
        kind = event.get("event")
        if kind == "playbook_on_task_start":
            self.tell(str(data.get("name", "")))
        elif kind == "runner_on_failed" and not data.get("ignore_errors"):
            self.failures.append(_failure(event))
        elif kind == "runner_on_ok" and float(data.get("duration") or 0) >= 1:
            self.slow[str(data.get("task"))] = round(float(data["duration"]), 1)
        return False


def _inventory(root: Path) -> dict[str, Any]:
    """One host, reached by chroot."""
    host = {
        "ansible_connection": "community.general.chroot",
        "ansible_host": os.fspath(root),
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    return {"all": {"hosts": {"image": host}}}


def configure(
    workspace: Workspace,
    ansible: Path,
    variables: dict[str, Any],
    tell: Callable[[str], None],
) -> dict[str, float]:
    """Apply the recipe's roles to ``workspace.root``; ``tell`` gets each task's name as it starts.

    Returns the seconds each slow task took.

    Raises:
        BuildError: a task failed.
    """
    private = workspace.folder / "ansible"
    remove(private)
    private.mkdir(mode=0o700)
    watched = _Watched(tell)
    venv_bin = Path(sys.executable).parent
    runner = ansible_runner.run(
        private_data_dir=os.fspath(private),
        project_dir=os.fspath(ansible),
        inventory=_inventory(workspace.root),
        playbook=PLAYBOOK,
        extravars=json.loads(json.dumps(variables)),
        envvars={
            **workspace.environment,
            "PATH": f"{venv_bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "ANSIBLE_CONFIG": os.fspath(ansible.parent / "ansible.cfg"),
            "ANSIBLE_LOCAL_TEMP": os.fspath(private / "tmp"),
            "HOME": os.fspath(private),
            "LANG": "C.UTF-8",
        },
        event_handler=watched,
        # A callback of ours keeps ansible-runner from installing signal handlers in our process.
        cancel_callback=lambda: False,
        quiet=True,
        timeout=_LIMIT_S,
    )
    with workspace.log.open("ab") as log:
        stdout = private / "artifacts" / str(runner.config.ident) / "stdout"
        if stdout.is_file():
            log.write(stdout.read_bytes())
    if runner.status != "successful":
        said = (
            watched.failures[0]
            if watched.failures
            else workspace.log.read_bytes()[-2000:].decode(errors="replace")
        )
        raise BuildError(
            f"configuring the image failed ({runner.status}): {said}",
            hint=explain(said),
            log=os.fspath(workspace.log),
        )
    return watched.slow
