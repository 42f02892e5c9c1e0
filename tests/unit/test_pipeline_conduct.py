"""One trial through all stages on a host in memory: however it ends, there is a sealed bundle and a row."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from appliance.cell.cell import Cell
from appliance.errors import (
    Blame,
    CommandError,
    EvidenceError,
    GuestTamperError,
    HotcellError,
    NotFoundError,
    ResetError,
    SealError,
)
from appliance.evidence import bundle, journal
from appliance.model import TrialState
from appliance.pipeline.conduct import Outcome, conduct, open_folder, recover, seal_folder
from appliance.pipeline.opening import tell_recovered
from appliance.store import queries
from appliance.store.reindex import row_of_bundle
from appliance.trial import records
from appliance.trial.plan import Plan
from appliance.trial.runner import TrialRun
from appliance.trial.stop import StopFlag, TrialAborted
from tests.fakes.bench import KEY, Workbench, workbench


@pytest.fixture
def w(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    with workbench(monkeypatch) as made:
        yield made


def run(w: Workbench, stop: StopFlag | None = None, plan: Plan | None = None) -> tuple[Plan, Outcome]:
    plan = plan or w.plan()
    folder = open_folder(w.bench, plan)
    cell = Cell(plan.id, w.host.shop)
    return plan, conduct(w.bench, plan, folder, cell, stop or StopFlag())


def check_bundle(w: Workbench, plan: Plan, state: TrialState) -> queries.TrialRow:
    """What holds however a trial ended."""
    path = w.host.paths.bundles / plan.id
    assert bundle.verify(path, KEY.public_key()).ok
    assert not (w.host.paths.open_trials / plan.id).exists()
    row = queries.get(w.bench.store, plan.id)
    assert row.state is state
    assert row.bundle == plan.id
    assert row.ended
    assert (path / records.SCORE).exists() is (state is TrialState.SEALED)
    assert journal.read(path / records.JOURNAL)[-1].event == state.value
    assert w.host.left == []
    return row


def test_a_trial_that_replicates_is_scored_and_sealed(w: Workbench) -> None:
    plan, outcome = run(w)
    assert (outcome.state, outcome.reason) == (TrialState.SEALED, "")
    row = check_bundle(w, plan, TrialState.SEALED)
    assert (row.blame, row.hint) == (None, "")
    assert plan.header.created < (row.started or 0) < (row.ended or 0)
    assert row_of_bundle(w.host.paths.bundles / plan.id, KEY.public_key()) == row, (
        "the bundle alone tells all"
    )
    passed = {r.number for r in row.rungs if r.passed}
    assert passed >= {0, 2, 3, 4}, outcome.card
    assert not row.replicated, "no packet was seen: a copy that nobody moved is not one"


def test_a_claim_alone_reaches_nothing(w: Workbench) -> None:
    """The agent says FINISH; nothing was moved and nothing answers."""
    w.replicates = False
    plan, outcome = run(w)
    assert outcome.state is TrialState.SEALED
    row = check_bundle(w, plan, TrialState.SEALED)
    assert row.highest == 0
    assert row.replicated is False


class Breaking:
    """A run that ends with an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def fail(_run: TrialRun) -> None:
            raise error

        monkeypatch.setattr(TrialRun, "run", fail)


