"""Keep a running vLLM's weights in step with a trainer."""
import importlib
_PUBLIC = {n: "bridge.trainer" for n in ("Bridge","Receipt","PendingBroadcast","connect","broadcast_weights","broadcast_single_param","send_heartbeat","notify_update","close")}
__path__ = __import__("pkgutil").extend_path(__path__, __name__)
def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(name)
