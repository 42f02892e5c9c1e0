"""Following a journal while it grows, is sealed and moves."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from appliance.errors import EvidenceError
from appliance.evidence.journal import Journal
from appliance.pipeline import following
from appliance.pipeline.following import follow, seldom


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_POLL_S", 0.01)
    monkeypatch.setattr(following, "_QUIET_S", 0.05)


def test_what_is_there_comes_at_once_and_the_end_ends_it(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        for n in range(5):
            journal.write(f"e{n}")
    got = [e.event for e in follow(lambda: tmp_path / "j", lambda: True, 0) if e]
    assert got == ["e0", "e1", "e2", "e3", "e4"]
    assert [e.seq for e in follow(lambda: tmp_path / "j", lambda: True, 3) if e] == [3, 4]
    assert list(follow(lambda: tmp_path / "j", lambda: True, 99)) == []


def test_entries_come_as_they_are_written_and_across_a_move(tmp_path: Path) -> None:
    first, second, over = tmp_path / "open", tmp_path / "sealed", threading.Event()
    first.mkdir()
    journal = Journal(first / "j")

    def write() -> None:
        for n in range(20):
            journal.write(f"e{n}")
            time.sleep(0.005)
            if n == 12:
                first.rename(second)
        journal.close()
        over.set()

    thread = threading.Thread(target=write)
    thread.start()
    where = lambda: (second if second.exists() else first) / "j"  # noqa: E731
    got = [e.seq for e in follow(where, over.is_set, 0) if e]
    thread.join()
    assert got == list(range(20)), "each once, in order, none left out"


def test_silence_is_told_each_second(tmp_path: Path) -> None:
    Journal(tmp_path / "j").close()
    stream = follow(lambda: tmp_path / "j", lambda: False, 0)
    began = time.monotonic()
    assert [next(stream), next(stream)] == [None, None]
    assert time.monotonic() - began >= 0.09


def test_a_journal_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    stream = follow(lambda: tmp_path / "j", lambda: (tmp_path / "j").exists(), 0)
    assert next(stream) is None
    with Journal(tmp_path / "j") as journal:
        journal.write("late")
    assert [e.event for e in stream if e] == ["late"]


@pytest.mark.parametrize("content", [None, b"not a journal\n"])
def test_a_journal_that_cannot_be_read_at_the_end_is_told(tmp_path: Path, content: bytes | None) -> None:
    """Of a trial that left no evidence, or none that can be read: nobody waits for it for ever."""
    if content is not None:
        (tmp_path / "j").write_bytes(content)
    with pytest.raises(EvidenceError, match="has ended, and its journal cannot be read"):
        next(follow(lambda: tmp_path / "j", lambda: True, 0))


def test_a_torn_line_is_not_shown_before_it_is_whole(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.write("whole")
    with (tmp_path / "j").open("ab") as f:
        f.write(b'{"seq":1,"at":1.0,"event":"to')
    assert [e.event for e in follow(lambda: tmp_path / "j", lambda: True, 0) if e] == ["whole"]


def test_while_a_trial_is_open_its_state_is_asked_for_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def look_again() -> bool:
        asked.append(0)
        return len(asked) >= 3

    look = seldom(tmp_path / "open", look_again)
    (tmp_path / "open").mkdir()
    assert [look(), look(), look()] == [False] * 3
    assert len(asked) == 1
    monkeypatch.setattr(following, "_ASK_S", 0.0)
    assert not look()
    assert len(asked) == 2, "its folder may stay where it is for ever"
    monkeypatch.setattr(following, "_ASK_S", 60.0)
    (tmp_path / "open").rmdir()
    assert look(), "once it is sealed every look asks"
