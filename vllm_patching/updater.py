"""One inference rank's updater: receives a version into the inactive half, and never touches the live one.

With ``--staging in-place`` there is only the live one: then it checks all it can, asks the daemon for leave,
and writes while the engine stands still.

A child of the daemon, in a process of its own, so that a transfer that hangs can be ended without a trace:
the daemon kills it and starts another. It takes orders over the node's socket and meets the trainer ranks
in the data group.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch

from bridge import flight, telemetry
from bridge.errors import BridgeError, ProtocolError, TransferError
from bridge.protocol.mapping import Mapping, RankMap
from bridge.wire import rendezvous
from vllm_patching import build, compat, update_files
from vllm_patching.arena import Halves, adopt
from vllm_patching.channel import Channel, ChannelClosed
from vllm_patching.control_page import ControlPage
from vllm_patching.fixed_arena import COPY
from vllm_patching.intake import Intake, Join
from vllm_patching.staging import Staging, writes_by_source

logger = logging.getLogger("vllm_patching.updater")  # __name__ is __main__ here

CONNECT_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1


class Updater:
    """State of one updater process."""

    def __init__(
        self,
        rank: int,
        mapping: Mapping,
        halves: Halves,
        channel: Channel,
        *,
        arena: str,
        batches: Callable[[], int] | None = None,
    ) -> None:
        """``arena`` is the kind that the halves belong to; ``batches`` says how many the worker has begun."""
        self.rank = rank
        self.epoch: int | None = None
        self._channel = channel
        self._copies = arena == COPY
        self._in_step = False  # whether the half to be filled holds what is served
        self._model_in_step = False  # whether it does but for the adapters
        self.mapping = mapping
        self.rank_map: RankMap = mapping.ranks[rank]
        self.halves = halves
        decodes = len(halves.halves) == 2  # while a round is under way
        self.intake = Intake(rank, mapping, halves.device, batches=batches if decodes else None)
        self._shelves = {name: _span(self.rank_map, name) for name in _adapters(mapping)}

    def prepare(self) -> None:
        """Pay now what the first round would else wait for: importing vLLM's packing, compiling a kernel."""
        if any(target.transform for target in self.rank_map.targets):
            compat.import_transforms()
        self.intake.prepare()

    def join(self, order: Join) -> dict[str, Any]:
        """Meet the trainers of a new epoch."""
        self.epoch = order.epoch
        telemetry.stand(epoch=order.epoch, version=None)
        return {"type": "joined", "links": self.intake.join(order)}

    def stage(
        self, *, joint: str, plan_digest: str, half: int, leave_s: float = 0.0, refuse_parts: str = ""
    ) -> dict[str, Any]:
        """Receive one whole version into half ``half``.

        Args:
            joint: key of the joint layout.
            plan_digest: trainer rank 0's, in hex.
            half: where to.
            leave_s: above 0 if the half is live: how long to wait for leave to write it.
            refuse_parts: why a part of the weights may not be laid over the live half, if so: it is torn, or
                not the newest version.

        Raises:
            TransferError: plan digests differ, a peer was lost, or a checksum does not match.
        """
        plan, description = self.intake.plan(joint, plan_digest)
        adapter, follows = self.intake.adapter(joint), self.intake.follows(joint)
        if refuse_parts and (description.partial or follows):
            raise TransferError(f"a part of the parameters cannot repair the weights: {refuse_parts}")
        self._ask_leave(leave_s)
        start = time.perf_counter()
        staging, served = self._staging(half, partial=description.partial, follows=follows)
        if adapter and not follows:  # what of it is not sent is zero: a lower rank, fewer layers
            self.halves.halves[half][self._shelves[adapter]].zero_()
            self.halves.synchronize()
        nbytes = self.intake.receive(plan, joint, staging, served)
        staging.finish()
        self.halves.synchronize()
        self._model_in_step = bool(adapter)  # by the time of the next order, this half is the live one
        self._in_step = self._copies  # by the time of the next order, the flip has made both halves equal
        seconds = time.perf_counter() - start
        return {"bytes": nbytes, "seconds": seconds, "transport": self.intake.transport}

    def _ask_leave(self, leave_s: float) -> None:
        """Nothing is left but to write: over live weights, wait until the engine stands still.

        Raises:
            TransferError: no leave came.
            ChannelClosed: the daemon died.
        """
        if not leave_s:
            return
        self._channel.send({"type": "poised"})
        self._channel.sock.settimeout(leave_s)
        try:
            message, _ = self._channel.receive()
        except TimeoutError:
            raise TransferError(
                f"updater {self.rank} got no leave to write within {leave_s:g} s from the daemon (pid "
                f"{self._channel.pid}); nothing was written"
            ) from None
        finally:
            self._channel.sock.settimeout(None)
        if message["type"] != "write":
            raise ProtocolError(
                f"updater {self.rank} waits for leave to write and was told {message['type']!r}"
            )

    def _staging(self, half: int, *, partial: bool, follows: bool = False) -> tuple[Staging, Staging | None]:
        """Where a round lands; and what is served, if the round itself brings the half up to date with it.

        The inactive half is a version old. Before a part of it changes, it is made equal to the live one;
        where a round carries changes of the whole model, its sinks do that bucket by bucket. A round of the
        whole model is a part too where there are adapters.
        """
        in_step, self._in_step = self._in_step, False  # until this round has ended well
        model_in_step, self._model_in_step = self._model_in_step, False
        staging = Staging(self.halves.halves[half], self.rank_map.targets)
        if len(self.halves.halves) != 2 or in_step:
            return staging, None
        inactive, live = self.halves.halves[half], self.halves.halves[1 - half]
        spans = [slice(None)] if partial and not model_in_step else [*self._shelves.values()]
        for span in spans:
            inactive[span].copy_(live[span])
        if spans:
            self.halves.synchronize()  # or it might overtake what arrives on other streams
        by_sinks = follows and not partial and not model_in_step
        return staging, Staging(live, self.rank_map.targets) if by_sinks else None

    def restore(self) -> dict[str, Any]:
        """The inactive half holds the wanted version as it is; the next round follows none."""
        self.intake.forget()
        self._in_step = False
        return {"bytes": 0, "seconds": 0.0, "transport": self.intake.transport}

    def stage_file(
        self,
        *,
        path: str,
        below: str,
        half: int,
        leave_s: float = 0.0,
        refuse_parts: str = "",  # noqa: ARG002 - files hold all
    ) -> dict[str, Any]:
        """Stage a whole version from safetensors files (a file, or a folder of them); see ``stage``.

        Raises:
            ConfigError: a file does not lie below ``below``.
            MappingError: lists every tensor missing, extra, or of another shape.
        """
        start = time.perf_counter()
        found = update_files.index(update_files.find(path, Path(below)))
        name = update_files.match_vocabulary(self.mapping, self.rank_map, found)
        listed = self.mapping.vocabulary(name).sources
        grouped = writes_by_source(self.rank_map.writes[name])
        self._ask_leave(leave_s)
        staging, _ = self._staging(half, partial=False)
        nbytes = 0
        with torch.no_grad():
            for index, source in enumerate(listed):
                if index not in grouped:
                    continue
                with update_files.reading(found[source.name]) as file:
                    tensor = file.get_tensor(source.name)
                staging.apply(grouped[index], tensor)
                nbytes += tensor.numel() * tensor.element_size()
        staging.finish()
        self.halves.synchronize()
        self._in_step = self._copies
        return {"bytes": nbytes, "seconds": time.perf_counter() - start, "transport": "file"}


