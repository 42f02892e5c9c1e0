"""Let vLLM write what it finds out about a model class into its cache, so that no start has to.

vLLM imports a model's class in a process of its own to inspect it, once for each machine: as long as a whole
start. The result depends on vLLM's code only and lies in ``VLLM_CACHE_ROOT/modelinfos``.
"""

from __future__ import annotations

import sys

from vllm.model_executor.models.registry import ModelRegistry

if __name__ == "__main__":
    for architecture in sys.argv[1:]:
        if ModelRegistry._try_inspect_model_cls(architecture) is None:  # noqa: SLF001 - no public way in
            sys.exit(f"vLLM cannot inspect {architecture}")
