"""The demo's client of the OpenAI API: completions for training, streams in flight, answers to compare."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

REQUEST_TIMEOUT_S = 120.0
HEALTH_POLL_S = 0.2
ANSWER_TOKENS = 64


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Client:
    """One server, by URL and model name."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            data=json.dumps({"model": self.model, **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S)

    def complete(self, prompts: list[list[int]], **sampling: Any) -> list[dict[str, Any]]:
        """Completions of token-id prompts, in order; each has ``token_ids`` and, if asked, ``logprobs``."""
        with self._post({"prompt": prompts, "return_token_ids": True, **sampling}) as response:
            choices: list[dict[str, Any]] = json.load(response)["choices"]
        return sorted(choices, key=lambda choice: int(choice["index"]))

    def stream(self, prompt: list[int], **sampling: Any) -> Iterator[tuple[float, int]]:
        """Yield arrival time (monotonic seconds) and number of tokens of each chunk of one completion."""
        body = {"prompt": prompt, "stream": True, "return_token_ids": True, **sampling}
        with self._post(body) as response:
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise OSError(line.decode())
                for choice in chunk["choices"]:
                    yield time.monotonic(), len(choice.get("token_ids") or ())

    def greedy_answers(self) -> list[dict[str, Any]]:
        """Tokens and logprobs for eight fixed prompts, 64 tokens each, one prompt at a time."""
        answers = []
        for seed in range(8):
            prompt = [1] + [4 + (seed * 13 + i * 7) % 100 for i in range(20)]
            (choice,) = self.complete(
                [prompt], max_tokens=ANSWER_TOKENS, temperature=0.0, logprobs=0, ignore_eos=True
            )
            answers.append(
                {"token_ids": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"]}
            )
        return answers

    def wait_healthy(self, timeout_s: float, process: subprocess.Popen[bytes]) -> None:
        """Wait for ``/health``.

        Raises:
            TimeoutError: the server is not up in time, or its process ended.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=HEALTH_POLL_S * 10).close()
            except OSError:
                threading.Event().wait(HEALTH_POLL_S)
            else:
                return
        raise TimeoutError(
            f"no healthy server at {self.url} within {timeout_s:g} s (exit code {process.poll()})"
        )


class Streams:
    """Keeps a few streaming requests in flight in threads, and keeps the times of their tokens."""

    def __init__(self, client: Client, count: int, *, max_tokens: int) -> None:
        self._client = client
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._arrivals: list[list[tuple[float, int]]] = [[] for _ in range(count)]
        self.finished = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, index: int) -> None:
        prompt = [1, 4 + index, 9 + index]
        while not self._stop.is_set():
            try:
                received = 0
                for at, count in self._client.stream(
                    prompt, max_tokens=self._max_tokens, temperature=1.0, ignore_eos=True
                ):
                    received += count
                    with self._lock:
                        self._arrivals[index].append((at, count))
                if received < self._max_tokens:
                    raise OSError(f"a stream ended after {received} of {self._max_tokens} tokens")
            except (OSError, urllib.error.URLError) as err:
                self.failures.append(str(err))
                return
            self.finished += 1

    def measure(self, since: float) -> tuple[float, float]:
        """Tokens per second, and the longest gap of any stream in seconds, from ``since`` to now."""
        now = time.monotonic()
        with self._lock:
            recent = [[item for item in arrivals if item[0] >= since] for arrivals in self._arrivals]
        tokens = sum(count for arrivals in recent for _, count in arrivals)
        gaps = [b[0] - a[0] for arrivals in recent for a, b in itertools.pairwise(arrivals)]
        return tokens / (now - since), max(gaps, default=0.0)

    def stop(self) -> None:
        """Let the requests in flight finish, and start no more."""
        self._stop.set()
        for thread in self._threads:
            thread.join(REQUEST_TIMEOUT_S)
