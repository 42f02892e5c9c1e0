"""The journal: gapless, whole after a crash, readable while it grows; and record files."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path

import pytest

from appliance.errors import EvidenceError
from appliance.evidence import journal
from appliance.evidence.journal import Journal, append_record, read, scan_on, write_record
from appliance.trial.records import Claim, ModelAnswer, ProofCheck


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_entries_come_back_in_order_with_the_hosts_time(path: Path) -> None:
    before = time.time()
    with Journal(path) as j:
        j.write("created", trial="t1")
        j.write("started", pids=[1, 2], path=Path("/x"))
    entries = read(path)
    assert [(e.seq, e.event) for e in entries] == [(0, "created"), (1, "started")]
    assert before <= entries[0].at <= entries[1].at <= time.time()
    assert entries[1].fields == {"pids": [1, 2], "path": "/x"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_entry_is_on_disk_when_write_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    with Journal(path) as j:
        j.write("a")
        assert synced[-1] == path.stat().st_size > 0


def test_threads_never_share_or_skip_a_number(path: Path) -> None:
    with Journal(path) as j:
        threads = [
            threading.Thread(target=lambda n=n: [j.write("e", n=n, text="x" * 300) for _ in range(25)])
            for n in range(8)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert [e.seq for e in read(path)] == list(range(200))


def test_a_torn_last_line_is_left_out_and_cut_off_on_opening(path: Path) -> None:
    with Journal(path) as j:
        j.write("a")
    with path.open("ab") as f:
        f.write(b'{"seq": 1, "at": 5, "ev')
    assert len(read(path)) == 1
    with Journal(path) as j:
        assert j.write("b").seq == 1
    assert [e.event for e in read(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"seq": 1, "at": 1, "event": "a", "fields": {}}\n', "has seq 1, expected 0"),
        ("nonsense\n", "line 1 is not a journal entry"),
        ('{"seq": 0, "at": 1, "event": "a", "fields": {}, "more": 1}\n', "line 1 is not"),
        ('{"seq": 0, "at": 1, "event": "a", "fields": {}}\n\n', "line 2 is not"),
        ('{"seq": 0, "at": 1, "event": "a", "fields": {}}\n' * 2, "line 2 has seq 0"),
    ],
)
def test_a_broken_journal_is_refused_everywhere(path: Path, lines: str, says: str) -> None:
    path.write_text(lines)
    for use in (lambda: read(path), lambda: Journal(path)):
        with pytest.raises(EvidenceError, match=says):
            use()


def test_a_line_without_end_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_LINE", 100)
    path.write_bytes(b"x" * 500)
    with pytest.raises(EvidenceError, match="longer than 100"):
        read(path)


def test_a_failed_write_is_an_evidence_error_and_ends_the_journal(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    j = Journal(path)
    j.write("a")

    def full(fd: int, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "write", full)
        with pytest.raises(EvidenceError, match="No space left"):
            j.write("b")
    with pytest.raises(EvidenceError, match="closed"):
        j.write("c")
    j.close()
    j.close()
    with pytest.raises(EvidenceError, match="closed"):
        j.write("d")
    assert len(read(path)) == 1


def test_a_real_full_disk_is_an_evidence_error(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(EvidenceError):
        append_record(Path("/dev/full"), ProofCheck(name="a", passed=True, expected="", found=""))
    with pytest.raises(EvidenceError):
        Journal(tmp_path / "full")
    with pytest.raises(EvidenceError, match="opened"):
        Journal(tmp_path / "missing" / "journal.jsonl")


def test_reading_goes_on_where_it_was(path: Path) -> None:
    with Journal(path) as j:
        for n in range(3):
            j.write(f"e{n}")
        first = list(scan_on(path))
        offset = sum(length for _, length in first)
        assert offset == path.stat().st_size
        assert list(scan_on(path, offset, 3)) == []
        j.write("e3")
    assert [e.event for e, _ in scan_on(path, offset, 3)] == ["e3"]
    with pytest.raises(EvidenceError, match="line 5 has seq 3, expected 4"):
        list(scan_on(path, offset, 4))


def test_records_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "proofs.json"
    checks = [ProofCheck(name=n, passed=True, expected="1", found="1") for n in "ab"]
    write_record(path, checks)
    old = path.read_bytes()

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(EvidenceError, match="Input/output"):
        write_record(path, checks[0])
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["proofs.json"]


def test_lines_are_appended_and_guest_text_cannot_make_a_second_line(tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    for text in ("a\nb\r\u2028c", "\x00\x1b"):
        append_record(path, Claim(received=1, machine="origin", kind="note", step=0, text=text, data={}))
    lines = path.read_bytes().splitlines()
    assert [Claim.model_validate_json(line).text for line in lines] == ["a\nb\r\u2028c", "\x00\x1b"]


def test_half_a_surrogate_pair_cannot_make_a_record_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    half = Claim(
        received=1, machine="origin", kind="note", step=0, text="a\ud800", data={"b": "\udfff", "\udc80": 1}
    )
    append_record(path, half)
    back = Claim.model_validate_json(path.read_bytes())
    assert (back.text, back.data["b"]) == ("a?", "?")
    write_record(tmp_path / "whole.json", [half])
    assert b"ud800" not in (tmp_path / "whole.json").read_bytes()
    with Journal(tmp_path / "journal.jsonl") as j:
        j.write("step", text="\ud800")
    assert read(tmp_path / "journal.jsonl")[0].fields == {"text": "?"}


def test_numbers_that_are_not_finite_survive(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    values = (math.nan, math.inf, -math.inf, -1.5)
    append_record(path, ModelAnswer(port=1, model="m", logprobs=values, pid=1, process_start=1))
    back = ModelAnswer.model_validate_json(path.read_bytes()).logprobs
    assert math.isnan(back[0])
    assert back[1:] == values[1:]


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EvidenceError):
        append_record(tmp_path / "x.jsonl", ProofCheck(name="a", passed=True, expected="", found=""))
    assert not (tmp_path / "elsewhere").exists()
