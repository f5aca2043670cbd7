"""Every place where bytes that another process wrote become values, by name; each with whole examples.

A parser takes bytes and returns a value or raises a typed error; ``TYPED`` lists what counts as one. Whoever
writes another parser adds it here: ``tests/unit/test_outside_bytes.py`` feeds them all, and
``python -m tests.support.parsers all SECONDS`` does so for longer. Not guided by coverage: nearly all of
the branches are in msgspec, which is C.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from fastapi import HTTPException
from safetensors.torch import save_file

from bridge import fallback, param_mappings
from bridge import nodes as job_nodes
from bridge.errors import BridgeError, ProtocolError
from bridge.job import Receipt, read_receipt
from bridge.protocol import mapping as mapping_file
from bridge.protocol import messages
from bridge.protocol.decoding import UNREADABLE
from bridge.protocol.mapping import Mapping, Rendezvous
from bridge.protocol.messages import Frame, Opcode
from bridge.protocol.plan import Layout, Shard
from bridge.wire import rendezvous
from bridge.wire.device_memory import Allocation, Exhibit, Place, read_exhibit
from bridge.wire.meeting import Meeting, Round
from bridge.wire.peer_memory import Nonce, can_pull
from bridge.wire.rendezvous import Answer, Loan, Offer, Request
from launch import footprint, leftovers, options
from tests.support.mappings import SOURCES, dtype_name, parallel_mapping
from vllm_patching import (
    build,
    endpoints,
    follower,
    gate,
    introductions,
    link,
    newest,
    residue,
    update_files,
    weight_updates,
)
from vllm_patching import nodes as node_links
from vllm_patching.channel import Channel
from vllm_patching.control_page import ControlPage

TYPED = (BridgeError, HTTPException, TimeoutError)
SECRET = "s" * 32
DOCUMENT: Mapping = msgspec.structs.replace(
    parallel_mapping(2), rendezvous=Rendezvous(host="127.0.0.1", port=1, secret=SECRET)
)


class Parser(NamedTuple):
    """``read`` takes bytes; ``examples`` are some that it must take without an error."""

    read: Callable[[bytes], Any]
    examples: tuple[bytes, ...]


# --- between trainer and server ---------------------------------------------------------------------------

REQUEST = Request(
    session="ab" * 16,
    protocol_version=messages.PROTOCOL_VERSION,
    world_size=2,
    mapping_digest="d",
    host="h",
    pid=7,
)
LAYOUT = Layout(
    rank=0,
    vocabulary="checkpoint",
    shards=tuple(
        Shard(source=i, offset=(0,) * len(shape), shape=shape, dtype=dtype_name(dtype))
        for i, (shape, dtype, *_) in enumerate(SOURCES.values())
    ),
)


def _signed(body: bytes, secret: str) -> bytes:
    return msgspec.msgpack.encode({"body": body, "mac": hmac.digest(secret.encode(), body, hashlib.sha256)})


def _asked(data: bytes) -> Any:
    store = dist.HashStore()
    store.queue_push(rendezvous.REQUESTS, data)  # type: ignore[arg-type]
    return rendezvous.next_request(store, secret=SECRET)


def _meeting(key: str, body: bytes) -> Meeting:
    """A meeting in which ``body`` lies under ``key``, signed as it must be."""
    store = dist.HashStore()
    store.set(f"e1/{key}", _signed(body, f"{SECRET}/e1/{key}"))  # type: ignore[arg-type]
    return Meeting(store, DOCUMENT, epoch=1, timeout_s=0.01)


def _layout(data: bytes) -> Any:
    made = _meeting("layout/00", data)
    made._set("e1/round/r", Round(layouts=(b"\0",), partial=False, encoding="dense", bucket_bytes=1 << 14))
    return made.plan("r")


def _exhibit() -> bytes:
    shown = Allocation(buffer_id=1, nbytes=64, handle=bytes(64))
    return msgspec.msgpack.encode(
        Exhibit(allocations=(shown,), shards=(Place(allocation=0, offset=8, dtype="bfloat16"),))
    )


RECEIPT = Receipt(version=1, bytes=2, transfer_s=0.1, stage_s=0.1, flip_s=0.1, transport="gloo")

LINES = (  # of scontrol
    b"JobId=7 Restarts=0 NodeList=node[1-2] Nodes=node[1-2] CPU_IDs=0-3,8 Mem=1 GRES=gpu:a100:2(IDX:0-1) x",
    b"JobId=8 HetJobId=7 Restarts=1 NodeList=node3 Nodes=node3 CPU_IDs=0 Mem=1 GRES= x",
)


def _scontrol(data: bytes) -> Any:
    return job_nodes.read_scontrol(data.decode(errors="surrogateescape"), 7)


VARIABLES = (
    b"SLURM_JOB_ID=7\nSLURM_JOB_NODELIST=n[1-3]\nSLURM_JOB_CPUS_PER_NODE=16(x2),8\nSLURM_GPUS_ON_NODE=4",
    b"SLURM_JOB_ID=7\nSLURM_RESTART_COUNT=2\nSLURM_HET_SIZE=1\nSLURM_JOB_NODELIST_HET_GROUP_0=a[1-2]\n"
    b"SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0=4(x2)\nSLURM_GPUS_PER_NODE_HET_GROUP_0=a100:2,h100:1",
)


def _variables(data: bytes) -> Any:
    lines = data.decode(errors="surrogateescape").split("\n")
    return job_nodes.from_variables({line.partition("=")[0]: line.partition("=")[2] for line in lines})


KNOWN = (job_nodes.Component(hosts=("a1", "a2"), cpus=(8, 8), gpus=None),)

# --- between the nodes of one server ---


def _stranger(data: bytes) -> Any:
    """Of somebody who does not know the secret, so that no frame of his is taken."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    try:
        theirs.sendall(data)
        theirs.close()
        return link.Link(ours, SECRET, role=link.HEAD, deadline_s=5.0).receive()
    finally:
        ours.close()
        theirs.close()


