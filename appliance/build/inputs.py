"""Everything an image is made from, and the digest over it. Times, mirrors and the host's name play no part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from appliance.build.manifest import SCHEMA, sha256_file
from appliance.build.recipe import RECIPE_FILE, Recipe
from appliance.build.tree import COMMON_PACKAGES
from appliance.errors import ConfigError

_NOISE = {"__pycache__", ".ansible", ".mypy_cache", ".ruff_cache", ".pytest_cache"}


@dataclass(frozen=True)
class Project:
    """The folders of the repository that a build reads."""

    root: Path

    @property
    def images(self) -> Path:
        """One folder a recipe."""
        return self.root / "images"

    @property
    def ansible(self) -> Path:
        """Playbook and roles."""
        return self.root / "ansible"

    @property
    def agent(self) -> Path:
        """The in-guest package."""
        return self.root / "agent"

    @property
    def code(self) -> Path:
        """The build's own modules."""
        return self.root / "appliance" / "build"


@dataclass(frozen=True)
class Inputs:
    """Files (path below the project to SHA-256), tool versions, and the digest over both and the recipes."""

    files: dict[str, str]
    tools: dict[str, str]
    digest: str


def files_below(folder: Path) -> tuple[Path, ...]:
    """All regular files of a folder that are content, sorted; caches and byte code are not."""
    return tuple(
        sorted(
            f
            for f in folder.rglob("*")
            if f.is_file() and not _NOISE & set(f.parts) and f.suffix not in {".pyc", ".pyo"}
        )
    )


def lock_file(images: Path, recipe: Recipe) -> Path | None:
    """The recipe's lock of Python packages, if it names one.

    Raises:
        ConfigError: it is missing.
    """
    if recipe.lock is None:
        return None
    file = images / recipe.name / recipe.lock
    if not file.is_file():
        raise ConfigError(
            f"{images / recipe.name / RECIPE_FILE}: lock: {recipe.lock} does not exist",
            hint=f"put the lock at {file}, or remove the key",
        )
    return file


def input_files(project: Project, recipes: Sequence[Recipe]) -> tuple[Path, ...]:
    """Every file that reaches the image of the last recipe, sorted."""
    found: set[Path] = {project.ansible / "image.yml", project.root / "ansible.cfg"}
    for recipe in recipes:
        found.add(project.images / recipe.name / RECIPE_FILE)
        lock = lock_file(project.images, recipe)
        if lock is not None:
            found.add(lock)
        for role in recipe.roles:
            found.update(files_below(project.ansible / "roles" / role))
        if recipe.agent:
            found.update(files_below(project.agent))
    # How the tree is made and packed decides bytes too; the rest of the build's code does not.
    found.update(project.code / name for name in ("tree.py", "pack.py"))
    return tuple(sorted(f for f in found if f.is_file()))


def tool_versions() -> dict[str, str]:
    """Versions of the Python tools that decide what a role does."""
    return {name: metadata.version(name) for name in ("ansible", "ansible-core", "ansible-runner")}


def digest_of(recipes: Iterable[Recipe], files: dict[str, str], tools: dict[str, str]) -> str:
    """The image's name: one hash over a canonical text of all inputs."""
    text = json.dumps(
        {
            "schema": SCHEMA,
            "recipes": [r.model_dump(mode="json") for r in recipes],
            "common": COMMON_PACKAGES,
            "files": files,
            "tools": tools,
        },
        sort_keys=True,
        separators=(",", ":"),
    )
    return hashlib.sha256(text.encode()).hexdigest()


def collect(project: Project, recipes: Sequence[Recipe]) -> Inputs:
    """Read and hash all inputs of the last recipe."""
    files = {str(f.relative_to(project.root)): sha256_file(f) for f in input_files(project, recipes)}
    tools = tool_versions()
    return Inputs(files, tools, digest_of(recipes, files, tools))
