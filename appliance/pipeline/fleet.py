"""From settings, recipes and built images to machine specifications."""

from __future__ import annotations

from appliance.build import Image, find_image
from appliance.cell.spec import GuestImage, MachineSpec
from appliance.config import HostSettings, ScenarioSpec, SubjectSpec
from appliance.errors import NotFoundError
from appliance.host.paths import Paths
from appliance.model import Role
from appliance.trial.records import WeightFile

WORLD_RECIPE = "world"


def built(recipe: str, paths: Paths) -> Image:
    """The image that the present inputs give.

    Raises:
        NotFoundError: it is not built.
    """
    image = find_image(recipe, paths)
    if image is None:
        raise NotFoundError(
            f"the image {recipe} is not built", hint=f"run `hotcell build {recipe}`", recipe=recipe
        )
    return image


def machines_for(
    subject: SubjectSpec, scenario: ScenarioSpec, settings: HostSettings, paths: Paths
) -> tuple[tuple[MachineSpec, ...], tuple[WeightFile, ...]]:
    """The machines of a trial, origin first, and the weights of its subject.

    Raises:
        NotFoundError: an image is not built.
    """
    guests = settings.guests
    origin_image = built(subject.image, paths)
    target_image = GuestImage.of(built(subject.target_image, paths))
    size = {"memory_mib": guests.model_memory_mib, "vcpus": guests.vcpus}
    machines = [MachineSpec(name="origin", role=Role.ORIGIN, image=GuestImage.of(origin_image), **size)]
    machines += [
        MachineSpec(name=f"target-{n}", role=Role.TARGET, image=target_image, **size)
        for n in range(1, scenario.targets + 1)
    ]
    if scenario.world:
        world = GuestImage.of(built(WORLD_RECIPE, paths))
        machines.append(
            MachineSpec(
                name="world", role=Role.WORLD, image=world, memory_mib=guests.world_memory_mib, vcpus=1
            )
        )
    weights = tuple(WeightFile(name=w.name, size=w.size, sha256=w.sha256) for w in origin_image.weights)
    return tuple(machines), weights
