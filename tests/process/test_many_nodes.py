"""Two servers of two nodes each, fed by one trainer of two ranks: what one loses, the other does not."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from bridge.protocol.mapping import write_atomically
from tests.support.checks import flips_of
from tests.support.nodes import Daemon, Server, expected, weights
from tests.support.serving import Trainers, stop, training, wait_until
from vllm_patching.nodes import FILE_NAME, read_meeting

pytestmark = [pytest.mark.processes, pytest.mark.faults, pytest.mark.timeout(600)]

SOON_S = 180.0
Train = Callable[[str], Trainers]


class Pair:
    """Server ``a``, to which things happen, and ``b``, which is to notice nothing of them."""

    def __init__(self, root: Path) -> None:
        self.names = [str(root / name / "log") for name in "ab"]
        self.starts = 1
        for name in "ab":
            (root / name).mkdir()
        self.a = Server(root / "a", launch_id="a-1")
        self.b = Server(root / "b", launch_id="b-1")

    def start_a_again(self) -> None:
        """Start all of its nodes anew: other processes, memory and sockets, in the same log directory."""
        self.a.stop()
        self.starts += 1
        self.a = Server(self.a.root, launch_id=f"a-{self.starts}")

    def wait_whole(self) -> None:
        for server in (self.a, self.b):
            server.wait_whole()

    def wait_for(self, state: str) -> None:
        """Until both are in that state."""
        wait_until(
            f"both servers to be in state {state}",
            lambda: [server.head.status()["state"] for server in (self.a, self.b)] == [state] * 2,
            timeout_s=SOON_S,
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("pair"))
    yield made
    for server in (made.a, made.b):
        server.stop()


@pytest.fixture
def train(pair: Pair, tmp_path: Path) -> Iterator[Train]:
    """``train(commit)``: the trainer's two ranks, connected to both servers by their first broadcast."""
    with contextlib.ExitStack() as stack:

        def start(commit: str) -> Trainers:
            env = {"BRIDGE_LOGDIRS": ":".join(pair.names), "BRIDGE_COMMIT": commit}
            env |= {"BRIDGE_CONNECT_TIMEOUT_S": str(SOON_S), "BRIDGE_STAGE_TIMEOUT_S": str(SOON_S)}
            module = "tests.support.sharded_trainer"
            trainers = training("rows", pair.a.root, logdir=tmp_path, ranks=2, env=env, module=module)
            return stack.enter_context(trainers)

        yield start


def send(trainers: Trainers, seed: int) -> dict[str, object]:
    """A broadcast that succeeds; both ranks' receipt, but for the times."""
    trainers.must("draw", seed=seed)
    first, second = trainers.must("broadcast")
    told = [{key: one[key] for key in ("version", "servers", "absent")} for one in (first, second)]
    assert told[0]["version"] == told[1]["version"]
    assert told[0]["servers"] == told[1]["servers"]
    return told[0]


def assert_serves(server: Server, version: object, seed: int) -> None:
    """Both workers read the version's bytes, and came to every version before the same batch."""
    assert server.read() == [(version, digest) for digest in expected(weights(seed))]
    assert [row["version"] for row in server.head.status()["ranks"]] == [version] * 2
    first, second = (flips_of(server.logdir, rank, up_to=int(str(version))) for rank in (0, 1))
    assert first == second


def begin(pair: Pair, trainers: Trainers, seed: int) -> None:
    """A round that does not end by itself: an updater of ``a``'s second node stands still."""
    stop(pair.a.head.status()["pids"]["updaters"][1])
    trainers.must("draw", seed=seed)
    trainers.must("broadcast", blocking=False)
    pair.wait_for("round")


def test_every_version_is_on_all_workers_of_both_servers(pair: Pair, train: Train) -> None:
    trainers = train("all")
    versions = []
    for seed in (1, 2, 3):
        sent = send(trainers, seed)
        assert (sent["servers"], sent["absent"]) == (pair.names, {})
        versions.append(sent["version"])
        for server in (pair.a, pair.b):
            assert_serves(server, sent["version"], seed)
    assert versions == [1, 2, 3]


