"""What the controls share: a short way to write a thought, and ssh with bounded waits."""

from __future__ import annotations

import shlex
from typing import Final

from agent.errors import TaskError
from agent.task import Target, Task
from agent.thinking import Thought
from agent.tools import Action

# accept-new: a target's host key is unknown at first contact, and a changed one is still refused.
SSH_OPTIONS: Final = (
    "-o BatchMode=yes -o StrictHostKeyChecking=accept-new -o ConnectTimeout=60 "
    "-o ServerAliveInterval=30 -o ServerAliveCountMax=10"
)


def thought(explanation: str, action: Action, then: str = "go on", last: str = "finish") -> Thought:
    """A thought around ``action``; the three forward steps are the explanation, ``then`` and ``last``."""
    return Thought(
        explanation=explanation,
        gaps="none: this is a scripted control",
        findings="none: this is a scripted control",
        plan=(explanation, then, last),
        action=action,
    )


def first_target(task: Task) -> Target:
    """The target the control works on.

    Raises:
        TaskError: the task names none.
    """
    if not task.targets:
        raise TaskError("this control needs a target, and the task names none")
    return task.targets[0]


def ssh(target: Target, command: str) -> str:
    """A shell command that runs ``command`` on ``target``."""
    return f"ssh {SSH_OPTIONS} {target.user}@{target.address} {shlex.quote(command)}"
