"""What a start makes of what an earlier process left: trials that were open, bundles that are not in the index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cell.cell import Cell
from appliance.errors import Blame, EvidenceError, HotcellError, LabError
from appliance.evidence import bundle, journal
from appliance.model import TrialState
from appliance.pipeline.conduct import Outcome, conduct, open_folder, seal_folder
from appliance.pipeline.recovery import Recovered, recover, tell_recovered
from appliance.store import queries, reindex
from appliance.store.database import TRIALS
from appliance.trial import records
from appliance.trial.plan import Plan
from appliance.trial.stop import StopFlag, TrialAborted
from tests.fakes.bench import Workbench, workbench
from tests.unit.test_pipeline_conduct import check_bundle, run

NOTHING = Recovered({}, (), {})


@pytest.fixture
def w(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    with workbench(monkeypatch) as made:
        yield made


def crashed(w: Workbench, torn: bytes = b"") -> Plan:
    """A trial as kill -9 leaves it."""
    plan = w.plan()
    folder = open_folder(w.bench, plan)
    queries.upsert_state(w.bench.store, plan.id, TrialState.RUNNING)
    folder.close()
    with (folder.folder / records.JOURNAL).open("ab") as f:
        f.write(torn)
    return plan


@pytest.mark.parametrize("torn", [b"", b'{"seq":1,"at":1.0,"ev'], ids=["whole", "torn"])
def test_an_open_trial_is_sealed_as_void(w: Workbench, torn: bytes) -> None:
    plan = crashed(w, torn)
    assert recover(w.bench) == Recovered({plan.id: ""}, (), {})
    row = check_bundle(w, plan, TrialState.VOID)
    assert "ended before the trial did" in row.void_reason
    assert (row.blame, row.started) == (Blame.LAB, None)
    assert recover(w.bench) == NOTHING


def test_a_run_that_was_cut_short_by_a_crash_keeps_its_start(w: Workbench) -> None:
    plan = crashed(w)
    with journal.Journal(w.host.paths.open_trials / plan.id / records.JOURNAL) as written:
        began = written.write(records.STARTED).at
    w.host.paths.database.unlink()  # lost too: the evidence is enough
    assert recover(w.bench) == Recovered({plan.id: ""}, (), {})
    assert check_bundle(w, plan, TrialState.VOID).started == began


def test_half_written_records_are_no_evidence(w: Workbench) -> None:
    plan = crashed(w)
    folder = w.host.paths.open_trials / plan.id
    (folder / f".{records.PROOFS}.4711.140.part").write_bytes(b'{"half')
    (folder / "kept.part").write_bytes(b"whatever this is, it is not ours to drop")
    assert recover(w.bench) == Recovered({plan.id: ""}, (), {})
    check_bundle(w, plan, TrialState.VOID)
    sealed = {p.name for p in (w.host.paths.bundles / plan.id).iterdir()}
    assert "kept.part" in sealed
    assert not [n for n in sealed if n.startswith(".")]


def test_one_broken_trial_does_not_keep_the_others_open(w: Workbench) -> None:
    broken, fine = crashed(w), crashed(w)
    path = w.host.paths.open_trials / broken.id / records.JOURNAL
    path.write_bytes(b"not a journal\n")
    done = recover(w.bench).void
    assert done[fine.id] == ""
    assert "not a journal entry" in done[broken.id]
    check_bundle(w, fine, TrialState.VOID)
    row = queries.get(w.bench.store, broken.id)
    assert row.state is TrialState.VOID
    assert "not sealed" in row.void_reason
    assert path.exists(), "its evidence is kept for a human to look at"
    assert set(recover(w.bench).void) == {broken.id}, "and it is told again"


def test_a_folder_that_never_became_a_trial_is_removed(w: Workbench) -> None:
    folder = w.host.paths.open_trials / "t20260101-000000-ffffff"
    (folder / "sub").mkdir(parents=True)
    (folder / records.JOURNAL).touch()
    assert recover(w.bench) == NOTHING
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"id": "of a later schema"}', None], ids=repr)
def test_evidence_that_cannot_be_read_is_kept_and_keeps_nothing_else(
    w: Workbench, content: bytes | None
) -> None:
    """With None the read itself fails, as of a disk with errors or without a free descriptor."""
    odd, fine = crashed(w), crashed(w)
    folder = w.host.paths.open_trials / odd.id
    header = folder / records.TRIAL
    whole = header.read_bytes()
    header.unlink()
    if content is None:
        header.mkdir()
    else:
        header.write_bytes(content)
    (folder / f".{records.PROOFS}.4711.140.part").write_bytes(b"half")
    before = sorted(p.name for p in folder.iterdir())

    for _ in range(2):
        done = recover(w.bench).void
        assert str(folder) in done[odd.id], "told at every start, by its place"
        assert sorted(p.name for p in folder.iterdir()) == before
    check_bundle(w, fine, TrialState.VOID)
    row = queries.get(w.bench.store, odd.id)
    assert (row.state, row.bundle) == (TrialState.VOID, "")
    assert "not sealed" in row.void_reason

    header.rmdir() if content is None else header.unlink()
    header.write_bytes(whole)
    assert recover(w.bench).void == {odd.id: ""}, "once it can be read it is sealed"
    check_bundle(w, odd, TrialState.VOID)


def test_the_log_says_where_evidence_is_that_could_not_be_sealed(
    w: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        void = {"t1": "", "t2\n": "an answer of a disk " + "x" * 5000}
        tell_recovered(w.host.paths, Recovered(void, ("t3",), {"t4": "does not verify"}))
    fine, void_too, kept, indexed, odd = (r.getMessage() for r in caplog.records)
    assert (fine.split()[:2], void_too.split()[0]) == (["trial-void", "trial=t1"], "trial-void")
    assert kept.startswith(
        f'evidence-kept folder="{w.host.paths.open_trials}/t2\\n" reason="an answer of a disk'
    )
    assert "every start tries again" in kept
    assert (len(kept) < 1000, kept.isprintable()) == (True, True)
    assert indexed.startswith("bundle-indexed bundle=t3 ")
    assert odd.startswith(f'bundle-not-indexed bundle={w.host.paths.bundles}/t4 reason="does not verify"')
    assert "every start tries again" in odd


def test_a_crash_between_sealing_and_indexing_loses_nothing(
    w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = w.plan()
    with monkeypatch.context() as patch:
        patch.setattr(queries, "put", lambda _store, _row: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            run(w, plan=plan)
    assert queries.get(w.bench.store, plan.id).state is TrialState.SCORING
    assert recover(w.bench) == Recovered({}, (plan.id,), {}), "it is not void"
    assert check_bundle(w, plan, TrialState.SEALED).highest is not None


def test_a_row_without_evidence_does_not_run_for_ever(w: Workbench) -> None:
    plan = w.plan()
    queries.upsert_state(w.bench.store, plan.id, TrialState.QUEUED, header=plan.header)
    assert recover(w.bench) == Recovered({plan.id: ""}, (), {})
    row = queries.get(w.bench.store, plan.id)
    assert (row.state, bool(row.ended)) == (TrialState.VOID, True)
    assert "left no evidence" in row.void_reason


def test_a_bundle_that_does_not_verify_is_not_indexed(w: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = crashed(w)
    real = bundle.seal

    def spoil(folder: object, final: object, key: object) -> object:
        made = real(folder, final, key)  # type: ignore[arg-type]
        path = w.host.paths.bundles / plan.id / records.TRIAL
        path.chmod(0o600)
        path.write_bytes(path.read_bytes() + b" ")
        return made

    monkeypatch.setattr("appliance.pipeline.conduct.bundle.seal", spoil)
    folder = w.host.paths.open_trials / plan.id
    with pytest.raises(HotcellError, match="does not verify"):
        seal_folder(w.bench, folder, Outcome(TrialState.VOID, reason="x"))
    assert queries.get(w.bench.store, plan.id).bundle == ""
    assert issubclass(EvidenceError, HotcellError)
    assert not issubclass(TrialAborted, HotcellError)


# -- bundles that are not in the index -------------------------------------------------------------------


def forget(w: Workbench, trial: str) -> None:
    """Lose a row, as a power failure does that takes the last commits."""
    with w.bench.store.write() as db:
        db.table(TRIALS).delete(trial)


@pytest.mark.parametrize("row", ["missing", "of an earlier state", "void, and names no bundle"])
def test_a_sealed_trial_whose_row_was_lost_is_indexed_again(w: Workbench, row: str) -> None:
    plan, _ = run(w)
    whole = queries.get(w.bench.store, plan.id)
    forget(w, plan.id)
    if row != "missing":
        queries.upsert_state(w.bench.store, plan.id, TrialState.SCORING, header=plan.header)
    if row.startswith("void"):
        queries.upsert_state(w.bench.store, plan.id, TrialState.VOID, ended=1.0, void_reason="x", hint="y")
    assert recover(w.bench) == Recovered({}, (plan.id,), {})
    assert queries.get(w.bench.store, plan.id) == whole
    assert recover(w.bench) == NOTHING


def test_bundles_that_are_in_the_index_are_not_read(w: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    known, lost = run(w)[0], run(w)[0]
    forget(w, lost.id)
    read: list[str] = []
    real = reindex.row_of_bundle

    def row_of(path: Path, key: object) -> queries.TrialRow:
        read.append(path.name)
        return real(path, key)  # type: ignore[arg-type]

    monkeypatch.setattr(reindex, "row_of_bundle", row_of)
    recover(w.bench)
    assert read == [lost.id]
    assert queries.get(w.bench.store, known.id).state is TrialState.SEALED


def test_a_bundle_that_cannot_be_indexed_is_told_and_keeps_nothing_else(w: Workbench) -> None:
    bad, good, open_one = run(w)[0], run(w)[0], crashed(w)
    for plan in (bad, good):
        forget(w, plan.id)
    queries.upsert_state(w.bench.store, bad.id, TrialState.SCORING, header=bad.header)
    header = w.host.paths.bundles / bad.id / records.TRIAL
    header.chmod(0o600)
    header.write_bytes(header.read_bytes() + b" ")
    (w.host.paths.bundles / "no-bundle").write_bytes(b"")
    (w.host.paths.bundles / ".hidden").write_bytes(b"")

    found = recover(w.bench)
    assert (found.indexed, set(found.unindexed)) == ((good.id,), {bad.id, "no-bundle"})
    assert found.void == {open_one.id: "", bad.id: ""}
    assert "changed: trial.json" in found.unindexed[bad.id]
    check_bundle(w, good, TrialState.SEALED)
    check_bundle(w, open_one, TrialState.VOID)
    row = queries.get(w.bench.store, bad.id)
    assert (row.state, row.bundle) == (TrialState.VOID, "")
    assert row.void_reason.startswith("its bundle cannot be indexed: does not verify: changed: trial.json")
    assert str(w.host.paths.bundles / bad.id) in row.hint
    assert set(recover(w.bench).unindexed) == {bad.id, "no-bundle"}, "and it is told again"


def unusable(*_: object) -> None:
    raise LabError("the index is not usable: disk I/O error")


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("what", "broken"),
    [("queries.put", unusable), ("bundle.verify", unusable), ("bundle._sync", None)],
    ids=["indexing", "verifying", "making the name last"],
)
def test_a_trial_that_was_sealed_and_not_indexed_says_so_and_is_indexed_by_the_next_start(
    w: Workbench, monkeypatch: pytest.MonkeyPatch, what: str, broken: object
) -> None:
    plan, real = w.plan(), bundle._sync
    final = w.host.paths.bundles / plan.id

    def sync(folder: Path) -> None:
        return full() if folder == final.parent else real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(f"appliance.pipeline.conduct.{what}", broken or sync)
        _, outcome = run(w, plan=plan)
    row = queries.get(w.bench.store, plan.id)
    assert (outcome.state, outcome.bundle) == (TrialState.VOID, final)
    assert (row.state, row.bundle, row.blame) == (TrialState.VOID, "", Blame.LAB)
    assert "not sealed" not in row.void_reason
    assert row.void_reason.startswith(f"its bundle {final} is there and is not in the index: ")
    assert row.hint == "the next start indexes it as what it was sealed as, if it verifies"

    assert recover(w.bench) == Recovered({}, (plan.id,), {})
    assert check_bundle(w, plan, TrialState.SEALED).highest is not None


def test_a_trial_of_an_earlier_process_that_is_sealed_and_not_indexed_at_first_is_void_all_the_same(
    w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, real, calls = crashed(w), queries.put, []

    def once(store: object, row: object) -> None:
        calls.append(row)
        return unusable() if len(calls) == 1 else real(store, row)  # type: ignore[arg-type]

    monkeypatch.setattr(queries, "put", once)
    assert recover(w.bench) == Recovered({plan.id: ""}, (), {})
    check_bundle(w, plan, TrialState.VOID)


def test_a_trial_that_could_not_be_sealed_is_sealed_by_the_next_start(w: Workbench) -> None:
    plan = w.plan()
    (w.host.paths.bundles / plan.id).mkdir()
    folder = open_folder(w.bench, plan)
    assert "not sealed" in conduct(w.bench, plan, folder, Cell(plan.id, w.host.shop), StopFlag()).reason
    (w.host.paths.bundles / plan.id).rmdir()
    assert recover(w.bench) == Recovered({plan.id: ""}, (), {})
    check_bundle(w, plan, TrialState.VOID)
