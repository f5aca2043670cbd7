"""The command line: quick to answer, exact about whose flag is whose."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest

from bridge import nodes
from bridge.errors import ConfigError, MappingError
from bridge.protocol import mapping
from launch import arguments, cli, commands
from launch.options import ServeOptions, loaded_adapters, node_faults, read_server_args, split_faults
from vllm_patching import arguments as daemon_arguments
from vllm_patching import headless

ROOT = Path(__file__).parents[2]
HELP_BUDGET_S = 0.5


def run(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    environ = {
        k: v for k, v in os.environ.items() if k not in ("LOGDIR", "VLLM_PLUGINS", "NUM_INFERENCE_NODES")
    }
    return subprocess.run(
        [sys.executable, "-m", "bridge.launch", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environ, **env},
        timeout=120,
        check=False,
    )


def parse(*argv: str) -> ServeOptions:
    own, served, trainer = arguments.split_words(list(argv))
    return arguments.make_options(arguments.build_parser().parse_args(own), served, trainer)


def test_help_answers_at_once():
    """By the processor's clock, not the wall's: other processes share this machine."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    done = run("--help")
    assert done.returncode == 0
    assert spent() - before < HELP_BUDGET_S
    for command in ("serve", "demo", "check", "status", "export-mapping"):
        assert command in done.stdout


