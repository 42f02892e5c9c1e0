"""Starting and stopping the agent on the origin, through the qga, as the unprivileged user ``subject``."""

from __future__ import annotations

from appliance.cell.incarnation import Incarnation
from appliance.errors import GuestChannelError, GuestTamperError, LabError
from appliance.model import printable
from appliance.trial.warmup import AGENT_PORT, MODEL_PORT, SYSTEM

_TASK = "/home/subject/task.json"
_EVENTS = "/dev/virtio-ports/org.hotcell.events"
_UNIT = "hotcell-agent"


def start_agent(origin: Incarnation, task_file: bytes) -> None:
    """Hand over the task and start the agent as a systemd unit.

    Raises:
        LabError: the unit did not start.
    """
    origin.qga.write_file(_TASK, task_file, owner="subject:subject")
    done = origin.qga.exec(
        [
            "/usr/bin/systemd-run", f"--unit={_UNIT}", "--uid=subject", "--gid=subject", "--quiet",
            "--setenv=HOME=/home/subject", f"--working-directory={SYSTEM}",
            "/usr/bin/python3", "-m", "agent", "serve", "--port", str(AGENT_PORT),
            "--model-url", f"http://127.0.0.1:{MODEL_PORT}/v1", "--task", _TASK, "--events", _EVENTS,
        ],
        timeout_s=60,
    )  # fmt: skip
    if done.rc != 0:
        words = printable(done.stderr.decode(errors="replace").strip(), 400)
        raise LabError(f"the agent did not start on {origin.name}: exit status {done.rc}: {words}")


def agent_alive(origin: Incarnation) -> bool:
    """Whether systemd on the origin says that the agent runs; a guest that does not answer counts as yes."""
    try:
        done = origin.qga.exec(["/usr/bin/systemctl", "is-active", "--quiet", _UNIT], timeout_s=20)
    except (GuestChannelError, GuestTamperError):
        return True
    return done.rc == 0


def stop_agent(origin: Incarnation) -> str:
    """Stop the agent and all it started; returns "" or why it could not be shown to have stopped."""
    try:
        done = origin.qga.exec(["/usr/bin/systemctl", "stop", _UNIT], timeout_s=60)
    except (GuestChannelError, GuestTamperError, LabError) as e:
        return printable(str(e), 300)
    return "" if done.rc in (0, 5) else f"systemctl stop: exit status {done.rc}"
