"""vLLM's weight-transfer calls, answered in the engine core when its backend is ``bridge``.

vLLM would send each of them to its workers, and wait there: no batch would run meanwhile, so no commit would
go through either, and a worker that raises leaves the replies of several ranks off by one. There is nothing
to do in a worker anyway. A call that asks the daemon, or waits for it, returns a future: vLLM's loop goes on,
and sends the answer, or the error, when there is one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from bridge.errors import ConfigError, RoundAborted, TransferError
from vllm_patching.channel import ask
from vllm_patching.compat import BACKEND

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 10.0
ANSWER_MARGIN_S = 10.0  # the daemon's own deadline comes first
_NOT_STARTED = "no weight update is under way: call start_weight_update first"

Info = TypeVar("Info", bound=msgspec.Struct)


class InitInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``init_info``. ``run`` names the server's run, as the trainer's mapping file has it; "" for any."""

    run: str = ""


class UpdateInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``update_info``. Without a ``version`` the first round that ends after the start is waited for.

    ``timeout_s`` is as long as vLLM's own HTTP client waits.
    """

    version: int | None = None
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 300.0


class WeightUpdates:
    """One engine core's weight-transfer calls; used by its busy loop's thread."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._before: dict[str, Any] | None = None  # the daemon's status when the present update was started
        self._answers: dict[str, Callable[..., Any]] = {
            "init_weight_transfer_engine": self._init,
            "start_weight_update": self._start,
            "start_draft_weight_update": self._start_draft,
            "update_weights": self._update,
            "finish_weight_update": self._finish,
            "shutdown_weight_transfer_engine": self._shutdown,
        }

    def answers(self, method: Any) -> bool:
        """Whether ``method`` is one of vLLM's weight-transfer calls."""
        return isinstance(method, str) and method in self._answers

    def answer(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``collective_rpc`` is to return; a future where the daemon has to be asked.

        Raises:
            ConfigError: the call has no place here, or its info cannot be understood. A future raises
                RendezvousError (no daemon answers), RoundAborted (the round failed; carries its reason) or
                TransferError (no round ended in time).
        """
        return self._answers[method](*args, **kwargs)

    def _init(self, init_info: Any) -> Future[list[None]]:
        info = _parse(init_info, InitInfo, "init_info")
        if info.run not in ("", self._run_dir.name):
            raise ConfigError(
                f"the trainer's mapping file is of run {info.run}, this server is run {self._run_dir.name}; "
                "set BRIDGE_LOGDIR (or BRIDGE_CONFIG) to this server's, as it is now"
            )
        return _in_background(self._status)

    def _start(self) -> Future[list[None]]:
        # Also where one is under way: a trainer that died in the middle must not lock out the next.
        def note() -> None:
            self._before = self._status()

        return _in_background(note)

    def _start_draft(self) -> None:
        raise ConfigError("the bridge sends no draft model; speculative decoding is refused at the start")

    def _update(self, update_info: Any) -> Future[list[None]]:
        info = _parse(update_info, UpdateInfo, "update_info")
        if (before := self._before) is None:
            raise ConfigError(_NOT_STARTED)

        def wait() -> None:
            try:
                self._wait(info, before)
            except Exception:
                if self._before is before:  # and no later start has taken its place
                    self._before = None  # as in vLLM's workers: an update that fails is over
                raise

        return _in_background(wait)

    def _finish(self) -> list[None]:
        if self._before is None:
            raise ConfigError(_NOT_STARTED)
        self._before = None
        return [None]

    def _shutdown(self) -> list[None]:
        self._before = None
        return [None]

    def _status(self) -> dict[str, Any]:
        return ask(self._run_dir, {"type": "status"}, timeout_s=STATUS_TIMEOUT_S)

    def _wait(self, info: UpdateInfo, before: dict[str, Any]) -> None:
        rounds = before["rounds"]
        order = {
            "type": "await_round",
            "ended": rounds["committed"] + rounds["aborted"],
            "aborted": rounds["aborted"],
            "daemon": before["pids"]["daemon"],
            "version": info.version,
            "timeout_s": info.timeout_s,
        }
        now = ask(self._run_dir, order, timeout_s=info.timeout_s + ANSWER_MARGIN_S)
        wanted = "the round" if info.version is None else f"version {info.version}"
        live, restarted = now["weight_version"], now["pids"]["daemon"] != before["pids"]["daemon"]
        if info.version is not None and live >= info.version:
            return
        served = now["detail"] if now["state"] == "torn" else f"version {live} is served on"
        if restarted:
            raise RoundAborted(f"{wanted}: the weight-updater daemon was started anew; {served}")
        if info.version is None and now["rounds"]["committed"] > rounds["committed"]:
            return
        if now["rounds"]["aborted"] > rounds["aborted"]:
            raise RoundAborted(f"{wanted} was not committed: {now['last_error']}; {served}")
        raise TransferError(
            f"waited {info.timeout_s:g} s for {wanted} to become live; {served}. The trainer's half "
            f"(trainer_send_weights, or bridge.broadcast_weights) sends it: {_trainer_of(now)}"
        )


def _trainer_of(status: dict[str, Any]) -> str:
    return f"connected is {status['trainer']}" if status["trainer"] else "no trainer is connected"


def _parse(given: Any, kind: type[Info], name: str) -> Info:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as err:
        fields = ", ".join(kind.__struct_fields__)
        raise ConfigError(f"{name} of the backend {BACKEND!r} takes {fields}, all optional: {err}") from err


def _in_background(work: Callable[[], object]) -> Future[list[None]]:
    """Do ``work`` in a thread that does not keep the engine from ending; the future has what it raises."""
    future: Future[list[None]] = Future()

    def run() -> None:
        try:
            work()
        except Exception as err:  # noqa: BLE001 - it is the caller's, who waits for the future
            future.set_exception(err)
        else:
            future.set_result([None])

    threading.Thread(target=run, name="bridge-weight-update", daemon=True).start()
    return future
