"""The only place that joins the stages: a sealed process, its laboratory, one trial through all of them.

Heavy imports happen inside the functions, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.pipeline.process import local_sweep, seal_process

if TYPE_CHECKING:
    from appliance.config import HostSettings
    from appliance.host.paths import Paths
    from appliance.pipeline.lab import Lab

__all__ = ["local_sweep", "open_lab", "seal_process"]


def open_lab(paths: Paths, settings: HostSettings) -> Lab:
    """Open the laboratory of one home in this sealed process.

    Reconciles first: what an earlier process left is swept, and its open trials are sealed as void.

    Raises:
        SealError: the process is not sealed.
        ConflictError: another process runs machines in this home.
        PrerequisiteError: no accelerator runs a guest.
    """
    from appliance.pipeline.opening import open_laboratory

    return open_laboratory(paths, settings)
