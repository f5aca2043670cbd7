"""The documents say what the code does: links, tables, commands, flags and scripts are compared with it."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import msgspec
import pytest

from bridge import environment, errors, telemetry
from bridge.protocol import mapping, messages
from bridge.protocol.messages import COMMIT_WHEN_STAGED, Frame, Opcode
from bridge.protocol.session import Coordinator, InferenceSession, Member, Send, State
from launch import arguments
from launch.options import ServeOptions
from tests.support.pages import ROOT, section, tables, text_of
from vllm_patching import plugin, status

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("slurm/*.md")])
SCRIPTS = sorted([*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.sbatch"), *ROOT.glob("scripts/*.sh")])
PARSER = arguments.build_parser()
ALL_PAGES = [*PAGES, ROOT / "benchmarks" / "README.md"]
ROOMS = "bridge|vllm_patching|launch|slurm|tests|examples|docs|benchmarks|scripts"
PATH = re.compile(rf"(?<![\w/.-])((?:{ROOMS})/[\w./-]*)")
MODULE = re.compile(rf"python -m ((?:{ROOMS})\.[\w.]*\w)")
FILE = re.compile(r"`([\w-]+\.(?:py|sh|sbatch|json|md))`")
AT_RUN_TIME = {"nodes.json", "vllm_bridge_config.json", "leftovers-HOST.json"}  # a server writes these
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def flags_of(command: str) -> set[str]:
    (commands,) = [a for a in PARSER._actions if hasattr(a, "_name_parser_map")]
    return set(commands._name_parser_map[command]._option_string_actions)


def without_continuations(text: str) -> str:
    return re.sub(r"\\\n\s*", " ", text)


# --- links and scripts -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page):
    targets = [t for t in LINK.findall(page.read_text()) if not t.startswith(("http://", "https://", "#"))]
    missing = [t for t in targets if not (page.parent / t.partition("#")[0]).exists()]
    assert not missing


def files_missing(text: str, beside: Path) -> list[str]:
    """Files and modules of ours that a page names, and that do not exist.

    Without its directory a file is looked for beside the page, and where the same section names others.
    """
    missing = []
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE):
        paths = {ROOT / path.rstrip(".") for path in PATH.findall(part)}
        paths |= {(ROOT / Path(*name.split("."))).with_suffix(".py") for name in MODULE.findall(part)}
        missing += [str(path.relative_to(ROOT)) for path in paths if not path.exists()]
        around = {beside, *(path if path.is_dir() else path.parent for path in paths)}
        around |= {ROOT / "benchmarks/results"}
        named = set(FILE.findall(part)) - AT_RUN_TIME
        missing += [name for name in named if not any((place / name).exists() for place in around)]
    return sorted(missing)


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(page):
    assert files_missing(page.read_text(), page.parent) == []


def test_named_files_that_do_not_exist_are_found():
    text = """
## One

`bridge/wire/transport.py`, `delta.py`, bridge/wire/gone.py, `nodes.json`. See tests/no/where.

    python -m tests.faults.campaign; python -m tests.faults.gone; python -m pytest

## Two

