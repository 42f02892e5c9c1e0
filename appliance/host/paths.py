"""Where everything lies. No other module builds a path from a literal.

State (``HOTCELL_HOME``, default /var/lib/hotcell) is what trials leave; the cache
(``HOTCELL_CACHE``, default ``$XDG_CACHE_HOME/hotcell``) can be deleted at any time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[2]
# A unix socket path holds 107 characters; libvirt appends up to 60 below its root.
_MAX_HOME = 46


@dataclass(frozen=True)
class Paths:
    """Every directory and well-known file, from two roots."""

    home: Path
    cache: Path

    @property
    def images(self) -> Path:
        """Sealed images, one folder a digest: ``DIGEST/{disk.qcow2,vmlinuz,initrd.img,manifest.json}``."""
        return self.cache / "images"

    @property
    def wheels(self) -> Path:
        """Downloaded Python packages of recipes, verified by hash against their locks."""
        return self.cache / "wheels"

    @property
    def building(self) -> Path:
        """Half-built images; anything here that no live process owns is removed by the next build."""
        return self.cache / "building"

    @property
    def libvirt(self) -> Path:
        """Root of the embedded libvirt driver."""
        return self.home / "libvirt"

    @property
    def domain_pids(self) -> Path:
        """Where libvirt keeps ``DOMAIN.pid`` of each running QEMU."""
        return self.libvirt / "run" / "qemu"

    @property
    def cells(self) -> Path:
        """Overlays and sockets of running machines, one folder a cell."""
        return self.home / "cells"

    @property
    def baselines(self) -> Path:
        """Saved, proved machine states."""
        return self.home / "baselines"

    @property
    def bundles(self) -> Path:
        """Sealed evidence, one folder a trial."""
        return self.home / "bundles"

    @property
    def open_trials(self) -> Path:
        """Evidence of trials that are not sealed yet."""
        return self.home / "open"

    @property
    def database(self) -> Path:
        """The index; can be rebuilt from the bundles."""
        return self.home / "hotcell.db"

    @property
    def ledger(self) -> Path:
        """What exists on the host because of us."""
        return self.home / "ledger.db"

    @property
    def token(self) -> Path:
        """The API token, mode 0600."""
        return self.home / "token"

    @property
    def signing_key(self) -> Path:
        """The Ed25519 key that seals bundles, mode 0600; its public half lies beside it as ``.pub``."""
        return self.home / "signing-key"

    @property
    def ssh_key(self) -> Path:
        """The key pair that lets an origin into its targets; the public half lies beside it as ``.pub``."""
        return self.home / "ssh-key"

    @property
    def api_socket(self) -> Path:
        """The control plane's unix socket."""
        return self.home / "api.sock"

    @property
    def server_file(self) -> Path:
        """JSON of the running server: pid, start time, address. Present only while it runs."""
        return self.home / "server.json"

    @property
    def server_log(self) -> Path:
        """What a server that the command line started says; one that a user starts says it on stderr."""
        return self.home / "server.log"

    @property
    def warden_log(self) -> Path:
        """Why the warden cut, if it did."""
        return self.home / "warden.log"

    def make(self) -> Paths:
        """Create the directories (0700) and return self."""
        for d in (
            self.home,
            self.cache,
            self.images,
            self.wheels,
            self.building,
            self.libvirt,
            self.cells,
            self.baselines,
            self.bundles,
            self.open_trials,
        ):
            d.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self


def default_paths(home: Path | None = None, cache: Path | None = None) -> Paths:
    """Paths from arguments, else environment, else the defaults. A variable that is empty counts as unset.

    A relative ``XDG_CACHE_HOME`` is ignored, as the XDG base directory specification wants it.

    Raises:
        ConfigError: the home path is too long for unix sockets below it.
    """
    h = (home or Path(os.environ.get("HOTCELL_HOME") or "/var/lib/hotcell")).absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    caches = xdg if xdg.is_absolute() else Path.home() / ".cache"
    c = (cache or Path(os.environ.get("HOTCELL_CACHE") or caches / "hotcell")).absolute()
    if len(os.fspath(h)) > _MAX_HOME:
        raise ConfigError(
            f"home path is {len(os.fspath(h))} characters long, at most {_MAX_HOME} are allowed: {h}",
            hint="unix socket paths are short; choose a shorter --home or HOTCELL_HOME",
        )
    return Paths(h, c)
