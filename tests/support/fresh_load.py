"""What vLLM's own loader makes of checkpoints, rank by rank, without a server: the truth for a live arena.

    python -m support.fresh_load PORT RANK WORLD_SIZE FLAGS CHECKPOINT..      (FLAGS as one JSON list)

Each checkpoint is loaded into a new model by an unpatched vLLM; only the starting of a server is left out.
vLLM on a CPU packs linear weights away after loading; those are taken as they were before.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bridge.protocol import mapping as mapping_file
from tests.support.serving import UNBOUND, Server, Trainers, environment, free_port
from vllm_patching import residue

TIMEOUT_S = 240.0
PREFIX = "dp{dp}:pp{pp}:pcp0:tp{tp}:"  # how vLLM's weight checker names a rank

Digests = dict[str, str]


def fresh_loads(
    checkpoints: Sequence[Path], *, flags: Sequence[str], tp: int = 1, pp: int = 1, dp: int = 1
) -> list[Digests]:
    """SHA-256 of every parameter of every rank after a load of each checkpoint, by vLLM's name for it.

    Args:
        flags: vLLM's, those of the layout among them.
        tp, pp, dp: how many ranks these make: tensor parallel, stages, engines of a mixture of experts.

    Raises:
        RuntimeError: a rank failed; ends with its output.
        TimeoutError: a rank took longer than ``TIMEOUT_S``.
    """
    port = str(free_port())
    command = [sys.executable, "-m", "support.fresh_load", port]
    rest = [str(tp), json.dumps(list(flags)), *map(str, checkpoints)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(**UNBOUND, VLLM_DIST_IDENT=port, VLLM_PLUGINS="weight_bridge"),
        )
        for rank in range(dp * pp * tp)
    ]
    found: list[Digests] = [{} for _ in checkpoints]
    try:
        for rank, process in enumerate(ranks):
            out, err = process.communicate(timeout=TIMEOUT_S)
            if process.returncode:
                text = err.decode(errors="replace")[-4000:]
                raise RuntimeError(f"fresh load, rank {rank} ended with {process.returncode}:\n{text}")
            for whole, part in zip(found, json.loads(out), strict=True):
                prefix = PREFIX.format(dp=rank // (pp * tp), pp=rank // tp % pp, tp=rank % tp)
                whole.update({prefix + name: digest for name, digest in part.items()})
    except subprocess.TimeoutExpired as err:
        raise TimeoutError(f"a rank of the fresh load did not end within {TIMEOUT_S:g} s") from err
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
        # Ranks that end at the same time sometimes leave what they shared to one another, and so to nobody.
        for shared in residue.SHM_DIR.glob(f"{port}-*"):
            shared.unlink()
    return found


def live_digests(server: Server) -> Digests:
    """The same of a server (in vLLM's development mode): what its model reads, out of the arena."""
    with server.api.open("/weight_checker", {"action": "checksum"}) as response:
        found: Digests = json.load(response)["checksums"]
    return found


def of_engines(fresh: Digests, engines: int) -> Digests:
    """Engines of a dense model are copies of one another."""
    first = PREFIX.partition(":")[0].format(dp=0)
    return {
        f"dp{engine}{name.removeprefix(first)}": digest
        for engine in range(engines)
        for name, digest in fresh.items()
    }


def arena_bytes(server: Server, live: Digests) -> int:
    """Bytes of all ranks' arenas that ``live`` is of: all that the mapping writes to, or this fails."""
    ranks = mapping_file.load(server.config).ranks
    names = {name.partition(":tp")[2].partition(":")[2] for name in live}
    missing = [t.name for rank in ranks for t in rank.targets if t.name not in names]
    assert not missing, f"the digests leave out {missing}"
    return sum(target.nbytes for rank in ranks for target in rank.targets)


def differing(live: Digests, fresh: Digests) -> list[str]:
    """Names whose bytes differ, and those that one side lacks."""
    return sorted(name for name in live.keys() | fresh.keys() if live.get(name) != fresh.get(name))


def broadcast_each(
    server: Server, trainers: Trainers, sets: Sequence[Path], fresh: Sequence[Digests]
) -> Iterator[dict[str, Any]]:
    """Each set of weights becomes live in turn: what of the arena is not what a fresh load makes of it.

    Yields:
        For each version its number, transport, "differing" tensors, and "peak_above_bytes" by trainer rank:
        how far a rank's memory rose above what it was before the first broadcast.
    """
    trainers.must("follow", logdir=str(server.logdir))
    kept = [0] * len(trainers.processes)
    for path, truth in zip(sets, fresh, strict=True):
        trainers.must("load", path=str(path))
        answers = trainers.must("measured_broadcast")
        yield {
            "version": answers[0]["version"],
            "transport": answers[0]["transport"],
            "differing": differing(live_digests(server), truth),
            "peak_above_bytes": [k + a["peak_above_bytes"] for k, a in zip(kept, answers, strict=True)],
        }
        kept = [k + max(0, a["kept_bytes"]) for k, a in zip(kept, answers, strict=True)]
    trainers.must("close")


# --- one rank ----------------------------------------------------------------------------------------------


def _load(checkpoint: str, flags: Sequence[str], rank: int, port: int) -> Digests:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    config = EngineArgs.from_cli_args(
        parser.parse_args([f"--model={checkpoint}", "--enforce-eager", *flags])
    ).create_engine_config()
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1:  # each engine's own, as vLLM's launcher of engines sets it
        parallel.data_parallel_rank, rank = divmod(rank, parallel.world_size)
        parallel._data_parallel_master_port_list = [port]
    with set_current_vllm_config(config):
        init_worker_distributed_environment(
            config, rank, f"tcp://127.0.0.1:{port}", rank, current_platform.dist_backend
        )
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(vllm_config=config, model_config=config.model_config)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
            raw = _digests(model)
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return raw | {name: digest for name, digest in _digests(model).items() if digest != _NOTHING}


_NOTHING = hashlib.sha256().hexdigest()


def _digests(model: Any) -> Digests:
    import torch

    return {
        name: hashlib.sha256(p.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, p in model.named_parameters()
    }


def main() -> None:
    from tests.support.trainer import take_stdout

    answers = take_stdout()
    port, rank, _, flags, *checkpoints = sys.argv[1:]
    found = [_load(c, json.loads(flags), int(rank), int(port)) for c in checkpoints]
    answers.write(json.dumps(found))
    answers.flush()
    os._exit(0)  # vLLM's groups are torn down by nobody


if __name__ == "__main__":
    main()
