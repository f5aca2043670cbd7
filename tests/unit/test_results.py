"""What lies in benchmarks/results is in the benchmarks' README, and says its hardware and command."""

from __future__ import annotations

import json
import queue
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.simulate import shown
from benchmarks.strategies import STRATEGIES
from benchmarks.trace_shapes import collect
from tests.faults.campaign import summary
from tests.slurm.campaign import ROLES, SERVERS, STOPPED, TRAINING, draw
from tests.slurm.campaign import summary as slurm_summary
from tests.support.pages import ROOT, section, tables, text_of

BENCHMARKS = ROOT / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").iterdir())
README = "benchmarks/README.md"
HARDWARE = re.compile(r"(\d+ cores|NVIDIA )")


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((BENCHMARKS / "results" / name).read_text())
    return document


def words_of(command: str | list[str]) -> list[str]:
    return command.split() if isinstance(command, str) else command


def scripts_in(words: list[str]) -> list[Path]:
    """The sources that a command line names, by path or by module."""
    named = [
        Path(*word.split(".")).with_suffix(".py") for word in words if re.match(r"(benchmarks|tests)\.", word)
    ]
    named += [Path("benchmarks", Path(word).name) for word in words if word.endswith(".py")]
    return [ROOT / path for path in named]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_says_the_hardware_and_the_command(path: Path) -> None:
    document = read(path.name)
    assert HARDWARE.search(document.get("machine") or document["hardware"])
    commands = document["commands"] if "commands" in document else [document["command"]]
    assert commands
    for words in map(words_of, commands):
        (script,) = scripts_in(words)
        assert script.exists()
        assert re.search(r"\bmachine\b|\bhardware\b", script.read_text()), "the next result would not say it"


def test_every_result_has_a_row_and_every_row_a_result() -> None:
    (rows,) = tables(section(README, "## Results"))
    files = [row["file"].strip("`") for row in rows]
    assert sorted(files) == [path.name for path in RESULTS]


def test_every_benchmark_has_a_row_and_every_row_a_benchmark() -> None:
    """Whatever writes a result when it is asked to by ``--out`` is one."""
    scripts = {path.name for path in BENCHMARKS.glob("*.py") if '"--out"' in path.read_text()}
    (rows, *_) = tables(text_of(README))
    assert {row["script"].strip("`") for row in rows} == scripts


def test_the_table_of_the_simulation_is_what_the_result_says() -> None:
    (rows,) = tables(section(README, "### What it says"))
    document = read("simulation.json")
    cases = {case["case"]: case["seconds"]["400 Gbit/s for each GPU"] for case in document["cases"]}
    assert {row["model"] for row in rows} == {"8B", "70B", "1T"}
    for row in rows:
        index = document["servers"].index(int(row["servers"].replace(",", "")))
        ways = {name: seconds[index] for name, seconds in cases[row["model"]].items()}
        said = {name: text for name, text in row.items() if name not in ("model", "servers")}
        assert said == {name: shown(ways[name]) for name in said}, (row["model"], row["servers"])


def test_the_ratios_to_what_was_measured_are_those_of_the_results() -> None:
    (rows,) = tables(section(README, "### Against what was measured"))
    said = {
        file: float(ratio)
        for row in rows
        if (files := re.findall(r"`(swap-[\w-]+\.json)`", row["rounds"]))
        for file, ratio in zip(files, row["ratio"].split(", "), strict=True)
    }
    found = {r["measured_in"]: round(r["ratio"], 2) for r in read("simulation.json")["measured_on_gpus"]}
    assert said == found
    checked = [f"{case['ratio']:.2f}" for case in read("simulation-check.json")["cases"]]
    assert [rows[0]["ratio"], rows[1]["ratio"]] == ["1.00 each", ", ".join(checked[9:])]
    assert set(checked[:9]) == {"1.00"}


def test_every_strategy_was_measured_and_the_table_has_its_ratios() -> None:
    (rows,) = tables(section(README, "### Every strategy, over shaped links"))
    cases = read("simulation-strategies.json")["cases"]
    found = {name: [f"{case['strategies'][name]['ratio']:.2f}" for case in cases] for name in STRATEGIES}
    assert {row.pop("strategy"): list(row.values()) for row in rows} == found


def test_a_rank_that_died_is_named_and_not_waited_for() -> None:
    answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    answers.put({"rank": 0})
    ranks: Any = [SimpleNamespace(exitcode=code) for code in (0, 3)]
    began = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"1 of 2 ranks have answered: rank\(s\) ended, by exit code: 1 \(3\)"
    ):
        collect(ranks, answers)
    assert time.monotonic() - began < 10
    for rank in (0, 1):
        answers.put({"rank": rank})
    assert collect(ranks, answers) == [{"rank": 0}, {"rank": 1}], "whoever has answered may be gone"


def test_a_campaign_counts_kills_stalls_and_requests_to_end_apart() -> None:
    faults = {
        "kill updater 1 at staged": 3, "stop engine at mid_bucket 2": 2, "term api at committed": 1,
        "corrupt_bucket at mid_bucket 0": 4, "slow link at before_begin": 5,
    }  # fmt: skip
    row = {"transport": "gloo", "answer": "receipt", "noticed_s": 0.1, "recovered_s": 0.2}
    rows = [row | {"fault": fault} for fault, count in faults.items() for _ in range(count)]
    found = summary(rows, [])
    assert (found["cases"], found["kills"], found["stalls"], found["asked_to_end"]) == (15, 3, 2, 1)
    assert found["by_role"] == {"kill updater": 3, "stop engine": 2, "term api": 1}


def test_a_slurm_campaign_counts_what_ends_its_job_apart() -> None:
    on, ended = {"live_s": 1.0, "recovered_s": 2.0}, {"ended_s": 30.0, "next_job_serves_s": 90.0}
    cases = {"kill worker": on, "kill trainer": ended, "stop trainer": {"live_s": 9.0, "recovered_s": 12.0}}
    rows = [{"fault": fault} | times for fault, times in cases.items()]
    found = slurm_summary([*rows, {"fault": "kill srun", "failure": "it hung"}])
    assert (found["cases"], found["failures"]) == (4, 1)
    assert found["live_s"] == {"median": 5.0, "worst": 9.0}
    assert found["ended_s"] == {"median": 30.0, "worst": 30.0}
    assert (found["recovered_s"]["worst"], found["next_job_serves_s"]["worst"]) == (12.0, 90.0)


def test_a_slurm_campaign_comes_to_every_role_where_it_is() -> None:
    faults = [draw(1, case) for case in range(1000)]
    assert faults == [draw(1, case) for case in range(1000)]
    where = {(fault.what, fault.role): set[str]() for fault in faults}
    for fault in faults:
        where[fault.what, fault.role].add(fault.where)
    wanted = {("kill", role) for role in (*ROLES, "slurmd")} | {("stop", role) for role in STOPPED}
    assert where.keys() == wanted
    for (_, role), nodes in where.items():
        places = {"trainer": TRAINING, "slurmd": TRAINING + SERVERS}.get(role, SERVERS)
        assert nodes == set(places), role
