"""How one image is made: tree, configuration, disk, seal, with the stage boundaries at which it can go on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.build import wheels
from appliance.build.configure import configure
from appliance.build.inputs import Inputs, Project, collect, files_below, lock_file
from appliance.build.manifest import (
    DISK,
    INITRD,
    KERNEL,
    LOG,
    MANIFEST,
    Image,
    ImageFile,
    Manifest,
    describe,
    write_manifest,
)
from appliance.build.pack import debian_packages, need_space, pack, python_packages
from appliance.build.recipe import Recipe, bases
from appliance.build.sources import Source, host_sources, parse, select
from appliance.build.tree import make_tree, mounted
from appliance.build.workspace import (
    CONFIGURED,
    TREE,
    Workspace,
    end_processes_of,
    open_workspace,
    remove,
    unmount_below,
)
from appliance.errors import BuildError, ConfigError
from appliance.host import command
from appliance.host.paths import PROJECT, Paths

Progress = Callable[[str, str, float | None], None]
_PYTHON = "3.11"  # of Debian 12
_GIB = 1 << 30
_SOURCE_DATE = 1_700_000_000  # Unix seconds; time stamps of the file system itself, the same for every build
_WEIGHTS = "home/subject/system/weights"
_AGENT = "home/subject/system"


@dataclass(frozen=True)
class BuildOptions:
    """What a user may override.

    ``apt_sources`` replaces the host's apt sources (text in deb822 format); ``force`` builds even if the image
    exists; ``wait_s`` is how long to wait for another build to end, in seconds.
    """

    apt_sources: str = ""
    force: bool = False
    wait_s: float = 3600.0
    project: Path = field(default=PROJECT)


def sealed_image(name: str, digest: str, paths: Paths) -> Image | None:
    """The image of that digest, if it lies sealed in the cache."""
    folder = paths.images / digest
    return Image(name, digest, folder) if (folder / MANIFEST).is_file() else None


@dataclass
class Maker:
    """One run of the build, under the lock."""

    paths: Paths
    project: Project
    progress: Progress
    options: BuildOptions
    stages: dict[str, float] = field(default_factory=dict)

    def image(self, recipes: tuple[Recipe, ...], inputs: Inputs) -> Image:
        """Build the last recipe, its base first; returns the sealed image."""
        recipe = recipes[-1]
        base_tree: Path | None = None
        if len(recipes) > 1:
            base_inputs = collect(self.project, recipes[:-1])
            base_tree = self._trees / base_inputs.digest
            if not base_tree.is_dir():
                Maker(self.paths, self.project, self.progress, self.options).image(recipes[:-1], base_inputs)
        sealed = sealed_image(recipe.name, inputs.digest, self.paths)
        if sealed is not None and not self.options.force and not self._is_base(recipe):
            return sealed
        need_space(
            self.paths.cache, 6 * _GIB if recipe.lock or base_tree else 2 * _GIB, f"building {recipe.name}"
        )
        workspace = open_workspace(self.paths.building, inputs.digest)
        try:
            if workspace.reached() != CONFIGURED:
                self._tree(workspace, recipes, base_tree)
                self._configure(workspace, recipe)
            if sealed is None or self.options.force:
                self._pack(workspace, recipes, inputs)
            self._keep_tree(workspace, recipe, inputs.digest)
        except BaseException:
            _leave_tidy(workspace)
            raise
        self._stage(recipe, "done", "sealed", 1.0)
        return Image(recipe.name, inputs.digest, self.paths.images / inputs.digest)

    @property
    def _trees(self) -> Path:
        return self.paths.cache / "trees"

    def _is_base(self, recipe: Recipe) -> bool:
        return recipe.name in bases(self.project.images)

    def _stage(self, recipe: Recipe, stage: str, detail: str, fraction: float | None = None) -> None:
        self.progress(stage, f"{recipe.name}: {detail}" if detail else recipe.name, fraction)

    def _tree(self, workspace: Workspace, recipes: tuple[Recipe, ...], base: Path | None) -> None:
        recipe = recipes[-1]
        if workspace.reached() == TREE:
            return
        began = time.monotonic()
        remove(workspace.root)
        if base is not None:
            self._stage(recipe, "tree", f"copying the tree of {recipes[-2].name}")
            command.run(["cp", "--archive", "--reflink=auto", base, workspace.root], timeout=900)
        else:
            self._stage(recipe, "tree", f"installing Debian {recipe.suite}")
            make_tree(workspace, recipe.suite, recipe.packages, self._archives(recipe.suite))
        workspace.mark(TREE)
        self.stages["tree"] = round(time.monotonic() - began, 1)

    def _archives(self, suite: str) -> tuple[Source, ...]:
        text = self.options.apt_sources
        return select(parse("override.sources", text) if text else host_sources(), suite)

    def _configure(self, workspace: Workspace, recipe: Recipe) -> None:
        lock = lock_file(self.project.images, recipe)
        binds = {}
        variables: dict[str, Any] = {**recipe.vars, "image_name": recipe.name, "image_roles": [*recipe.roles]}
        if lock is not None:
            began = time.monotonic()
            self._stage(recipe, "packages", "looking for Python packages")
            wheels.fetch(lock, self.paths.wheels, workspace.folder, _PYTHON,
                         lambda text, f: self._stage(recipe, "packages", text, f))  # fmt: skip
            binds["/run/wheels"] = self.paths.wheels
            variables["runtime_lock"] = os.fspath(lock)
            self.stages["packages"] = round(time.monotonic() - began, 1)
        if recipe.agent:
            if not (self.project.agent / "__init__.py").is_file():
                raise ConfigError(
                    f"{recipe.name}: agent: there is no package at {self.project.agent}",
                    hint="restore the folder agent/, or set agent = false in the recipe",
                )
            binds["/run/agent"] = self.project.agent
        began = time.monotonic()
        self._stage(recipe, "configure", "Ansible")
        workspace.mark("")  # in flux from here on
        with mounted(workspace.root, binds):
            slow = configure(workspace, self.project.ansible, variables,
                             lambda task: self._stage(recipe, "configure", task))  # fmt: skip
        workspace.mark(CONFIGURED)
        self.stages["configure"] = round(time.monotonic() - began, 1)
        self.stages |= {f"configure: {task}": seconds for task, seconds in slow.items()}

    def _pack(self, workspace: Workspace, recipes: tuple[Recipe, ...], inputs: Inputs) -> None:
        recipe = recipes[-1]
        began = time.monotonic()
        self._stage(recipe, "pack", "file system, qcow2, hashes")
        remove(workspace.seal)
        version = pack(workspace, recipe.disk_gib, inputs.digest, _SOURCE_DATE)
        shutil.copyfile(workspace.log, workspace.seal / LOG)
        files = tuple(describe(workspace.seal / n, n) for n in (DISK, KERNEL, INITRD, LOG))
        self.stages["pack"] = round(time.monotonic() - began, 1)
        manifest = Manifest(
            recipe=recipe.name, digest=inputs.digest, suite=recipes[0].suite, base=recipe.base,
            roles=tuple(r for x in recipes for r in x.roles), inputs=inputs.files, tools=inputs.tools,
            packages=debian_packages(workspace.root) + python_packages(workspace.root),
            weights=_listing(workspace.root / _WEIGHTS), agent=_agent_listing(workspace.root / _AGENT),
            kernel_version=version, kernel_cmdline=recipe.kernel_cmdline, memory_mib=recipe.memory_mib,
            vcpus=recipe.vcpus, disk_bytes=recipe.disk_gib * _GIB, files=files, stages=self.stages,
            built=round(time.time(), 3),
        )  # fmt: skip
        if collect(self.project, recipes).digest != inputs.digest:
            raise BuildError(
                f"the inputs of {recipe.name} changed while it was built", hint="run `hotcell build` again"
            )
        write_manifest(workspace.seal, manifest)
        _seal(workspace.seal, self.paths.images / inputs.digest)

    def _keep_tree(self, workspace: Workspace, recipe: Recipe, digest: str) -> None:
        """Keep the tree if another recipe is based on it, instead of older trees; drop the workspace."""
        if self._is_base(recipe):
            self._trees.mkdir(mode=0o700, exist_ok=True)
            for old in self._trees.iterdir():
                remove(old)
            workspace.root.rename(self._trees / digest)
        remove(workspace.folder)


def _leave_tidy(workspace: Workspace) -> None:
    """After a failure: no process, no mount, no half file; a tree only if the next build can go on with it."""
    end_processes_of(workspace.token)
    unmount_below(workspace.folder)
    (workspace.folder / "disk.raw").unlink(missing_ok=True)
    remove(workspace.seal)
    if not workspace.reached():
        remove(workspace.root)


def _listing(folder: Path) -> tuple[ImageFile, ...]:
    if not folder.is_dir():
        return ()
    return tuple(describe(f, f.relative_to(folder).as_posix()) for f in files_below(folder))


def _agent_listing(folder: Path) -> tuple[ImageFile, ...]:
    return tuple(f for f in _listing(folder) if not f.name.startswith("weights/"))


def _seal(part: Path, final: Path) -> None:
    """Give a finished folder its name: the last act, and atomic."""
    for file in part.iterdir():
        file.chmod(0o444)
        with file.open("rb") as f:
            os.fsync(f.fileno())
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        remove(final)
    part.rename(final)
    fd = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
