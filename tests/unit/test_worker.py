"""When a worker flips: before the forward of the stamped batch, and never silently not at all."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge import flight, telemetry
from bridge.errors import MappingError
from tests.support.serving import wait_until
from vllm_patching import flip_log
from vllm_patching.control_page import ControlPage
from vllm_patching.cpu_arena import CpuArena
from vllm_patching.flip_log import FlipLog
from vllm_patching.kept import Watch
from vllm_patching.worker import WorkerBridge


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerBridge]:
    arena = CpuArena(4096)
    arena.half(0).fill_(0)
    arena.half(1).fill_(1)
    bridge = WorkerBridge(rank=0, arena=arena, log_path=tmp_path / "flips.jsonl")
    bridge.slot = ControlPage.create(1).slot(0)
    yield bridge
    bridge.close()


def served(worker: WorkerBridge) -> int:
    return int(worker.arena.live(0, 1)[0])


def run_batch(worker: WorkerBridge, stamp: int, *, tokens: int = 3, announces: bool = True) -> int | None:
    """One ``execute_model``; returns what its forward read."""
    worker.before_batch(stamp, tokens)
    if tokens and announces:
        worker.before_forward()
    read = served(worker) if tokens else None
    worker.after_batch()
    return read


def test_the_first_stamp_is_not_put_off_before_a_forward_was_seen(worker: WorkerBridge) -> None:
    worker.before_batch(1, 3)
    assert served(worker) == 1


def test_a_stamped_batch_reads_the_new_version_from_its_forward_on(worker: WorkerBridge) -> None:
    assert run_batch(worker, 0) == 0
    worker.before_batch(1, 3)
    assert served(worker) == 0  # still: the GPU may be running the batch before
    worker.before_forward()
    assert served(worker) == 1
    worker.after_batch()
    assert run_batch(worker, 1) == 1
    assert worker.slot is not None
    assert (worker.slot.version, worker.slot.batch, worker.slot.flips, worker.slot.failures) == (1, 2, 1, 0)


def test_a_batch_without_tokens_flips_at_once(worker: WorkerBridge) -> None:
    run_batch(worker, 0)
    run_batch(worker, 1, tokens=0)
    assert served(worker) == 1
    assert worker.slot is not None
    assert worker.slot.batch == 2  # the first that reads it, as on ranks that flip with that
    assert run_batch(worker, 2) == 0
    assert (worker.version, worker.slot.batch) == (2, 2)


def test_dummy_batches_count_as_the_batches_of_other_engines_do(worker: WorkerBridge) -> None:
    run_batch(worker, 0)
    worker.before_dummy_batch()
    worker.commit(1)
    assert worker.slot is not None
    assert worker.slot.batch == 3
    worker.before_dummy_batch()
    run_batch(worker, 2)
    assert worker.slot.batch == 4


def test_whoever_shares_the_device_sees_batches_begin_and_other_nodes_do_not(worker: WorkerBridge) -> None:
    assert worker.slot is not None
    run_batch(worker, 0)
    words = worker.slot.words
    worker.before_dummy_batch()
    run_batch(worker, 0, tokens=0)
    assert worker.slot.begun == 2
    assert worker.slot.words == words  # or every batch would be told


def test_a_forward_that_was_not_announced_is_a_failure(worker: WorkerBridge) -> None:
    run_batch(worker, 0)
    run_batch(worker, 1, announces=False)
    assert worker.slot is not None
    assert (worker.version, worker.slot.failures) == (0, 1)


def test_weights_that_are_read_early_flip_at_the_entry(tmp_path: Path) -> None:
    arena = CpuArena(4096)
    arena.half(1).fill_(1)
    worker = WorkerBridge(rank=0, arena=arena, log_path=tmp_path / "flips.jsonl", at_entry=True)
    worker.slot = ControlPage.create(1).slot(0)
    run_batch(worker, 0)
    worker.before_batch(1, 3)
    assert torch.equal(arena.live(0, 4096), arena.half(1))
    assert served(worker) == 1
    worker.close()


def logged(path: Path) -> list[int]:
    """The versions in a log of flips."""
    return [json.loads(line)["version"] for line in path.read_text().splitlines() if line]


def test_flips_are_logged_and_those_that_could_not_be_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeued job counts on from the highest version that it finds there."""
    monkeypatch.setattr(flip_log, "RETRY_S", 0.01)
    directory = tmp_path / "away"
    log = FlipLog(directory / "flips.jsonl")
    for version in (1, 2):
        log.add({"version": version})
    wait_until("a try", lambda: log._failing, timeout_s=10)
    log.add({"version": 3})
    directory.mkdir()
    wait_until("the file", (directory / "flips.jsonl").exists, timeout_s=10)
    log.add({"version": 4})
    log.close()
    assert logged(directory / "flips.jsonl") == [1, 2, 3, 4]
    log = FlipLog(directory / "flips.jsonl")
    log.add({"version": 5})
    log.close()
    assert logged(directory / "flips.jsonl") == [1, 2, 3, 4, 5]


