"""What a vLLM that died leaves behind, and how it is taken away: processes, /dev/shm files, sockets.

vLLM's message queues are named files in ``/dev/shm``, and its ZeroMQ sockets are files too; after SIGKILL
nobody removes them. Other jobs keep theirs in the same place, so nothing is ever found by a name's pattern:
only what our own processes were seen to map is touched, and only when no living process maps it any more.
"""

from __future__ import annotations

import logging
import os
import select
import stat
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from vllm_patching import gate, linux, newest

logger = logging.getLogger(__name__)

SHM_DIR = Path("/dev/shm")
KILL_TIMEOUT_S = 5.0
VLLM_EXIT_TIMEOUT_S = 20.0
LAUNCH_FILE = "launch"  # in a following node's run directory: whose workers it has
STORE_PREFIX = "vllm_dist_"  # by such a file a node's workers meet; see compat.keep_store_in_run_dir
_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess)


def descendants(pid: int) -> list[int]:
    """All living processes below ``pid``, children first; empty when it is gone."""
    try:
        return [p.pid for p in psutil.Process(pid).children(recursive=True) if p.status() != "zombie"]
    except _GONE:
        return []


def snapshot(pids: Iterable[int], *, shm_dir: Path = SHM_DIR) -> set[Path]:
    """The files below ``shm_dir`` that these processes map now; those that are gone map nothing."""
    return {path for pid in pids for path in _mapped(pid, shm_dir)}


def _mapped(pid: int, shm_dir: Path) -> set[Path]:
    """Files of ``shm_dir`` in one process's address space; none where we may not look."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()
    # address perms offset dev inode path; a deleted file's path ends in " (deleted)" and needs no removal.
    found = [line.split(maxsplit=5)[4:] for line in lines if f" {shm_dir}/" in line]
    paths = {Path(path) for _, path in found if not path.endswith(" (deleted)")}
    # Whoever makes a semaphore maps it under another name, which glibc deletes once it has its own.
    made = {int(inode) for inode, path in found if path.endswith(" (deleted)") and "/sem." in path}
    return paths | (_named(made, shm_dir) if made else set())


def _named(inodes: set[int], shm_dir: Path) -> set[Path]:
    """The semaphores with these inodes."""
    try:
        entries = [entry for entry in os.scandir(shm_dir) if entry.name.startswith("sem.")]
    except OSError:
        return set()
    return {Path(entry.path) for entry in entries if entry.inode() in inodes}


def sweep(paths: Iterable[Path], *, shm_dir: Path = SHM_DIR) -> list[Path]:
    """Unlink those of ``paths`` that are still there, are ours, and that no living process maps.

    Returns:
        What was removed.
    """
    candidates = {path for path in paths if _is_ours(path)}
    if not candidates:
        return []
    removed = []
    for path in sorted(candidates - snapshot(psutil.pids(), shm_dir=shm_dir)):
        try:
            path.unlink()
        except FileNotFoundError:
            continue  # a resource tracker was faster
        removed.append(path)
    return removed


def _is_ours(path: Path) -> bool:
    """Whether it is a file of this user; a directory cannot be mapped, so that it was never left behind."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode)


def end_processes(pids: Iterable[int], *, timeout_s: float) -> list[int]:
    """End these processes, whatever runs below them, and the rest of their sessions; SIGTERM, then SIGKILL.

    The launcher starts vLLM as a session of its own, so the session finds what a dead parent left. The
    caller's own session is spared.

    Args:
        pids: processes of the tree; those that are gone are skipped.
        timeout_s: how long they may take to follow SIGTERM.

    Returns:
        The pids that had to be killed.
    """
    pids = set(pids)
    sessions = _sessions(pids)
    procs = _tree(pids, sessions)
    for proc in procs:
        _signal(proc, kill=False)
    alive = _wait(procs, timeout_s)
    # Started meanwhile; of what has ended meanwhile, somebody else may have the number by now.
    sessions = {sid for sid in sessions if not _leads_another(sid, procs)}
    alive += [proc for proc in _tree({p.pid for p in alive}, sessions) if proc not in alive]
    stubborn = [proc for proc in alive if not is_tracker(proc.pid)]
    for proc in stubborn:
        _signal(proc, kill=True)
    left = _wait(alive, KILL_TIMEOUT_S)
    for proc in (late := [proc for proc in left if proc not in stubborn]):
        _signal(proc, kill=True)
    for proc in _wait(left, KILL_TIMEOUT_S):
        logger.error("pid %d does not end, not even by SIGKILL; see its kernel stack", proc.pid)
    return [proc.pid for proc in (*stubborn, *late)]


