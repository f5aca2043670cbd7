"""Ways to bring a version to servers, as transfers over the links of a cluster.

Servers are alike, so one stands for all: what a trainer's link carries is counted once for each of them.
Trainers and servers are on different hosts; the network between hosts is not blocking.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.fluid import Link, Outcome, Transfer, simulate
from benchmarks.model_shapes import Model, Server, Trainer, layouts_of, mapping_of, model_bytes
from bridge.protocol.plan import Plan, build_plan

BUCKET_BYTES = 256 << 20  # the daemon's on GPUs
RESOLUTION = 1e-4
UNEVEN, DRIFT_S, DRAWS = 0.2, 0.01, 3
ONE_BY_ONE, MOST_BUCKETS = 8, 2000  # servers that are simulated one by one, and buckets of their plan
LONG_CHAIN = 32


@dataclass(frozen=True)
class Cluster:
    """Rates in bytes per second and direction, times in seconds.

    NCCL's between two GPUs of a host, and the time of a round without bytes, are measured on H200s
    (``gpu_rates.py`` says where); the rest is assumed.
    """

    name: str
    nccl: float
    nccl_bucket_s: float
    all_gather: float
    round_s: float
    nic: float = 46e9  # 400 Gbit/s, 92% of it
    nics_per_node: int = 8
    gpus_per_node: int = 8
    message_s: float = 30e-6  # a word by TCP before each bucket between hosts
    hop_s: float = 10e-6  # through one host of a ring or tree, beside the time of a chunk
    chunk: float = 512 << 10
    disk_write: float = 100e9
    disk_read: float = 200e9
    disk_node: float = 20e9

    @property
    def gpus_per_nic(self) -> int:
        """GPUs that share a network card."""
        return self.gpus_per_node // self.nics_per_node


@dataclass(frozen=True, eq=False)
class Lanes:
    """What the planner makes of a model between one trainer and one server.

    ``buckets`` are the bytes of each bucket by (trainer rank, inference rank), in the planner's order.
    """

    model: Model
    trainer: Trainer
    server: Server
    buckets: dict[tuple[int, int], list[float]]
    nbytes: float
    largest_rank: float  # bytes of the inference rank that takes the most
    planned_layers: int
    bucket_bytes: int


def plan_of(model: Model, trainer: Trainer, server: Server, bucket_bytes: int = BUCKET_BYTES) -> Plan:
    """The planner's own work."""
    return build_plan(mapping_of(model, server), layouts_of(model, trainer), bucket_bytes=bucket_bytes)


def plan_lanes(
    model: Model, trainer: Trainer, server: Server, *, bucket_bytes: int = BUCKET_BYTES, layers: int = 0
) -> Lanes:
    """Plan a model; with ``layers``, only so many of them and one less, from which the rest follows.

    Every layer behind the dense ones is planned alike, unless replicas share them out, which evens out.
    """
    if not layers:
        plan = plan_of(model, trainer, server, bucket_bytes)
        buckets = {
            (lane.trainer, lane.inference): [float(b.nbytes) for b in lane.buckets] for lane in plan.lanes
        }
    else:
        long, short = (
            _lane_bytes(plan_of(dataclasses.replace(model, layers=n), trainer, server, bucket_bytes))
            for n in (layers, layers - 1)
        )
        further = model.layers - layers
        buckets = {
            pair: _cut(nbytes + further * (nbytes - short.get(pair, 0.0)), bucket_bytes)
            for pair, nbytes in long.items()
        }
    by_rank: defaultdict[int, float] = defaultdict(float)
    for (_, inference), parts in buckets.items():
        by_rank[inference] += sum(parts)
    return Lanes(
        model, trainer, server, buckets, sum(by_rank.values()), max(by_rank.values()),
        layers or model.layers, bucket_bytes,
    )  # fmt: skip


def _lane_bytes(plan: Plan) -> dict[tuple[int, int], float]:
    return {
        (lane.trainer, lane.inference): float(sum(bucket.nbytes for bucket in lane.buckets))
        for lane in plan.lanes
    }


