"""A real SLURM on this machine: slurmctld, munged and a slurmd in each node, without systemd or cgroups.

A node is a network, UTS, mount, PID and IPC namespace with a host name, an address, a /dev/shm and a local
directory of its own; other files are shared, as on a cluster. What runs on it ends with it, by the kernel's
doing.

    python -m tests.slurm.cluster DIRECTORY     until its input ends
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from tests.support import left
from tests.support.serving import free_port, wait_until

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ip", "unshare", "nsenter")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
COMMAND_TIMEOUT_S = 240.0  # of a command that asks the controller, on a machine that does much else
PR_SET_PDEATHSIG = 1
SLURMD_TIMEOUT_S = 60  # of silence, until a node is taken for lost
CPUS, MEMORY_MB, GPUS = 16, 32000, 4  # that a node claims to have; nobody checks
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdSpoolDir={root}/%n
SlurmdPidFile={root}/%n.pid
SlurmdLogFile={root}/%n.log
AuthType=auth/munge
CredType=cred/munge
# How long credentials last is also how long a requeued job waits; less than 5 s is refused.
AuthInfo=socket={root}/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={memory_per_cpu}
GresTypes=gpu
PropagateResourceLimits=NONE
ReturnToService=2
MinJobAge=3600
SlurmdTimeout={slurmd_timeout}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=200000,bf_interval=2,batch_sched_delay=1
AccountingStorageType=accounting_storage/none
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
NodeName=node[1-{nodes}] NodeAddr={subnet}.[1-{nodes}]
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 State=UP
"""
# The node's first process. Names come from the hosts file alone: nobody answers for others here.
NODE = """\
set -e
hostname "$1"
for file in hosts nsswitch.conf resolv.conf; do
    [ -e "/etc/$file" ] || : >"/etc/$file"
    mount --bind "$2/etc/$file" "/etc/$file"
done
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$2/local"
echo booted
while read -r _; do :; done
"""


