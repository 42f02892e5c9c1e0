"""Lets a campaign move the clock of one server: Python imports this module by its name before any other.

A wall clock has no namespace, and the host's belongs to everybody. So only ``time.time`` of this process is
moved, by the seconds that the file named in the environment holds; guests, children and file times are not.
"""

import os
import time
from pathlib import Path

_file = Path(os.environ["HOTCELL_TORTURE_CLOCK"])
_real = time.time


def _moved() -> float:
    try:
        return _real() + float(_file.read_text() or 0)
    except (OSError, ValueError):
        return _real()


time.time = _moved
