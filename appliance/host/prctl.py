"""The one call of prctl(2), which Python does not offer."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from appliance.errors import HostError

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36  # Linux 3.4


def prctl(option: int, value: int) -> None:
    """Set one property of this process.

    Raises:
        HostError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise HostError(f"prctl failed: {os.strerror(ctypes.get_errno())}")
