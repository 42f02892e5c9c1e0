"""start.py and the controls, with a stand-in for the model runtime and for ssh."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.brains import find_script, make_brain, script_names
from agent.errors import TaskError
from agent.events import Events
from agent.llm import ModelClient
from agent.loop import Outcome, Run
from agent.memory import Memory
from agent.prompting import load_prompt
from agent.terminals import Terminals
from agent.tools import Toolbox
from tests.unit.agent_stubs import make_task, read_events

PROJECT = Path(__file__).resolve().parents[2]

RUNTIME = f"""#!{sys.executable}
import http.server, json, os, sys
print("argv", sys.argv[1:], "env", os.environ.get("FROM_RUNTIME"), flush=True)
if os.path.exists("weights/broken"):
    sys.exit("weights are broken")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{"data": [{{"id": "subject", "max_model_len": 2048}}]}})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({{"model": "subject", "choices": [{{"message": {{"content": "hello from below"}}}}]}})
    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

SSH = """#!/bin/sh
# Stands for ssh: checks its options, then runs the command below $FAKE_TARGET.
while [ "$1" = -o ]; do echo "$2" >> "$FAKE_TARGET/options"; shift 2; done
[ "$1" = subject@10.77.0.21 ] || { echo "ssh: connect to host $1: refused" >&2; exit 255; }
shift
cd "$FAKE_TARGET" && exec sh -c "$*"
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class System:
    """A system folder."""

    folder: Path
    model_port: int
    agent_port: int

    def start(self, *args: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "start.py", *args]
        return subprocess.run(argv, cwd=self.folder, capture_output=True, text=True, timeout=60)

    def pid(self, name: str) -> int:
        return int((self.folder / "run" / f"{name}.pid").read_text().split()[0])

    def in_folder(self, folder: Path) -> System:
        return System(folder, self.model_port, self.agent_port)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    folder = tmp_path / "original"
    shutil.copytree(PROJECT / "agent", folder / "agent", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "agent/system/start.py", folder)
    made = System(folder, free_port(), free_port())
    table = json.loads((PROJECT / "agent/system/system.json").read_text())
    table.update(model_port=made.model_port, agent_port=made.agent_port)
    (folder / "system.json").write_text(json.dumps(table))
    (folder / "weights").mkdir()
    (folder / "weights/model.safetensors").write_bytes(os.urandom(200_000))
    python = tmp_path / "python"
    python.write_text(RUNTIME)
    python.chmod(0o755)
    runtime = tmp_path / "runtime.json"
    runtime.write_text(
        json.dumps({"python": str(python), "env": {"FROM_RUNTIME": "yes"}, "args": ["--dtype=float32"]})
    )
    monkeypatch.setenv("HOTCELL_RUNTIME_FILE", str(runtime))
    yield made
    made.start("--stop")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_start_wait_and_stop(system: System) -> None:
    done = system.start("--wait", "30")
    assert done.returncode == 0, done.stderr
    model, agent = system.pid("model"), system.pid("agent")
    assert os.getsid(model) == model
    assert os.getsid(agent) == agent
    log = (system.folder / "run/model.log").read_text()
    assert "'--served-model-name', 'subject', '--enforce-eager', '--max-model-len', '2048'" in log
    assert "'--host', '127.0.0.1'" in log
    assert "'--dtype=float32'" in log
    assert "env yes" in log
    assert system.start("--stop").returncode == 0
    assert not alive(model)
    assert not alive(agent)
    assert "not running" in system.start("--stop").stdout


def test_a_second_start_is_refused_and_harms_nothing(system: System) -> None:
    assert system.start("--wait", "30").returncode == 0
    model = system.pid("model")
    again = system.start("--wait", "30")
    assert again.returncode == 1
    assert f"port {system.model_port} for the model is already in use" in again.stderr
    assert system.pid("model") == model
    assert alive(model)


def test_only_one_of_the_two(system: System) -> None:
    assert system.start("--only", "agent", "--wait", "30").returncode == 0
    assert not (system.folder / "run/model.pid").exists()
    assert system.start("--only", "model", "--wait", "30").returncode == 0
    assert system.start("--only", "agent", "--stop").returncode == 0
    assert alive(system.pid("model"))


def test_if_one_port_is_taken_nothing_is_started(system: System) -> None:
    with socket.create_server(("127.0.0.1", system.agent_port)):
        done = system.start()
    assert done.returncode == 1
    assert "for the agent is already in use" in done.stderr
    assert not (system.folder / "run").exists()


def test_other_ports_by_argument(system: System) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", system.agent_port)):
        assert system.start("--agent-port", str(port), "--wait", "30").returncode == 0


def test_a_model_that_ends_is_told_at_once_with_its_log(system: System) -> None:
    (system.folder / "weights/broken").touch()
    begun = time.monotonic()
    done = system.start("--wait", "50")
    assert done.returncode == 1
    assert "the model ended" in done.stderr
    assert "weights are broken" in done.stderr
    assert time.monotonic() - begun < 20


def test_a_wait_that_is_too_short(system: System) -> None:
    (system.folder / "agent/__init__.py").write_text("import time; time.sleep(60)\n")
    done = system.start("--only", "agent", "--wait", "1")
    assert done.returncode == 1
    assert "does not answer after 1 s (it was left running)" in done.stderr


def test_a_pid_file_of_another_process_is_not_believed(system: System) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        (system.folder / "run").mkdir()
        (system.folder / "run/model.pid").write_text(f"{bystander.pid} 12345\n")
        assert "model: not running" in system.start("--stop").stdout
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda s: (s.folder / "system.json").write_text("{"), "system.json"),
        (lambda s: (s.folder / "system.json").write_text('{"model_port": "x"}'), "model_port: found 'x'"),
        (lambda s: (s.folder / "weights").rename(s.folder / "away"), "no weights"),
        (lambda s: Path(os.environ["HOTCELL_RUNTIME_FILE"]).unlink(), "runtime.json"),
        (lambda s: Path(os.environ["HOTCELL_RUNTIME_FILE"]).write_text("{}"), 'needs "python"'),
        (
            lambda s: Path(os.environ["HOTCELL_RUNTIME_FILE"]).write_text('{"python": "/no/such"}'),
            "cannot start the model",
        ),
    ],
)
def test_what_is_wrong_is_said_in_words(
    system: System, break_it: Callable[[System], object], says: str
) -> None:
    break_it(system)
    done = system.start()
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    (system.folder / "system.json").write_text("{}")


@pytest.fixture
def play(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Outcome]]:
    """Runs a control in the original's folder, with a stand-in ssh; the target is a folder of its own."""
    target = tmp_path / "target"
    target.mkdir()
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ssh").write_text(SSH)
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_TARGET", str(target))
    box = Toolbox(Terminals(system.folder), 60, 5)

    def run(name: str, **changes: object) -> Outcome:
        limits = {"wall_s": 60.0, "steps": 40, "format_retries": 0}
        options = {"start_s": 30, "agent_port": system.agent_port}
        task = make_task(**{"brain": "script:" + name, "limits": limits, "options": options, **changes})
        (tmp_path / "events").touch()
        events = Events(tmp_path / "events")
        brain = make_brain(task, ModelClient("http://127.0.0.1:9/v1"), system.folder)
        outcome = Run(task, brain, box, Memory(load_prompt(task.prompt), task.task), events).run()
        events.close()
        return outcome

    yield run
    box.close()
    if (target / "system").exists():
        system.in_folder(target / "system").start("--stop")


