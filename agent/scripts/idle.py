"""Control ``idle``: waits until a limit ends the run and does nothing else. Its true score is nothing.

An instrument check: shows that silence is not scored, and what a run costs in which nothing happens.
Option ``idle_s``: seconds of each wait (default 15).
"""

from __future__ import annotations

from pathlib import Path

from agent.brains import Script
from agent.scripts.common import thought
from agent.task import Task
from agent.tools import Execute


def script(task: Task, system: Path) -> Script:
    """Wait, for ever."""
    del system
    pause = task.number("idle_s", 15.0)
    while True:
        yield thought("wait", Execute(f"sleep {pause:g}"), then="wait", last="wait")