def is_tracker(pid: int) -> bool:
    """Whether it is multiprocessing's resource tracker; killed, it leaves what it would have unlinked.

    It does not follow SIGTERM, and ends by itself once its parent and all that the parent started are gone:
    the names of their semaphores and shared memory go with it.
    """
    try:
        return any("multiprocessing.resource_tracker" in part for part in psutil.Process(pid).cmdline())
    except _GONE:
        return False


def _wait(procs: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until these processes have ended, reaped or not; returns those that have not."""
    poller, alive = select.poll(), {}
    deadline = time.monotonic() + timeout_s
    try:
        for proc in procs:
            try:
                fd = linux.pidfd_open(proc.pid)
            except ProcessLookupError:
                continue
            alive[fd] = proc
            poller.register(fd, select.POLLIN)
        while alive and (left_s := deadline - time.monotonic()) > 0:
            for fd, _ in poller.poll(left_s * 1000):
                poller.unregister(fd)
                os.close(fd)
                del alive[fd]
        return list(alive.values())
    finally:
        for fd in alive:
            os.close(fd)


def _signal(proc: psutil.Process, *, kill: bool) -> None:
    try:
        if kill:
            proc.kill()
        else:
            proc.terminate()
    except _GONE:
        pass  # which is what was wanted


def _sessions(pids: set[int]) -> set[int]:
    """The sessions that these are in, without the caller's own."""
    return {sid for pid in pids if (sid := _session(pid)) is not None} - {os.getsid(0)}


def _leads_another(sid: int, procs: list[psutil.Process]) -> bool:
    """Whether the session of this number is led by a process that is none of ``procs``."""
    try:
        return psutil.Process(sid) not in procs
    except _GONE:
        return False


def _tree(pids: set[int], sessions: set[int]) -> list[psutil.Process]:
    """The living processes of these trees and sessions, without the caller's own."""
    wanted = set(pids)
    for pid in psutil.pids():
        if _session(pid) in sessions:
            wanted.add(pid)
    for pid in tuple(wanted):
        wanted.update(descendants(pid))
    procs = []
    for pid in wanted - {os.getpid(), *descendants(os.getpid())}:
        try:
            proc = psutil.Process(pid)
            if proc.status() != "zombie":
                procs.append(proc)
        except _GONE:
            continue
    return procs


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def forget_launch(run_dir: Path) -> None:
    """Remove what a launch's daemons have noted in its run directory; it is of no use to another launch."""
    newest.forget(run_dir)
    gate.forget(run_dir)
    (run_dir / LAUNCH_FILE).unlink(missing_ok=True)


def remove_run_dir(run_dir: Path) -> None:
    """Remove sockets and workers' stores from a run directory, and the directory if nothing else is in it."""
    try:
        forget_launch(run_dir)
        for path in run_dir.iterdir():
            if stat.S_ISSOCK(path.lstat().st_mode) or path.name.startswith(STORE_PREFIX):
                path.unlink(missing_ok=True)
        run_dir.rmdir()
    except FileNotFoundError:
        return  # somebody else has cleaned up already
    except OSError as err:
        logger.warning("the run directory %s stays behind: %s", run_dir, err.strerror)


def clean_up_behind(pids: Iterable[int], shm: Iterable[Path], run_dir: Path) -> None:
    """What a launcher that was killed would have done: nobody but its daemon is left to.

    Args:
        pids: of vLLM.
        shm: what they were seen to map; more may be mapped since.
    """
    pids = set(pids)
    mapped = set(shm) | snapshot(pids)
    end_processes(pids, timeout_s=VLLM_EXIT_TIMEOUT_S)
    for path in sweep(mapped):
        logger.info("removed %s, left behind by vLLM", path)
    remove_run_dir(run_dir)