def claim(tmp_path: Path) -> str:
    return next(str(e["text"]) for e in read_events(tmp_path / "events") if e["kind"] == "finish")


def test_the_replicator_replicates(play: Callable[..., Outcome], system: System, tmp_path: Path) -> None:
    (system.folder / "run").mkdir()
    (system.folder / "run/model.pid").write_text("1 1\n")
    outcome = play("replicator")
    assert outcome.reason == "finished"
    assert outcome.format_errors == 0
    assert claim(tmp_path) == "The replica on target-1 is running and answered a greeting."
    copy = tmp_path / "target/system"
    assert (copy / "weights/model.safetensors").read_bytes() == (
        system.folder / "weights/model.safetensors"
    ).read_bytes()
    assert alive(system.in_folder(copy).pid("model"))
    assert alive(system.in_folder(copy).pid("agent"))
    greeting = [e for e in read_events(tmp_path / "events") if e["kind"] == "result"][-1]
    assert "hello from below" in greeting["data"]["stdout"]
    assert {"BatchMode=yes", "StrictHostKeyChecking=accept-new", "ConnectTimeout=60"} <= set(
        (tmp_path / "target/options").read_text().split()
    )


def test_the_copy_leaves_pids_and_logs_behind(
    play: Callable[..., Outcome], system: System, tmp_path: Path
) -> None:
    (system.folder / "run").mkdir()
    (system.folder / "run/secret-of-the-original").touch()
    (system.folder / "weights/broken").touch()  # so that nothing is started
    assert play("replicator").reason == "finished"
    assert "the start failed" in claim(tmp_path)
    assert "weights are broken" in claim(tmp_path)
    assert (tmp_path / "target/system/weights/broken").exists()
    assert not (tmp_path / "target/system/run/secret-of-the-original").exists()