def _adapters(mapping: Mapping) -> list[str]:
    return [vocabulary.name for vocabulary in mapping.adapters.values()]


def _span(rank_map: RankMap, vocabulary: str) -> slice:
    """The bytes of an adapter's shelf, which has them for itself."""
    targets = [rank_map.targets[write.target] for write in rank_map.writes[vocabulary]]
    return slice(min(t.offset for t in targets), max(t.offset + t.nbytes for t in targets))


def _serve(channel: Channel, updater: Updater) -> NoReturn:
    while True:
        message, _ = channel.receive()
        kind = message.pop("type")
        if (version := message.pop("version", None)) is not None:
            telemetry.stand(epoch=updater.epoch, version=version)
        flight.note(
            "order",
            order=kind,
            version=version,
            **{k: message[k] for k in ("epoch", "joint", "path") if k in message},
        )
        try:
            if kind == "join":
                answer = updater.join(msgspec.convert(message, Join))
            elif kind == "stage":
                answer = {"type": "staged", **updater.stage(**message)}
            elif kind == "restore":
                answer = {"type": "staged", **updater.restore()}
            elif kind == "stage_file":
                answer = {"type": "staged", **updater.stage_file(**message)}
            else:
                raise ProtocolError(f"updater {updater.rank} does not know the order {kind!r}")
        except BridgeError as err:
            logger.error("rank %d: %s failed: %s", updater.rank, kind, err)
            flight.write(f"{kind} failed: {err}")
            answer = {"type": "failed", "error": str(err)}
        except (
            RuntimeError,
            OSError,
        ) as err:  # torch's: out of memory, a lost device; this is the end
            logger.exception("rank %d: %s failed", updater.rank, kind)
            reason = f"{type(err).__name__}: {rendezvous.first_line(err)}"
            flight.write(f"{kind} failed: {reason}")
            channel.send({"type": "failed", "error": f"updater {updater.rank} ended: {reason}"})
            raise SystemExit(1) from err
        flight.note("report", report=answer["type"])
        channel.send(answer)


