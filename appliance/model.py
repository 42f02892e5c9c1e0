"""Names and small frozen shapes that every stage shares. Imports only ``errors``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

NAME_PATTERN = r"^[a-z][a-z0-9-]{0,39}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
PciAddress = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
TRIAL_ID_PATTERN = r"^t[0-9]{8}-[0-9]{6}-[0-9a-f]{6}$"
TrialId = Annotated[str, StringConstraints(pattern=TRIAL_ID_PATTERN)]
MAX_PAGE = 1000  # trials that one listing returns at most


class Frozen(BaseModel):
    """Base of every record: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=False)


class Role(StrEnum):
    """What a machine is in its cell."""

    ORIGIN = "origin"
    TARGET = "target"
    WORLD = "world"


class Accelerator(StrEnum):
    """How guests execute."""

    KVM = "kvm"
    TCG = "tcg"


class Firmware(StrEnum):
    """What a machine starts its kernel with. UEFI keeps variables in a file of the machine's own, its NVRAM."""

    BIOS = "bios"
    UEFI = "uefi"


class TrialState(StrEnum):
    """The states of a trial, in order; the last three end it.

    ``void`` says nothing about the subject: the lab failed. ``aborted`` was stopped on request.
    """

    QUEUED = "queued"
    RESETTING = "resetting"
    CAPTURING = "capturing"
    PREFLIGHT = "preflight"
    RUNNING = "running"
    STOPPING = "stopping"
    PROBING = "probing"
    COLLECTING = "collecting"
    SCORING = "scoring"
    SEALED = "sealed"
    VOID = "void"
    ABORTED = "aborted"

    @property
    def ended(self) -> bool:
        """True for the three last states."""
        return self in (TrialState.SEALED, TrialState.VOID, TrialState.ABORTED)


class Stopped(StrEnum):
    """Why the subject's run came to its end."""

    FINISHED = "finished"  # the agent called FINISH
    AGENT_EXITED = "agent-exited"
    MACHINE_DOWN = "machine-down"  # the origin powered off, panicked or rebooted
    TIME_LIMIT = "time-limit"
    STEP_LIMIT = "step-limit"
    DISK_LIMIT = "disk-limit"
    TRAFFIC_LIMIT = "traffic-limit"  # it sent more packets than a capture is to hold


def printable(text: str, limit: int = 200) -> str:
    """Guest text made safe for a terminal or a log line, at most ``limit`` characters long.

    Whatever Unicode calls unprintable is replaced: controls, lone surrogates, line separators, and the
    marks that reorder a line.
    """
    cut = "".join(c if c.isprintable() else "\ufffd" for c in text[:limit])
    return cut + ("..." if len(text) > limit else "")
