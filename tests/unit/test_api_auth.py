"""Who is let in: token, Host header, body size, token file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from api.auth import MAX_BODY, ensure_token, read_token
from appliance.errors import ConfigError
from tests.fakes.client import TOKEN, client
from tests.fakes.service import FakeLab


@pytest.fixture
def lab(tmp_path: Path) -> FakeLab:
    return FakeLab(tmp_path)


@pytest.mark.parametrize("token", [None, "", "x" * 43, TOKEN[:-1], TOKEN + "t", "t\u00e9"])
def test_a_wrong_token_is_refused_and_nothing_is_called(lab: FakeLab, token: str | None) -> None:
    http = client(lab, None)
    headers = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
    answer = http.get("/v1/health", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "unauthorized"
    assert lab.calls == []


@pytest.mark.parametrize("path", ["/v1/openapi.json", "/nowhere", "/v1/trials", "/"])
def test_every_path_needs_the_token(lab: FakeLab, path: str) -> None:
    assert client(lab, None).get(path).status_code == 401


def test_another_scheme_with_the_right_token_is_refused(lab: FakeLab) -> None:
    http = client(lab, None)
    assert http.get("/v1/health", headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401
    assert http.get("/v1/health", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:7077", "127.0.0.1:1", "[::1]:7077", "[::1]"])
def test_local_hosts_are_served(lab: FakeLab, host: str) -> None:
    assert client(lab).get("/v1/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost:80:80",
        "127.0.0.2",
        "",
        "[::2]",
    ],
)
def test_a_rebound_name_is_refused_before_the_token_is_looked_at(lab: FakeLab, host: str) -> None:
    answer = client(lab).get("/v1/health", headers={"Host": host})
    assert answer.status_code == 421
    assert answer.json()["code"] == "wrong-host"
    assert client(lab, None).get("/v1/health", headers={"Host": host}).status_code == 421


def test_no_answer_allows_another_origin(lab: FakeLab) -> None:
    answer = client(lab).get("/v1/health", headers={"Origin": "http://evil.example"})
    assert not [h for h in answer.headers if h.startswith("access-control")]
    preflight = client(lab).options("/v1/health", headers={"Origin": "http://evil.example"})
    assert preflight.status_code == 405


def test_a_body_at_the_limit_is_read_and_one_over_it_is_not(lab: FakeLab) -> None:
    http = client(lab)
    head, tail = b'{"reason": "', b'"}'
    for size, status in ((MAX_BODY, 422), (MAX_BODY + 1, 413)):
        body = head + b"r" * (size - len(head) - len(tail)) + tail
        answer = http.post("/v1/kill", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
    assert lab.calls == []


def test_a_chunked_body_cannot_slip_past_the_limit(lab: FakeLab) -> None:
    def chunks() -> object:
        for _ in range(80):
            yield b" " * 1024

    answer = client(lab).post("/v1/kill", content=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["code"] == "too-large"
    assert lab.calls == []


@pytest.mark.parametrize("length", ["-1", "abc", "9" * 400, "\u0663"])
def test_a_strange_content_length_is_refused(lab: FakeLab, length: str) -> None:
    answer = client(lab).post("/v1/kill", content=b"", headers={"Content-Length": length.encode()})
    assert answer.status_code == 413


def test_the_token_file_is_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "token"
    before = os.umask(0)
    try:
        token = ensure_token(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) >= 43
    assert ensure_token(path) == token == read_token(path)
    assert ensure_token(tmp_path / "other") != token


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    ensure_token(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="0640"):
        ensure_token(path)


@pytest.mark.parametrize("content", ["", "short\n", "x" * 300, "a b" * 20])
def test_a_token_file_without_a_token_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="does not hold"):
        ensure_token(path)


def test_a_link_in_place_of_the_token_file_is_refused(tmp_path: Path) -> None:
    ensure_token(tmp_path / "real")
    (tmp_path / "token").symlink_to("real")
    with pytest.raises(ConfigError):
        ensure_token(tmp_path / "token")
