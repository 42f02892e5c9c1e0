"""Take a bundle home. What arrives is unpacked by hand: plain files below one folder, nothing else."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from appliance.cli.common import Trial, out
from appliance.cli.reading import reader, trial_id
from appliance.errors import ConfigError, EvidenceError


def bundle(
    ctx: typer.Context,
    trial: Trial,
    to: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Directory to put TRIAL/ into, or a new file ending in .tar. Default: here."
        ),
    ] = None,
) -> None:
    """Take a trial's sealed evidence home.

    Prints where it is now; `hotcell verify` checks that directory.
    """
    source = reader(ctx)
    name = trial_id(source, trial)
    target = _target(to, name)
    if target.suffix == ".tar":
        source.fetch(name, target)
    else:
        with TemporaryDirectory(dir=target.parent, prefix=".hotcell-") as scratch:
            archive = Path(scratch) / "bundle.tar"
            source.fetch(name, archive)
            unpack(archive, name, Path(scratch) / "bundle")
            (Path(scratch) / "bundle").rename(target)
    out(str(target))


def _target(to: Path | None, trial: str) -> Path:
    """The file or directory to make. A directory keeps the trial's name, by which its seal is checked."""
    place = (to or Path()).absolute()
    target = place if place.suffix == ".tar" else place / trial
    if target.exists():
        raise ConfigError(f"{target} exists", hint="choose another --out; nothing is overwritten")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a directory", hint="make it, or choose another --out")
    return target


def unpack(archive: Path, prefix: str, target: Path) -> None:
    """Unpack the files below ``prefix/`` into the new directory ``target``.

    ``tarfile``'s own safe filter came with Python 3.11.4; Debian 12 has 3.11.2.

    Raises:
        EvidenceError: a member is neither file nor directory, lies elsewhere, or the archive is damaged.
    """
    target.mkdir()
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                place = _place(member, prefix, target)
                if member.isdir():
                    place.mkdir(exist_ok=True)
                    continue
                content = tar.extractfile(member)
                if content is None:
                    raise EvidenceError(f"the archive holds {member.name!a}, which is no plain file")
                with place.open("xb") as f:
                    shutil.copyfileobj(content, f)
    except (tarfile.TarError, OSError) as e:
        raise EvidenceError(f"the archive cannot be unpacked: {e}", hint="download it again") from e


def _place(member: tarfile.TarInfo, prefix: str, target: Path) -> Path:
    first, *rest = member.name.split("/")
    plain = member.isreg() or member.isdir()
    if not plain or first != prefix or any(part in ("", ".", "..") for part in rest) or "\0" in member.name:
        raise EvidenceError(f"the archive holds {member.name!a}, which no bundle has", hint="do not trust it")
    return target.joinpath(*rest)
