"""The trainer's environment: the only place on its side that reads variables.

======================  ==============================================================================
BRIDGE_CONFIG           the server's mapping file
BRIDGE_LOGDIR           the server's --logdir, where the mapping file is
BRIDGE_LOGDIRS          the --logdir of several servers, separated as in PATH; wins over the two above
BRIDGE_<FIELD>          any other field of ``BridgeConfig``, such as BRIDGE_CONNECT_TIMEOUT_S
BRIDGE_STOP_FILE        a file that asks the trainer to end once it exists (``bridge.should_stop``)
LOGDIR                  the earlier name of BRIDGE_LOGDIR
VLLM_API_KEY            vLLM's own variable, used when BRIDGE_API_KEY is absent
NUM_INFERENCE_NODES     earlier bridge: the last N nodes of SLURM_JOB_NODELIST run the server; the first of
                        them is asked by ``notify_update`` when no BRIDGE_HTTP_URL is given
SLURM_JOB_ID, SLURM_RESTART_COUNT  which attempt of which job this trainer belongs to
VLLM_ENABLE_SHARED_WEIGHTS  earlier bridge: 0 switches broadcasts off, which is then an error
======================  ==============================================================================
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import msgspec

from bridge.config import BridgeConfig
from bridge.errors import ConfigError, TopologyError
from bridge.nodes import expand_nodelist, job_of, number_in

logger = logging.getLogger(__name__)

# field -> the variables that set it; the first one found wins.
VARIABLES: dict[str, tuple[str, ...]] = {
    "config_path": ("BRIDGE_CONFIG",),
    "logdir": ("BRIDGE_LOGDIR", "LOGDIR"),
    "logdirs": ("BRIDGE_LOGDIRS",),
    "versions_after": ("BRIDGE_VERSIONS_AFTER",),
    "commit": ("BRIDGE_COMMIT",),
    "snapshot": ("BRIDGE_SNAPSHOT",),
    "compare_replicas": ("BRIDGE_COMPARE_REPLICAS",),
    "stage_timeout_s": ("BRIDGE_STAGE_TIMEOUT_S",),
    "connect_timeout_s": ("BRIDGE_CONNECT_TIMEOUT_S",),
    "commit_timeout_s": ("BRIDGE_COMMIT_TIMEOUT_S",),
    "ranks_timeout_s": ("BRIDGE_RANKS_TIMEOUT_S",),
    "update_dir": ("BRIDGE_UPDATE_DIR",),
    "http_url": ("BRIDGE_HTTP_URL",),
    "api_key": ("BRIDGE_API_KEY", "VLLM_API_KEY"),
}
_PLACES = ("config_path", "logdir", "logdirs")
EARLIER_NAMES = {"LOGDIR": "BRIDGE_LOGDIR", "NUM_INFERENCE_NODES": "BRIDGE_HTTP_URL"}
VLLM_PORT = 8000  # vLLM's default
_OFF = ("0", "false", "no", "off")
_mentioned: set[str] = set()


def job_attempt() -> tuple[str, int]:
    """The batch job that this trainer is in, and how often that was requeued; "" and 0 in none.

    What is left over of an earlier attempt must not serve its weights behind a later one's.
    """
    try:
        job = str(job_of())
    except ConfigError:
        return "", 0
    try:
        return job, number_in(os.environ, "SLURM_RESTART_COUNT")
    except ConfigError:
        return job, 0


class Ranks(msgspec.Struct, frozen=True, kw_only=True):
    """This process among the trainer's."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def _integer(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; it must be a whole number") from None


def initialised_ranks() -> Ranks | None:
    """Ranks of the default process group, or None where there is none (or no torch yet)."""
    if "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    local_rank = _integer("LOCAL_RANK")
    if local_rank is None:
        local_rank = _integer("SLURM_LOCALID") or 0
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), local_rank=local_rank)


def declared_ranks() -> Ranks:
    """What torchrun or srun say in the environment.

    Only the *step's* size counts under SLURM: a process started by a batch script sees SLURM_NTASKS too,
    and is alone nevertheless.

    Raises:
        ConfigError: a variable is not a number.
        TopologyError: the rank is not below the world size.
    """
    for rank, world_size, local_rank in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        size, number = _integer(world_size), _integer(rank)
        if size is not None and number is not None:
            if not 0 <= number < size:
                raise TopologyError(f"{rank} is {number}, but {world_size} is {size}")
            return Ranks(rank=number, world_size=size, local_rank=_integer(local_rank) or 0)
    return Ranks()