def test_a_batch_does_not_wait_for_a_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flip_log, "CLOSE_TIMEOUT_S", 0.1)
    stuck = tmp_path / "flips.jsonl"
    os.mkfifo(stuck)  # whoever opens it waits for a reader
    arena = CpuArena(4096)
    worker = WorkerBridge(rank=0, arena=arena, log_path=stuck)
    worker.slot = ControlPage.create(1).slot(0)
    for version in (1, 2, 3):
        run_batch(worker, version)
        assert worker.version == version
    worker.close()
    reader = os.open(stuck, os.O_RDONLY)  # lets the thread go
    worker._log._thread.join(10)
    os.close(reader)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where flight records of this process go, which has kept no event yet."""
    monkeypatch.setenv("BRIDGE_LOGDIR", str(tmp_path))
    monkeypatch.setattr(flight, "_who", ("worker", 0))
    flight._events.clear()
    return tmp_path / f"flight-worker-0-{os.getpid()}.jsonl"


def test_a_flip_is_kept_among_the_last_events_and_a_batch_without_one_is_not(
    worker: WorkerBridge, records: Path
) -> None:
    run_batch(worker, 0)
    run_batch(worker, 1)
    kept = [(e["event"], e["rank"], e["version"], e["batch"]) for e in flight.events()]
    assert kept == [("flip put off", 0, 1, 2), ("flip begun", 0, 1, 2), ("flipped", 0, 1, 2)]
    for _ in range(50):
        run_batch(worker, 1)
    assert len(flight.events()) == 3
    assert not records.exists()


def test_lines_of_the_log_say_what_is_served_behind_a_flip_and_not_what_was_wanted(
    worker: WorkerBridge, records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: int) -> None:
        raise OSError("a test")

    assert records.name.startswith("flight-worker-0"), "that is who logs"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(telemetry._Text())
    monkeypatch.setattr("vllm_patching.worker.logger.handlers", [handler])
    run_batch(worker, 4)
    monkeypatch.setattr(worker.arena, "flip", refuse)
    run_batch(worker, 5)
    who = f"[bridge worker rank 0 pid {os.getpid()} version 4]"
    assert f"{who} rank 0: version 5 could not be flipped in" in capsys.readouterr().err


def test_a_flip_that_fails_leaves_a_record(
    worker: WorkerBridge, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(worker.arena, "flip", refuse)
    run_batch(worker, 0)
    run_batch(worker, 1)
    head, *events = recorded(records)
    assert head["why"] == "rank 0 could not flip to version 1: OSError: [Errno 12] Cannot allocate memory"
    assert [event["event"] for event in events] == ["flip put off", "flip begun", "flip failed"]


def test_a_forward_that_was_not_announced_leaves_a_record(worker: WorkerBridge, records: Path) -> None:
    run_batch(worker, 0)
    run_batch(worker, 1, announces=False)
    assert "version 1: batch 2 ran without announcing its forward" in recorded(records)[0]["why"]


def recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Faulty(Watch):
    """Finds at the second look what a forward made of weights."""

    def __init__(self) -> None:
        self.looks = 0

    def check(self) -> None:
        self.looks += 1
        if self.looks == 2:
            raise MappingError("kept (8, 2) of Layer is a copy of q")


def test_no_token_leaves_a_batch_whose_forward_made_something_of_weights(
    tmp_path: Path, records: Path
) -> None:
    arena, watch, control = CpuArena(4096), Faulty(), ControlPage.create(1)
    worker = WorkerBridge(rank=0, arena=arena, log_path=tmp_path / "flips.jsonl", watch=watch)
    worker.slot = control.slot(0)
    run_batch(worker, 0)
    run_batch(worker, 0, tokens=0)
    assert (watch.looks, control.failed_ranks()) == (1, [])
    run_batch(worker, 0)
    assert control.failed_ranks() == [0]
    (head, *_) = recorded(records)
    assert head["why"] == "rank 0 cannot keep its model in step: kept (8, 2) of Layer is a copy of q"
    run_batch(worker, 0)
    assert watch.looks == 2, "later batches do not wait for it"
    worker.close()
