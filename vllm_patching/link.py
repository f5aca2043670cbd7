"""The line between the daemons of one server's nodes: one TCP connection, every frame signed.

Both ends send a fresh nonce; the key of the connection is made of the two and the launch's secret, so the
first frame proves that its sender knows the secret, and none can be replayed, reordered or put in. A frame is
its length, an HMAC-SHA256 and MessagePack of one of the types below. No pickle. Nothing is encrypted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time
from typing import Annotated, Any

import msgspec

from bridge.errors import PeerLost, ProtocolError, RendezvousRefused
from bridge.protocol.decoding import UNREADABLE
from vllm_patching.control_page import ControlPage

NONCE_BYTES = 32
MAC_BYTES = 32
MAX_FRAME_BYTES = 1 << 30  # a mapping
MAX_FIRST_BYTES = 1 << 16  # of somebody who has proved nothing yet
HEAD, FOLLOWER = b"head", b"follower"
_HEADER = struct.Struct("!I")

_Word = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Slot = Annotated[
    tuple[_Word, ...],
    msgspec.Meta(min_length=ControlPage.SLOT_WORDS, max_length=ControlPage.SLOT_WORDS),
]


class _Frame(msgspec.Struct, frozen=True, tag=True):
    pass


class Join(_Frame, frozen=True, kw_only=True):
    """A follower's first word. ``launch``: whose workers it has, "" for none yet."""

    node_rank: int
    nnodes: int
    protocol_version: int
    build: str
    launch: str
    host: str
    pid: int


class Welcome(_Frame, frozen=True, kw_only=True):
    """The head's answer. ``launch`` names this start of the server, over restarts of its daemon."""

    launch: str
    master_port: int
    heartbeat_interval_s: float
    deadline_s: float
    grace_s: float


class Refused(_Frame, frozen=True, kw_only=True):
    """The head's other answer; ``misconfigured``: flags must change before it can be another."""

    reason: str
    try_again: bool
    misconfigured: bool = False


class Beat(_Frame, frozen=True):
    """A sign of life."""


class Registered(_Frame, frozen=True, kw_only=True):
    """A vLLM worker has registered with the follower; ``slot`` are its words of the control page."""

    hello: dict[str, Any]
    slot: Slot


class Gone(_Frame, frozen=True):
    """A vLLM worker of the follower has died."""

    rank: int


class Slots(_Frame, frozen=True):
    """Words of the control page that have changed, by rank."""

    slots: dict[int, Slot]


class Watch(_Frame, frozen=True):
    """The head waits for words of the control page, or does not any more."""

    on: bool


class Published(_Frame, frozen=True):
    """The mapping of all ranks, as in its file, without the rendezvous' secret: the follower has it."""

    mapping: bytes


class StartCrew(_Frame, frozen=True):
    """Start updaters for the follower's ranks; ``crew`` names them in what follows."""

    crew: int
    on_gpu: bool


class Order(_Frame, frozen=True):
    """An order to the updaters; ``ranks`` adds fields per rank."""

    crew: int
    message: dict[str, Any]
    ranks: dict[int, dict[str, Any]]


class EndCrew(_Frame, frozen=True):
    """End the updaters, and say when they have ended."""

    crew: int


class CrewEnded(_Frame, frozen=True):
    """They have: none of them writes any more."""

    crew: int


class Ready(_Frame, frozen=True):
    """An updater is ready for its first round."""

    crew: int
    rank: int
    pid: int


class Reported(_Frame, frozen=True):
    """What an updater said; None: it died. ``who`` names it."""

    crew: int
    rank: int
    message: dict[str, Any] | None
    who: str


class Leave(_Frame, frozen=True):
    """The follower ends, and its part of the server with it."""

    why: str


class End(_Frame, frozen=True):
    """The server ends. ``why`` is "" where it was asked to."""

    why: str


Frame = (
    Join | Welcome | Refused | Beat | Registered | Gone | Slots | Watch | Published
    | StartCrew | Order | EndCrew | CrewEnded | Ready | Reported | Leave | End
)  # fmt: skip
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def read_frame(body: bytes, *, peer: str) -> Frame:
    """What ``peer`` has sent and signed.

    Raises:
        ProtocolError: it is no frame.
    """
    try:
        return _decoder.decode(body)
    except UNREADABLE as err:
        raise ProtocolError(f"{peer} sent what is no frame of this release: {err}") from err


