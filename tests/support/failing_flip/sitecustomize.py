"""On PYTHONPATH, lets a flip fail in the worker whose pid the file at BRIDGE_TEST_UNFLIPPABLE names."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_patching import compat


def _refuse(module: ModuleType) -> None:
    def make(original: Any) -> Any:
        def flip(self: Any, to: int) -> None:
            path = Path(os.environ["BRIDGE_TEST_UNFLIPPABLE"])
            if path.exists() and path.read_text() == str(os.getpid()):
                raise OSError(errno.ENOMEM, "the kernel refused, as the test wants")
            original(self, to)

        return flip

    compat.wrap(module.CpuArena, "flip", make)


compat.when_imported("vllm_patching.cpu_arena", _refuse)
