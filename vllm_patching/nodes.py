"""The head's side of a server on several nodes: who is there, and what each of them does for it.

A follower daemon is a limb of the head's: it serves its node's socket and runs its node's updaters, and
says over a ``Link`` what happens there. So the rest of the daemon knows workers and updaters, wherever they
are: a remote worker is a ``Member`` whose connection is the link, remote updaters are a ``Limb`` of the crew,
and a remote worker's words in the control page are copied into the head's. A trainer sees one daemon.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bridge import flight
from bridge.errors import BridgeError, ConfigError, PeerLost, ProtocolError, RendezvousError
from bridge.protocol.decoding import UNREADABLE
from bridge.protocol.mapping import write_atomically
from bridge.protocol.messages import PROTOCOL_VERSION
from vllm_patching import introductions
from vllm_patching import link as wire
from vllm_patching.build import BUILD
from vllm_patching.channel import connections
from vllm_patching.crew import Crew, Report
from vllm_patching.events import Lost, NodeFailed
from vllm_patching.introductions import WorkerHello
from vllm_patching.link import Link
from vllm_patching.registry import Member
from vllm_patching.status import NodesHere

if TYPE_CHECKING:
    from vllm_patching.daemon import Daemon

logger = logging.getLogger(__name__)

FILE_NAME = "nodes.json"
HANDSHAKE_TIMEOUT_S = 10.0
SAY_AGAIN_S = 60.0  # followers knock five times a second; why one was sent away is said this often
END_CREW_TIMEOUT_S = 90.0  # a follower allows each of its updaters a third of it


class Meeting(msgspec.Struct, frozen=True, kw_only=True):
    """``nodes.json`` in the log directory, readable by its owner: where followers find the head's daemon.

    ``secret`` is the one that admits trainers: what updaters say to them is signed with it on every node.
    """

    host: str
    port: int
    secret: str
    pid: int


def read_meeting(logdir: Path) -> Meeting:
    """Where the head's daemon of ``logdir`` awaits followers.

    Raises:
        RendezvousError: it has not said so yet, or the file is of something else.
    """
    path = logdir / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Meeting)
    except (OSError, *UNREADABLE) as err:
        raise RendezvousError(f"node 0 has not published {path} ({err})") from err


@dataclass(eq=False)
class Node:
    """A follower that is here."""

    join: wire.Join
    link: Link
    waiting: list[wire.Registered] = field(default_factory=list)
    members: dict[int, Member] = field(default_factory=dict)
    lost: str = ""  # why, once it is
    _crew: tuple[int, Crew] | None = None
    _crews: int = 0
    _whos: dict[int, str] = field(default_factory=dict)
    _pids: dict[int, int] = field(default_factory=dict)
    _news: threading.Condition = field(default_factory=threading.Condition)
    arrivals: threading.Lock = field(default_factory=threading.Lock)  # of ``waiting``, and what follows it
    _crew_ended: int = 0
    _crew_asked: int = 0  # to end, and not waited for yet

    @property
    def who(self) -> str:
        return f"node {self.join.node_rank} (daemon pid {self.join.pid} on {self.join.host})"

    # --- the channel of its members, which only ever get an answer that the follower has given -----------

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Nothing: only engines are sent anything later, and those are on node 0."""

    def nudge(self, _message: dict[str, Any], /) -> bool:
        """Nothing, likewise; so nothing was sent."""
        return False

    def close(self) -> None:
        """Nothing: the link outlives a worker."""

    # --- a limb of the crew ------------------------------------------------------------------------------

    @property
    def ranks(self) -> list[int]:
        """Its inference ranks."""
        return sorted(self.members)

    def start(self, crew: Crew, *, on_gpu: bool) -> None:
        """Let it start updaters for its ranks."""
        self._crews += 1
        self._crew = (self._crews, crew)
        self._whos.clear()
        self._pids.clear()
        self.tell(wire.StartCrew(self._crews, on_gpu))

    def order(self, message: dict[str, Any], ranks: dict[int, dict[str, Any]]) -> None:
        """Pass an order on to its updaters.

        Raises:
            PeerLost: it is gone.
        """
        own = {rank: fields for rank, fields in ranks.items() if rank in self.members}
        self.link.send(wire.Order(self._crews, message, own))

    def describe(self, rank: int) -> str:
        """Name one updater."""
        return self._whos.get(rank, f"updater of rank {rank} on {self.join.host}")

    def pids(self) -> dict[int, int]:
        """Process ids of its updaters that are ready."""
        return dict(self._pids)

    def ask_end(self) -> None:
        """Tell it to end its updaters; ``end`` waits for that."""
        if (current := self._crew) is not None:
            self._crew_asked, self._crew = current[0], None
            self.tell(wire.EndCrew(self._crew_asked))

    def end(self) -> None:
        """Return once none of its updaters writes any more, or the node is given up.

        A follower that has lost its link ends its updaters before it comes back, and they die with it.
        """
        self.ask_end()
        number, self._crew_asked = self._crew_asked, 0
        if not number:
            return
        with self._news:
            if not self._news.wait_for(lambda: self.lost or self._crew_ended >= number, END_CREW_TIMEOUT_S):
                logger.error("%s did not end its updaters in %g s", self.who, END_CREW_TIMEOUT_S)
                self.link.close()

    def tell(self, frame: wire.Frame) -> None:
        """Send it something, if it is still there."""
        try:
            self.link.send(frame)
        except PeerLost as err:
            logger.debug("%s: %s; its reader reports it", self.who, err)

    # --- what it says, in its reader's thread --------------------------------------------------------------

    def crew_news(self, frame: wire.Ready | wire.Reported | wire.CrewEnded) -> Report | None:
        """Take note of what its updaters said; a report if it is for the daemon."""
        if isinstance(frame, wire.CrewEnded):
            with self._news:
                self._crew_ended = frame.crew
                self._news.notify_all()
            return None
        current = self._crew  # once: the daemon's thread may end it meanwhile
        if current is None or current[0] != frame.crew:
            return None
        if isinstance(frame, wire.Ready):
            self._pids[frame.rank] = frame.pid
            current[1].mark_ready(frame.rank)
            return None
        self._whos[frame.rank] = frame.who
        return Report(current[1], frame.rank, frame.message)

    def last_words(self) -> list[Report]:
        """That each of its updaters has died, as far as anybody will know."""
        current = self._crew
        return [Report(current[1], rank, None) for rank in self.ranks] if current is not None else []

    def end_of_link(self, why: str) -> None:
        """It is lost: whoever waits for it need not any more."""
        with self._news:
            self.lost = why
            self._news.notify_all()


