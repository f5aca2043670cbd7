"""No source of the packages names what makes objects of any kind out of bytes: pickle and all that uses it.

Names are looked for wherever they stand: imported, aliased, called, only referred to, or in a string for
``getattr``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    str(path.relative_to(ROOT)): path
    for room in ("bridge", "vllm_patching", "launch")
    for path in sorted((ROOT / room).rglob("*.py"))
}

# Nothing else is called so, so the name alone tells.
FORBIDDEN = {
    # Modules, and what is made of them under names of its own.
    "pickle", "cPickle", "_pickle", "pickletools", "cloudpickle", "dill", "jsonpickle", "joblib",
    "marshal", "shelve",
    "multiprocessing", "ForkingPickler", "Pickler", "Unpickler", "ProcessPoolExecutor", "SocketHandler",
    "copyreg", "__reduce__", "__reduce_ex__", "__setstate__",
    # torch.distributed's collectives over objects, and those below them.
    "all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list", "_broadcast_object",
    "send_object_list", "recv_object_list", "_object_to_tensor", "_tensor_to_object",
    "rpc", "rpc_sync", "rpc_async", "PythonUDF",
    # torch's files; a distributed checkpoint's metadata is a pickle.
    "_load_from_bytes", "load_state_dict_from_url", "load_url", "PackageImporter", "FileSystemReader",
    # vLLM's groups and queues, and ZeroMQ's sockets.
    "broadcast_obj", "all_gather_obj", "send_obj", "recv_obj",
    "broadcast_object", "send_object", "recv_object",
    "broadcast_tensor_dict", "send_tensor_dict", "recv_tensor_dict", "MessageQueue", "StatelessProcessGroup",
    "send_pyobj", "recv_pyobj",
    # Other readers that may run what they read.
    "read_pickle", "unsafe_load", "full_load", "allow_pickle",
}  # fmt: skip
# Called so is much; these make plain values, or what is checked field by field.
READERS = {"load", "loads"}
SAFE_READERS = {
    "json.load", "json.loads",
    "mapping.load", "mapping_file.load",  # bridge.protocol.mapping: JSON of one type
    "tl.load",  # Triton's: numbers out of GPU memory
    "pyslurm.Job.load", "pyslurm.Jobs.load",  # asks slurmctld, by SLURM's own library
}  # fmt: skip
# Where such a name may stand all the same, and why. Each must be needed.
ALLOWED = {
    # StorageWeakRef, a weak reference to a storage of this process: it lives beside torch's reductions.
    "vllm_patching/provenance.py": {"multiprocessing"},
    # multiprocessing.resource_tracker, as a process of vLLM's is called on its command line.
    "vllm_patching/residue.py": {"multiprocessing"},
}
DOTTED = re.compile(r"\w+(\.\w+)*")


def names_of(node: ast.AST) -> Iterator[str]:
    """Every name that a node stands for, part by part."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
            yield from alias.name.split(".")
        if isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
    elif isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.keyword):
        yield node.arg or ""
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
        yield from node.value.split(".")


def readers_of(node: ast.AST) -> Iterator[str]:
    """What reads bytes under a name that many have, as far as it is known whose it is."""
    if isinstance(node, ast.Attribute) and node.attr in READERS:
        yield ast.unparse(node)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name in READERS)
    elif isinstance(node, ast.Constant) and node.value in READERS:
        yield repr(node.value)


def weights_alone(node: ast.AST) -> bool:
    """Whether this is ``torch.load(..., weights_only=True)``, which makes tensors and plain values."""
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and any(
            k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
            for k in node.keywords
        )
    )


def unpickling(source: str) -> set[str]:
    """What in a module could turn bytes into objects of any kind, by name."""
    tree = ast.parse(source)
    harmless = {
        id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and weights_alone(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        found |= FORBIDDEN.intersection(names_of(node))
        if id(node) not in harmless:
            found.update(set(readers_of(node)) - SAFE_READERS)
    return found


@pytest.mark.parametrize("path", SOURCES)
def test_nothing_unpickles(path: str) -> None:
    assert unpickling(SOURCES[path].read_text()) == ALLOWED.get(path, set())


def test_what_is_allowed_is_in_a_source_that_exists() -> None:
    assert ALLOWED.keys() <= SOURCES.keys()


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import shelve, marshal",
        "def f():\n    import marshal",
        "from cloudpickle import x",
        "import dill",
        "import joblib",
        "__import__('pickle')",
        "importlib.import_module('torch.multiprocessing')",
        "class A:\n    def __reduce__(self): ...",
        "import multiprocessing.connection",
        "from multiprocessing import Pipe",
        "from multiprocessing.managers import BaseManager",
        "from torch import multiprocessing as mp",
        "import torch.multiprocessing as mp",
        "queue = torch.multiprocessing.Queue()",
        "from torch.multiprocessing.reductions import reduce_tensor",
        "from concurrent.futures import ProcessPoolExecutor",
        "dist.all_gather_object(a, b)",
        "dist.broadcast_object_list(x)",
        "from torch.distributed import broadcast_object_list",
        "from torch.distributed import gather_object as gather",
        "send = dist.send_object_list",
        "run(dist.recv_object_list, [None])",
        "getattr(dist, 'scatter_object_list')",
        "ways = {'x': dist.scatter_object_list}",
        "dist.distributed_c10d._object_to_tensor(x, device, group)",
        "from torch.distributed.distributed_c10d import _tensor_to_object",
        "import torch.distributed.rpc",
        "group.recv_tensor_dict()",
        "socket.recv_pyobj()",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "load = torch.load",
        "from torch import load",
        "torch.serialization.load(f, weights_only=True)",
        "read = functools.partial(torch.load, weights_only=True)",
        "getattr(torch, 'load')(f)",
        "torch.jit.load(f)",
        "np.load(f)",
        "dcp.load(state)",
        "np.lib.format.read_array(f, allow_pickle=True)",
        "yaml.unsafe_load(f)",
    ],
)  # fmt: skip
def test_what_unpickles_is_found(line: str) -> None:
    assert unpickling(line)


@pytest.mark.parametrize(
    "line",
    [
        "json.loads(text)",
        "read = json.load",
        "torch.load(f, map_location='cpu', weights_only=True)",
        "def load(path): ...",
        "load(path)",
        "'No pickle: nothing is unpickled.'",
        "dist.all_gather(tensors, tensor)",
        "yaml.safe_load(f)",
    ],
)
def test_what_does_not_unpickle_is_let_pass(line: str) -> None:
    assert not unpickling(line)
