"""A process, and a network namespace, of a test's own: its body runs in a forked child.

Root gets a namespace directly, anyone else by way of a user namespace. Where neither works the test fails: a
test that is silently skipped shows nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from pyroute2 import IPRoute

_NEWUSER, _NEWNET = 0x10000000, 0x40000000


def leave() -> None:
    """Into a new, empty network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNET if os.geteuid() == 0 else _NEWUSER | _NEWNET) != 0:
        raise PermissionError(
            f"no network namespace: {os.strerror(ctypes.get_errno())}; run the tests as root"
        )


def in_child(body: Callable[..., None], prepare: Callable[[], None] = lambda: None) -> Callable[..., None]:
    """Run a test's body in a forked child after ``prepare``; its failure is the test's."""

    @functools.wraps(body)
    def run(*args: Any, **fixtures: Any) -> None:
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                prepare()
                body(*args, **fixtures)
                status = 0
            except BaseException:  # noqa: BLE001 - told to the parent
                os.write(writable, traceback.format_exc().encode()[-60_000:])
            finally:
                os._exit(status)
        os.close(writable)
        with os.fdopen(readable, "rb") as f:
            said = f.read().decode()
        _, status = os.waitpid(child, 0)
        if status != 0:
            pytest.fail(said or f"the child ended with status {status}")

    return run


def in_namespace(body: Callable[..., None]) -> Callable[..., None]:
    """Run a test's body in a child in a network namespace of its own."""
    return in_child(body, leave)


def add_tap(name: str) -> None:
    """A persistent tap, as libvirt makes one for a machine."""
    with IPRoute() as ip:
        ip.link("add", ifname=name, kind="tuntap", mode="tap")


def master_of(name: str) -> str | None:
    """The bridge that a link is plugged into; None if it is in none or there is no such link."""
    with IPRoute() as ip:
        found = ip.link_lookup(ifname=name)
        index = ip.get_links(found[0])[0].get_attr("IFLA_MASTER") if found else None
        return str(ip.get_links(index)[0].get_attr("IFLA_IFNAME")) if index else None
