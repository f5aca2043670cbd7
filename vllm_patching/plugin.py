"""The door into vLLM's processes: ``vllm.general_plugins`` entry point ``weight_bridge``.

vLLM calls ``register`` in the API server, the engine core and every worker, possibly more than once. vLLM
logs and swallows errors raised while this module is *imported*, so nothing fallible is imported here; errors
raised by the call end the process, as they should.
"""

from __future__ import annotations

import os
import sys

# By the module that the launcher starts. Engine cores and workers, its children, say later which they are.
ROLES = {"vllm.entrypoints.openai.api_server": "api", "vllm_patching.headless": "headless"}
_registered = False


def register() -> None:
    """Install the hooks once per process; without ``BRIDGE_RUN_DIR`` only the AMX permission is asked.

    Raises:
        UnsupportedVersion: this vLLM was never tested with the bridge.
        ConfigError: a vLLM name that the bridge hooks into is missing.
    """
    global _registered  # vLLM may call a plugin several times per process
    if _registered:
        return
    from vllm_patching import compat

    compat.request_amx_permission()
    if not os.environ.get("BRIDGE_RUN_DIR"):
        return
    from bridge import flight, telemetry
    from vllm_patching import hooks

    telemetry.configure(role=_role())
    os.register_at_fork(after_in_child=lambda: flight.name_process("vllm", None))  # not what its parent is
    compat.check_version(compat.installed_version())
    hooks.install()
    _registered = True


def _role() -> str:
    """What this process of vLLM is for its log, as far as that is known by now."""
    main = sys.modules["__main__"]
    if main.__name__ != "__main__" or main.__spec__ is None:  # a spawned child's is its parent's
        return "vllm"
    return ROLES.get(main.__spec__.name, "vllm")
