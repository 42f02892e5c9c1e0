"""Build, find, list, verify and prune images. Building needs root and a network; nothing else here does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from appliance.build.inputs import Inputs, Project, collect
from appliance.build.make import BuildOptions, Maker, Progress, sealed_image
from appliance.build.manifest import Image, read_manifest, sha256_file
from appliance.build.recipe import Recipe, chain, check_roles
from appliance.build.recipe import list_recipes as recipes_below
from appliance.build.workspace import building_lock, remove
from appliance.errors import BuildError, PrerequisiteError
from appliance.host import command
from appliance.host.paths import PROJECT, Paths

_DEFAULTS = BuildOptions()
_TOOLS = (("mmdebstrap", "mmdebstrap"), ("mkfs.ext4", "e2fsprogs"), ("qemu-img", "qemu-utils"))


def _silent(stage: str, detail: str, fraction: float | None) -> None:
    del stage, detail, fraction


def list_recipes(project: Path = PROJECT) -> tuple[str, ...]:
    """Names of all recipes, sorted."""
    return recipes_below(Project(project).images)


def _resolve(name: str, project: Project) -> tuple[tuple[Recipe, ...], Inputs]:
    recipes = chain(project.images, name)
    check_roles(recipes, project.ansible)
    return recipes, collect(project, recipes)


def find_image(name: str, paths: Paths, project: Path = PROJECT) -> Image | None:
    """The sealed image that today's inputs give, if it has been built.

    Raises:
        NotFoundError, ConfigError: the recipe does not exist or is wrong.
    """
    _, inputs = _resolve(name, Project(project))
    return sealed_image(name, inputs.digest, paths)


def list_images(paths: Paths) -> tuple[Image, ...]:
    """All sealed images of the cache, by recipe and then by time, the newest first. Damaged ones are left out."""
    found = []
    for folder in paths.images.glob("*/"):
        try:
            record = read_manifest(folder)
        except BuildError:
            continue
        found.append((record.recipe, -record.built, Image(record.recipe, record.digest, folder)))
    return tuple(image for _, _, image in sorted(found, key=lambda f: f[:2]))


def verify_image(image: Image) -> None:
    """Hash every file of the image again.

    Raises:
        BuildError: a file is missing or is not what the manifest says.
    """
    for expected in image.record.files:
        path = image.folder / expected.name
        found = sha256_file(path) if path.is_file() else "nothing"
        if found != expected.sha256:
            raise BuildError(
                f"{path}: expected {expected.sha256}, found {found}",
                hint=f"remove {image.folder} and run `hotcell build {image.recipe}`",
                image=image.digest,
            )


def build_image(
    name: str, paths: Paths, progress: Progress = _silent, *, options: BuildOptions = _DEFAULTS
) -> Image:
    """The sealed image of a recipe: found if nothing changed, else built.

    Raises:
        NotFoundError, ConfigError: the recipe does not exist or is wrong.
        HostError: root, a program or disk space is missing.
        BuildError: a step failed; nothing is left under a final name.
    """
    project = Project(options.project)
    recipes, inputs = _resolve(name, project)
    found = sealed_image(name, inputs.digest, paths)
    if found is not None and not options.force:
        progress("done", f"{name} is up to date", 1.0)
        return found
    if os.geteuid() != 0:
        raise PrerequisiteError("building an image needs root", hint="run `hotcell build` as root")
    for program, package in _TOOLS:
        command.require(program, package)
    try:
        with building_lock(paths.building, wait_s=options.wait_s):
            recipes, inputs = _resolve(name, project)  # they may have changed while we waited
            return Maker(paths, project, progress, options).image(recipes, inputs)
    except OSError as e:
        raise BuildError(f"building {name}: {e}", hint=_os_hint(e)) from e


def _os_hint(error: OSError) -> str:
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    return (
        "free some disk space in the cache's file system, then build again" if full else "see the build log"
    )


def _in_use() -> frozenset[str]:
    """Digests of images whose disk some process holds open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = link.readlink()
        except OSError:
            continue
        if target.name == "disk.qcow2":
            found.add(target.parent.name)
    return frozenset(found)


def prune_images(paths: Paths, keep: frozenset[str] = frozenset(), per_recipe: int = 1) -> tuple[Image, ...]:
    """Remove all but the newest ``per_recipe`` images of each recipe; returns what was removed.

    An image that a process holds open stays, and so does one whose digest is in ``keep`` (those that a saved
    baseline stands on).
    """
    spared = keep | _in_use()
    removed = []
    seen: dict[str, int] = {}
    with building_lock(paths.building, wait_s=0):
        for image in list_images(paths):
            seen[image.recipe] = seen.get(image.recipe, 0) + 1
            if seen[image.recipe] > per_recipe and image.digest not in spared:
                remove(image.folder)
                removed.append(image)
    return tuple(removed)
