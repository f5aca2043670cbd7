"""The gate before vLLM's API: no request comes in to be answered with weights that are not the newest.

A vLLM that was started again has the checkpoint's weights until the newest version comes from a peer or by
the trainer's next broadcast. The daemon says in a file of the run directory whether requests may come in,
and an ASGI middleware in each of vLLM's API servers (its option ``--middleware``) goes by it. A missing file
means no, so what cannot be written keeps out rather than lets in. Once open, the gate stays so as long as
this vLLM lives, whatever becomes of the daemon.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from bridge.errors import TransferError
from bridge.protocol.decoding import UNREADABLE
from bridge.protocol.mapping import write_atomically

Checkpoint = Literal["first", "never", "always"]
MIDDLEWARE = "vllm_patching.gate.GateMiddleware"
FILE_NAME = "gate"
SOON_S = 30.0  # how long a request waits for what comes by itself
LOOK_S = 0.05
RETRY_AFTER_S = 1
TRY_AGAIN_LATER = 1013  # the websocket's close code for it

# Requests that make vLLM run no model, beside all that only read. Any other waits, also one we do not know.
PASS = frozenset(
    {
        "/abort_requests", "/bridge/notify_update", "/collective_rpc", "/detokenize",
        "/fault_tolerance/apply", "/finish_weight_update", "/inference/v1/abort_requests",
        "/init_weight_transfer_engine", "/is_scaling_elastic_ep", "/pause", "/ping",
        "/release_kv_cache_memory", "/reset_encoder_cache", "/reset_mm_cache", "/reset_prefix_cache",
        "/resume", "/scale_elastic_ep", "/shutdown_weight_transfer_engine", "/sleep",
        "/start_draft_weight_update", "/start_profile", "/start_weight_update", "/stop_profile",
        "/tokenize", "/update_weight_version", "/update_weights", "/v1/load_lora_adapter",
        "/v1/messages/count_tokens", "/v1/unload_lora_adapter", "/wake_up", "/weight_checker",
    }
)  # fmt: skip
PASS_ENDINGS = ("/render", "/derender", "/cancel")
READING = ("GET", "HEAD", "OPTIONS")


class Word(msgspec.Struct, frozen=True):
    """What the daemon says: whether requests come in, else why not, and whether that ends by itself."""

    open: bool
    why: str = ""
    soon: bool = False


NOT_SAID = Word(open=False, why="the weight-updater daemon has not said what is served yet", soon=True)


def read(path: Path) -> Word:
    """The word in the file at ``path``; a closed gate's where there is none, or another's."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Word)
    except (OSError, *UNREADABLE):
        return NOT_SAID


class Gate:
    """The daemon's side. Closed by whoever registers a new vLLM, opened by the daemon's one thread."""

    def __init__(self, run_dir: Path) -> None:
        """Take over what an earlier daemon of the launch has said: vLLM lives on behind it."""
        self._path = run_dir / FILE_NAME
        self._lock = threading.Lock()
        self._vllm: object = None  # whose gate it is
        self.word = read(self._path)

    def close(self, vllm: object) -> None:
        """A new vLLM registers, ``vllm`` stands for it; it is answered behind this.

        Raises:
            TransferError: the gate of the one before is open, and cannot be closed.
        """
        with self._lock:
            self._vllm, self.word = vllm, NOT_SAID
            try:
                self._path.unlink(missing_ok=True)
            except OSError as err:
                raise TransferError(
                    f"{self._path} cannot be removed, so requests would be answered: {err}"
                ) from err

    def found(self, vllm: object) -> None:
        """A vLLM was there before this daemon; what the one before has said of it stands."""
        with self._lock:
            self._vllm = vllm

    def say(self, word: Word, vllm: object) -> None:
        """Say it to the API servers of ``vllm``, unless the gate is open already, or another's by now.

        Raises:
            TransferError: it could not be written down; requests are kept out as before.
        """
        with self._lock:
            if self.word.open or self._vllm is not vllm or word == self.word == read(self._path):
                return
            try:
                self._write(word)
            except TransferError as err:
                self.word = Word(open=False, why=str(err), soon=True)  # for status
                raise
            self.word = word

    def keep(self, vllm: object) -> None:
        """Write the open gate's file again, if somebody has emptied or removed it: one may not have read it.

        Raises:
            TransferError: it could not be written down.
        """
        if not read(self._path).open:
            with self._lock:
                if self.word.open and self._vllm is vllm:
                    self._write(self.word)

    def _write(self, word: Word) -> None:
        try:
            write_atomically(self._path, msgspec.json.encode(word), durable=False)
        except OSError as err:
            raise TransferError(f"the gate's file {self._path} cannot be written: {err.strerror}") from err


def forget(run_dir: Path) -> None:
    """A launch begins or ends: what an earlier one said is of no use to another."""
    (run_dir / FILE_NAME).unlink(missing_ok=True)


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class GateMiddleware:
    """vLLM's side: pure ASGI, in front of everything else. Costs nothing once the gate was seen open."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._path = Path(os.environ["BRIDGE_RUN_DIR"]) / FILE_NAME
        self._open = False  # an open gate stays open, and another vLLM has other API servers
        self._looking: asyncio.Task[Word] | None = None  # for all that wait

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand the request on, or answer it: 503 with vLLM's form of an error, and ``Retry-After``."""
        if self._open or scope["type"] not in ("http", "websocket") or passes(scope):
            return await self._app(scope, receive, send)
        word = read(self._path)
        if not word.open and word.soon:
            word = await self._wait(scope.get("app"))
        if word.open:
            self._open = True
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})  # or it is closed with HTTP's 403, and without a reason
            return await send({"type": "websocket.close", "code": TRY_AGAIN_LATER, "reason": word.why[:120]})
        return await _refuse(send, word.why)

    async def _wait(self, app: Any) -> Word:
        """The word when it is final, or the newest behind ``SOON_S``, or when the API server is to end."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(app))
        try:
            return await asyncio.wait_for(asyncio.shield(self._looking), SOON_S)
        except TimeoutError:
            return read(self._path)

    async def _look(self, app: Any) -> Word:
        while True:
            word = read(self._path)
            if word.open or not word.soon or _is_to_end(app):
                return word
            await asyncio.sleep(LOOK_S)


def _is_to_end(app: Any) -> bool:
    """Whether uvicorn, whose server vLLM keeps in the app's state, waits for the last requests."""
    server = getattr(getattr(app, "state", None), "server", None)
    return bool(getattr(server, "should_exit", False))


def passes(scope: Message) -> bool:
    """Whether a request makes vLLM run no model."""
    if scope.get("method") in READING:
        return True
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in PASS or path.endswith(PASS_ENDINGS)


async def _refuse(send: Send, why: str) -> None:
    error = {"message": why, "type": "ServiceUnavailableError", "param": None, "code": 503}
    body = msgspec.json.encode({"error": error})
    headers = [
        (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % RETRY_AFTER_S),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