`turns.py` and `soak.json`, `gone.json`
"""
    found = ["bridge/wire/gone.py", "gone.json", "tests/faults/gone.py", "tests/no/where", "turns.py"]
    assert files_missing(text, ROOT / "docs") == found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shell_scripts_parse(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 0, done.stderr


def test_batch_scripts_pass_only_flags_that_exist():
    text = without_continuations(text_of("slurm/server.sh"))
    calls = re.findall(r"bridge\.launch serve (.*?) -- ", text, re.DOTALL)
    used = {flag for call in calls for flag in re.findall(r"--[a-z][a-z-]+", call)}
    assert "--logdir" in used
    assert used <= flags_of("serve")


@pytest.mark.parametrize("script", sorted(ROOT.glob("slurm/*.sbatch")), ids=lambda p: p.name)
def test_batch_scripts_keep_the_house_rules(script):
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert "slurm/common.sh" in text
    assert "--kill-on-bad-exit=1" in text_of("slurm/common.sh")
    assert "#SBATCH --signal=B:USR2@" in text
    assert "#SBATCH --requeue" in text
    assert not re.search(r"^#SBATCH --(partition|account|qos|gres)", text, re.MULTILINE)
    # Two trapped signals that come together may cost one of them.
    traps = re.findall(r"^\s*trap (\S+) (.+)$", text + text_of("slurm/common.sh"), re.MULTILINE)
    assert traps == [("on_warning", "USR2")]


def test_every_variable_of_the_batch_scripts_is_documented():
    text = "".join(p.read_text() for p in SCRIPTS if p.parent.name == "slurm")
    settings = set(re.findall(r'^ *: "\$\{(\w+):[=?]|\b(\w+_SOCKET_IFNAME)\b', text, re.MULTILINE))
    settings = {name for names in settings for name in names if name}
    exported = {
        name for line in re.findall(r"^ *export ([\w ]+)", text, re.MULTILINE) for name in line.split()
    }
    (rows,) = tables(section("slurm/README.md", "## Variables"))
    by_default = {row["variable"].strip("`"): row["default"] for row in rows}
    made = {name for name, default in by_default.items() if default == "set for the trainer"}
    assert settings == set(by_default) - made
    assert made <= exported


def test_our_own_versions_are_those_of_the_code():
    (rows,) = tables(section("docs/compatibility.md", "## Versions of our own"))
    now = {row["version"]: int(row["now"]) for row in rows}
    assert now == {"protocol": messages.PROTOCOL_VERSION, "mapping format": mapping.FORMAT_VERSION}


# --- protocol.md -------------------------------------------------------------------------------------


def test_opcodes():
    (rows,) = tables(section("docs/protocol.md", "## Opcodes"))
    assert {row["name"]: int(row["code"]) for row in rows} == {code.name: code.value for code in Opcode}


def test_frame_fields():
    (rows,) = tables(section("docs/protocol.md", "## Frame"))
    offsets = [int(row["offset"]) for row in rows]
    sizes = [int(row["bytes"]) for row in rows]
    assert offsets == [sum(sizes[:i]) for i in range(len(sizes))]
    assert sum(sizes) == messages.FRAME_BYTES
    assert sizes[-1] == messages.MAX_TEXT_BYTES
    frame = Frame(opcode=Opcode.BEGIN, epoch=3, version=5, index=-7, digest=b"d" * 16, text="hello")
    data = messages.encode(frame)
    fields = {
        row["field"].partition(",")[0]: data[o : o + n]
        for row, o, n in zip(rows, offsets, sizes, strict=True)
    }
    numbers = {name: int.from_bytes(raw, "little", signed=True) for name, raw in fields.items()}
    assert numbers["opcode"] == Opcode.BEGIN
    assert (numbers["epoch"], numbers["weight version"], numbers["index"]) == (3, 5, -7)
    assert numbers["length of the text"] == 5
    assert numbers["protocol version"] == messages.PROTOCOL_VERSION
    assert fields["magic"] == b"VWB1"
    assert fields["digest"] == b"d" * 16
    assert fields["text"].rstrip(b"\0") == b"hello"


def frame(name: str, *, version: int = 2, index: int = 1, text: str = "{}") -> Frame:
    return Frame(opcode=Opcode[name], epoch=1, version=version, index=index, text=text)


def daemon(state: State) -> InferenceSession:
    machine = InferenceSession(
        epoch=1, version=2 if state is not State.IDLE else 1, ranks=(0, 1), coordinator=0
    )
    machine.state = state
    return machine


def coordinator(state: State, *, trainers: int = 3) -> Coordinator:
    machine = Coordinator(epoch=1, version=1, trainers=trainers, daemons=1)
    if state is State.CLOSED:
        machine.state = state
    elif state is not State.IDLE:
        machine.begin(2, b"", call=1, encoding="dense")
    if state in (State.MOVING, State.STAGED, State.COMMITTING):
        for peer in range(1, trainers):
            machine.on_frame(peer, frame("READY", text="dense"))
    if state in (State.STAGED, State.COMMITTING):
        machine.on_frame(trainers, frame("STAGED"))
    if state is State.COMMITTING:
        machine.commit()
    assert machine.state is state
    return machine


def member(state: State) -> Member:
    machine = Member(epoch=1, version=2 if state is not State.IDLE else 1)
    machine.state = state
    return machine


def last_rank(machine):
    machine.on_staged(0)
    return machine.on_staged(1)


def last_rank_alone(machine):
    """A round that a BEGIN for one server alone has begun, from the start."""
    begun = InferenceSession(epoch=1, version=1, ranks=(0, 1))
    begun.on_frame(frame("BEGIN", index=COMMIT_WHEN_STAGED))
    machine.__dict__.update(begun.__dict__)
    return last_rank(machine)


def staged_alone(machine):
    (begin,) = machine.announce(b"d" * 16, "joint", vote=False)
    assert begin.frame.index == COMMIT_WHEN_STAGED
    return machine.on_frame(3, frame("STAGED"))


def last_ready(machine):
    machine.on_frame(1, frame("READY", text="dense"))
    return machine.on_frame(2, frame("READY", text="dense"))


DAEMON = {
    "`BEGIN` of a newer version": lambda m: m.on_frame(frame("BEGIN", version=m.version + 1)),
    "`BEGIN` of a served version": lambda m: m.on_frame(frame("BEGIN", version=m.version)),
    "`BUCKET`": lambda m: m.on_frame(frame("BUCKET")),
    "one of two ranks staged": lambda m: m.on_staged(0),
    "the last rank staged": last_rank,
    "the last rank staged, COMMIT not awaited": last_rank_alone,
    "`COMMIT`": lambda m: m.on_frame(frame("COMMIT")),
    "every rank flipped": lambda m: m.on_committed("{}"),
    "`ABORT`": lambda m: m.on_frame(frame("ABORT")),
    "`SHUTDOWN`": lambda m: m.on_frame(frame("SHUTDOWN")),
    "own failure": lambda m: m.on_failure("a test"),
    "trainer lost": lambda m: m.on_peer_lost("a test"),
}
COORDINATOR = {
    "begin, alone": lambda m: m.begin(2, b"", call=1, encoding="dense"),
    "begin, with others": lambda m: m.begin(2, b"", call=1, encoding="dense"),
    "one of two `READY`": lambda m: m.on_frame(1, frame("READY", text="dense")),
    "the last `READY`": last_ready,
    "`READY` of another version": lambda m: m.on_frame(1, frame("READY", version=3, text="dense")),
    "`READY` of another call": lambda m: m.on_frame(1, frame("READY", index=9, text="dense")),
    "`READY` of another encoding": lambda m: m.on_frame(1, frame("READY", text="auto")),
    "the last `STAGED`": lambda m: m.on_frame(3, frame("STAGED")),
    "`STAGED` of a daemon that awaits no COMMIT": staged_alone,
    "commit": lambda m: m.commit(),
    "the last `COMMITTED`": lambda m: m.on_frame(3, frame("COMMITTED")),
    "`FAILED`": lambda m: m.on_frame(1, frame("FAILED")),
    "`ABORT`": lambda m: m.on_frame(1, frame("ABORT")),
    "`SHUTDOWN`": lambda m: m.on_frame(1, frame("SHUTDOWN")),
    "own failure": lambda m: m.abort("a test"),
    "leaving": lambda m: m.shutdown(),
}
MEMBER = {
    "begin": lambda m: m.begin(2, b"", call=1, encoding="dense"),
    "`BEGIN`": lambda m: m.on_frame(frame("BEGIN")),
    "`RELEASE`": lambda m: m.on_frame(frame("RELEASE")),
    "`DONE`": lambda m: m.on_frame(frame("DONE")),
    "`ABORT`": lambda m: m.on_frame(frame("ABORT")),
    "`SHUTDOWN`": lambda m: m.on_frame(frame("SHUTDOWN")),
    "own failure": lambda m: m.on_failure("a test"),
    "leaving": lambda m: m.leave(),
}
MACHINES = {
    "### The daemon (`InferenceSession`)": (daemon, DAEMON),
    "### Trainer rank 0 (`Coordinator`)": (coordinator, COORDINATOR),
    "### Other trainer ranks (`Member`)": (member, MEMBER),
}


def describe(actions) -> str:
    names = [f"Send {a.frame.opcode.name}" if isinstance(a, Send) else type(a).__name__ for a in actions]
    return ", ".join(names) or "-"


@pytest.mark.parametrize("heading", MACHINES)
def test_state_tables(heading):
    """Every row is played on the real machine."""
    make, events = MACHINES[heading]
    (rows,) = tables(section("docs/protocol.md", heading))
    assert {row["event"] for row in rows} == set(events)
    named = {row["state"] for row in rows} - {"any"}
    for row in rows:
        states = sorted(named) if row["state"] == "any" else [row["state"]]
        for state in states:
            alone = {"trainers": 1} if row["event"] == "begin, alone" else {}
            machine = make(State[state], **alone)
            actions = events[row["event"]](machine)
            got = (state, row["event"], machine.state.name, describe(actions))
            assert got == (state, row["event"], row["next"], row["actions"])


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (lambda: daemon(State.STAGING), "BUCKET"),
        (lambda: coordinator(State.MOVING, trainers=1), "STAGED"),
        (lambda: coordinator(State.COMMITTING, trainers=1), "COMMITTED"),
        (lambda: member(State.MOVING), "RELEASE"),
        (lambda: member(State.COMMITTING), "DONE"),
    ],
)
def test_a_frame_of_another_round_is_refused_by_both_its_values(machine, name):
    for wrong, said in (
        (frame(name, version=7), f"frame {name} of version 7 in a round of version 2"),
        (msgspec.structs.replace(frame(name), epoch=9), f"frame {name} of epoch 9 in epoch 1"),
    ):
        made = machine()
        sender = () if isinstance(made, (InferenceSession, Member)) else (1,)
        with pytest.raises(errors.ProtocolError, match=said):
            made.on_frame(*sender, wrong)


def test_a_rank_says_nothing_behind_its_shutdown():
    """The coordinator hears nothing more: a frame would wait for its deadline, and with it the caller."""
    made = member(State.MOVING)
    assert describe(made.on_frame(frame("ABORT", text="a test"))) == "Send SHUTDOWN, Close"
    assert made.on_failure("version 2 was not committed: a test") == []


def test_every_state_is_in_a_table():
    named = set()
    for heading in MACHINES:
        for row in tables(section("docs/protocol.md", heading))[0]:
            named |= {row["state"], row["next"]}
    assert named - {"any"} == {state.name for state in State}


# --- operations.md -----------------------------------------------------------------------------------


def derived(known):
    """The exceptions that are made of these all over the packages."""
    bases = {}
    for package in ("bridge", "launch", "vllm_patching"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    found = set()
    while more := {name for name, of in bases.items() if of & (known | found)} - known - found:
        found |= more
    return found


def test_every_exception_and_exit_code_is_explained():
    (rows,) = tables(section("docs/operations.md", "## Errors"))
    defined = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.BridgeError)
    }
    assert {row["exception"].strip("`") for row in rows} == set(defined) | derived(set(defined))
    (codes,) = tables(section("docs/operations.md", "## Exit codes of `python -m bridge.launch`"))
    listed = set(re.findall(r"^  (\d+(?:\+n)?) ", arguments.EPILOG, re.MULTILINE))
    assert {row["code"].replace(" ", "") for row in codes} == listed
    assert {str(code) for code in defined.values()} <= listed


def test_every_variable_is_explained():
    pattern = re.compile(
        r"""["']((?:BRIDGE|VLLM|SLURM|NUM|HF|XDG)_[A-Z_]+|LOGDIR|RANK|WORLD_SIZE|LOCAL_RANK)["']"""
    )
    sources = [p for room in ("bridge", "vllm_patching", "launch") for p in (ROOT / room).rglob("*.py")]
    used = {name for path in sources for name in pattern.findall(path.read_text()) if not name.endswith("_")}
    documented = set(re.findall(r"`([A-Z_]+)`", section("docs/operations.md", "## Environment")))
    assert used - documented == set()
    assert {name for names in environment.VARIABLES.values() for name in names} <= documented


