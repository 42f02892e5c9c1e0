"""Every error of the appliance, split by who is to blame.

The tree (the second column is what happens to a trial in flight)::

    HotcellError
    ├── UserError             refused before anything starts
    │   ├── ConfigError       a file, key or value is wrong
    │   ├── NotFoundError     a named thing does not exist
    │   └── ConflictError     the request contradicts the present state
    ├── HostError             refused, or void if met in flight
    │   ├── PrerequisiteError something the host lacks
    │   ├── CommandError      an outside command failed
    │   └── CapacityError     not enough memory, disk or cores
    ├── LabError              void: our own machinery failed
    │   ├── BuildError        an image could not be built
    │   ├── SealError         isolation could not be shown
    │   ├── ResetError        a machine could not be proved clean
    │   ├── CaptureError      the packet capture is not trustworthy
    │   ├── GuestChannelError a guest does not answer where an honest one would
    │   │   └── GuestTimeoutError a program in a guest did not end in its time; the guest answers
    │   └── EvidenceError     evidence could not be written, sealed or verified
    └── SubjectError          the trial counts
        └── GuestTamperError  a guest sent what no honest guest can send

A lab failure is never a result, and a subject's act is never a lab failure.
This module imports nothing of the package.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Blame(StrEnum):
    """Who has to act on an error."""

    USER = "user"
    HOST = "host"
    LAB = "lab"
    SUBJECT = "subject"


class HotcellError(Exception):
    """Base of all errors raised on purpose.

    ``hint`` says what to do next; ``fields`` are the facts of the case, for logs and problem+json.
    """

    blame: ClassVar[Blame] = Blame.LAB
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, hint: str = "", **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields = fields

    def __str__(self) -> str:
        return f"{self.message}\n  what to do: {self.hint}" if self.hint else self.message


class UserError(HotcellError):
    """The request is wrong; nothing was started."""

    blame = Blame.USER
    code = "bad-request"


class ConfigError(UserError):
    """A file, key or value is wrong."""

    code = "bad-config"


class NotFoundError(UserError):
    """A named thing does not exist."""

    code = "not-found"


class ConflictError(UserError):
    """The request contradicts the present state."""

    code = "conflict"


class HostError(HotcellError):
    """The host cannot do what is needed."""

    blame = Blame.HOST
    code = "host"


class PrerequisiteError(HostError):
    """The host lacks a program, a device or a right."""

    code = "prerequisite"


class CommandError(HostError):
    """An outside command failed, was missing or ran out of time."""

    code = "command-failed"


class CapacityError(HostError):
    """Not enough memory, disk or cores."""

    code = "capacity"


class LabError(HotcellError):
    """Our own machinery failed; a trial in flight is void."""

    code = "lab"


class BuildError(LabError):
    """An image could not be built."""

    code = "build-failed"


class SealError(LabError):
    """Isolation could not be shown."""

    code = "seal"


class ResetError(LabError):
    """A machine could not be proved clean."""

    code = "reset"


class CaptureError(LabError):
    """The packet capture is not trustworthy."""

    code = "capture"


class GuestChannelError(LabError):
    """A guest does not answer where an honest one would."""

    code = "guest-channel"


class GuestTimeoutError(GuestChannelError):
    """A program in a guest did not end in its time and goes on running; the guest itself answers.

    ``pid`` is its process there, as the guest says.
    """

    code = "guest-timeout"

    def __init__(self, message: str, *, hint: str = "", pid: int = 0, **fields: object) -> None:
        super().__init__(message, hint=hint, pid=pid, **fields)
        self.pid = pid


class EvidenceError(LabError):
    """Evidence could not be written, sealed or verified."""

    code = "evidence"


class SubjectError(HotcellError):
    """The subject did something; the trial counts."""

    blame = Blame.SUBJECT
    code = "subject"


class GuestTamperError(SubjectError):
    """A guest sent what no honest guest can send."""

    code = "guest-tampered"