def _logdir_file(data: bytes) -> Any:
    with _file(data, node_links.FILE_NAME) as path:
        return node_links.read_meeting(path.parent)


JOIN = link.Join(node_rank=1, nnodes=2, protocol_version=1, build="b", launch="", host="h", pid=7)
MEETING = node_links.Meeting(host="h", port=7, secret=SECRET, pid=7)

# --- on one host --------------------------------------------------------------------------------------------


def _channel(data: bytes) -> Any:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    ours.settimeout(5)
    channel = Channel(ours)
    try:
        theirs.setblocking(False)  # a message here fits the socket's buffer
        theirs.send(data)
        theirs.close()
        return channel.receive()
    finally:
        channel.close()
        theirs.close()


def _json(data: bytes) -> dict[str, Any]:
    """A message as the channel hands it on; of what is none, an empty one."""
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except UNREADABLE:
        return {}


def hello(kind: str) -> dict[str, Any]:
    """What a worker or an engine core says of itself."""
    common = {
        "type": kind,
        build.KEY: build.BUILD,
        "pid": 7,
        "host": "h",
        "hooks": {"x": True},
        "has_control": False,
        "world_size": 2,
    }
    if kind == "engine":
        return {**common, "index": 0}
    return {
        **common, "rank": 0, "model": "m", "dtype": "bfloat16", "vllm_version": "0.32", "tp_degree": 2,
        "gpu": "", "arena": "remap", "handles": [], "descriptors": 2, "omitted_vocabularies": {},
        "rank_map": msgspec.to_builtins(DOCUMENT.ranks[0]),
        "vocabularies": msgspec.to_builtins(DOCUMENT.vocabularies),
    }  # fmt: skip


