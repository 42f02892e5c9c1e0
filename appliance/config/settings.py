"""Settings of one host (``hotcell.toml``): *where* things run. What is run lies in the library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from appliance.config.reading import read_toml, validate
from appliance.config.specs import TrialLimits
from appliance.errors import ConfigError
from appliance.model import Frozen

ENVIRONMENT = "HOTCELL_CONFIG"
DEFAULT_FILE = Path("/etc/hotcell/hotcell.toml")


def _existing_file(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("an absolute path")
    if not path.is_file():
        raise ValueError("the path of an existing file")
    return path


def _absolute(path: Path) -> Path:
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError("an absolute path without `..`")
    return path


def _existing_folder(path: Path) -> Path:
    if not path.is_absolute() or not path.is_dir():
        raise ValueError("the absolute path of a folder that exists")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
ExistingFile = Annotated[Path, AfterValidator(_existing_file)]
ExistingFolder = Annotated[Path, AfterValidator(_existing_folder)]


class ApiSettings(Frozen):
    """Where the control plane listens."""

    host: str = Field("127.0.0.1", min_length=1, max_length=253, description="address to listen on")
    port: int = Field(7077, ge=0, le=65_535, description="TCP port; 0 takes any free one")


class LibvirtSettings(Frozen):
    """How machines are driven."""

    connection: Literal["embed"] = Field(
        "embed", description="`embed`: libvirt inside our own process, no daemon"
    )


class GuestSettings(Frozen):
    """Size of the machines. Memory in MiB."""

    model_memory_mib: int = Field(
        3584, ge=2048, le=4_194_304, description="memory of the origin and each target"
    )
    world_memory_mib: int = Field(384, ge=128, le=65_536, description="memory of the world")
    vcpus: int = Field(2, ge=1, le=256, description="virtual CPUs of a machine")
    headroom_mib: int = Field(
        1024, ge=256, le=1_048_576, description="host memory that is never given to guests"
    )
    disk_floor_mib: int = Field(
        2048, ge=64, le=1_073_741_824, description="disk that is never given to guests' overlays"
    )
    cpu_overcommit: float = Field(
        2.0, ge=0.1, le=64, description="virtual CPUs of all machines together, per core of the host"
    )
    max_trials: int = Field(16, ge=1, le=256, description="trials at once; capacity may allow fewer")


class BaselineSettings(Frozen):
    """Where saved machines lie. Below the home, unless told otherwise."""

    memory_dir: AbsolutePath | None = Field(
        None, description="folder on a tmpfs for RAM files; a reboot loses them, and they are made anew"
    )


class BuildSettings(Frozen):
    """Overrides for image building. Unset means the host's own; pip is set up by its own configuration."""

    apt_sources: ExistingFile | None = Field(None, description="apt sources file (deb822) to build from")


class HostSettings(Frozen):
    """Everything in ``hotcell.toml``; every key is optional."""

    accelerator: Literal["auto", "kvm", "tcg"] = Field(
        "auto", description="`auto` boots a micro guest under KVM and falls back to TCG (software)"
    )
    library_dirs: tuple[ExistingFolder, ...] = Field(
        (), max_length=16, description="absolute paths of folders with subjects, scenarios, policies"
    )
    api: ApiSettings = ApiSettings()
    libvirt: LibvirtSettings = LibvirtSettings()
    guests: GuestSettings = GuestSettings()
    baselines: BaselineSettings = BaselineSettings()
    limits: TrialLimits = TrialLimits()
    build: BuildSettings = BuildSettings()


def find_settings_file() -> Path | None:
    """``$HOTCELL_CONFIG`` if set, else /etc/hotcell/hotcell.toml if it exists, else None."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    return DEFAULT_FILE if DEFAULT_FILE.is_file() else None


def load_host_settings(path: Path | None = None) -> HostSettings:
    """Settings from ``path``, else from :func:`find_settings_file`, else the defaults.

    Raises:
        ConfigError: a file that was named does not exist, or a key or value in it is wrong.
    """
    file = path or find_settings_file()
    if file is None:
        return HostSettings()
    if not file.is_file():
        named = f"named by {ENVIRONMENT}" if path is None else "named on the command line"
        raise ConfigError(
            f"{file}: no such file ({named})", hint="leave it out to use the defaults", file=str(file)
        )
    return validate(HostSettings, read_toml(file), file)
