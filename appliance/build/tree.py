"""The root tree: mmdebstrap from the host's archives, and the mounts a chroot needs while it is configured."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from appliance.build.sources import Source
from appliance.build.workspace import Workspace, run_logged, unmount_below
from appliance.host import command

# In every image: what boots, what the cell talks to, and what an ordinary small server has.
COMMON_PACKAGES = (
    "ca-certificates", "curl", "dbus", "e2fsprogs", "initramfs-tools", "iproute2", "iputils-ping", "kmod",
    "linux-image-cloud-amd64", "openssh-client", "openssh-server", "procps", "python3", "qemu-guest-agent",
    "rsync", "systemd", "systemd-sysv", "udev", "zstd",
)  # fmt: skip
# Nothing in a guest reads documentation; 60 MB less to copy, pack and boot from.
_LEFT_OUT = (
    "/usr/share/man/*",
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
)
_APT_KEPT = re.compile(
    r"^(Acquire::(?:https?|ftp)::(?:Proxy|Timeout|CAInfo|Verify-Peer)[^ ]*|Acquire::Check-(?:Valid-Until|Date)"
    r'|Acquire::Retries) "(.*)";$'
)
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def apt_options(dump: str) -> tuple[str, ...]:
    """Options about reaching archives (proxy, certificates, clock) from the text of ``apt-config dump``."""
    found = (_APT_KEPT.match(line.strip()) for line in dump.splitlines())
    return tuple(f'{m[1]} "{m[2]}"' for m in found if m and m[2])


def argv(root: Path, suite: str, packages: Sequence[str], sources: Path, options: Sequence[str]) -> list[str]:
    """The mmdebstrap call."""
    line = ["mmdebstrap", "--variant=minbase", "--mode=root", "--format=directory", "--architectures=amd64"]
    line.append("--include=" + ",".join(packages))
    line += [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    line += ["--dpkgopt=force-unsafe-io", *(f"--aptopt={o}" for o in options)]
    # The initial ramdisk only ever meets virtio; a list instead of "most" makes it small and its build short.
    line.append(
        '--essential-hook=mkdir -p "$1/etc/initramfs-tools/conf.d" && printf '
        '"MODULES=list\\nCOMPRESS=zstd\\nRESUME=none\\nFSTYPE=ext4\\n" '
        '> "$1/etc/initramfs-tools/conf.d/hotcell" && '
        'printf "virtio_pci\\nvirtio_blk\\nvirtio_net\\nvirtio_console\\nvirtio_rng\\next4\\n" '
        '> "$1/etc/initramfs-tools/modules"'
    )
    return [*line, suite, os.fspath(root), os.fspath(sources)]


def make_tree(workspace: Workspace, suite: str, packages: Sequence[str], archives: Sequence[Source]) -> None:
    """Install a Debian root tree into the workspace.

    Raises:
        BuildError: mmdebstrap failed.
        CommandError: it is not installed.
    """
    command.require("mmdebstrap", "mmdebstrap")
    sources = workspace.folder / "host.sources"
    sources.write_text("\n".join(s.stanza() for s in archives), encoding="utf-8")
    dump = command.run(["apt-config", "dump"], timeout=30).stdout
    proxies = {k: os.environ[k] for k in _PROXIES if k in os.environ}
    call = argv(workspace.root, suite, sorted({*COMMON_PACKAGES, *packages}), sources, apt_options(dump))
    run_logged(workspace, [*call], timeout=1800, what="making the root tree", env=proxies)


@contextmanager
def mounted(root: Path, binds: dict[str, Path]) -> Iterator[None]:
    """The mounts for work inside a tree, undone at the end whatever happens.

    No device directory of the host is bound: the tree's own nodes suffice, and a stray removal could not hurt.
    ``binds`` maps a path in the tree to a host directory, shown read-only.
    """
    try:
        for kind, at, options in (
            ("proc", "proc", "nosuid,noexec,nodev"),
            ("sysfs", "sys", "ro,nosuid,noexec,nodev"),
            ("tmpfs", "dev/shm", "nosuid,nodev"),
            ("tmpfs", "tmp", "nosuid,nodev,mode=1777"),
            ("tmpfs", "run", "nosuid,nodev,mode=755"),
        ):
            (root / at).mkdir(parents=True, exist_ok=True)
            command.run(["mount", "-t", kind, "-o", options, f"hotcell-{kind}", root / at], timeout=30)
        for inside, outside in binds.items():
            at_path = root / inside.lstrip("/")
            at_path.mkdir(parents=True, exist_ok=True)
            command.run(["mount", "--bind", outside, at_path], timeout=30)
            command.run(["mount", "-o", "remount,bind,ro", at_path], timeout=30)
        yield
    finally:
        unmount_below(root)