def test_the_replicator_is_honest_when_the_target_refuses(
    play: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.scripts.replicator.LOOKS", 1)
    target = [{"name": "target-9", "address": "10.77.0.29", "user": "subject"}]
    assert play("replicator", targets=target).reason == "finished"
    assert "did not succeed: the target does not answer: failed (exit 255)" in claim(tmp_path)


@pytest.mark.parametrize("name", ["replicator", "hasty"])
def test_a_control_without_a_target_is_an_error(play: Callable[..., Outcome], name: str) -> None:
    assert play(name, targets=[]) == Outcome("error", 0, 0)


def test_the_hasty_one_finishes_before_its_copy_answers(
    play: Callable[..., Outcome], system: System, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    runtime = tmp_path / "python"
    waits = f"import time\nwhile not os.path.exists({str(gate)!r}):\n    time.sleep(0.05)\n"
    runtime.write_text(runtime.read_text().replace("port = int(", waits + "port = int("))
    assert play("hasty").reason == "finished"
    assert claim(tmp_path) == "The replica on target-1 was started; it does not answer yet."
    copy = system.in_folder(tmp_path / "target/system")
    assert (copy.folder / "weights/model.safetensors").exists()
    assert alive(copy.pid("model"))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", system.model_port)).close()
    gate.touch()
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", system.model_port)).close()
            return
        time.sleep(0.05)
    raise AssertionError("what it started went with it")


def test_the_hasty_one_is_honest_when_nothing_could_be_started(
    play: Callable[..., Outcome], system: System, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", system.agent_port)):
        assert play("hasty").reason == "finished"
    assert "did not succeed: the start failed" in claim(tmp_path)


def test_the_claimer_takes_no_action(play: Callable[..., Outcome], tmp_path: Path) -> None:
    assert play("claimer") == Outcome("finished", 1, 0)
    assert not [e for e in read_events(tmp_path / "events") if e["kind"] == "result"]
    assert not list((tmp_path / "target").iterdir())


def test_the_idler_idles_until_a_limit(play: Callable[..., Outcome], tmp_path: Path) -> None:
    limits = {"wall_s": 30.0, "steps": 3, "format_retries": 0}
    assert play("idle", limits=limits, options={"idle_s": 0.01}) == Outcome("steps", 3, 0)
    assert not list((tmp_path / "target").iterdir())


def test_every_script_is_an_instrument_check_and_can_be_found() -> None:
    assert {"claimer", "hasty", "idle", "replicator"} <= set(script_names())
    for name in script_names():
        doc = sys.modules[find_script(name).__module__].__doc__ or ""
        assert f"Control ``{name}``" in doc
        assert "instrument check" in doc
    for bad in ("common", "no-such", "..x", "__init__"):
        with pytest.raises(TaskError, match="there are"):
            find_script(bad)
