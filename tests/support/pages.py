"""The project's pages, as tests read them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every Markdown table as rows by column heading."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        lines = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        found.append([dict(zip(lines[0], row, strict=True)) for row in lines[2:]])
    return found


def section(page: str, heading: str) -> str:
    """What is under one heading, up to the next of its level or above."""
    level = heading.count("#")
    rest = text_of(page).split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]
