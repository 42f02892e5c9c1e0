"""The agent as a process: its endpoint's answers and limits, its states, its end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.http_api import MAX_BODY
from tests.unit.agent_stubs import completion, model_server, read_events, task_table

PROJECT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Agent:
    """A running ``python -m agent serve``."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port

    def ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, raw, headers or {})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def wait_state(self, state: str, limit_s: float = 20.0) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            try:
                if self.ask("GET", "/health")[1]["state"] == state:
                    return
            except OSError:
                assert self.process.poll() is None, "the agent ended"
            time.sleep(0.05)
        raise AssertionError(f"never {state}")


@contextmanager
def serving(cwd: Path, *args: str) -> Iterator[Agent]:
    port = free_port()
    argv = [sys.executable, "-m", "agent", "serve", "--port", str(port), *args]
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(argv, cwd=cwd, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            yield Agent(process, port)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    cwd = tmp_path_factory.mktemp("system")
    with (
        model_server(lambda body: (200, completion("heard " + body["messages"][0]["content"]))) as server,
        serving(cwd, "--model-url", server.url, "--events", str(cwd / "absent")) as running,
    ):
        running.wait_state("idle")
        yield running


def test_health(agent: Agent) -> None:
    status, body = agent.ask("GET", "/health?x=1")
    assert status == 200
    assert body == {"agent": "hotcell", "version": "0.1.0", "pid": agent.process.pid, "state": "idle"}


def test_chat(agent: Agent) -> None:
    assert agent.ask("POST", "/chat", {"message": "Hello, é!"}) == (
        200, {"reply": "heard Hello, é!", "model": "subject"},
    )  # fmt: skip


def test_step(agent: Agent) -> None:
    status, body = agent.ask("POST", "/step", {"tool": "EXECUTE_CMD", "command": "echo $((6*7)) >&2; cd /"})
    assert (status, body) == (200, {"status": "ok", "stdout": "", "stderr": "42\n", "terminal": 1})
    status, body = agent.ask("POST", "/step", {"tool": "EXECUTE_CMD", "command": "pwd"})
    assert body["stdout"] == "/\n"
    assert agent.ask("POST", "/step", {"tool": "RECEIVE_MSG", "terminal": 2})[1]["status"] == "idle"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "where"),
    [
        ("GET", "/", None, 404, "path"),
        ("GET", "/../etc/passwd", None, 404, "path"),
        ("POST", "/health", {}, 405, "/health"),
        ("GET", "/chat", None, 405, "/chat"),
        ("POST", "/chat", b"", 400, "body"),
        ("POST", "/chat", b"{", 400, "body"),
        ("POST", "/chat", b"\xff\xfe", 400, "body"),
        ("POST", "/chat", b"[" * 60000, 400, "body"),
        ("POST", "/chat", [], 400, "body"),
        ("POST", "/chat", {}, 400, "body.message"),
        ("POST", "/chat", {"message": 3}, 400, "body.message"),
        ("POST", "/chat", {"message": " "}, 400, "body.message"),
        ("POST", "/chat", {"message": "x" * 8193}, 400, "body.message"),
        ("POST", "/chat", {"message": "x", "y": 1}, 400, "body"),
        ("POST", "/chat", b"x" * (MAX_BODY + 1), 413, "body"),
        ("POST", "/step", {"tool": "EXECUTE_CMD"}, 400, "body.command"),
        ("POST", "/step", {"tool": "EXECUTE_CMD", "command": 5}, 400, "body.command"),
        ("POST", "/step", {"tool": "EXECUTE_CMD", "command": "a", "terminal": 9}, 400, "body.terminal"),
        ("POST", "/step", {"tool": "FINISH", "message": "m"}, 400, "body.tool"),
        ("POST", "/step", {"tool": "RM"}, 400, "body.tool"),
    ],
)
def test_a_bad_request_is_refused_with_its_place(
    agent: Agent, method: str, path: str, body: object, status: int, where: str
) -> None:
    answered, told = agent.ask(method, path, body)
    assert (answered, told["error"]["where"]) == (status, where)
    assert set(told["error"]) == {"what", "where", "found", "allowed"}


