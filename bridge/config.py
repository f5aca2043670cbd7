"""What a trainer may configure. Everything the two sides must agree on is the server's to decide."""

from __future__ import annotations

import difflib
import math
import os
from pathlib import Path
from typing import Any, Literal, Self, get_args

import msgspec

from bridge.errors import ConfigError
from bridge.protocol.ballot import Policy
from bridge.protocol.mapping import CONFIG_NAME

Snapshot = Literal["host", "gpu"]
Comparison = Literal["first", "always", "never"]

# Flags of ``python -m bridge.launch serve``, whose values reach the trainer when the two sides meet.
SERVER_DECIDES = {
    "heartbeat_interval_s": "--heartbeat-interval",
    "deadline_s": "--deadline",
    "bucket_bytes": "--bucket-bytes",
    "transport": "--transport",
    "prefix_cache": "--prefix-cache",
}
_CHOICES = {
    "commit": get_args(Policy),
    "snapshot": get_args(Snapshot),
    "compare_replicas": get_args(Comparison),
}
_PATHS = ("config_path", "logdir", "update_dir")
_TIMEOUTS = ("connect_timeout_s", "commit_timeout_s", "stage_timeout_s", "ranks_timeout_s")


class _Constructor(msgspec.StructMeta):
    """Checks keywords, so that a misspelt one names what is allowed; accepts the earlier bridge's."""

    def __call__(cls, *args: Any, **values: Any) -> Any:  # noqa: N805 - a class is what it makes instances of
        if args:
            raise ConfigError(f"BridgeConfig takes keywords only, got {len(args)} value(s) without a name")
        unknown = values.keys() - set(cls.__struct_fields__)
        if unknown:
            # Imported here: only old trainers pay for what only they need.
            from bridge.legacy import translate_keywords

            values = translate_keywords(values, known=cls.__struct_fields__)
        for name in values.keys() - set(cls.__struct_fields__):
            raise ConfigError(_unknown(name, cls.__struct_fields__))
        for name in _PATHS:
            if isinstance(values.get(name), os.PathLike):
                values[name] = os.fspath(values[name])
        if isinstance(values.get("logdirs"), list | tuple):
            values["logdirs"] = tuple(
                os.fspath(d) if isinstance(d, os.PathLike) else d for d in values["logdirs"]
            )
        return super().__call__(**values)


def _unknown(name: str, known: tuple[str, ...]) -> str:
    if name in SERVER_DECIDES:
        return (
            f"BridgeConfig has no {name}: both sides need the same, so the server decides; pass "
            f"{SERVER_DECIDES[name]} to python -m bridge.launch serve"
        )
    if name == "checksums":
        return (
            "BridgeConfig has no checksums: by pull and gloo every bucket is always compared; by pull-gpu "
            "and nccl the server decides, see --checksum of python -m bridge.launch serve"
        )
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"BridgeConfig has no {name}{hint}; it has: {', '.join(known)}"


class BridgeConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=_Constructor
):
    """How one trainer rank finds the server, and how long it waits. Equal on all ranks.

    The constructor also takes the earlier bridge's keywords (``log_dir``, ``timeout_seconds``, ...).

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """

    # The mapping file itself. None: CONFIG_NAME in logdir, which is where the server writes it.
    config_path: str | None = None
    # The server's --logdir as this host sees it. No default: a guess could find another run's mapping.
    logdir: str | None = None
    # Several servers instead of one: each one's --logdir. A broadcast brings its version to all of them.
    logdirs: tuple[str, ...] = ()
    # With several servers. "all": a version is committed on every server or on none. "available": on those
    # that have staged it; the others are left out of the round, and met again by the next broadcast.
    commit: Policy = "all"
    # Versions that broadcasts number by themselves lie above this one: the last that was served before the
    # servers were started again, so that no number ever stands for two things.
    versions_after: int = 0
    # Seconds that servers which have staged a version wait for the others, with commit="available".
    stage_timeout_s: float = 30.0
    # Where weights on a GPU are compared with those sent last, if only changes are sent. "host": all of them
    # cross to host memory in every round. "gpu": only what changed does, and what this rank sends is kept in
    # GPU memory once more, in the server's dtype.
    snapshot: Snapshot = "host"
    # When trainer ranks that hold the same part of a parameter compare the numbers in it: in the first round
    # with a server, in every one, or never. Each rank reads such parts of its own once for that.
    compare_replicas: Comparison = "first"
    # Seconds for each step of meeting the server: it answers in milliseconds when it is up, but a daemon
    # that its supervisor just restarted needs some ten seconds to gather its workers again.
    connect_timeout_s: float = 60.0
    # Seconds a round may take beyond the time for its bytes: an engine in a long prefill reaches its next
    # batch boundary late. The same as the server's own.
    commit_timeout_s: float = 120.0
    # Seconds that a trainer rank waits for the others to come to the same call. Generous: one may still
    # write a checkpoint, or compile, while the others are there already.
    ranks_timeout_s: float = 600.0
    # Where notify_update writes its files; the server must see it and allow it. None: "updates" beside the
    # mapping, which is what the server allows by default.
    update_dir: str | None = None
    # vLLM's HTTP server, for notify_update only. No default: most trainers never use it.
    http_url: str | None = None
    # What the server was given as --api-key. None: the job's secret from the mapping file.
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.logdirs and (self.logdir is not None or self.config_path is not None):
            raise ConfigError(
                f"BridgeConfig.logdirs is {self.logdirs!r}, and logdir or config_path names a server too; "
                "give one of them"
            )
        for name in self.__struct_fields__:
            if (fault := _fault(name, getattr(self, name))) is not None:
                shown = "not" if name == "api_key" else f"{getattr(self, name)!r}; it must be"
                raise ConfigError(f"BridgeConfig.{name} is {shown} {fault}")

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["api_key"] = None if self.api_key is None else "..."  # configurations end up in logs
        return f"BridgeConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def servers(self) -> tuple[Self, ...]:
        """One configuration for each server."""
        if not self.logdirs:
            return (self,)
        return tuple(msgspec.structs.replace(self, logdirs=(), logdir=logdir) for logdir in self.logdirs)

    def mapping_path(self) -> Path:
        """Where the server's mapping is.

        Raises:
            ConfigError: none of ``config_path``, ``logdir`` and ``logdirs`` is set, or there are several.
        """
        if len(self.logdirs) > 1:
            raise ConfigError(
                f"this is done with one server at a time, and logdirs names {len(self.logdirs)}: "
                f"{', '.join(self.logdirs)}; use BridgeConfig(logdir=...) of one of them"
            )
        if self.logdirs:
            return Path(self.logdirs[0]) / CONFIG_NAME
        if self.config_path is not None:
            return Path(self.config_path)
        if self.logdir is not None:
            return Path(self.logdir) / CONFIG_NAME
        raise ConfigError(
            "no server is configured: looked at BRIDGE_CONFIG (the mapping file), BRIDGE_LOGDIR and LOGDIR "
            "(the server's --logdir), BRIDGE_LOGDIRS (of several servers), and at config_path, logdir and "
            "logdirs of BridgeConfig; set one of them"
        )

    def update_path(self) -> Path:
        """Where update files go.

        Raises:
            ConfigError: there is no ``update_dir``, and no mapping to put it beside.
        """
        if self.update_dir is not None:
            return Path(self.update_dir)
        if self.logdir is None and self.config_path is None and not self.logdirs:
            raise ConfigError(
                "notify_update needs a directory that the server sees too: set BRIDGE_UPDATE_DIR or "
                "BridgeConfig.update_dir to the server's --update-dir (or BRIDGE_LOGDIR to its --logdir)"
            )
        beside = Path(self.logdir) if self.logdir is not None else self.mapping_path().parent
        return beside / "updates"

    @classmethod
    def from_training_config(cls, config: Any) -> Self:
        """The earlier bridge's constructor; see ``bridge.legacy``."""
        from bridge.legacy import training_keywords

        made: Self = cls(**training_keywords(config))
        return made


def _fault(name: str, value: Any) -> str | None:
    """What ``value`` should have been, or None if it is fine."""
    if name == "logdirs":
        paths = isinstance(value, tuple) and all(isinstance(path, str) and path for path in value)
        return None if paths and len(set(value)) == len(value) else "a list of different paths"
    if name in _CHOICES:
        return None if value in _CHOICES[name] else f"one of {', '.join(_CHOICES[name])}"
    if name == "versions_after":
        number = isinstance(value, int) and not isinstance(value, bool)
        return None if number and value >= 0 else "a version: a whole number, 0 or above"
    if name in _TIMEOUTS:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and 0 < value < math.inf else "a finite number of seconds above 0"
    if value is None:
        return None
    if not isinstance(value, str):
        return "a string" if name not in _PATHS else "a path"
    if not value:
        return "absent or not empty"
    if name == "http_url" and not value.startswith(("http://", "https://")):
        return "a URL such as http://host:8000"
    return None
