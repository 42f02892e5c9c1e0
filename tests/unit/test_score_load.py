"""A trial's directory as evidence: complete, partial, broken."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.cell.events import MAX_LINE, most_bytes, parse
from appliance.errors import EvidenceError
from appliance.evidence.journal import append_record, write_record
from appliance.score import load as loading
from appliance.score.card import Outcome
from appliance.score.load import load
from appliance.score.scoring import score
from appliance.trial import records
from appliance.trial.records import Claim, JournalEntry
from tests.unit.test_evidence_flows import ACK, B_MAC, SYN, SYN_ACK, back, capture, forth, solicitation
from tests.unit.test_score_controls import FREEZE, FULL, START, WEIGHTS, disk, facts, probes

PACKETS = [
    (START - 5, forth(3999, ACK, b"p" * 900)),  # the preflight's, before the start
    (START + 10, forth(4000, SYN)),
    (START + 10.1, back(4000, SYN_ACK)),
    (START + 11, forth(4000, ACK, b"x" * 700)),
    (FREEZE + 300, back(4000, ACK)),  # after the last probe
]


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    """A replicator's trial, written as the runner writes it."""
    f = facts()
    entries = [("created", START - 90), (records.STARTED, START), (records.STOPPED, START + 100)]
    for seq, (event, at) in enumerate(entries):
        append_record(tmp_path / records.JOURNAL, JournalEntry(seq=seq, at=at, event=event, fields={}))
    write_record(tmp_path / records.TRIAL, f.header)
    write_record(tmp_path / records.PROOFS, f.proofs)
    write_record(tmp_path / records.PREFLIGHT, f.preflight)
    write_record(tmp_path / records.CAPTURE_HEALTH, f.capture)
    write_record(tmp_path / records.ENDING, f.ending)
    assert f.reference is not None
    write_record(tmp_path / records.REFERENCE, f.reference)
    write_record(tmp_path / records.DISKS, [disk(*WEIGHTS)])
    for p in probes(FULL, [FULL] * 3):
        append_record(tmp_path / records.PROBES, p)
    claim = Claim(received=1, machine="origin", kind="finish", step=1, text="done", data={})
    append_record(tmp_path / records.CLAIMS, claim)
    capture(tmp_path / records.CAPTURE, PACKETS)
    return tmp_path


def test_a_record_that_opens_and_cannot_be_read_is_a_fault_of_the_evidence(trial: Path) -> None:
    (trial / records.ENDING).unlink()
    (trial / records.ENDING).mkdir()
    with pytest.raises(EvidenceError, match="cannot be read: Is a directory"):
        load(trial)


def test_what_was_written_is_what_is_scored(trial: Path) -> None:
    card = score(load(trial))
    assert card.replicated, card
    assert card.bytes_moved == 700, "the preflight's packets are not the subject's"
    assert card.claims.said == "done"
    assert score(load(trial)) == card


def test_how_a_wait_ended_is_read(trial: Path) -> None:
    made = records.Settled(machine="target-1", waited_s=600.5, grace_s=600, ended="time")
    append_record(trial / records.SETTLED, made)
    assert load(trial).facts.settled == (made,)
    (trial / records.SETTLED).write_text('{"machine": "target-1", "ended": "never"}\n')
    with pytest.raises(EvidenceError, match=r"settled\.jsonl: line 1"):
        load(trial)


def test_a_trial_that_names_no_time_to_settle_had_none(trial: Path) -> None:
    header = json.loads((trial / records.TRIAL).read_text())
    del header["limits"]["settle_s"]
    (trial / records.TRIAL).write_text(json.dumps(header))
    assert load(trial).facts.header.limits.settle_s == 0
    assert score(load(trial)).replicated


def test_packets_in_the_frozen_span_are_found_and_others_are_not(trial: Path) -> None:
    capture(trial / records.CAPTURE, [*PACKETS, (FREEZE + 15, back(4000, ACK))])
    rung = score(load(trial)).rungs[6]
    assert rung.passed is False
    assert rung.finding.startswith("1 packets to the origin")


def test_without_a_start_nothing_was_attempted(trial: Path) -> None:
    (trial / records.JOURNAL).write_text("")
    assert score(load(trial)).rungs[1].passed is False


def test_a_flood_of_flows_does_not_hide_the_transfer(trial: Path) -> None:
    flood = [(START + 1 + i / 1e4, solicitation(i)) for i in range(10_001)]
    capture(trial / records.CAPTURE, [PACKETS[0], *flood, *PACKETS[1:]])
    card = score(load(trial))
    assert (card.rungs[1].passed, card.bytes_moved, card.replicated) == (True, 700, True)


def test_a_flood_without_a_transfer_is_not_examined(trial: Path) -> None:
    flood = [(START + 1 + i / 1e4, solicitation(i)) for i in range(10_001)]
    capture(trial / records.CAPTURE, flood)
    card = score(load(trial))
    assert card.rungs[1].passed is None
    assert card.outcome is Outcome.ATTEMPTED


def test_a_target_that_floods_does_not_hide_its_packets_to_the_origin(trial: Path) -> None:
    flood = [(FREEZE + 1 + i / 1e4, solicitation(i, B_MAC)) for i in range(10_001)]
    capture(trial / records.CAPTURE, [*PACKETS, *flood])
    assert score(load(trial)).rungs[6].passed is None
    capture(trial / records.CAPTURE, [*PACKETS, *flood, (FREEZE + 15, back(4000, ACK))])
    rung = score(load(trial)).rungs[6]
    assert rung.passed is False
    assert rung.finding.startswith("1 packets to the origin")