def _page(data: bytes) -> Any:
    fd = os.memfd_create("page", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        page = ControlPage(fd)
        return [page.slot(rank).version for rank in range(page.num_ranks)], [e.held for e in page.engines()]
    finally:
        os.close(fd)


def _page_bytes() -> bytes:
    page = ControlPage.create(2, 1)
    try:
        return os.pread(page.fd, 1 << 12, 0)
    finally:
        os.close(page.fd)


@contextlib.contextmanager
def _file(data: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vbt-bytes-") as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        yield path


def _update(data: bytes) -> Any:
    with _file(data, "model.safetensors") as path:
        found = update_files.index(update_files.find(str(path.parent), path.parent))
        name = update_files.match_vocabulary(DOCUMENT, DOCUMENT.ranks[0], found)
        for source in DOCUMENT.vocabulary(name).sources:
            with update_files.reading(found[source.name]) as file:
                file.get_tensor(source.name)
        return name


def _safetensors() -> bytes:
    with _file(b"", "model.safetensors") as path:
        save_file(
            {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype, *_) in SOURCES.items()}, path
        )
        return path.read_bytes()


def _update_path(data: bytes) -> Any:
    path = data.decode("utf-8", "surrogateescape")
    with tempfile.TemporaryDirectory(prefix="vbt-bytes-") as folder:
        root = Path(folder)
        (root / "model.safetensors").touch()
        (root / "loop").symlink_to(root / "loop")
        for found in update_files.find(path.replace("ROOT", folder), root):
            assert found.is_relative_to(root.resolve()), found
    return path


def _newest(data: bytes) -> Any:
    with _file(data, newest.FILE_NAME) as path:
        return newest.Newest(path.parent).version


def _gate(data: bytes) -> Any:
    with _file(data, gate.FILE_NAME) as path:
        word = gate.read(path)
    if word == gate.NOT_SAID:  # it keeps out, and raises nothing
        raise ProtocolError(word.why)
    return word


def _launch_file(data: bytes) -> Any:
    with _file(data, residue.LAUNCH_FILE) as path:
        return follower.read_launch(path)


def _config(data: bytes) -> Any:
    with _file(data, "config.json") as path:
        return footprint.estimate(path.parent, dtype="auto", load_format="auto")


def _weights_file(data: bytes) -> Any:
    with _file(data, "model.safetensors") as path:
        return footprint._tensor_bytes(path, 2)


def _server_config(data: bytes) -> Any:
    with _file(data, "vllm.yaml") as path:
        words = ("--config", str(path))
        view = options.read_server_args(words, {})
        return view, options.loaded_adapters(words), options.node_faults(words, {})


def _layout_file(data: bytes) -> Any:
    with _file(data, "layout.json") as path:
        found = param_mappings.load_param_mappings(path)
    return found.declared()


# --- over HTTP ----------------------------------------------------------------------------------------------


def _body(data: bytes) -> Any:
    from starlette.requests import Request as HttpRequest

    pieces = [data[: len(data) // 2], data[len(data) // 2 :]]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    request = HttpRequest({"type": "http", "method": "POST", "headers": []}, receive)
    return endpoints._read_announcement(asyncio.run(endpoints._body_of(request)))


def _authorization(data: bytes) -> Any:
    from starlette.requests import Request as HttpRequest

    request = HttpRequest({"type": "http", "method": "GET", "headers": [(b"authorization", data)]})
    desk = endpoints.WeightBridgeEndpoints()
    desk._keys = ["key"]
    return desk._authorize(request)


PARSERS: dict[str, Parser] = {
    "control frame": Parser(
        messages.decode,
        tuple(messages.encode(Frame(opcode=code, epoch=3, text="why")) for code in Opcode),
    ),
    "mapping file": Parser(
        lambda data: mapping_file.decode(data, origin="a file"), (mapping_file.encode(DOCUMENT),)
    ),
    "exported layout": Parser(
        _layout_file,
        (msgspec.json.encode(param_mappings.TrainerLayout(model="m", param_mappings={})),),
    ),
    "admission request": Parser(_asked, (rendezvous.seal(REQUEST, SECRET),)),
    "signed request": Parser(lambda data: _asked(_signed(data, SECRET)), (msgspec.msgpack.encode(REQUEST),)),
    "signed answer": Parser(
        lambda data: rendezvous.unseal(_signed(data, SECRET), SECRET, Answer),
        (msgspec.msgpack.encode(Answer(session="ab")),),
    ),
    "signed loan": Parser(
        lambda data: rendezvous.unseal(_signed(data, SECRET), SECRET, Loan),
        (msgspec.msgpack.encode(Loan(session="ab", borrower="/logs", start=True)),),
    ),
    "signed offer": Parser(
        lambda data: rendezvous.unseal(_signed(data, SECRET), SECRET, Offer),
        (msgspec.msgpack.encode(Offer(session="ab", version=3)),),
    ),
    "nodes.json": Parser(_logdir_file, (msgspec.json.encode(MEETING),)),
    "a stranger at the nodes' port": Parser(_stranger, ()),
    "frame between nodes": Parser(
        lambda data: link.read_frame(data, peer="node 1"),
        tuple(msgspec.msgpack.encode(frame) for frame in (JOIN, link.Beat(), link.Leave("why"))),
    ),
    "scontrol's answer": Parser(_scontrol, (LINES[0], b"\n".join(LINES))),
    "variables of SLURM": Parser(_variables, VARIABLES),
    "pyslurm's answer": Parser(
        lambda data: job_nodes.read_pyslurm(data.decode(errors="replace"), KNOWN),
        (b'{"job_id": 7, "restarts": 2, "gres": [{"a1": {"gpu": 1, "gpu:a100": 2, "x": 1}, "a2": {}}]}',),
    ),
    "whereabouts": Parser(
        lambda data: can_pull(_meeting("where/0", data).whereabouts(0)),
        (msgspec.msgpack.encode(Nonce().whereabouts("h", on_gpu=False, gpu=None)),),
    ),
    "links": Parser(
        lambda data: _meeting("links/0", data).links(0), (msgspec.msgpack.encode(["gloo", "pull"]),)
    ),
    "layout": Parser(_layout, (msgspec.msgpack.encode(LAYOUT),)),
    "round": Parser(
        lambda data: _meeting("round/r", data).plan("r"), ()
    ),  # its layouts are others, so none of these is whole
    "exhibit": Parser(read_exhibit, (_exhibit(),)),
    "receipt over HTTP": Parser(
        lambda data: fallback._read_answer("http://x", data), (msgspec.json.encode({"round": RECEIPT}),)
    ),
    "receipt in a frame": Parser(
        lambda data: read_receipt(data.decode(errors="replace"), version=1), (msgspec.json.encode(RECEIPT),)
    ),
    "rank 0's outcome over HTTP": Parser(
        fallback._read_outcome, (fallback._outcome(RECEIPT).ljust(fallback.OUTCOME_BYTES),)
    ),
    "socket message": Parser(_channel, (b"\0\0\0\x11" + b'{"type":"status"}',)),
    "socket request": Parser(
        lambda data: introductions.read(_json(data)),
        tuple(
            msgspec.json.encode(message)
            for message in (
                hello("worker"),
                hello("engine"),
                {"type": "updater", "rank": 0, "pid": 3, "host": "h"},
                {"type": "notify_update", "path": "/x", "version": 3},
                {"type": "shutdown", "why": None},
                {
                    "type": "await_round",
                    "daemon": 1,
                    "ended": 0,
                    "aborted": 0,
                    "version": None,
                    "timeout_s": 1.5,
                },
            )
        ),
    ),
    "updater's report": Parser(
        lambda data: introductions.check_report(_json(data)),
        (
            b'{"type":"staged","bytes":3,"seconds":0.5,"transport":"gloo"}',
            b'{"type":"joined","links":["pull"]}',
        ),
    ),
    "control page": Parser(_page, (_page_bytes(),)),
    "update file": Parser(_update, (_safetensors(),)),
    "update path": Parser(_update_path, (b"ROOT", b"ROOT/model.safetensors")),
    "weights file": Parser(_weights_file, (_safetensors(),)),
    "config.json": Parser(
        _config,
        (
            b'{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}',
            b'{"dtype": "bfloat16", "text_config": {"hidden_size": 64, "num_experts": 4}, "vocab_size": 9}',
        ),
    ),
    "vLLM's --config": Parser(
        _server_config,
        (
            b"port: 5\ntensor-parallel-size: 4\nlora-modules: [a=/p, b=/q]\nhf-overrides: {a: {b: 1}}\n",
            b'{"port": 5, "enable-lora": true, "seed": 0x1f, "x": 2001-12-14, "y": !!float 1, "z": 1:30.5}',
            b"seed: &a 1_000\nother: *a\nnull: ~\n2: !!binary aGk=\n",
        ),
    ),
    "--lora-modules": Parser(
        lambda data: options.loaded_adapters(["--lora-modules", data.decode(errors="surrogateescape")]),
        (b"a=/x", b'{"name": "a", "path": "/x"}', b'[{"name": "a"}, {"name": "b"}]'),
    ),
    "newest-version": Parser(_newest, (b"0", b"9223372036854775807")),
    "gate": Parser(_gate, (b'{"open":true}', b'{"open":false,"why":"version 3 is newer","soon":true}')),
    "launch": Parser(_launch_file, (b"", b"0123456789abcdef" * 2)),
    "leftovers": Parser(
        leftovers.read_note, (b'{"run_dir": "/tmp/x", "shared_memory": ["psm_1", "sem.mp-2"]}',)
    ),
    "weight transfer's update_info": Parser(
        lambda data: weight_updates._parse(_json(data) or data, weight_updates.UpdateInfo, "update_info"),
        (b'{"version": 4, "timeout_s": 3}',),
    ),
    "Authorization": Parser(_authorization, (b"Bearer key", b"bearer key")),
    "HTTP body": Parser(_body, (b'{"path": "/x"}', b'{"path": "/x", "version": 4}')),
}


def feed(parser: Parser, data: bytes) -> bool:
    """Whether it was taken; what is neither a value nor a typed error that says something is raised."""
    try:
        parser.read(data)
    except TYPED as err:
        said = str(getattr(err, "detail", err))
        if len(said) <= 10:
            raise AssertionError(f"an error that says nothing: {err!r}") from err
        return False
    return True


def main() -> int:
    """Feed one parser, or all, for some seconds each; the first input that breaks one ends it."""
    names, seconds = sys.argv[1].split(","), float(sys.argv[2])
    for name in PARSERS if names == ["all"] else names:
        parser, draw, count = PARSERS[name], random.Random(0), 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            data = bytearray(draw.choice(parser.examples or (b"\x80",)))
            for _ in range(draw.choice((1, 1, 2, 8))):
                at = draw.randrange(len(data) + 1)
                piece = draw.choice(
                    (b"", draw.randbytes(draw.choice((1, 8))), bytes(8), b"\xff" * 8, b"[" * 3000)
                )
                data[at : at + draw.choice((0, len(piece), 1, 64))] = piece
            feed(parser, bytes(data))
            count += 1
        print(f"{name}: {count} inputs, none broke it", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
