"""What happens to a server's files in weeks: code is updated, directories are cleaned, disks fill up."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.protocol.mapping import CONFIG_NAME
from tests.support.node import Node, node
from tests.support.serving import REPO, alive, wait_until
from vllm_patching import newest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

PACKAGES = ("bridge", "vllm_patching", "launch", "tests")


def test_a_server_whose_code_was_changed_ends_before_it_could_serve_a_wrong_byte(tmp_path: Path) -> None:
    """What it starts from then on would read the same bytes in another way, and no checksum would tell."""
    code = tmp_path / "checkout"
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / package, code / package, ignore=ignore)
    with node(tmp_path / "node", deadline_s=3.0, flags=["--transport=gloo"], code=code) as server:
        server.begin(1)
        module = code / "bridge" / "wire" / "transport.py"
        module.write_text(f"{module.read_text()}\n# packed in another order\n")
        os.kill(server.pid_of("updater"), signal.SIGKILL)
        wait_until("the server to end", lambda: server.process.poll() is not None, timeout_s=120)
        said = (server.logdir / "launcher.log").read_text()
        assert "updater (pid" in said
        assert "runs other code than this daemon" in said
        assert server.served() == [], "what is served has changed"
        assert server.process.returncode == 2, said[-3000:]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with node(tmp_path_factory.mktemp("node"), deadline_s=3.0, restarts=2) as made:
        yield made


def kill_the_daemon(server: Node) -> None:
    pid = server.pid_of("daemon")
    os.kill(pid, signal.SIGKILL)
    wait_until("its end", lambda: not alive(pid), timeout_s=20)


def test_a_log_directory_that_is_full_costs_no_server(server: Node) -> None:
    """A daemon that was started again cannot say where it is, until there is room."""
    server.begin(1)
    mapping = server.logdir / CONFIG_NAME
    mapping.unlink()
    mapping.mkdir()  # nothing can be written there, also by root
    kill_the_daemon(server)
    wait_until(
        "the daemon to say so",
        lambda: f"cannot be written to {mapping}" in str(server.status().get("last_error")),
        timeout_s=90,
    )
    assert server.process.poll() is None
    before = server.batches()
    wait_until("batches to go on", lambda: server.batches() > before + 10, timeout_s=30)
    mapping.rmdir()
    wait_until("the daemon to be back", lambda: server.status()["state"] == "ready", timeout_s=90)
    server.begin(2)


def test_the_newest_version_is_known_although_its_note_was_deleted(server: Node) -> None:
    """Temporary directories are cleaned of what is old: else the checkpoint would count as the newest."""
    server.begin(3)
    version = server.version
    (server.run_dir / newest.FILE_NAME).unlink()
    kill_the_daemon(server)
    wait_until("the daemon to be back", lambda: server.status()["state"] == "ready", timeout_s=90)
    pid = server.pid_of("worker")
    os.kill(pid, signal.SIGKILL)
    wait_until("its end", lambda: not alive(pid), timeout_s=20)
    kill_the_daemon(server)
    wait_until("the checkpoint", lambda: server.status()["state"] == "recovering", timeout_s=90)
    assert server.status()["requested_version"] == version
    server.begin(4)
    assert server.version > version, "a number that stands for two versions"