class Link:
    """One end. Any thread may send; one receives. Silence of ``deadline_s`` seconds ends it."""

    def __init__(self, sock: socket.socket, secret: str, *, role: bytes, deadline_s: float) -> None:
        """Exchange nonces with the other end.

        Raises:
            PeerLost: it is gone, or silent.
        """
        self.sock = sock
        self._role, self._other = (HEAD, FOLLOWER) if role == HEAD else (FOLLOWER, HEAD)
        self._lock = threading.Lock()
        self._sent = self._received = 0
        self._closed = threading.Event()
        self.peer = "the other node"  # until its address is known
        ours = secrets.token_bytes(NONCE_BYTES)
        try:
            self.peer = "{}:{}".format(*sock.getpeername()[:2])
            sock.settimeout(deadline_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(ours)
        except OSError as err:
            raise PeerLost(f"{self.peer} is gone: {err}") from err
        theirs = self._receive_exactly(NONCE_BYTES)
        nonces = ours + theirs if role == HEAD else theirs + ours
        self._key = hmac.digest(secret.encode(), nonces, hashlib.sha256)

    @property
    def address(self) -> str:
        """This host's address on the way to the other end."""
        return str(self.sock.getsockname()[0])

    def set_deadline(self, deadline_s: float) -> None:
        """How long the other end may be silent, or not take what is sent.

        Raises:
            PeerLost: the link has ended.
        """
        try:
            self.sock.settimeout(deadline_s)
        except OSError as err:
            raise PeerLost(f"the link to {self.peer} broke: {err}") from err

    def send(self, frame: Frame) -> None:
        """Send one frame.

        Raises:
            PeerLost: the other end is gone, or takes nothing.
        """
        body = msgspec.msgpack.encode(frame)
        with self._lock:
            mac = self._sign(self._role, self._sent, body)
            self._sent += 1
            try:
                self.sock.sendall(_HEADER.pack(len(body)) + mac + body)
            except OSError as err:
                self.close()  # half a frame may be out: nothing more may follow
                raise PeerLost(f"the link to {self.peer} broke: {err}") from err

    def receive(self) -> Frame:
        """Wait for one frame.

        Raises:
            PeerLost: the other end is gone, or was silent for the deadline.
            RendezvousRefused: it does not know the secret.
            ProtocolError: it does, and what came is no frame.
        """
        (length,) = _HEADER.unpack(self._receive_exactly(_HEADER.size))
        if length > (MAX_FRAME_BYTES if self._received else MAX_FIRST_BYTES):
            raise RendezvousRefused(f"{self.peer} announced a frame of {length} bytes")
        mac = self._receive_exactly(MAC_BYTES)
        body = self._receive_exactly(length)
        if not hmac.compare_digest(mac, self._sign(self._other, self._received, body)):
            raise RendezvousRefused(f"a frame from {self.peer} was signed with another launch's secret")
        self._received += 1
        return read_frame(body, peer=self.peer)

    def beat(self, interval_s: float) -> None:
        """Send signs of life from a thread of its own until the link ends."""

        def run() -> None:
            with contextlib.suppress(PeerLost):  # whoever receives reports it
                while not self._closed.wait(interval_s):
                    self.send(Beat())

        threading.Thread(target=run, name="bridge-link-beat", daemon=True).start()

    def close(self) -> None:
        """End the link; a thread that receives is woken."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def _sign(self, role: bytes, number: int, body: bytes) -> bytes:
        return hmac.digest(self._key, role + number.to_bytes(8, "big") + body, hashlib.sha256)

    def _receive_exactly(self, count: int) -> bytes:
        buffer = bytearray(count)
        view, done = memoryview(buffer), 0
        due = time.monotonic() + (self.sock.gettimeout() or 0)
        while done < count:
            if not self._received and time.monotonic() > due:  # nobody may hold us up a byte at a time
                raise PeerLost(f"{self.peer} did not introduce itself in time")
            try:
                received = self.sock.recv_into(view[done:])
            except TimeoutError:
                raise PeerLost(f"{self.peer} was silent for {self.sock.gettimeout():g} s") from None
            except OSError as err:
                raise PeerLost(f"the link to {self.peer} broke: {err}") from err
            if received == 0:
                raise PeerLost(f"{self.peer} closed the link")
            done += received
        return bytes(buffer)
