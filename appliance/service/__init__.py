"""What the laboratory offers, as one protocol and the values that cross it.

The control plane and the command line depend on this package only; ``pipeline`` implements it. All calls
block and may come from any thread. Times of day are Unix seconds of the host, durations seconds, sizes
bytes, unless the field says otherwise.
"""

from appliance.service.protocol import LabService
from appliance.service.requests import (
    MAX_EXEC_OUTPUT,
    MAX_EXEC_S,
    MAX_SEED,
    Argument,
    CellRequest,
    Key,
    LimitOverrides,
    TrialRequest,
)
from appliance.service.views import (
    BaselineDetail,
    BaselineFile,
    BaselineKind,
    BaselineView,
    CellView,
    ExecView,
    ExportView,
    FootprintView,
    HealthView,
    ImageView,
    KillView,
    MachineView,
    ProbeView,
    ResetView,
    SealView,
    Stray,
    SweepView,
    TransferView,
    TrialPage,
    TrialView,
)

__all__ = [
    "MAX_EXEC_OUTPUT",
    "MAX_EXEC_S",
    "MAX_SEED",
    "Argument",
    "BaselineDetail",
    "BaselineFile",
    "BaselineKind",
    "BaselineView",
    "CellRequest",
    "CellView",
    "ExecView",
    "ExportView",
    "FootprintView",
    "HealthView",
    "ImageView",
    "Key",
    "KillView",
    "LabService",
    "LimitOverrides",
    "MachineView",
    "ProbeView",
    "ResetView",
    "SealView",
    "Stray",
    "SweepView",
    "TransferView",
    "TrialPage",
    "TrialRequest",
    "TrialView",
]