def test_every_metric_is_explained():
    code = text_of("vllm_patching/metrics.py")
    emitted = set(re.findall(r'"(bridge_[a-z_]+)"', code)) - {"bridge_rounds"} | {"bridge_rounds_total"}
    documented = {
        re.match(r"`(\w+)", row["name"])[1] for row in tables(section("docs/operations.md", "## Metrics"))[0]
    }
    assert documented == emitted


def documented_type(kind):
    """As the page writes it: a struct is an object."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else documented_type(part) for part in parts)
    if origin is typing.Literal:
        return "str"
    kind = origin or kind
    return "object" if kind is dict or issubclass(kind, msgspec.Struct) else kind.__name__


def fields_of(kind, prefix=""):
    """Every field of a struct and of those within, by its way there, with its type."""
    for field in msgspec.structs.fields(kind):
        yield prefix + field.name, documented_type(field.type)
        is_list = typing.get_origin(field.type) is list
        for part in (field.type, *typing.get_args(field.type)):
            if isinstance(part, type) and issubclass(part, msgspec.Struct):
                yield from fields_of(part, f"{prefix}{field.name}{'[]' * is_list}.")


def test_every_state_and_field_of_the_status_is_explained():
    """mypy sees to it that a daemon says nothing else: its status is a ``Status``."""
    states, fields = tables(section("docs/operations.md", "## Status"))
    assert {row["state"].strip("`") for row in states} == set(typing.get_args(status.StateName))
    documented = [(row["field"].strip("`"), row["type"]) for row in fields]
    assert documented == [("type", "str"), *fields_of(status.Status)]
    assert documented[0][0] == status.Status.__struct_config__.tag_field
    assert f"`{status.Status.__struct_config__.tag}`" in fields[0]["meaning"]


def test_every_field_and_role_of_a_line_of_the_log_is_explained():
    _, fields, roles = tables(section("docs/operations.md", "## Logs"))
    try:
        raise ValueError("a test")
    except ValueError:
        record = logging.LogRecord("bridge.x", logging.INFO, "x.py", 1, "text", (), sys.exc_info())
    documented = [name for row in fields for name in re.findall(r"`(\w+)`", row["field"])]
    assert documented == list(json.loads(telemetry._Json().format(record)))
    sources = [p for room in ("bridge", "vllm_patching", "launch") for p in (ROOT / room).rglob("*.py")]
    pattern = re.compile(r"""(?:configure\(role=|name_process\()"(\w+)\"""")
    named = {role for path in sources for role in pattern.findall(path.read_text())}
    named |= {"vllm", "trainer", *plugin.ROLES.values()}
    assert {row["role"].strip("`") for row in roles} == named


# --- commands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):.*##", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for words in re.findall(r"python -m bridge\.launch ([a-z][^`\n|]*)", text):
        command, *own = words.split(" -- ")[0].split()
        used = {word.partition("=")[0] for word in own if word.startswith("--")} - {"--"}
        assert used <= flags_of(command), words


def test_flags_named_anywhere_exist():
    """A flag of ours in the text is one of the command line's, or says whose it is by standing here."""
    foreign = {
        "--port", "--tensor-parallel-size", "--max-model-len", "--enforce-eager", "--load-format", "--nodes",
        "--enable-eplb", "--enable-sleep-mode", "--nproc-per-node", "--shm-size", "--signal", "--no-kill",
        "--partition", "--steps", "--gpu-memory-utilization", "--compilation-config", "--data-parallel-size",
        "--data-parallel-rank", "--enable-expert-parallel", "--pipeline-parallel-size", "--cpu-offload-gb",
        "--offload-group-size", "--weight-transfer-config", "--distributed-executor-backend",
        "--kv-transfer-config", "--enable-fault-tolerance", "--headless", "--middleware", "--ntasks-per-node",
        "--data-parallel-size-local", "--moe-backend",
        "--enable-lora", "--lora-modules",
        "--max-lora-rank",
        "--gpus-per-node", "--batch", "--cpu-bind", "--cpus-per-task",
            "--requeue", "--jobid", "--overlap", "--nodelist", "--ntasks",
    }  # fmt: skip
    own = {
        flag
        for command in ("serve", "demo", "check", "status", "export-mapping")
        for flag in flags_of(command)
    }
    named = {flag for page in PAGES for flag in re.findall(r"--[a-z][a-z-]+", page.read_text())}
    assert named - own - foreign - {"--version"} == set()


def test_documented_defaults():
    documented = {
        "BRIDGE_CONNECT_TIMEOUT_S": "connect_timeout_s",
        "BRIDGE_COMMIT_TIMEOUT_S": "commit_timeout_s",
        "BRIDGE_STAGE_TIMEOUT_S": "stage_timeout_s",
        "BRIDGE_RANKS_TIMEOUT_S": "ranks_timeout_s",
    }
    from bridge.config import BridgeConfig

    rows = tables(section("docs/operations.md", "## Environment"))[0]
    shown = {row["variable"].strip("`"): row["default"] for row in rows}
    for variable, field in documented.items():
        assert float(shown[variable]) == getattr(BridgeConfig(), field)
    assert ServeOptions(model="m").rendezvous_host == "127.0.0.1"  # "loopback" in docs/assumptions.md


def test_the_example_is_short():
    assert len((ROOT / "examples" / "minimal_trainer.py").read_text().splitlines()) < 40
