"""What is held: the inference side, inside vLLM's processes and in the daemon beside them.

Importing this package changes nothing. ``plugin.register`` installs the hooks, and only where the bridge's
launcher has set ``BRIDGE_RUN_DIR``.
"""
