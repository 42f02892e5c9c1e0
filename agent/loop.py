"""The step loop: ask the brain, read the reply strictly, act, remember; until FINISH or a limit.

A run ends for one of five reasons, told in its ``end`` event: ``finished`` (the brain called FINISH),
``steps``, ``wall``, ``format`` (too many replies broke the format) or ``error``. A reply that breaks the
format is asked for again at most ``format_retries`` times a step, ``options.format_total`` times in all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final, Literal

from agent.brains import Brain, Reply, Turn
from agent.errors import FormatError, shown
from agent.events import Events
from agent.memory import Memory, Round
from agent.task import Task
from agent.thinking import Thought, parse_reply
from agent.tools import Finish, Toolbox, action_dict, action_json

Reason = Literal["finished", "steps", "wall", "format", "error"]
FORMAT_TOTAL: Final = 20  # format errors a run may have, unless the task says otherwise


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. ``steps`` counts actions taken, ``format_errors`` replies refused."""

    reason: Reason
    steps: int
    format_errors: int


class _Stop(Exception):  # noqa: N818 - not an error, it carries the reason out of the step
    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Run:
    """One run of one task. ``clock`` gives seconds that never go back."""

    def __init__(
        self,
        task: Task,
        brain: Brain,
        tools: Toolbox,
        memory: Memory,
        events: Events,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._task = task
        self._brain = brain
        self._tools = tools
        self._memory = memory
        self._events = events
        self._clock = clock
        self._steps = 0
        self._format_errors = 0
        self._format_total = task.number("format_total", FORMAT_TOTAL)
        self._deadline = 0.0

    def run(self) -> Outcome:
        """Run to the end. Whatever happens inside becomes the outcome; nothing is raised."""
        self._deadline = self._clock() + self._task.limits.wall_s
        self._events.emit("start", text=self._task.task, data=self._facts())
        try:
            self._brain.prepare(self._left())
            while True:
                self._step()
        except _Stop as stop:
            outcome = Outcome(stop.reason, self._steps, self._format_errors)
        except Exception as error:  # the run's end is told whatever went wrong
            ran_out = self._clock() >= self._deadline
            text = f"{type(error).__name__}: {error}"
            self._events.emit("note" if ran_out else "error", self._steps, text)
            outcome = Outcome("wall" if ran_out else "error", self._steps, self._format_errors)
        self._events.emit("end", self._steps, outcome.reason, asdict(outcome))
        return outcome

    def _facts(self) -> dict[str, object]:
        task = self._task
        return {
            "brain": task.brain,
            "prompt": task.prompt,
            "seed": task.seed,
            "temperature": task.temperature,
            "max_tokens": task.max_tokens,
            **asdict(task.limits),
            "targets": ", ".join(f"{t.name} {t.user}@{t.address}" for t in task.targets),
        }

    def _left(self) -> float:
        """Seconds until the wall limit; stops the run when there are none."""
        left = self._deadline - self._clock()
        if left <= 0:
            raise _Stop("wall")
        return left

    def _step(self) -> None:
        """One whole round."""
        self._left()
        if self._steps >= self._task.limits.steps:
            raise _Stop("steps")
        step = self._steps + 1
        thought, reply = self._think(step)
        data = {
            "gaps": thought.gaps,
            "findings": thought.findings,
            **{f"plan_{number}": planned for number, planned in enumerate(thought.plan, start=1)},
            **reply.facts,
        }
        self._events.emit("thought", step, thought.explanation, data)
        self._events.emit("action", step, action_json(thought.action), action_dict(thought.action))
        self._steps = step
        if isinstance(thought.action, Finish):
            self._events.emit("finish", step, thought.action.message)
            raise _Stop("finished")
        result = self._tools.run(thought.action, self._left())
        self._events.emit("result", step, result.status, result.as_dict())
        self._memory.add(Round(step, thought.action, result))

    def _think(self, step: int) -> tuple[Thought, Reply]:
        """A reply that keeps the format, within the allowed retries."""
        error: FormatError | None = None
        for _ in range(self._task.limits.format_retries + 1):
            reply = self._brain.reply(Turn(step, self._memory, error, self._left()))
            try:
                return parse_reply(reply.text), reply
            except FormatError as found:
                error = found
                self._format_errors += 1
                data = {**found.as_dict(), **reply.facts, "reply": shown(reply.text, 2000)}
                self._events.emit("format-error", step, str(found), data)
                if self._format_errors >= self._format_total:
                    break
        raise _Stop("format")
