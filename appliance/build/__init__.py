"""Recipe to sealed image: root tree, configuration, disk, manifest."""

from appliance.build.api import (
    build_image,
    find_image,
    list_images,
    list_recipes,
    prune_images,
    verify_image,
)
from appliance.build.make import BuildOptions
from appliance.build.manifest import Image, ImageFile, Manifest

__all__ = [
    "BuildOptions",
    "Image",
    "ImageFile",
    "Manifest",
    "build_image",
    "find_image",
    "list_images",
    "list_recipes",
    "prune_images",
    "verify_image",
]
