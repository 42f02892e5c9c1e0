"""Every error the agent raises on purpose. Imports nothing of the package.

::

    AgentError
    ├── FormatError   a reply or an action deviates from the format; the loop may ask again
    ├── TaskError     the task file is wrong; nothing is started
    ├── ContextError  the prompt cannot be made to fit the model's context
    ├── ModelError    the model server did not answer, or not as the OpenAI API says
    └── BrainError    a scripted brain came to its end without FINISH
"""

from __future__ import annotations

import json


def shown(value: object, limit: int = 100) -> str:
    """``value`` for a message: pure ASCII without control characters, about ``limit`` characters long."""
    text = value if isinstance(value, str) else repr(value)
    return json.dumps(text[:limit]) + (
        f" and {len(text) - limit} more characters" if len(text) > limit else ""
    )


class AgentError(Exception):
    """Base of all errors raised on purpose."""


class FormatError(AgentError):
    """A reply deviates from the format: what is wrong, where, what was found, what is allowed."""

    def __init__(self, what: str, *, where: str, found: str, allowed: str) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.found = found
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; found {self.found}; allowed: {self.allowed}"

    def as_dict(self) -> dict[str, str]:
        """The four fields, for the event stream."""
        return {"what": self.what, "where": self.where, "found": self.found, "allowed": self.allowed}


class TaskError(AgentError):
    """The task file is wrong."""


class ContextError(AgentError):
    """The parts of the prompt that may not be left out do not fit."""


class ModelError(AgentError):
    """The model server failed. ``status`` is the HTTP status, 0 if there was none."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class BrainError(AgentError):
    """A brain has nothing more to say."""