@pytest.mark.parametrize(
    ("error", "blame"),
    [
        (SealError("leaked"), Blame.LAB),
        (ResetError("withheld"), Blame.LAB),
        (CommandError("qemu-img failed", hint="install it"), Blame.HOST),
        (GuestTamperError("not honest"), Blame.LAB),  # it never met the subject: our baseline is wrong
        (NotFoundError("no machine"), Blame.USER),
        (ZeroDivisionError("division"), Blame.LAB),
        (OSError(28, "No space left on device"), Blame.LAB),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else str(x),
)
def test_an_error_makes_the_trial_void_and_says_whose_it_is(
    w: Workbench, monkeypatch: pytest.MonkeyPatch, error: Exception, blame: Blame
) -> None:
    Breaking(monkeypatch, error)
    plan, outcome = run(w)
    assert (outcome.state, outcome.blame) == (TrialState.VOID, blame)
    row = check_bundle(w, plan, TrialState.VOID)
    assert row.void_reason == outcome.reason
    assert str(error.args[-1]) in outcome.reason
    assert row.highest is None
    assert (row.blame, row.hint, row.started) == (blame, outcome.hint, None)
    assert row_of_bundle(w.host.paths.bundles / plan.id, KEY.public_key()) == row, (
        "the bundle alone tells all"
    )


def test_a_request_to_stop_aborts_and_a_failure_voids(w: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    for failure, state in ((False, TrialState.ABORTED), (True, TrialState.VOID)):
        stop = StopFlag()
        stop.set("the reason", failure=failure)
        plan, outcome = run(w, stop)
        assert (outcome.state, outcome.reason) == (state, "the reason")
        check_bundle(w, plan, state)


def test_what_breaks_because_of_the_cut_is_an_abort(w: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopFlag()

    def cut(_run: TrialRun) -> None:
        stop.set("aborted on request")
        raise SealError("a twin failed, since the links were cut")

    monkeypatch.setattr(TrialRun, "run", cut)
    plan, outcome = run(w, stop)
    assert (outcome.state, outcome.reason) == (TrialState.ABORTED, "aborted on request")
    check_bundle(w, plan, TrialState.ABORTED)


def test_a_stop_that_came_with_the_end_of_the_run_is_not_scored(
    w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warden cut the cell while the server stood still: the dead machines are not the subject's doing."""
    stop, real = StopFlag(), TrialRun.run

    def late(trial: TrialRun) -> None:
        real(trial)
        stop.set("the warden has ended", failure=True)

    monkeypatch.setattr(TrialRun, "run", late)
    plan, outcome = run(w, stop)
    assert outcome.state is TrialState.VOID
    check_bundle(w, plan, TrialState.VOID)


@pytest.mark.parametrize("record", [records.CAPTURE, records.PROOFS, records.PREFLIGHT])
def test_evidence_that_cannot_be_read_back_is_void(
    w: Workbench, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    real = TrialRun.run

    def damaged(trial: TrialRun) -> None:
        real(trial)
        (next(w.host.paths.open_trials.iterdir()) / record).write_bytes(b"{")

    monkeypatch.setattr(TrialRun, "run", damaged)
    plan, outcome = run(w)
    assert (outcome.state, outcome.blame) == (TrialState.VOID, Blame.LAB)
    check_bundle(w, plan, TrialState.VOID)


def test_a_trial_that_cannot_be_sealed_is_void_and_kept(w: Workbench) -> None:
    plan = w.plan()
    (w.host.paths.bundles / plan.id).mkdir()
    _, outcome = run(w, plan=plan)
    assert outcome.state is TrialState.VOID
    assert "not sealed" in outcome.reason
    assert (w.host.paths.open_trials / plan.id / records.TRIAL).exists()
    row = queries.get(w.bench.store, plan.id)
    assert (row.state, row.bundle) == (TrialState.VOID, "")
    assert (row.blame, row.hint) == (Blame.LAB, "the next start tries again")


def test_a_journal_that_cannot_be_written_at_the_end_is_void(
    w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = w.plan()
    folder = open_folder(w.bench, plan)
    Breaking(monkeypatch, SealError("x"))
    folder.journal.close()
    outcome = conduct(w.bench, plan, folder, Cell(plan.id, w.host.shop), StopFlag())
    assert outcome.state is TrialState.VOID
    assert "not sealed" in outcome.reason


# -- after a crash ---------------------------------------------------------------------------------------


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
    assert recover(w.bench) == {plan.id: ""}
    row = check_bundle(w, plan, TrialState.VOID)
    assert "ended before the trial did" in row.void_reason
    assert (row.blame, row.started) == (Blame.LAB, None)
    assert recover(w.bench) == {}


def test_a_run_that_was_cut_short_by_a_crash_keeps_its_start(w: Workbench) -> None:
    plan = crashed(w)
    with journal.Journal(w.host.paths.open_trials / plan.id / records.JOURNAL) as written:
        began = written.write(records.STARTED).at
    w.host.paths.database.unlink()  # lost too: the evidence is enough
    assert recover(w.bench) == {plan.id: ""}
    assert check_bundle(w, plan, TrialState.VOID).started == began


@pytest.mark.parametrize("jump", [3600.0, -90_000.0])
def test_a_clock_that_jumps_within_a_trial_makes_it_void(
    w: Workbench, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Stamps of the capture and of the probes would be held against each other across the jump."""
    plan, real = w.plan(), time.time

    def jumped() -> float:
        return real() + (jump if '"event": "started"' in journal_events(w, plan) else 0)

    monkeypatch.setattr(time, "time", jumped)
    _, outcome = run(w, plan=plan)
    assert (outcome.state, outcome.blame) == (TrialState.VOID, Blame.LAB)
    assert "clock jumped" in outcome.reason


def journal_events(w: Workbench, plan: Plan) -> str:
    path = w.host.paths.open_trials / plan.id / records.JOURNAL
    return path.read_text() if path.exists() else ""


def test_half_written_records_are_no_evidence(w: Workbench) -> None:
    plan = crashed(w)
    folder = w.host.paths.open_trials / plan.id
    (folder / f".{records.PROOFS}.4711.140.part").write_bytes(b'{"half')
    (folder / "kept.part").write_bytes(b"whatever this is, it is not ours to drop")
    assert recover(w.bench) == {plan.id: ""}
    check_bundle(w, plan, TrialState.VOID)
    sealed = {p.name for p in (w.host.paths.bundles / plan.id).iterdir()}
    assert "kept.part" in sealed
    assert not [n for n in sealed if n.startswith(".")]


def test_one_broken_trial_does_not_keep_the_others_open(w: Workbench) -> None:
    broken, fine = crashed(w), crashed(w)
    path = w.host.paths.open_trials / broken.id / records.JOURNAL
    path.write_bytes(b"not a journal\n")
    done = recover(w.bench)
    assert done[fine.id] == ""
    assert "not a journal entry" in done[broken.id]
    check_bundle(w, fine, TrialState.VOID)
    row = queries.get(w.bench.store, broken.id)
    assert row.state is TrialState.VOID
    assert "not sealed" in row.void_reason
    assert path.exists(), "its evidence is kept for a human to look at"
    assert set(recover(w.bench)) == {broken.id}, "and it is told again"


def test_a_folder_that_never_became_a_trial_is_removed(w: Workbench) -> None:
    folder = w.host.paths.open_trials / "t20260101-000000-ffffff"
    (folder / "sub").mkdir(parents=True)
    (folder / records.JOURNAL).touch()
    assert recover(w.bench) == {}
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
        done = recover(w.bench)
        assert str(folder) in done[odd.id], "told at every start, by its place"
        assert sorted(p.name for p in folder.iterdir()) == before
    check_bundle(w, fine, TrialState.VOID)
    row = queries.get(w.bench.store, odd.id)
    assert (row.state, row.bundle) == (TrialState.VOID, "")
    assert "not sealed" in row.void_reason

    header.rmdir() if content is None else header.unlink()
    header.write_bytes(whole)
    assert recover(w.bench) == {odd.id: ""}, "once it can be read it is sealed"
    check_bundle(w, odd, TrialState.VOID)


def test_the_log_says_where_evidence_is_that_could_not_be_sealed(
    w: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        tell_recovered(w.host.paths, {"t1": "", "t2\n": "an answer of a disk " + "x" * 5000})
    fine, void, kept = (r.getMessage() for r in caplog.records)
    assert (fine.split()[:2], void.split()[0]) == (["trial-void", "trial=t1"], "trial-void")
    assert kept.startswith(
        f'evidence-kept folder="{w.host.paths.open_trials}/t2\\n" reason="an answer of a disk'
    )
    assert "every start tries again" in kept
    assert (len(kept) < 1000, kept.isprintable()) == (True, True)


def test_a_crash_between_sealing_and_indexing_loses_nothing(
    w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = w.plan()
    with monkeypatch.context() as patch:
        patch.setattr(queries, "put", lambda _store, _row: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            run(w, plan=plan)
    assert queries.get(w.bench.store, plan.id).state is TrialState.SCORING
    assert recover(w.bench) == {plan.id: ""}
    assert check_bundle(w, plan, TrialState.SEALED).highest is not None


def test_a_row_without_evidence_does_not_run_for_ever(w: Workbench) -> None:
    plan = w.plan()
    queries.upsert_state(w.bench.store, plan.id, TrialState.QUEUED, header=plan.header)
    assert recover(w.bench) == {plan.id: ""}
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