def test_help_imports_no_torch():
    code = (
        "import sys, contextlib, io\n"
        "from bridge.launch import main\n"
        "sys.argv = ['launch', 'serve', '--help']\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main()\n"
        "heavy = {'torch', 'vllm', 'rich', 'psutil'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["serve", "demo", "check", "status", "export-mapping"])
def test_each_subcommand_has_an_example_and_exit_codes(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert f"example:\n  {arguments.PROGRAM} {command}" in text
    assert "exit codes:" in text


def test_every_default_of_serve_is_shown(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in (
        "heartbeat_interval_s",
        "bucket_bytes",
        "max_daemon_restarts",
        "max_server_restarts",
        "start_timeout_s",
        "transport",
    ):
        assert f"(default: {getattr(ServeOptions, name)})" in text


def test_each_word_goes_to_its_owner():
    options = parse(
        *("serve", "--deadline", "9", "--", "some/model", "--port", "1", "--logdir", "vllm's own"),
        *("--", "torchrun", "train.py", "--", "x"),
    )
    assert options.deadline_s == 9.0
    assert options.model == "some/model"
    assert options.vllm_args == ("--port", "1", "--logdir", "vllm's own")
    assert options.trainer == ("torchrun", "train.py", "--", "x")
    command = commands.vllm_command(options, Path("/run/dir"), environ={})
    assert command.argv[1:] == (
        *("-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"),
        *("--port", "1", "--logdir", "vllm's own", "--middleware", "vllm_patching.gate.GateMiddleware"),
    )


@pytest.mark.parametrize(
    ("own", "flags", "names"),
    [
        ((), (), []),
        ((), ("--enable-lora", "--lora-modules", "a=/x", "b=/y=z", "--port", "1"), ["a", "b"]),
        ((), ("--enable-lora", "--lora-modules", "a=/x", "-tp", "2"), ["a"]),
        ((), ("--lora-modules=a=/x", "--lora_modules", '{"name": "c", "path": "/x"}'), ["c"]),
        (("--adapters", "later,a"), ("--enable-lora", "--lora-modules", "a=/x"), ["later", "a"]),
        (("--adapters", ""), ("--enable-lora", "--lora-modules", "a=/x"), []),
        (("--staging", "in-place"), ("--enable-lora", "--lora-modules", "a=/x"), []),
    ],
)
def test_workers_are_told_which_adapters_may_be_sent(own, flags, names):
    command = commands.vllm_command(parse("serve", *own, "--", "m", *flags), Path("/run/dir"), environ={})
    assert json.loads(command.env["BRIDGE_ADAPTERS"]) == names


def test_adapters_that_cannot_be_sent():
    (fault,) = parse("serve", "--adapters", "a", "--", "m").faults()
    assert fault == "--adapters a needs --enable-lora among vLLM's flags"
    options = parse("serve", "--adapters", "a", "--staging", "in-place", "--", "m", "--enable-lora")
    assert "cannot be sent with --staging in-place" in options.faults()[0]
    with pytest.raises(ConfigError, match="'a' among vLLM's flags is not NAME=PATH"):
        loaded_adapters(["--lora-modules", "a"])
    with pytest.raises(ConfigError, match="has no name"):
        loaded_adapters(["--lora-modules", '{"path": "/x"}'])


@pytest.mark.parametrize(("flags", "engines"), [((), "1"), (("-dp", "2", "--data-parallel-size=3"), "3")])
def test_the_daemon_is_told_how_many_engines_there_will_be(flags, engines):
    options = parse("serve", "--", "m", *flags)
    command = commands.daemon_command(options, Path("/run/dir"), launcher_pid=1, launch_id="x")
    told = daemon_arguments.parse_args(list(command.argv[3:]))
    assert (told.num_engines, told.launch_id) == (int(engines), "x")


def test_trainer_as_one_quoted_word():
    assert parse("serve", "--trainer", "python 'my train.py'", "--", "m").trainer == ("python", "my train.py")
    with pytest.raises(ConfigError, match="given twice"):
        parse("serve", "--trainer", "python a.py", "--", "m", "--", "python", "b.py")


def test_missing_model_and_abbreviations_are_refused():
    with pytest.raises(ConfigError, match="no model"):
        parse("serve", "--", "--port", "1")
    done = run("serve", "--heart", "3", "--", "m")
    assert done.returncode == 2
    assert "come after a --" in done.stderr


def test_trainer_is_told_where_the_mapping_is(tmp_path):
    options = parse("serve", "--logdir", str(tmp_path), "--", "m", "--", "python", "a.py")
    command = commands.trainer_command(options)
    environment = command.environment({"BRIDGE_RUN_DIR": "/inherited", "HOME": "/h"})
    assert environment["LOGDIR"] == environment["BRIDGE_LOGDIR"] == str(tmp_path)
    assert environment["BRIDGE_CONFIG"] == str(tmp_path / "vllm_bridge_config.json")
    assert environment["HOME"] == "/h"
    assert "BRIDGE_RUN_DIR" not in environment


@pytest.mark.parametrize(
    ("args", "url", "ranks"),
    [
        ((), "http://127.0.0.1:8000", 1),
        (("--port", "81", "--host", "0.0.0.0", "-tp", "2"), "http://127.0.0.1:81", 2),
        (("--host=::", "--tensor_parallel_size=2", "-pp=3"), "http://[::1]:8000", 6),
        (("-pcp", "2", "-tp", "2"), "http://127.0.0.1:8000", 4),
        (("--port=1", "--port=2", "--ssl-certfile", "c"), "https://127.0.0.1:2", 1),
        (("--uds", "/tmp/v.sock", "--data-parallel-size", "2"), "unix:/tmp/v.sock", 2),
    ],
)
def test_where_vllm_answers(args, url, ranks):
    view = read_server_args(args, environ={})
    assert (view.url, view.world_size) == (url, ranks)


def test_vllms_config_file_is_read_and_the_command_line_wins(tmp_path):
    path = tmp_path / "vllm.yaml"
    path.write_text("port: 5\ntensor-parallel-size: 4\n")
    view = read_server_args(("--config", str(path), "--port", "6"), environ={})
    assert (view.port, view.tensor_parallel_size) == (6, 4)
    path.write_text("lora-modules: [a=/p, b=/q]\nport: 5\n")
    assert loaded_adapters(("--config", str(path), "-tp", "2")) == ("a", "b")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "a: {b: " * 2000, "a: 2001-99-99", "a: !!bool x", 'a: !!int ""', "a: !!timestamp x",
     f"a: {'1:' * 400}1.0", "a: 0x_", f"a: {'9' * 5000}", "a: {b: 2001-01-01}", "a: &a {b: *a}", "a: *b",
     "a: \0"],
)  # fmt: skip
def test_a_config_file_that_cannot_be_read_is_named(tmp_path, text):
    path = tmp_path / "vllm.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"cannot read vLLM's --config {path}: [A-Z]"):
        read_server_args(("--config", str(path)), environ={})


def test_flags_that_are_no_flags_of_vllms_are_named():
    for word in ("[" * 100_000, '{"name":' * 50_000, "x" * 100_000):
        with pytest.raises(ConfigError, match=r"--lora-modules .* among vLLM's flags") as caught:
            loaded_adapters(["--lora-modules", word])
        assert len(str(caught.value)) < 1000
    with pytest.raises(ConfigError, match=r"--port '99.*' among vLLM's flags is not a number"):
        read_server_args(("--port", "9" * 5000), environ={})
    (fault,) = node_faults((), {"NUM_INFERENCE_NODES": "9" * 5000})
    assert "not a number" in fault


@pytest.mark.parametrize(
    ("args", "environ", "said"),
    [
        ((), {"NUM_INFERENCE_NODES": "2"}, "NUM_INFERENCE_NODES is 2"),
        ((), {"VLLM_ENABLE_SHARED_WEIGHTS": "0"}, "unset it"),
        (("-n", "2"), {}, "--nnodes 2"),
        (("--headless",), {}, "--headless is among vLLM's flags"),
        (("--master-port=1",), {}, "--master-port is among vLLM's flags"),
        (("-dpn", "1"), {}, "--data-parallel-rank is given"),
        (("--data-parallel-external-lb",), {}, "--data-parallel-external-lb is given"),
        (("--data_parallel_hybrid_lb",), {}, "--data-parallel-hybrid-lb is given"),
        (("--model=x",), {}, "name the model once"),
    ],
)
def test_what_this_version_cannot_do_is_refused(args, environ, said):
    (fault,) = node_faults(args, environ)
    assert said in fault


def test_vllms_master_port_is_one_of_the_jobs_own(monkeypatch):
    def port_of(*more):
        options = parse("serve", "--nnodes=2", "--node-rank=0", "--master-addr=a", *more)
        argv = commands.daemon_command(options, Path("/run"), launcher_pid=1).argv
        return int(argv[argv.index("--master-port") + 1])

    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert port_of("--", "m") < ephemeral, "else a connection may get it before vLLM does"
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    ours, others = port_of("--", "m"), [nodes.free_port(5, offset) for offset in range(14)]
    assert ours == nodes.free_port(5, nodes.MASTER_OFFSET)
    assert ours not in others
    for taken in (("--", "m", f"--port={ours}"), (f"--rendezvous-port={ours}", "--", "m")):
        assert port_of(*taken) not in (ours, *others)


def test_a_node_that_follows_has_workers_only():
    options = parse("serve", "--nnodes=2", "--node-rank=1", "--master-addr=127.0.0.1", "--", "m", "-tp", "4")
    assert (options.rendezvous_host, options.logs) == ("127.0.0.1", options.logdir / "node1")
    assert (options.server_restarts, parse("serve", "--", "m").server_restarts) == (0, 3)
    vllm = commands.placed(
        commands.vllm_command(options, Path("/run"), environ={}),
        {"address": "127.0.0.1", "master_port": 77},
        environ={},
    )
    assert vllm.argv[2] == "vllm_patching.headless"
    assert "--headless" in vllm.argv
    assert vllm.argv[-2:] == ("--master-port", "77")
    assert vllm.env["VLLM_HOST_IP"] == "127.0.0.1"
    assert vllm.env["GLOO_SOCKET_IFNAME"] == "lo"
    daemon = commands.daemon_command(options, Path("/run"), launcher_pid=1, launch_id="x")
    assert daemon.argv[2] == "vllm_patching.follower"
    again = parse("serve", "--nnodes=2", "--node-rank=1", "--master-addr=a", "--trainer=x", "--", "m")
    assert commands.trainer_command(again) is None, "node 0 starts it; srun gives all the same words"
    done = run(
        "serve", "--dry-run", "--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--", "m", "-tp", "4"
    )
    assert done.returncode == 0, done.stderr
    assert "node           1 of 2 on " in done.stdout
    assert "node 0         10.0.0.1:any free port, tensor 4 x pipeline 1" in done.stdout
    assert "with updaters for ranks 2, 3" in done.stdout


@pytest.mark.parametrize("place", ["common", "launchers", "openai"])
def test_the_parser_of_a_node_that_follows_is_found_where_this_vllm_has_it(place, monkeypatch):
    there = f"vllm.entrypoints.{place}.cli_args"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: place if name == there else None)
    monkeypatch.setattr(importlib, "import_module", lambda name: name)
    assert headless._parser_module() == there


