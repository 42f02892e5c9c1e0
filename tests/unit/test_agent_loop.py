"""The step loop: every way a run can end, told honestly in its events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.brains import LlmBrain, Reply, ScriptBrain, Turn
from agent.errors import ModelError
from agent.events import Events
from agent.llm import ModelClient
from agent.loop import Outcome, Run
from agent.memory import Memory
from agent.prompting import load_prompt
from agent.scripts.common import thought
from agent.task import Task
from agent.terminals import Terminals
from agent.thinking import render
from agent.tools import Action, Execute, Finish, Receive, Toolbox
from tests.unit.agent_stubs import completion, make_task, model_server, read_events

Play = Callable[..., tuple[Outcome, list[dict[str, Any]]]]


class Says:
    """A brain that says the given texts in turn, the last one for ever; an exception is raised."""

    name = "says"

    def __init__(self, *texts: str | Exception) -> None:
        self.texts = list(texts)
        self.turns: list[Turn] = []
        self.prepared = 0.0

    def prepare(self, limit_s: float) -> None:
        self.prepared = limit_s

    def reply(self, turn: Turn) -> Reply:
        self.turns.append(turn)
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        if isinstance(text, Exception):
            raise text
        return Reply(text, {"seed": 1})


def says(action: Action) -> str:
    return render(thought("because", action))


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    boxes: list[Toolbox] = []

    def run(brain: Any, task: Task | None = None, clock: Any = None) -> tuple[Outcome, list[dict[str, Any]]]:
        task = task or make_task()
        port = tmp_path / f"events{len(boxes)}"
        port.touch()
        boxes.append(Toolbox(Terminals(tmp_path), 20, 1))
        events = Events(port)
        more = {"clock": clock} if clock else {}
        memory = Memory(load_prompt(task.prompt), task.task)
        outcome = Run(task, brain, boxes[-1], memory, events, **more).run()
        events.close()
        return outcome, read_events(port)

    yield run
    for box in boxes:
        box.close()


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["kind"] for event in events]


def test_a_run_that_finishes(play: Play) -> None:
    brain = Says(says(Execute("echo hello")), says(Receive(1)), says(Finish("all done")))
    outcome, events = play(brain)
    assert outcome == Outcome("finished", 3, 0)
    assert kinds(events) == [
        "start",
        *["thought", "action", "result"] * 2,
        "thought",
        "action",
        "finish",
        "end",
    ]
    assert events[0]["data"]["seed"] == 7
    assert [events[1]["data"][f"plan_{n}"] for n in (1, 2, 3)] == ["because", "go on", "finish"]
    assert events[1]["data"]["seed"] == 1
    assert events[2]["data"]["command"] == "echo hello"
    assert events[3]["data"] == {"status": "ok", "stdout": "hello\n", "stderr": "", "terminal": 1}
    assert events[-2]["text"] == "all done"
    assert events[-1]["data"] == {"reason": "finished", "steps": 3, "format_errors": 0}
    assert [e["step"] for e in events] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]


def test_the_result_is_remembered_for_the_next_turn(play: Play) -> None:
    brain = Says(says(Execute("echo hello")), says(Finish("f")))
    play(brain)
    assert "stdout: hello" in brain.turns[1].memory.messages(4000)[1]["content"]


def test_garbage_ends_the_run_after_the_retries_of_one_step(play: Play) -> None:
    brain = Says("I shall now replicate \x1b[31m myself")
    outcome, events = play(brain)
    assert outcome == Outcome("format", 0, 3)  # one reply and two retries
    assert kinds(events) == ["start", "format-error", "format-error", "format-error", "end"]
    assert events[1]["data"]["where"] == "line 1"
    assert events[1]["data"]["reply"].isprintable()
    assert [turn.error is None for turn in brain.turns] == [True, False, False]


def test_format_errors_are_bounded_over_the_whole_run_too(play: Play) -> None:
    brain = Says(*["garbage", says(Execute("true"))] * 40)
    limits = {"wall_s": 60.0, "steps": 30, "format_retries": 2}
    outcome, _ = play(brain, make_task(limits=limits, options={"format_total": 4}))
    assert outcome == Outcome("format", 3, 4)


def test_a_retry_that_keeps_the_format_goes_on(play: Play) -> None:
    outcome, events = play(Says("garbage", says(Finish("f"))))
    assert outcome == Outcome("finished", 1, 1)
    assert kinds(events)[1] == "format-error"


def test_no_retries_allowed(play: Play) -> None:
    outcome, _ = play(Says("x"), make_task(limits={"wall_s": 9.0, "steps": 5, "format_retries": 0}))
    assert outcome == Outcome("format", 0, 1)


def test_the_step_limit(play: Play) -> None:
    outcome, events = play(Says(says(Execute("true"))))
    assert outcome == Outcome("steps", 5, 0)
    assert kinds(events).count("result") == 5


def test_the_wall_limit_cuts_a_command_short(play: Play) -> None:
    limits = {"wall_s": 1.0, "steps": 5, "format_retries": 2}
    outcome, events = play(Says(says(Execute("sleep 30"))), make_task(limits=limits))
    assert outcome == Outcome("wall", 1, 0)
    assert events[-2]["data"]["status"] == "timeout"


def test_the_wall_limit_before_a_step(play: Play) -> None:
    ticks = iter([0.0, 1.0, 2.0, 31.0, 32.0, 33.0])
    outcome, _ = play(Says(says(Execute("true"))), clock=lambda: next(ticks))
    assert outcome.reason == "wall"


@pytest.mark.parametrize("error", [ModelError("gone"), RuntimeError("bug"), RecursionError()])
def test_any_error_ends_the_run_as_an_error(play: Play, error: Exception) -> None:
    outcome, events = play(Says(says(Execute("true")), error))
    assert outcome == Outcome("error", 1, 0)
    assert kinds(events)[-2:] == ["error", "end"]
    assert type(error).__name__ in events[-2]["text"]


def test_a_model_error_that_the_wall_limit_made_is_the_wall(play: Play) -> None:
    now = [0.0]

    class Slow(Says):
        def reply(self, turn: Turn) -> Reply:
            now[0] = 99.0
            raise ModelError("timed out")

    outcome, events = play(Slow(""), clock=lambda: now[0])
    assert outcome.reason == "wall"
    assert kinds(events)[-2:] == ["note", "end"]


def test_a_script_that_just_stops_is_an_error(play: Play) -> None:
    def script() -> Any:
        result = yield thought("one", Execute("echo $((40+2))"))
        assert result is not None
        yield thought("two", Execute(f"test {result.stdout.strip()} = 42"))

    outcome, events = play(ScriptBrain("short", script()))
    assert outcome == Outcome("error", 2, 0)
    assert [e["data"]["status"] for e in events if e["kind"] == "result"] == ["ok", "ok"]
    assert "script:short ended without FINISH" in events[-2]["text"]


def test_a_served_model_that_says_nothing_useful_ends_with_format_errors(play: Play) -> None:
    task = make_task()
    with model_server(lambda _: (200, completion("the the the", 900))) as server:
        outcome, events = play(LlmBrain(ModelClient(server.url), task), task)
    assert outcome == Outcome("format", 0, 3)
    assert [body["seed"] for body in server.asked] == [7, 8, 9]
    assert {body["temperature"] for body in server.asked} == {0.5}
    facts = events[1]["data"]
    assert (facts["model"], facts["prompt_tokens"], facts["seed"]) == ("subject", 900, 7)
    assert "Critique" in server.asked[0]["messages"][1]["content"]


def test_a_served_model_that_keeps_the_format_acts(play: Play) -> None:
    task = make_task()
    replies = iter([says(Execute("echo from the model")), says(Finish("done"))])
    with model_server(lambda _: (200, completion(next(replies), 900))) as server:
        outcome, _ = play(LlmBrain(ModelClient(server.url), task), task)
    assert outcome.reason == "finished"
    assert "stdout: from the model" in server.asked[1]["messages"][1]["content"]


def test_a_prompt_that_the_server_finds_too_long_is_made_shorter(play: Play) -> None:
    task = make_task(limits={"wall_s": 20.0, "steps": 2, "format_retries": 0})
    long = says(Execute("yes | head -c 9000"))
    replies = iter([(200, completion(long)), (400, b"too long"), (200, completion(says(Finish("f"))))])
    with model_server(
        lambda _: next(replies), (200, b'{"data": [{"id": "s", "max_model_len": 8192}]}')
    ) as server:
        outcome, _ = play(LlmBrain(ModelClient(server.url), task), task)
    assert outcome.reason == "finished"
    sizes = [len(body["messages"][1]["content"]) for body in server.asked]
    assert sizes[2] < sizes[1] * 0.7


def test_a_server_that_always_refuses_ends_the_run(play: Play) -> None:
    task = make_task()
    models = (200, b'{"data": [{"id": "s", "max_model_len": 32768}]}')
    with model_server(lambda _: (400, b"no"), models) as server:
        outcome, events = play(LlmBrain(ModelClient(server.url), task), task)
    assert outcome == Outcome("error", 0, 0)
    assert len(server.asked) == 3
    assert "HTTP 400" in events[-2]["text"]


def test_a_model_server_that_never_comes_up_ends_the_run(play: Play) -> None:
    task = make_task(options={"model_wait_s": 0.2})
    outcome, _ = play(LlmBrain(ModelClient("http://127.0.0.1:9/v1"), task), task)
    assert outcome == Outcome("error", 0, 0)
