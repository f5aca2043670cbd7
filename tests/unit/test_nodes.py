"""Node lists, the job as its variables tell it, ports, addresses; tests/slurm asks a real SLURM the same."""

from __future__ import annotations

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
