"""Each route calls its one method and returns what it gave."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from appliance.errors import ConflictError, LabError
from appliance.model import TrialState
from tests.fakes.client import client
from tests.fakes.service import FakeLab


@pytest.fixture
def lab(tmp_path: Path) -> FakeLab:
    return FakeLab(tmp_path)


def wait_ended(lab: FakeLab, trial: str) -> None:
    limit = time.monotonic() + 5
    while not lab.trial(trial).state.ended:
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.mark.parametrize("path", ["health", "host", "images", "cells", "machines", "baselines", "trials"])
def test_reading(lab: FakeLab, path: str) -> None:
    answer = client(lab).get(f"/v1/{path}")
    assert answer.status_code == 200
    assert lab.calls[0][0] == path


def test_machine_verbs_pass_their_arguments(lab: FakeLab) -> None:
    http = client(lab)
    base = "/v1/cells/lab/machines/target-1"
    assert http.post(f"{base}/snapshot", json={"name": "clean"}).status_code == 201
    assert http.post(f"{base}/snapshot", json={"name": "clean"}).status_code == 409
    assert http.post(f"{base}/reset").json()["proved"] is True
    assert http.post(f"{base}/exec", json={"argv": ["echo", "a b", "$(x)"], "timeout_s": 3}).json()["rc"] == 0
    assert http.post(f"{base}/probe").json()["listeners"] == [22]
    assert http.post("/v1/cells/none/machines/target-1/probe").status_code == 404
    assert http.post(f"{base}/snapshot", json={"name": "cold", "kind": "disk"}).json()["kind"] == "disk"
    assert http.post(f"{base}/snapshot", json={"name": "x", "kind": "tape"}).status_code == 422
    assert http.post(f"{base}/reset", json={"baseline": "clean"}).status_code == 200
    assert http.post(f"{base}/reset", json={"baseline": "none"}).status_code == 404
    other = "/v1/cells/lab/machines/origin"
    assert http.post(f"{other}/reset", json={"baseline": "clean"}).status_code == 409
    assert ("snapshot", "lab", "target-1", "clean", None) in lab.calls
    assert ("snapshot", "lab", "target-1", "cold", "disk") in lab.calls
    assert ("reset", "lab", "target-1", "clean") in lab.calls
    assert ("exec", "lab", "target-1", ["echo", "a b", "$(x)"], 3.0) in lab.calls


def test_baselines_are_shown_deleted_and_taken_elsewhere(lab: FakeLab) -> None:
    http = client(lab)
    http.post("/v1/cells/lab/machines/target-1/snapshot", json={"name": "clean"})
    assert http.get("/v1/baselines/clean").json()["needed_by"] == ["c1 uses it"]
    assert http.post("/v1/baselines/clean/export", json={"to": "/srv/clean"}).status_code == 201
    assert ("export_baseline", "clean", Path("/srv/clean")) in lab.calls
    made = http.post("/v1/baselines/import", json={"folder": "/srv/clean", "name": "back"})
    assert (made.status_code, made.json()["created_by"]) == (201, "import")
    assert http.get("/v1/transfers").json()[0]["verb"] == "export"
    assert http.delete("/v1/baselines/clean").json()["name"] == "clean"
    assert http.delete("/v1/baselines/clean").status_code == 404
    assert http.get("/v1/baselines/clean").status_code == 404
    lab.fail["delete_baseline"] = ConflictError("back: c1 uses it", hint="close c1", dependants="c1")
    refused = http.delete("/v1/baselines/back")
    assert (refused.status_code, refused.json()["fields"]) == (409, {"dependants": "c1"})


@pytest.mark.parametrize("path", ["", "relative", "~/x", "/a\0b", "/" + "x" * 1000, None, 5])
def test_a_path_that_is_none_is_refused_at_the_door(lab: FakeLab, path: object) -> None:
    http = client(lab)
    assert http.post("/v1/baselines/clean/export", json={"to": path}).status_code == 422
    assert http.post("/v1/baselines/import", json={"folder": path}).status_code == 422
    assert lab.calls == []


@pytest.mark.parametrize("name", ["..", "%2e%2e%2fetc", "A", "a" * 41, ".clean"])
def test_a_baselines_name_that_is_none_is_refused_at_the_door(lab: FakeLab, name: str) -> None:
    for answer in (client(lab).get(f"/v1/baselines/{name}"), client(lab).delete(f"/v1/baselines/{name}")):
        assert answer.status_code in {404, 405, 422}
    assert lab.calls == []


def test_a_cell_opens_and_closes(lab: FakeLab) -> None:
    http = client(lab)
    made = http.post("/v1/cells", json={"targets": 2})
    assert made.status_code == 201
    assert made.json()["machines"] == ["origin", "target-1", "target-2"]
    assert http.delete(f"/v1/cells/{made.json()['id']}").json()["state"] == "closed"
    assert http.delete(f"/v1/cells/{made.json()['id']}").status_code == 404


def test_switches_take_an_optional_body(lab: FakeLab) -> None:
    http = client(lab)
    assert http.post("/v1/kill").json()["reason"]
    assert http.post("/v1/kill", json={"reason": "fire"}).json()["reason"] == "fire"


def test_the_kill_switch_waits_for_no_other_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, go = FakeLab(tmp_path), threading.Event()
    busy = threading.Semaphore(0)

    def works() -> None:
        busy.release()
        go.wait(60)
        raise LabError("it took long")

    monkeypatch.setattr(lab, "host", works)
    with client(lab) as http, ThreadPoolExecutor(60) as threads:
        others = [threads.submit(http.get, "/v1/host") for _ in range(59)]
        try:
            for _ in range(40):  # as many threads as serve requests
                assert busy.acquire(timeout=30)
            assert threads.submit(http.post, "/v1/kill").result(30).status_code == 200
        finally:
            go.set()
        assert {o.result(60).status_code for o in others} == {500}
    assert http.post("/v1/trials", json={"subject": "idle"}).status_code == 409
    assert http.post("/v1/rearm").json()["accepting"] is True
    assert http.post("/v1/sweep").json()["dry_run"] is True, "removing must be asked for"
    assert http.post("/v1/sweep", json={"dry_run": False}).json()["strays"][0]["outcome"] == "removed"


def test_a_trial_posted_twice_with_a_key_is_one_trial(lab: FakeLab) -> None:
    http = client(lab)
    body = {"subject": "idle", "key": "k1"}
    first, second = http.post("/v1/trials", json=body), http.post("/v1/trials", json=body)
    assert first.status_code == second.status_code == 201
    assert first.json()["id"] == second.json()["id"]
    assert first.headers["location"] == f"/v1/trials/{first.json()['id']}"
    assert http.post("/v1/trials", json={**body, "seed": 1}).status_code == 409
    assert http.post("/v1/trials", json={"subject": "idle"}).json()["id"] != first.json()["id"]


def test_trials_are_filtered_and_paged(lab: FakeLab) -> None:
    http = client(lab)
    for subject in ("idle", "claimer", "idle"):
        http.post("/v1/trials", json={"subject": subject})
    page = http.get("/v1/trials", params={"subject": "idle", "limit": 1, "offset": 1}).json()
    assert (page["total"], len(page["items"]), page["items"][0]["subject"]) == (2, 1, "idle")
    http.get("/v1/trials", params={"state": "void"})
    assert lab.calls[-1] == ("trials", TrialState.VOID, None, 50, 0)


def test_abort_score_and_bundle(tmp_path: Path) -> None:
    lab = FakeLab(tmp_path, step_s=0.2)
    http = client(lab)
    trial = http.post("/v1/trials", json={"subject": "idle"}).json()["id"]
    assert http.get(f"/v1/trials/{trial}/score").status_code == 409
    assert http.get(f"/v1/trials/{trial}/bundle").status_code == 409
    assert http.post(f"/v1/trials/{trial}/abort").json()["state"] == "aborted"
    assert http.post(f"/v1/trials/{trial}/abort").status_code == 409
    unknown = "/v1/trials/t20250102-030405-ffffff"
    assert {http.get(unknown + tail).status_code for tail in ("", "/score", "/bundle", "/events")} == {404}


def test_a_bundle_is_a_plain_tar_that_repeats_byte_for_byte(lab: FakeLab) -> None:
    http = client(lab)
    trial = http.post("/v1/trials", json={"subject": "idle"}).json()["id"]
    wait_ended(lab, trial)
    answer = http.get(f"/v1/trials/{trial}/bundle")
    assert answer.headers["content-type"] == "application/x-tar"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert http.get(f"/v1/trials/{trial}/bundle").content == answer.content
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        names = tar.getnames()
        content = tar.extractfile(f"{trial}/disks/target-1.json")
        assert content is not None
        assert content.read() == b"x" * 1000
    assert names == [trial, f"{trial}/disks", f"{trial}/disks/target-1.json", f"{trial}/journal.jsonl"]


def test_a_bundle_with_a_link_in_it_is_not_sent(lab: FakeLab, tmp_path: Path) -> None:
    http = client(lab)
    trial = http.post("/v1/trials", json={"subject": "idle"}).json()["id"]
    wait_ended(lab, trial)
    (tmp_path / trial / "passwd").symlink_to("/etc/passwd")
    answer = http.get(f"/v1/trials/{trial}/bundle")
    assert answer.status_code == 500
    assert answer.json()["code"] == "evidence"
    assert "root:" not in answer.text