def ranks() -> Ranks:
    """This process's rank among the trainer's.

    Raises:
        TopologyError: a launcher started several processes, but they have not met.
    """
    if (met := initialised_ranks()) is not None:
        return met
    declared = declared_ranks()
    if declared.world_size > 1:
        raise TopologyError(
            f"this is rank {declared.rank} of {declared.world_size} by its environment, but "
            "torch.distributed is not initialised; call torch.distributed.init_process_group before the "
            "first broadcast"
        )
    return declared


def stop_requested() -> bool:
    """Whether the file exists that asks this trainer to end; False where none is named."""
    path = os.environ.get("BRIDGE_STOP_FILE", "")
    return bool(path) and Path(path).exists()


def check_enabled() -> None:
    """Refuse to broadcast where the environment says not to.

    Raises:
        ConfigError: VLLM_ENABLE_SHARED_WEIGHTS is off, or NUM_INFERENCE_NODES selects the HTTP mode.
    """
    value = os.environ.get("VLLM_ENABLE_SHARED_WEIGHTS", "").strip()
    if value.lower() in _OFF:
        raise ConfigError(
            f"VLLM_ENABLE_SHARED_WEIGHTS={value} switches weight broadcasts off, so nothing can be sent; "
            "unset it, or do not call broadcast_weights"
        )
    if (nodes := _integer("NUM_INFERENCE_NODES")) is not None and nodes < 0:
        raise ConfigError(
            f"NUM_INFERENCE_NODES={nodes} selects the earlier bridge's HTTP mode, which has no process "
            "group; call notify_update(model) instead of broadcast_weights, or unset it"
        )


def bridge_config(base: BridgeConfig | None = None) -> BridgeConfig:
    """The configuration from the environment.

    Args:
        base: what was configured otherwise; the environment fills in only the fields left at their default.

    Raises:
        ConfigError: a variable's value is not allowed; names the variable.
    """
    base = base or BridgeConfig()
    defaults = dict(zip(base.__struct_fields__, base.__struct_defaults__, strict=True))
    found: dict[str, object] = {}
    for field, names in VARIABLES.items():
        # A base that names the mapping in one way must not be overruled by a variable of the other.
        placed = field in _PLACES and (base.config_path or base.logdir or base.logdirs)
        if placed or getattr(base, field) != defaults[field]:
            continue
        if (name := next((n for n in names if os.environ.get(n)), None)) is not None:
            found[field] = _parse(name, os.environ[name], like=defaults[field])
    if found.get("logdirs"):  # LOGDIR is often there for other reasons
        found = {field: value for field, value in found.items() if field not in _PLACES[:2]}
    if base.http_url is None and "http_url" not in found and (url := _earlier_url()) is not None:
        found["http_url"] = url
    try:
        return msgspec.structs.replace(base, **found)
    except ConfigError as err:
        looked_at = ", ".join(f"{f} from {'/'.join(VARIABLES[f])}" for f in found)
        raise ConfigError(f"{err} (the environment set {looked_at})") from err


def _parse(name: str, text: str, *, like: object) -> str | float | tuple[str, ...] | None:
    _mention(name)
    if isinstance(like, tuple):
        return tuple(path for path in text.split(os.pathsep) if path)
    if isinstance(like, int):
        return _integer(name)
    if not isinstance(like, float):
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; it must be a number of seconds") from None


def _mention(name: str) -> None:
    """Log once that an earlier name was used."""
    if name in EARLIER_NAMES and name not in _mentioned:
        _mentioned.add(name)
        logger.warning("%s is the earlier bridge's variable; use %s", name, EARLIER_NAMES[name])


def _earlier_url() -> str | None:
    hosts = inference_hosts()
    if not hosts:
        return None
    _mention("NUM_INFERENCE_NODES")
    return f"http://{hosts[0]}:{VLLM_PORT}"


def inference_hosts() -> tuple[str, ...]:
    """Where NUM_INFERENCE_NODES says the server runs: this host for 0, else the job's last nodes.

    Raises:
        TopologyError: more nodes than the job has, or no node left for the trainer.
    """
    count = _integer("NUM_INFERENCE_NODES")
    if count is None or count < 0:
        return ()
    if count == 0:
        return ("localhost",)
    nodelist = os.environ.get("SLURM_JOB_NODELIST", "")
    nodes = expand_nodelist(nodelist)
    if count >= len(nodes):
        raise TopologyError(
            f"NUM_INFERENCE_NODES is {count}, but SLURM_JOB_NODELIST={nodelist!r} has {len(nodes)} node(s), "
            "and the trainer needs one; ask for more nodes, or unset NUM_INFERENCE_NODES"
        )
    return tuple(nodes[-count:])
