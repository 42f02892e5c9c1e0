#!/usr/bin/python3
"""Start the AI system of this folder: the model server and the agent, each in a session of its own.

Stands at the system folder's top beside ``weights/``, ``agent/`` and ``system.json``; standard library only.
Logs and pid files go to ``run/``. How the model server's Python is called comes from the machine, not from
the folder: ``/etc/hotcell/runtime.json`` (or ``--runtime-file``, or the variable HOTCELL_RUNTIME_FILE).

Exit status: 0 started (with ``--wait``: and answering), 1 not started or not answering, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path(__file__).resolve().parent
RUN = SYSTEM / "run"
RUNTIME_FILE = Path("/etc/hotcell/runtime.json")
TAIL_BYTES = 4000
POLL_S = 1.0
PROBE_S = 30.0  # seconds one health answer may take; without KVM a busy server is slow
STOP_S = 20.0  # seconds between SIGTERM and SIGKILL


class StartError(Exception):
    """Says in words for the user why the system cannot be started or stopped."""


@dataclass(frozen=True)
class Service:
    """One of the two processes."""

    name: str
    port: int
    argv: list[str]
    env: dict[str, str]

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return RUN / f"{self.name}.log"

    @property
    def pid_file(self) -> Path:
        """Holds pid and start time, since a pid alone may have been used again."""
        return RUN / f"{self.name}.pid"


def read_object(path: Path) -> dict[str, object]:
    """A JSON object from a file."""
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise StartError(f"{path}: not a JSON object")
    return value


def setting(table: dict[str, object], key: str, default: int) -> int:
    """A whole number above 0 of system.json."""
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise StartError(f"system.json: {key}: found {value!r}; allowed: a whole number above 0")
    return value


def model_service(args: argparse.Namespace, table: dict[str, object]) -> Service:
    """The model server, run by the machine's own runtime."""
    runtime = read_object(args.runtime_file)
    python, env = runtime.get("python"), runtime.get("env", {})
    if not isinstance(python, str) or not isinstance(env, dict):
        raise StartError(f'{args.runtime_file}: needs "python" (a path) and "env" (an object)')
    if not (SYSTEM / "weights").is_dir():
        raise StartError(f"no weights: {SYSTEM / 'weights'} is not a folder")
    argv = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", "weights"]
    argv += ["--served-model-name", str(table.get("model_name", "subject")), "--enforce-eager"]
    argv += ["--max-model-len", str(setting(table, "max_model_len", 2048))]
    argv += ["--host", "127.0.0.1", "--port", str(args.model_port)]
    extra = runtime.get("args", [])
    if not isinstance(extra, list):
        raise StartError(
            f'{args.runtime_file}: "args" must be a list of arguments, found {type(extra).__name__}'
        )
    argv += [str(x) for x in extra]
    return Service("model", args.model_port, argv, {str(k): str(v) for k, v in env.items()})


def agent_service(args: argparse.Namespace) -> Service:
    """The agent."""
    argv = [sys.executable or "/usr/bin/python3", "-m", "agent", "serve", "--port", str(args.agent_port)]
    argv += ["--model-url", f"http://127.0.0.1:{args.model_port}/v1"]
    for option, value in (("--task", args.task), ("--events", args.events)):
        if value is not None:
            argv += [option, str(Path(value).resolve())]
    return Service("agent", args.agent_port, argv, {})


def started_at(pid: int) -> int | None:
    """A process's start time in clock ticks since boot (proc(5), stat field 22); None if it is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    return None


def living_pid(service_pid_file: Path) -> int | None:
    """The pid of a pid file if that very process still lives."""
    with contextlib.suppress(OSError, ValueError):
        pid, start = (int(word) for word in service_pid_file.read_text(encoding="utf-8").split())
        return pid if started_at(pid) == start else None
    return None


def check_port(service: Service) -> None:
    """Refuse a port that something already listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", service.port))
        except OSError as error:
            raise StartError(
                f"port {service.port} for the {service.name} is already in use ({error.strerror}); "
                f"stop what uses it (start.py --stop, if it is this system) or give --{service.name}-port"
            ) from error


