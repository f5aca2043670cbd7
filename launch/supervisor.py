"""One node's processes: started in order, watched by one loop, ended together, nothing left behind.

The launcher is single-threaded. It waits in ``select`` on a pipe that SIGCHLD, SIGTERM and SIGINT write to,
and wakes a few times a second to repeat the children's logs. Who may die: the daemon,
``max_daemon_restarts`` times, and a vLLM that was ready, ``max_server_restarts`` times. The trainer's end is
the end.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge import flight
from bridge.errors import BridgeError, ConfigError, PeerLost, RendezvousError
from bridge.protocol import mapping
from bridge.protocol.mapping import CONFIG_NAME
from launch import probe, process
from launch.comeback import Comeback, Restarts, session_of
from launch.commands import PLUGIN_GROUP, PLUGIN_NAME, Command, placed
from launch.leftovers import Leftovers
from launch.options import ServerView
from launch.output import Relay, drop_unwritten
from launch.process import EXIT_SIGNAL_BASE, Child
from vllm_patching import linux, residue
from vllm_patching.channel import ask, keep, socket_path

logger = logging.getLogger(__name__)

TICK_S = 0.2  # how late a child's log line may be repeated
OBSERVE_INTERVAL_S = 2.0
# vLLM answers /health only after its workers have loaded, which is when they publish.
PUBLISH_GRACE_S = 30.0
ORPHAN_GRACE_S = 5.0
URL_NAME = "server.url"  # in the log directory, while the server is ready
KILL_TIMEOUT_S = 10.0
HEAD_WORD_S = 10.0
# vLLM's API server ends by itself behind its engine, if nothing in it hangs or it is told to stay; but an
# idle one looks only every five seconds. So long it may tell its clients, then it is asked to end.
LINGER_S = 1.0
OUTLIVE_S = 60.0  # and then made to; it may be waiting for the requests of another engine
SILENT_S = 180.0  # of a daemon that lives; longer than anything it may be busy with
LOOK_S = 5.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long things may take, in seconds, and how often the daemon and vLLM may die."""

    start_timeout_s: float
    shutdown_timeout_s: float
    max_daemon_restarts: int
    max_server_restarts: int = 0
    publish_grace_s: float = PUBLISH_GRACE_S
    outlive_s: float = OUTLIVE_S
    silent_s: float = SILENT_S


@dataclass(frozen=True, kw_only=True)
class Launch:
    """All that one launch consists of."""

    vllm: Command
    daemon: Command
    trainer: Command | None
    server: ServerView
    public_url: str  # where clients on the trainers' hosts reach the server
    run_dir: Path
    logdir: Path  # of this node's logs
    limits: Limits
    nnodes: int = 1
    node_rank: int = 0


