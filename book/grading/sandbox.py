"""The process that a student's notebook runs in: shut in by bubblewrap where that works, else by limits alone."""

import ctypes
import json
import os
import select
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

WORKER = Path(__file__).with_name("worker.py")
BUBBLEWRAP = "On Debian, install the package bubblewrap; else grade in a container."
UNSHUT = {  # what is said of a kind of sandbox that does not shut everything out
    "bubblewrap": None,
    "nobody": "Warning: bubblewrap does not run here, so notebooks run as another account: they can use the network "
    f"and read what anybody may read. Limits of time and memory hold. {BUBBLEWRAP}",
    "limits": "Warning: bubblewrap does not run here, so a notebook can read the files of this account and use the "
    f"network. Limits of time and memory hold. {BUBBLEWRAP}",
}
NOBODY = 65534


class Limits(NamedTuple):
    """What one submission may take."""

    cells: float = 120.0  # seconds for all of its cells
    call: float = 20.0  # seconds for a call
    total: float = 600.0  # seconds for everything
    memory: int = 2**31  # bytes beside torch itself
    reply: int = 2**23  # bytes of one reply


def libraries() -> list[str]:
    """Where Python and its packages are: all that a notebook sees of this machine, beside the system."""
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return sorted(packages | {folder for folder in site.getsitepackages() if os.path.isdir(folder)})


def bubblewrap(package: Path) -> list[str] | None:
    """The command that shuts a process in: no network, no home, a read-only system; None if there is none here.

    package: a folder that holds the `mini_impl` to import.
    """
    program = shutil.which("bwrap")
    if program is None:
        return None
    words = [program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    words += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for folder in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/fonts"):
        if os.path.islink(folder):
            words += ["--symlink", os.readlink(folder), folder]
        elif os.path.exists(folder):
            words += ["--ro-bind", folder, folder]
    bases = {sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)), *libraries()}
    for folder in sorted(bases | {str(package), str(WORKER)}):
        words += ["--ro-bind", folder, folder]
    for folder in libraries():  # an installed package would hold the answers
        if os.path.isdir(whole := os.path.join(folder, "mini_impl")):
            words += ["--tmpfs", whole]
    for name, value in environment().items():
        words += ["--setenv", name, value]
    return [*words, "--chdir", "/tmp", "--"]


def environment() -> dict[str, str]:
    words = {"HOME": "/tmp", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "MPLBACKEND": "agg", "MPLCONFIGDIR": "/tmp"}
    return words | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Sandbox:
    """Starts workers, and sees that nothing of them is left.

    package: a folder that holds the `mini_impl` to import. kind: "bubblewrap"; "nobody", another account with limits,
    where this one is root; "limits"; None takes the first of these that a trial run finds to work.
    """

    def __init__(self, package: Path, limits: Limits, kind: str | None = None):
        self.package, self.limits, self.prefix = package, limits, []
        self.alive: set[int] = set()
        self.lock = threading.Lock()
        adopt()
        kinds = [kind] if kind else ["bubblewrap", "nobody", "limits"]
        self.kind = next((kind for kind in kinds if self.works(kind)), None)
        if self.kind is None:
            raise RuntimeError(f"no worker runs here in a sandbox of the kind {kind or 'limits'}")

    def works(self, kind: str) -> bool:
        """Whether a trial worker says hello."""
        if kind == "nobody" and (os.name != "posix" or os.geteuid() != 0):
            return False
        self.kind, self.prefix = kind, bubblewrap(self.package) if kind == "bubblewrap" else []
        if self.prefix is None:
            return False
        try:
            worker = self.start()
        except OSError:
            return False
        # It is not waited for before it is killed: its number would be free for another process.
        out = b""
        with suppress(OSError):
            os.write(worker.stdin.fileno(), b'{"id": 0, "do": "hello", "sizes": []}\n')
            if select.select([worker.stdout], [], [], 120)[0]:
                out = os.read(worker.stdout.fileno(), 1000)
        self.kill(worker)
        return b'"hello": true' in out

    def start(self) -> subprocess.Popen:
        settings = {
            "paths": [str(self.package), *libraries()],
            "memory": self.limits.memory,
            "cpu": int(self.limits.total) + 1,
            "tasks": tasks() + 256,
        }
        python = os.path.realpath(sys.executable)
        account = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if self.kind == "nobody" else {}
        with self.lock:  # so that sweep never meets a worker that is not in the list yet
            worker = subprocess.Popen(
                [*self.prefix, python, "-I", "-S", str(WORKER), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/tmp" if os.path.isdir("/tmp") else None,
                env=environment(),
                start_new_session=True,
                **account,
            )
            self.alive.add(worker.pid)
        return worker

    def kill(self, worker: subprocess.Popen) -> None:
        """End a worker with its whole process group, and whatever has crept out of it."""
        try:
            os.killpg(worker.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            worker.kill()
        worker.wait()
        for stream in (worker.stdin, worker.stdout):
            with suppress(OSError):
                stream.close()
        with self.lock:
            self.alive.discard(worker.pid)
        self.sweep()

    def sweep(self) -> None:
        """Kill the detached processes that have become children of this one, until there are none."""
        if not os.path.isdir("/proc"):
            return
        while True:
            with self.lock:
                strays = [pid for pid in children(os.getpid()) if pid not in self.alive and crept(pid)]
                for pid in strays:
                    for each in (*children(pid), pid):
                        with suppress(ProcessLookupError):
                            os.kill(each, signal.SIGKILL)
                    with suppress(ChildProcessError):
                        os.waitpid(pid, 0)
            if not strays:
                return


@cache
def adopt() -> None:
    """Let this process become the parent of orphans among its descendants, and let no other one read its memory."""
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def crept(pid: int) -> bool:
    """Whether a child is of another session: those that this process itself starts stay in its own."""
    try:
        return os.getsid(pid) != os.getsid(0)
    except ProcessLookupError:
        return False


def children(pid: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            if parent == pid:
                found.append(int(entry))
    return found


def tasks() -> int:
    """How many processes and threads there are here: the limit on them counts those of an account together."""
    try:
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].partition("/")[2])
    except OSError:
        return 4096
