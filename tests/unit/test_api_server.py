"""The server as a process: what is bound when, who gets in, how it ends, what it leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.server import serve
from appliance.errors import ConfigError, ConflictError, HostError
from appliance.host import command
from appliance.host.paths import Paths
from tests.fakes.running import running, short_home, spawn_server
from tests.fakes.service import FakeLab


@pytest.fixture(scope="module")
def live() -> Iterator[Paths]:
    with running() as paths:
        yield paths


@pytest.fixture
def home() -> Iterator[Paths]:
    with short_home() as paths:
        yield paths


def unix(paths: Paths, token: str | None = None) -> httpx.Client:
    token = paths.token.read_text().strip() if token is None else token
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=os.fspath(paths.api_socket)),
        base_url="http://localhost",
        headers={"Authorization": f"Bearer {token}"},
    )


def unsealed() -> None:
    raise AssertionError("the process must not be sealed")


def never() -> FakeLab:
    raise AssertionError("the laboratory must not be opened")


def test_sockets_are_bound_before_the_seal_and_announced_after(live: Paths) -> None:
    assert (live.home / "order").read_text().splitlines()[:2] == [
        "sealed bound=True announced=False",
        "opened",
    ]


def test_the_unix_socket_answers_and_is_private(live: Paths) -> None:
    with unix(live) as http:
        assert http.get("/v1/health").json()["ok"] is True
    for path in (live.api_socket, live.token, live.server_file):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    with unix(live, "wrong") as http:
        assert http.get("/v1/health").status_code == 401


def test_the_tcp_port_answers_where_the_server_file_says(live: Paths) -> None:
    info = json.loads(live.server_file.read_text())
    assert info["url"].startswith("http://127.0.0.1:")
    assert info["started"] <= time.time()
    os.kill(info["pid"], 0)
    headers = {"Authorization": f"Bearer {live.token.read_text().strip()}"}
    answer = httpx.get(f"{info['url']}/v1/health", headers=headers, trust_env=False)
    assert answer.status_code == 200
    assert "server" not in answer.headers
    assert httpx.get(f"{info['url']}/v1/health", trust_env=False).status_code == 401


def test_a_second_server_for_the_same_home_is_refused(live: Paths) -> None:
    with pytest.raises(ConflictError, match="another server"):
        serve(never, live, port=0, seal=unsealed)
    with unix(live) as http:
        assert http.get("/v1/health").status_code == 200


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_the_laboratory_and_leaves_nothing(home: Paths, signum: int) -> None:
    child = spawn_server(home, "0.5")
    with unix(home) as http:
        trial = http.post("/v1/trials", json={"subject": "idle"}).json()["id"]
        ended: list[str] = []

        def read() -> None:
            with http.stream("GET", f"/v1/trials/{trial}/events") as answer:
                ended.append("".join(answer.iter_text()))

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.3)
        assert command.end(child, grace=10, sig=signum) == 0
        reader.join(5)
    assert "queued" in ended[0], "the event stream was cut instead of ended"
    assert (home.home / "order").read_text().splitlines()[-1] == "closed announced=False"
    assert not home.server_file.exists()
    assert not home.api_socket.exists()
    assert "Traceback" not in (home.home / "log").read_text()


def test_a_killed_server_does_not_stand_in_the_way_of_the_next(home: Paths) -> None:
    child = spawn_server(home)
    token = home.token.read_text()
    command.end(child, grace=1, sig=signal.SIGKILL)
    assert home.server_file.exists()
    child = spawn_server(home)
    try:
        with unix(home) as http:
            assert http.get("/v1/health").status_code == 200
        assert home.token.read_text() == token
    finally:
        command.end(child)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_an_address_that_others_reach_must_be_allowed(home: Paths, host: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        serve(never, home, host, 0, seal=unsealed)
    assert not home.token.exists()


@pytest.mark.parametrize("host", ["", "example.org", "127.0.0.1/8", "127.1"])
def test_what_is_no_address_is_refused(home: Paths, host: str) -> None:
    with pytest.raises(ConfigError, match="not an IP address"):
        serve(never, home, host, 0, seal=unsealed)


def test_a_taken_port_is_the_hosts_fault(home: Paths) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(HostError, match="cannot listen"):
        serve(never, home, port=taken.getsockname()[1], seal=unsealed)
    assert not home.api_socket.exists()


def test_a_file_in_place_of_the_socket_is_not_removed(home: Paths) -> None:
    home.api_socket.write_text("precious")
    with pytest.raises(HostError, match="not a socket"):
        serve(never, home, port=0, seal=unsealed)
    assert home.api_socket.read_text() == "precious"


def test_if_the_laboratory_does_not_open_nothing_is_left(home: Paths, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def broken() -> FakeLab:
        raise HostError("no libvirt")

    with pytest.raises(HostError, match="no libvirt"):
        serve(broken, home, port=0, seal=lambda: None)
    assert not home.api_socket.exists()
    assert not home.server_file.exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_unsealed_laboratory_is_never_opened(home: Paths) -> None:
    def no_seal() -> None:
        raise HostError("unshare refused")

    with pytest.raises(HostError, match="unshare"):
        serve(never, home, port=0, seal=no_seal)
