"""Which network interface the ranks of a gang talk through: they would take the first, or that of the host's name."""

import fcntl
import socket
import struct
import sys
from ipaddress import IPv4Address, IPv4Interface

SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B


def of_interface(address: str) -> dict[str, str]:
    """Environment variables by which gloo and NCCL use the interface with an address; none when it is not found."""
    interface = _interface(address)
    return {f"{library}_SOCKET_IFNAME": interface for library in ("GLOO", "NCCL")} if interface else {}


def _interface(address: str) -> str | None:
    """The network interface with an address, or else one on whose network it lies. None: not found."""
    if sys.platform != "linux":
        return None
    wanted, near = IPv4Address(address), None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode())
            try:
                own, mask = (fcntl.ioctl(probe, code, asked)[20:24] for code in (SIOCGIFADDR, SIOCGIFNETMASK))
            except OSError:  # it has no IPv4 address
                continue
            found = IPv4Interface((own, bin(int.from_bytes(mask)).count("1")))
            if found.ip == wanted:
                return name
            if wanted in found.network:
                near = name
    return near
