"""Who may bring weights: trainers (and peers' helpers) that knock at the rendezvous, let in or sent away.

One at a time is let in; to it belongs an ``Epoch``. All but the watching belongs to the daemon's thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from bridge import flight, telemetry
from bridge.errors import BridgeError, PeerLost, RendezvousRefused, TransferError
from bridge.protocol.mapping import CONFIG_NAME
from bridge.protocol.messages import PROTOCOL_VERSION
from bridge.wire import rendezvous
from vllm_patching.epoch import Epoch
from vllm_patching.events import Broken, Heard, Requested

if TYPE_CHECKING:
    from vllm_patching.daemon import Daemon

logger = logging.getLogger(__name__)

POLL_S = 0.05
TRAINER_FIRST_S = 2.0  # so long a peer's helper waits for a trainer that was told to come again
# And for one that was sent away because of a loan, which comes again with its next round only.
NEXT_ROUND_S = 600.0
BUCKET_BYTES = {False: 64 << 20, True: 256 << 20}  # on a GPU?

T = TypeVar("T")


def line(name: str, read: Callable[[], T | None], *, stopping: threading.Event, poll_s: float) -> Iterator[T]:
    """Those who ask in the queue ``name``, in order, until ``stopping``; strangers are passed over.

    Raises:
        RuntimeError: the store is gone.
    """
    while not stopping.wait(poll_s):
        while not stopping.is_set():
            try:
                asked = read()
            except RendezvousRefused as err:
                logger.warning("ignored a stranger in the line %r of the rendezvous: %s", name, err)
                continue  # at once: many of them must not hold up who comes behind
            if asked is None:
                break
            yield asked


class Admission:
    """The door of a daemon's rendezvous."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.epochs = 0
        self._trainers_first_until = 0.0
        self._attempts: dict[str, int] = {}  # by job: the latest that was let in
        self._answers = rendezvous.Answers("answer")
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    # --- who knocks --------------------------------------------------------------------------------

    def watch(self) -> None:
        """Look for trainers that knock, in a thread of its own, from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="bridge-admission", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        here = self._daemon
        store, secret = here.store, here.secret

        def read() -> rendezvous.Request | None:
            return rendezvous.next_request(store, secret=secret)

        try:
            for request in line(rendezvous.REQUESTS, read, stopping=self._stopping, poll_s=POLL_S):
                here.events.put(Requested(request))
        except Exception as err:  # a daemon that admits nobody must not look ready
            logger.exception("the rendezvous broke")
            here.events.put(Broken(f"the rendezvous broke: {type(err).__name__}: {err}"))

    def close(self) -> None:
        """The daemon ends; the rendezvous is not touched after this."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    # --- and is let in -----------------------------------------------------------------------------

    def consider(self, request: rendezvous.Request) -> None:
        """Answer one who knocks, and open its epoch if it may come in."""
        here, who = self._daemon, f"a trainer (pid {request.pid} on {request.host})"
        refusal = self._refusal(request)
        unready = "" if refusal else self._unreadiness(request)
        if refusal or unready:
            borrows = here.epoch is not None and bool(here.epoch.request.restores)
            again = here.epoch is not None and request.follows(here.epoch.request)
            reason, try_again = refusal or unready, bool(unready) or not here.published or borrows or again
            if here.epoch is not None and borrows and not request.restores:
                here.epoch.fail("a trainer came, and does not wait for a peer's loan")
            if here.epoch is not None and again:  # it noticed a loss that we have not noticed yet
                here.epoch.on_control(PeerLost("the trainer has given this epoch up, and asks for the next"))
                reason = f"epoch {here.epoch.epoch}, which it has given up, ends first"
            if try_again and not request.restores:
                until = time.monotonic() + (NEXT_ROUND_S if borrows else TRAINER_FIRST_S)
                self._trainers_first_until = max(self._trainers_first_until, until)
            waits = bool(request.restores) and not here.published  # a peer's helper, which came early
            logger.log(logging.DEBUG if waits else logging.WARNING, "refused %s: %s", who, reason)
            self._answer(rendezvous.Answer(session=request.session, refusal=reason, try_again=try_again))
        elif rendezvous.is_withdrawn(here.store, request):
            logger.info("%s did not wait for its answer", who)
        else:
            if request.attempt:  # of a job that was never requeued nothing is left over
                self._attempts[request.job] = request.attempt
            self._open(request)

    def _open(self, request: rendezvous.Request) -> None:
        here = self._daemon
        assert here.crew is not None
        assert here.mapping is not None
        assert here.swap is not None
        self.epochs += 1
        if not request.restores:
            self._trainers_first_until = 0.0
        rendezvous.forget_epochs(here.store, self.epochs)
        # A peer brings the newest version itself; to a trainer that one is taken.
        base = request.restores - 1 if request.restores else here.version
        epoch = Epoch(
            request, epoch=self.epochs, version=base, crew=here.crew, swap=here.swap, limits=here.limits
        )
        self._answer(
            rendezvous.Answer(
                session=request.session,
                epoch=epoch.epoch,
                weight_version=base,
                outdated=bool(here.outdated),
                num_inference_ranks=here.mapping.num_inference_ranks,
                daemon_pid=os.getpid(),
                heartbeat_interval_s=here.limits.heartbeat_interval_s,
                deadline_s=here.limits.deadline_s,
                commit_timeout_s=here.limits.commit_timeout_s,
                bucket_bytes=here.args.bucket_bytes or BUCKET_BYTES[here.on_gpu],
                checksum=here.args.checksum,
                in_place=here.swap.keeps_what_is_staged,
            )
        )
        here.epoch = epoch
        telemetry.stand(epoch=epoch.epoch, version=here.version)
        flight.note("admitted", trainer=epoch.trainer, epoch=epoch.epoch, version=here.version)
        here.idle_deaths = 0
        try:
            epoch.open(
                here.store,
                address=(here.args.rendezvous_host, here.store.port),
                transport=here.args.transport,
                checksum=here.args.checksum,
                deliver=lambda event: here.events.put(Heard(epoch, event)),
            )
        except BridgeError as err:
            epoch.fail(f"epoch {epoch.epoch} could not be opened: {err}")
            return
        logger.info("epoch %d: %s joined at version %d", epoch.epoch, epoch.trainer, base)

    def _refusal(self, request: rendezvous.Request) -> str:
        here = self._daemon
        assert here.mapping is not None
        if request.protocol_version != PROTOCOL_VERSION:
            return f"it speaks protocol {request.protocol_version}, this daemon {PROTOCOL_VERSION}"
        if request.mapping_digest != here.mapping.digest:
            return (
                f"its mapping has digest {request.mapping_digest[:16]}.., this server's has "
                f"{here.mapping.digest[:16]}..; it must read {here.args.logdir / CONFIG_NAME} of this run"
            )
        if request.attempt < (latest := self._attempts.get(request.job, 0)):
            return (
                f"it belongs to attempt {request.attempt} of job {request.job}, of which attempt {latest} "
                "was here: what is left of an earlier one must not serve its weights; end that process"
            )
        if request.restores and request.restores < here.version:
            return f"it brings version {request.restores}, and the newest is {here.version}"
        if request.restores and not here.outdated:
            return f"version {here.version} is served, and no peer is needed to bring it"
        if here.epoch is not None:
            return f"another trainer is connected (epoch {here.epoch.epoch}): {here.epoch.trainer}"
        if not here.published or not here.registry.complete:
            return f"the server is not complete: {here.last_error}"
        return ""

    def _unreadiness(self, request: rendezvous.Request) -> str:
        """Why no round can begin yet; whoever knocks asks again."""
        assert self._daemon.crew is not None
        if request.restores and time.monotonic() < self._trainers_first_until:
            return "a trainer was here before"
        try:
            self._daemon.crew.wait_all()  # before the answer: the trainer's deadlines start with it
        except TransferError as err:
            return str(err)
        return ""

    def _answer(self, answer: rendezvous.Answer) -> None:
        self._answers.give(self._daemon.store, answer, self._daemon.secret)
