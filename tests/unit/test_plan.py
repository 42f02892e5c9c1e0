"""A plan is a pure function of what was asked: same arguments, same plan, to the byte."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config import load_library
from appliance.model import TRIAL_ID_PATTERN, Role
from appliance.trial.plan import new_trial_id
from tests.fakes.plans import LIMITS, plan


def test_same_arguments_same_plan() -> None:
    assert plan() == plan()
    assert plan().task_file == plan().task_file
    assert plan().header.model_dump_json() == plan().header.model_dump_json()


@pytest.mark.parametrize(
    "changed",
    [
        lambda: plan(seed=2),
        lambda: plan(subject="idle"),
        lambda: plan(limits=LIMITS.model_copy(update={"wall_s": 31})),
    ],
    ids=["seed", "subject", "limits"],
)
def test_the_digest_changes_with_what_was_asked(changed: object) -> None:
    assert changed().header.config_sha256 != plan().header.config_sha256  # type: ignore[operator]


def test_the_task_file_is_what_the_agent_reads() -> None:
    made = plan("target-1", "target-2", limits=LIMITS)
    task = json.loads(made.task_file)
    assert set(task) == {
        "task", "brain", "prompt", "seed", "temperature", "max_tokens", "limits", "targets", "options",
    }  # fmt: skip
    assert task["targets"] == [
        {"name": "target-1", "address": "10.77.0.21", "user": "subject"},
        {"name": "target-2", "address": "10.77.0.22", "user": "subject"},
    ]
    assert task["limits"] == {"wall_s": 30, "steps": 5, "format_retries": 3}
    assert "{targets}" not in task["task"]
    assert task["task"] == made.header.task


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("Copy to {targets}.", "Copy to target-1 (address 10.77.0.21, user subject)."),
        ('Answer {"done": true}', 'Answer {"done": true}'),
        ("{", "{"),
        ("{0} {x} {targets.__class__}", "{0} {x} {targets.__class__}"),
    ],
)
def test_targets_are_named_and_other_braces_stay(
    monkeypatch: pytest.MonkeyPatch, task: str, told: str
) -> None:
    library = load_library()
    changed = library.scenario("replicate").model_copy(update={"task": task})
    monkeypatch.setattr("tests.fakes.plans.load_library", lambda: library)
    monkeypatch.setattr(type(library), "scenario", lambda _self, _name: changed)
    assert json.loads(plan().task_file)["task"] == told


def test_the_header_names_each_machine_once_with_its_addresses() -> None:
    header = plan("target-1", "target-2").header
    assert [(m.name, m.role, m.address) for m in header.machines] == [
        ("origin", "origin", "10.77.0.11"),
        ("target-1", "target", "10.77.0.21"),
        ("target-2", "target", "10.77.0.22"),
    ]  # fmt: skip
    assert len({m.mac for m in header.machines}) == 3
    assert [m.name for m in plan().of_role(Role.TARGET)] == ["target-1"]


@given(st.floats(min_value=0, max_value=4e9))
def test_ids_have_their_shape_and_sort_by_time(now: float) -> None:
    made = new_trial_id(now)
    assert re.fullmatch(TRIAL_ID_PATTERN, made)
    assert made[:16] <= new_trial_id(now + 1)[:16]


def test_ids_of_one_second_differ() -> None:
    assert len({new_trial_id(1.0) for _ in range(200)}) > 190
