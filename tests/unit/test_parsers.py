"""No place makes values of bytes that ``test_outside_bytes.py`` does not feed, or that is not said here."""

from __future__ import annotations

import ast
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests.support.parsers import PARSERS, feed
from tests.support.serving import REPO

PACKAGES = ("bridge", "vllm_patching", "launch")
READS = re.compile(
    r"(msgspec\.\w+\.(decode|Decoder)|_decoder\.decode|json\.loads?|yaml\.\w*load\w*|safe_open"
    r"|(\w+\.)*\w+\.(unpack|unpack_from|iter_unpack)|np\.load|ast\.literal_eval)"
)
NEVER = re.compile(
    r"(pickle|cPickle|dill|cloudpickle|marshal|shelve)\.\w+|torch\.load|yaml\.(load|unsafe_load|full_load)|eval|exec"
)


def _calls(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, str]]:
    """Each call in a module: the function that it is in, and what is called."""
    for node in ast.iter_child_nodes(tree):
        name = getattr(node, "name", "")
        here = inside
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            here = f"{inside}.{name}" if inside else name
        if isinstance(node, ast.Call):
            yield here, ast.unparse(node.func)
        yield from _calls(node, here)


def places(what: re.Pattern[str]) -> set[str]:
    """Functions of the packages with such a call; of a module's own, what ends in a colon."""
    found = set()
    for package in PACKAGES:
        for path in sorted((REPO / package).rglob("*.py")):
            for function, called in _calls(ast.parse(path.read_text())):
                if what.fullmatch(called):
                    found.add(f"{path.relative_to(REPO)}:{function}")
    return found


def entered(name: str) -> set[str]:
    """Functions of the packages that a parser's examples come to."""
    seen = set()

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{REPO}/"):
            path = Path(frame.f_code.co_filename).relative_to(REPO)
            seen.add(f"{path}:{frame.f_code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(watch)
    threading.setprofile(watch)
    try:
        for example in PARSERS[name].examples or (bytes(100),):
            feed(PARSERS[name], example)
    finally:
        threading.setprofile(None)
        sys.setprofile(before)
    return seen


# By place, the parser that comes there; or, in brackets, whose bytes they are.
READ = {
    "bridge/fallback.py:_read_answer": "receipt over HTTP",
    "bridge/fallback.py:_read_outcome": "rank 0's outcome over HTTP",
    "bridge/job.py:read_receipt": "receipt in a frame",
    "bridge/joining.py:_agree": "(this rank's own session id, made a line before)",
    "bridge/nodes.py:read_pyslurm": "pyslurm's answer",
    "bridge/param_mappings.py:_refuse_servers_file": "(what is about to be replaced, if it is no mapping)",
    "bridge/param_mappings.py:load_param_mappings": "exported layout",
    "bridge/protocol/mapping.py:decode": "mapping file",
    "bridge/protocol/messages.py:decode": "control frame",
    "bridge/wire/device_memory.py:read_exhibit": "exhibit",
    "bridge/wire/rendezvous.py:unseal": "admission request",
    "launch/demo.py:follow": "(lines of the demo's own client, which it has started)",
    "launch/demo.py:judge": "(likewise)",
    "launch/demo_client.py:Client.complete": "(answers of the demo's own vLLM)",
    "launch/demo_client.py:Client.stream": "(likewise)",
    "launch/footprint.py:_tensor_bytes": "weights file",
    "launch/footprint.py:read_config": "config.json",
    "launch/leftovers.py:read_note": "leftovers",
    "launch/options.py:_config_file": "vLLM's --config",
    "launch/options.py:_names_in": "--lora-modules",
    "vllm_patching/adapters.py:wanted": "(a variable that the launcher has set)",
    "vllm_patching/channel.py:Channel.__init__": "(the kernel's: who is at the other end)",
    "vllm_patching/channel.py:Channel._receive_message": "socket message",
    "vllm_patching/daemon.py:Daemon._settle": "(the daemon's own receipt)",
    "vllm_patching/endpoints.py:_read_announcement": "HTTP body",
    "vllm_patching/gate.py:read": "gate",
    "vllm_patching/link.py:": "(a decoder is made, which read_frame uses)",
    "vllm_patching/link.py:Link.receive": "a stranger at the nodes' port",
    "vllm_patching/link.py:read_frame": "frame between nodes",
    "vllm_patching/nodes.py:read_meeting": "nodes.json",
    "vllm_patching/sources.py:_headers": "(headers of a checkpoint that vLLM has loaded)",
    "vllm_patching/update_files.py:reading": "update file",
}


def test_every_place_that_reads_bytes_is_known() -> None:
    assert places(READS) == set(READ)


def test_nothing_unpickles_or_evaluates() -> None:
    assert places(NEVER) == set()
    assert NEVER.fullmatch("pickle.loads")
    assert NEVER.fullmatch("torch.load")


@pytest.mark.parametrize(("place", "name"), [row for row in READ.items() if not row[1].startswith("(")])
def test_a_places_parser_comes_there(place: str, name: str) -> None:
    assert place in entered(name)
