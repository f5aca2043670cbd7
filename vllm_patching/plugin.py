"""The door into vLLM's processes: ``vllm.general_plugins`` entry point ``weight_bridge``.

vLLM calls ``register`` in the API server, the engine core and every worker, possibly more than once. vLLM
logs and swallows errors raised while this module is *imported*, so nothing fallible is imported here; errors
raised by the call end the process, as they should.
"""

from __future__ import annotations

import os

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
    from bridge import telemetry
    from vllm_patching import hooks

    telemetry.configure(role="vllm")
    compat.check_version(compat.installed_version())
    hooks.install()
    _registered = True
