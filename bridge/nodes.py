"""The job that SLURM gave us: its hosts, what it has of each, and what is free on this one.

::

    python -m bridge.nodes hosts [NODELIST]     one host a line; default the job's, in the order of its ranks
    python -m bridge.nodes shape                the job as JSON
    python -m bridge.nodes port [OFFSET]        a port that is free on this host; jobs differ, and OFFSETs do
    python -m bridge.nodes address [PEER ...]   this host's address that PEERs reach, and its interface

A shape is read from pyslurm where it works (extra ``slurm``), else from ``scontrol``, else from the variables
of the batch script. All three say the same, but that the variables cannot tell how many GPUs lie on each of
several nodes unless they were asked for by node. CPUs are never pyslurm's: it takes a core for one.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from bridge.errors import BridgeError, ConfigError, RendezvousError, UnsupportedVersion
from bridge.protocol.decoding import UNREADABLE

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 20.0  # the controller of a large cluster may take its time
MAX_RANGE = 1 << 16  # hosts or CPUs; SLURM knows no more
MAX_COMPONENTS = 128  # of a heterogeneous job; nor of these
MAX_BRACKETS = 8  # in one name
PORTS_PER_JOB = 16
MASTER_OFFSET = PORTS_PER_JOB - 1  # of vLLM's master port; torchrun's is 0, servers count from 1
LEAST_PORTS = 1000
NOWHERE = "192.0.2.1"  # RFC 5737: of no network, so the way there is the default route
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_SIOCGIFADDR = 0x8915
# Importing pyslurm where it does not fit the cluster ends the process, so a child does it.
# What has another form is said as such, so that it can be told from a pyslurm that is not there.
_PYSLURM = """
import json, sys, pyslurm
try:
    leader = pyslurm.Job.load(int(sys.argv[1]))
    parts = [job for job in pyslurm.Jobs.load().values() if job.heterogeneous_id == leader.id] or [leader]
    parts.sort(key=lambda job: job.heterogeneous_offset or 0)
    layouts = [job.get_resource_layout_per_node() for job in parts]
    answer = {"job_id": leader.id, "restarts": leader.requeue_count or 0, "gres": [
        {host: {name: gres["count"] if isinstance(gres, dict) else gres for name, gres in on["gres"].items()}
         for host, on in layout.items()}
        for layout in layouts]}
    said = json.dumps(answer)
except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as err:
    said = json.dumps({"error": repr(err)})
