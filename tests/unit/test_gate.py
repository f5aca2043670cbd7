"""The gate before vLLM's API: its file, the ASGI middleware, and which of vLLM's own routes pass."""

from __future__ import annotations

import asyncio
import importlib
import json
import pkgutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.errors import TransferError
from vllm_patching import gate
from vllm_patching.gate import FILE_NAME, PASS, Gate, GateMiddleware, Word, passes

WHY = "the newest version is 3; it comes with the trainer's next broadcast of the whole model"
# What runs the model, of all vLLM's routes that are no mere question.
RUN_THE_MODEL = {
    "/classify", "/cohere/v2/chat", "/generative_scoring", "/inference/v1/generate", "/invocations",
    "/pooling", "/rerank", "/score", "/v1/audio/transcriptions", "/v1/audio/translations",
    "/v1/chat/completions",
    "/v1/chat/completions/batch", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/realtime",
    "/v1/rerank", "/v1/responses", "/v1/score", "/v1/systemone", "/v2/embed", "/v2/rerank",
}  # fmt: skip
# Routes that vLLM makes in a function, as they are wanted.
MADE_WHEN_ASKED_FOR = {"/ping", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}


class Served:
    """vLLM's API behind the gate, asked as uvicorn asks it."""

    def __init__(self) -> None:
        self.came: list[str] = []
        self.middleware = GateMiddleware(self.api)

    async def api(self, scope: Any, _receive: Any, send: Any) -> None:
        self.came.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"tokens"})

    async def call(self, path: str, **scope: Any) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(dict(message))

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        await self.middleware({"type": "http", "method": "POST", "path": path, **scope}, receive, send)
        return sent

    def ask(self, path: str = "/v1/completions", **scope: Any) -> list[dict[str, Any]]:
        return asyncio.run(self.call(path, **scope))


def keep_out(run_dir: Path) -> None:
    one, vllm = Gate(run_dir), object()
    one.close(vllm)
    one.say(Word(open=False, why=WHY), vllm)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRIDGE_RUN_DIR", str(tmp_path))
    return tmp_path


def test_a_request_that_is_kept_out_hears_why(run_dir: Path) -> None:
    keep_out(run_dir)
    served = Served()
    start, body = served.ask()
    assert served.came == []
    assert start["status"] == 503
    headers = dict(start["headers"])
    assert headers[b"retry-after"] == b"1"
    assert headers[b"content-length"] == str(len(body["body"])).encode()
    error = json.loads(body["body"])["error"]
    assert (error["message"], error["code"], error["type"]) == (WHY, 503, "ServiceUnavailableError")
    accepted, closed = served.ask("/v1/realtime", type="websocket")
    assert accepted["type"] == "websocket.accept", "or uvicorn answers with 403"
    assert (closed["type"], closed["code"]) == ("websocket.close", 1013)
    assert closed["reason"] in WHY
    assert served.came == []


def test_what_runs_no_model_passes_a_closed_gate(run_dir: Path) -> None:
    keep_out(run_dir)
    served = Served()
    asked = ["/pause", "/resume", "/tokenize", "/bridge/notify_update", "/v1/completions/render"]
    for path in asked:
        assert served.ask(path)[0]["status"] == 200
    assert served.ask("/health", method="GET")[0]["status"] == 200
    assert served.ask("/base/pause", root_path="/base")[0]["status"] == 200
    assert served.ask("/base/v1/completions", root_path="/base")[0]["status"] == 503
    asyncio.run(served.middleware({"type": "lifespan", "path": ""}, None, _drop))  # type: ignore[arg-type]
    assert served.came == [*asked, "/health", "/base/pause", ""]


async def _drop(_: Any) -> None:
    pass


def test_an_open_gate_stays_open_whatever_is_said(run_dir: Path) -> None:
    one, vllm = Gate(run_dir), object()
    one.close(vllm)
    one.say(Word(open=True), vllm)
    one.say(Word(open=False, why=WHY), vllm)
    assert Served().ask()[0]["status"] == 200
    after = Gate(run_dir)  # another daemon's
    after.found(vllm)
    after.say(Word(open=False, why=WHY), vllm)
    served = Served()
    assert served.ask()[0]["status"] == 200
    (run_dir / FILE_NAME).unlink()  # as a cleaner of old files does
    assert served.ask()[0]["status"] == 200
    after.keep(vllm)
    assert Served().ask()[0]["status"] == 200


def test_a_new_vllm_finds_it_closed_and_what_is_said_of_the_last_one_too_late(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "SOON_S", 0.2)
    one, first, second = Gate(run_dir), object(), object()
    one.close(first)
    one.say(Word(open=True), first)
    one.close(second)
    one.say(Word(open=True), first)
    assert Served().ask()[0]["status"] == 503
    one.say(Word(open=True), second)
    assert Served().ask()[0]["status"] == 200