class Nodes:
    """All followers of a head's daemon. ``admit_waiting`` is for the daemon's thread, the rest for any."""

    def __init__(self, daemon: Daemon) -> None:
        args = daemon.args
        self._daemon = daemon
        self.nnodes: int = args.nnodes
        self.host: str = args.master_addr
        self.master_port: int = args.master_port
        self.here: dict[int, Node] = {}
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}  # when it was said last why somebody was sent away, by why
        self._timers: dict[int, threading.Timer] = {}
        self._missed: dict[int, set[int]] = {}  # inference ranks that a lost node had, by node rank
        self._ending = False
        self._bounded = False  # whether nodes that were there before this daemon are waited for
        self._listener: socket.socket | None = None

    def listen(self) -> None:
        """Open the port where followers are awaited, and say in the log directory where it is.

        Raises:
            ConfigError: the address is not this host's.
        """
        try:
            self._listener = listener = socket.create_server((self.host, 0))
        except OSError as err:
            raise ConfigError(
                f"cannot await the other nodes at --master-addr {self.host}: {err}; it must be an IPv4 "
                "address of this host, node 0, or a name that leads to one"
            ) from err
        found = str(listener.getsockname()[0])
        if ipaddress.ip_address(found).is_loopback and self.host != "localhost" and self.host != found:
            listener.close()
            raise ConfigError(
                f"--master-addr {self.host} leads to {found} on this host, where no other node can reach it "
                "(/etc/hosts?); pass an address of this host"
            )
        self.host = found
        port = listener.getsockname()[1]
        meeting = Meeting(host=self.host, port=port, secret=self._daemon.secret, pid=os.getpid())
        write_atomically(self._daemon.args.logdir / FILE_NAME, msgspec.json.encode(meeting))
        threading.Thread(target=self._accept, args=(listener,), name="bridge-nodes", daemon=True).start()
        logger.info("awaiting %d other node(s) at %s:%d", self.nnodes - 1, self.host, port)

    @property
    def missing(self) -> list[int]:
        """Node ranks that are not here."""
        return [rank for rank in range(1, self.nnodes) if rank not in self.here]

    def describe(self) -> NodesHere:
        """For the status."""
        return NodesHere(
            count=self.nnodes,
            rank=0,
            missing=self.missing,
            hosts={0: socket.gethostname(), **{r: n.join.host for r, n in sorted(self.here.items())}},
            address=self.host,
            master_addr=self._daemon.args.master_addr,
            master_port=self.master_port,
        )

    # --- coming and going ----------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        for sock in connections(listener, "a node", lambda: self._ending):
            threading.Thread(target=self._converse, args=(sock,), name="bridge-node", daemon=True).start()

    def _converse(self, sock: socket.socket) -> None:
        """Let a follower in, and hear it until its end."""
        node: Node | None = None
        try:
            link = Link(sock, self._daemon.secret, role=wire.HEAD, deadline_s=HANDSHAKE_TIMEOUT_S)
            node = self._welcome(link)
            while node is not None:
                self._hear(node, link.receive())
        except BridgeError as err:
            if node is None:
                self._say_sent_away(type(err).__name__, f"ignored a stranger at the nodes' port: {err}")
            else:
                self._lose(node, str(err))
        except Exception as err:  # the thread's edge: a node that nobody hears must not look present
            logger.exception("the link to a node broke in our own hands")
            if node is not None:
                self._lose(node, f"{type(err).__name__}: {err}")
        finally:
            sock.close()

    def _welcome(self, link: Link) -> Node | None:
        join = link.receive()
        if not isinstance(join, wire.Join):
            raise RendezvousError(f"{link.peer} began with {type(join).__name__}")
        args = self._daemon.args
        node = Node(join, link)
        with self._lock:
            if (refused := self._refusal(join)) is not None:
                self._say_sent_away(refused.reason, f"refused {node.who} at {link.peer}: {refused.reason}")
                link.send(refused)
                return None
            link.send(  # before anything that the daemon's thread may want of a node that is here
                wire.Welcome(
                    launch=args.launch_id,
                    master_port=self.master_port,
                    heartbeat_interval_s=args.heartbeat_interval,
                    deadline_s=args.deadline,
                    grace_s=args.commit_timeout,
                )
            )
            self.here[join.node_rank] = node
        self._is_back(node)
        logger.info("%s joined from %s", node.who, link.peer)
        flight.note("joined", peer=node.who)
        link.set_deadline(args.deadline)
        link.beat(args.heartbeat_interval)
        if self._daemon.mapping is not None:
            self._publish(node)
        return node

    def _say_sent_away(self, why: str, what: str) -> None:
        now = time.monotonic()
        self._said = {reason: said for reason, said in self._said.items() if now - said < SAY_AGAIN_S}
        if why not in self._said:
            self._said[why] = now
            logger.warning("%s", what)

    def _is_back(self, node: Node) -> None:
        """It need not be given up any more, once every worker is here that it had when it was lost."""
        rank = node.join.node_rank
        with self._lock:
            if self._missed.get(rank, set()) <= node.members.keys():
                self._missed.pop(rank, None)
                if (timer := self._timers.pop(rank, None)) is not None:
                    timer.cancel()

    def _refusal(self, join: wire.Join) -> wire.Refused | None:
        """Why this one may not join, None if it may."""
        here, args = self._daemon, self._daemon.args
        wrong, gone, busy = "", "", ""
        if join.protocol_version != PROTOCOL_VERSION:
            wrong = f"it speaks protocol {join.protocol_version}, node 0 {PROTOCOL_VERSION}"
        elif join.build != BUILD:
            wrong = f"it runs other code than node 0: build {join.build}, and there {BUILD}"
        elif join.nnodes != self.nnodes:
            wrong = f"it was started with --nnodes {join.nnodes}, node 0 with --nnodes {self.nnodes}"
        elif not 0 < join.node_rank < self.nnodes:
            wrong = f"there is no --node-rank {join.node_rank} among {self.nnodes} nodes to follow"
        elif join.launch not in ("", args.launch_id):
            gone = "its workers are of an earlier start of this server"
        elif (other := self.here.get(join.node_rank)) is not None:
            busy = f"{other.who} is here already: two nodes with one --node-rank?"
        elif not join.launch and (here.mapping is not None or here.registry.found_running):
            gone = "the server is up, and its workers on that node are gone with their launcher"
        elif self._ending:
            busy = "node 0 ends"
        if not (reason := wrong or gone or busy):
            return None
        return wire.Refused(reason=reason, try_again=bool(busy), misconfigured=bool(wrong))

    def _lose(self, node: Node, why: str) -> None:
        """The link is down: its daemon, its network or the whole node. The first comes back."""
        rank, grace_s = node.join.node_rank, self._daemon.args.commit_timeout
        node.end_of_link(why)
        node.link.close()
        with self._lock:
            if self.here.get(rank) is node:
                del self.here[rank]
            if self._ending:
                return
            self._missed.setdefault(rank, set()).update(node.members)
            if rank not in self._timers:  # else it was not whole again, and what it had counts on
                self._await_return(rank, f"{node.who} is gone ({why})", grace_s)
        for member in list(node.members.values()):
            self._daemon.registry.forget(member)
        self._daemon.events.put(Lost(f"{node.who} ({why})"))
        if self._daemon.filing:  # that waits for every updater's word, and for nothing else
            for report in node.last_words():
                self._daemon.events.put(report)

    def _await_return(self, rank: int, what: str, grace_s: float) -> None:
        late = f"{what} and did not come back whole within {grace_s:g} s"
        timer = self._timers[rank] = threading.Timer(grace_s, self._give_up, [late])
        timer.daemon = True
        timer.start()

    def _give_up(self, why: str) -> None:
        self._daemon.events.put(NodeFailed(why))

    # --- what followers say ------------------------------------------------------------------------------

    def _hear(self, node: Node, frame: wire.Frame) -> None:
        daemon = self._daemon
        if isinstance(frame, wire.Slots):
            with node.arrivals:
                self._take_words(node, frame.slots)
        elif isinstance(frame, wire.Registered):
            _check_worker(frame.hello)
            with node.arrivals:
                node.waiting.append(frame)
            daemon.events.put(None)  # see admit_waiting
        elif isinstance(frame, wire.Gone):
            with node.arrivals:
                early = [waits for waits in node.waiting if waits.hello["rank"] == frame.rank]
                node.waiting = [waits for waits in node.waiting if waits not in early]
                member = node.members.pop(frame.rank, None)
            if member is not None:
                daemon.registry.forget(member)
                daemon.events.put(NodeFailed(f"{member.who} is gone"))
            elif early:
                daemon.events.put(NodeFailed(f"vLLM worker rank {frame.rank} on {node.join.host} is gone"))
        elif isinstance(frame, wire.Ready | wire.Reported | wire.CrewEnded):
            if isinstance(frame, wire.Reported) and frame.message is not None:
                introductions.check_report(frame.message)
            if (report := node.crew_news(frame)) is not None:
                daemon.events.put(report)
        elif isinstance(frame, wire.Leave):
            daemon.events.put(NodeFailed(f"{node.who} ends: {frame.why}"))

    def _take_words(self, node: Node, slots: dict[int, wire.Slot]) -> None:
        """Newer words of ranks: into the page, or into the registration that is not admitted yet.

        Those of a rank that was not announced are dropped: its registration comes with newer ones.
        """
        node.waiting = [
            msgspec.structs.replace(waits, slot=slots.get(waits.hello["rank"], waits.slot))
            for waits in node.waiting
        ]
        for rank in slots.keys() & node.members.keys():
            self._copy(rank, slots[rank], node.members[rank].who)

    def _copy(self, rank: int, words: wire.Slot, who: str) -> None:
        page = self._daemon.registry.control
        if page is None or rank >= page.num_ranks:  # of a vLLM that is gone, or it will be refused
            return
        slot = page.slot(rank)
        failed = words[slot.FAILURES] > slot.failures
        slot.copy(words)
        if failed:  # nobody may be waiting for it: the ranks must not go on differing
            self._daemon.events.put(NodeFailed(f"{who} could not flip to version {page.requested}"))

    def admit_waiting(self) -> None:
        """Admit the workers that followers have announced, once node 0 has the control page.

        Of a restarted daemon, that is the page which its own vLLM processes hand over, and no fresh one.
        """
        registry = self._daemon.registry
        if registry.control is None:
            return
        if registry.found_running and not self._bounded:
            self._bounded = True
            with self._lock:  # an earlier daemon's timers went with it
                for rank in self.missing:
                    grace_s = self._daemon.args.commit_timeout
                    self._await_return(rank, f"node {rank} was not here when this daemon came", grace_s)
        for node in list(self.here.values()):
            while node.waiting:
                with node.arrivals:
                    if not node.waiting:
                        break
                    arrived = node.waiting[0]
                    rank = arrived.hello["rank"]
                    try:
                        member = registry.admit_remote(arrived.hello, node, node=node.join.node_rank)
                    except ConfigError as err:
                        del node.waiting[0]
                        self._daemon.failed = self._daemon.last_error = str(err)
                        node.tell(wire.Refused(reason=str(err), try_again=False))
                        continue
                    if member is None:  # node 0's own vLLM has died meanwhile, and the rest dies with it
                        return
                    del node.waiting[0]
                    node.members[rank] = member
                    self._copy(rank, arrived.slot, member.who)
                if node.lost:
                    registry.forget(member)
                else:
                    logger.info("%s registered through %s", member.who, node.who)
                    self._is_back(node)

    # --- what the daemon wants of them -------------------------------------------------------------------

    def publish(self) -> None:
        """Send every follower the mapping."""
        for node in list(self.here.values()):
            self._publish(node)

    def _publish(self, node: Node) -> None:
        mapping = self._daemon.mapping
        assert mapping is not None
        assert mapping.rendezvous is not None
        public = msgspec.structs.replace(  # the secret is the link's too, and never sent
            mapping, rendezvous=msgspec.structs.replace(mapping.rendezvous, secret=""), run_dir=""
        )
        node.tell(wire.Published(msgspec.json.encode(public)))

    def watch(self, on: bool) -> None:
        """Whether words in the control page are waited for now."""
        for node in list(self.here.values()):
            node.tell(wire.Watch(on))

    def end(self, farewell: wire.End | None) -> None:
        """The daemon ends, and with a farewell the server; without, followers wait for the next one.

        Their links end here: nothing of them is written any more once they have noticed.
        """
        with self._lock:
            self._ending = True
            timers = list(self._timers.values())
        for timer in timers:
            timer.cancel()
        if self._listener is not None:
            self._listener.close()
        for node in list(self.here.values()):
            if farewell is not None:
                node.tell(farewell)
            node.link.close()
        if farewell is not None and self._listener is not None:
            self._forget_meeting()

    def _forget_meeting(self) -> None:
        """Remove the file, unless the next launch has written its own there by now."""
        try:
            ours = read_meeting(self._daemon.args.logdir).secret == self._daemon.secret
        except RendezvousError:
            return
        if ours:
            (self._daemon.args.logdir / FILE_NAME).unlink(missing_ok=True)


def _check_worker(hello: dict[str, Any]) -> None:
    """Whether what a follower passes on is a worker's introduction; its own front desk has let it in.

    Raises:
        ProtocolError: it is another's.
        BridgeError: it cannot be worked with.
    """
    if not isinstance(introductions.read(hello), WorkerHello):
        raise ProtocolError(f"a {hello.get('type')!r} cannot register from another node")