print(said)
"""


_Count = Annotated[int, msgspec.Meta(ge=0, lt=10**18)]  # as many digits as are read elsewhere


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the child says: of each component by host, how many there are of what."""

    job_id: _Count
    restarts: _Count
    gres: list[dict[str, dict[str, _Count]]]


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """A job's nodes; of a heterogeneous job those of one component. Tuples go by host."""

    hosts: tuple[str, ...]
    cpus: tuple[int, ...]
    gpus: tuple[int, ...] | None  # None: not known here


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What SLURM gave a job. ``restarts`` counts its requeues."""

    job_id: int
    restarts: int
    components: tuple[Component, ...]


# --- node lists --------------------------------------------------------------------------------------------


def expand_nodelist(nodelist: str) -> list[str]:
    """``gpu[01-03,7],login`` as host names, in order, as ``scontrol show hostnames`` prints them.

    Raises:
        ConfigError: brackets do not match, a range is not one, or there are more hosts than can be.
    """
    if nodelist.count("[") != nodelist.count("]"):
        raise ConfigError(f"the node list is {nodelist[:200]!r}; its brackets do not match")
    parts = [part.strip() for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist)]
    if any(part.count("[") > MAX_BRACKETS for part in parts):
        raise ConfigError(
            f"the node list is {nodelist[:200]!r}; a name has more than {MAX_BRACKETS} brackets"
        )
    hosts = list(itertools.islice((host for part in parts for host in _expand(part)), MAX_RANGE + 1))
    if len(hosts) > MAX_RANGE:
        raise ConfigError(f"the node list {nodelist[:200]!r} has more than {MAX_RANGE} hosts")
    return hosts


def _expand(part: str) -> Iterator[str]:
    match = re.search(r"\[([^\]]*)\]", part)
    if match is None:
        yield part
        return
    head, tail = part[: match.start()], part[match.end() :]
    for first, last in _ranges(match[1], where=part):
        for number in range(int(first), int(last) + 1):
            for rest in _expand(tail):
                yield f"{head}{number:0{len(first)}d}{rest}"


def _ranges(text: str, *, where: str) -> Iterator[tuple[str, str]]:
    for item in text.split(","):
        bounds = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", item.strip())
        if bounds is None:
            raise ConfigError(f"the node list has the range {item!r} in {where!r}; it must be like 01-04")
        first, last = bounds[1], bounds[2] or bounds[1]
        if int(last) - int(first) >= MAX_RANGE:
            raise ConfigError(f"the range {item!r} in {where!r} has more than {MAX_RANGE} of them")
        yield first, last


# --- the job's shape ---------------------------------------------------------------------------------------


def shape(environ: Mapping[str, str] = os.environ) -> Shape:
    """The job that this process is in, from the first source that answers.

    Raises:
        ConfigError: this is no job, or no source can be read; says why of each.
    """
    reasons = []
    for source in (from_pyslurm, from_scontrol, from_variables):
        try:
            return source(environ)
        except BridgeError as err:
            reasons.append(str(err))
            if isinstance(err, UnsupportedVersion):
                logger.warning("%s; asking elsewhere", err)
    raise ConfigError("the job's shape cannot be read: " + "; ".join(reasons))


def from_pyslurm(environ: Mapping[str, str] = os.environ) -> Shape:
    """The shape as pyslurm tells it, with the CPUs that the variables tell, or scontrol without them.

    pyslurm 25.11 counts one thread for each core, whatever the node has.

    Raises:
        ConfigError: there is no job, no pyslurm, or one that does not fit this cluster.
        UnsupportedVersion: what it says has another form than that of 25.11.
    """
    said = _ask([sys.executable, "-c", _PYSLURM, str(job_of(environ))], environ)
    try:
        known = from_variables(environ)
    except ConfigError:
        known = from_scontrol(environ)
    return read_pyslurm(said, known.components)


def read_pyslurm(said: str, known: Sequence[Component]) -> Shape:
    """The shape from what the child says of pyslurm's, with the hosts and CPUs that are ``known``.

    Raises:
        UnsupportedVersion: it has another form than that of 25.11, or other hosts.
    """
    try:
        told = msgspec.json.decode(said, type=_Answer)
    except UNREADABLE as err:
        raise UnsupportedVersion(f"pyslurm answered {said[:200]!r}, not as 25.11 does: {err}") from None
    hosts, theirs = [part.hosts for part in known], [tuple(nodes) for nodes in told.gres]
    if hosts != theirs:
        raise UnsupportedVersion(f"pyslurm says that the job's hosts are {theirs}, and Slurm itself {hosts}")
    components = tuple(
        msgspec.structs.replace(part, gpus=tuple(_gpus(on) for on in nodes.values()))
        for part, nodes in zip(known, told.gres, strict=True)
    )
    return Shape(job_id=told.job_id, restarts=told.restarts, components=components)


def _gpus(gres: Mapping[str, int]) -> int:
    return sum(count for name, count in gres.items() if name.partition(":")[0] == "gpu")


def from_scontrol(environ: Mapping[str, str] = os.environ) -> Shape:
    """The shape as ``scontrol show job --details`` tells it.

    Raises:
        ConfigError: there is no job, or no scontrol that knows it.
    """
    job_id = job_of(environ)
    return read_scontrol(
        _ask(["scontrol", "--details", "--oneliner", "show", "job", str(job_id)], environ), job_id
    )


def read_scontrol(text: str, job_id: int) -> Shape:
    """The shape of ``job_id`` from scontrol's lines, one for each component.

    Asked for the first task of a job array, scontrol tells of all tasks: theirs are left out.

    Raises:
        ConfigError: the job is not among them, or something is missing.
    """
    ours = str(job_id)
    lines = [line for line in text.splitlines() if ours in (_word(line, "JobId"), _word(line, "HetJobId"))]
    lines.sort(key=lambda line: _number(line, "HetJobOffset", default="0"))
    if not lines:
        raise ConfigError(f"scontrol says nothing of job {job_id}: {text[:200]!r}")
    return Shape(
        job_id=job_id,
        restarts=_number(lines[0], "Restarts"),
        components=tuple(_component(line) for line in lines),
    )


def _component(line: str) -> Component:
    cpus: dict[str, int] = {}
    gpus: dict[str, int] = {}
    for nodes, ids, gres in re.findall(r"\sNodes=(\S+) CPU_IDs=(\S+) Mem=\S+ GRES=(\S*)", line):
        for host in expand_nodelist(nodes):
            cpus[host] = _count(ids)
            # gpu:2(IDX:0-1), gpu:a100:2(IDX:0-1), several of them after commas
            gpus[host] = sum(int(n) for n in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:([0-9]{1,9})", gres))
    hosts = tuple(expand_nodelist(_field(line, "NodeList")))
    if missing := [host for host in hosts if host not in cpus]:
        raise ConfigError(f"scontrol does not say what the job has of {', '.join(missing)}")
    return Component(
        hosts=hosts, cpus=tuple(cpus[host] for host in hosts), gpus=tuple(gpus[host] for host in hosts)
    )


def _field(line: str, name: str, *, default: str | None = None) -> str:
    found = _word(line, name)
    if found is None and default is None:
        raise ConfigError(f"scontrol's answer has no {name}: {line[:200]!r}")
    return found if found is not None else str(default)


def _word(line: str, name: str) -> str | None:
    match = re.search(rf"(?:^|\s){name}=(\S*)", line)
    return match[1] if match is not None else None


def _number(line: str, name: str, *, default: str | None = None) -> int:
    return _whole(_field(line, name, default=default), f"scontrol says that {name}")


def _whole(text: str, what: str) -> int:
    """The number that ``text`` is; ``what`` begins the sentence that says it is none."""
    if re.fullmatch("[0-9]{1,18}", text) is None:
        raise ConfigError(f"{what} is {text[:200]!r}, which is no number")
    return int(text)


def _count(ids: str) -> int:
    """How many numbers ``0-3,8`` stands for."""
    return sum(int(last) - int(first) + 1 for first, last in _ranges(ids, where=ids))


def from_variables(environ: Mapping[str, str] = os.environ) -> Shape:
    """The shape as the variables of the batch script tell it.

    Raises:
        ConfigError: a variable is missing or cannot be read.
    """
    job_id = job_of(environ)
    size = number_in(environ, "SLURM_HET_SIZE")
    if size > MAX_COMPONENTS:
        raise ConfigError(f"SLURM_HET_SIZE is {size}, and a job has at most {MAX_COMPONENTS} components")
    suffixes = [f"_HET_GROUP_{group}" for group in range(size)] or [""]
    return Shape(
        job_id=job_id,
        restarts=number_in(environ, "SLURM_RESTART_COUNT"),
        components=tuple(_told(environ, suffix) for suffix in suffixes),
    )


def _told(environ: Mapping[str, str], suffix: str) -> Component:
    nodes, cpus = f"SLURM_JOB_NODELIST{suffix}", f"SLURM_JOB_CPUS_PER_NODE{suffix}"
    if missing := [name for name in (nodes, cpus) if not environ.get(name)]:
        raise ConfigError(f"{' and '.join(missing)} not set")
    hosts, counts = tuple(expand_nodelist(environ[nodes])), _per_node(environ[cpus], cpus)
    if len(hosts) != len(counts):
        raise ConfigError(
            f"{cpus} is {environ[cpus][:200]!r}, for {len(counts)} host(s), and {nodes} names {len(hosts)}"
        )
    return Component(hosts=hosts, cpus=counts, gpus=_told_gpus(environ, suffix, len(hosts)))


def _told_gpus(environ: Mapping[str, str], suffix: str, hosts: int) -> tuple[int, ...] | None:
    name = f"SLURM_GPUS_PER_NODE{suffix}"
    if per_node := environ.get(name):
        # "2", "a100:2", "a100:2,h100:1"
        counts = [
            _whole(kind.rpartition(":")[2], f"{name} is {per_node[:200]!r}; a count in it")
            for kind in per_node.split(",")
        ]
        return (sum(counts),) * hosts
    if suffix:  # the variables of this node are those of the first component
        return None
    here = number_in(environ, "SLURM_GPUS_ON_NODE")
    if hosts > 1 and environ.get("SLURM_GPUS"):
        return None
    return (here,) * hosts


def _per_node(text: str, name: str) -> tuple[int, ...]:
    """``16(x2),8`` by node."""
    found = [re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", item) for item in text.split(",")]
    counts = [(int(match[1]), int(match[2] or 1)) for match in found if match is not None]
    if len(counts) != len(found) or sum(times for _, times in counts) > MAX_RANGE:
        raise ConfigError(
            f"{name} is {text[:200]!r}; it must be like 16(x2),8, for at most {MAX_RANGE} nodes"
        )
    return tuple(number for number, times in counts for _ in range(times))


def number_in(environ: Mapping[str, str], name: str) -> int:
    """The number in a variable; 0 without it.

    Raises:
        ConfigError: it holds something else.
    """
    return _whole(environ.get(name) or "0", name)


def job_of(environ: Mapping[str, str] = os.environ) -> int:
    """The id of the job that this process is in.

    Raises:
        ConfigError: it is in none.
    """
    text = environ.get("SLURM_JOB_ID", "")
    if re.fullmatch("[0-9]{1,18}", text) is None:
        raise ConfigError(f"SLURM_JOB_ID is {text[:200]!r}: not in a job of SLURM")
    return int(text)


def _ask(command: Sequence[str], environ: Mapping[str, str]) -> str:
    what = "pyslurm" if command[0] == sys.executable else command[0]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=ASK_TIMEOUT_S,
            env=dict(environ), check=False,
        )  # fmt: skip
    except OSError as err:
        raise ConfigError(f"{what}: {err.strerror}") from err
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{what} did not answer within {ASK_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise ConfigError(f"{what} ended with {done.returncode}: {last}")
    return done.stdout


# --- this host ---------------------------------------------------------------------------------------------


def free_port(job_id: int, offset: int = 0, *, but: Collection[int] = ()) -> int:
    """A TCP port that is free on this host, not one of those that the kernel gives to connections.

    Jobs that share a node begin to look at different places, each in ``PORTS_PER_JOB`` of its own, so that
    two of them do not find the same one before either has taken it. So do different offsets; large ones
    repeat, but for 0, because a job's servers have nodes of their own. ``but`` are ports that somebody is
    to take who has not yet.

    Raises:
        RendezvousError: all are taken.
    """
    bottom, top = _own_ports(*map(int, _EPHEMERAL.read_text().split()))
    place = 1 + (offset - 1) % (PORTS_PER_JOB - 1) if offset else 0
    for step in range(top - bottom):
        port = bottom + ((job_id + step) * PORTS_PER_JOB + place) % (top - bottom)
        if port not in but and _is_free(port):
            return port
    raise RendezvousError(f"no port from {bottom} to {top} is free on {socket.gethostname()}")


def _is_free(port: int) -> bool:
    """Whether nobody has ``port`` at any address of this host, by IPv4 or IPv6.

    Without SO_REUSEADDR: with it a port is free to us that vLLM has bound, and listens on minutes later.
    """
    both = socket.has_dualstack_ipv6()  # then one socket stands for either
    with socket.socket(socket.AF_INET6 if both else socket.AF_INET) as probe:
        if both:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _own_ports(low: int, high: int) -> tuple[int, int]:
    """From and below which ports are nobody's, where the kernel takes ``low`` to ``high`` for connections."""
    rooms = [(max(1024, low // 2), low), (high + 1, 1 << 16)]
    for bottom, top in rooms:
        if top - bottom >= LEAST_PORTS:
            return bottom, top
    return low, high + 1  # it leaves nothing; a connection may take the port before it is ours


def own_address(peers: Sequence[str]) -> tuple[str, str]:
    """This host's IPv4 address on the way to the first of ``peers`` that is another host, and its interface.

    Without one, on a node of SLURM: the address that SLURM reaches it by, or the one on the way out of here.
    At last the loopback's. The interface is "" where no one has the address as its first.

    Raises:
        RendezvousError: a peer's name cannot be resolved.
    """
    for peer in peers:
        try:
            address = _address_towards(peer)
        except OSError as err:
            raise RendezvousError(f"{socket.gethostname()} finds no way to {peer}: {err}") from err
        if not address.startswith("127."):
            return address, _interface(address)
    for place in _ways_out():
        with contextlib.suppress(OSError):  # a name that nobody knows here, or no route
            if not (address := _address_towards(place)).startswith("127."):
                return address, _interface(address)
    return "127.0.0.1", _interface("127.0.0.1")


def _address_towards(host: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # nothing is sent
        return str(probe.getsockname()[0])


def _ways_out() -> list[str]:
    """Of a node of SLURM, what may show the address that others see: itself, and a place that is nowhere."""
    name = os.environ.get("SLURMD_NODENAME")
    if not name:
        return []
    try:
        text = _ask(["scontrol", "--oneliner", "show", "node", name], os.environ)
        return [_field(text, "NodeAddr"), NOWHERE]
    except ConfigError:  # no scontrol on this node: its own name has to do
        return [socket.gethostname(), NOWHERE]


def _interface(address: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # has no address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


# --- the command line --------------------------------------------------------------------------------------


def _hosts(words: Sequence[str]) -> str:
    if words:
        return "\n".join(expand_nodelist(",".join(words)))
    return "\n".join(host for part in shape().components for host in part.hosts)


def _shape(_: Sequence[str]) -> str:
    return msgspec.json.encode(shape()).decode()


def _port(words: Sequence[str]) -> str:
    return str(free_port(job_of(), int(words[0]) if words else 0))


def _address(words: Sequence[str]) -> str:
    return " ".join(own_address(words))


_COMMANDS: dict[str, Callable[[Sequence[str]], str]] = {
    "hosts": _hosts,
    "shape": _shape,
    "port": _port,
    "address": _address,
}


def main(words: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    if not words or words[0] not in _COMMANDS:
        sys.stderr.write(f"usage: python -m bridge.nodes {{{','.join(_COMMANDS)}}} [words]\n")
        return ConfigError.exit_code
    try:
        print(_COMMANDS[words[0]](words[1:]))  # noqa: T201 - its answer
    except BridgeError as err:
        sys.stderr.write(f"error: {err}\n")
        return err.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
