"""Servers die, come back, come late; a trainer dies: who serves what, and where a lost version comes from.

Launchers, daemons, updaters, lenders and the trainer's side are the real ones; only vLLM is a small process.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3
import psutil
import pytest
import torch

from bridge.config import BridgeConfig
from bridge.environment import Ranks
from bridge.errors import ConfigError, RendezvousError, RendezvousRefused
from bridge.joining import ask_admission
from bridge.protocol.mapping import CONFIG_NAME
from bridge.trainer import Bridge
from bridge.wire import rendezvous
from tests.support.mappings import SOURCES, half_of, parallel_mapping
from tests.support.serving import alive, free_port, stop, wait_until
from tests.support.small_server import Small
from vllm_patching import gate

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

START_S = 150.0  # imports of torch in several processes, on a busy machine
SOON_S = 5.0
SETTLE_S = 30.0  # a thread that waits for a frame ends at its deadline, which is 5 s

Weights = dict[str, torch.Tensor]


def weights(seed: int) -> Weights:
    """A trainer's, of the dtypes it trains in."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (shape, dtype, *_) in SOURCES.items()
    }


def digests(tp: int, state: Weights) -> list[str]:
    """Of each rank's half, as it must be."""
    halves = [half_of(rank_map, state) for rank_map in parallel_mapping(tp).ranks]
    return [blake3.blake3(half.numpy().tobytes()).hexdigest() for half in halves]


def assert_serves(server: Small, version: int, state: Weights) -> None:
    served = server.served()
    assert (served["version"], served["digests"]) == (version, digests(server.tp, state))


def in_state(server: Small, *states: str) -> Callable[[], bool]:
    return lambda: server.status()["state"] in states


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Small]]:
    started: list[Small] = []

    def begin(name: str, *, tp: int, **flags: str) -> Small:
        run_dir = Path(f"/tmp/bridge-test-{uuid.uuid4().hex[:8]}")
        started.append(Small(tmp_path / name, run_dir, free_port(), tp=tp, **flags))
        return started[-1]

    yield begin
    for server in started:
        server.stop()


def trainer(*servers: Small, **options: Any) -> Bridge:
    paths = tuple(str(server.logdir) for server in servers)
    place: dict[str, Any] = {"logdirs": paths} if len(paths) > 1 else {"logdir": paths[0]}
    return Bridge.connect(BridgeConfig(**place, **options), ranks=Ranks())


def test_a_server_that_dies_comes_back_with_the_newest_version_from_its_peer(
    start: Callable[..., Small], tmp_path: Path
) -> None:
    peers = os.pathsep.join(str(tmp_path / name) for name in ("one", "two"))
    # Of different layout; and what one sends the other goes by the network's transport, as between hosts.
    one, two = start("one", tp=2, peers=peers), start("two", tp=1, peers=peers, transport="gloo")
    for server in (one, two):
        wait_until(f"{server.logdir}", in_state(server, "ready"), timeout_s=START_S)
    with trainer(one, two, commit="available") as bridge:
        first, second = weights(1), weights(2)
        assert bridge.broadcast_weights(first).servers == (str(one.logdir), str(two.logdir))
        assert_serves(one, 1, first)
        assert_serves(two, 1, first)

        # Killed in the middle of a round, which stands because an updater does.
        before = two.status()
        stop(before["pids"]["updaters"][0])
        pending = bridge.broadcast_weights(second, blocking=False)
        wait_until("a round in the middle", in_state(two, "round"), timeout_s=20)
        began = time.monotonic()
        os.kill(two.served()["pid"], signal.SIGKILL)
        receipt = pending.wait()
        assert time.monotonic() - began < SOON_S
        assert (receipt.version, receipt.servers) == (2, (str(one.logdir),))
        assert_serves(one, 2, second)
        assert two.status()["state"] == "recovering"

        wait_until("the newest version on the server that died", in_state(two, "ready"), timeout_s=START_S)
        assert_serves(two, 2, second)
        wait_until("it to answer", lambda: two.served()["answered"], timeout_s=20)
        assert two.served()["answered"] == [2], "it answered with the checkpoint before"
        after = two.status()
        assert (after["weight_version"], after["pids"]["daemon"]) == (2, before["pids"]["daemon"])
        assert after["rendezvous"] == before["rendezvous"]
        assert "starting it again once it has let go (1 of 3)" in two.text
        wait_until("its peer's line", lambda: "version 2 is lent to" in one.text, timeout_s=20)

    third = {**second, "norm": torch.ones_like(second["norm"])}
    with trainer(one, two, connect_timeout_s=START_S) as bridge:  # another one, which goes on from there
        with pytest.raises(ConfigError, match=r"over the checkpoint, but the server at .* serves version 2"):
            bridge.broadcast_single_param("norm", third["norm"])  # it need not hold what would stay
        assert bridge.broadcast_weights(second).version == 3
        receipt = bridge.broadcast_single_param("norm", third["norm"])
        assert (receipt.version, receipt.absent) == (4, {})
        assert_serves(one, 4, third)
        assert_serves(two, 4, third)


