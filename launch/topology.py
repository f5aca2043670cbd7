"""Which part of a server this launcher starts: by its flags, or by the SLURM step it runs in."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass

from bridge.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Place:
    """One launcher among those of a server; ``origin`` says who said so."""

    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = ""
    master_port: int = 0
    origin: str = "alone"


def find_place(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Place:
    """The place from --nnodes and its companions; what they leave open, from the SLURM step.

    Only the *step* counts: a process of the batch script sees SLURM_NNODES too, and is alone nevertheless.

    Raises:
        ConfigError: several nodes, and it is not known which is this one or where the first is.
        RendezvousError: this is the first node of a step, and finds no way to the others.
    """
    step_nodes = environ.get("SLURM_STEP_NUM_NODES", "")
    in_step = step_nodes.isdecimal() and int(step_nodes) > 1 and environ.get("SLURM_NODEID", "").isdecimal()
    nnodes, origin = args.nnodes, "flags"
    if nnodes is None:
        nnodes, origin = (int(step_nodes), "the SLURM step") if in_step else (1, "alone")
    if nnodes == 1:
        return Place(master_port=args.master_port)
    node_rank, master = args.node_rank, args.master_addr
    if in_step and environ.get("SLURM_LOCALID", "0") != "0":
        raise ConfigError(
            f"this is task {environ['SLURM_LOCALID']} of its node in the SLURM step, and each node has one "
            "launcher: srun --ntasks-per-node=1"
        )
    if in_step and int(step_nodes) == nnodes:
        node_rank = int(environ["SLURM_NODEID"]) if node_rank is None else node_rank
        master = master or _first_node(environ.get("SLURM_STEP_NODELIST", ""), here=node_rank == 0)
    if node_rank is None or not master:
        raise ConfigError(
            f"--nnodes is {nnodes}: give each node its --node-rank (0 to {nnodes - 1}) and all the same "
            "--master-addr, an address of node 0; srun with one task on each node gives all three"
        )
    return Place(
        nnodes=nnodes, node_rank=node_rank, master_addr=master, master_port=args.master_port, origin=origin
    )


def _first_node(nodelist: str, *, here: bool) -> str:
    """How the step's first node is reached; ``here``: it is this one, whose name may mean its loopback."""
    from bridge.nodes import expand_nodelist, own_address

    hosts = expand_nodelist(nodelist)
    if not hosts:
        return ""
    return own_address(hosts[1:])[0] if here else hosts[0]
