"""What serving tests compare: tokens with a fresh server's, flips, and requests kept in flight."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any

from tests.support.serving import Api, Server, prompts, wait_until, whole_lines

SINGLE = "model.layers.1.mlp.down_proj.weight"

DOCUMENT = [1] + [3 + (i * i * 7 + i) % 90 for i in range(300)]  # more than two KV blocks of 128 tokens


def answers(api: Api) -> dict[str, Any]:
    """What is compared: the eight prompts of 64 tokens, and one prompt long enough to be cached."""
    return {"greedy": api.greedy(), "document": ask_document(api)}


def own_answers(model: Any, *, num_prompts: int = 4, tokens: int = 16) -> list[list[int]]:
    """Greedy tokens of a transformers model by its own forward, for the first of the fixed prompts."""
    import torch

    found = []
    with torch.no_grad():
        for prompt in prompts(num_prompts):
            said = list(prompt)
            for _ in range(tokens):
                said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
            found.append(said[len(prompt) :])
    return found


def ask_document(api: Api) -> list[int]:
    (choice,) = api.complete(DOCUMENT, max_tokens=32, temperature=0.0, ignore_eos=True)
    return list(choice["token_ids"])


def assert_equal(live: list[dict[str, Any]], fresh: list[dict[str, Any]], *, tolerance: float) -> None:
    """The same tokens everywhere, and logprobs within ``tolerance``."""
    assert [a["tokens"] for a in live] == [b["tokens"] for b in fresh]
    pairs = [
        (x, y)
        for a, b in zip(live, fresh, strict=True)
        for x, y in zip(a["logprobs"], b["logprobs"], strict=True)
    ]
    assert max(abs(x - y) for x, y in pairs) <= tolerance


def edited(source: Path, target: Path, name: str, value: float) -> Path:
    """A copy of a checkpoint with one parameter filled with ``value``."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name].fill_(value)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def flips(server: Server, rank: int) -> list[tuple[int, int]]:
    """(batch, version) of every flip of one rank."""
    return flips_of(server.logdir, rank, up_to=server.status()["ranks"][rank]["version"])


def flips_of(logdir: Path, rank: int, *, up_to: int) -> list[tuple[int, int]]:
    """The same from a log directory; a thread writes them down, so the newest may take a moment."""
    path = logdir / f"flips-rank{rank}.jsonl"

    def read() -> list[tuple[int, int]]:
        return [(row["batch"], row["version"]) for row in map(json.loads, whole_lines(path))]

    wait_until(
        f"rank {rank}'s flip to version {up_to} in {path}",
        lambda: up_to in (0, *(version for _, version in read())),
        timeout_s=30,
    )
    return read()


class Streams:
    """Requests kept in flight until told to stop: ``width`` at a time, the longest of ``tokens`` tokens.

    They differ in length, or all of them would end with one batch, and leave the engine idle until the next
    ones have come.
    """

    def __init__(self, api: Api, *, width: int, tokens: int) -> None:
        self._api = api
        self._tokens = [tokens - index * (tokens // (4 * width)) for index in range(width)]
        self._stop = threading.Event()
        self.finished: list[tuple[str, int]] = []
        self._counts = [0] * width
        self.failures: list[str] = []
        self.started = threading.Barrier(width + 1)
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(width)]
        for thread in self._threads:
            thread.start()
        self.started.wait(60)

    def _run(self, index: int) -> None:
        first, tokens = True, self._tokens[index]
        while first or not self._stop.is_set():
            request = uuid.uuid4().hex
            prompt = [1, *(3 + (index * 31 + i * 7) % 90 for i in range(12))]
            sampling = {"max_tokens": tokens, "temperature": 1.0, "seed": index, "ignore_eos": True}
            count, reason = 0, None
            try:
                for _, choice in self._api.stream(prompt, headers={"X-Request-Id": request}, **sampling):
                    count += len(choice.get("token_ids") or ())
                    self._counts[index] += len(choice.get("token_ids") or ())
                    reason = choice.get("finish_reason") or reason
                    if first:
                        self.started.wait(60)
                        first = False
            except OSError as err:
                self.failures.append(f"request {index}: {err}")
                return
            if reason != "length" or count != tokens:
                self.failures.append(f"request {index}: {count} of {tokens} tokens, ended by {reason}")
            self.finished.append((request, count))

    @property
    def produced(self) -> int:
        """Tokens that have come so far, of all requests."""
        return sum(self._counts)

    def alive(self) -> list[bool]:
        """Which of the requests are in flight."""
        return [thread.is_alive() for thread in self._threads]

    def stop(self) -> None:
        """Let those in flight finish."""
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()


def assert_labels_in_order(server: Server, finished: list[tuple[str, int]]) -> int:
    """Versions of a request's tokens never decrease and leave no token out; how many saw more than one."""
    spanning = 0
    for request, count in finished:
        code, text = server.call(f"/bridge/requests/{request}")
        assert code == 200, text
        (spans,) = json.loads(text)["weight_versions"].values()
        numbers = [int(span["weight_version"]) for span in spans]
        assert numbers == sorted(numbers)
        assert spans[0]["start"] == 0
        assert spans[-1]["end"] == count
        assert all(a["end"] == b["start"] for a, b in itertools.pairwise(spans))
        spanning += len(numbers) > 1
    return spanning
