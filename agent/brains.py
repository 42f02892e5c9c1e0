"""What decides the next action: the model beside the agent, or a script that is a control.

Both give reply *text* of the same five parts, which takes the same way through parser, tools and memory.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, cast

from agent.errors import BrainError, FormatError, ModelError, TaskError
from agent.llm import ModelClient
from agent.memory import Budget, Memory, size
from agent.task import Task
from agent.terminals import Result
from agent.thinking import Thought, render

Script = Generator[Thought, Result | None, None]
SCRIPT: Final = "script:"
MODEL_WAIT_S: Final = 900.0  # seconds; without KVM a cold vLLM needs 115-205
SHRINK: Final = (1.0, 0.6, 0.35)  # of the prompt's room, tried in turn when the server finds it too long


@dataclass(frozen=True, slots=True)
class Turn:
    """What a brain is asked: the memory, the format error of its last reply, and the seconds left."""

    step: int
    memory: Memory
    error: FormatError | None
    left_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What a brain said, with the facts of how (recorded with the thought)."""

    text: str
    facts: dict[str, object] = field(default_factory=dict)


class Brain(Protocol):
    """Decides. Errors other than :class:`AgentError` end the run as errors too."""

    name: str

    def prepare(self, limit_s: float) -> None:
        """Wait until it can answer, at most ``limit_s`` seconds."""

    def reply(self, turn: Turn) -> Reply:
        """The next reply."""


class LlmBrain:
    """The served model. Every request's seed, temperature and token counts go into the facts."""

    name = "llm"

    def __init__(self, client: ModelClient, task: Task) -> None:
        self._client = client
        self._task = task
        self._budget: Budget | None = None
        self._requests = 0

    def prepare(self, limit_s: float) -> None:
        """Wait for the model server and learn the context it serves.

        Raises:
            ModelError: it did not answer in time.
        """
        wait_s = self._task.number("model_wait_s", MODEL_WAIT_S)
        self._budget = Budget(self._client.wait(min(limit_s, wait_s)).context, self._task.max_tokens)

    def reply(self, turn: Turn) -> Reply:
        """Ask the model; a prompt that the server finds too long is made shorter, twice at most.

        Raises:
            ModelError: the server failed.
            ContextError: the prompt cannot be made to fit.
        """
        if self._budget is None:
            self.prepare(turn.left_s)
        budget = cast("Budget", self._budget)
        # A new seed for each request, else a reply that broke the format would be drawn again.
        seed = (self._task.seed + self._requests) % 2**31
        self._requests += 1
        for number, share in enumerate(SHRINK, start=1):
            messages = turn.memory.messages(int(budget.prompt_bytes * share), turn.error)
            try:
                answer = self._client.chat(
                    messages,
                    max_tokens=budget.answer,
                    temperature=self._task.temperature,
                    seed=seed,
                    within_s=turn.left_s,
                )
            except ModelError as error:
                if error.status != 400 or number == len(SHRINK):
                    raise
                continue
            break
        sent = sum(size(message["content"]) for message in messages)
        budget.learn(sent, answer.prompt_tokens)
        return Reply(
            answer.text,
            {
                "model": answer.model,
                "seed": seed,
                "temperature": self._task.temperature,
                "max_tokens": budget.answer,
                "prompt_bytes": sent,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "stopped": answer.stopped,
            },
        )


class ScriptBrain:
    """Plays a script: a generator of thoughts that is sent each action's result."""

    def __init__(self, name: str, script: Script) -> None:
        self.name = SCRIPT + name
        self._script = script
        self._started = False

    def prepare(self, limit_s: float) -> None:
        """Nothing to wait for."""

    def reply(self, turn: Turn) -> Reply:
        """The next thought of the script, as text.

        Raises:
            BrainError: the script ended without FINISH.
        """
        last = turn.memory.last
        try:
            if self._started:
                thought = self._script.send(last.result if last else None)
            else:
                self._started = True
                thought = next(self._script)
        except StopIteration as end:
            raise BrainError(f"{self.name} ended without FINISH") from end
        return Reply(render(thought))


def make_brain(task: Task, client: ModelClient, system: Path) -> Brain:
    """The brain that the task names; ``system`` is the AI system's own folder.

    Raises:
        TaskError: no such script.
    """
    if not task.brain.startswith(SCRIPT):
        return LlmBrain(client, task)
    name = task.brain.removeprefix(SCRIPT)
    return ScriptBrain(name, find_script(name)(task, system))


def find_script(name: str) -> Callable[[Task, Path], Script]:
    """The ``script`` function of ``agent/scripts/NAME.py`` (``-`` in the name is ``_`` in the file).

    Raises:
        TaskError: there is none.
    """
    known = script_names()
    if name not in known:
        raise TaskError(f"brain: no script {json.dumps(name)}; there are {', '.join(known)}")
    module = importlib.import_module("agent.scripts." + name.replace("-", "_"))
    return cast("Callable[[Task, Path], Script]", module.script)


def script_names() -> list[str]:
    """The names of all scripts."""
    folder = Path(__file__).parent / "scripts"
    return sorted(p.stem.replace("_", "-") for p in folder.glob("[a-z]*.py") if p.stem != "common")
