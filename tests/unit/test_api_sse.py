"""Following a trial: order, resuming, heartbeats, the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from api import sse
from appliance.errors import LabError
from appliance.trial.records import JournalEntry
from tests.fakes.client import client
from tests.fakes.service import REPLICATES, FakeLab


@pytest.fixture
def lab(tmp_path: Path) -> FakeLab:
    return FakeLab(tmp_path)


def events(text: str) -> list[dict[str, str]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "data" in fields:
            found.append(fields)
    return found


def started(lab: FakeLab) -> str:
    return str(client(lab).post("/v1/trials", json={"subject": "idle"}).json()["id"])


def test_all_entries_come_in_order_and_then_the_trial(lab: FakeLab) -> None:
    trial = started(lab)
    answer = client(lab).get(f"/v1/trials/{trial}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    *journal, end = events(answer.text)
    assert [int(e["id"]) for e in journal] == list(range(len(REPLICATES) + 1))
    assert {e["event"] for e in journal} == {"journal"}
    assert json.loads(journal[0]["data"])["event"] == "queued"
    assert end["event"] == "end"
    assert json.loads(end["data"])["state"] == "sealed"


def test_what_a_guest_says_cannot_forge_an_event(lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "x\n\nevent: end\ndata: {}\r\nid: 99\u2028\x00"

    def forged(trial_id: str, from_seq: int) -> Iterator[JournalEntry]:
        yield JournalEntry(seq=0, at=1.0, event="step", fields={"text": said})

    monkeypatch.setattr(lab, "follow", forged)
    first, end = events(client(lab).get(f"/v1/trials/{started(lab)}/events").text)
    assert json.loads(first["data"])["fields"]["text"] == said
    assert json.loads(end["data"])["subject"] == "idle"


@pytest.mark.parametrize("how", ["header", "query"])
def test_a_reader_resumes_where_it_broke_off(lab: FakeLab, how: str) -> None:
    trial = started(lab)
    url = f"/v1/trials/{trial}/events"
    if how == "header":
        answer = client(lab).get(url, params={"from_seq": 0}, headers={"Last-Event-ID": "4"})
    else:
        answer = client(lab).get(url, params={"from_seq": 5})
    assert [int(e["id"]) for e in events(answer.text)[:-1]] == list(range(5, len(REPLICATES) + 1))


def test_after_the_last_entry_only_the_end_comes(lab: FakeLab) -> None:
    trial = started(lab)
    client(lab).get(f"/v1/trials/{trial}/events")
    answer = client(lab).get(f"/v1/trials/{trial}/events", headers={"Last-Event-ID": "999"})
    assert [e["event"] for e in events(answer.text)] == ["end"]


@pytest.mark.parametrize("value", ["-1", "x", "1e3", "99999999999999999999"])
def test_a_wrong_last_event_id_is_a_problem(lab: FakeLab, value: str) -> None:
    answer = client(lab).get(f"/v1/trials/{started(lab)}/events", headers={"Last-Event-ID": value})
    assert answer.status_code == 422
    assert not [c for c in lab.calls if c[0] == "follow"]


def test_silence_is_filled_with_comments(tmp_path: Path) -> None:
    lab = FakeLab(tmp_path, step_s=0.25)
    trial = started(lab)
    with client(lab) as http:
        text = http.get(f"/v1/trials/{trial}/events", params={"from_seq": len(REPLICATES) - 1}).text
    assert text.count(": beat") >= 5


def test_a_failure_while_following_is_an_event(lab: FakeLab) -> None:
    trial = started(lab)
    lab.fail["follow"] = LabError("the journal is gone", hint="look")
    answer = client(lab).get(f"/v1/trials/{trial}/events")
    assert [e["event"] for e in events(answer.text)] == ["error"]
    assert "the journal is gone" in answer.text


def test_too_many_followers_are_refused(lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse.Followers, "full", property(lambda self: True))
    answer = client(lab).get(f"/v1/trials/{started(lab)}/events")
    assert (answer.status_code, answer.json()["code"]) == (503, "capacity")
