"""A recipe: what an image is made of. One folder below ``images/`` holds ``image.toml`` and its lock."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError

from appliance.errors import ConfigError, HotcellError, NotFoundError
from appliance.model import Frozen, Name

RECIPE_FILE = "image.toml"
_PACKAGE = r"^[a-z0-9][a-z0-9+.-]+$"
_ROLE = r"^[a-z][a-z0-9_]*$"
Package = Annotated[str, StringConstraints(pattern=_PACKAGE)]
RoleName = Annotated[str, StringConstraints(pattern=_ROLE)]


class Recipe(Frozen):
    """One ``image.toml``. Sizes in GiB (disk) and MiB (memory)."""

    name: Name
    description: str
    suite: Annotated[str, StringConstraints(pattern=r"^[a-z]+$")] = "bookworm"
    base: Name | None = None
    packages: tuple[Package, ...] = ()
    roles: tuple[RoleName, ...] = Field(min_length=1)
    lock: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    agent: bool = False
    weights: str | None = None
    disk_gib: int = Field(ge=1, le=4096)
    memory_mib: int = Field(ge=128, le=1 << 22)
    vcpus: int = Field(ge=1, le=256)
    kernel_cmdline: str = "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet"
    vars: dict[str, str | int | bool | list[str]] = Field(default_factory=dict)


def list_recipes(images: Path) -> tuple[str, ...]:
    """Names of all recipes below ``images``, sorted."""
    return tuple(sorted(f.parent.name for f in images.glob(f"*/{RECIPE_FILE}")))


def _complaint(error: ValidationError) -> str:
    lines = []
    for e in error.errors():
        key = ".".join(str(p) for p in e["loc"]) or "(file)"
        if e["type"] == "extra_forbidden":
            allowed = ", ".join(sorted(set(Recipe.model_fields) - {"name"}))
            lines.append(f"{key}: unknown key; allowed: {allowed}")
        else:
            lines.append(f"{key}: {e['msg']}; found: {e['input']!r:.80}")
    return "; ".join(lines)


def load_recipe(images: Path, name: str) -> Recipe:
    """Read one recipe.

    Raises:
        NotFoundError: there is no such recipe.
        ConfigError: the file is not TOML, or a key or value is wrong.
    """
    known = list_recipes(images)
    if name not in known:
        raise NotFoundError(
            f"no recipe named {name!r:.60}", hint=f"recipes are: {', '.join(known) or '(none)'}", name=name
        )
    file = images / name / RECIPE_FILE
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file}: not valid TOML: {e}", hint="correct the file", file=str(file)) from e
    if "name" in data:
        raise ConfigError(
            f"{file}: name: not allowed; the folder's name is the recipe's name", hint="remove it"
        )
    try:
        return Recipe(name=name, **data)
    except ValidationError as e:
        raise ConfigError(f"{file}: {_complaint(e)}", hint="see docs of image recipes", file=str(file)) from e


def chain(images: Path, name: str) -> tuple[Recipe, ...]:
    """The recipe and all it is based on, the root first.

    Raises:
        ConfigError: the bases form a cycle, or one of them is missing.
    """
    found: list[Recipe] = []
    names: list[str] = []
    current: str | None = name
    while current is not None:
        if current in names:
            loop = " -> ".join([*names[names.index(current) :], current])
            raise ConfigError(f"recipes are based on each other: {loop}", hint="remove one `base` key")
        try:
            recipe = load_recipe(images, current)
        except NotFoundError as e:
            if not names:
                raise
            raise ConfigError(f"{names[-1]}: base: {e.message}", hint=e.hint) from e
        names.append(current)
        found.append(recipe)
        current = recipe.base
    for recipe in found[:-1]:
        if recipe.packages:
            raise ConfigError(
                f"{recipe.name}: packages: not allowed together with base",
                hint=f"add them to the recipe at the root, {found[-1].name}",
            )
    return tuple(reversed(found))


def bases(images: Path) -> frozenset[str]:
    """Names that some recipe gives as its base; a recipe that cannot be read gives none."""
    found = set()
    for name in list_recipes(images):
        try:
            found.add(load_recipe(images, name).base)
        except HotcellError:
            continue
    return frozenset(n for n in found if n is not None)


def check_roles(recipes: Sequence[Recipe], ansible: Path) -> None:
    """Every role a recipe names exists and declares its arguments.

    Raises:
        ConfigError: one does not.
    """
    known = sorted(f.parents[1].name for f in ansible.glob("roles/*/tasks/main.yml"))
    for recipe in recipes:
        for role in recipe.roles:
            if role not in known:
                raise ConfigError(
                    f"{recipe.name}: roles: {role}: no such role",
                    hint=f"roles are: {', '.join(known) or '(none)'}",
                )
            if not (ansible / "roles" / role / "meta" / "argument_specs.yml").is_file():
                raise ConfigError(
                    f"role {role} has no meta/argument_specs.yml", hint="declare the role's arguments there"
                )
