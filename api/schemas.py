"""Bodies and parameters that exist only on the wire; everything else is in ``appliance.service``."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path as PathParameter
from pydantic import Field

from appliance.model import NAME_PATTERN, TRIAL_ID_PATTERN, Frozen, Name
from appliance.service import MAX_EXEC_S, Argument

CellParameter = Annotated[str, PathParameter(pattern=NAME_PATTERN, description="Cell.", examples=["lab"])]
MachineParameter = Annotated[
    str, PathParameter(pattern=NAME_PATTERN, description="Machine in that cell.", examples=["target-1"])
]
TrialParameter = Annotated[
    str, PathParameter(pattern=TRIAL_ID_PATTERN, description="Trial.", examples=["t20250102-030405-0a1b2c"])
]
Seq = Annotated[int, Field(ge=0, le=2**31)]


class ExecRequest(Frozen):
    """A command for a guest, as an argument list; no shell is added."""

    argv: tuple[Argument, ...] = Field(min_length=1, max_length=64)
    timeout_s: float = Field(default=30.0, gt=0, le=MAX_EXEC_S)


class SnapshotRequest(Frozen):
    """The name of a new baseline."""

    name: Name


class KillRequest(Frozen):
    """Why the switch is thrown; it goes into the journals."""

    reason: str = Field(default="asked for over the API", min_length=1, max_length=200)


class SweepRequest(Frozen):
    """Whether strays are only listed."""

    dry_run: bool = True
