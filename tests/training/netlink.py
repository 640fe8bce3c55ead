"""Network devices without iproute2: a pair of joined Ethernet devices, addresses, links up and down (rtnetlink(7)).

Each function acts in the network namespace of the process that calls it, which must hold its capabilities.
"""

import socket
import struct

NEWLINK, NEWADDR, ERROR = 16, 20, 2  # message types
REQUEST, ACK, CREATE, EXCLUSIVE = 1, 4, 0x400, 0x200
IFF_UP = 1
IFLA_IFNAME, IFLA_LINKINFO, IFLA_NET_NS_PID = 3, 18, 19
INFO_KIND, INFO_DATA, VETH_PEER = 1, 2, 1
IFA_ADDRESS, IFA_LOCAL = 1, 2


def join(name: str, other_pid: int) -> None:
    """Makes a pair of devices called ``name``: one here, one in the namespace of another process."""
    peer = _link() + _attribute(IFLA_IFNAME, name.encode() + b"\0")
    peer += _attribute(IFLA_NET_NS_PID, struct.pack("I", other_pid))
    kind = _attribute(INFO_KIND, b"veth") + _attribute(INFO_DATA, _attribute(VETH_PEER, peer))
    device = _link() + _attribute(IFLA_IFNAME, name.encode() + b"\0") + _attribute(IFLA_LINKINFO, kind)
    _ask(NEWLINK, CREATE | EXCLUSIVE, device)


def set_address(name: str, address: str) -> None:
    """Gives a device an IPv4 address in a network of 256."""
    packed = socket.inet_aton(address)
    head = struct.pack("BBBBI", socket.AF_INET, 24, 0, 0, socket.if_nametoindex(name))
    attributes = _attribute(IFA_LOCAL, packed) + _attribute(IFA_ADDRESS, packed)
    _ask(NEWADDR, CREATE | EXCLUSIVE, head + attributes)


def set_link(name: str, up: bool) -> None:
    """Takes a device into use, or out: what is sent over it is lost, and nobody is told."""
    _ask(NEWLINK, 0, _link(socket.if_nametoindex(name), IFF_UP if up else 0))


def _link(index: int = 0, flags: int = 0) -> bytes:
    return struct.pack("BBHiII", socket.AF_UNSPEC, 0, 0, index, flags, IFF_UP if index else 0)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _ask(kind: int, flags: int, body: bytes) -> None:
    """Sends one message and waits for its acknowledgement; OSError as the kernel says."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.send(struct.pack("IHHII", 16 + len(body), kind, REQUEST | ACK | flags, 1, 0) + body)
        answer = kernel.recv(65536)
    if struct.unpack_from("H", answer, 4)[0] == ERROR and (code := struct.unpack_from("i", answer, 16)[0]):
        raise OSError(-code, f"netlink: {kind}")
