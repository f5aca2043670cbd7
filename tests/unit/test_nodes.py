"""Node lists, the job as its variables tell it, ports, addresses; tests/slurm asks a real SLURM the same."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from bridge import nodes
from bridge.errors import ConfigError, RendezvousError
from bridge.nodes import Component, Shape, expand_nodelist

BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "gpu[01-03]",
    "SLURM_JOB_CPUS_PER_NODE": "16(x2),8",
    "PATH": "",  # no scontrol
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("login", ["login"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("r[1-2]n[09-10]-x", ["r1n09-x", "r1n10-x", "r2n09-x", "r2n10-x"]),
    ],
)
def test_nodelists(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["gpu[1-2", "gpu[a-b]", "gpu[1-2]]"])
def test_nodelists_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="node list"):
        expand_nodelist(text)


def shape(**variables: str) -> Shape:
    return nodes.shape({**BATCH, **variables})


def test_a_job_by_its_variables() -> None:
    hosts, cpus = ("gpu01", "gpu02", "gpu03"), (16, 16, 8)
    bare = shape()
    assert bare == Shape(
        job_id=7, restarts=0, components=(Component(hosts=hosts, cpus=cpus, gpus=(0, 0, 0)),)
    )
    assert shape(SLURM_RESTART_COUNT="2").restarts == 2
    assert shape(SLURM_GPUS_PER_NODE="a100:2,h100:1").components[0].gpus == (3, 3, 3)
    assert shape(SLURM_GPUS_ON_NODE="4").components[0].gpus == (4, 4, 4)
    assert shape(SLURM_GPUS_ON_NODE="4", SLURM_GPUS="9").components[0].gpus is None


def test_a_heterogeneous_job_by_its_variables() -> None:
    found = shape(
        SLURM_HET_SIZE="2",
        SLURM_JOB_NODELIST_HET_GROUP_0="a[1-2]",
        SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0="4(x2)",
        SLURM_GPUS_PER_NODE_HET_GROUP_0="2",
        SLURM_JOB_NODELIST_HET_GROUP_1="b7",
        SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1="64",
    )
    assert found.components == (
        Component(hosts=("a1", "a2"), cpus=(4, 4), gpus=(2, 2)),
        Component(hosts=("b7",), cpus=(64,), gpus=None),
    )


def test_no_job() -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is '': not in a job"):
        nodes.shape({})
    with pytest.raises(ConfigError, match=r"pyslurm .*; scontrol: .*; SLURM_JOB_CPUS_PER_NODE not set"):
        shape(SLURM_JOB_CPUS_PER_NODE="")


def test_a_pyslurm_that_does_not_fit_ends_only_the_process_that_asks(tmp_path: Path) -> None:
    (tmp_path / "pyslurm.py").write_text("import os\nos._exit(1)\n")
    found = shape(PYTHONPATH=str(tmp_path))
    assert found.components[0].hosts == ("gpu01", "gpu02", "gpu03")


# pyslurm 25.11, as far as it is asked: it numbers cores, and takes each to have one thread.
PYSLURM = """
class Job:
    def __init__(self, id, offset, layout):
        self.id, self.heterogeneous_id, self.heterogeneous_offset = id, {leader}, offset
        self.requeue_count = 2
        self.layout = layout

    @classmethod
    def load(cls, id):
        return Jobs.load()[id]

    def get_resource_layout_per_node(self):
        return {{
            host: {{"cpu_ids": cores, "gres": {gres}, "memory": 1024}} for host, cores in self.layout.items()
        }}


class Jobs(dict):
    @classmethod
    def load(cls):
        return cls({{7: Job(7, 0, {{"a1": "0-1", "a2": "0-1"}}), 8: Job(8, 1, {{"b7": "4-7"}})}})
