"""Addresses and ports of this machine that nobody else uses."""

import contextlib
import socket

from tests.cluster.host.progress import Unavailable


def host_address() -> str:
    """Return this machine's own address, the one that is not loopback; no packet is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # 192.0.2.0/24 is reserved for documentation: any route to it shows the default source address.
        with contextlib.suppress(OSError):
            probe.connect(("192.0.2.254", 9))
        address = str(probe.getsockname()[0])
    if address == "0.0.0.0":
        raise Unavailable("this machine has no network address besides loopback, and a node needs one")
    return address


def free_ports(count: int) -> list[int]:
    """Return ports that are free on every address at the time of asking."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [int(each.getsockname()[1]) for each in sockets]
