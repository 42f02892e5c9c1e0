"""The breakdown of a trial's overhead is complete and blames the right stage."""

from __future__ import annotations

import pytest

from appliance.trial.records import JournalEntry
from bench.overhead import AIM_S, ONCE, RESET, SEAL, SUBJECT, WAITED, overhead, report, stages

Story = list[tuple[float, str, dict[str, object]]]

CLAIMER: Story = [
    (0.0, "queued", {}),
    (0.1, "resetting", {}),
    (0.5, "proved", {"machine": "origin"}),
    (0.6, "proved", {"machine": "target-1"}),
    (1.0, "capture-confirmed", {}),
    (1.1, "seal-examined", {}),
    (1.5, "probe", {"phase": "before"}),
    (4.0, "preflight", {}),
    (4.1, "started", {}),
    (6.0, "step", {"step": 1}),
    (7.1, "stopping", {}),
    (7.4, "stopped", {}),
    (7.5, "step", {"step": 2}),  # an event that was late
    (8.0, "probe", {"phase": "origin-live"}),
    (8.5, "origin-frozen", {}),
    (9.5, "collected", {}),
    (10.0, "scored", {}),
    (10.1, "sealed", {}),
]


def journal(story: Story) -> list[JournalEntry]:
    return [
        JournalEntry(seq=n, at=1000.0 + at, event=event, fields=fields)
        for n, (at, event, fields) in enumerate(story)
    ]


def test_every_second_lies_in_exactly_one_stage() -> None:
    found = stages(journal(CLAIMER), 1010.4)
    assert sum(found.values()) == pytest.approx(10.4)
    assert found[SUBJECT] == pytest.approx(3.0)
    assert found["reset of both machines, proved"] == pytest.approx(0.5)
    assert found["plug, probe before, preflight"] == pytest.approx(3.0)
    assert found["probes, origin live"] == pytest.approx(1.1), "the late event starts no stage of its own"
    assert found[SEAL] == pytest.approx(0.4)
    assert overhead(found) == pytest.approx(7.4)


def test_baselines_and_the_second_reset_are_told_apart() -> None:
    story: Story = [
        (0.0, "queued", {}),
        (1.0, "baseline-making", {}),
        (200.0, "baseline-made", {}),
        (201.0, "resetting", {}),
        (202.0, "proved", {}),
        (210.0, "collected", {}),
        (211.0, "proved", {}),
        (213.0, "reference", {}),
    ]
    found = stages(journal(story))
    assert found[ONCE] == pytest.approx(200)
    assert found["reference on a pristine origin"] == pytest.approx(3)
    assert overhead(found) == pytest.approx(13)


def test_waiting_for_room_is_nobodys_overhead() -> None:
    story: Story = [
        (0.0, "queued", {}),
        (0.1, "waiting", {}),
        (30.0, "resetting", {}),
        (31.0, "in-place", {}),
    ]
    found = stages(journal(story))
    assert found == pytest.approx({WAITED: 30.0, RESET: 1.0})
    assert overhead(found) == pytest.approx(1.0)


def test_an_unknown_entry_gives_its_time_to_the_next_stage() -> None:
    story = [*CLAIMER[:5], (2.0, "something-new", {}), *CLAIMER[7:]]
    assert sum(stages(journal(story)).values()) == pytest.approx(10.1)


def test_no_entries_no_stages() -> None:
    assert stages([], 5.0) == {}


def test_the_report_holds_the_sum_against_the_aim(capsys: pytest.CaptureFixture[str]) -> None:
    quick = stages(journal(CLAIMER))
    assert report([quick, quick]) == pytest.approx(7.1)
    assert "within 7.90 s" in capsys.readouterr().out
    assert report([quick | {"slow": 20.0}]) > AIM_S
    assert "MISSED by" in capsys.readouterr().out
