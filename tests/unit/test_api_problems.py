"""Every failure is a problem: status by class, bounded, no stack trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.problems import Problem, status_of
from appliance.cli.client import known_errors
from appliance.errors import (
    Blame,
    CapacityError,
    CommandError,
    ConfigError,
    ConflictError,
    GuestTamperError,
    HotcellError,
    LabError,
    NotFoundError,
    ResetError,
    SealError,
    UserError,
)
from tests.fakes.client import client
from tests.fakes.service import FakeLab


@pytest.fixture
def lab(tmp_path: Path) -> FakeLab:
    return FakeLab(tmp_path)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (UserError, 400),
        (ConfigError, 422),
        (NotFoundError, 404),
        (ConflictError, 409),
        (CapacityError, 503),
        (CommandError, 503),
        (LabError, 500),
        (ResetError, 500),
        (SealError, 503),
        (GuestTamperError, 502),
    ],
)
def test_each_class_has_its_status_and_keeps_its_words(
    lab: FakeLab, kind: type[HotcellError], status: int
) -> None:
    lab.fail["machines"] = kind("it is so", hint="do this", cell="lab", count=3)
    answer = client(lab).get("/v1/machines")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate(answer.json())
    assert problem.code == kind.code
    assert problem.blame == kind.blame
    assert (problem.detail, problem.hint) == ("it is so", "do this")
    assert problem.fields == {"cell": "lab", "count": "3"}
    assert problem.instance == "/v1/machines"
    assert problem.type == f"urn:hotcell:problem:{kind.code}"


def test_every_error_class_has_a_code_of_its_own_and_a_status() -> None:
    kinds = known_errors()

    def below(kind: type[HotcellError]) -> set[type[HotcellError]]:
        return {kind}.union(*(below(k) for k in kind.__subclasses__()))

    assert set(kinds.values()) == below(HotcellError), "two classes share a code"
    assert all(400 <= status_of(kind("x")) <= 599 for kind in kinds.values())
    assert all((status_of(k("x")) < 500) == (k.blame is Blame.USER) for k in kinds.values())


def test_an_unexpected_error_tells_its_kind_and_no_more(lab: FakeLab) -> None:
    lab.fail["machines"] = ZeroDivisionError("secret path /root/x")
    answer = client(lab).get("/v1/machines")
    assert answer.status_code == 500
    assert answer.json()["code"] == "internal"
    assert "ZeroDivisionError" in answer.json()["detail"]
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


def test_guest_text_in_an_error_is_bounded_and_printable(lab: FakeLab) -> None:
    lab.fail["machines"] = GuestTamperError("\x1b[2J" + "A" * 100_000, hint="\x07", raw="\x00" * 9000)
    answer = client(lab).get("/v1/machines")
    assert len(answer.content) < 20_000
    problem = answer.json()
    assert "\x1b" not in problem["detail"]
    assert "\x07" not in problem["hint"]
    assert "\x00" not in problem["fields"]["raw"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "no-such-path"),
        ("GET", "/v1/nothing", 404, "no-such-path"),
        ("GET", "/v1/health/", 404, "no-such-path"),
        ("GET", "/docs", 404, "no-such-path"),
        ("DELETE", "/v1/health", 405, "method-not-allowed"),
        ("PUT", "/v1/trials", 405, "method-not-allowed"),
        ("GET", "/v1/trials/..%2f..%2fetc", 404, "no-such-path"),
        ("GET", "/v1/trials/t1", 422, "invalid-request"),
        ("POST", "/v1/cells/LAB/machines/origin/reset", 422, "invalid-request"),
        ("POST", "/v1/cells/lab/machines/a;b/reset", 422, "invalid-request"),
        ("POST", "/v1/cells/lab%0a/machines/origin/reset", 422, "invalid-request"),
        ("GET", "/v1/trials?limit=0", 422, "invalid-request"),
        ("GET", "/v1/trials?colour=red", 422, "invalid-request"),
        ("GET", "/v1/trials?state=asleep", 422, "invalid-request"),
    ],
)
def test_what_does_not_exist_or_fit_is_a_problem(
    lab: FakeLab, method: str, path: str, status: int, code: str
) -> None:
    answer = client(lab).request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert Problem.model_validate(answer.json()).hint
    assert lab.calls == []


def test_a_method_that_is_not_allowed_names_those_that_are(lab: FakeLab) -> None:
    assert client(lab).delete("/v1/health").headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ("{", "body.1"),
        ('{"subject": "idle", "colour": 1}', "body.colour"),
        ('{"subject": "Idle!"}', "body.subject"),
        ('{"subject": "idle", "seed": -1}', "body.seed"),
        ('{"subject": "idle", "limits": {"steps": 0}}', "body.limits.steps"),
        ('{"subject": "idle", "limits": {"wall_s": 1e999}}', "body.limits.wall_s"),
        ('{"subject": "idle", "key": "a/b"}', "body.key"),
        ("[]", "body"),
        ("", "body"),
    ],
)
def test_a_wrong_body_says_where(lab: FakeLab, body: str, where: str) -> None:
    answer = client(lab).post("/v1/trials", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    problem = Problem.model_validate(answer.json())
    assert [m.where for m in problem.errors] == [where]
    assert lab.calls == []


@pytest.mark.parametrize("argv", [[], ["x"] * 65, ["x" * 5000], ["a\x00b"], "ls", [1]])
def test_a_wrong_command_is_refused(lab: FakeLab, argv: object) -> None:
    answer = client(lab).post("/v1/cells/lab/machines/origin/exec", json={"argv": argv})
    assert answer.status_code == 422
    assert lab.calls == []
