"""The control frame: what travels over Gloo between the trainer ranks and the daemons.

Frames are small and of one size, so a receiver can post its buffer before it knows what will come. An index
of zero or more names the bucket that is being moved; -1 is a heartbeat and -2 the shutdown signal, as in
the older bridge; the rest of a round has codes of its own.
"""

from __future__ import annotations

import enum
import struct

import msgspec

from bridge.errors import ProtocolError

PROTOCOL_VERSION = 5
FRAME_BYTES = 1024
DIGEST_BYTES = 16
_HEAD = struct.Struct("<4sHhQQqH16s")
_MAGIC = b"VWB1"
MAX_TEXT_BYTES = FRAME_BYTES - _HEAD.size
COMMIT_WHEN_STAGED = 1  # BEGIN's index: nobody else has a say, so the daemon need not wait for COMMIT
HEARTBEAT_ASKS = 1  # HEARTBEAT's index: say how many frames you have taken, as behind any other frame
MAX_VERSION = (1 << 63) - 1
# Instead of an encoding in READY, and of a joint layout's key in BEGIN; may be followed by a space and the
# version that is to be served again.
ROLLBACK = "rollback"


class Opcode(enum.IntEnum):
    """What a frame says. The sender is in brackets; 0 is the coordinator, trainer rank 0."""

    BUCKET = 0  # [0 to all] index names the bucket under way
    HEARTBEAT = -1  # [anyone] index HEARTBEAT_ASKS or -1; text is what the sender waits for
    SHUTDOWN = -2  # [0 to all] the trainer is done; the server goes on
    READY = -3  # [trainer to 0] my weights are stable; digest is my layout's, text the encoding or ROLLBACK
    BEGIN = -4  # [0 to all] the round starts; digest is the plan's, text the joint layout's key or ROLLBACK,
    # index COMMIT_WHEN_STAGED or -1
    STAGED = -5  # [daemon to 0] all local ranks hold the whole version
    RELEASE = -6  # [0 to trainers] every byte has been read; weights may change
    COMMIT = -7  # [0 to daemons] all ranks have staged: make it live
    COMMITTED = -8  # [daemon to 0] the version is live; text is JSON of measurements
    DONE = -9  # [0 to trainers] text is the receipt
    FAILED = -10  # [anyone to 0] text says why
    ABORT = -11  # [0 to all] give the round up; text says why
    TAKEN = -12  # [anyone] index counts the frames that I have taken of you, but for these; seen by no owner


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """One control message. ``epoch`` fences off frames of an earlier incarnation of the group."""

    opcode: Opcode
    epoch: int = 0
    version: int = 0
    index: int = -1
    digest: bytes = b"\0" * DIGEST_BYTES
    text: str = ""


def encode(frame: Frame) -> bytes:
    """``FRAME_BYTES`` bytes. A text that does not fit loses its middle, not its end."""
    text = frame.text.encode()
    if len(text) > MAX_TEXT_BYTES:
        half = (MAX_TEXT_BYTES - 5) // 2
        text = text[:half] + b" ... " + text[-half:]
    head = _HEAD.pack(
        _MAGIC,
        PROTOCOL_VERSION,
        frame.opcode,
        frame.epoch,
        frame.version,
        frame.index,
        len(text),
        frame.digest,
    )
    return (head + text).ljust(FRAME_BYTES, b"\0")


def decode(data: bytes) -> Frame:
    """Parse ``FRAME_BYTES`` bytes.

    Raises:
        ProtocolError: not a frame, of another protocol version, with an unknown opcode, or with a text that
            it cannot hold.
    """
    if len(data) != FRAME_BYTES:
        raise ProtocolError(f"a control frame has {FRAME_BYTES} bytes, received {len(data)}")
    magic, version, opcode, epoch, weight_version, index, length, digest = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise ProtocolError(f"a control frame starts with {_MAGIC!r}, received {magic!r}")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"the peer speaks protocol {version}, this side {PROTOCOL_VERSION}")
    try:
        code = Opcode(opcode)
    except ValueError as err:
        raise ProtocolError(f"unknown opcode {opcode} in a control frame") from err
    if length > MAX_TEXT_BYTES:
        raise ProtocolError(
            f"a {code.name} frame says its text has {length} bytes, it holds {MAX_TEXT_BYTES}"
        )
    text = data[_HEAD.size : _HEAD.size + length].decode(errors="replace")
    return Frame(opcode=code, epoch=epoch, version=weight_version, index=index, digest=digest, text=text)
