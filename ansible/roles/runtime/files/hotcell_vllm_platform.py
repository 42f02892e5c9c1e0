"""The platform class; a module of its own, since vLLM must be imported before it can be named."""

from __future__ import annotations

import os
import socket
import stat
from typing import Any

from vllm.platforms.cpu import CpuPlatform


class ForkingCpuPlatform(CpuPlatform):
    """vLLM's CPU platform with one setting changed."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Let the CPU platform decide everything, then ask for "fork" where it asked for "spawn"."""
        super().check_and_update_config(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"


def _serves(fd: int) -> bool:
    """True for a TCP socket that is bound and not connected: the one the API server listens on."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as s:
        if s.family not in (socket.AF_INET, socket.AF_INET6) or s.type != socket.SOCK_STREAM:
            return False
        try:
            s.getpeername()
        except OSError:
            return s.getsockname()[1] != 0
        return False


def _leave_port_to_parent() -> None:
    """In the forked process: hold no share of the API server's port, as a spawned one would hold none.

    The number stays taken, by /dev/null, so that no other file can come under it.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers are wanted
        try:
            if _serves(int(name)):
                os.dup2(null, int(name), inheritable=False)
        except OSError:
            continue
    os.close(null)


os.register_at_fork(after_in_child=_leave_port_to_parent)