class StopRequested(Exception):  # not an error: somebody asked
    """A signal asked the launcher to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class HeadEnded(Exception):  # no error either
    """The server that this node follows has ended in order."""


class Supervisor:
    """Runs one ``Launch``; use it once, from the main thread of a process that does nothing else."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.limits = launch.limits
        self.children: dict[str, Child] = {}
        self._relay = Relay()
        self._selector = selectors.DefaultSelector()
        self._stop_signals: list[int] = []
        self._ready = False
        self._url_due: bool | None = None  # whether the URL must be shown or hidden, which failed
        self._daemon_restarts = Restarts("the daemon", self.limits.max_daemon_restarts)
        self._server_restarts = Restarts("vLLM", self.limits.max_server_restarts)
        self._comeback: Comeback | None = None  # of a vLLM that died
        self._behind = False  # whether it is back, but not with the newest version
        self._daemon_at: float | None = None  # when a dead daemon is started again
        self._daemon_due: float | None = None  # when a restarted daemon must answer again
        self._strangers = frozenset(residue.descendants(os.getpid()))  # inherited by exec, not ours to end
        self._shm_before = frozenset(residue.SHM_DIR.iterdir()) if residue.SHM_DIR.is_dir() else frozenset()
        self._leftovers = Leftovers(self.launch.logdir, self.launch.run_dir)
        self._shm: set[Path] = set()
        self._vllm_shm: set[Path] = set()
        self._observed_at = 0.0
        self._look_at = 0.0  # when the daemon is asked next whether vLLM is whole
        self._broken_since: float | None = None  # since when it is not
        self._gone: tuple[int, float] | None = None  # which of its engines and workers ended first, and when
        self._silent_since: float | None = None  # since when the daemon does not answer
        self._answered = True  # whether it has, since it was started again
        self._why = ""  # what ended everything, for the trainer's message

    def run(self, on_ready: Callable[[], int] | None = None) -> int:
        """Start everything, stay until the end, leave nothing; returns the exit code.

        Args:
            on_ready: called once the server is ready; its result is the exit code, and the end.
        """
        process.become_subreaper()
        with self._signals():
            self._leftovers.sweep()  # on a share it may take its time, and the run directory is there
            keep(self.launch.run_dir)
            try:
                return self._live(on_ready)
            except StopRequested as stop:
                logger.info("%s: shutting down", stop)
                # A server that was asked to stop has done its work; a trainer that was has not.
                unfinished = "trainer" in self.children or not self._ready
                return EXIT_SIGNAL_BASE + stop.number if unfinished else 0
            except HeadEnded as end:
                logger.info("%s: shutting down", end)
                return 0
            except BridgeError as err:
                logger.error("%s", err)
                self._why = str(err)
                flight.note("ends", error=f"{type(err).__name__}: {err}")
                flight.write(f"the launcher ends by {type(err).__name__}: {err}", self.launch.logdir)
                return err.exit_code
            finally:
                self._shut_down()
                drop_unwritten()

    def _live(self, on_ready: Callable[[], int] | None) -> int:
        self._start(self.launch.daemon)
        vllm = self.launch.vllm
        if self.launch.nnodes > 1:
            vllm = placed(vllm, self._await_nodes())
        self._start(vllm)
        self._await_ready()
        if on_ready is not None:
            return on_ready()
        if self.launch.trainer is not None:
            self._start(self.launch.trainer)
        while True:
            self._step()
            self._observe(every_s=OBSERVE_INTERVAL_S)
            if self._comeback is None:
                self._server_restarts.forgive()
                if self._behind:
                    self._await_newest()
            if self._comeback is None and self._daemon_due is None:
                self._daemon_restarts.forgive()
            self._end_what_lingers(self.children["vllm"])
            self._look()
            trainer = self.children.get("trainer")
            if trainer is not None and not trainer.alive:
                logger.info("%s: shutting down", trainer.describe())
                return trainer.exit_code

    def _start(self, command: Command) -> None:
        log = self.launch.logdir / f"{command.name}.log"
        self._relay.follow(command.name, log)
        child = process.start(command, log)
        self.children[command.name] = child
        flight.note("started", child=command.name, pid=child.pid)
        logger.info("started %s, log %s: %s", child.describe(), log, command.pasteable())

    # --- waiting ---------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn signals into bytes in a pipe, so that ``select`` is the only place where we wait."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._selector.register(reader, selectors.EVENT_READ)
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        stops = set(STOP_SIGNALS)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            stops.remove(signal.SIGHUP)
        handlers = {s: signal.signal(s, lambda n, _: self._stop_signals.append(n)) for s in stops}
        handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            self._selector.close()
            reader.close()
            writer.close()

    def _wait(self, timeout_s: float) -> None:
        """Wait for a signal or the timeout, reap whoever ended, repeat what the children wrote."""
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.recv(4096)
            else:
                self._unwatch(key.fd)
                logger.error("vLLM's process %d, an engine or a worker, has ended", key.data)
                self._gone = self._gone or (key.data, time.monotonic())
        by_pid = {child.pid: child for child in self.children.values()}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid in by_pid:  # else an orphan that we adopted
                by_pid[pid].end(status)
                flight.note("ended", child=by_pid[pid].command.name, how=by_pid[pid].describe())
        self._relay.pump()

    def _step(self) -> None:
        """One turn of the loop while everything is supposed to live.

        Raises:
            StopRequested: a signal came.
            PeerLost: vLLM is gone, or the daemon, once too often.
            ConfigError: the daemon refuses its configuration, or a vLLM that was started again.
        """
        self._wait(TICK_S)
        if self._stop_signals:
            raise StopRequested(self._stop_signals[0])
        if self.launch.node_rank and not self.children["daemon"].alive:
            self._follower_ended(self.children["daemon"])
        vllm = self.children.get("vllm")  # of several nodes, started when all are here
        if vllm is not None and not vllm.alive and (self._comeback is None or self._comeback.started):
            self._vllm_died(vllm)
        if self._comeback is not None:
            self._bring_back(self._comeback)
        if not self.children["daemon"].alive:
            self._daemon_died(self.children["daemon"])
        if self._daemon_due is not None and self._comeback is None:
            self._welcome_back(self._daemon_due)

    def _watch(self, status: dict[str, Any]) -> None:
        """Hear of the death of each of vLLM's engines and workers, which are not our children, at once."""
        if self.launch.nnodes > 1:  # there the daemons end what is left
            return
        for pid in (*status["pids"]["engines"], *status["pids"]["workers"]):
            try:
                self._selector.register(linux.pidfd_open(pid), selectors.EVENT_READ, pid)
            except ProcessLookupError as err:  # the daemon says so too, within OUTLIVE_S
                logger.info("vLLM's process %d cannot be watched: %s", pid, err)

    def _unwatch(self, fd: int) -> None:
        self._selector.unregister(fd)
        os.close(fd)

    def _unwatch_all(self) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._unwatch(key.fd)
        self._gone = None

    def _follower_ended(self, child: Child) -> None:
        """A follower's daemon ends in order, or for good, when the server does; else it is started again."""
        if child.exit_code == 0:
            raise HeadEnded("node 0 has ended in order")
        if child.exit_code == PeerLost.exit_code:
            log = self.launch.logdir / "daemon.log"
            raise PeerLost(f"node 0 is gone, or has given this node up; see the end of {log}")

    def _vllm_died(self, child: Child) -> None:
        log = self.launch.logdir / "vllm.log"
        self._unwatch_all()
        if self.launch.node_rank:
            # vLLM notices before us that node 0 has ended; our daemon knows whether that was in order.
            self._wait_until(lambda: not self.children["daemon"].alive, HEAD_WORD_S, hurry_after=0)
            if not self.children["daemon"].alive:
                self._follower_ended(self.children["daemon"])
        if not self._ready:
            raise BridgeError(f"{child.describe()} before the server was ready; see the end of {log}")
        status = probe.daemon_status(self.launch.run_dir)  # a worker may have died first
        first = f"; the daemon last saw: {status['last_error']}" if status and status["last_error"] else ""
        restarts = self._server_restarts
        if restarts.used_up:
            often = f", after {restarts.count} restart(s), as many as --max-server-restarts allows"
            raise PeerLost(
                f"{child.describe()}{first}{often if restarts.limit else ''}; ending everything with it; see "
                f"the end of {log}"
            )
        pause_s = restarts.take()
        flight.note("restart", child="vllm", count=restarts.count, limit=restarts.limit, pause_s=pause_s)
        logger.error(
            "%s%s; starting it again %s (%d of %d), see the end of %s",
            child.describe(),
            first,
            f"in {pause_s:g} s" if pause_s else "once it has let go",
            restarts.count,
            restarts.limit,
            log,
        )
        self._show_url(False)
        self._observe(every_s=0.0)  # what its orphans map is theirs to leave behind
        self._comeback = Comeback(child, pause_s=pause_s, timeout_s=self.limits.start_timeout_s)

    def _bring_back(self, comeback: Comeback) -> None:
        status = probe.daemon_status(self.launch.run_dir)
        if not comeback.started:
            left = comeback.left_of_the_dead(self._tree())
            if not left and comeback.may_start(status):
                for path in residue.sweep(self._vllm_shm):  # the trainer's are its own affair
                    logger.info("removed %s, left behind by vLLM", path)
                self._start(self.launch.vllm)
                comeback.start()
            elif comeback.overdue:
                raise PeerLost(f"the dead vLLM does not let go: pids {left} still run; {_say(status)}")
            return
        if status is not None and status["state"] == "failed":
            raise ConfigError(f"the daemon cannot serve the vLLM that was started again: {status['detail']}")
        if status is not None and status["complete"] and probe.is_healthy(self.launch.server):
            self._comeback, self._behind = None, status["state"] == "recovering"
            self._watch(status)
            self._server_restarts.ready()
            self._show_url(True)
            if self._daemon_due is not None:  # it was restarted meanwhile, and waited for this vLLM
                self._daemon_due = time.monotonic() + self.limits.start_timeout_s
            took_s = time.monotonic() - comeback.began
            logger.info("vLLM is back %.1f s after it died, %s", took_s, _say(status))
        elif comeback.overdue:
            raise PeerLost(
                f"the restarted {self.children['vllm'].describe()}, but is not ready within --start-timeout "
                f"{self.limits.start_timeout_s:g} s: {_say(status)}"
            )

    def _await_newest(self) -> None:
        """Say when a vLLM that came back with the checkpoint's weights has the newest version."""
        status = probe.daemon_status(self.launch.run_dir)
        if status is not None and status["state"] in ("ready", "round"):
            self._behind = False
            logger.info("the server has the newest version, %d", status["weight_version"])

    def _look(self) -> None:
        """Now and then: whether the daemon answers, and whether vLLM is whole, once both are back."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + min(LOOK_S, self.limits.outlive_s / 2)
        if self._url_due is not None:
            self._show_url(self._url_due)
        status = probe.daemon_status(self.launch.run_dir)
        self._end_what_is_deaf(self.children["daemon"], now, deaf=status is None)
        if self._comeback is not None or self._daemon_due is not None:
            return
        if status is not None and self.launch.nnodes == 1:  # of several, the daemons end what is left
            self._end_what_outlives(self.children["vllm"], now, status)

    def _end_what_is_deaf(self, daemon: Child, now: float, *, deaf: bool) -> None:
        """Kill a daemon that lives and has long answered nobody; ``_step`` sees it dead then.

        One that was started again has the start timeout until its first answer.

        Raises:
            PeerLost: it cannot be asked, as somebody has deleted the run directory.
        """
        if not deaf:
            self._silent_since, self._answered = None, True
            return
        if self._daemon_due is not None and not self._answered:
            return
        self._silent_since = self._silent_since or now
        if now - self._silent_since > self.limits.silent_s:
            if not os.access(path := socket_path(self.launch.run_dir), os.F_OK):
                raise PeerLost(
                    f"the daemon (pid {daemon.pid}) lives, but {path} is gone: somebody has deleted the run "
                    f"directory {self.launch.run_dir} of a running server, and nobody can reach it any more; "
                    "ending everything. Start again with --run-dir where nothing is cleaned up"
                )
            logger.error(
                "the daemon (pid %d) has not answered for %g s; killing it", daemon.pid, self.limits.silent_s
            )
            self._silent_since = None
            daemon.signal(signal.SIGKILL)

    def _end_what_lingers(self, vllm: Child) -> None:
        """Ask an API server whose engine or worker has ended to do so too; ``_step`` sees it dead then."""
        if self._gone is None or not vllm.alive:
            return
        pid, since = self._gone
        if time.monotonic() - since > LINGER_S:
            logger.info("asking vllm (pid %d) to end behind process %d", vllm.pid, pid)
            self._unwatch_all()  # the others end with it
            vllm.signal(signal.SIGTERM)

    def _end_what_outlives(self, vllm: Child, now: float, status: dict[str, Any]) -> None:
        """Kill an API server whose engine or workers have been gone for long; ``_step`` sees it dead then."""
        if status["complete"]:
            self._broken_since = None
            return
        self._broken_since = self._broken_since or now
        if now - self._broken_since > self.limits.outlive_s:
            logger.error(
                "vllm (pid %d) outlives its engine or workers by %g s (%s); killing it",
                vllm.pid,
                self.limits.outlive_s,
                status["last_error"] or status["detail"],
            )
            self._broken_since = None
            vllm.signal(signal.SIGKILL)

    def _daemon_died(self, child: Child) -> None:
        log = self.launch.logdir / "daemon.log"
        if child.exit_code == ConfigError.exit_code:
            raise ConfigError(f"{child.describe()}: it refuses its configuration; see the end of {log}")
        restarts = self._daemon_restarts
        if self._daemon_at is None:
            if restarts.used_up:
                raise PeerLost(
                    f"{child.describe()}, after {restarts.count} restart(s), as many as "
                    f"--max-daemon-restarts allows; ending vLLM with it; see the end of {log}"
                )
            pause_s = restarts.take()
            self._daemon_at = time.monotonic() + pause_s
            flight.note(
                "restart", child="daemon", count=restarts.count, limit=restarts.limit, pause_s=pause_s
            )
            logger.warning(
                "%s; restarting it%s (%d of %d); vLLM goes on meanwhile with the weights it has",
                child.describe(),
                f" in {pause_s:g} s" if pause_s else "",
                restarts.count,
                restarts.limit,
            )
            self._silent_since, self._answered = None, False
            if self._ready:
                self._daemon_due = self._daemon_at + self.limits.start_timeout_s
        if time.monotonic() >= self._daemon_at:
            self._daemon_at = None
            self._start(self.launch.daemon)

    def _welcome_back(self, due: float) -> None:
        status = probe.daemon_status(self.launch.run_dir)
        self._refuse_failure(status)
        if status is not None and status["state"] in ("ready", "round", "torn", "recovering"):
            self._daemon_due = None
            self._daemon_restarts.ready(cured=True)
            logger.info(
                "the daemon is back (pid %d), rendezvous %s", status["pids"]["daemon"], status["rendezvous"]
            )
        elif time.monotonic() > due:
            raise PeerLost(
                f"the restarted {self.children['daemon'].describe()}, but the workers did not hand their "
                f"memory over again within {self.limits.start_timeout_s:g} s: {_say(status)}"
            )

    # --- getting ready ---------------------------------------------------------------------------------

    def _await_nodes(self) -> dict[str, Any]:
        """Wait until every node has met node 0; returns what this one's daemon knows of them.

        Only then is vLLM started: its own groups do not say whom they miss.

        Raises:
            RendezvousError: names the nodes that did not come within ``start_timeout_s``.
        """
        deadline = time.monotonic() + self.limits.start_timeout_s
        while True:
            self._step()
            status = probe.daemon_status(self.launch.run_dir)
            self._refuse_failure(status)
            if status is not None and not status["nodes"]["missing"]:
                nodes: dict[str, Any] = status["nodes"]
                hosts = ", ".join(f"node {rank} on {host}" for rank, host in nodes["hosts"].items())
                logger.info("every node is here (%s); vLLM's master is %s:%d", hosts,
                            nodes["master_addr"], nodes["master_port"])  # fmt: skip
                return nodes
            if time.monotonic() > deadline:
                missing = status["nodes"]["missing"] if status is not None else "?"
                raise RendezvousError(
                    f"node {self.launch.node_rank} of {self.launch.nnodes} waited --start-timeout "
                    f"{self.limits.start_timeout_s:g} s for node(s) {missing}: {_say(status)}"
                )

    def _refuse_failure(self, status: dict[str, Any] | None) -> None:
        if status is None:
            return
        if status["state"] == "failed":
            raise ConfigError(f"the daemon cannot serve this model: {status['detail']}")
        if status.get("given_up"):
            raise PeerLost(status["given_up"])

    def _await_ready(self) -> None:
        """Wait until vLLM answers /health and every worker has published to the daemon.

        On a node that follows there is no HTTP server to ask.

        Raises:
            ConfigError: the server is up, but the plugin is not in it; or the daemon refused a worker.
            RendezvousError: not within ``start_timeout_s``.
        """
        began = time.monotonic()
        healthy_since: float | None = None
        while True:
            self._step()
            self._observe(every_s=OBSERVE_INTERVAL_S)
            now = time.monotonic()
            status = probe.daemon_status(self.launch.run_dir)
            self._refuse_failure(status)
            if healthy_since is None and (self.launch.node_rank or probe.is_healthy(self.launch.server)):
                healthy_since = now
            if healthy_since is not None:
                if status is not None and _serves(status):
                    self._behind = status["state"] == "recovering"
                    self._announce(status, now - began)
                    return
                if not self.launch.node_rank:
                    self._refuse_missing_plugin(status, now - healthy_since)
            if now - began > self.limits.start_timeout_s:
                health = "answers" if healthy_since is not None else "does not answer"
                raise RendezvousError(
                    f"not ready within --start-timeout {self.limits.start_timeout_s:g} s: vLLM "
                    f"{health} at {self.launch.server.url}/health; {_say(status)}"
                )

    def _refuse_missing_plugin(self, status: dict[str, Any] | None, healthy_s: float) -> None:
        if status is None or healthy_s < self.limits.publish_grace_s:
            return
        pids = status["pids"]
        if pids.get("workers") or pids.get("engines"):
            return  # the plugin is there; publishing a large model may take its time
        plugins = self.launch.vllm.environment().get("VLLM_PLUGINS")
        raise ConfigError(
            f"vLLM has answered /health for {healthy_s:.0f} s, but none of its workers has published to the "
            f"daemon ({_say(status)}): the bridge's plugin did not load. VLLM_PLUGINS is "
            f"{'not set' if plugins is None else repr(plugins)}; the entry point is {PLUGIN_NAME} in group "
            f'{PLUGIN_GROUP}. Run "python -m bridge.launch check", and look for "{PLUGIN_NAME}" in '
            f"{self.launch.logdir / 'vllm.log'}"
        )

    def _announce(self, status: dict[str, Any], took_s: float) -> None:
        self._ready = True
        self._daemon_restarts.ready(cured=True)
        self._watch(status)
        flight.note("ready", took_s=round(took_s, 3))
        self._observe(every_s=0.0)
        if self.launch.node_rank:
            ranks = [row["rank"] for row in status["ranks"]]
            logger.info("ready after %.1f s: this node has rank(s) %s of %s of %s", took_s, ranks,
                        status["world_size"], status["model"])  # fmt: skip
            return
        self._show_url(True)
        logger.info(
            "ready after %.1f s: %s serves %s on %s rank(s); mapping %s, rendezvous %s",
            took_s,
            self.launch.public_url,
            status["model"],
            status["world_size"],
            self.launch.logdir / CONFIG_NAME,
            status["rendezvous"],
        )
        if why := status["kept_out"]:
            logger.warning("requests are answered with 503 for now: %s", why)

    def _show_url(self, shown: bool) -> None:
        """Have clients told where the server is, or not; ``_look`` tries again what fails.

        A log directory on a share may be away: nobody who is served needs it.
        """
        path = self.launch.logdir / URL_NAME
        try:
            if shown:
                mapping.write_atomically(path, f"{self.launch.public_url}\n".encode(), mode=0o644)
            else:
                path.unlink(missing_ok=True)
        except OSError as err:
            if self._url_due is None:
                logger.warning("%s cannot be %s: %s", path, "written" if shown else "removed", err.strerror)
            self._url_due = shown
        else:
            self._url_due = None

    # --- the end ---------------------------------------------------------------------------------------

    def _tree(self) -> list[int]:
        """Everything alive below the launcher, adopted orphans included, without what it found there."""
        return [pid for pid in residue.descendants(os.getpid()) if pid not in self._strangers]

    def _observe(self, *, every_s: float) -> None:
        """Take note of the shared memory our tree maps; once a process is dead it cannot be asked.

        What was removed is forgotten: a trainer may map files by the thousand.
        """
        now = time.monotonic()
        if now - self._observed_at >= every_s:
            self._observed_at = now
            tree, vllm = self._tree(), self.children.get("vllm")
            served = {pid for pid in tree if vllm is not None and session_of(pid) == vllm.pid}
            self._vllm_shm = self._present(self._vllm_shm | residue.snapshot(served))
            self._shm = self._present(self._shm | residue.snapshot(set(tree) - served))
            self._leftovers.note(self._vllm_shm)

    def _present(self, paths: set[Path]) -> set[Path]:
        return {path for path in paths - self._shm_before if path.exists()}

    def _shut_down(self) -> None:
        """End the whole tree within the shutdown timeout, by force if need be, and remove what it leaves."""
        began = time.monotonic()
        self._show_url(False)
        self._observe(every_s=0.0)
        already_asked = len(self._stop_signals)
        self._unwatch_all()  # they end because we ask them to
        self._ask_to_end()
        patience = self.limits.shutdown_timeout_s
        self._wait_until(lambda: self._all_ended(), patience, hurry_after=already_asked)
        for pid in self._tree():  # orphans of the dead, or the stubborn
            _kill(pid, signal.SIGTERM)
        left = patience - (time.monotonic() - began)
        self._wait_until(lambda: not self._tree(), min(left, ORPHAN_GRACE_S), hurry_after=already_asked)
        self._observe(every_s=0.0)
        if stubborn := self._tree():
            logger.warning("pids %s did not end in time; killing them", stubborn)
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while (tree := self._tree()) and time.monotonic() < deadline:
            spared = time.monotonic() < deadline - KILL_TIMEOUT_S / 2  # they clean up behind the others
            for pid in tree:  # again each turn: a dying parent may have started another
                if not (spared and residue.is_tracker(pid)):
                    _kill(pid, signal.SIGKILL)
            self._wait(TICK_S)
        if tree:
            logger.error("pids %s do not end, not even by SIGKILL", tree)
        self._wait(0)
        for path in residue.sweep(self._shm | self._vllm_shm):
            logger.info("removed %s, left behind by vLLM", path)
        residue.remove_run_dir(self.launch.run_dir)
        self._leftovers.forget()
        self._relay.close()
        logger.info("shut down in %.1f s", time.monotonic() - began)

    def _ask_to_end(self) -> None:
        for name in ("trainer", "vllm"):
            if (child := self.children.get(name)) is not None:
                child.signal(signal.SIGTERM)
        daemon = self.children.get("daemon")
        if daemon is None or not daemon.alive:
            return
        try:
            order = {"type": "shutdown", "why": self._why}  # for the trainer
            ask(self.launch.run_dir, order, timeout_s=probe.PROBE_TIMEOUT_S)
        except RendezvousError:
            daemon.signal(signal.SIGTERM)  # not listening yet, or stuck

    def _all_ended(self) -> bool:
        return not any(child.alive for child in self.children.values())

    def _wait_until(self, done: Callable[[], bool], timeout_s: float, *, hurry_after: int) -> None:
        """Wait until ``done``, the timeout, or a further signal from somebody who has lost patience."""
        deadline = time.monotonic() + timeout_s
        while not done() and (left := deadline - time.monotonic()) > 0:
            if len(self._stop_signals) > hurry_after:
                logger.warning("asked again: not waiting any longer")
                return
            self._wait(min(TICK_S, left))


def _serves(status: dict[str, Any]) -> bool:
    """Whether it is up for good; a version that no peer can send comes with the next broadcast."""
    return status["state"] in ("ready", "round") or (
        status["state"] == "recovering" and status["complete"] and not status["borrowing"]
    )


def _say(status: dict[str, Any] | None) -> str:
    return (
        "the daemon does not answer"
        if status is None
        else f"the daemon is {status['state']}: {status['detail']}"
    )


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it was faster