@pytest.fixture
def outdated(start: Callable[..., Small]) -> Iterator[Callable[..., tuple[Small, Bridge]]]:
    """``outdated(...)``: a server whose vLLM was started again behind version 1, and its trainer."""
    with contextlib.ExitStack() as stack:

        def make(
            *, meanwhile: Callable[[Small], None] = lambda _: None, **flags: str
        ) -> tuple[Small, Bridge]:
            server = start("one", tp=2, **flags)
            wait_until("the server", in_state(server, "ready"), timeout_s=START_S)
            # That the checkpoint is served at first is what it is there for.
            wait_until("it to answer", lambda: server.served()["answered"] == [0], timeout_s=20)
            bridge = stack.enter_context(trainer(server))
            bridge.broadcast_weights(weights(1))
            before = server.served()["pid"]
            os.kill(before, signal.SIGKILL)
            meanwhile(server)
            wait_until("a new vLLM", lambda: server.served()["pid"] != before, timeout_s=START_S)
            return server, bridge

        yield make


def assert_kept_out(server: Small) -> None:
    wait_until("why", lambda: "broadcast" in server.status().get("kept_out", ""), timeout_s=START_S)
    status = server.status()
    assert (status["state"], status["complete"]) == ("recovering", True)
    assert "broadcast of the whole model; requests are refused meanwhile" in status["detail"]
    assert server.served()["answered"] == []


@pytest.mark.parametrize("killed", ["nobody", "the daemon"])
def test_a_server_without_peers_answers_nothing_until_the_newest_version_comes(
    outdated: Callable[..., tuple[Small, Bridge]], killed: str
) -> None:
    server, bridge = outdated()
    assert_kept_out(server)
    if killed == "the daemon":
        os.kill(server.status()["pids"]["daemon"], signal.SIGKILL)
        wait_until("another one", lambda: "the daemon is back" in server.text, timeout_s=START_S)
        assert_kept_out(server)
    assert bridge.broadcast_weights(weights(2)).version == 2
    assert gate.read(server.run_dir / gate.FILE_NAME).open, "whoever has the receipt may ask for its tokens"
    wait_until("it to answer", lambda: bool(server.served()["answered"]), timeout_s=20)
    assert server.served()["answered"] == [2]
    assert_serves(server, 2, weights(2))
    status = server.status()
    assert (status["state"], status["kept_out"]) == ("ready", "")


def test_requests_are_let_in_while_there_is_no_daemon(start: Callable[..., Small]) -> None:
    server = start("one", tp=1)
    wait_until("the server", in_state(server, "ready"), timeout_s=START_S)
    wait_until("the launcher to know", (server.logdir / "server.url").exists, timeout_s=START_S)
    wait_until("it to answer", lambda: server.served()["answered"] == [0], timeout_s=20)
    asked = server.served()["asked"]
    pid = server.status()["pids"]["daemon"]
    stop(pid)
    wait_until("requests meanwhile", lambda: server.served()["asked"] > asked, timeout_s=20)
    os.kill(pid, signal.SIGKILL)
    wait_until("another daemon", lambda: "the daemon is back" in server.text, timeout_s=START_S)
    assert server.served()["refused"] == 0
    assert server.status()["kept_out"] == ""