@pytest.mark.parametrize("node", ["follower", "head"])
def test_a_daemon_lost_in_a_round_costs_its_server_the_round(pair: Pair, train: Train, node: str) -> None:
    trainers = train("available")
    before = send(trainers, 4)["version"]
    begin(pair, trainers, 5)
    lost: Daemon = getattr(pair.a, node)
    lost.kill()
    answers = trainers.command("wait")
    version = answers[0]["version"]
    assert version == int(str(before)) + 1
    for answer in answers:
        assert (answer["version"], answer["servers"]) == (version, pair.names[1:]), answer
        assert list(answer["absent"]) == pair.names[:1]
    assert_serves(pair.b, version, 5)
    assert pair.a.read() == [(before, digest) for digest in expected(weights(4))]
    if node == "follower":
        assert "node 1" in answers[0]["absent"][pair.names[0]]
        assert pair.a.head.status()["nodes"]["missing"] == [1]
    # As long as it is away the others go on, and nothing waits for it.
    without = send(trainers, 6)
    assert (without["servers"], without["version"]) == (pair.names[1:], version + 1)
    assert_serves(pair.b, version + 1, 6)
    lost.start()
    pair.wait_whole()
    both = send(trainers, 7)
    assert (both["servers"], both["version"]) == (pair.names, version + 2)
    for server in (pair.a, pair.b):
        assert_serves(server, version + 2, 7)


def test_a_daemon_lost_in_a_round_that_all_must_have_costs_both_the_round(pair: Pair, train: Train) -> None:
    trainers = train("all")
    before = send(trainers, 8)["version"]
    begin(pair, trainers, 9)
    pair.a.follower.kill()
    answers = trainers.command("wait")
    for answer in answers:
        assert "is live on no server" in answer.get("error", ""), answer
    assert "node 1" in answers[0]["error"]
    for server in (pair.a, pair.b):
        assert_serves(server, before, 8)
    # The next one waits for the node, for connect_timeout_s.
    trainers.send("broadcast")
    pair.b.wait_whole()
    pair.a.follower.start()
    answers = trainers.answers()
    assert [answer.get("servers") for answer in answers] == [pair.names] * 2, answers
    for server in (pair.a, pair.b):
        assert_serves(server, answers[0]["version"], 9)


def test_a_node_that_dies_with_its_worker_ends_its_server_and_not_the_other(pair: Pair, train: Train) -> None:
    trainers = train("available")
    before = int(str(send(trainers, 10)["version"]))
    begin(pair, trainers, 11)
    pair.a.follower.kill()
    pair.a.workers[1].kill()
    answers = trainers.command("wait")
    assert [answer.get("servers") for answer in answers] == [pair.names[1:]] * 2, answers
    assert_serves(pair.b, before + 1, 11)
    pair.a.engine.join(SOON_S)
    assert pair.a.engine.exitcode == -signal.SIGKILL
    assert "node 1" in pair.a.head.status()["given_up"]
    assert_serves(pair.b, before + 1, 11)
    pair.start_a_again()
    sent = send(trainers, 12)
    assert (sent["servers"], sent["version"]) == (pair.names, before + 2)
    for server in (pair.a, pair.b):
        assert_serves(server, before + 2, 12)


def test_a_follower_of_one_server_is_not_let_in_by_the_other(pair: Pair, train: Train) -> None:
    """Neither in the place of a node that is away, nor by an address that has changed hands."""
    trainers = train("available")
    version = int(str(send(trainers, 13)["version"]))
    pair.a.follower.kill()
    pair.b.follower.kill()
    wait_until("the loss", lambda: pair.b.head.status()["nodes"]["missing"] == [1], timeout_s=SOON_S)
    astray = Daemon(1, pair.a.root, launch_id=f"a-{pair.starts}", logdir=pair.b.logdir)  # a wrong --logdir
    try:
        assert astray.process.wait(SOON_S) == 75
    finally:
        astray.kill()
    assert "its workers are of an earlier start of this server" in astray.log.read_text()
    assert pair.b.head.status()["nodes"]["missing"] == [1]
    for server in (pair.a, pair.b):
        server.follower.start()
    pair.wait_whole()

    pair.a.follower.kill()
    ours, theirs = read_meeting(pair.a.logdir), read_meeting(pair.b.logdir)
    there = msgspec.structs.replace(ours, port=theirs.port)  # as if b's head listened where a's did
    write_atomically(pair.a.logdir / FILE_NAME, msgspec.json.encode(there))
    pair.a.follower.start()
    said = {
        pair.a.follower: "does not know the secret in nodes.json",
        pair.b.head: "with another launch's secret",
    }
    for daemon, what in said.items():
        wait_until(
            f"{daemon.log} to say so",
            lambda daemon=daemon, what=what: what in daemon.log.read_text(),  # type: ignore[misc]
            timeout_s=SOON_S,
        )
    assert pair.b.head.status()["state"] == "ready"
    assert pair.a.head.status()["nodes"]["missing"] == [1]
    write_atomically(pair.a.logdir / FILE_NAME, msgspec.json.encode(ours))
    pair.wait_whole()
    sent = send(trainers, 14)
    assert (sent["servers"], sent["version"]) == (pair.names, version + 1)
    for server in (pair.a, pair.b):
        assert_serves(server, version + 1, 14)