def test_what_cannot_be_spread_over_nodes_is_refused():
    several = ("serve", "--nnodes=2", "--node-rank=1", "--master-addr=a")
    (fault,) = split_faults(parse(*several, "--", "m", "-tp", "3"))
    assert "3 rank(s) cannot be spread evenly over --nnodes 2" in fault
    assert split_faults(parse(*several, "--", "m", "-pcp", "2")) == []
    (fault,) = split_faults(parse(*several, "--", "m", "-dp", "2"))
    assert "start one server for each engine" in fault
    (fault,) = parse(*several, "--staging=in-place", "--", "m").faults()
    assert "--staging in-place with several nodes" in fault
    (fault,) = parse(*several, "--peers=x", "--", "m").faults()
    assert "--peers with several nodes" in fault
    (fault,) = parse(*several, "--adapters=a", "--", "m", "--enable-lora").faults()
    assert "--adapters a with several nodes" in fault
    loaded = parse(*several, "--", "m", "--enable-lora", "--lora-modules", "a=/x")
    assert (loaded.faults(), loaded.sent_adapters) == ([], ())
    (fault,) = parse("serve", "--nnodes=2", "--node-rank=2", "--master-addr=a", "--", "m").faults()
    assert "of 2 nodes the last is 1" in fault


def test_earlier_environment_that_still_works():
    assert node_faults((), {"NUM_INFERENCE_NODES": "1", "VLLM_ENABLE_SHARED_WEIGHTS": "1"}) == []
    done = run("serve", "--dry-run", "--", "m", LOGDIR="/somewhere/else")
    assert "log directory  /somewhere/else" in done.stdout


