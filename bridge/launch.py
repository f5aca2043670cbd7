"""The door for ``python -m bridge.launch``: everything behind it lives in ``launch``."""

from __future__ import annotations


def main() -> int:
    """Run the command line; returns the exit code."""
    from launch.cli import main as run  # only the door may look into launch, and only when opened

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