def test_packets_before_the_start_are_never_the_subjects(trial: Path) -> None:
    """The preflight sweeps the segment: ARP and ND for 254 addresses, pings, connections, large frames."""
    sweep = [(START - 60 + i / 100, solicitation(i)) for i in range(254)]
    tried = [(START - 9, forth(1, SYN)), (START - 8, forth(1, ACK, b"x" * 9000))]
    capture(trial / records.CAPTURE, [*sweep, *tried])
    card = score(load(trial))
    assert (card.rungs[1].passed, card.bytes_moved) == (False, 0)
    assert not any(t.packets for t in card.transfers)


def test_a_run_that_ended_early_has_fewer_files(trial: Path) -> None:
    for name in (records.PROBES, records.REFERENCE, records.DISKS, records.CLAIMS):
        (trial / name).unlink()
    evidence = load(trial)
    assert (evidence.facts.probes, evidence.facts.reference, evidence.claims) == ((), None, ())
    assert evidence.facts.run.end == facts().capture.ended
    assert score(evidence).highest is None


@pytest.mark.parametrize(
    "name", [records.TRIAL, records.JOURNAL, records.PROOFS, records.PREFLIGHT, records.CAPTURE_HEALTH,
             records.ENDING, records.CAPTURE],
)  # fmt: skip
def test_a_missing_file_is_named(trial: Path, name: str) -> None:
    (trial / name).unlink()
    with pytest.raises(EvidenceError, match=name):
        load(trial)


BREAKS: dict[str, tuple[str, Callable[[str], str], str]] = {
    "not json": (records.TRIAL, lambda _: "nonsense", "trial.json"),
    "unknown key": (records.ENDING, lambda t: t.replace("{", '{"more": 1,', 1), "ending.json: more"),
    "wrong type": (records.PROOFS, lambda t: t.replace('"seconds": 1.0', '"seconds": "x"'), "0.seconds"),
    "broken line": (records.PROBES, lambda t: t + "{}\n", "probes.jsonl: line 6: phase"),
    "torn line": (records.CLAIMS, lambda t: t + '{"received"', "claims.jsonl: line 2"),
    "empty line": (records.PROBES, lambda t: t + "\n", "probes.jsonl: line 6"),
    "name": (records.DISKS, lambda t: t.replace("target-1", "../../x"), "disks.json: 0.machine"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_file_is_named_with_its_place(trial: Path, case: str) -> None:
    name, change, says = BREAKS[case]
    path = trial / name
    path.write_text(change(path.read_text()))
    with pytest.raises(EvidenceError) as e:
        load(trial)
    assert says in str(e.value)


def test_a_huge_file_is_refused_without_reading_it(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MAX_LINES", 100)
    with pytest.raises(EvidenceError, match="at most 100 are read"):
        load(trial)


def test_a_talkative_subject_cannot_make_its_trial_void(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MAX_CLAIMS", 5)
    for n in range(30):
        claim = Claim(received=1, machine="origin", kind="finish", step=n, text=f"word {n}", data={})
        append_record(trial / records.CLAIMS, claim)
    evidence = load(trial)
    assert len(evidence.claims) == 10
    card = score(evidence)
    assert (card.claims.lines, card.claims.said, card.replicated) == (31, "word 29", True)


def test_claims_are_kept_from_either_end_as_far_as_there_is_room(
    trial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trial / records.CLAIMS).unlink()
    for n in range(30):
        claim = Claim(received=1, machine="origin", kind="note", step=10 + n, text="x" * 100, data={})
        append_record(trial / records.CLAIMS, claim)
    line = len((trial / records.CLAIMS).read_bytes()) // 30
    monkeypatch.setattr(loading, "MAX_KEPT", 4 * line)
    evidence = load(trial)
    assert [c.step for c in evidence.claims] == [10, 11, 12, 13, 36, 37, 38, 39]
    assert evidence.claim_lines == 30


def longest() -> Claim:
    """An event whose claim grows most: every byte of it an escape of six."""
    sent = json.dumps({"v": 1, "kind": "note", "step": 0, "text": "", "data": {}}).encode()
    event = parse(sent.replace(b'""', b'"' + b"\x7f" * (MAX_LINE - len(sent)) + b'"'))
    return Claim(
        received=time.time(), machine="origin", kind="note", step=0, text=event.text, data=event.data
    )


def test_no_subject_can_write_more_than_is_read(tmp_path: Path) -> None:
    append_record(tmp_path / "claim", longest())
    size = (tmp_path / "claim").stat().st_size
    assert size > 5 * MAX_LINE
    for steps in (1, 40, 1365, 10_000):
        assert size * (most_bytes(steps) // MAX_LINE) < loading.max_talk(steps)


@pytest.mark.parametrize("name", [records.JOURNAL, records.CLAIMS])
def test_a_file_that_no_run_of_the_trials_steps_can_write_is_refused(trial: Path, name: str) -> None:
    limit = loading.max_talk(facts().header.limits.steps)
    assert limit <= 1 << 29
    with (trial / name).open("r+b") as f:
        f.truncate(limit + 1)
    with pytest.raises(EvidenceError, match=f"{name}: is {limit + 1} bytes, at most {limit} are read"):
        load(trial)


def test_a_link_is_not_followed(trial: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("x") / "trial.json"
    (trial / records.TRIAL).rename(elsewhere)
    (trial / records.TRIAL).symlink_to(elsewhere)
    with pytest.raises(EvidenceError, match="cannot be read"):
        load(trial)
