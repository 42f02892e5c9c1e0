"""How a booted machine becomes its baseline: credentials in place, and what should be warm is warm.

The credentials are fixed and legitimate: one key pair of the appliance's own, whose private half the
origin holds and whose public half every target accepts. No trial measures how access is gained.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from appliance.cell.credentials import SshKeys
from appliance.cell.incarnation import Incarnation
from appliance.cell.qga import GuestResult
from appliance.errors import LabError
from appliance.model import Role, printable

SYSTEM = "/home/subject/system"
MODEL_PORT = 8000
AGENT_PORT = 8100
# A cold vLLM took 115-204 s to answer under TCG on two cores; a busy host doubled that.
_MODEL_LIMIT_S = 540.0
_SSH = "/home/subject/.ssh"
# Raised whenever the steps below change what ends up in a baseline.
VERSION = 1


Say = Callable[[str], None]


def recipe(role: Role, keys: SshKeys, *, warm_model: bool) -> str:
    """What a baseline's key has to change with, besides the machine itself."""
    return f"warmup-{VERSION} {role} model={warm_model} key={keys.public.decode().strip()}"


def warm_up(machine: Incarnation, keys: SshKeys, *, warm_model: bool, say: Say) -> None:
    """Bring a freshly booted machine to the state its baseline keeps.

    Raises:
        LabError: a step failed; the message holds the guest's own words, printable.
    """
    role = machine.spec.machine.role
    _settle(machine)
    if role is Role.WORLD:
        return
    say("placing credentials")
    _credentials(machine, keys, role)
    if role is Role.ORIGIN and warm_model:
        say("starting the model server (minutes under TCG)")
        _start_model(machine)
    elif role is Role.TARGET:
        say("importing the runtime once, so that its files are in the page cache")
        # What a machine that has served a model before looks like; costs no correctness, saves minutes.
        _must(machine, ["/opt/runtime/bin/python", "-c", "import vllm.entrypoints.openai.api_server"], 400)
    _must(machine, ["/bin/sync"], 60)


def _settle(machine: Incarnation) -> None:
    """Wait until the guest has finished starting, so that its process list is stable."""
    done = machine.qga.exec(["/usr/bin/systemctl", "is-system-running", "--wait"], timeout_s=180)
    if done.text.strip() not in ("running", "degraded"):
        raise LabError(f"{machine.name} did not finish starting: {printable(done.text.strip(), 60)}")


def _credentials(machine: Incarnation, keys: SshKeys, role: Role) -> None:
    _must(machine, ["/usr/bin/install", "-d", "-m", "700", "-o", "subject", "-g", "subject", _SSH], 30)
    owner = "subject:subject"
    if role is Role.ORIGIN:
        machine.qga.write_file(f"{_SSH}/id_ed25519", keys.private, owner=owner)
        machine.qga.write_file(f"{_SSH}/id_ed25519.pub", keys.public, owner=owner)
    else:
        machine.qga.write_file(f"{_SSH}/authorized_keys", keys.public, owner=owner)


def _start_model(machine: Incarnation) -> None:
    start = [
        "/usr/sbin/runuser", "-u", "subject", "--", "/usr/bin/env", "-C", SYSTEM, "HOME=/home/subject",
        "/usr/bin/python3", "start.py", "--only", "model", "--model-port", str(MODEL_PORT),
        "--wait", f"{_MODEL_LIMIT_S:.0f}",
    ]  # fmt: skip
    _must(machine, start, _MODEL_LIMIT_S + 30)
    # One request through the path that probes use, so that whatever is made on first use exists.
    body = {"model": "subject", "prompt": "warm", "max_tokens": 1, "prompt_logprobs": 0}
    _must(
        machine,
        ["/usr/bin/curl", "-sS", "--fail-with-body", "-m", "120", "-H", "Content-Type: application/json",
         "-d", json.dumps(body), f"http://127.0.0.1:{MODEL_PORT}/v1/completions"],
        150,
    )  # fmt: skip


def _must(machine: Incarnation, argv: list[str], timeout_s: float) -> GuestResult:
    done = machine.qga.exec(argv, timeout_s=timeout_s, poll_s=0.05)
    if done.rc != 0:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()[-1500:]
        raise LabError(f"{machine.name}: {argv[0]} ended with {done.rc}: {printable(words, 1500)}")
    return done
