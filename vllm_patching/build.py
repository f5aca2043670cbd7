"""Which code a process runs: taken when it starts, as the files may be other ones an hour later.

A server lives for weeks, and starts updaters, lenders and daemons all that time from what is installed then.
A checkout that was pulled or an environment that was updated would bring processes together that pack or lay
out bytes in different ways, and no checksum would tell: each is right by itself. So whoever introduces
itself says what it runs.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import blake3

from bridge import errors
from bridge.errors import ConfigError
from vllm_patching.compat import DISTRIBUTIONS

KEY = "build"
PACKAGES = (Path(errors.__file__).parent, Path(__file__).parent)


class OtherCode(ConfigError):
    """Two processes of one server run different code."""


def _taken() -> str:
    digest = blake3.blake3()
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package).with_suffix("").parts
            if not all(part.isidentifier() for part in parts):
                continue  # nobody imports it: an editor's lock, a notebook's copy
            digest.update(f"{'.'.join(parts)}\0".encode())
            try:
                digest.update(path.read_bytes())
            except OSError as err:  # it is being replaced: another code than anybody's
                digest.update(f"unreadable: {err.errno}\0".encode())
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return " with ".join([digest.hexdigest(6), *found])


BUILD = _taken()


def check(message: dict[str, Any], who: str) -> None:
    """Compare what ``who`` has introduced itself with.

    Raises:
        OtherCode: it runs other code than this process.
    """
    theirs = message.get(KEY, "one that does not say")
    if theirs != BUILD:
        raise OtherCode(
            f"{who} runs other code than this daemon: build {theirs}, and here {BUILD}. The bridge or vLLM "
            "was changed on disk while the server ran, or its processes find different installations "
            "(PYTHONPATH). What they tell one another could be read wrongly: start the server again"
        )
