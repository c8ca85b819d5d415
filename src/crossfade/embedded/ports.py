"""Ports on 127.0.0.1 for the servers."""

from __future__ import annotations

import random
import socket
from pathlib import Path

#: Below the range that the system hands out to outgoing connections (Linux: from 32768), so that no client
#: takes a server's port while that server is down and about to come back.
_LOWEST, _HIGHEST = 15000, 32000


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on at this moment."""
    highest = _HIGHEST
    try:
        lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        highest = min(highest, lowest_outgoing) if lowest_outgoing > _LOWEST + 1000 else highest
    except (OSError, ValueError):
        pass
    chooser = random.SystemRandom()
    for _ in range(200):
        port = chooser.randrange(_LOWEST, highest)
        if is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