def test_the_checkpoint_is_served_to_whom_asks_for_it(
    outdated: Callable[..., tuple[Small, Bridge]],
) -> None:
    server, bridge = outdated(checkpoint="always")
    wait_until("it to answer", lambda: server.served()["answered"] == [0], timeout_s=START_S)
    wait_until("why", lambda: "requests are let in all the same" in server.text, timeout_s=20)
    assert server.status()["state"] == "recovering"
    assert "requests" not in server.status()["detail"]
    assert bridge.broadcast_weights(weights(2)).version == 2
    wait_until("it to answer", lambda: server.served()["answered"] == [0, 2], timeout_s=20)


def test_where_the_checkpoint_is_never_served_the_first_answer_is_the_first_versions(
    start: Callable[..., Small],
) -> None:
    server = start("one", tp=1, checkpoint="never")
    wait_until("the server", in_state(server, "ready"), timeout_s=START_S)
    wait_until("a request", lambda: server.served()["refused"] > 0, timeout_s=20)
    assert "no version was broadcast yet" in server.status()["kept_out"]
    wait_until("why", lambda: "answered with 503 for now: no version was" in server.text, timeout_s=START_S)
    with trainer(server) as bridge:
        bridge.broadcast_weights(weights(1))
    wait_until("it to answer", lambda: bool(server.served()["answered"]), timeout_s=20)
    assert server.served()["answered"] == [1]


def test_requests_are_refused_while_the_mapping_cannot_be_written(
    outdated: Callable[..., tuple[Small, Bridge]],
) -> None:
    def occupy(server: Small) -> None:
        (server.logdir / CONFIG_NAME).unlink()
        (server.logdir / CONFIG_NAME).mkdir()

    server, bridge = outdated(meanwhile=occupy)
    wait_until("why", lambda: "cannot be written" in server.status().get("kept_out", ""), timeout_s=60)
    assert not server.status()["complete"]
    (server.logdir / CONFIG_NAME).rmdir()
    wait_until("it to be published", lambda: server.status().get("complete", False), timeout_s=30)
    assert bridge.broadcast_weights(weights(2)).version == 2
    wait_until("it to answer", lambda: server.served()["answered"] == [2], timeout_s=20)


def test_what_a_lost_epoch_held_goes_with_it(start: Callable[..., Small]) -> None:
    """Nor does a trainer of several servers keep it that has switched the collector of circles off."""
    servers = [start(name, tp=1) for name in ("one", "two")]
    for server in servers:
        wait_until(f"{server.logdir}", in_state(server, "ready"), timeout_s=START_S)
    process = psutil.Process()
    gc.disable()
    try:
        with trainer(*servers, commit="available", connect_timeout_s=START_S) as bridge:
            bridge.broadcast_weights(weights(1))
            held = {"descriptors": process.num_fds(), "threads": process.num_threads()}
            for server in (servers[1], servers[0], servers[1]):
                os.kill(server.status()["pids"]["updaters"][0], signal.SIGKILL)
                wait_until(
                    "a version on both",
                    lambda: not bridge.broadcast_weights(weights(2)).absent,
                    timeout_s=START_S,
                )
                wait_until(
                    f"no more than {held}",
                    lambda: (
                        process.num_fds() <= held["descriptors"] and process.num_threads() <= held["threads"]
                    ),
                    timeout_s=SETTLE_S,
                )
    finally:
        gc.enable()


def test_without_peers_a_restarted_server_waits_for_the_trainer(start: Callable[..., Small]) -> None:
    server = start("one", tp=2)
    wait_until("the server", in_state(server, "ready"), timeout_s=START_S)
    first, second = weights(1), weights(2)
    with trainer(server, connect_timeout_s=START_S) as bridge:
        for number in (1, 2, 3):
            assert bridge.broadcast_weights(first).version == number
        died = server.served()["pid"]
        updaters = server.status()["pids"]["updaters"]
        os.kill(died, signal.SIGKILL)
        wait_until("its memory to be let go", lambda: not any(map(alive, updaters)), timeout_s=20)
        wait_until("a vLLM again", lambda: server.status().get("complete", False), timeout_s=START_S)
        status = server.status()
        assert (status["state"], status["weight_version"], status["requested_version"]) == (
            "recovering",
            0,
            3,
        )
        assert "the newest version is 3" in status["detail"]
        assert server.served()["version"] == 0
        with pytest.raises(ConfigError, match="was started again, and serves an older version than 3"):
            bridge.broadcast_single_param("norm", second["norm"])
        assert server.status()["state"] == "recovering"
        # The daemon dies as well: the number outlives both.
        os.kill(status["pids"]["daemon"], signal.SIGKILL)
        wait_until("another daemon", in_state(server, "recovering"), timeout_s=START_S)
        wait_until("its answer", lambda: server.status().get("requested_version") == 3, timeout_s=START_S)
        assert bridge.broadcast_weights(second).version == 4
    assert server.status()["state"] == "ready"
    assert_serves(server, 4, second)