def test_plugin_allow_list_extends_and_never_narrows():
    assert commands.plugin_allow_list(None, http=False) is None
    assert commands.plugin_allow_list("a,b", http=False) == "a,b,weight_bridge"
    assert commands.plugin_allow_list("weight_bridge,a", http=True) == "weight_bridge,a"
    assert commands.plugin_allow_list("", http=False) == "weight_bridge"
    kept = commands.plugin_allow_list(None, http=True).split(",")
    installed = {e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")}
    assert set(kept) >= installed | {"weight_bridge"}


def test_a_run_directory_does_not_go_with_the_users_login(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    of_login = tmp_path / "user"
    monkeypatch.setattr(commands, "LOGIN_DIR", of_login)
    (of_login / "1000").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(of_login)  # as /var/run is one

    def parent(runtime: str) -> Path:
        return commands.run_dir_parent({"XDG_RUNTIME_DIR": runtime}).relative_to(tmp_path)

    assert parent(f"{tmp_path}/elsewhere") == Path("elsewhere")
    assert parent(f"{of_login}/1000") == parent(f"{tmp_path}/link/1000") == Path("tmp")
    assert parent(f"{tmp_path}/missing") == parent("") == Path("tmp")


def test_dry_run_starts_nothing_and_shows_both_command_lines(tmp_path):
    argv = ("--logdir", str(tmp_path / "logs"), "--http", "--", "m", "-tp", "2", "--api-key", "s3cret")
    done = run("serve", "--dry-run", *argv)
    assert done.returncode == 0, done.stderr
    assert "-m vllm.entrypoints.openai.api_server --model m -tp 2" in done.stdout
    assert "-m vllm_patching.daemon --run-dir" in done.stdout
    assert "updaters for ranks 0, 1" in done.stdout
    assert "VLLM_PLUGINS=" in done.stdout
    assert "s3cret" not in done.stdout
    assert not (tmp_path / "logs").exists()


def test_status_without_a_daemon(tmp_path):
    done = run("status", "--logdir", str(tmp_path))
    assert done.returncode == 75
    assert f"no daemon has published in {tmp_path}" in done.stderr


def test_exported_mapping_has_no_secret(tmp_path):
    published = mapping.Mapping(
        model="m",
        vllm_version="0.32.0",
        dtype="float32",
        tp_degree=1,
        num_inference_ranks=1,
        vocabularies=(mapping.Vocabulary(name="checkpoint", sources=()),),
        ranks=(mapping.RankMap(rank=0, arena_bytes=0, targets=(), writes={}),),
        param_mappings={},
        rendezvous=mapping.Rendezvous(host="h", port=1, secret="s3cret"),
        run_dir="/run/x",
    )
    (tmp_path / mapping.CONFIG_NAME).write_bytes(mapping.encode(published))
    output = tmp_path / "out.json"
    assert cli.main(["export-mapping", "--logdir", str(tmp_path), "--output", str(output)]) == 0
    assert b"s3cret" not in output.read_bytes()
    exported = mapping.load(output)
    assert exported == msgspec.structs.replace(published, rendezvous=None, run_dir="", digest=exported.digest)

    (tmp_path / mapping.CONFIG_NAME).write_bytes(b'{"format_version": 1')
    with pytest.raises(MappingError, match="truncated"):
        cli.export_mapping(tmp_path, output)
