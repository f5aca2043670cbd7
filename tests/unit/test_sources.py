"""The two lists of names: read from a checkpoint's headers, and derived from a transformers config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import MappingError
from bridge.protocol.mapping import Source
from tests.support.models import build_checkpoint
from vllm_patching.sources import checkpoint_sources, transformers_names

safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")


class FakeLoader:
    """Has what the module relies on of vLLM's DefaultModelLoader, in its shapes."""

    Source = SimpleNamespace

    def __init__(self, files: dict[str, list[str]], *, use_safetensors: bool = True) -> None:
        self.files, self.use_safetensors = files, use_safetensors

    def _prepare_weights(self, path: str, *_: Any) -> tuple[Any, ...]:
        return path, self.files[path], self.use_safetensors, "index.json"

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self.files[source.model_or_path]:
            for name, tensor in torch.load(file).items():
                yield source.prefix + name, tensor

    def get_all_weights(self, config: Any, model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
        for path, prefix in ((config.model, ""), *getattr(model, "secondary", ())):
            yield from self._get_weights_iterator(
                self.Source(
                    model_or_path=path, revision=None, subfolder=None, prefix=prefix, fall_back_to_pt=True,
                    allow_patterns_overrides=None,
                    is_unused_weight=lambda name: name.startswith("mtp."),
                )
            )  # fmt: skip


def test_headers_are_read_in_file_order_with_prefixes_and_secondary_weights(tmp_path: Path) -> None:
    files = [str(tmp_path / f"model-{part}.safetensors") for part in (1, 2, 10)]
    for file, tensors in zip(
        files,
        ({"b": torch.zeros(2, 3)}, {"a": torch.zeros(4, dtype=torch.bfloat16)}, {"mtp.x": torch.zeros(1)}),
        strict=True,
    ):
        safetensors_torch.save_file(tensors, file)
    other = str(tmp_path / "other.safetensors")
    safetensors_torch.save_file({"s": torch.zeros((), dtype=torch.int64)}, other)
    loader = FakeLoader({"main": [files[2], files[1], files[0]], "extra": [other]})
    model = nn.Module()
    model.__dict__["secondary"] = [("extra", "enc.")]
    found = checkpoint_sources(loader, SimpleNamespace(model="main"), model)
    assert found == [
        Source(name="b", shape=(2, 3), dtype="float32"),
        Source(name="a", shape=(4,), dtype="bfloat16"),
        Source(name="enc.s", shape=(), dtype="int64"),
    ]
    assert "_get_weights_iterator" not in vars(loader)


def test_pickled_checkpoints_are_iterated(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2, 2)}, tmp_path / "m.bin")
    loader = FakeLoader({"main": [str(tmp_path / "m.bin")]}, use_safetensors=False)
    found = checkpoint_sources(loader, SimpleNamespace(model="main"), nn.Module())
    assert found == [Source(name="w", shape=(2, 2), dtype="float32")]


class Streamer:
    """As vLLM's RunaiModelStreamerLoader: helpers of the same names, which take something else."""

    def _prepare_weights(self, path: str, revision: str | None) -> list[str]:
        return [f"{path}@{revision}"]

    def _get_weights_iterator(self, path: str, revision: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self._prepare_weights(path, revision):
            yield file, torch.zeros(2)

    def get_all_weights(self, config: Any, _model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        return self._get_weights_iterator(config.model, config.revision)


def test_another_loader_is_asked_for_its_tensors() -> None:
    found = checkpoint_sources(Streamer(), SimpleNamespace(model="main", revision="r"), nn.Module())
    assert found == [Source(name="main@r", shape=(2,), dtype="float32")]


def test_a_name_in_two_files_and_a_loader_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for file in files:
        safetensors_torch.save_file({"w": torch.zeros(1)}, file)
    with pytest.raises(MappingError, match="'w' in more than one file"):
        checkpoint_sources(FakeLoader({"main": files}), SimpleNamespace(model="main"), nn.Module())
    with pytest.raises(MappingError, match="reads no checkpoint"):
        checkpoint_sources(SimpleNamespace(), SimpleNamespace(model="main"), nn.Module())


@pytest.mark.parametrize("kind", ["llama_tied", "qwen3_moe", "deepseek_v2", "mixtral", "gpt2"])
def test_the_model_in_memory_is_named_and_can_be_turned_into_its_checkpoint(
    kind: str, tmp_path: Path
) -> None:
    path = build_checkpoint(kind, tmp_path, dtype="float32")
    config = SimpleNamespace(
        model=str(path),
        hf_config=transformers.AutoConfig.from_pretrained(path),
        dtype=torch.float32,
        trust_remote_code=False,
    )
    names = transformers_names(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    state = model.state_dict()
    assert {s.name: (s.shape, s.dtype) for s in names.sources} == {
        name: (tuple(tensor.shape), "float32") for name, tensor in state.items()
    }
    ties = {"lm_head.weight": "model.embed_tokens.weight"} if kind == "llama_tied" else {}
    assert names.tied == ({"lm_head.weight": "transformer.wte.weight"} if kind == "gpt2" else ties)
    saved = dict(names.as_saved(state.items()))
    stored = safetensors_torch.load_file(path / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], stored[name]) for name in stored)


def test_a_config_that_transformers_cannot_build_says_why() -> None:
    config = SimpleNamespace(
        model="x", hf_config=transformers.ViTConfig(), dtype=torch.float32, trust_remote_code=False
    )
    with pytest.raises(MappingError, match="ViTConfig"):
        transformers_names(config)