def test_a_trainer_that_has_given_its_epoch_up_is_not_refused_as_another_one(
    start: Callable[..., Small],
) -> None:
    """The daemon may be the last to learn of a link that was cut, and a retry must not end by that."""
    server = start("one", tp=1)
    wait_until("the server", in_state(server, "ready"), timeout_s=START_S)
    config = BridgeConfig(logdir=str(server.logdir), connect_timeout_s=START_S)
    with trainer(server, connect_timeout_s=START_S) as bridge:
        bridge.broadcast_weights(weights(1))
        with pytest.raises(RendezvousRefused, match=r"another trainer is connected \(epoch 1\)"):
            ask_admission(config, Ranks(), trainer="b" * 32)
        (met,) = bridge._fleet.servers
        _, answer, _ = ask_admission(config, Ranks(), trainer=met._trainer)  # and epoch 1 is held still
        assert (answer.epoch, answer.weight_version) == (2, 1)
        wait_until("the end of epoch 1 at this end too", lambda: bool(met.session.closed), timeout_s=20)
        assert bridge.broadcast_weights(weights(2)).version == 2
    assert_serves(server, 2, weights(2))


def test_a_late_server_gets_the_version_from_a_peer_whose_rounds_go_on(
    start: Callable[..., Small], tmp_path: Path
) -> None:
    one = start("one", tp=1)
    wait_until("the first server", in_state(one, "ready"), timeout_s=START_S)
    states = [weights(seed) for seed in range(4)]
    with trainer(one) as bridge:
        bridge.broadcast_weights(states[0])
        late = start("late", tp=2, peers=str(tmp_path / "one"))
        wait_until("a loan", lambda: "is lent to" in one.text, timeout_s=START_S)
        lender = int(one.text.rpartition("(lender pid ")[2].partition(")")[0])
        stop(lender)  # it reads the half that is live, for ever
        assert late.status()["state"] == "recovering"
        bridge.broadcast_weights(states[1])  # writes the other half
        assert alive(lender)
        bridge.broadcast_weights(states[2])  # would write what it reads
        assert not alive(lender)
    reason = "a round begins to write what is lent"
    wait_until("its daemon to say so", lambda: reason in one.text, timeout_s=20)
    wait_until("the late server to have asked again", in_state(late, "ready"), timeout_s=2 * START_S)
    for server in (one, late):
        assert_serves(server, 3, states[2])
    with trainer(one, late, connect_timeout_s=START_S) as bridge:
        assert bridge.weight_version == 3
        assert bridge.broadcast_weights(states[3]).version == 4
    for server in (one, late):
        assert_serves(server, 4, states[3])


def test_a_group_names_the_ranks_it_misses() -> None:
    served = rendezvous.serve_store("127.0.0.1", 0)
    named = rendezvous.members(2, "the updater of inference rank")
    both = threading.Barrier(2)

    def come(rank: int) -> str:
        # Each by a connection of its own, as in life: in one, the second waits for the first one's wait.
        store = rendezvous.reach_store("127.0.0.1", served.port, timeout_s=3.0)
        both.wait(20)  # or one may give up before the other has come
        with pytest.raises(RendezvousError) as caught:
            rendezvous.make_group(
                store, "e1/data", rank=rank, size=4, address="127.0.0.1", timeout_s=3.0, named=named
            )
        return str(caught.value)

    with ThreadPoolExecutor(2) as threads:
        first, third = threads.map(come, (0, 2))
    absent = "trainer rank 1, the updater of inference rank 1 did not come"
    assert "within 3 s (trainer rank 0 on " in first
    assert "within 3 s (the updater of inference rank 0 on " in third
    assert absent in first
    assert absent in third