def why_not() -> str:
    """What is missing to start a cluster here, or "" if nothing is."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        return f"{', '.join(missing)} missing (apt-get install slurmctld slurmd slurm-client munge iproute2)"
    probe = ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "true"]
    if os.geteuid() != 0 or subprocess.run(probe, capture_output=True, check=False).returncode:
        return "namespaces need root with CAP_SYS_ADMIN and CAP_NET_ADMIN"
    return ""


class Cluster:
    """``nodes`` nodes, node1 and on; the controller and the caller are outside, and reach them by address."""

    def __init__(self, root: Path, *, nodes: int = 4) -> None:
        self.root = root
        self.names = [f"node{index}" for index in range(1, nodes + 1)]
        self.local = root / "local"  # a directory of each node's own
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(root / "slurm.conf")}
        self._subnet = _free_subnet()
        self._bridge = f"vwb{self._subnet.rpartition('.')[2]}"  # there may be two clusters at a time
        self._port = free_port()
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._inits: dict[str, psutil.Process] = {}
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Returns when all nodes are idle.

        Raises:
            TimeoutError: a daemon did not come up; its log is in ``root``.
        """
        try:
            self._configure()
            self._start_munge()
            _run("ip", "link", "add", self._bridge, "type", "bridge", "forward_delay", "0")
            _run("ip", "addr", "add", f"{self._subnet}.254/24", "dev", self._bridge)
            _run("ip", "link", "set", self._bridge, "up")
            self._spawn("slurmctld", "slurmctld", "-D", "-f", str(self.root / "slurm.conf"))
            for name in self.names:
                self.boot(name)
            idle = ["sinfo", "--noheader", "--partition=all", "--Node", "--states=idle", "--format=%N"]
            wait_until(
                f"{len(self.names)} idle nodes (logs in {self.root})",
                lambda: len(self.call(*idle, check=False).split()) == len(self.names),
                timeout_s=START_TIMEOUT_S,
            )
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        for name in ("munge", "state", "local", "etc", "gpu", *self.names):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        (self.root / "munge").chmod(0o711)
        text = CONFIGURATION.format(
            host=os.uname().nodename, address=f"{self._subnet}.254", port=self._port, root=self.root,
            nodes=len(self.names), subnet=self._subnet, cpus=CPUS, memory=MEMORY_MB,
            memory_per_cpu=MEMORY_MB // CPUS, gpus=GPUS, slurmd_timeout=SLURMD_TIMEOUT_S,
        )  # fmt: skip
        (self.root / "slurm.conf").write_text(text)
        # Only character devices are counted, and shown in CUDA_VISIBLE_DEVICES.
        for index in range(GPUS):
            (self.root / "gpu" / f"fake{index}").symlink_to("/dev/null")
        gres = f"NodeName=node[1-{len(self.names)}] Name=gpu File={self.root}/gpu/fake[0-{GPUS - 1}]\n"
        (self.root / "gres.conf").write_text(gres)
        version = self.call("slurmctld", "-V").split()[-1]
        plugin = "cgroup/v1" if int(version.split(".")[0]) < 23 else "disabled"  # looked for, never used
        (self.root / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        hosts = [f"{self._subnet}.{index} {name}" for index, name in enumerate(self.names, start=1)]
        hosts += ["127.0.0.1 localhost", f"{self._subnet}.254 {os.uname().nodename}"]
        (self.root / "etc/hosts").write_text("\n".join(hosts) + "\n")
        (self.root / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (self.root / "etc/resolv.conf").write_text("")

    def _start_munge(self) -> None:
        home = self.root / "munge"
        key = home / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        names = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "pid",
            "seed-file": "seed",
            "log-file": "log",
        }
        flags = [f"--{flag}={home / name}" for flag, name in names.items()]
        self._spawn("munged", "munged", "--foreground", "--force", *flags)
        wait_until(f"munged ({self.root}/munged.out)", (home / "socket").exists, timeout_s=START_TIMEOUT_S)

    def _spawn(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.root / f"{name}.out").open("wb") as output:
            daemon = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=self.env,
                preexec_fn=_end_with_us, start_new_session=True,
            )  # fmt: skip
        self._daemons.append(daemon)
        return daemon

    def boot(self, name: str) -> None:
        """Switch a node on."""
        index = self.names.index(name) + 1
        spaces = ["--net", "--uts", "--mount", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child"]
        node = subprocess.Popen(
            ["unshare", *spaces, "bash", "-c", NODE, "init", name, str(self.root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.env, preexec_fn=_end_with_us,
            start_new_session=True,
        )  # fmt: skip
        self._nodes[name] = node
        assert node.stdout is not None
        readable, _, _ = select.select([node.stdout], [], [], START_TIMEOUT_S)
        if not readable or node.stdout.readline() != b"booted\n":
            raise TimeoutError(f"{name} did not boot")
        (init,) = psutil.Process(node.pid).children()
        self._inits[name] = init
        port, pid = self._port_of(name), str(init.pid)
        _run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", pid)
        _run("ip", "link", "set", port, "master", self._bridge, "up")
        inside = ["nsenter", "--target", pid, "--net", "ip"]
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "addr", "add", f"{self._subnet}.{index}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        _run(*inside, "route", "add", "default", "via", f"{self._subnet}.254")
        self._start_slurmd(name)

    def _start_slurmd(self, name: str) -> None:
        slurmd = ["slurmd", "-D", "-N", name, "-f", str(self.root / "slurm.conf")]
        self._slurmds[name] = self._spawn(name, *self._inside(name), *slurmd)

    def slurmd(self, name: str) -> int:
        """The process id of a node's slurmd, as seen from here."""
        (slurmd,) = psutil.Process(self._slurmds[name].pid).children()  # of nsenter
        return slurmd.pid

    def inside(self, name: str) -> list[psutil.Process]:
        """All that runs on a node."""
        return self._inits[name].children(recursive=True)

    def replace_slurmd(self, name: str) -> None:
        """Kill a node's slurmd and start another one. Returns when the controller has heard of it."""
        before = self._slurmd_start(name)
        os.kill(self.slurmd(name), signal.SIGKILL)
        self._slurmds[name].wait(STOP_TIMEOUT_S)
        self._daemons.remove(self._slurmds[name])
        # By whole seconds: one that starts within the same would not be told from it.
        wait_until("the next second", lambda: _now() > before, timeout_s=START_TIMEOUT_S)
        self._start_slurmd(name)
        wait_until(
            f"the controller to hear of {name}'s new slurmd ({self.root}/{name}.out)",
            lambda: self._slurmd_start(name) != before,
            timeout_s=START_TIMEOUT_S,
        )

    def _slurmd_start(self, name: str) -> str:
        """When the node's slurmd started, as the controller knows it: the local time, to the second."""
        text = self.call("scontrol", "show", "node", name)
        found = next(word for word in text.split() if word.startswith("SlurmdStartTime="))
        return found.removeprefix("SlurmdStartTime=")

    def crash(self, name: str) -> None:
        """Cut a node's power: nobody hears a word of it any more. ``boot`` switches it on again."""
        _run("ip", "link", "del", f"{self._bridge}-{self.names.index(name) + 1}")
        self._switch_off(name)

    def _switch_off(self, name: str) -> None:
        """End a node's first process, and with it, by the kernel's doing, all that runs there."""
        init, slurmd = self._inits.pop(name, None), self._slurmds.pop(name, None)
        with self._nodes.pop(name) as node:
            node.kill()
        # The first process is gone only when nothing of its namespace is left, zombies included: slurmd is
        # nsenter's to reap, which must not be killed before it has.
        if slurmd is not None:
            slurmd.wait(STOP_TIMEOUT_S)
            self._daemons.remove(slurmd)
        if init is not None:
            init.wait(STOP_TIMEOUT_S)
        # The kernel removes it too, but later: the next cluster may want the name before.
        remove = ["ip", "link", "del", self._port_of(name)]
        subprocess.run(remove, env=self.env, capture_output=True, check=False)

    def _port_of(self, name: str) -> str:
        """The end of a node's cable that is here."""
        return f"{self._bridge}-{self.names.index(name) + 1}"

    def _inside(self, name: str) -> list[str]:
        spaces = ["--net", "--uts", "--mount", "--ipc", "--pid"]
        return ["nsenter", "--target", str(self._inits[name].pid), *spaces, "--"]

    def call(self, *command: str, check: bool = True, cwd: Path | None = None, **env: str) -> str:
        """What a command prints that talks to this cluster.

        Raises:
            AssertionError: it failed, and ``check`` is true.
        """
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            env={**self.env, **env},
            cwd=cwd,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def residue(self) -> list[str]:
        """What jobs have left on the nodes: processes, TCP listeners, shared memory, local files."""
        found = []
        for name, init in self._inits.items():
            own = {
                self._slurmds[name].pid,
                *(p.pid for p in psutil.Process(self._slurmds[name].pid).children()),
            }
            found += [f"{name}: {_describe(p)}" for p in self.inside(name) if p.pid not in own]
            ports = left.listening(init.pid) - {port for pid in own for port in left.listeners(pid)}
            found += [f"{name}: TCP port {port}" for port in sorted(ports)]
            for place in (Path("/dev/shm"), self.local):
                held = Path(f"/proc/{init.pid}/root{place}")
                found += [f"{name}: {place / path.name}" for path in held.iterdir()]
        return found

    def stop(self) -> None:
        """End all of it. Idempotent."""
        with ExitStack() as last_first:  # one that does not end must not keep the others
            remove = ["ip", "link", "del", self._bridge]
            last_first.callback(subprocess.run, remove, env=self.env, capture_output=True, check=False)
            last_first.callback(self._end_daemons)
            for name in self._nodes:
                last_first.callback(self._switch_off, name)

    def _end_daemons(self) -> None:
        while self._daemons:
            daemon = self._daemons.pop()
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _describe(process: psutil.Process) -> str:
    try:
        return (
            f"pid {process.pid}: {' '.join(process.cmdline())[:200] or process.name()} ({process.status()})"
        )
    except psutil.NoSuchProcess:
        return f"pid {process.pid}: gone meanwhile"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


_libc = ctypes.CDLL(None, use_errno=True)


def _end_with_us() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _run(*command: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": PATH}, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _free_subnet() -> str:
    taken = {address.address for found in psutil.net_if_addrs().values() for address in found}
    for step in range(254):
        subnet = f"10.213.{(os.getpid() + step) % 254 + 1}"
        if not any(address.startswith(f"{subnet}.") for address in taken):
            return subnet
    raise RuntimeError("no subnet of 10.213.0.0/16 is free")


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]))
    cluster.start()
    print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}", flush=True)
    sys.stdin.read()
    cluster.stop()
