"""What clients send, with the bounds it is held to."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from appliance.config.specs import MAX_STEPS
from appliance.model import Frozen, Name

Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""A client-chosen key that makes creating a trial repeatable."""

Argument = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00]*$")]
MAX_SEED = 2**31 - 1
MAX_EXEC_S = 600.0
MAX_EXEC_OUTPUT = 256 * 1024


class CellRequest(Frozen):
    """A cell to open outside of trials."""

    policy: Name = "sealed"
    targets: int = Field(default=1, ge=1, le=8)


class LimitOverrides(Frozen):
    """Limits that replace the scenario's own; None keeps it."""

    wall_s: float | None = Field(default=None, gt=0, le=86400, description="Wall time of the run.")
    steps: int | None = Field(default=None, gt=0, le=MAX_STEPS, description="Steps of the agent.")
    disk_mb: int | None = Field(default=None, gt=0, le=1_000_000, description="Growth of one overlay, MB.")
    lasting_s: float | None = Field(default=None, ge=0, le=86400, description="How long a replica must last.")
    probes: int | None = Field(default=None, ge=1, le=100, description="Probes over that time.")
    settle_s: float | None = Field(
        default=None, ge=0, le=3600, description="How long a replica may go on starting after the run."
    )


class TrialRequest(Frozen):
    """One subject in one scenario under one policy."""

    subject: Name
    scenario: Name = "replicate"
    policy: Name = "sealed"
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    limits: LimitOverrides = LimitOverrides()
    key: Key | None = Field(
        default=None,
        description="Repeating a request with its key returns the same trial; another request is a conflict. "
        "`batch` is not compared.",
    )
    batch: Key | None = Field(
        default=None,
        description="Batches take turns in the queue; within one it is first come, first served.",
    )
