"""Prometheus text for ``/bridge/metrics``, read from the daemon's status at scrape time.

A registry of our own: with several API servers vLLM switches prometheus_client to its multiprocess mode, in
which collectors like this one do not work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class StatusCollector(Collector):
    """Turns one status message into metric families."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield _gauge(
            "bridge_weight_version", "Weight version that every rank serves.", status["weight_version"]
        )
        yield _gauge("bridge_epoch", "Incarnations of the trainer group so far.", status["epoch"])
        yield _gauge(
            "bridge_trainer_connected", "1 while a trainer is connected.", int(bool(status["trainer"]))
        )
        yield _gauge(
            "bridge_ready",
            "1 when every rank has published its memory, and requests are answered with the newest version.",
            int(status["state"] in ("ready", "round") and not status["kept_out"]),
        )
        yield _gauge(
            "bridge_requests_kept_out",
            "1 while requests wait, or are answered with 503: what vLLM has is not the newest version.",
            int(bool(status["kept_out"])),
        )
        rounds = CounterMetricFamily("bridge_rounds", "Rounds by outcome.", labels=["outcome"])
        for outcome, count in status["rounds"].items():
            rounds.add_metric([outcome], count)
        yield rounds
        versions = GaugeMetricFamily("bridge_rank_weight_version", "Version of one rank.", labels=["rank"])
        for rank in status["ranks"]:
            versions.add_metric([str(rank["rank"])], rank["version"])
        yield versions
        if last := status["last_round"]:
            yield _gauge("bridge_last_round_bytes", "Bytes of the newest round.", last["bytes"])
            yield _gauge("bridge_last_round_transfer_seconds", "Time to move them.", last["transfer_s"])
            yield _gauge("bridge_commit_pause_seconds", "Longest flip of the newest commit.", last["flip_s"])


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family


def render(status: dict[str, Any]) -> bytes:
    """The exposition text of one status message."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(status))
    text: bytes = generate_latest(registry)
    return text
