"""The names a trainer may send: those of the checkpoint's files, and those of the model in memory.

Only shapes and dtypes are read, never a weight. Loader and model come in as parameters: what is touched of
them is ``get_all_weights`` of any loader, and ``Source``, ``_get_weights_iterator`` and ``_prepare_weights``
of vLLM's ``DefaultModelLoader``, whose names and roles are the same in 0.26 to 0.33.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bridge.errors import MappingError
from bridge.protocol.mapping import Source
from vllm_patching.tracing import dtype_name

SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def checkpoint_sources(loader: Any, model_config: Any, model: nn.Module) -> list[Source]:
    """Names, shapes and dtypes of the checkpoint's tensors, in the order in which vLLM's loader reads them.

    The list is the same on every rank: a loader's filter for local experts is not applied, since the indices
    of this list are part of the mapping.

    Args:
        loader: vLLM's model loader, after it has loaded ``model``.
        model_config: vLLM's ``ModelConfig``.
        model: the loaded model; may name secondary weights.

    Raises:
        MappingError: the loader reads no checkpoint (dummy weights), a name occurs twice, or a tensor has a
            dtype below one byte.
    """
    if not hasattr(loader, "get_all_weights"):
        raise MappingError(
            f"{type(loader).__name__} reads no checkpoint tensors by name, so the checkpoint's names are "
            "unknown; use --load-format auto or safetensors, or send the names of the model in memory"
        )
    found: dict[str, Source] = {}
    for source in _loader_tensors(loader, model_config, model):
        if source.name in found:
            raise MappingError(
                f"the checkpoint {model_config.model!r} holds {source.name!r} in more than one file; "
                "remove the duplicate, so that it is clear which one counts"
            )
        found[source.name] = source
    return list(found.values())


def _loader_tensors(loader: Any, model_config: Any, model: nn.Module) -> Iterator[Source]:
    if not hasattr(type(loader), "Source"):  # others have helpers of these names that take something else
        yield from _iterated(loader.get_all_weights(model_config, model))
        return
    for part in _checkpoint_parts(loader, model_config, model):
        arguments = (
            part.model_or_path, part.subfolder, part.revision, part.fall_back_to_pt,
            part.allow_patterns_overrides,
        )  # fmt: skip
        _, files, use_safetensors, *_ = loader._prepare_weights(*arguments)
        if use_safetensors:
            yield from _headers(files, part.prefix, getattr(part, "is_unused_weight", None))
        else:
            yield from _iterated(loader._get_weights_iterator(part))


def _checkpoint_parts(loader: Any, model_config: Any, model: nn.Module) -> list[Any]:
    """The primary and secondary ``Source``s that the loader would iterate, as vLLM builds them itself."""
    parts: list[Any] = []

    def collect(part: Any) -> Iterator[tuple[str, torch.Tensor]]:
        parts.append(part)
        return iter(())

    with _shadowed(loader, "_get_weights_iterator", collect):
        for _ in loader.get_all_weights(model_config, model):
            pass
    return parts


@contextlib.contextmanager
def _shadowed(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Hide a method of one object for a while."""
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        delattr(owner, name)


def _iterated(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Source]:
    for name, tensor in weights:
        yield Source(name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))


def _natural_key(path: str) -> list[Any]:
    """Part 10 comes after part 9, as in vLLM."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", Path(path).name)]


def _headers(files: Iterable[str], prefix: str, is_unused: Any) -> Iterator[Source]:
    from safetensors import safe_open

    for file in sorted(files, key=_natural_key):
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            if is_unused is not None and names and all(is_unused(name) for name in names):
                continue  # vLLM does not open such a file either
            for name in names:
                tensor = opened.get_slice(name)
                kind = tensor.get_dtype()
                if kind not in SAFETENSORS_DTYPES:
                    raise MappingError(
                        f"{file}: {name} has the dtype {kind}, whose elements share bytes; "
                        "quantized checkpoints are not supported"
                    )
                yield Source(
                    name=prefix + name, shape=tuple(tensor.get_shape()), dtype=SAFETENSORS_DTYPES[kind]
                )


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A model as transformers holds it in memory.

    ``as_saved`` turns named tensors (those of ``sources``, in any order) into what ``save_pretrained`` would
    write to the checkpoint's files, by moving elements only; hand it to ``tracing.trace`` as ``prepare``.
    ``tied`` are further names of one tensor, each with the name that a checkpoint keeps.
    """

    sources: tuple[Source, ...]
    as_saved: Callable[[Iterable[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)


def transformers_sources(model_config: Any) -> list[Source]:
    """``transformers_names(model_config).sources``, for loaders that understand these names themselves."""
    return list(transformers_names(model_config).sources)


def transformers_names(model_config: Any) -> InMemory:
    """The model as transformers holds it in memory: what a trainer would send.

    Its names are its parameters and persistent buffers, tied names included; its dtypes are those of the
    served model. No memory is allocated. transformers fuses some tensors (experts, since version 5), and few
    of vLLM's loaders take the fused names; but transformers itself can undo the fusion: that is how it saves.

    Args:
        model_config: vLLM's ``ModelConfig``; its ``trust_remote_code`` decides whether code that comes with
            the checkpoint may run.

    Raises:
        MappingError: transformers cannot build this model from its config; says why.
    """
    import transformers

    config = copy.deepcopy(model_config.hf_config)  # building a model writes to its config
    trust = bool(model_config.trust_remote_code)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=model_config.dtype, trust_remote_code=trust
            )
    except Exception as err:  # whatever remote or unknown model code raises, the caller records the reason
        raise MappingError(
            f"transformers {transformers.__version__} cannot build {model_config.model!r} from its config "
            f"({type(config).__name__}): {type(err).__name__}: {err}"
        ) from err
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    sources = tuple(
        Source(name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))
        for name, tensor in state.items()
    )
    kept: dict[int, str] = {}
    tied = getattr(model, "all_tied_weights_keys", {})  # name -> the name it is tied to
    for name in sorted(state, key=lambda name: name in tied):  # the name that a checkpoint keeps comes first
        kept.setdefault(id(state[name]), name)
    other_names = {name: kept[id(tensor)] for name, tensor in state.items() if kept[id(tensor)] != name}
    return InMemory(sources, functools.partial(_as_saved, model, frozenset(kept.values())), other_names)


def _as_saved(
    model: Any, kept: frozenset[str], weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Undo what transformers fused and renamed while loading; drop tied duplicates, as its saving does."""
    state = {name: tensor for name, tensor in weights if name in kept}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 holds every tensor under its name in the files
        yield from state.items()
        return
    yield from revert_weight_conversion(model, state).items()