def die_with(daemon_pid: int) -> None:
    """Ask Linux to kill this process when its daemon dies, wherever it stands.

    A transfer that outlived its daemon would go on writing a half that the next daemon may make live.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != daemon_pid:
        raise SystemExit(f"the daemon (pid {daemon_pid}) died before this updater had started")


def main() -> int:
    """Entry point: ``python -m vllm_patching.updater --run-dir D --rank R``."""
    parser = argparse.ArgumentParser(prog="vllm_patching.updater")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--daemon-pid", type=int, required=True)
    args = parser.parse_args()
    die_with(args.daemon_pid)
    telemetry.configure(role="updater", rank=args.rank)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon decides when updaters end
    torch.set_num_threads(1)  # the cores belong to the decode
    try:
        return _run(args.run_dir, args.rank)
    except ChannelClosed as err:
        logger.info("rank %d: the daemon is gone, or done with this updater: %s", args.rank, err)
        return 0


def _run(run_dir: Path, rank: int) -> int:
    """Meet the daemon and follow its orders; returns the exit code.

    Raises:
        ChannelClosed: the daemon ended, which is how an updater's life ends too.
    """
    try:
        channel = Channel.connect(run_dir, timeout_s=CONNECT_TIMEOUT_S)
    except (FileNotFoundError, ConnectionRefusedError) as err:
        raise ChannelClosed(f"nobody listens in {run_dir}: {err}") from err
    hello = {"type": "updater", "rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
    channel.send({**hello, build.KEY: build.BUILD})
    flight.note("waits", what="the welcome, which comes when vLLM is complete")
    channel.sock.settimeout(None)  # the daemon ends us if it never is
    welcome, fds = channel.receive()
    if welcome.get("type") != "welcome":
        logger.error("the daemon refused updater %d: %s", rank, welcome)
        return 1
    mapping = msgspec.convert(welcome["mapping"], Mapping)
    handles, kind = tuple(welcome["handles"]), welcome["arena"]
    *memory, page_fd = fds
    slot = ControlPage(page_fd).slot(rank)
    halves = adopt(tuple(memory), mapping.ranks[rank].arena_bytes, welcome["gpu"], handles, kind)
    updater = Updater(rank, mapping, halves, channel, arena=kind, batches=lambda: slot.begun)
    updater.prepare()
    channel.send({"type": "ready"})
    _serve(channel, updater)


if __name__ == "__main__":
    raise SystemExit(main())
