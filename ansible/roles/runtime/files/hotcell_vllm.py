"""A vLLM platform plugin: the CPU platform, whose engine process is forked instead of spawned.

vLLM's CPU platform starts its engine process by "spawn", so that the process imports torch and vLLM a second
time. Forked, it has them already. That is safe here because nothing runs in threads before the fork: the
environment holds ``OMP_NUM_THREADS=1`` and preloads torch's own libgomp, which spawning would have set up.
Registered by the entry point group ``vllm.platform_plugins``; ``VLLM_PLUGINS=`` (empty) leaves it out.
"""

from __future__ import annotations


def platform() -> str:
    """The class vLLM shall use as its platform."""
    return "hotcell_vllm_platform.ForkingCpuPlatform"
