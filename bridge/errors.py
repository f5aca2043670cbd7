"""Every way the bridge can fail, by name.

::

    BridgeError
      ConfigError          exit 2   the user asked for something that cannot be
        MappingError                 the mapping file, or a model that does not match it
        TopologyError                ranks, hosts or world sizes that do not fit together
        UnsupportedVersion           a vLLM, torch or protocol version nobody has tested
      RendezvousError      exit 75  the two sides did not meet
        RendezvousRefused            they met, and one said no
      TransferError        exit 75  they met, and the bytes did not arrive
        PeerLost                     a process died or fell silent
        ChecksumMismatch             bytes arrived, but other ones
        RoundAborted                 this version was not committed; the old one is still served
      DeviceError          exit 71  the CUDA driver refused a call
      ProtocolError        exit 70  a bug: an impossible frame or transition

Exit codes follow sysexits.h: 75 (EX_TEMPFAIL) says that trying again may help.
"""


class BridgeError(Exception):
    """Base of all errors the bridge raises on purpose."""

    exit_code = 1


class ConfigError(BridgeError, ValueError):
    """The configuration cannot work, and trying again will not help."""

    exit_code = 2


class MappingError(ConfigError):
    """The mapping is missing, damaged, or does not fit the model. Lists every fault found."""


class TopologyError(ConfigError):
    """Ranks, hosts or world sizes do not fit together."""


class UnsupportedVersion(ConfigError):
    """A version of vLLM, torch or the protocol that was never tested."""


class RendezvousError(BridgeError):
    """Trainer and inference did not meet within the deadline."""

    exit_code = 75


class RendezvousRefused(RendezvousError):
    """The other side answered, and refused; the message carries its reason."""


class TransferError(BridgeError):
    """A round did not finish."""

    exit_code = 75


class PeerLost(TransferError):
    """A process died or was silent for longer than the deadline."""

    first_hand = False  # whether it is no consequence of anything that another process could know better


class ChecksumMismatch(TransferError):
    """Bytes that arrived are not the bytes that were sent."""


class RoundAborted(TransferError):
    """The round was given up: nothing was committed and the old version is still served."""


class DeviceError(BridgeError):
    """The CUDA driver refused a call; the message carries its name for the reason."""

    exit_code = 71


class ProtocolError(BridgeError):
    """An impossible frame or transition: a defect of the bridge or of the wire, never of its user."""

    exit_code = 70