def test_what_comes_by_itself_is_waited_for(run_dir: Path) -> None:
    one, vllm, served = Gate(run_dir), object(), Served()
    one.close(vllm)
    asked = threading.Event()
    read = gate.read

    def see(path: Path) -> Word:
        asked.set()
        return read(path)

    async def both() -> list[dict[str, Any]]:
        pending = asyncio.create_task(served.call("/v1/completions"))
        await asyncio.to_thread(asked.wait, 10)
        assert served.came == []
        one.say(Word(open=False, why=WHY, soon=True), vllm)
        one.say(Word(open=True), vllm)
        return await asyncio.wait_for(pending, 10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "read", see)
        assert asyncio.run(both())[0]["status"] == 200


def test_a_word_is_said_again_if_its_file_is_gone_and_a_stray_process_shuts_no_living_vllm_out(
    run_dir: Path,
) -> None:
    one, living, stray = Gate(run_dir), object(), object()
    one.close(living)
    for _ in range(2):
        one.say(Word(open=False, why=WHY), living)
        assert gate.read(run_dir / FILE_NAME).why == WHY
        (run_dir / FILE_NAME).write_bytes(b"")
    one.close(stray)
    one.found(living)
    one.say(Word(open=True), living)
    assert Served().ask()[0]["status"] == 200


def test_who_waits_holds_up_no_end_of_the_api_server(run_dir: Path) -> None:
    one, vllm, served = Gate(run_dir), object(), Served()
    one.close(vllm)
    server = SimpleNamespace(should_exit=False)
    app = SimpleNamespace(state=SimpleNamespace(server=server))

    async def end() -> list[dict[str, Any]]:
        pending = asyncio.create_task(served.call("/v1/completions", app=app))
        while served.middleware._looking is None:
            await asyncio.sleep(0)
        server.should_exit = True
        return await asyncio.wait_for(pending, 10)  # far below SOON_S

    assert asyncio.run(end())[0]["status"] == 503


def test_a_thousand_requests_that_wait_read_the_file_as_often_as_one(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, vllm, served = Gate(run_dir), object(), Served()
    one.close(vllm)
    read, reads = gate.read, list[Path]()
    waiting = threading.Event()

    def count(path: Path) -> Word:
        reads.append(path)
        if len(reads) > 1010:  # once for each that comes, and then for all together
            waiting.set()
        return read(path)

    async def all_of_them() -> list[list[dict[str, Any]]]:
        pending = [asyncio.create_task(served.call("/v1/completions")) for _ in range(1000)]
        await asyncio.to_thread(waiting.wait, 20)
        one.say(Word(open=True), vllm)
        return await asyncio.wait_for(asyncio.gather(*pending), 10)

    monkeypatch.setattr(gate, "read", count)
    assert {sent[0]["status"] for sent in asyncio.run(all_of_them())} == {200}
    assert len(reads) < 1100


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b'{"open": 1}', b"[" * 10_000, b'{"open": "true"}', None]
)
def test_what_says_nothing_keeps_out(
    run_dir: Path, data: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "SOON_S", 0.1)
    if data is not None:
        (run_dir / FILE_NAME).write_bytes(data)
    start, body = Served().ask()
    assert start["status"] == 503
    assert b"has not said" in body["body"]


def test_an_open_gate_that_cannot_be_closed_lets_no_new_vllm_register(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Gate(run_dir)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(TransferError, match="Read-only file system"):
        one.close(object())


def _routes() -> set[tuple[str, frozenset[str]]]:
    """Path and methods of every route in vLLM's own routers."""
    import vllm.entrypoints
    from fastapi import APIRouter

    found = set()
    for module in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
        if module.name.rpartition(".")[2] != "api_router":
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, APIRouter):
                found |= {
                    (r.path, frozenset(getattr(r, "methods", None) or {"WEBSOCKET"})) for r in value.routes
                }
    return found


def test_each_route_of_vllm_is_known_to_run_the_model_or_not() -> None:
    asking = {path for path, methods in _routes() if not methods <= set(gate.READING)}
    assert len(asking) > 20, "vLLM keeps its routes elsewhere now"
    pass_ = {path for path in asking if passes({"type": "http", "method": "POST", "path": path})}
    unknown = asking - pass_ - RUN_THE_MODEL
    assert not unknown, "they wait at a closed gate: list them there if they run no model, else here"
    assert not pass_ & RUN_THE_MODEL
    assert PASS - asking == {"/bridge/notify_update", *MADE_WHEN_ASKED_FOR}, "no route of vLLM's"
