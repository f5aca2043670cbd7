"""A server that lacks the newest version gets it from a peer: who has it, who is asked, and when we give up.

Runs in a thread of its own; what it learns goes into the daemon's queue. The peer's helper then comes to our
rendezvous like a trainer. Whatever goes wrong, the trainer's next broadcast of the whole model brings it.

A server that a trainer leaves out, as under ``commit=available``, hears nothing of the versions it misses. So
one peer is asked now and then as long as vLLM is there, and a server that has fallen behind says so.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.errors import BridgeError, MappingError
from bridge.protocol import mapping as mapping_file
from bridge.protocol.mapping import CONFIG_NAME, Mapping
from bridge.wire import rendezvous
from vllm_patching.events import Learned, PeersAsked

if TYPE_CHECKING:
    from vllm_patching.daemon import Daemon

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 5.0
ATTEMPTS = 3  # after which the server is what it is, and asks now and then
PAUSE_S = 2.0
LONG_PAUSE_S = 30.0
KNOCK_TIMEOUT_S = 90.0  # a helper that was just started imports torch
WATCH_S = 30.0  # between questions whether this server has fallen behind; twice, and it has
LOOK_S = 2.0  # between questions whether the helper is still on its way
POLL_S = 0.2


def differs(ours: Mapping, theirs: Mapping) -> str:
    """Why two servers cannot be fed the same versions, "" if their models have the same tensors."""
    common = {v.name: v for v in theirs.vocabularies}
    for vocabulary in ours.of_the_model:
        if vocabulary.name not in common:
            continue
        mine = {source.name: source.shape for source in vocabulary.sources}
        other = {source.name: source.shape for source in common[vocabulary.name].sources}
        if names := sorted(mine.keys() ^ other.keys()):
            return f"{len(names)} tensor(s) are in one of the two only, {names[0]} among them"
        if names := sorted(name for name, shape in mine.items() if other[name] != shape):
            return f"{len(names)} shape(s) differ, {names[0]}: {mine[names[0]]} here, {other[names[0]]} there"
        return ""
    return "they have no vocabulary in common"


class Borrowing:
    """Asks the peers for each vLLM that is there anew."""

    def __init__(self, daemon: Daemon, peers: Sequence[Path]) -> None:
        """``peers`` are the log directories of servers that the same trainer feeds; our own is skipped."""
        self._daemon = daemon
        self._own = os.fspath(daemon.args.logdir.absolute())
        self._peers = [peer for peer in peers if os.fspath(peer.absolute()) != self._own]
        self._stopping = threading.Event()  # of the vLLM that is there; each has one of its own
        self._expected = False
        self._lock = threading.Lock()  # between the daemon's thread and those that ask, who change the two
        # The open one, set once nobody is asked it any more; closed by the daemon's thread.
        self._question: threading.Event | None = None

    @property
    def asking(self) -> bool:
        """Whether peers are asked for a newer version, or what they said has yet to be heard."""
        return self._question is not None

    @property
    def has_peers(self) -> bool:
        """Whether there is anybody to ask."""
        return bool(self._peers)

    def expect(self) -> None:
        """The workers of a vLLM that was there before are back, and it will publish.

        Peers are asked already: their helper takes seconds to start, and so does the rest of vLLM.
        """
        if not self._expected:
            self._expected = True
            self.begin()

    def begin(self) -> None:
        """See whether a peer has a newer version than vLLM has, and get it; no matter if that goes on."""
        here = self._daemon
        asked = self._question is not None and not self._question.is_set()
        if not self._peers or (asked and not self._stopping.is_set()):
            return
        self._stopping.set()
        if (here.swap is not None and here.swap.keeps_what_is_staged) or (
            here.mapping is not None and here.mapping.adapters
        ):
            logger.warning(
                "peers are not asked: weights that are written in place would be torn by a loan that ends, "
                "and adapters that trainers send are not lent; the newest version comes with the next "
                "broadcast"
            )
            return
        with self._lock:
            self._stopping, self._question = threading.Event(), threading.Event()
        thread = threading.Thread(
            target=self._run, args=(self._stopping, self._question), name="bridge-borrowing", daemon=True
        )
        thread.start()

    def satisfied(self) -> None:
        """A trainer has made a version live: nothing need wait for the peers."""
        with self._lock:
            self._question = None

    def heard(self, question: threading.Event) -> None:
        """All that was learned by asking ``question`` has been taken in; in the daemon's thread."""
        with self._lock:
            if self._question is question:
                self._question = None

    def close(self) -> None:
        """The daemon ends, or its vLLM has."""
        self._expected = False
        self._stopping.set()

    def _run(self, stopping: threading.Event, question: threading.Event) -> None:
        try:
            while self._get_newest(stopping, question):
                self._stop_asking(question)
                if not self._falls_behind(stopping):
                    return
                with self._lock:
                    if self._stopping is not stopping:
                        return  # another vLLM's question is open
                    self._question = question = threading.Event()
        except Exception:  # the thread's edge: without it the server is as good as without peers
            logger.exception("the peers could not be asked")
        finally:
            self._stop_asking(question)

    def _get_newest(self, stopping: threading.Event, question: threading.Event) -> bool:
        """Ask until there is nothing more to do; whether that is so, and not the end."""
        attempt = 0
        while not self._borrow(stopping):
            attempt += self._daemon.published  # before, it cannot have it
            if attempt == ATTEMPTS:
                self._stop_asking(question)
                logger.warning(
                    "no peer sends a version newer than %d now, and not every one answers or is between "
                    "rounds; they are asked again now and then",
                    self._served,
                )
            if stopping.wait(PAUSE_S if attempt < ATTEMPTS else LONG_PAUSE_S):
                return False
        return not stopping.is_set()

    def _falls_behind(self, stopping: threading.Event) -> bool:
        """Wait until a peer has had a newer version for ``WATCH_S``, and it has not come; or for the end."""
        behind_since = None  # our version when a peer was ahead of it
        while not stopping.wait(WATCH_S):
            here = self._daemon
            if not self._peers:
                return False
            if not here.published:
                continue
            # One of them: each asking all others would be a crowd.
            offer = self._ask(random.choice(self._peers), start=False)
            if offer is None or offer.version <= here.version:
                behind_since = None
            elif behind_since == here.version:
                logger.warning(
                    "version %d is served here, and a peer has version %d; this server was left out, or its "
                    "trainer cannot reach it",
                    self._served,
                    offer.version,
                )
                here.events.put(Learned(offer.version))
                return True
            else:
                behind_since = here.version
        return False

    def _stop_asking(self, question: threading.Event) -> None:
        if not question.is_set():
            question.set()
            # It is closed only behind what was learned, which lies in the daemon's queue.
            self._daemon.events.put(PeersAsked(question))

    def _borrow(self, stopping: threading.Event) -> bool:
        """Whether there is nothing more to do."""
        if stopping.is_set() or (not self.asking and self._has_newest and self._served):
            return True
        offers = [(self._ask(peer, start=False), peer) for peer in tuple(self._peers)]
        newest = max([self._daemon.version, *(offer.version for offer, _ in offers if offer is not None)])
        if newest <= self._served:
            known = all(offer is not None or peer not in self._peers for offer, peer in offers)
            return known and not any(offer.in_round for offer, _ in offers if offer is not None)
        self._daemon.events.put(Learned(newest))
        held = {peer: offer.version for offer, peer in offers if offer is not None and not offer.refusal}
        if newest not in held.values():
            return False
        aborted = self._daemon.aborted
        peer = next(peer for peer, version in held.items() if version == newest)
        offer = self._ask(peer, start=True)
        if offer is None or offer.refusal:
            return False
        logger.info("the peer at %s sends version %d", peer, offer.version)
        # Behind it once more: meanwhile a round may have been made without this server.
        return self._await(offer.version, peer, aborted, stopping) and self._borrow(stopping)

    @property
    def _served(self) -> int:
        page = self._daemon.registry.control
        return page.requested if page is not None else 0

    @property
    def _has_newest(self) -> bool:
        return self._served == self._daemon.version

    def _await(self, version: int, peer: Path, aborted: int, stopping: threading.Event) -> bool:
        """Whether the version has become live; a round that was given up, or never begun, is a no."""
        due = time.monotonic() + KNOCK_TIMEOUT_S
        look = time.monotonic() + LOOK_S
        while not stopping.wait(POLL_S):
            if self._daemon.live_version >= version:
                return True
            if self._daemon.aborted > aborted:
                return False
            epoch = self._daemon.epoch
            if epoch is not None and epoch.request.restores:  # which has deadlines of its own
                due = time.monotonic() + KNOCK_TIMEOUT_S
            elif time.monotonic() > due:
                logger.warning("nobody came to bring version %d within %g s", version, KNOCK_TIMEOUT_S)
                return False
            elif time.monotonic() > look:
                offer = self._ask(peer, start=False)
                if offer is None or offer.borrower != self._own:
                    return self._daemon.live_version >= version
                if offer.version > version:  # nobody wants this one any more, and our door refuses it then
                    self._daemon.events.put(Learned(offer.version))
                look = time.monotonic() + LOOK_S
        return True

    def _ask(self, peer: Path, *, start: bool) -> rendezvous.Offer | None:
        """What a peer offers; None, and the reason in the log, if it does not answer."""
        session = secrets.token_hex(16)
        try:
            theirs = mapping_file.load(peer / CONFIG_NAME)
            assert self._daemon.mapping is not None
            if difference := differs(self._daemon.mapping, theirs):
                # Its versions are not ours, and must not become what is waited for here.
                logger.error("%s is of another model, and no peer: %s", peer, difference)
                self._peers.remove(peer)
                return None
            place = theirs.rendezvous
            if place is None:
                raise MappingError(f"{peer / CONFIG_NAME} names no rendezvous: it is an exported copy")
            store = rendezvous.reach_store(place.host, place.port, timeout_s=ASK_TIMEOUT_S)
            ahead = not self._daemon.published
            loan = rendezvous.Loan(session=session, borrower=self._own, start=start, ahead=ahead)
            rendezvous.ask(store, loan, place.secret, timeout_s=ASK_TIMEOUT_S, line=rendezvous.LOANS)
            offer = rendezvous.await_offer(store, session, place.secret, timeout_s=ASK_TIMEOUT_S)
        except BridgeError as err:
            logger.info("the peer at %s does not say what it serves: %s", peer, err)
            return None
        if offer.refusal:
            logger.info("the peer at %s has nothing to send: %s", peer, offer.refusal)
        return offer
