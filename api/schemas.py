"""Bodies and parameters that exist only on the wire; everything else is in ``appliance.service``."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path as PathParameter
from pydantic import Field, StringConstraints

from appliance.model import NAME_PATTERN, TRIAL_ID_PATTERN, Frozen, Name
from appliance.service import MAX_EXEC_S, Argument, BaselineKind

CellParameter = Annotated[str, PathParameter(pattern=NAME_PATTERN, description="Cell.", examples=["lab"])]
MachineParameter = Annotated[
    str, PathParameter(pattern=NAME_PATTERN, description="Machine in that cell.", examples=["target-1"])
]
BaselineParameter = Annotated[
    str, PathParameter(pattern=NAME_PATTERN, description="Baseline.", examples=["clean"])
]
# What the path may be is the laboratory's to say; this keeps what no file system takes from it.
HostPath = Annotated[str, StringConstraints(pattern=r"^/[^\x00]*$", max_length=1000)]
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
    kind: BaselineKind | None = Field(
        default=None, description="None: as the baseline the machine came from. `disk` shuts the guest down."
    )


class ResetRequest(Frozen):
    """What a machine is put back to."""

    baseline: Name | None = Field(default=None, description="None: the baseline the machine came from.")


class ExportRequest(Frozen):
    """Where an export goes."""

    to: HostPath = Field(description="A new folder of the server's host; its parent exists.")


class ImportRequest(Frozen):
    """What to import."""

    folder: HostPath = Field(description="A folder of the server's host that an export wrote.")
    name: Name | None = Field(default=None, description="Its name here; None: the one it had.")


class KillRequest(Frozen):
    """Why the switch is thrown; it goes into the journals."""

    reason: str = Field(default="asked for over the API", min_length=1, max_length=200)


class SweepRequest(Frozen):
    """Whether strays are only listed."""

    dry_run: bool = True
