"""The task file is read strictly."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import TaskError
from agent.task import MAX_FILE, Limits, Target, load_task, parse_task
from tests.unit.agent_stubs import make_task, task_table


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text(json.dumps(task_table(brain="script:dies-after-30s")))
    task = load_task(path)
    assert task.limits == Limits(30.0, 5, 2)
    assert task.targets == (Target("target-1", "10.77.0.21", "subject"),)
    assert task.brain == "script:dies-after-30s"


def test_a_whole_number_is_good_where_a_real_one_is() -> None:
    assert make_task(temperature=0, limits={"wall_s": 5, "steps": 1, "format_retries": 0}).temperature == 0.0


def without(key: str) -> dict[str, Any]:
    table = task_table()
    del table[key]
    return table


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "an object"),
        (without("seed"), "seed is missing"),
        (task_table(extra=1), "unknown keys"),
        (task_table(task=" "), "task: found"),
        (task_table(task=5), "task: found"),
        (task_table(brain="script:../x"), "llm or script:NAME"),
        (task_table(brain="script:Replicator"), "llm or script:NAME"),
        (task_table(prompt="a/b"), "prompt: found"),
        (task_table(seed=-1), "seed: found"),
        (task_table(seed=True), "seed: found"),
        (task_table(temperature=2.5), "temperature: found"),
        (task_table(temperature=float("nan")), "temperature: found"),
        (task_table(temperature="0"), "temperature: found"),
        (task_table(max_tokens=0), "max_tokens: found"),
        (task_table(limits=[]), "limits: found"),
        (task_table(limits={"wall_s": 0, "steps": 1, "format_retries": 0}), "wall_s: found"),
        (task_table(limits={"wall_s": 1, "steps": 0, "format_retries": 0}), "steps: found"),
        (task_table(limits={"wall_s": 1, "steps": 1.0, "format_retries": 0}), "steps: found"),
        (task_table(limits={"wall_s": 1, "steps": 1, "format_retries": 0, "x": 1}), "limits: unknown keys"),
        (task_table(targets={}), "targets: found"),
        (task_table(targets=[{"name": "t"}]), r"targets\[0\]: the key address"),
        (task_table(targets=[{"name": "t", "address": "-oProxyCommand=x", "user": "u"}]), "address: found"),
        (task_table(targets=[{"name": "t", "address": "::1", "user": "-x"}]), "user: found"),
        (task_table(targets=[{"name": "t; rm", "address": "::1", "user": "u"}]), "name: found"),
        (task_table(options=3), "options: found"),
    ],
)
def test_a_bad_file_is_refused_with_the_key(value: object, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        parse_task(value)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 60_000, b" " * (MAX_FILE + 1)])
def test_an_unreadable_file_is_refused_with_its_path(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "task.json"
    path.write_bytes(raw)
    with pytest.raises(TaskError, match=r"task\.json"):
        load_task(path)
    with pytest.raises(TaskError, match="absent"):
        load_task(tmp_path / "absent")


@pytest.mark.parametrize("value", [0, -1, True, "5", None, float("nan"), float("inf")])
def test_an_option_must_be_a_positive_number(value: object) -> None:
    assert make_task().number("x", 4) == 4.0
    with pytest.raises(TaskError, match=r"options\.x"):
        make_task(options={"x": value}).number("x", 4)


@given(
    st.dictionaries(
        st.sampled_from(sorted(task_table())), st.none() | st.text() | st.integers() | st.lists(st.none())
    )
)
def test_nothing_but_a_task_error(changes: dict[str, object]) -> None:
    with contextlib.suppress(TaskError):
        parse_task(task_table(**changes))
