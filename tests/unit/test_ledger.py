"""Written down before it exists: the row is on disk first, and whatever a crash leaves is in it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from appliance.cell.ledger import Kind, Ledger
from appliance.errors import HotcellError, LabError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def names(ledger: Ledger, **by: object) -> list[str]:
    return [t.name for t in ledger.things(**by)]  # type: ignore[arg-type]


def test_rows_are_told_newest_first_by_kind_and_owner(path: Path) -> None:
    ledger = Ledger(path)
    for kind, name, owner in ((Kind.BRIDGE, "b", "c1"), (Kind.TAP, "t", "c1"), (Kind.TAP, "u", "c2")):
        ledger.enter(kind, name, owner)
    assert names(ledger) == ["u", "t", "b"]
    assert names(ledger, kind=Kind.TAP) == ["u", "t"]
    assert names(ledger, owner="c1") == ["t", "b"]
    assert names(ledger, kind=Kind.TAP, owner="c1") == ["t"]
    assert ledger.things(Kind.FOLDER) == []


def test_a_row_is_struck_by_kind_and_exact_name(path: Path) -> None:
    ledger = Ledger(path)
    ledger.enter(Kind.TAP, "a", "c")
    ledger.enter(Kind.BRIDGE, "a", "c")
    ledger.enter(Kind.TAP, "ab", "c")
    ledger.strike(Kind.TAP, "a")
    ledger.strike(Kind.TAP, "a%")
    ledger.strike(Kind.TAP, "never")
    assert {(t.kind, t.name) for t in ledger.things()} == {(Kind.BRIDGE, "a"), (Kind.TAP, "ab")}


def test_entering_again_replaces_and_is_the_newest(path: Path) -> None:
    ledger = Ledger(path)
    ledger.enter(Kind.TAP, "a", "c1")
    ledger.enter(Kind.TAP, "b", "c1")
    ledger.enter(Kind.TAP, "a", "c2", "again")
    assert [(t.name, t.owner, t.detail) for t in ledger.things()] == [("a", "c2", "again"), ("b", "c1", "")]


@pytest.mark.parametrize("name", ["'; DROP TABLE things; --", "a\nb", "ä\U0001f980", "", "x" * 5000])
def test_a_name_is_only_a_name(path: Path, name: str) -> None:
    ledger = Ledger(path)
    ledger.enter(Kind.FOLDER, name, name, name)
    assert names(ledger) == [name]
    ledger.strike(Kind.FOLDER, name)
    assert names(ledger) == []


def test_after_kill_9_every_row_is_there_and_no_struck_one(path: Path) -> None:
    code = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from appliance.cell.ledger import Kind, Ledger
        ledger = Ledger(Path(sys.argv[1]))
        for i in range(20):
            ledger.enter(Kind.TAP, f"t{i}", "c")
        ledger.strike(Kind.TAP, "t7")
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    project = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=project, check=False, env={**os.environ}
    )
    assert done.returncode == -signal.SIGKILL
    assert names(Ledger(path)) == [f"t{i}" for i in range(19, -1, -1) if i != 7]


def test_a_row_is_seen_by_another_process_as_soon_as_enter_returns(path: Path) -> None:
    ledger = Ledger(path)
    ledger.enter(Kind.DOMAIN, "d", "c")
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as other:
        assert other.execute("SELECT name FROM things").fetchall() == [("d",)]
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()


def test_many_threads_lose_nothing(path: Path) -> None:
    ledger = Ledger(path)

    def work(n: int) -> None:
        for i in range(20):
            ledger.enter(Kind.TAP, f"{n}-{i}", f"c{n}")
            if i % 2:
                ledger.strike(Kind.TAP, f"{n}-{i}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(ledger.things()) == 60


def test_a_file_that_is_no_ledger_is_a_lab_error(path: Path) -> None:
    path.write_bytes(b"this is not a database, by any means" * 40)
    with pytest.raises(LabError, match="not usable") as e:
        Ledger(path)
    assert e.value.hint


def test_what_cannot_be_written_down_is_an_error_of_ours(path: Path) -> None:
    ledger = Ledger(path)
    ledger.close()
    for call in (
        lambda: ledger.enter(Kind.TAP, "a", "c"),
        lambda: ledger.strike(Kind.TAP, "a"),
        lambda: ledger.things(),
    ):
        with pytest.raises(HotcellError):
            call()


def test_rows_of_trials_of_an_older_version_are_gone_once_it_is_opened(path: Path) -> None:
    Ledger(path).enter(Kind.TAP, "a", "c1")
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO things (kind, name, owner, made) VALUES ('trial', 't1', 't1', 1.0)")
    db.close()
    assert names(Ledger(path)) == ["a"]


def test_a_kind_that_a_newer_version_wrote_is_told_and_not_guessed(path: Path) -> None:
    ledger = Ledger(path)
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO things (kind, name, owner, made) VALUES ('gadget', 'g', 'c1', 1.0)")
    db.close()
    with pytest.raises(LabError, match="gadget") as e:
        ledger.things()
    assert "newer version" in e.value.hint