def launch(service: Service) -> None:
    """Start one process detached: own session, no terminal, output to its log."""
    RUN.mkdir(exist_ok=True)
    with service.log.open("ab") as log:
        try:
            process = subprocess.Popen(
                service.argv,
                cwd=SYSTEM,
                env={**os.environ, **service.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise StartError(f"cannot start the {service.name}: {error}") from error
    service.pid_file.write_text(f"{process.pid} {started_at(process.pid) or 0}\n", encoding="utf-8")
    print(f"{service.name}: pid {process.pid}, port {service.port}, log {service.log}")


def answers(port: int) -> bool:
    """True if /health on the port answers with 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=PROBE_S) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def tail(path: Path) -> str:
    """The end of a log."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return stream.read(TAIL_BYTES).decode("utf-8", errors="replace")
    return "(no log)"


def wait(services: list[Service], limit_s: float) -> None:
    """Return once all answer; fail at once if one has ended, or when the time is over."""
    begun = time.monotonic()
    left = list(services)
    while left:
        for service in list(left):
            if answers(service.port):
                left.remove(service)
                print(f"{service.name}: answers after {time.monotonic() - begun:.0f} s")
            elif living_pid(service.pid_file) is None:
                raise StartError(f"the {service.name} ended; its log ends:\n{tail(service.log)}")
        if left and time.monotonic() - begun > limit_s:
            name = left[0].name
            raise StartError(
                f"the {name} does not answer after {limit_s:.0f} s (it was left running); "
                f"its log ends:\n{tail(left[0].log)}"
            )
        if left:
            time.sleep(POLL_S)


def stop(names: list[str]) -> None:
    """End the processes of the pid files, and their process groups."""
    for name in names:
        pid_file = RUN / f"{name}.pid"
        pid = living_pid(pid_file)
        if pid is None:
            print(f"{name}: not running")
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGTERM)
                deadline = time.monotonic() + STOP_S
                while living_pid(pid_file) and time.monotonic() < deadline:
                    time.sleep(0.1)
                os.killpg(pid, signal.SIGKILL)
            print(f"{name}: stopped")
        pid_file.unlink(missing_ok=True)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line; ports default to system.json's."""
    parser = argparse.ArgumentParser(description="Start the AI system of this folder.")
    parser.add_argument("--only", choices=("model", "agent"), help="start (or stop) one of the two")
    parser.add_argument("--stop", action="store_true", help="stop instead of start")
    parser.add_argument("--wait", type=float, metavar="SECONDS", help="return once both answer /health")
    parser.add_argument("--model-port", type=int)
    parser.add_argument("--agent-port", type=int)
    parser.add_argument("--task", help="task file for the agent")
    parser.add_argument("--events", help="event port for the agent")
    runtime = Path(os.environ.get("HOTCELL_RUNTIME_FILE") or RUNTIME_FILE)
    parser.add_argument("--runtime-file", type=Path, default=runtime, help=f"default {runtime}")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Do what the arguments say; every port is checked before anything is started."""
    table = read_object(SYSTEM / "system.json")
    args.model_port = args.model_port or setting(table, "model_port", 8000)
    args.agent_port = args.agent_port or setting(table, "agent_port", 8100)
    names = [args.only] if args.only else ["model", "agent"]
    if args.stop:
        stop(names)
        return
    services = [model_service(args, table) if n == "model" else agent_service(args) for n in names]
    for service in services:
        check_port(service)
    for service in services:
        launch(service)
    if args.wait is not None:
        wait(services, args.wait)


def main(argv: list[str] | None = None) -> int:
    """Run, and say in one message what went wrong."""
    try:
        run(arguments(argv))
    except StartError as error:
        print(f"start.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