def _cut(nbytes: float, bucket_bytes: int) -> list[float]:
    whole = int(nbytes // bucket_bytes)
    rest = nbytes - whole * bucket_bytes
    return [float(bucket_bytes)] * whole + ([rest] if rest else [])


# --- links ----------------------------------------------------------------------------------------------


class _Network:
    """Links by name, and what one flow costs those it crosses."""

    def __init__(self, cluster: Cluster, server: Server, servers: int) -> None:
        self.cluster, self.server, self.servers = cluster, server, servers
        self.links: dict[Link, float] = {}
        # Servers smaller than what shares a card are several on it.
        self._beside = max(1, min(servers, cluster.gpus_per_nic // server.ranks))

    def trainer_card(self, rank: int, flows: float) -> tuple[Link, float]:
        """The sending side of a trainer rank's card, crossed by ``flows`` flows that are alike."""
        return self._link(("trainer tx", rank // self.cluster.gpus_per_nic), self.cluster.nic), flows

    def server_card(
        self, side: str, rank: int, *, level: int = 0, flows: float = 1, server: int | None = None
    ) -> tuple[Link, float]:
        """One side of an inference rank's card: of one ``server``, or of all at one ``level`` of a relay."""
        if server is not None:
            card = (server * self.server.ranks + rank) // self.cluster.gpus_per_nic
            return self._link((f"server {side}", card), self.cluster.nic), flows
        name = (f"server {side}", level, rank // self.cluster.gpus_per_nic)
        return self._link(name, self.cluster.nic), flows * self._beside

    def any(self, name: str, capacity: float, flows: float = 1) -> tuple[Link, float]:
        """A link of another kind."""
        return self._link((name,), capacity), flows

    def _link(self, name: Link, capacity: float) -> Link:
        self.links[name] = capacity
        return name

    def run(self, transfers: Sequence[Transfer]) -> Outcome:
        """Let them happen."""
        return simulate(self.links, transfers, resolution=RESOLUTION)


# --- the bridge's own -------------------------------------------------------------------------------------


def direct(lanes: Lanes, cluster: Cluster, servers: int) -> float:
    """NCCL between hosts as the bridge does it: each end goes through its lanes in order, bucket by bucket.

    A few servers are simulated one by one, unless the plan is too large. Once servers are spread over the
    trainers' cards, each further one costs what the fullest of these cards needs for it.
    """
    few = min(servers, ONE_BY_ONE) if sum(map(len, lanes.buckets.values())) <= MOST_BUCKETS else 1
    if few == 1:
        first = direct_in_step(lanes, cluster, 1)
    else:
        first = statistics.mean(direct_each(lanes, cluster, few, seed=seed) for seed in range(DRAWS))
    card: defaultdict[int, float] = defaultdict(float)
    for (trainer, _), parts in lanes.buckets.items():
        card[trainer // cluster.gpus_per_nic] += sum(parts)
    further = (servers - few) * max(card.values()) / cluster.nic
    return max(first + further, direct_at_once(lanes, cluster, servers))


@functools.cache
def direct_in_step(lanes: Lanes, cluster: Cluster, servers: int) -> float:
    """As ``direct``, if all servers kept step: the worst for the trainers' cards.

    A trainer rank has a stream for each server, and an updater has one; on both, one bucket moves at a time.
    """
    network = _Network(cluster, lanes.server, servers)
    transfers: list[Transfer] = []
    last: dict[tuple[str, int], int] = {}
    for _, trainer, inference, nbytes in _buckets(lanes):
        ends = (("trainer", trainer), ("updater", inference))
        after = tuple(last[end] for end in ends if end in last)
        for end in ends:
            last[end] = len(transfers)
        transfers.append(_lane(network, trainer, inference, nbytes, after))
    return cluster.round_s + network.run(transfers).seconds


def direct_each(
    lanes: Lanes, cluster: Cluster, servers: int, *, seed: int = 0, in_turns: bool = False
) -> float:
    """Every server by itself: they begin at random within ``DRIFT_S`` of the first.

    Flows that share a link do so unevenly: a bucket costs servers more or less, at random, by ``UNEVEN`` at
    most. How unevenly counts for little; but without any of it, servers would keep step for long.
    ``in_turns`` is an order that the bridge does not have: at both ends, each updater of each server begins
    with another trainer rank.
    """
    network = _Network(cluster, lanes.server, servers)
    draw, ranks = random.Random(seed), lanes.trainer.ranks
    shares = {bucket[:3]: _uneven(draw, servers) for bucket in _buckets(lanes)}
    apart = max(1, ranks // (servers * lanes.server.ranks))
    transfers: list[Transfer] = []
    for server in range(servers):
        last: dict[tuple[str, int], int] = {}
        start = len(transfers)
        transfers.append(Transfer(0.0, (), latency_s=draw.random() * DRIFT_S if server else 0.0))

        def turn(bucket: tuple[int, int, int, float], server: int = server) -> tuple[int, int, int]:
            index, trainer, inference, _ = bucket
            if in_turns:
                first = (inference * ranks // lanes.server.ranks + server * apart) % ranks
                trainer = (trainer - first) % ranks
            return index, trainer, inference

        for index, trainer, inference, nbytes in sorted(_buckets(lanes), key=turn):
            ends = (("trainer", trainer), ("updater", inference))
            after = tuple(last[end] for end in ends if end in last) or (start,)
            for end in ends:
                last[end] = len(transfers)
            uneven = nbytes * shares[index, trainer, inference][server]
            transfers.append(_lane(network, trainer, inference, uneven, after, server=server))
    return cluster.round_s + network.run(transfers).seconds


def _uneven(draw: random.Random, servers: int) -> list[float]:
    """What a bucket costs each server; the bucket as often as there are servers, all in all."""
    shares = [1 + UNEVEN * (2 * draw.random() - 1) for _ in range(servers)]
    return [share * servers / sum(shares) for share in shares]


def direct_at_once(lanes: Lanes, cluster: Cluster, servers: int) -> float:
    """The same bytes with all lanes at once, each bucket by bucket: what the links alone allow."""
    network = _Network(cluster, lanes.server, servers)
    transfers = [
        _lane(network, trainer, inference, sum(parts), (), buckets=len(parts))
        for (trainer, inference), parts in lanes.buckets.items()
    ]
    return cluster.round_s + network.run(transfers).seconds


def _buckets(lanes: Lanes) -> list[tuple[int, int, int, float]]:
    """(index, trainer, inference, bytes) of all buckets, in the order that both ends of each lane keep."""
    return sorted(
        (index, trainer, inference, nbytes)
        for (trainer, inference), parts in lanes.buckets.items()
        for index, nbytes in enumerate(parts)
    )


def _lane(
    network: _Network,
    trainer: int,
    inference: int,
    nbytes: float,
    after: tuple[int, ...],
    *,
    buckets: int = 1,
    server: int | None = None,
) -> Transfer:
    """``buckets`` of a lane together; to one ``server``, or alike to all."""
    cluster = network.cluster
    cards = (
        network.trainer_card(trainer, network.servers if server is None else 1),
        network.server_card("rx", inference, server=server),
    )
    latency = buckets * (cluster.message_s + cluster.nccl_bucket_s)
    return Transfer(nbytes, cards, after, latency_s=latency, limit=cluster.nccl)


def relay_chain(lanes: Lanes, cluster: Cluster, servers: int) -> float:
    """The first server by the bridge; each of the others from the one before it, bucket by bucket.

    In this way and the next two, servers on one host read from the first of them there, by copy engine.
    """
    stations, beside = _stations(lanes, cluster, servers)
    if stations <= LONG_CHAIN:
        return _relay(lanes, cluster, beside, (1,) * stations)
    # Further hops are alike, and each adds the same.
    half, whole = (_relay(lanes, cluster, beside, (1,) * n) for n in (LONG_CHAIN // 2, LONG_CHAIN))
    return whole + (stations - LONG_CHAIN) * (whole - half) / (LONG_CHAIN - LONG_CHAIN // 2)


def relay_tree(lanes: Lanes, cluster: Cluster, servers: int) -> float:
    """The first server by the bridge; each serves two others, bucket by bucket."""
    left, beside = _stations(lanes, cluster, servers)
    levels: list[int] = []
    while left:
        levels.append(min(left, 2 ** len(levels)))
        left -= levels[-1]
    return _relay(lanes, cluster, beside, tuple(levels))


def _stations(lanes: Lanes, cluster: Cluster, servers: int) -> tuple[int, int]:
    """Servers that get a version over the network, and how many share a host with each of them."""
    beside = min(servers, max(1, cluster.gpus_per_node // lanes.server.ranks))
    return -(-servers // beside), beside


@functools.cache
def _relay(lanes: Lanes, cluster: Cluster, beside: int, levels: tuple[int, ...]) -> float:
    """``levels`` are the stations at each distance from the trainer, each for ``beside`` servers."""
    first = direct_in_step(lanes, cluster, 1)
    network = _Network(cluster, lanes.server, 1)
    parts = _cut(lanes.largest_rank, lanes.bucket_bytes)
    flows = min(cluster.gpus_per_nic, lanes.server.ranks)
    # What has arrived when: as if the first server's buckets came at an even pace.
    arriving = network.any("first", lanes.largest_rank / first)
    transfers: list[Transfer] = []
    for level, count in enumerate(levels):
        children = math.ceil(count / levels[level - 1]) if level else 1
        local = network.any(f"within hosts, {level}", cluster.nccl, beside - 1)
        for index, nbytes in enumerate(parts):
            after = (len(transfers) - 1,) if index else ()
            if level:
                uses = (
                    network.server_card("tx", 0, level=level - 1, flows=children * flows),
                    network.server_card("rx", 0, level=level, flows=flows),
                    local,
                )
                after = (*after, len(transfers) - len(parts))
                latency = cluster.message_s + cluster.nccl_bucket_s
                transfers.append(Transfer(nbytes, uses, after, latency_s=latency, limit=cluster.nccl))
            else:
                transfers.append(Transfer(nbytes, (arriving, local), after))
    return network.run(transfers).seconds


def relay_doubling(lanes: Lanes, cluster: Cluster, servers: int) -> float:
    """The first server by the bridge; then each that has a version whole gives it to one that has not."""
    network = _Network(cluster, lanes.server, 1)
    stations, beside = _stations(lanes, cluster, servers)
    flows = min(cluster.gpus_per_nic, lanes.server.ranks)
    uses = tuple(network.server_card(side, 0, flows=flows) for side in ("tx", "rx"))
    steps = math.ceil(math.log2(stations))
    transfers = [
        Transfer(lanes.largest_rank, uses, (step - 1,) if step else (), latency_s=cluster.message_s)
        for step in range(steps)
    ]
    local = network.any("within hosts", cluster.nccl, beside - 1)
    transfers.append(Transfer(lanes.largest_rank, (local,), (steps - 1,) if steps else (), limit=1e15))
    return direct_in_step(lanes, cluster, 1) + network.run(transfers).seconds


# --- what others do ---------------------------------------------------------------------------------------


def gather_broadcast(lanes: Lanes, cluster: Cluster, servers: int) -> float:
    """All trainer ranks gather a bucket of whole tensors, then rank 0 broadcasts it to all inference ranks.

    One NCCL ring through all of them; what each then copies out of what it got is not counted.
    """
    nbytes, nodes = float(model_bytes(lanes.model)), _nodes(cluster, lanes.trainer.ranks)
    network = _Network(cluster, lanes.server, servers)
    gather = [network.any("gather", cluster.all_gather)]
    if nodes > 1:
        gather.append(
            network.any("gather between hosts", cluster.nic, (1 - 1 / nodes) / cluster.nics_per_node)
        )
    broadcast = [network.trainer_card(0, 1), network.any("ring", cluster.nic)]
    hosts = _nodes(cluster, lanes.server.ranks * servers)
    latency = _calls(lanes, cluster)
    transfers = [
        Transfer(nbytes, tuple(gather), latency_s=latency),
        Transfer(
            nbytes, tuple(broadcast), (0,), latency_s=latency + _fill(cluster, hosts), limit=cluster.nccl
        ),
    ]
    return network.run(transfers).seconds


def node_ring(lanes: Lanes, cluster: Cluster, servers: int) -> float:
    """Every trainer host broadcasts what it holds to all hosts of servers, in a ring over all cards.

    Within a host the parts are exchanged by NVLink, and each rank takes what it needs of the whole model.
    """
    hosts = _nodes(cluster, lanes.server.ranks * servers)
    return _node_broadcast(lanes, cluster, servers, sent=1, depth=hosts)


def node_tree(lanes: Lanes, cluster: Cluster, servers: int) -> float:
    """The same along a binary tree of hosts: who has two below it sends twice; hops in a row are few."""
    hosts = _nodes(cluster, lanes.server.ranks * servers)
    return _node_broadcast(
        lanes, cluster, servers, sent=min(2, hosts - 1), depth=math.ceil(math.log2(hosts + 1))
    )


def _node_broadcast(lanes: Lanes, cluster: Cluster, servers: int, *, sent: int, depth: int) -> float:
    nbytes = float(model_bytes(lanes.model))
    network = _Network(cluster, lanes.server, servers)
    cards = cluster.nics_per_node
    roots = min(_nodes(cluster, lanes.trainer.ranks) * cards, lanes.trainer.ranks)
    uses = [network.any("trainer tx", cluster.nic, 1 / roots), network.any("rx", cluster.nic, 1 / cards)]
    if depth > 1:
        uses.append(network.any("tx", cluster.nic, sent / cards))
    # From one's own card come 1 / gpus_per_node of what every GPU gets.
    uses.append(network.any("nvlink", cluster.nccl, 1 - 1 / cluster.gpus_per_node))
    latency = _calls(lanes, cluster) + _fill(cluster, depth)
    return network.run([Transfer(nbytes, tuple(uses), latency_s=latency)]).seconds


def shared_disk(lanes: Lanes, cluster: Cluster, servers: int) -> float:
    """Trainers write their shards to a shared disk; then every rank of every server reads what it needs."""
    network = _Network(cluster, lanes.server, servers)
    trainers, ranks = lanes.trainer.ranks, lanes.server.ranks * servers
    nbytes = model_bytes(lanes.model) / trainers
    write = (
        network.any("disk write", cluster.disk_write, trainers),
        network.any("writing host", cluster.disk_node, min(trainers, cluster.gpus_per_node)),
    )
    read = (
        network.any("disk read", cluster.disk_read, ranks),
        network.any("reading host", cluster.disk_node, min(ranks, cluster.gpus_per_node)),
    )
    return network.run([Transfer(nbytes, write), Transfer(lanes.largest_rank, read, (0,))]).seconds


def _nodes(cluster: Cluster, gpus: int) -> int:
    return -(-gpus // cluster.gpus_per_node)


def _calls(lanes: Lanes, cluster: Cluster) -> float:
    """What the calls for all buckets cost besides their bytes."""
    return math.ceil(model_bytes(lanes.model) / lanes.bucket_bytes) * cluster.nccl_bucket_s


def _fill(cluster: Cluster, depth: int) -> float:
    """Until the first chunk has come through ``depth`` hosts; nobody waits for that before the next call."""
    return depth * (cluster.hop_s + cluster.chunk / cluster.nic)


STRATEGIES: dict[str, Callable[[Lanes, Cluster, int], float]] = {
    "direct": direct,
    "direct, all lanes at once": direct_at_once,
    "relay, a chain": relay_chain,
    "relay, a tree": relay_tree,
    "relay, doubling": relay_doubling,
    "gather on rank 0, broadcast": gather_broadcast,
    "ring of hosts": node_ring,
    "tree of hosts": node_tree,
    "shared disk": shared_disk,
}
