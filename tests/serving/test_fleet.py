"""One trainer feeds two servers of different layout: each version on both, or on those that can have it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.checks import own_answers
from tests.support.serving import (
    START_TIMEOUT_S,
    UNBOUND,
    Server,
    Trainers,
    alive,
    serving,
    serving_together,
    stop,
    training,
    wait_until,
)

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1500)]

F32 = "--dtype=float32"
TIMES = ["--deadline=5", "--heartbeat-interval=0.5"]
TOKENS = 16
STAGE_TIMEOUT_S = 2.0
SOON_S = 15.0  # "within seconds", on a busy machine; every timeout of the configuration is far above


def answers(server: Server) -> list[list[int]]:
    return [answer["tokens"] for answer in server.api.greedy(4, TOKENS)]


def version(server: Server) -> int:
    return int(server.status()["weight_version"])


def stop_an_updater(server: Server) -> int:
    """A round stands in the middle on this server from now on; the stopped process."""
    pid = int(server.status()["pids"]["updaters"][0])
    stop(pid)
    return pid


def publish_on(trainers: Trainers, places: list[str]) -> int:
    """The version that is live on these servers; before it, one whose updaters start may refuse."""
    deadline = time.monotonic() + 90
    while (answer := trainers.command("broadcast")[0]).get("servers") != places:
        assert time.monotonic() < deadline, answer
    return int(answer["version"])


def first_answers(server: Server) -> list[list[int]]:
    """What a server says that starts again, as soon as it says anything."""
    found: list[list[list[int]]] = []

    def says() -> bool:
        with contextlib.suppress(OSError):
            found.append(answers(server))
        return bool(found)

    wait_until(f"the server at {server.logdir} to answer again", says, timeout_s=START_TIMEOUT_S)
    return found[0]


def kill_an_engine_in_a_round(trainers: Trainers, weights: Path, victim: Server, *, survivor: Server) -> None:
    """The survivor commits the round; the victim is started again, and gets its version from the survivor."""
    # None of these is what decides.
    trainers.must("environ", BRIDGE_STAGE_TIMEOUT_S="60", BRIDGE_CONNECT_TIMEOUT_S="60")
    trainers.must("close")
    made = trainers.must("broadcast")[0]["version"] + 1
    assert version(survivor) == version(victim) == made - 1
    trainers.must("load", path=str(weights))
    before = victim.status()
    stop_an_updater(victim)
    trainers.send("broadcast")
    wait_until("a round in the middle", lambda: victim.status()["state"] == "round", timeout_s=30)
    start = time.monotonic()
    os.kill(before["pids"]["engines"][0], signal.SIGKILL)
    for receipt in trainers.answers(timeout_s=60):
        assert (receipt["version"], receipt["servers"]) == (made, [str(survivor.logdir)]), receipt
    assert time.monotonic() - start < SOON_S
    assert version(survivor) == made
    wait_until("the engine's death to be seen", lambda: victim.status()["state"] != "round", timeout_s=30)
    assert first_answers(victim) == answers(survivor), "those of the checkpoint, before its peer's came"
    victim.wait_ready()  # and until then it says that it is not
    after = victim.status()
    assert (after["weight_version"], after["pids"]["daemon"]) == (made, before["pids"]["daemon"])
    assert after["rendezvous"] == before["rendezvous"]
    assert "starting it again once it has let go (1 of 3)" in victim.text()


def kill(server: Server) -> None:
    """End a server without a word, and wait until all of it is gone."""
    pids = server.pids()
    server.process.kill()
    server.process.wait()
    wait_until("the killed server's processes to end", lambda: not any(map(alive, pids)), timeout_s=60)


def test_two_servers_of_different_layout(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    sets = [checkpoint("qwen3", "float32", seed) for seed in (0, 1)]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in sets]
    expected = [own_answers(model, num_prompts=4, tokens=TOKENS) for model in models]
    assert expected[0] != expected[1]
    places = [str(tmp_path / "one"), str(tmp_path / "two")]
    flags = [*TIMES, f"--peers={os.pathsep.join(places)}"]  # a version, where one starts late, or again
    one: dict[str, Any] = {"flags": [F32], "bridge_flags": flags, "env": UNBOUND}
    two = {**one, "flags": [F32, "--tensor-parallel-size=2"]}
    env = {"BRIDGE_LOGDIRS": os.pathsep.join(places), "BRIDGE_CONNECT_TIMEOUT_S": "8"}
    with (
        serving_together((sets[0], Path(places[0]), one), (sets[0], Path(places[1]), two)) as servers,
        training("fsdp2", sets[0], logdir=tmp_path, dtype="float32", ranks=2, env=env) as trainers,
    ):
        first, second = servers
        for made, index in enumerate((1, 0, 1), start=1):
            trainers.must("load", path=str(sets[index]))
            if made < 3:
                receipts = trainers.must("broadcast")
            else:
                trainers.must("broadcast", blocking=False)
                trainers.must("step", fill=0.0)  # waits until both have read
                receipts = trainers.must("wait")
            for receipt in receipts:
                assert (receipt["version"], receipt["servers"], receipt["absent"]) == (made, places, {})
            assert [version(server) for server in servers] == [made, made]
            assert answers(first) == answers(second) == expected[index]

        assert [(r["restores"], r["servers"]) for r in trainers.must("rollback")] == [(2, places)] * 2
        assert answers(first) == answers(second) == expected[0]
        assert [(r["version"], r["restores"]) for r in trainers.must("rollback")] == [(5, 3)] * 2
        assert answers(first) == answers(second) == expected[1]

        trainers.must("load", path=str(sets[0]))
        stop_an_updater(first)
        trainers.send("broadcast")
        wait_until("a round in the middle", lambda: first.status()["state"] == "round", timeout_s=30)
        kill(first)
        for failed in trainers.answers(timeout_s=60):
            assert "version 6 is live on no server" in failed["error"], failed
            assert f"{places[0]}: " in failed["error"]
            assert f"{places[1]}: given up because of {places[0]}" in failed["error"]
        assert version(second) == 5
        assert answers(second) == expected[1]
        for failed in trainers.command("broadcast"):
            assert "1 of 2 servers cannot be met, and commit='all' needs all" in failed["error"], failed
        assert version(second) == 5
        trainers.must("close")
        trainers.must("environ", BRIDGE_COMMIT="available", BRIDGE_STAGE_TIMEOUT_S="60")
        assert publish_on(trainers, places[1:]) == version(second) == 6
        start = time.monotonic()  # the absent server has been waited for, and is not again
        for receipt in trainers.must("broadcast"):
            assert (receipt["version"], receipt["servers"]) == (7, [places[1]])
            assert receipt["absent"].keys() == {places[0]}
        assert time.monotonic() - start < SOON_S
        assert version(second) == 7
        assert answers(second) == expected[0]

        with serving(sets[0], Path(places[0]), **one) as first:
            trainers.must("load", path=str(sets[1]))
            assert version(first) == 7, "from its peer; the trainer has sent nothing"
            assert answers(first) == expected[0]
            name = "model.norm.weight"
            for receipt in trainers.must("single", name=name, value=0.5):
                assert (receipt["version"], receipt["servers"]) == (8, [places[1]])
                assert "serves version 7" in receipt["absent"][places[0]]
            trainers.must("load", path=str(sets[1]))
            for receipt in trainers.must("broadcast"):
                assert (receipt["version"], receipt["servers"]) == (9, places)
            assert version(first) == version(second) == 9
            assert answers(first) == answers(second) == expected[1]

            trainers.must("close")
            trainers.must("environ", BRIDGE_STAGE_TIMEOUT_S=f"{STAGE_TIMEOUT_S:g}")
            made = publish_on(trainers, places) + 1
            trainers.must("load", path=str(sets[0]))
            stopped = stop_an_updater(first)
            start = time.monotonic()
            for receipt in trainers.must("broadcast"):
                assert (receipt["version"], receipt["servers"]) == (made, [places[1]])
                reason = f"not staged {STAGE_TIMEOUT_S:g} s after another server was"
                assert receipt["absent"] == {places[0]: reason}
            assert time.monotonic() - start < SOON_S
            assert answers(second) == expected[0]
            assert answers(first) == expected[1]
            wait_until("the daemon to end the stopped updater", lambda: not alive(stopped), timeout_s=30)
            made = publish_on(trainers, places)  # its daemon starts new updaters first
            assert version(first) == version(second) == made
            assert answers(first) == answers(second) == expected[0]
            kill_an_engine_in_a_round(trainers, sets[1], second, survivor=first)
            assert answers(first) == answers(second) == expected[1]
            trainers.must("close")
