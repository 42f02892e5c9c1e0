"""What the user asks for: the host's settings, and the library of subjects, scenarios and policies.

First stage of the pipeline: imports nothing of the package but ``errors`` and ``model``.
"""

from appliance.config.catalogue import BUILT_IN, Library, load_library
from appliance.config.settings import HostSettings, find_settings_file, load_host_settings
from appliance.config.specs import PolicySpec, ScenarioSpec, SubjectSpec, TrialLimits

__all__ = [
    "BUILT_IN",
    "HostSettings",
    "Library",
    "PolicySpec",
    "ScenarioSpec",
    "SubjectSpec",
    "TrialLimits",
    "find_settings_file",
    "load_host_settings",
    "load_library",
]
