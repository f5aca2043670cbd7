"""``/bridge/*`` on vLLM's own API server: status, metrics, request versions, and the file fallback.

An endpoint plugin of vLLM (group ``vllm.endpoint_plugins``), off unless ``serve --http`` sets
``BRIDGE_HTTP=1``. vLLM's API-key middleware guards a fixed list of prefixes that ours is not among, so the
key is checked here: vLLM's own keys where there are any, else the job's secret from the mapping file.
"""

from __future__ import annotations

import asyncio
import hmac
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from bridge.errors import RendezvousError
from bridge.protocol import mapping as mapping_file
from bridge.protocol.decoding import UNREADABLE
from bridge.protocol.mapping import CONFIG_NAME
from vllm_patching import metrics, spans
from vllm_patching.channel import ask

STATUS_TIMEOUT_S = 10.0
UPDATE_TIMEOUT_S = 900.0
MAX_BODY_BYTES = 1 << 16


class WeightBridgeEndpoints:
    """What vLLM loads; ``vllm.plugins.endpoint_plugins.interface.EndpointPlugin``."""

    name = "weight_bridge"
    required_tasks = None

    def __init__(self) -> None:
        self._keys: list[str] = []

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes, each behind the key; none unless ``serve --http`` asked for them."""
        if os.environ.get("BRIDGE_HTTP") != "1":
            return
        guard = [Depends(self._authorize)]
        app.get("/bridge/status", dependencies=guard)(self._status)
        app.get("/bridge/metrics", dependencies=guard)(self._metrics)
        app.get("/bridge/requests/{request_id}", dependencies=guard)(self._request)
        app.post("/bridge/notify_update", dependencies=guard)(self._notify_update)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:  # noqa: ARG002 - vLLM's
        """Take over vLLM's API keys."""
        given = args.api_key or os.environ.get("VLLM_API_KEY") or []
        self._keys = [given] if isinstance(given, str) else list(given)

    def _authorize(self, request: Request) -> None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        keys = self._keys or [_job_secret()]
        known = any(hmac.compare_digest(token.encode(), key.encode()) for key in keys)
        if scheme.lower() != "bearer" or not known:
            raise HTTPException(
                401, "Unauthorized: /bridge needs vLLM's API key, or the job's secret if there is none"
            )

    async def _status(self) -> dict[str, Any]:
        return await asyncio.to_thread(_ask_daemon, {"type": "status"}, STATUS_TIMEOUT_S)

    async def _metrics(self) -> Response:
        text = metrics.render(await self._status())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _request(self, request_id: str) -> dict[str, Any]:
        found = spans.find(request_id)
        if not found:
            raise HTTPException(404, f"no finished request {request_id!r} among the last {spans.LIMIT}")
        return {"weight_versions": found}

    async def _notify_update(self, request: Request) -> JSONResponse:
        announced = _read_announcement(await _body_of(request))
        order = {"type": "notify_update", "path": announced.path, "version": announced.version}
        result = await asyncio.to_thread(_ask_daemon, order, UPDATE_TIMEOUT_S)
        if not result.get("ok"):
            # Not an HTTPException: vLLM makes every path in its text "<path>", and paths say what is wrong.
            why = result.get("error", "the daemon did not say why")
            return JSONResponse({"detail": why}, status_code=409)
        return JSONResponse(result)


class Announcement(msgspec.Struct, frozen=True):
    """The body of a POST to ``/bridge/notify_update``."""

    path: str
    version: int | None = None


async def _body_of(request: Request) -> bytes:
    """The request's body, as far as one may be long; vLLM itself sets no limit."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
    return body


def _read_announcement(body: bytes) -> Announcement:
    try:
        return msgspec.json.decode(body, type=Announcement)
    except UNREADABLE as err:
        raise HTTPException(400, f'expected {{"path": str, "version": int or absent}}: {err}') from err


def _job_secret() -> str:
    mapping = mapping_file.load(Path(os.environ["BRIDGE_LOGDIR"]) / CONFIG_NAME)
    if mapping.rendezvous is None:
        raise HTTPException(503, "the server has published no secret yet")
    return mapping.rendezvous.secret


def _ask_daemon(message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    try:
        return ask(Path(os.environ["BRIDGE_RUN_DIR"]), message, timeout_s=timeout_s)
    except RendezvousError as err:
        raise HTTPException(503, str(err)) from err
