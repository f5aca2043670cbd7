"""Hosts on one machine: network namespaces on a switch of their own, each with its rates out and in."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

SUBNET = "10.214.0"
BURST, QUEUE = "256kb", "100ms"


@dataclass(frozen=True)
class Host:
    """A network namespace, and its address on the switch."""

    namespace: str
    address: str


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


def _shape(namespace: str, device: str, rate: str) -> None:
    if rate:
        _run(
            "ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, "root",
            "tbf", "rate", rate, "burst", BURST, "latency", QUEUE,
        )  # fmt: skip


@contextmanager
def shaped_hosts(rates: Mapping[str, tuple[str, str]]) -> Iterator[dict[str, Host]]:
    """Hosts by name; ``rates`` are tc's words for what each sends and takes, "" for no limit. Needs root."""
    mark = f"wbs{os.getpid()}"
    switch = f"{mark}x"
    made = []
    try:
        _run("ip", "netns", "add", switch)
        made.append(switch)
        _run("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "switch", "up")
        hosts = {}
        for index, (name, (out, into)) in enumerate(rates.items()):
            namespace, port = f"{mark}h{index}", f"port{index}"
            _run("ip", "netns", "add", namespace)
            made.append(namespace)
            _run(
                "ip", "-n", switch, "link", "add", port, "type", "veth",
                "peer", "name", "eth0", "netns", namespace,
            )  # fmt: skip
            _run("ip", "-n", switch, "link", "set", port, "master", "switch", "up")
            address = f"{SUBNET}.{index + 1}"
            _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", namespace, "link", "set", "eth0", "up")
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            _shape(namespace, "eth0", out)
            _shape(switch, port, into)
            hosts[name] = Host(namespace, address)
        yield hosts
    finally:
        for namespace in reversed(made):
            _run("ip", "netns", "del", namespace)
