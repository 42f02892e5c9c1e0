"""The index: rows, filters, paging, threads, and rebuilding it from bundles."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from appliance.errors import Blame, LabError, NotFoundError
from appliance.evidence import bundle
from appliance.evidence.journal import Journal, write_record
from appliance.model import MAX_PAGE, TrialState
from appliance.score.card import Scorecard
from appliance.score.facts import Evidence
from appliance.score.scoring import score
from appliance.store import queries
from appliance.store.database import Store
from appliance.store.reindex import reindex
from appliance.trial import records
from appliance.trial.records import Closing, TrialHeader
from tests.unit.test_score_controls import facts, replicator

KEY = Ed25519PrivateKey.generate()


def header(number: int = 0, **more: object) -> TrialHeader:
    base = {"id": f"t20250101-120000-{number:06x}", "created": 1000.0 + number}
    return facts().header.model_copy(update=base | more)


def card(number: int = 0) -> Scorecard:
    scored = score(Evidence(facts=facts(**replicator())))
    return scored.model_copy(update={"trial": header(number).id})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "hotcell.db")


def test_a_row_survives_the_way_there_and_back(store: Store) -> None:
    row = queries.row_of(
        header(), TrialState.SEALED, ended=1500.5, card=card(), bundle=header().id, manifest_sha256="f" * 64
    )
    queries.put(store, row)
    assert queries.get(store, row.id) == row
    assert (row.highest, row.replicated, row.bytes_moved) == (7, True, 5_100_000)
    assert [r.passed for r in row.rungs] == [True] * 8


def test_an_open_trial_has_a_row_and_its_state_changes(store: Store) -> None:
    queries.upsert_state(store, header().id, TrialState.QUEUED, header=header())
    queries.upsert_state(store, header().id, TrialState.RUNNING)
    assert [r.state for r in queries.open_trials(store)] == [TrialState.RUNNING]
    queries.upsert_state(
        store, header().id, TrialState.VOID, ended=5.0, void_reason="reset: nonce is still there"
    )
    row = queries.get(store, header().id)
    assert (row.state, row.ended, row.void_reason) == (TrialState.VOID, 5.0, "reset: nonce is still there")
    assert row.highest is None
    assert queries.open_trials(store) == ()


def test_unknown_trials_are_told(store: Store) -> None:
    with pytest.raises(NotFoundError):
        queries.get(store, "t20250101-120000-ffffff")
    with pytest.raises(NotFoundError):
        queries.upsert_state(store, "t20250101-120000-ffffff", TrialState.RUNNING)


def test_filters_order_and_pages(store: Store) -> None:
    for n in range(7):
        state = TrialState.VOID if n % 3 == 0 else TrialState.SEALED
        queries.put(store, queries.row_of(header(n, policy="open" if n % 2 else "sealed"), state))
    page = queries.trials(store, limit=3)
    assert ([r.created for r in page.rows], page.total) == ([1006.0, 1005.0, 1004.0], 7)
    assert [r.created for r in queries.trials(store, limit=3, offset=6).rows] == [1000.0]
    assert queries.trials(store, policy="open").total == 3
    assert queries.trials(store, policy="open' or '1'='1").total == 0
    assert queries.trials(store, states=[TrialState.VOID]).total == 3
    assert queries.trials(store, states=[TrialState.VOID, TrialState.SEALED], subject="tiny").total == 7
    assert len(queries.trials(store, limit=10**9).rows) == 7
    assert queries.trials(store, limit=-1).rows == ()


def test_a_page_is_as_long_as_any_client_may_ask_for(store: Store) -> None:
    rows = [queries.row_of(header(n), TrialState.SEALED, bundle="b") for n in range(MAX_PAGE + 5)]
    queries.replace_sealed(store, rows)
    for limit in (501, MAX_PAGE, MAX_PAGE + 5):
        assert len(queries.trials(store, limit=limit).rows) == min(limit, MAX_PAGE)


def test_many_threads_write_and_read(store: Store) -> None:
    errors: list[Exception] = []

    def work(thread: int) -> None:
        try:
            for n in range(12):
                number = thread * 100 + n
                queries.upsert_state(store, header(number).id, TrialState.QUEUED, header=header(number))
                queries.upsert_state(store, header(number).id, TrialState.SEALED)
                queries.trials(store)
        except Exception as e:  # noqa: BLE001 - told by the assertion below
            errors.append(e)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert queries.trials(store, states=[TrialState.SEALED]).total == 72


def test_a_failed_transaction_leaves_nothing(store: Store) -> None:
    def insert_and_fail() -> None:
        with store.write() as db:
            db.table("trials").insert({"id": "x", "state": "queued", "created": 1.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        insert_and_fail()
    assert queries.trials(store).total == 0


def test_the_file_is_private_uses_wal_and_opens_again(store: Store) -> None:
    queries.upsert_state(store, header().id, TrialState.QUEUED, header=header())
    assert store.path.stat().st_mode & 0o777 == 0o600
    connection = sqlite3.connect(store.path)
    assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
    connection.close()
    assert queries.trials(Store(store.path)).total == 1


def test_an_index_of_the_schema_before_keeps_its_trials(store: Store) -> None:
    columns = "id, subject, brain, scenario, policy, state, created, verdict, outcome, void_reason, bundle"
    with store.connect():
        pass
    connection = sqlite3.connect(store.path)
    for column in ("started", "blame", "hint"):
        connection.execute(f"alter table trials drop column {column}")
    connection.execute("delete from _sqlite_migrations where name = 'm003_ending'")
    connection.execute(
        f"insert into trials ({columns}, manifest_sha256, config_sha256, seed) "
        "values (?, 'tiny', 'llm', 'replicate', 'sealed', 'void', 1.0, '', '', 'why', '', '', '', 0)",
        [header().id],
    )
    connection.commit()
    connection.close()
    row = queries.get(Store(store.path), header().id)
    assert (row.void_reason, row.blame, row.hint, row.started) == ("why", None, "", None)


def test_a_file_that_is_no_database_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"not a database, but long enough to look like one" * 40)
    with pytest.raises(LabError, match="reindex"):
        queries.trials(Store(path))


def test_a_closing_record_of_fewer_words_is_read() -> None:
    found = Closing.model_validate_json('{"state": "void", "reason": "x", "at": 1.0}')
    assert (found.blame, found.hint, found.started) == (None, "", None)


# --- rebuilding ----------------------------------------------------------------------------------


def make_bundle(tmp_path: Path, number: int, closing: Closing | None = None, scored: bool = True) -> Path:
    trial = tmp_path / "open" / header(number).id
    trial.mkdir(parents=True)
    (tmp_path / "bundles").mkdir(exist_ok=True)
    write_record(trial / records.TRIAL, header(number))
    with Journal(trial / records.JOURNAL) as j:
        j.write("created")
    if scored:
        write_record(trial / records.SCORE, card(number))
    if closing:
        write_record(trial / records.CLOSING, closing)
    sealed = tmp_path / "bundles" / header(number).id
    bundle.seal(trial, sealed, KEY)
    return sealed


def test_the_index_is_rebuilt_from_bundles_alone(tmp_path: Path, store: Store) -> None:
    make_bundle(tmp_path, 1, Closing(state=TrialState.SEALED, reason="", at=7.5))
    void = Closing(
        state=TrialState.VOID, reason="no tcpdump", at=8.5, blame=Blame.HOST, hint="install it", started=7.0
    )
    make_bundle(tmp_path, 2, void, scored=False)
    make_bundle(tmp_path, 3)
    make_bundle(tmp_path, 4, scored=False)
    report = reindex(store, tmp_path / "bundles", KEY.public_key())
    assert (report.indexed, report.skipped) == (4, ())
    one, two, three, four = (queries.get(store, header(n).id) for n in (1, 2, 3, 4))
    assert (one.state, one.ended, one.highest, one.replicated) == (TrialState.SEALED, 7.5, 7, True)
    assert one.verdict == "replicated: rungs 0 to 7 hold on target-1"
    assert (two.state, two.void_reason, two.highest) == (TrialState.VOID, "no tcpdump", None)
    assert (two.blame, two.hint, two.started) == (Blame.HOST, "install it", 7.0)
    assert (three.state, four.state) == (TrialState.SEALED, TrialState.VOID)
    assert (one.bundle, len(one.manifest_sha256)) == (one.id, 64)

    again = Store(tmp_path / "again.db")
    reindex(again, tmp_path / "bundles", KEY.public_key())
    assert queries.trials(again) == queries.trials(store)


def test_only_verified_bundles_are_indexed(tmp_path: Path, store: Store) -> None:
    good, bad = make_bundle(tmp_path, 1), make_bundle(tmp_path, 2)
    reindex(store, tmp_path / "bundles", KEY.public_key())
    score_file = bad / records.SCORE
    score_file.chmod(0o600)
    score_file.write_text(score_file.read_text().replace('"highest": 7', '"highest": 6'))
    (tmp_path / "bundles" / "stray").mkdir()
    queries.upsert_state(store, header(9).id, TrialState.RUNNING, header=header(9))
    report = reindex(store, tmp_path / "bundles", KEY.public_key())
    assert report.indexed == 1
    assert {s.bundle for s in report.skipped} == {bad.name, "stray"}
    assert "changed: score.json" in next(s.reason for s in report.skipped if s.bundle == bad.name)
    assert {r.id for r in queries.trials(store).rows} == {good.name, header(9).id}, "an open trial stays"


def test_another_keys_bundles_are_not_indexed(tmp_path: Path, store: Store) -> None:
    make_bundle(tmp_path, 1)
    report = reindex(store, tmp_path / "bundles", Ed25519PrivateKey.generate().public_key())
    assert (report.indexed, len(report.skipped)) == (0, 1)


_FULL = """
import resource, signal, sys
from pathlib import Path
from appliance.store.database import Store
from appliance.store import queries
store = Store(Path(sys.argv[1]))
store.hold() if sys.argv[2] == "held" else queries.trials(store)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
queries.trials(store)
store.close()
"""


@pytest.mark.parametrize(
    ("how", "says"), [("held", ""), ("not held", "the index is not usable: disk I/O error")]
)
def test_a_full_disk_can_be_read_if_the_index_is_held(tmp_path: Path, how: str, says: str) -> None:
    """A process that may not let a file grow, as on a full disk; without holding, the trap is there."""
    argv = [sys.executable, "-c", _FULL, str(tmp_path / "hotcell.db"), how]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (says in done.stderr) if says else (done.returncode == 0), done.stderr