"""
GRES = '{"gpu:a100": {"count": 2, "indexes": "0-1"}, "gpu": 1, "shard": {"count": 9, "indexes": "0"}}'
HET = {
    "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "a[1-2]", "SLURM_JOB_NODELIST_HET_GROUP_1": "b7",
    "SLURM_GPUS_PER_NODE_HET_GROUP_0": "a100:2,h100:1", "SLURM_GPUS_PER_NODE_HET_GROUP_1": "3",
}  # fmt: skip


def pyslurm_job(tmp_path: Path, *, threads: int, leader: str = "7", gres: str = GRES) -> dict[str, str]:
    """The environment of a job whose nodes have so many threads per core, where each source can be asked."""
    (tmp_path / "pyslurm.py").write_text(PYSLURM.format(leader=leader, gres=gres))
    cpus = [f"0-{2 * threads - 1}", f"{4 * threads}-{8 * threads - 1}"]
    lines = [
        f"JobId=7 HetJobId=7 HetJobOffset=0 Restarts=2 NodeList=a[1-2] Nodes=a[1-2] CPU_IDs={cpus[0]} Mem=1 "
        "GRES=gpu:a100:2(IDX:0-1),gpu:h100:1(IDX:2)",
        f"JobId=8 HetJobId=7 HetJobOffset=1 Restarts=2 NodeList=b7 Nodes=b7 CPU_IDs={cpus[1]} Mem=1 "
        "GRES=gpu:3(IDX:0-2)",
    ]
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{line}'" for line in lines) + "\n")
    scontrol.chmod(0o755)
    return {
        **HET, "PYTHONPATH": str(tmp_path), "PATH": str(tmp_path),
        "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0": f"{2 * threads}(x2)",
        "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1": f"{4 * threads}",
    }  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_pyslurm_tells_what_the_others_do(tmp_path: Path, threads: int) -> None:
    environ = pyslurm_job(tmp_path, threads=threads)
    found = nodes.from_pyslurm(environ)
    assert found == nodes.from_scontrol(environ) == nodes.from_variables(environ)
    assert found.components[0] == Component(hosts=("a1", "a2"), cpus=(2 * threads,) * 2, gpus=(3, 3))
    assert found.components[1] == Component(hosts=("b7",), cpus=(4 * threads,), gpus=(3,))
    without = {name: value for name, value in environ.items() if "CPUS" not in name}
    assert nodes.from_pyslurm(without) == found, "scontrol knows how many CPUs there are"


@pytest.mark.parametrize(
    ("leader", "gres", "why"),
    [
        ("7", "[]", "AttributeError"),
        ("7", '{"gpu": {"number": 2}}', "KeyError"),
        ("7", '{"gpu": "two"}', "Expected `int`, got `str`"),
        ("8", "{}", r"pyslurm says that the job's hosts are \[\('a1', 'a2'\)\], and Slurm itself"),
    ],
)
def test_a_pyslurm_that_answers_otherwise_is_named_and_another_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, leader: str, gres: str, why: str
) -> None:
    environ = pyslurm_job(tmp_path, threads=1, leader=leader, gres=gres)
    assert nodes.shape(environ) == nodes.from_scontrol(environ)
    assert re.search(why, caplog.text), caplog.text
    assert "pyslurm" in caplog.text
    assert "asking elsewhere" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("SLURM_JOB_ID", "٣", "not in a job"),
        ("SLURM_JOB_ID", "7" * 5000, "not in a job"),
        ("SLURM_RESTART_COUNT", "two", "no number"),
        ("SLURM_HET_SIZE", "-1", "no number"),
        ("SLURM_HET_SIZE", "999999999", "at most 128 components"),
        ("SLURM_GPUS_ON_NODE", "a100:2", "no number"),
        ("SLURM_GPUS_PER_NODE", "a100:2,h100", "no number"),
        ("SLURM_JOB_CPUS_PER_NODE", "16x2,8", r"like 16\(x2\),8"),
        ("SLURM_JOB_CPUS_PER_NODE", "16(x999999999)", "at most 65536 nodes"),
        ("SLURM_JOB_CPUS_PER_NODE", "16", r"1 host\(s\), and SLURM_JOB_NODELIST names 3"),
        ("SLURM_JOB_NODELIST", "a[0-9999][0-9999]", "more than 65536 hosts"),
        ("SLURM_JOB_NODELIST", "a" + "[1]" * 3000, "more than 8 brackets"),
    ],
)
def test_a_variable_that_cannot_be_is_named(name: str, value: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        nodes.from_variables({**BATCH, name: value})
    assert name in str(caught.value) or "node list" in str(caught.value)
    assert value[:5] in str(caught.value)


def test_jobs_and_servers_on_a_node_get_ports_of_their_own() -> None:
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = [nodes.free_port(job, offset) for job in (1, 2, 5000) for offset in range(3)]
    assert len(set(found)) == len(found)
    assert all(1024 <= port < ephemeral for port in found)
    with socket.create_server(("127.0.0.1", found[0])):
        assert nodes.free_port(1) != found[0]


def test_a_job_of_many_servers_keeps_to_its_own_ports() -> None:
    ours, next_ones = ({nodes.free_port(job, offset) for offset in range(40)} for job in (5, 6))
    assert not ours & next_ones
    assert nodes.free_port(5, 0) not in {nodes.free_port(5, offset) for offset in range(1, 40)}


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")])
def test_a_port_that_a_starting_server_has_bound_is_taken(family: socket.AddressFamily, host: str) -> None:
    """vLLM binds with SO_REUSEADDR, and listens minutes later."""
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    port = nodes.free_port(7)
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        assert nodes.free_port(7) != port
    assert nodes.free_port(7) == port


def test_the_own_address_is_the_one_on_the_way_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    loopback = ("127.0.0.1", "lo")
    assert nodes.own_address(["127.0.0.1"]) == loopback
    assert nodes.own_address([]) == loopback
    with pytest.raises(RendezvousError, match=r"finds no way to no\.such\.host\.invalid"):
        nodes.own_address(["no.such.host.invalid"])


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in BATCH.items():
        monkeypatch.setenv(name, value)
    assert nodes.main(["hosts"]) == 0
    assert nodes.main(["hosts", "n[1-2]"]) == 0
    assert nodes.main(["port"]) == 0
    assert capsys.readouterr().out.split()[:5] == ["gpu01", "gpu02", "gpu03", "n1", "n2"]
    assert nodes.main(["hosts", "n[1-"]) == ConfigError.exit_code
    assert "its brackets do not match" in capsys.readouterr().err
    assert nodes.main([]) == ConfigError.exit_code
