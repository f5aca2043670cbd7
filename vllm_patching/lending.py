"""A daemon lends what its server serves to a server that lacks it: who asks, who may, and until when.

The half that is lent stays as it is as long as it is live, and until the next round after that: before a
round writes it, the helper that reads it is ended. The other server drops what it got and asks again.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from bridge.errors import TransferError
from bridge.protocol.mapping import Mapping
from bridge.wire import rendezvous
from vllm_patching.admission import line
from vllm_patching.arena import REMAP
from vllm_patching.events import Asked

if TYPE_CHECKING:
    from vllm_patching.daemon import Daemon

logger = logging.getLogger(__name__)

POLL_S = 0.2
END_TIMEOUT_S = 30.0


def unreadable(mapping: Mapping) -> str:
    """Why no other server can be sent what ``mapping``'s server serves, "" if it can."""
    for rank_map in mapping.ranks:
        for target in rank_map.targets:
            if target.transform:
                return f"vLLM keeps {target.name} in a layout of its own ({target.transform})"
    return ""


class Lending:
    """At most one loan at a time. All but ``_look`` belongs to the daemon's thread."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._process: subprocess.Popen[bytes] | None = None
        self._borrower = ""
        self._ahead = False  # whether the borrower could not take it yet
        self.halves: tuple[int, ...] = ()  # what is lent, by rank
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._offers = rendezvous.Answers("offer")

    @property
    def pid(self) -> int | None:
        """The helper's, while it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    # --- who asks ------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Look for those who ask, in a thread of its own, from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="bridge-lending", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        store, secret = self._daemon.store, self._daemon.secret

        def read() -> rendezvous.Loan | None:
            return rendezvous.next_loan(store, secret=secret)

        try:
            for loan in line(rendezvous.LOANS, read, stopping=self._stopping, poll_s=POLL_S):
                self._daemon.events.put(Asked(loan))
        except RuntimeError:
            logger.exception("no more loans: the rendezvous broke")  # whoever admits trainers says so too

    def consider(self, loan: rendezvous.Loan) -> None:
        """Answer one who asks, and send a helper if one is wanted and may go."""
        refusal = self._refusal(loan)
        version = self._daemon.version  # the one that is live, unless it is refused
        if loan.start and not refusal:
            self.reclaim(f"{loan.borrower} can take it now")
            try:
                self._start(loan, version)
            except OSError as err:
                refusal = f"no lender could be started: {err}"
        borrower = self._borrower if self.pid is not None else ""
        offer = rendezvous.Offer(
            session=loan.session,
            version=version,
            refusal=refusal,
            borrower=borrower,
            in_round=self._daemon.in_round,
        )
        if refusal:
            logger.info("version %d is not lent to %s: %s", version, loan.borrower, refusal)
        self._offers.give(self._daemon.store, offer, self._daemon.secret)

    def _refusal(self, loan: rendezvous.Loan) -> str:
        here = self._daemon
        if here.nodes is not None:
            return "it runs on several nodes, and one lender sees the memory of one node"
        if not here.published or here.mapping is None or here.swap is None:
            return "vLLM is not complete there"
        if here.swap.torn:
            return "the weights are torn there"
        if not here.version:
            return "it serves the checkpoint, and no version"
        if here.live_version != here.version:
            return f"it serves version {here.live_version} itself, and version {here.version} is the newest"
        if here.registry.arenas != {REMAP}:
            return "its weights are served from memory that rounds write, so a loan could be torn"
        if here.mapping.adapters:
            return "it serves adapters that trainers send, which are not lent"
        if self.pid is not None and loan.start and (loan.ahead or not self._ahead):
            return f"it is sending its weights to {self._borrower} already"
        if here.epoch is not None and here.epoch.request.restores:
            return "it is being sent weights itself"
        return unreadable(here.mapping)

    # --- the helper ----------------------------------------------------------------------------------

    def _start(self, loan: rendezvous.Loan, version: int) -> None:
        here = self._daemon
        page = here.registry.control
        assert page is not None
        self.halves = tuple(page.slot(rank).active for rank in range(page.num_ranks))
        self._borrower, self._ahead = loan.borrower, loan.ahead
        argv = [sys.executable, "-m", "vllm_patching.lender", "--run-dir", str(here.args.run_dir)]
        argv += ["--to", loan.borrower, "--version", str(version), "--daemon-pid", str(os.getpid())]
        self._process = subprocess.Popen(argv)
        logger.info("version %d is lent to %s (lender pid %d)", version, loan.borrower, self._process.pid)

    def before_write(self) -> None:
        """A round is about to write each rank's inactive half."""
        page = self._daemon.registry.control
        if self.pid is None or page is None:
            return
        active = tuple(page.slot(rank).active for rank in range(page.num_ranks))
        if active != self.halves:
            self.reclaim("a round begins to write what is lent")

    def reclaim(self, why: str) -> None:
        """End the helper, if there is one; nobody reads the weights any more."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        logger.warning("the loan to %s ends (lender pid %d): %s", self._borrower, process.pid, why)
        process.kill()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise TransferError(
                f"lender (pid {process.pid}) does not end {END_TIMEOUT_S:g} s after SIGKILL, and what it "
                "reads must not be written; see its kernel stack"
            ) from None

    def close(self) -> None:
        """The daemon ends; the rendezvous is not touched after this."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self.reclaim("the daemon ends")
