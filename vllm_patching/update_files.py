"""Update files of the HTTP fallback: which tensors they hold, and whether these are a whole version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bridge.errors import ConfigError, MappingError
from bridge.protocol.holders import CASTS
from bridge.protocol.mapping import Mapping, RankMap, matching
from vllm_patching.sources import SAFETENSORS_DTYPES


def find(path: str, below: Path) -> list[Path]:
    """The safetensors files that ``path`` names, a file or a folder of them, links followed.

    Raises:
        ConfigError: one of them, or ``path`` itself, does not lie below ``below``, or is no regular file: a
            pipe would never end.
        MappingError: there is none.
    """
    try:
        allowed, root = below.resolve(), Path(path).resolve()
        found = [root] if not root.is_dir() else sorted(f.resolve() for f in root.glob("*.safetensors"))
    except (OSError, ValueError, RuntimeError) as err:  # a NUL, links in a circle
        raise ConfigError(f"{path!r} is no path: {err}") from err
    for file in (root, *found):
        if not file.is_relative_to(allowed):
            where = path if file == root else f"{path} leads to {file}, which"
            raise ConfigError(f"{where} is not below {allowed}; see --update-dir")
    if not found:
        raise MappingError(f"no *.safetensors in {path}")
    for file in found:
        if file.exists() and not file.is_file():
            raise ConfigError(f"{file} is no regular file")
    return found


def _read(found: dict[str, Path], name: str) -> Any:
    with reading(found[name]) as file:
        return file.get_tensor(name)


@contextmanager
def reading(file: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        MappingError: it is damaged, or was changed since it was looked at.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError) as err:
        raise MappingError(f"{file} is not a whole safetensors file: {err}") from err


def _names(file: Path) -> list[str]:
    with reading(file) as opened:
        return list(opened.keys())


def index(files: list[Path]) -> dict[str, Path]:
    """Which file holds which tensor.

    Raises:
        MappingError: there is no file, or a tensor lies in two: which one counts is anybody's guess.
    """
    found: dict[str, Path] = {}
    twice = []
    for file in files:
        for name in _names(file):
            if name in found:
                twice.append(f"{name}: in {found[name].name} and in {file.name}")
            found[name] = file
    if twice or not found:
        listing = "\n  ".join(twice) or "no tensor there"
        raise MappingError(f"{len(twice)} fault(s) in the update's files:\n  {listing}")
    return found


def _header(file: Path, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a tensor in a file."""
    with reading(file) as opened:
        tensor = opened.get_slice(name)
        return tuple(tensor.get_shape()), SAFETENSORS_DTYPES.get(tensor.get_dtype(), "unknown")


def match_vocabulary(mapping: Mapping, rank_map: RankMap, found: dict[str, Path]) -> str:
    """The vocabulary whose needed sources are all in the files, with their shapes and dtypes checked.

    Raises:
        MappingError: lists every tensor missing, extra, or of another shape or dtype.
    """
    headers = {name: _header(file, name) for name, file in found.items()}
    best, faults = matching(mapping, headers, lambda s: headers[s.name][0] == s.shape)
    known = {source.name: source for source in best.sources}
    unused = set(best.unused)
    faults += [f"{name}: missing" for name in known.keys() - found.keys() - unused]
    faults += [f"{name}: not a parameter of this model" for name in found.keys() - known.keys() - unused]
    needed = {
        best.sources[w.source].name: rank_map.targets[w.target].dtype for w in rank_map.writes[best.name]
    }
    for name in sorted(known.keys() & found.keys()):
        shape, dtype = headers[name]
        if shape != known[name].shape:
            faults.append(f"{name}: shape {shape}, expected {known[name].shape}")
        if (to := needed.get(name)) is not None and dtype != to and (dtype, to) not in CASTS:
            faults.append(f"{name}: dtype {dtype} cannot be cast to {to} without loss of meaning")
    faults += [
        f"{name}: differs from {kept}, to which the server ties it"
        for name, kept in best.tied.items()
        if name in found and kept in found and not torch.equal(_read(found, name), _read(found, kept))
    ]
    if faults:
        listing = "\n  ".join(sorted(faults))
        raise MappingError(f"{len(faults)} fault(s) in the update for {mapping.model}:\n  {listing}")
    return best.name
