"""Hosts of their own on one machine: network namespaces with an address each, joined by a switch whose ports go down.

A namespace lives as long as the process that was started in it, which dies with this one: nothing is left in /run, and
the machine's own network is not touched. Only the network is apart; files and processes are shared.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network

from tasks.tied import tied_command
from tests.bad_days.place import NotHereError
from tests.processes import wait_for

NETWORK = IPv4Network("10.77.0.0/24")


class Host:
    """A namespace with an interface `eth0`, plugged into port `number` of a switch.

    Attributes:
        address: in NETWORK.
    """

    def __init__(self, number: int, holder: int, switch: int) -> None:
        self.address: IPv4Address = NETWORK[number]
        self._number, self._holder, self._switch = number, holder, switch

    def command(self, *command: str) -> list[str]:
        """`command` as one that runs on this host: its process becomes it."""
        return _inside(self._holder, command)

    def plug_in(self) -> None:
        """Make the interface and its cable."""
        port, mine = f"port{self._number}", str(self._holder)
        _ip(self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", mine)
        _ip(self._switch, "link", "set", port, "master", "switch", "up")
        _ip(self._holder, "address", "add", f"{self.address}/{NETWORK.prefixlen}", "dev", "eth0")
        for name in ("lo", "eth0"):
            _ip(self._holder, "link", "set", name, "up")

    def cut(self) -> None:
        """Pull the cable, at the switch."""
        _ip(self._switch, "link", "set", f"port{self._number}", "down")

    def join(self) -> None:
        """Put it back."""
        _ip(self._switch, "link", "set", f"port{self._number}", "up")


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts on one switch, while the block runs.

    Raises: NotHereError where this process may not make network namespaces, or the tools for it are missing.
    """
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if sys.platform != "linux" or missing:
        raise NotHereError(f"no network namespaces without {', '.join(missing) or 'Linux'} (iproute2, util-linux)")
    with contextlib.ExitStack() as namespaces:
        switch, *holders = [namespaces.enter_context(_namespace()) for _ in range(count + 1)]
        made = [Host(number, holder, switch) for number, holder in enumerate(holders, 1)]
        _ip(switch, "link", "add", "switch", "type", "bridge")
        _ip(switch, "link", "set", "switch", "up")
        for host in made:
            host.plug_in()
        yield made


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """A process alone in a network namespace, by its pid. Raises: NotHereError."""
    ours = os.readlink("/proc/self/ns/net")
    command = tied_command("unshare", "--net", "sleep", "infinity")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: process.poll() is not None or os.readlink(f"/proc/{process.pid}/ns/net") != ours)
            if process.poll() is not None:
                assert process.stderr
                raise NotHereError(f"no network namespace can be made here ({process.stderr.read().strip()})")
            yield process.pid
        finally:
            process.kill()


def _inside(holder: int, command: Sequence[str]) -> list[str]:
    return ["nsenter", f"--net=/proc/{holder}/ns/net", *command]


def _ip(holder: int, *arguments: str) -> None:
    """Raises: NotHereError when the kernel has no such devices."""
    done = subprocess.run(_inside(holder, ["ip", *arguments]), stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise NotHereError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
