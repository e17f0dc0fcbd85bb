"""Hosts on one machine: network namespaces on a bridge, each with a memory of its own under /dev/shm."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Simulated:
    """One host. name: of its namespace. address: on the network that all of them share."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """What runs ``words`` there."""
        inside = f'mount -t tmpfs -o mode=1777 tmpfs /dev/shm && hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--mount", "--uts", "sh", "-c", inside, "sh", *words]

    @contextmanager
    def without(self, other: "Simulated") -> Iterator[None]:
        """It does not reach the other one meanwhile."""
        _ip("-n", self.name, "route", "add", "unreachable", other.address)
        try:
            yield
        finally:
            _ip("-n", self.name, "route", "delete", "unreachable", other.address)

    def cut(self) -> None:
        """From now on nothing that it sends arrives, and it receives nothing."""
        _ip("-n", self.name, "link", "set", "eth0", "down")


@contextmanager
def simulated_hosts(count: int) -> Iterator[list[Simulated]]:
    """So many hosts that reach each other, and nothing else."""
    mark = f"or{os.getpid() % 100000}"
    hosts = [Simulated(f"{mark}h{number}", f"10.213.77.{number + 1}") for number in range(count)]
    # The bridge is in a namespace as well: nothing of it is seen on the machine.
    switch = f"{mark}sw"
    made = []
    try:
        for name in [switch, *(host.name for host in hosts)]:
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, host in enumerate(hosts):
            _ip(
                "-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", host.name
            )
            _ip("-n", switch, "link", "set", f"port{number}", "master", "br0", "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
        yield hosts
    finally:
        for name in made:
            _ip("netns", "delete", name)


def why_not() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"there is no command {tool}"
    try:
        with simulated_hosts(2) as [first, second]:
            # A ping would be one more command to have; the way there is what matters.
            subprocess.run(first.command("ip", "route", "get", second.address), check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        return f"{' '.join(map(str, error.cmd[:3]))}: {(error.stderr or b'').decode().strip()}"
    return None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
