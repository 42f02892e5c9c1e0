"""The world's upload sink over a real socket, and the shell script that gives a guest its address."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from types import ModuleType

import pytest

from appliance.host import command


@pytest.fixture(scope="module")
def sink_module(project: Path) -> ModuleType:
    file = project / "ansible/roles/world/files/upload_sink.py"
    spec = importlib.util.spec_from_file_location("upload_sink", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sink(sink_module: ModuleType, tmp_path: Path) -> Iterator[tuple[HTTPConnection, Path]]:
    server = sink_module.Sink(0, tmp_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    connection = HTTPConnection("127.0.0.1", server.socket.getsockname()[1], timeout=10)
    yield connection, tmp_path
    connection.close()
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_upload_is_stored_hashed_and_logged(sink: tuple[HTTPConnection, Path]) -> None:
    connection, folder = sink
    body = b"weights" * 50_000
    connection.request("PUT", "/drop/model.safetensors", body)
    answer = json.loads(connection.getresponse().read())
    assert answer["size"] == len(body)
    assert answer["sha256"] == hashlib.sha256(body).hexdigest()
    assert (folder / "1.bin").read_bytes() == body
    (line,) = (folder / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == answer
    connection.request("GET", "/uploads/1")
    assert connection.getresponse().read() == body


def test_a_chunked_upload_is_taken(sink: tuple[HTTPConnection, Path]) -> None:
    connection, _ = sink
    connection.request("POST", "/x", iter([b"one", b"two", b"three"]), encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})  # fmt: skip
    assert json.loads(connection.getresponse().read())["size"] == 11


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/uploads/9", 404), ("/uploads/../1.bin", 200)])
def test_get_gives_no_file_but_an_upload(sink: tuple[HTTPConnection, Path], path: str, status: int) -> None:
    connection, folder = sink
    (folder / "secret").write_text("secret")
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == status
    assert b"secret" not in answer.read()


def run_net(project: Path, tmp_path: Path, cmdline: str) -> tuple[int, list[str], dict[str, str]]:
    """Run hotcell-net with its paths below ``tmp_path`` and an ``ip`` that only writes down its arguments."""
    root = tmp_path / "root"
    for folder in ("proc/sys/kernel", "proc/sys/net/ipv6/conf/eth0", "etc", "sys/class/net/eth0", "bin"):
        (root / folder).mkdir(parents=True)
    (root / "proc/cmdline").write_text(cmdline + "\n")
    script = (project / "ansible/roles/base/files/hotcell-net").read_text()
    script = re.sub(r"(?<![\w/])/(proc|etc|sys)/", rf"{root}/\1/", script)
    calls = tmp_path / "calls"
    calls.touch()
    text = f'ip() {{ echo "$*" >> {calls}; }}\n{script}'
    done = command.run(["sh", "-c", text], timeout=10, check=False)
    files = {p.name: p.read_text() for p in (root / "etc").iterdir()}
    return done.rc, calls.read_text().splitlines(), files


def test_a_guest_takes_name_addresses_and_route_from_the_command_line(project: Path, tmp_path: Path) -> None:
    rc, calls, files = run_net(
        project,
        tmp_path,
        "root=/dev/vda rw hotcell.name=target-1 hotcell.addr=10.77.0.21/24 hotcell.gw=10.77.0.1 quiet",
    )
    assert rc == 0
    assert "address replace 10.77.0.21/24 dev eth0" in calls
    assert "-6 address replace fd77::21/64 dev eth0 nodad" in calls
    assert "route replace default via 10.77.0.1 dev eth0" in calls
    assert files["hostname"] == "target-1\n"
    assert files["resolv.conf"].startswith("nameserver 10.77.0.1\n")


def test_a_guest_without_gateway_has_no_route_and_no_resolver(project: Path, tmp_path: Path) -> None:
    rc, calls, files = run_net(project, tmp_path, "hotcell.name=world hotcell.addr=10.77.0.1/24")
    assert rc == 0
    assert not any("route" in c for c in calls)
    assert "resolv.conf" not in files


def test_a_guest_without_address_only_brings_up_loopback(project: Path, tmp_path: Path) -> None:
    rc, calls, _ = run_net(project, tmp_path, "root=/dev/vda rw")
    assert rc == 0
    assert calls == ["link set lo up"]