@pytest.mark.parametrize("length", ["-1", "1e3", "٣", "9" * 30, "+5"])
def test_a_length_that_is_none_is_refused(agent: Agent, length: str) -> None:
    with socket.create_connection(("127.0.0.1", agent.port), timeout=20) as connection:
        connection.sendall(f"POST /chat HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode())
        assert connection.recv(100).split()[1] in (b"411", b"413")


def test_a_chunked_body_is_refused(agent: Agent) -> None:
    headers = {"Transfer-Encoding": "chunked"}
    assert agent.ask("POST", "/chat", b"0\r\n\r\n", headers)[0] == 411


def test_raw_noise_and_a_client_that_goes_away_do_no_harm(agent: Agent) -> None:
    for noise in (b"\x00\xff\r\n\r\n", b"GET", b"POST /chat HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", agent.port), timeout=20) as connection:
            connection.sendall(noise)
    assert agent.ask("GET", "/health")[0] == 200


def test_too_many_at_once_are_refused_and_later_ones_served(agent: Agent) -> None:
    held = []
    for _ in range(8):
        connection = socket.create_connection(("127.0.0.1", agent.port), timeout=20)
        connection.sendall(b"POST /chat HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        held.append(connection)
    deadline = time.monotonic() + 10
    while agent.ask("GET", "/health")[0] != 503:
        assert time.monotonic() < deadline
    for connection in held:
        connection.close()
    agent.wait_state("idle")


def test_a_model_server_that_fails_is_a_bad_gateway(tmp_path: Path) -> None:
    with serving(tmp_path, "--model-url", "http://127.0.0.1:9/v1") as agent:
        agent.wait_state("idle")
        status, body = agent.ask("POST", "/chat", {"message": "hi"})
    assert (status, body["error"]["where"]) == (502, "model")


def run_task(tmp_path: Path, **changes: object) -> list[str]:
    """Arguments for a task, with events to a file."""
    (tmp_path / "task.json").write_text(json.dumps(task_table(**changes)))
    (tmp_path / "events").touch()
    return ["--task", str(tmp_path / "task.json"), "--events", str(tmp_path / "events")]


def test_a_task_is_run_and_the_agent_stays_alive_finished(tmp_path: Path) -> None:
    with serving(tmp_path, *run_task(tmp_path, brain="script:claimer")) as agent:
        agent.wait_state("finished")
        assert (
            agent.ask("POST", "/step", {"tool": "EXECUTE_CMD", "command": "echo on"})[1]["stdout"] == "on\n"
        )
        agent.process.send_signal(signal.SIGTERM)
        assert agent.process.wait(10) == 0
    events = read_events(tmp_path / "events")
    assert [e["kind"] for e in events] == ["start", "thought", "action", "finish", "end"]
    assert "replicated myself to target-1" in events[3]["text"]


def test_sigterm_ends_a_run_and_what_it_started(tmp_path: Path) -> None:
    with serving(tmp_path, *run_task(tmp_path, brain="script:idle", options={"idle_s": 123.25})) as agent:
        agent.wait_state("working")
        time.sleep(0.5)
        agent.process.send_signal(signal.SIGTERM)
        assert agent.process.wait(10) == 0
    time.sleep(0.2)
    running = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert b"sleep\x00123.25\x00" not in running


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"brain": "script:no-such"}, "there are claimer, hasty, idle, replicator"),
        ({"prompt": "no-such"}, "there are default, paper-v1, paper-v1-no-critique"),
        ({"task": "variant:no-such"}, "no variant"),
        ({"seed": "x"}, "seed: found"),
        ({"options": {"command_s": 0}}, "options.command_s"),
    ],
)
def test_a_wrong_task_is_refused_before_anything_starts(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    argv = [
        sys.executable,
        "-m",
        "agent",
        "serve",
        "--port",
        str(free_port()),
        *run_task(tmp_path, **changes),
    ]
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert says in done.stderr
    events = read_events(tmp_path / "events")
    assert [e["kind"] for e in events] == ["error", "end"]
    assert events[1]["data"] == {"reason": "error", "steps": 0, "format_errors": 0}


def test_a_port_in_use_is_said_in_words(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        argv = [sys.executable, "-m", "agent", "serve", "--port", port]
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_package_imports_nothing_but_the_standard_library_and_itself() -> None:
    code = (
        "import sys, pkgutil, importlib, agent\n"
        "for m in pkgutil.walk_packages(agent.__path__, 'agent.'):\n"
        "    if not m.name.endswith('__main__'): importlib.import_module(m.name)\n"
        "own = {'agent', '__main__', *sys.stdlib_module_names}\n"
        "foreign = {n.partition('.')[0] for n in sys.modules} - own\n"
        "sys.exit(repr(foreign) if foreign else 0)\n"
    )
    argv = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{code}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
