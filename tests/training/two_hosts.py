"""Two hosts on one machine: network namespaces joined by a cable, with the file system in common.

Needs no root: the namespaces are of a user namespace, which the system may forbid. A host's processes are those of its
network namespace.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DEVICE = "cable0"
HERE = Path(__file__).parent
_HOLD = ["sleep", "infinity"]


class Host:
    """A network namespace.

    Args:
        pid: of a process in it.
        address: of its end of the cable.
    """

    def __init__(self, pid: int, address: str) -> None:
        self.pid, self.address = pid, address

    def command(self, words: list[str], net: bool = True) -> list[str]:
        """The command line that runs ``words`` in it, as its root; ``net`` False: in its user namespace only."""
        inside = ["--net"] if net else []
        return ["nsenter", "--target", str(self.pid), "--user", *inside, "--preserve-credentials", *words]

    def configure(self, call: str) -> None:
        """Calls a function of ``netlink`` there; OSError with its last line where that fails."""
        command = self.command([sys.executable, "-c", f"import netlink; netlink.{call}"])
        done = subprocess.run(command, cwd=HERE, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip().rpartition("\n")[2])

    def plug(self, up: bool) -> None:
        """The cable in or out at this host: packets of both are lost from now on, no connection is closed."""
        self.configure(f"set_link({DEVICE!r}, {up})")

    def kill(self) -> None:
        """SIGKILL to all its processes but the one that holds the namespace; none sees another one end."""
        here = os.readlink(f"/proc/{self.pid}/ns/net")
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
                if pid != self.pid and _namespace(pid) == here:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:  # of another user, or gone
        return None


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both, with the cable plugged in; afterwards they are gone with all their processes.

    Raises:
        OSError: no namespaces here, or no cable.
    """
    if _namespace(os.getpid()) is None:
        raise OSError("no /proc")
    hosts: list[Host] = []
    holders: list[subprocess.Popen] = []
    try:
        for number, start in enumerate((["unshare", "--user", "--map-root-user", "--net"], ["unshare", "--net"])):
            words = [*start, *_HOLD]
            holders.append(subprocess.Popen(hosts[0].command(words, net=False) if hosts else words, stderr=-1))
            _await_namespace(holders[-1], {_namespace(os.getpid()), *(_namespace(host.pid) for host in hosts)})
            hosts.append(Host(holders[-1].pid, f"10.77.0.{number + 1}"))
        hosts[0].configure(f"join({DEVICE!r}, {hosts[1].pid})")
        for host in hosts:
            host.configure("set_link('lo', True)")
            host.configure(f"set_address({DEVICE!r}, {host.address!r})")
            host.plug(True)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.kill()
        for holder in holders:
            holder.kill()
            holder.communicate()


def _await_namespace(process: subprocess.Popen, known: set[str | None]) -> None:
    """``unshare`` and ``nsenter`` keep their process number when they become ``sleep``."""
    while _namespace(process.pid) in known or Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
        if process.poll() is not None:
            raise OSError(process.communicate()[1].decode().strip())
        time.sleep(0.01)
