"""Processes that look like QEMUs: their name and their arguments are, and they only sleep."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

_CODE = "import time; time.sleep(60)"


def look_alike(*arguments: str, name: str = "qemu-system-x86_64") -> subprocess.Popen[bytes]:
    """Start one, and return once its command line can be read: the kernel shows it a moment after exec."""
    process = subprocess.Popen([name, "-c", _CODE, *arguments], executable=sys.executable)
    wanted = os.fsencode(arguments[-1])
    end = time.monotonic() + 20
    while wanted not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.005)
    return process
